"""What every architecture shares, and the two functions that an architecture adds.

The four systems (plain, denoising, dropout, variational) live here once. ``mlp.py`` and ``conv.py`` only say how an
image becomes a code and a code becomes an image. A model of your own does the same: see ``examples/own_model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ae.config import ObjectiveConfig
from dist_ae.draws import Draws, DrawShapes

# exp(logvar) and exp(-logvar) stay finite and normal in half precision (largest 65,504, smallest normal 6.1e-5).
LOGVAR_RANGE = (-9.0, 11.0)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
START_LOG_SIGMA = math.log(0.25)  # of a learned σ: about the error of the mean image


class Output(NamedTuple):
    """What a forward pass gives for B images. ``None`` means that this model has no such thing."""

    raw: Tensor  # [B, C, H, W]: logits of a Bernoulli model, pixels on [-1, 1] of a Gaussian one
    mean: Tensor  # [B, *code_shape], the code
    logvar: Tensor | None  # [B, *code_shape], of a variational model
    log_sigma: Tensor | None  # [], of a Gaussian model that learns its σ
    bernoulli: bool

    @property
    def reconstruction(self) -> Tensor:
        """[B, C, H, W] on [0, 1]; a Gaussian model may leave that range."""
        return pixels(self.raw, self.bernoulli)


class LinearCode(NamedTuple):
    """The best linear code that a model can carry. Its PCA start takes it, and the model is compared with it."""

    components: int  # principal components that the start sets
    patch: int | None  # side of the patches that are coded one by one; None codes the whole image
    values: int  # numbers that a code has per patch (or image)


class Components(NamedTuple):
    """Principal components of images or patches on [-1, 1], float64."""

    mean: Tensor  # [D]
    variances: Tensor  # [k], largest first
    basis: Tensor  # [k, D], orthonormal rows
    total_variance: float  # over all D directions


def pixels(raw: Tensor, bernoulli: bool) -> Tensor:
    """The last layer's output as pixels on [0, 1]."""
    return torch.sigmoid(raw) if bernoulli else (raw + 1) / 2


def centred(images: Tensor) -> Tensor:
    """Images on [0, 1] → on [-1, 1], where the model works."""
    return images.mul(2).sub_(1)


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """images [B, C, H, W] with height and width raised to multiples of ``factor`` by repeating the edge."""
    height, width = images.shape[-2:]
    if height % factor == 0 and width % factor == 0:
        return images
    return F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")


class Autoencoder(nn.Module):
    """The base of every model: corruption, the code's distribution and the scale of pixels.

    An architecture defines ``encode_raw`` and ``decode_raw`` and, where it drops units, ``mask_shapes``. A forward pass
    is a pure function of images and draws: no global generator, no statistics over the batch.
    """

    mask_shapes: tuple[tuple[int, ...], ...] = ()  # of one image's dropout masks, the encoder's first
    encoder_masks: int = 0  # how many of them are the encoder's
    zeros: tuple[str, ...] = ()  # names of the layers that start at zero

    def __init__(
        self,
        image_shape: Sequence[int],
        code_shape: Sequence[int],
        *,
        variational: bool = False,
        bernoulli: bool = False,
        learned_sigma: bool = False,
    ) -> None:
        """Args:
        image_shape: channels, height, width.
        code_shape: of one image's code: (length,), or (channels, height, width).
        variational: the encoder also predicts a log-variance, so ``encode_raw`` gives twice the channels.
        bernoulli: the decoder gives logits; else pixels on [-1, 1].
        learned_sigma: a Gaussian pixel's σ is a parameter.
        """
        super().__init__()
        self.image_shape, self.code_shape = tuple(image_shape), tuple(code_shape)
        self.variational, self.bernoulli = variational, bernoulli
        self.log_sigma = nn.Parameter(torch.tensor(START_LOG_SIGMA)) if learned_sigma else None

    def encode_raw(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """images [B, C, H, W] on [-1, 1] → codes [B, *code_shape].

        A variational model gives mean and log-variance, one after the other along dimension 1.
        """
        raise NotImplementedError

    def decode_raw(self, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """codes [B, *code_shape] → [B, C, H, W]: logits of a Bernoulli model, pixels on [-1, 1] of a Gaussian one."""
        raise NotImplementedError

    def matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon may treat as matrices; the others go to its Adam."""
        return [p for p in self.parameters() if p.ndim == 2]

    def linear_code(self) -> LinearCode | None:
        """The linear code that ``start_from`` takes; None for a model without a PCA start."""
        return None

    def start_from(self, components: Components, objective: ObjectiveConfig) -> None:
        """Sets the weights so that the model is the linear code of these components."""
        raise NotImplementedError

    def draw_shapes(self) -> DrawShapes:
        """The shapes of the random draws of one image."""
        return DrawShapes(self.image_shape, self.mask_shapes, self.code_shape if self.variational else None)

    def encode(self, images: Tensor, masks: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None]:
        """images [B, C, H, W] on [0, 1] → mean and log-variance of the code, each [B, *code_shape].

        The log-variance is None unless the model is variational.

        Raises:
            ValueError: the images' shape is not the model's.
        """
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected images of shape [B, {expected}], got {list(images.shape)}")
        raw = self.encode_raw(centred(images), masks)
        if not self.variational:
            return raw, None
        mean, logvar = raw.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, code: Tensor) -> Tensor:
        """codes [B, *code_shape] → reconstructions [B, C, H, W] on [0, 1]."""
        return pixels(self.decode_raw(code), self.bernoulli)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Output:
        """Reconstructs images [B, C, H, W] on [0, 1]. ``draws=None`` is the deterministic model, with the mean code."""
        draws = draws or Draws()
        corrupted = images if draws.noise is None else images + draws.noise
        mean, logvar = self.encode(corrupted, draws.masks[: self.encoder_masks])
        code = mean
        if logvar is not None and draws.epsilon is not None:
            # z = μ + σ·ε ~ N(μ, σ²) (Kingma & Welling 2014, eq. 10)
            code = mean + torch.exp(0.5 * logvar) * draws.epsilon
        raw = self.decode_raw(code, draws.masks[self.encoder_masks :])
        return Output(raw, mean, logvar, self.log_sigma, self.bernoulli)
