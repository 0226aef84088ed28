"""The best linear codes as encoders and decoders, for the weights of a PCA start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_ae.models.interface import LOGVAR_RANGE, Components

if TYPE_CHECKING:
    from dist_ae.config import ObjectiveConfig

NO_VARIANCE = 1e-12  # on [-1, 1]; smaller ones are rounding errors. A byte that differs once in 65,536 has 1e-9
LEAST_SCALE = 1e-3  # of the largest standard deviation, so that 1 / scale stays far below the largest fp16 number


def whitened(components: Components) -> tuple[Tensor, Tensor]:
    """PCA whose code has variance one: into [k, D], out [D, k]; out @ into projects onto the components.

    For data without variance, the code is zero and the reconstruction is the mean.
    """
    if float(components.variances[0]) < NO_VARIANCE:
        return torch.zeros_like(components.basis), torch.zeros_like(components.basis.T)
    scale = components.variances.sqrt()
    scale = scale.clamp(min=max(LEAST_SCALE * float(scale[0]), 1e-12))
    return components.basis / scale[:, None], components.basis.T * scale


def leading(components: Components, num: int) -> Components:
    """The first ``num`` of the components, or all if there are fewer."""
    return components._replace(variances=components.variances[:num], basis=components.basis[:num])


def probabilistic(components: Components, objective: ObjectiveConfig) -> tuple[Tensor, Tensor, Tensor, float]:
    """Probabilistic PCA as an encoder and a decoder: into [k, D], out [D, k], log-variance [k], log σ on [0, 1].

    z = W⁺ (x - m) with W = U (Λ - σ²)^½: posterior mean (Λ - σ²)^½ Λ⁻¹ Uᵀ (x - m), variance σ² Λ⁻¹ (Tipping & Bishop
    1999, sections 3.2 and 3.3). σ on [-1, 1], where the model works, is twice that on [0, 1].
    """
    mean, values, basis, total, standardized = components
    unit = 1.0 if standardized else 2.0  # how much larger a deviation is inside the model
    discarded = (total - float(values.sum())) / max(1, len(mean) - len(values))
    learned = objective.sigma == "learned"
    variance = max(discarded, 1e-6) if learned else (unit * float(objective.sigma)) ** 2
    scale = (values - variance).clamp(min=0).sqrt()
    safe = values.clamp(min=1e-12)
    logvar = torch.where(scale > 0, (variance / safe).log(), torch.zeros(())).clamp(*LOGVAR_RANGE)
    return basis * (scale / safe)[:, None], basis.T * scale, logvar, 0.5 * math.log(variance) - math.log(unit)
