"""The one objective, per example: distortion + β · rate, in nats per image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ae.draws import Draws
from dist_ae.models import Output, centred, pixels

if TYPE_CHECKING:
    from dist_ae.config import ObjectiveConfig

ROUND = 1e-3  # ε of Charbonnier's penalty on [0, 1] pixels: a quarter of a step of a byte
# Bounds of a learned σ: below the rounding error of a byte, the density of pixels is unbounded and means nothing. For
# floats and 16 bits, the bound is the precision of a network's arithmetic.
LEAST_SIGMA_OF_BYTES, LEAST_SIGMA = 1 / 255 / math.sqrt(12), 5e-4
Model = Callable[[Tensor, Draws | None], Output]  # the prepared module, which is only called


class Terms(NamedTuple):
    """Per-example terms, each [B], in nats per image."""

    loss: Tensor
    distortion: Tensor
    rate: Tensor


def gaussian_kl(
    mean: Tensor, logvar: Tensor, prior_mean: float | Tensor = 0.0, prior_logvar: float | Tensor = 0.0
) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(prior_mean, exp(prior_logvar))) summed over the code, [B, …] → [B], nats.

    Per dimension it is ½ (log σ₀²/σ² + (σ² + (μ-μ₀)²) / σ₀² - 1): ≥ 0, and 0 only where both are equal
    (Kingma & Welling 2014, appendix B, for any prior). Computed in at least float32.
    """
    mean, logvar = _at_least_float(mean), _at_least_float(logvar)
    difference = logvar - prior_logvar
    # Python numbers stay so: as tensors on a GPU, each would be a copy that the host waits for in every step.
    precision = torch.exp(-prior_logvar) if isinstance(prior_logvar, Tensor) else math.exp(-prior_logvar)
    twice = difference.exp() + (mean - prior_mean).square() * precision - 1 - difference
    return 0.5 * twice.flatten(1).sum(1)


def gaussian_distortion(
    images: Tensor, reconstruction: Tensor, log_sigma: float | Tensor, missing: bool = False
) -> Tensor:
    """-log N(images; reconstruction, σ²) summed over pixels, [B, C, H, W] → [B], nats; all three on one scale.

    Args:
        missing: NaN in the images stands for a missing entry, which does not count.
    """
    _same_shape(images, reconstruction)
    squared = squared_error(_at_least_float(images), _at_least_float(reconstruction), missing)
    weight = 0.5 * (torch.exp(-2 * log_sigma) if isinstance(log_sigma, Tensor) else math.exp(-2 * log_sigma))
    entries = present(images, missing)
    return weight * squared + entries * (log_sigma + 0.5 * math.log(2 * math.pi))


def laplace_distortion(
    images: Tensor, reconstruction: Tensor, log_sigma: float | Tensor, missing: bool = False
) -> Tensor:
    """-log Laplace(images; reconstruction, b) summed over pixels, [B, C, H, W] → [B], nats; b = σ / √2.

    All are on one scale. It is the absolute error |x - x̂| / b, and log 2b for each pixel.

    Args:
        missing: as in ``gaussian_distortion``.
    """
    _same_shape(images, reconstruction)
    log_scale = log_sigma - 0.5 * math.log(2)
    error = _difference(_at_least_float(images), _at_least_float(reconstruction), missing).abs().flatten(1).sum(1)
    per_unit = torch.exp(-log_scale) if isinstance(log_scale, Tensor) else math.exp(-log_scale)
    return per_unit * error + present(images, missing) * (log_scale + math.log(2))


def charbonnier_distortion(images: Tensor, reconstruction: Tensor, log_sigma: float, epsilon: float) -> Tensor:
    """-log of the density ∝ exp(-√((x - x̂)² + ε²) / b), summed over pixels, [B, C, H, W] → [B], nats; b = σ / √2.

    Charbonnier's penalty (1994) as a distribution, the symmetric hyperbolic one, whose density has the integral
    2 ε K₁(ε / b). For ε → 0 it is Laplace's.
    """
    from scipy.special import k1e  # K₁(z) · exp(z): for a large z, K₁ alone is 0

    _same_shape(images, reconstruction)
    scale = math.exp(log_sigma) / math.sqrt(2)
    error = (_at_least_float(images) - _at_least_float(reconstruction)).square().add(epsilon**2).sqrt() - epsilon
    constant = math.log(2 * epsilon) + math.log(k1e(epsilon / scale))
    return error.flatten(1).sum(1) / scale + math.prod(images.shape[1:]) * constant


def squared_error(images: Tensor, reconstruction: Tensor, missing: bool) -> Tensor:
    """The squared error of each record, summed over its entries that are not missing, [B, C, H, W] → [B]."""
    if not missing:
        return F.mse_loss(reconstruction, images, reduction="none").flatten(1).sum(1)
    return _difference(images, reconstruction, missing).square().flatten(1).sum(1)


def _difference(images: Tensor, reconstruction: Tensor, missing: bool) -> Tensor:
    """reconstruction - images, and 0 for missing entries."""
    if not missing:
        return reconstruction - images
    known = ~images.isnan()
    # Fill before subtracting: the gradient of NaN times 0 is NaN.
    return (reconstruction - torch.where(known, images, 0.0)) * known


def present(images: Tensor, missing: bool) -> Tensor | int:
    """The number of entries of a record, or with missing ones of each record, [B]."""
    return (~images.isnan()).flatten(1).sum(1) if missing else math.prod(images.shape[1:])


def bernoulli_distortion(images: Tensor, logits: Tensor) -> Tensor:
    """-log Bernoulli(images; sigmoid(logits)) summed over pixels on [0, 1], [B, C, H, W] → [B], nats."""
    _same_shape(images, logits)
    logits, images = _at_least_float(logits), _at_least_float(images)
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1)


def discretized_distortion(images: Tensor, reconstruction: Tensor, log_sigma: float | Tensor) -> Tensor:
    """-log of the probability of each 8-bit pixel under a logistic distribution, summed, [B, C, H, W] → [B], nats.

    A pixel v / 255 has the mass of the interval of width 1 / 255 around it. The values 0 and 255 also have all the mass
    below and above. With the interval's ends a > b in units of the scale, the mass is
    sigmoid(a) · sigmoid(-b) · (1 - exp(b - a)), whose logarithm loses no digits.

    Args:
        images, reconstruction: on [0, 1].
        log_sigma: logarithm of the standard deviation, on [0, 1] pixels.
    """
    _same_shape(images, reconstruction)
    images, reconstruction = _at_least_float(images), _at_least_float(reconstruction)
    sigma = log_sigma.exp() if isinstance(log_sigma, Tensor) else math.exp(log_sigma)
    per_unit = math.pi / math.sqrt(3) / sigma  # 1 / scale
    difference = (images - reconstruction) * per_unit
    half = per_unit * (0.5 / 255)
    above, below = F.logsigmoid(difference + half), F.logsigmoid(half - difference)
    width = torch.log(-torch.expm1(-2 * half)) if isinstance(half, Tensor) else math.log(-math.expm1(-2 * half))
    # The intervals of the outermost values are open at one end, so one of the three factors is 1.
    inside = above + below + width
    log_mass = torch.where(images < 0.5 / 255, above, torch.where(images > 1 - 0.5 / 255, below, inside))
    return -log_mass.flatten(1).sum(1)


def least_sigma(likelihood: str, standardized: bool, bytes_: bool) -> float:
    """The lower bound of a learned σ, in its units; 0 for a likelihood that is bounded by itself.

    Args:
        standardized: records have mean 0 and deviation 1, so their range is about twice that of pixels on [0, 1].
        bytes_: pixels are stored as bytes.
    """
    if likelihood == "discretized":
        return 0.0
    return 2 * LEAST_SIGMA if standardized else LEAST_SIGMA_OF_BYTES if bytes_ else LEAST_SIGMA


def terms(output: Output, images: Tensor, config: ObjectiveConfig, beta: float | Tensor | None = None) -> Terms:
    """The terms of one forward pass against the clean images [B, C, H, W]; ``beta=None`` is the configured β.

    Raises:
        ValueError: images and reconstruction differ in shape (broadcasting them would train the mean image).
    """
    log_sigma = math.log(float(config.sigma)) if output.log_sigma is None else output.log_sigma
    if output.bernoulli:
        distortion = bernoulli_distortion(images, output.raw)
    elif config.likelihood == "discretized":
        distortion = discretized_distortion(images, pixels(_at_least_float(output.raw), False), log_sigma)
    elif output.standardized:
        distortion = _density(config.likelihood, images, output.raw, log_sigma, output.missing)
    else:
        # Computed on [-1, 1], the scale of the model, with twice the σ, so the density is half as high. This saves
        # three passes over the pixels.
        distortion = _density(config.likelihood, centred(images), output.raw, log_sigma + math.log(2), False)
        distortion = distortion - math.prod(images.shape[1:]) * math.log(2)
    if output.logvar is None:
        return Terms(distortion, distortion, torch.zeros_like(distortion))
    rate = gaussian_kl(output.mean, output.logvar)
    return Terms(distortion + (config.beta if beta is None else beta) * rate, distortion, rate)


def _density(kind: str, images: Tensor, raw: Tensor, log_sigma: float | Tensor, missing: bool) -> Tensor:
    if kind == "charbonnier":
        assert not isinstance(log_sigma, Tensor)
        return charbonnier_distortion(images, raw, log_sigma, 2 * ROUND)
    density = laplace_distortion if kind == "laplace" else gaussian_distortion
    return density(images, raw, log_sigma, missing)


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _same_shape(images: Tensor, reconstruction: Tensor) -> None:
    if images.shape != reconstruction.shape:
        raise ValueError(
            f"images {list(images.shape)} and reconstruction {list(reconstruction.shape)} must have the same shape"
        )
