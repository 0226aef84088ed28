"""Exact metrics over a whole split, on any number of processes and for any evaluation batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_ae.config import EvaluationConfig, ObjectiveConfig
from dist_ae.data.order import share
from dist_ae.data.reader import Reader
from dist_ae.draws import Draws, Step, normal
from dist_ae.objectives import Model, present, squared_error, terms
from dist_ae.processes.runtime import Processes
from dist_ae.processes.stop import StopRequested

EVALUATION_SEED = 0  # the same noise and ε for every configuration and every seed, so runs are comparable
PERFECT = 1e-20  # a squared error below which images count as equal
ACTIVE_VARIANCE = 0.01  # variance over the images above which a number of the code counts as active


Stop = Callable[[], bool]  # asked before every batch, equally often on every process


def never() -> bool:
    """A ``Stop`` that never stops."""
    return False


def batches(reader: Reader, batch_size: int, runtime: Processes, stop: Stop) -> Iterator[tuple[range, bool, Tensor]]:
    """This process's part of each batch of a split: rows, whether they count, and their images.

    A thread reads ahead. If the last batch has fewer images than there are processes, a process without rows computes
    one image that does not count: compiled code, or a user's own model, need not accept an empty batch.

    Raises:
        StopRequested: ``stop`` answered yes.
    """
    all_rows, size = range(len(reader.split)), max(batch_size, runtime.world)
    shares = [share(all_rows[start : start + size], runtime.rank, runtime.world) for start in all_rows[::size]]
    computed = [rows or range(1) for rows in shares]
    images = reader.each([torch.arange(rows.start, rows.stop) for rows in computed])
    for counted, rows in zip(shares, computed, strict=True):
        if stop():
            raise StopRequested
        yield rows, bool(counted), next(images)


@torch.no_grad()
def mean_squared_error(model: Model, reader: Reader, batch_size: int, runtime: Processes, stop: Stop = never) -> float:
    """The squared error per entry of the clean images' reconstructions from the mean code.

    Raises:
        StopRequested: ``stop`` answered yes.
    """
    sums = torch.zeros(2, dtype=runtime.exact, device=runtime.device)
    for _, counts, images in batches(reader, batch_size, runtime, stop):
        output = model(images, None)
        errors = squared_error(images, output.reconstruction, output.missing)
        entries = torch.zeros_like(errors) + present(images, output.missing)
        if counts:
            sums += torch.stack([errors, entries]).to(runtime.exact).sum(1)
    squared, count = runtime.sum(sums).tolist()
    return float(squared / count)


@torch.no_grad()
def evaluate(
    model: Model,
    reader: Reader,
    objective: ObjectiveConfig,
    evaluation: EvaluationConfig,
    runtime: Processes,
    stop: Stop = never,
) -> dict[str, float]:
    """Deterministic metrics of a split. Each image counts once, whatever the number of processes.

    - ``mse`` (per pixel, [0, 1]) and ``psnr`` (dB, of that mse): the clean image, reconstructed from the mean code.
    - ``denoised_psnr`` beside ``noisy_psnr``: one noisy copy, keyed by image index.

    Standardized records have no peak, so their metrics are ``mse``, the share of unexplained variance; ``r2``, 1 minus
    the error as a share of the held-out records' squares around the training mean; and ``denoised_mse`` beside
    ``noisy_mse``. Missing entries do not count.

    A variational model adds:

    - ``neg_elbo``, ``rate`` and ``distortion``: nats per image at β = 1, with one ε keyed by image index.
    - ``active_units``: the numbers of the code whose mean has a variance above 0.01 over the images, as counted by
      Burda, Grosse and Salakhutdinov (2016).
    - ``bits_per_dim``, with a discretized likelihood: the negative ELBO in bits per number of the image.

    Args:
        model: the prepared module, used only through its ``forward``.

    Raises:
        StopRequested: ``stop`` answered yes.
    """
    count = len(reader.split)
    sums: Tensor | None = None
    code_moments: Tensor | None = None
    for rows, counts, images in batches(reader, evaluation.batch_size, runtime, stop):
        batch_sums, moments = _sums(model, images, rows, objective, evaluation.noise_std, runtime)
        if not counts:
            batch_sums, moments = torch.zeros_like(batch_sums), None if moments is None else torch.zeros_like(moments)
        sums = batch_sums if sums is None else sums + batch_sums
        if moments is not None:
            code_moments = moments if code_moments is None else code_moments + moments
    assert sums is not None
    clean, noisy, denoised, neg_elbo, rate, distortion, squares, entries, num_images = runtime.sum(sums).tolist()
    assert num_images == count, f"evaluated {num_images} images of {count}"
    metrics = {"mse": clean / entries}
    if reader.standardized:
        metrics |= {"r2": 1 - clean / squares if squares else 0.0}
        metrics |= {"noisy_mse": noisy / entries, "denoised_mse": denoised / entries}
    else:
        metrics |= {"psnr": psnr(clean / entries)}
        metrics |= {"noisy_psnr": psnr(noisy / entries), "denoised_psnr": psnr(denoised / entries)}
    if code_moments is not None:
        metrics |= {"neg_elbo": neg_elbo / count, "rate": rate / count, "distortion": distortion / count}
        first, second = runtime.sum(code_moments) / count
        metrics["active_units"] = float(int((second - first.square() > ACTIVE_VARIANCE).sum()))
        if objective.likelihood == "discretized":
            metrics["bits_per_dim"] = neg_elbo / entries / math.log(2)
    return metrics


def collapsed(metrics: Mapping[str, float]) -> str:
    """A warning if no number of a variational model's code says anything about the image, else ""."""
    if metrics.get("active_units") != 0:
        return ""
    return (
        "WARNING: posterior collapse: no number of the code varies from image to image, and every image gets the same "
        "reconstruction. Raise objective.beta_warmup_steps, or lower objective.beta"
    )


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1]; at most 200, and NaN for NaN.

    200 dB is an error of 1e-20, smaller than any rounding of float32. It also stands for equality, since JSON has no
    infinity.
    """
    return math.nan if math.isnan(mse) else -10 * math.log10(max(mse, PERFECT))


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """The names of the metrics that are not finite. One of them is enough to reject the evaluation."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def better(value: float, best: float | None, sign: int) -> bool:
    """Whether a value is better than the best so far. A value that is not finite is never better, nor stays best."""
    if not math.isfinite(value):
        return False
    return best is None or not math.isfinite(best) or sign * value > sign * best


def comparable(best: Mapping[str, Any], metric: str, noise_std: float) -> bool:
    """Whether the best evaluation that a checkpoint holds was made on the same task as those of this run.

    Denoising is judged at ``evaluation.noise_std``, which may change when a run is resumed; a PSNR at another noise
    level belongs to another task. Checkpoints of older runs do not hold the level, which is taken to be unchanged.

    Args:
        metric: what the run is judged by, from ``selection``.
        noise_std: of this run's evaluations.
    """
    return not metric.startswith("denoised") or best.get("noise_std") in (None, noise_std)


@torch.no_grad()
def mean_image_error(reader: Reader, batch_size: int, runtime: Processes) -> float | None:
    """The squared error per pixel of the best constant image. A model that has learned anything is below it.

    The mean is taken over the same images, so the sum of squares is divided by their number less one. None for fewer
    than two images, and if entries are missing.
    """
    count = len(reader.split)
    if count < 2 or reader.missing:
        return None
    size = math.prod(reader.split.images.shape[1:])
    sums = torch.zeros(2, size, dtype=runtime.exact, device=runtime.device)
    for _, counts, images in batches(reader, batch_size, runtime, never):
        if counts:
            values = images.flatten(1).to(runtime.exact)
            sums += torch.stack([values.sum(0), values.square().sum(0)])
    mean, square = runtime.sum(sums) / count
    return max(0.0, float((square - mean.square()).mean())) * count / (count - 1)


def fixed_noise(std: float, rows: range, image_shape: Sequence[int], device: torch.device) -> Tensor:
    """The noise of the fixed noisy copy for images ``rows`` of a split: [len(rows), C, H, W].

    Args:
        std: standard deviation of the noise on [0, 1] pixels.
    """
    return normal(EVALUATION_SEED, "evaluation.noise", Step(0), rows, image_shape, device, std)


def fixed_epsilon(rows: range, code_shape: Sequence[int], device: torch.device) -> Tensor:
    """The standard normal ε of a variational model's evaluation on images ``rows``: [len(rows), *code_shape]."""
    return normal(EVALUATION_SEED, "evaluation.epsilon", Step(0), rows, code_shape, device)


def _sums(
    model: Model, images: Tensor, rows: range, objective: ObjectiveConfig, noise_std: float, runtime: Processes
) -> tuple[Tensor, Tensor | None]:
    """Sums over the images of ``rows``, in float64 if the device has it.

    [9]: three squared errors, three ELBO terms, the squares, and the numbers of entries and of images. For a
    variational model also [2, code]: the codes and their squares.
    """
    clean = model(images, None)
    missing = clean.missing
    noise = fixed_noise(noise_std, rows, images.shape[1:], images.device).to(images.dtype)
    denoised = model(images, Draws(noise=noise)).reconstruction
    zero = images.new_zeros(len(rows))
    neg_elbo = rate = distortion = zero
    moments: Tensor | None = None
    if clean.logvar is not None:
        epsilon = fixed_epsilon(rows, clean.mean.shape[1:], images.device).to(images.dtype)
        neg_elbo, distortion, rate = terms(model(images, Draws(epsilon=epsilon)), images, objective, beta=1.0)
        means = clean.mean.flatten(1).to(runtime.exact)
        moments = torch.stack([means.sum(0), means.square().sum(0)])

    known = torch.where(images.isnan(), 0.0, images) if missing else images
    noisy = squared_error(images, known + noise, missing) if missing else noise.square().flatten(1).sum(1)
    errors = squared_error(images, clean.reconstruction, missing), noisy, squared_error(images, denoised, missing)
    entries = zero + present(images, missing)
    columns = (*errors, neg_elbo, rate, distortion, known.square().flatten(1).sum(1), entries, zero + 1)
    return torch.stack([column.to(runtime.exact).sum() for column in columns]), moments
