"""The PCA start: an autoencoder that begins as the best linear code there is, instead of working towards it.

act(a) - act(-a) = a for relu, gelu and silu alike, so two hidden units carry one linear component through a layer unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dist_ae.config import Config, InputError
from dist_ae.data.order import share
from dist_ae.data.reader import Reader
from dist_ae.models import LOGVAR_RANGE, Autoencoder
from dist_ae.processes.runtime import Runtime

MAX_PIXELS = 8192  # the covariance has pixels² entries in float64: 512 MiB
CHUNK = 256  # rows at once: sums of 256 products of bytes are exact in float32, so the covariance is the same on any number of processes


@torch.no_grad()
def covariance(reader: Reader, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of a split on [-1, 1], float64; each process sums its part and only the sums travel."""
    pixels = math.prod(reader.split.images.shape[1:])
    total = torch.zeros(pixels, dtype=torch.float64)
    gram = torch.zeros(pixels, pixels, dtype=torch.float64)
    integers = reader.split.images.dtype == "uint8"
    mine = share(range(len(reader.split)), runtime.rank, runtime.world)
    for start in range(mine.start, mine.stop, CHUNK):
        images = reader.span(range(start, min(start + CHUNK, mine.stop))).flatten(1).cpu()
        images = images.mul(255).round_().float() if integers else images.double()
        total += images.double().sum(0)
        gram += images.T @ images
    count, scale = len(reader.split), 2 / 255 if integers else 2.0
    total, gram = runtime.sum(total.to(runtime.device)).cpu(), runtime.sum(gram.to(runtime.device)).cpu()
    mean = total / count
    return mean * scale - 1, (gram / count - torch.outer(mean, mean)) * scale**2


@torch.no_grad()
def pca_start(model: Autoencoder, config: Config, reader: Reader, runtime: Runtime) -> None:
    """Sets the weights so that the model is PCA of the training images (of a VAE: probabilistic PCA, Tipping & Bishop 1999).

    As many leading components as the code and half the narrowest hidden layer hold; the other units keep their random incoming
    weights and start without influence. Rank 0's weights count: DDP hands them on.

    Raises:
        InputError: images too large for a covariance matrix.
    """
    mean, cov = covariance(reader, runtime)
    if not runtime.is_main:
        return
    values, vectors = torch.linalg.eigh(cov)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    vectors = vectors * torch.where(
        vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0
    )  # eigh leaves the sign open
    k = components(config, len(mean))
    values, basis = values[:k], vectors[:, :k].T  # [k], [k, D]
    into, out, logvar = basis, basis.T, None
    if config.model.variational:
        # z = W⁺ (x - m) with W = U (Λ - σ²)^½: posterior mean (Λ - σ²)^½ Λ⁻¹ Uᵀ (x - m), variance σ² Λ⁻¹. σ on [-1, 1] is twice that on [0, 1].
        discarded = float(cov.diagonal().sum() - values.sum()) / max(1, len(mean) - k)
        variance = (
            max(discarded, 1e-6) if config.objective.sigma == "learned" else (2 * float(config.objective.sigma)) ** 2
        )
        scale = (values - variance).clamp(min=0).sqrt()
        into, out = basis * (scale / values.clamp(min=1e-12))[:, None], basis.T * scale
        logvar = torch.where(scale > 0, (variance / values.clamp(min=1e-12)).log(), torch.zeros(())).clamp(
            *LOGVAR_RANGE
        )
        if model.log_sigma is not None:
            model.log_sigma.fill_(0.5 * math.log(variance) - math.log(2))
    layers = [*model.encoder, model.to_code, *model.decoder, model.to_pixels]
    for index, layer in enumerate(layers):
        assert isinstance(layer, nn.Linear)
        first, last, is_code = index == 0, layer is model.to_pixels, layer is model.to_code
        # What comes in as pairs (a, -a) of hidden units, or as a itself from pixels or the code; what goes out likewise.
        matrix = torch.eye(k, dtype=torch.float64)
        bias = torch.zeros(k, dtype=torch.float64)
        if first:
            matrix, bias = into, -into @ mean
        if last:
            matrix, bias = matrix @ out.T if first else out, mean
        paired_in = not first and layers[index - 1] is not model.to_code
        if paired_in:
            matrix = torch.cat([matrix, -matrix], 1)
        if not (is_code or last):
            matrix, bias = torch.cat([matrix, -matrix]), torch.cat([bias, -bias])
        rows, columns = matrix.shape
        if is_code:
            layer.weight.zero_()
            layer.bias.zero_()
        layer.weight[:rows] = 0  # units outside the carried pairs start without influence on them
        layer.weight[:rows, :columns] = matrix.to(layer.weight)
        layer.bias[:rows] = bias.to(layer.bias)
        if is_code and logvar is not None:
            layer.bias[config.model.latent_dim : config.model.latent_dim + k] = logvar.to(layer.bias)


def components(config: Config, pixels: int) -> int:
    """How many principal components the network can carry from start to end."""
    return min(config.model.latent_dim, pixels, *(width // 2 for width in config.model.hidden_dims))


def check(config: Config, pixels: int) -> None:
    """Refuses a PCA start that cannot be.

    Raises:
        InputError: with the reason and the way out.
    """
    if config.model.start != "pca":
        return
    if config.objective.likelihood == "bernoulli":
        raise InputError(
            "model.start pca needs objective.likelihood gaussian: PCA gives pixels, not the logits of a Bernoulli model"
        )
    if pixels > MAX_PIXELS:
        raise InputError(
            f"model.start pca needs images of at most {MAX_PIXELS} values, got {pixels}; use model.start random"
        )
    if components(config, pixels) < 1:
        raise InputError("model.start pca needs hidden layers of at least 2 units")
