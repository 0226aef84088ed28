"""Initial weights, and a hash of weights, for any architecture."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from dist_ae.draws import keyed_seed
from dist_ae.models.conv import Convolution
from dist_ae.models.interface import START_LOG_SIGMA, Autoencoder

M = TypeVar("M", bound=Autoencoder)


@torch.no_grad()
def initialize(model: M, seed: int) -> M:
    """Fills linear and convolutional layers as torch does, uniform in ±1/√fan_in; a learned σ starts at 0.25.

    Norms start as the identity, and the layers that the model names in ``zeros`` start at zero.

    Each tensor is keyed by seed and name, so no global generator is touched and any device gets the same weights.
    """
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            parameter.fill_(START_LOG_SIGMA)
            continue
        owner, _, kind = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            parameter.fill_(1.0 if kind == "weight" else 0.0)
            continue
        if owner in model.zeros:
            parameter.zero_()
            continue
        assert isinstance(layer, nn.Linear | nn.Conv2d | Convolution), name
        bound = math.prod(layer.weight.shape[1:]) ** -0.5
        generator = torch.Generator().manual_seed(keyed_seed(seed, "weights", name))
        parameter.uniform_(-bound, bound, generator=generator)
    return model


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values. Equal weights have equal hashes, whatever file they were in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
