"""What every architecture shares, and the two functions that an architecture adds.

The four systems (plain, denoising, dropout, variational) live here once. ``mlp.py`` and ``conv.py`` only say how an
image becomes a code and a code becomes an image. A model of your own does the same: see ``examples/own_model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ae.draws import Draws, DrawShapes

if TYPE_CHECKING:
    from dist_ae.config import ObjectiveConfig

# exp(logvar) and exp(-logvar) stay finite and normal in half precision (largest 65,504, smallest normal 6.1e-5).
LOGVAR_RANGE = (-9.0, 11.0)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
START_LOG_SIGMA = math.log(0.25)  # of a learned σ: about the error of the mean image


class Output(NamedTuple):
    """What a forward pass gives for B images. ``None`` means that this model has no such thing."""

    raw: Tensor  # [B, C, H, W]: logits of a Bernoulli model, else pixels on [-1, 1] or standardized numbers
    mean: Tensor  # [B, *code_shape], the code
    logvar: Tensor | None  # [B, *code_shape], of a variational model
    log_sigma: Tensor | None  # [], of a Gaussian model that learns its σ
    bernoulli: bool
    standardized: bool = False  # records of mean 0 and deviation 1, in place of pixels
    missing: bool = False  # NaN in the records stands for a missing entry

    @property
    def reconstruction(self) -> Tensor:
        """[B, C, H, W], on the scale of the images: [0, 1], which a Gaussian model may leave, or standardized."""
        return self.raw if self.standardized else pixels(self.raw, self.bernoulli)


class LinearCode(NamedTuple):
    """The best linear code that a model can carry. Its PCA start takes it, and the model is compared with it."""

    components: int  # principal components that the start sets
    patch: tuple[int, int] | None  # height and width of patches that are coded one by one; None: the whole image
    values: int  # numbers that a code has per patch (or image)


class Components(NamedTuple):
    """Principal components of images or patches, float64, on the scale inside a model: [-1, 1], or standardized."""

    mean: Tensor  # [D]
    variances: Tensor  # [k], largest first
    basis: Tensor  # [k, D], orthonormal rows
    total_variance: float  # over all D directions
    standardized: bool = False


def pixels(raw: Tensor, bernoulli: bool) -> Tensor:
    """The last layer's output as pixels on [0, 1]."""
    return torch.sigmoid(raw) if bernoulli else (raw + 1) / 2


def as_bytes(images: Tensor) -> Tensor:
    """Pixels on [0, 1], which they may leave, as uint8."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def centred(images: Tensor) -> Tensor:
    """Images on [0, 1] → on [-1, 1], where the model works."""
    return images.mul(2).sub_(1)


def pad_to_multiple(images: Tensor, size: tuple[int, int]) -> Tensor:
    """images [B, C, H, W] with height and width raised to multiples of those of ``size`` by repeating the edge."""
    down, right = (-side % multiple for side, multiple in zip(images.shape[-2:], size, strict=True))
    return F.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


class Autoencoder(nn.Module):
    """Base class: adds noise, samples the code, and maps pixels between [0, 1] and [-1, 1].

    An architecture defines ``encode_raw`` and ``decode_raw`` and, where it drops units, ``mask_shapes``. A forward pass
    is a pure function of images and draws: no global generator, no statistics over the batch.
    """

    mask_shapes: tuple[tuple[int, ...], ...] = ()  # of one image's dropout masks, the encoder's first
    encoder_masks: int = 0  # how many of them are the encoder's
    zeros: tuple[str, ...] = ()  # names of the layers that start at zero
    units_offset: Tensor | None  # [C, 1, 1]: a record in its own units is offset + scale · what the model sees
    units_scale: Tensor | None  # [C, 1, 1]; both None where records come on [0, 1]
    record_shape: tuple[int, ...] | None = None  # of a record outside, where it is no image
    standardized = False  # what the model sees has mean 0 and deviation 1; else it is on [0, 1]
    missing = False  # NaN stands for a missing entry

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
        self.register_buffer("units_offset", None)
        self.register_buffer("units_scale", None)
        self.log_sigma = nn.Parameter(torch.tensor(START_LOG_SIGMA)) if learned_sigma else None

    def encode_raw(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """images [B, C, H, W] on [-1, 1] → codes [B, *code_shape].

        A variational model gives mean and log-variance, one after the other along dimension 1.
        """
        raise NotImplementedError

    def decode_raw(self, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """codes [B, *code_shape] → [B, C, H, W]: logits of a Bernoulli model, pixels on [-1, 1] of a Gaussian one."""
        raise NotImplementedError

    def at(self, height: int, width: int) -> Autoencoder | None:
        """The same weights for images of another size; None where the model has one size."""
        return None

    def reach(self) -> int | None:
        """Pixels beyond which nothing of an image changes what is made of a pixel; None where all of it does."""
        return None

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

    def take_units(self, standardized: bool, missing: bool) -> None:
        """Gives the model a scale of its own for each channel, kept beside its weights: ``to_units``, ``from_units``.

        Args:
            standardized: what the model sees has mean 0 and deviation 1; else it is on [0, 1].
            missing: NaN stands for a missing entry, whose place the mean takes.
        """
        self.units_offset = torch.zeros(self.image_shape[0], 1, 1)
        self.units_scale = torch.ones(self.image_shape[0], 1, 1)
        self.standardized, self.missing = standardized, missing

    def to_units(self, records: Tensor) -> Tensor:
        """Records [B, C, H, W] in their own units → what the model takes: on [0, 1], or standardized."""
        if self.units_offset is None or self.units_scale is None:
            return records
        return (records - self.units_offset) / self.units_scale

    def from_units(self, images: Tensor) -> Tensor:
        """What the model gives [B, C, H, W] → records in their own units, or images clamped to [0, 1]."""
        if self.units_offset is None or self.units_scale is None:
            return images.clamp(0, 1)
        return images * self.units_scale + self.units_offset

    def outside(self, images: Tensor) -> Tensor:
        """What the model gives [B, C, H, W] in the units and the shape that records have outside."""
        records = self.from_units(images)
        return records if self.record_shape is None else records.reshape(-1, *self.record_shape)

    def visible(self, images: Tensor) -> Tensor:
        """What the model takes or gives [..., C, H, W] as pictures on [0, 1], from minus to plus three deviations."""
        return images / 6 + 0.5 if self.standardized else images

    def unit(self, raw: Tensor) -> Tensor:
        """The decoder's output [B, C, H, W] on the scale of the images that come in."""
        return raw if self.standardized else pixels(raw, self.bernoulli)

    def encode(self, images: Tensor, masks: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None]:
        """images [B, C, H, W] on [0, 1], or standardized → mean and log-variance of the code, each [B, *code_shape].

        The log-variance is None unless the model is variational.

        Raises:
            ValueError: the images' shape is not the model's.
        """
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected images of shape [B, {expected}], got {list(images.shape)}")
        if self.missing:
            images = torch.where(images.isnan(), 0.0, images)  # the mean
        raw = self.encode_raw(images if self.standardized else centred(images), masks)
        if not self.variational:
            return raw, None
        mean, logvar = raw.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, code: Tensor) -> Tensor:
        """codes [B, *code_shape] → reconstructions [B, C, H, W], on the scale of the images that come in."""
        return self.unit(self.decode_raw(code))

    def forward(self, images: Tensor, draws: Draws | None = None) -> Output:
        """Reconstructs images [B, C, H, W] on [0, 1], or standardized.

        ``draws=None`` is the deterministic model, with the mean code.
        """
        draws = draws or Draws()
        corrupted = images if draws.noise is None else images + draws.noise
        mean, logvar = self.encode(corrupted, draws.masks[: self.encoder_masks])
        code = mean
        if logvar is not None and draws.epsilon is not None:
            # z = μ + σ·ε ~ N(μ, σ²) (Kingma & Welling 2014, eq. 10)
            code = mean + torch.exp(0.5 * logvar) * draws.epsilon
        raw = self.decode_raw(code, draws.masks[self.encoder_masks :])
        return Output(raw, mean, logvar, self.log_sigma, self.bernoulli, self.standardized, self.missing)
