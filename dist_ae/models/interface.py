"""The base class of all architectures, and the two methods that an architecture adds.

The four systems (plain, denoising, dropout, variational) are implemented here once. ``mlp.py`` and ``conv.py`` only
define how an image becomes a code and a code becomes an image. A model of your own does the same: see
``examples/own_model.py``.
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
    """The output of a forward pass for B images. ``None`` means that the model has no such output."""

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
    """The best linear code that a model can represent. A PCA start sets it, and the model is compared with it."""

    components: int  # principal components that the start sets
    patch: tuple[int, int] | None  # height and width of patches that are coded separately; None: the whole image
    values: int  # size of the code per patch (or image)


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
    """Pixels as uint8; those outside [0, 1] are clamped."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def centred(images: Tensor) -> Tensor:
    """Maps images from [0, 1] to [-1, 1], the scale inside the model."""
    return images.mul(2).sub_(1)


def pad_to_multiple(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pads images [B, C, H, W] to multiples of ``size`` (height, width) by repeating the lower and right edges."""
    down, right = (-side % multiple for side, multiple in zip(images.shape[-2:], size, strict=True))
    return F.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


class Autoencoder(nn.Module):
    """Base class: adds noise, samples the code, and maps pixels between [0, 1] and [-1, 1].

    An architecture defines ``encode_raw`` and ``decode_raw`` and, for dropout, ``mask_shapes``. A forward pass
    is a pure function of images and draws: no global generator, no statistics over the batch.
    """

    mask_shapes: tuple[tuple[int, ...], ...] = ()  # of one image's dropout masks, the encoder's first
    encoder_masks: int = 0  # how many of the masks belong to the encoder
    zeros: tuple[str, ...] = ()  # names of the layers that start at zero
    units_offset: Tensor | None  # [C, 1, 1]: a record in its own units is offset + scale · the model's input
    units_scale: Tensor | None  # [C, 1, 1]; both are None for records on [0, 1]
    record_shape: tuple[int, ...] | None = None  # of a record outside the model, if it is no image
    standardized = False  # the model's input has mean 0 and deviation 1; else it is on [0, 1]
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
        code_shape: shape of one image's code: (length,), or (channels, height, width).
        variational: the encoder also predicts a log-variance, so ``encode_raw`` returns twice the channels.
        bernoulli: the decoder returns logits; else pixels on [-1, 1].
        learned_sigma: the σ of a Gaussian pixel is a parameter.
        """
        super().__init__()
        self.image_shape, self.code_shape = tuple(image_shape), tuple(code_shape)
        self.variational, self.bernoulli = variational, bernoulli
        self.register_buffer("units_offset", None)
        self.register_buffer("units_scale", None)
        self.log_sigma = nn.Parameter(torch.tensor(START_LOG_SIGMA)) if learned_sigma else None

    def encode_raw(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """images [B, C, H, W] on [-1, 1] → codes [B, *code_shape].

        A variational model returns mean and log-variance, concatenated along dimension 1.
        """
        raise NotImplementedError

    def decode_raw(self, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """codes [B, *code_shape] → [B, C, H, W]: logits of a Bernoulli model, else pixels on [-1, 1]."""
        raise NotImplementedError

    def at(self, height: int, width: int) -> Autoencoder | None:
        """The same weights for images of another size; None if the model has a fixed size."""
        return None

    def reach(self) -> int | None:
        """Distance in pixels beyond which no pixel affects another's result; None if all pixels do."""
        return None

    def matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon may treat as matrices; the others go to its Adam."""
        return [p for p in self.parameters() if p.ndim == 2]

    def linear_code(self) -> LinearCode | None:
        """The linear code that ``start_from`` sets; None for a model without a PCA start."""
        return None

    def start_from(self, components: Components, objective: ObjectiveConfig) -> None:
        """Sets the weights so that the model is the linear code of these components."""
        raise NotImplementedError

    def draw_shapes(self) -> DrawShapes:
        """The shapes of the random draws of one image."""
        return DrawShapes(self.image_shape, self.mask_shapes, self.code_shape if self.variational else None)

    def take_units(self, standardized: bool, missing: bool) -> None:
        """Gives the model a scale for each channel, as buffers: see ``to_units`` and ``from_units``.

        Args:
            standardized: the model's input has mean 0 and deviation 1; else it is on [0, 1].
            missing: NaN stands for a missing entry, which the mean replaces at the input.
        """
        self.units_offset = torch.zeros(self.image_shape[0], 1, 1)
        self.units_scale = torch.ones(self.image_shape[0], 1, 1)
        self.standardized, self.missing = standardized, missing

    def to_units(self, records: Tensor) -> Tensor:
        """Records [B, C, H, W] in their own units → the model's input: on [0, 1], or standardized."""
        if self.units_offset is None or self.units_scale is None:
            return records
        return (records - self.units_offset) / self.units_scale

    def from_units(self, images: Tensor) -> Tensor:
        """The model's output [B, C, H, W] → records in their own units, or images clamped to [0, 1]."""
        if self.units_offset is None or self.units_scale is None:
            return images.clamp(0, 1)
        return images * self.units_scale + self.units_offset

    def outside(self, images: Tensor) -> Tensor:
        """The model's output [B, C, H, W] in the units and the shape of the original records."""
        records = self.from_units(images)
        return records if self.record_shape is None else records.reshape(-1, *self.record_shape)

    def visible(self, images: Tensor) -> Tensor:
        """Input or output of the model [..., C, H, W] as pictures on [0, 1]; standardized, from -3 to 3 deviations."""
        return images / 6 + 0.5 if self.standardized else images

    def unit(self, raw: Tensor) -> Tensor:
        """The decoder's output [B, C, H, W] on the scale of the input images."""
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
        """codes [B, *code_shape] → reconstructions [B, C, H, W], on the scale of the input images."""
        return self.unit(self.decode_raw(code))

    def forward(self, images: Tensor, draws: Draws | None = None) -> Output:
        """Reconstructs images [B, C, H, W] on [0, 1], or standardized.

        With ``draws=None`` the model is deterministic and uses the mean code.
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
