"""The metrics that `dist-ae evaluate` adds to those of training.

Every metric is a sum over images, each of which counts once, so it is the same on any number of processes. Expensive
metrics use evenly spaced images, and at most the stated number.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_ae import pca
from dist_ae.config import Config, InputError
from dist_ae.data.order import evenly_spaced
from dist_ae.data.reader import Reader
from dist_ae.data.records import Array
from dist_ae.draws import Step, normal
from dist_ae.evaluate import EVALUATION_SEED, fixed_noise, psnr
from dist_ae.likeness import load
from dist_ae.models import Autoencoder, Components, Output, as_bytes
from dist_ae.objectives import present, squared_error, terms
from dist_ae.processes.runtime import Processes
from dist_ae.scores import SAMPLE, in_batches
from dist_ae.terminal import first_line

LONGEST_PROBED = 4096  # most numbers of a code for a linear probe; a longer code makes its matrix too large
MEDIAN_SIDES = (3, 5)  # of a median filter's window; the better one on the same images counts
DENOISED_VALUES = 2**21  # most values of all denoised images, which bounds the time of non-local means
NLM_STRENGTHS = (0.6, 0.8, 1.0)  # of non-local means, in units of the noise; the best one on the same images counts


class PerImage(NamedTuple):
    """Metrics of single images, each [n]. Those of PCA are None if a model has no linear counterpart."""

    error: Tensor
    ssim: Tensor | None
    pca_error: Tensor | None
    pca_ssim: Tensor | None


class Posterior(NamedTuple):
    """A variational model's code, number by number, over all images: each [L]."""

    rate: Tensor  # nats per image; they add up to the model's rate
    mean: Tensor  # of the aggregate posterior; 0 for N(0, 1)
    variance: Tensor  # of the aggregate posterior; 1 for N(0, 1)
    variance_of_means: Tensor  # above 0.01 the number is active


class ImportanceBound(NamedTuple):
    """Two bounds on the negative log-likelihood, of the same images with the same draws, in nats per image."""

    bound: float  # importance-weighted, of K samples
    neg_elbo: float  # of one sample, averaged over the K


def structural_similarity(images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of pairs of images [B, C, H, W] on [0, 1], [B], and of each of their pixels, [B, C, H, W].

    As Wang et al. (2004): a Gaussian window, 11 × 11 pixels, σ = 1.5; for sides under 6 pixels, 3 × 3, σ = 0.4.

    Raises:
        InputError: a side of the images is shorter than two pixels, so they have no structure.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # half a second to import

    side = min(images.shape[-2:])
    if side < 2:
        raise InputError(f"SSIM needs images of at least 2 × 2 pixels, got {list(images.shape[-2:])}")
    mean, every = structural_similarity_index_measure(
        reconstructions.clamp(0, 1),
        images.clamp(0, 1),
        sigma=1.5 if side > 5 else 0.4,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    return mean, every


@torch.no_grad()
def by_channel(
    model: Autoencoder, components: Components | None, reader: Reader, batch_size: int, runtime: Processes
) -> dict[str, list[float]]:
    """r2 of each channel (a column of a table, a sensor) of standardized records: ``r2``, and PCA's as ``pca_r2``.

    It is 1 minus the squared error as a share of the squares around the training mean: 0 is no better than that mean.
    """
    code, channels = model.linear_code(), model.image_shape[0]
    sums = torch.zeros(3, channels, dtype=runtime.exact, device=runtime.device)
    for _, images in in_batches(reader, torch.arange(len(reader.split)), batch_size, runtime):
        if not len(images):
            continue
        known = ~images.isnan()
        filled = torch.where(known, images, 0.0)
        seen = [model.decode(model.encode(images)[0])]
        if components is not None and code is not None:
            seen.append(pca.coded(components, code.patch, images)[1].to(images))
        for line, values in enumerate([filled * 0, *seen]):
            sums[line] += ((values - filled) * known).square().sum((0, 2, 3)).to(sums)
    squares, *errors = runtime.sum(sums).cpu()
    scores = [torch.where(squares > 0, 1 - error / squares.clamp(min=1e-30), 0.0).tolist() for error in errors]
    return dict(zip(("r2", "pca_r2"), scores[: 1 if components is None else 2], strict=False))


@torch.no_grad()
def per_image(
    model: Autoencoder, components: Components | None, reader: Reader, batch_size: int, runtime: Processes
) -> PerImage:
    """Error and SSIM of the reconstructions of at most 10,000 evenly spaced images, and those of PCA."""
    rows = evenly_spaced(len(reader.split), SAMPLE)
    code = model.linear_code()
    structured = min(model.image_shape[1:]) >= 2 and model.record_shape is None

    def figures(images: Tensor, reconstruction: Tensor) -> list[Tensor]:
        error = squared_error(images, reconstruction, model.missing) / present(images, model.missing)
        return [error, structural_similarity(images, reconstruction)[0]] if structured else [error]

    table = torch.zeros(4, len(rows), dtype=runtime.exact, device=runtime.device)
    for places, images in in_batches(reader, rows, batch_size, runtime):
        if not len(images):
            continue
        found = figures(images, model.decode(model.encode(images)[0]))
        for line, values in enumerate(found):
            table[line, places.start : places.stop] = values.to(table)
        if components is not None and code is not None:
            linear = pca.coded(components, code.patch, images)[1].to(images)
            for line, values in enumerate(figures(images, linear)):
                table[2 + line, places.start : places.stop] = values.to(table)
    error, ssim, pca_error, pca_ssim = runtime.sum(table).cpu()
    has_pca = components is not None
    both = has_pca and structured
    return PerImage(error, ssim if structured else None, pca_error if has_pca else None, pca_ssim if both else None)


@torch.no_grad()
def denoising(
    model: Autoencoder,
    reader: Reader,
    levels: Sequence[float],
    bm3d: bool,
    subset: int,
    config: Config,
    runtime: Processes,
) -> dict[float, dict[str, float]]:
    """PSNR in dB of noisy images and of the denoised ones, by the standard deviation of the noise on [0, 1].

    The methods are ``model``; ``median``, the better of 3 × 3 and 5 × 5; ``non-local means``, the best of three
    strengths, if scikit-image is installed; and ``BM3D``, which is given the noise level, if it is asked for. All get
    the same evenly spaced images (``denoised_images``) and noise.
    """
    rows = evenly_spaced(len(reader.split), denoised_images(subset, model))
    numbers = len(rows) * math.prod(model.image_shape)
    result = {}
    for level in levels:
        methods = ["noisy", "model", *(f"median {side}" for side in MEDIAN_SIDES)]
        methods += [f"non-local means {h}" for h in NLM_STRENGTHS] if has_non_local_means() else []
        methods += ["BM3D"] if bm3d else []
        sums = torch.zeros(len(methods), dtype=runtime.exact, device=runtime.device)
        for places, images in in_batches(reader, rows, config.evaluation.batch_size, runtime):
            if not len(images):
                continue
            noisy = images + fixed_noise(level, places, model.image_shape, images.device).to(images.dtype)
            cleaned = [noisy, model.decode(model.encode(noisy)[0])]
            on_host = noisy.cpu().numpy()
            filtered = [_median(on_host, side) for side in MEDIAN_SIDES]
            if has_non_local_means():
                filtered += [_non_local_means(on_host, level, h) for h in NLM_STRENGTHS]
            filtered += [_bm3d(on_host, level)] if bm3d else []
            cleaned += [torch.from_numpy(denoised).to(images) for denoised in filtered]
            sums += torch.stack([(denoised - images).square().to(runtime.exact).sum() for denoised in cleaned])
        by_method = dict(zip(methods, (psnr(float(value) / numbers) for value in runtime.sum(sums)), strict=True))
        best: dict[str, float] = {}
        for name, value in by_method.items():
            plain = re.sub(r" [0-9.]+$", "", name)
            best[plain] = max(value, best.get(plain, -math.inf))
        result[level] = best
    return result


def denoised_images(subset: int, model: Autoencoder) -> int:
    """The most images that ``denoising`` uses; fewer than ``subset`` if the images are large."""
    return max(1, min(subset, max(16, DENOISED_VALUES // math.prod(model.image_shape))))


def has_non_local_means() -> bool:
    """Whether scikit-image is installed."""
    import importlib.util

    return importlib.util.find_spec("skimage") is not None


def _median(images: Array, side: int) -> Array:
    from scipy.ndimage import median_filter

    return np.asarray(median_filter(images, size=(1, 1, side, side)))


def _non_local_means(images: Array, std: float, strength: float) -> Array:
    from skimage.restoration import denoise_nl_means

    settings: dict[str, Any] = {"patch_size": 5, "patch_distance": 6, "fast_mode": True}
    if images.shape[1] == 1:  # with an axis of one channel, scikit-image returns the image transposed
        cleaned = [denoise_nl_means(image[0], h=strength * std, sigma=std, **settings) for image in images]
        return np.stack(cleaned)[:, None]
    settings["channel_axis"] = 0
    return np.stack([denoise_nl_means(image, h=strength * std, sigma=std, **settings) for image in images])


def require_bm3d() -> None:
    """Raises InputError unless the package is installed."""
    import importlib.util

    if importlib.util.find_spec("bm3d") is None:
        raise InputError("--bm3d: needs the package, pip install bm3d (free for non-commercial use)")


def _bm3d(images: Array, std: float) -> Array:
    import bm3d

    # In colour it matches blocks by brightness, as its authors do (Dabov et al. 2007).
    denoise = bm3d.bm3d_rgb if images.shape[1] == 3 else bm3d.bm3d
    cleaned = [denoise(image.transpose(1, 2, 0).squeeze(), std) for image in images]
    return np.stack([image.reshape(*images.shape[2:], -1).transpose(2, 0, 1) for image in cleaned])


@torch.no_grad()
def probe(
    model: Autoencoder, components: Components | None, train: Reader, val: Reader, batch_size: int, runtime: Processes
) -> dict[str, float]:
    """Accuracy of a linear classifier of the code, and of PCA's code, fitted on training images.

    Uses at most 10,000 evenly spaced labelled images of either split. Empty if there are no labels, or too few.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size = math.prod(model.code_shape)
    if size > LONGEST_PROBED or train.split.labels is None or val.split.labels is None:
        return {}
    codes: dict[str, list[Array]] = {"probe_accuracy": [], "pca_probe_accuracy": []}
    labels: list[Array] = []
    for reader in (train, val):
        known = np.flatnonzero(_labels(reader) >= 0)
        rows = torch.from_numpy(known)[evenly_spaced(len(known), SAMPLE)]
        labels.append(_labels(reader)[rows.numpy()])
        if len(np.unique(labels[0])) < 2 or not len(rows):
            return {}
        ours, linear = _codes(model, components, reader, rows, batch_size, runtime)
        codes["probe_accuracy"].append(ours.numpy())
        if linear is not None:
            codes["pca_probe_accuracy"].append(linear.numpy())
    return {
        name: float(make_pipeline(StandardScaler(), RidgeClassifier()).fit(x[0], labels[0]).score(x[1], labels[1]))
        for name, x in codes.items()
        if x
    }


def _labels(reader: Reader) -> Array:
    labels = reader.split.labels
    assert labels is not None
    return labels


def _codes(
    model: Autoencoder, components: Components | None, reader: Reader, rows: Tensor, batch_size: int, runtime: Processes
) -> tuple[Tensor, Tensor | None]:
    """Codes of ``rows``, and those of PCA, on every process: [n, L] each."""
    code = model.linear_code()
    dtype = next(model.parameters()).dtype
    ours = torch.zeros(len(rows), math.prod(model.code_shape), dtype=dtype, device=runtime.device)
    linear = None
    if components is not None and code is not None:
        count = pca.patch_count(model.image_shape, code.patch)
        linear = ours.new_zeros(len(rows), count * len(components.basis))
    for places, images in in_batches(reader, rows, batch_size, runtime):
        if not len(images):
            continue
        ours[places.start : places.stop] = model.encode(images)[0].flatten(1).to(ours)
        if linear is not None and components is not None and code is not None:
            values = pca.coded(components, code.patch, images)[0]
            linear[places.start : places.stop] = values.to(ours)
    return runtime.sum(ours).cpu(), None if linear is None else runtime.sum(linear).cpu()


@torch.no_grad()
def posterior(model: Autoencoder, reader: Reader, batch_size: int, runtime: Processes) -> Posterior:
    """The rate of each number of a variational code, and its aggregate posterior, over all images."""
    size, count = math.prod(model.code_shape), len(reader.split)
    sums = torch.zeros(4, size, dtype=runtime.exact, device=runtime.device)
    for _, images in in_batches(reader, torch.arange(count), batch_size, runtime):
        if not len(images):
            continue
        mean, logvar = (moment.flatten(1).to(runtime.exact) for moment in _variational(model, images))
        variance = logvar.exp()
        rate = 0.5 * (variance + mean.square() - 1 - logvar)
        sums += torch.stack([rate.sum(0), mean.sum(0), mean.square().sum(0), variance.sum(0)])
    rate, mean, square, variance = runtime.sum(sums).cpu() / count
    of_means = (square - mean.square()).clamp(min=0)
    return Posterior(rate, mean, variance + of_means, of_means)


def _variational(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = model.encode(images)
    assert logvar is not None
    return mean, logvar


@torch.no_grad()
def importance_bound(
    model: Autoencoder, reader: Reader, samples: int, subset: int, config: Config, runtime: Processes
) -> ImportanceBound:
    """The importance-weighted bound (Burda, Grosse and Salakhutdinov 2016) of at most ``subset`` evenly spaced images.

    It is -log 1/K Σ p(x, z) / q(z|x) with K = ``samples`` draws z of q(z|x). The draws are keyed by image and sample,
    so the bound does not depend on how the images are shared and batched.
    """
    rows = evenly_spaced(len(reader.split), subset)
    sums = torch.zeros(2, dtype=runtime.exact, device=runtime.device)
    for places, images in in_batches(reader, rows, config.evaluation.batch_size, runtime):
        if not len(images):
            continue
        mean, logvar = _variational(model, images)
        total: Tensor | None = None
        elbo = torch.zeros(len(images), dtype=runtime.exact, device=runtime.device)
        for sample in range(samples):
            stream = (EVALUATION_SEED, "evaluation.importance", Step(sample), places, model.code_shape)
            epsilon = normal(*stream, images.device).to(images.dtype)
            code = mean + torch.exp(0.5 * logvar) * epsilon
            output = Output(model.decode_raw(code), mean, logvar, model.log_sigma, model.bernoulli)
            distortion = terms(output, images, config.objective).distortion.to(runtime.exact)
            # log N(z; 0, I) - log N(z; μ, σ²): the constants cancel.
            ratio = 0.5 * (epsilon.square() - code.square() + logvar).flatten(1).to(runtime.exact).sum(1)
            weight = ratio - distortion
            total = weight if total is None else torch.logaddexp(total, weight)
            elbo += weight / samples
        assert total is not None
        sums += torch.stack([(total - math.log(samples)).sum(), elbo.sum()])
    bound, elbo_sum = (-runtime.sum(sums) / len(rows)).tolist()
    return ImportanceBound(bound, elbo_sum)


# -- distances by the features of a network


class _Features(nn.Module):
    """Wraps a feature network: converts images on [0, 1] to RGB bytes, the input of most networks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            images = as_bytes(images)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features: Tensor = self.network(images).flatten(1)
        return features


def feature_network(path: Path) -> nn.Module:
    """A TorchScript program that maps uint8 images [B, 3, H, W] to features [B, F].

    Raises:
        InputError: there is no such file, or it is no such program.
    """
    return _Features(load(path, "--features"))


@torch.no_grad()
def feature_distances(
    model: Autoencoder, reader: Reader, network: nn.Module, batch_size: int, runtime: Processes
) -> dict[str, float]:
    """``fid`` and ``kid`` of reconstructions against their images; for a variational model also of samples.

    They use all images of the split. torchmetrics sums over processes.

    Raises:
        InputError: the network does not accept these images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    channels, height, width = model.image_shape
    if channels not in (1, 3):
        raise InputError(
            f"--features: a feature network takes grey or colour, and these images have {channels} channels"
        )
    count = len(reader.split)
    size = min(1000, count)  # of KID's subsets
    shape = {"input_img_size": (3, height, width)}
    try:
        network = network.to(runtime.device)
        kinds = ["", *(["sample_"] if model.variational else [])]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")  # of KID; known
            metrics = {
                f"{kind}{name}": metric.to(runtime.device)
                for kind in kinds
                for name, metric in (
                    ("fid", FrechetInceptionDistance(network, **shape)),  # type: ignore[arg-type]
                    ("kid", KernelInceptionDistance(network, subset_size=size, subsets=1 if size == count else 100)),
                )
            }
        for places, images in in_batches(reader, torch.arange(count), batch_size, runtime):
            if not len(images):
                continue
            code = model.encode(images)[0]
            noise = normal(EVALUATION_SEED, "evaluation.samples", Step(0), places, model.code_shape, runtime.device)
            for name, metric in metrics.items():
                fake = model.decode(noise.to(code.dtype) if name.startswith("sample_") else code).float()
                metric.update(images.float(), real=True)
                metric.update(fake, real=False)
        with torch.random.fork_rng():
            torch.manual_seed(EVALUATION_SEED)  # KID draws its subsets from torch's own generator
            distances = {name: metric.compute() for name, metric in metrics.items()}
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"--features: the network or its distances fail on these images ({first_line(error)})"
        ) from None
    return {name: float(value[0] if isinstance(value, tuple) else value) for name, value in distances.items()}
