"""Three anomaly scores, and their distribution on held-out normal images.

- ``error``: squared error per pixel of the reconstruction from the mean code. It finds what the model cannot draw.
- ``neg_elbo``: negative ELBO in nats, of a variational model: error and cost of the code, weighed as in training.
- ``mahalanobis``: distance of the (mean) code from those of the training images. It finds images that the model can
  draw, but whose codes are far from those of all training images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_ae.config import Config, InputError
from dist_ae.data.order import evenly_spaced, share
from dist_ae.data.reader import Reader
from dist_ae.evaluate import fixed_epsilon
from dist_ae.models import Autoencoder, Output
from dist_ae.objectives import present, squared_error, terms
from dist_ae.processes.runtime import Processes
from dist_ae.processes.stop import StopRequested

SCORES = ("error", "neg_elbo", "mahalanobis")
CONFIDENCE = 0.95  # of the interval of a threshold
SAMPLE = 10_000  # most images of either split that a calibration uses, which bounds its time
FULL_COVARIANCE = 2048  # most numbers of a code with a full covariance (16 MiB); of longer codes, only variances


class CodeMoments(NamedTuple):
    """The distribution of codes, for the Mahalanobis distance."""

    mean: Tensor  # [L]
    whitening: Tensor  # [L, L], or [L] for variances alone; the distance is |whitening · (code - mean)|

    def distance(self, codes: Tensor) -> Tensor:
        """Mahalanobis distance of codes [B, …] → [B]."""
        centred = codes.flatten(1) - self.mean.to(codes)
        whitening = self.whitening.to(codes)
        white = centred * whitening if whitening.ndim == 1 else centred @ whitening.T
        return white.square().sum(1).sqrt()


class Calibration(NamedTuple):
    """The basis of thresholds: the moments of training codes, and the sorted scores of held-out images by score."""

    moments: CodeMoments
    scores: dict[str, Tensor]  # each [n], ascending

    def threshold(self, score: str, quantile: float) -> float:
        """The smallest score that at least the share ``quantile`` of the held-out images does not exceed.

        Raises:
            InputError: ``quantile`` is not a share between 0 and 1.
        """
        if not 0 < quantile < 1:
            raise InputError(f"quantile: expected a share between 0 and 1, such as 0.99, got {quantile}")
        return float(np.quantile(self.scores[score].numpy(), quantile, method="inverted_cdf"))

    def interval(self, score: str, quantile: float) -> tuple[float, float]:
        """The 95 % confidence interval of the quantile of all normal images.

        Its ends are order statistics: the number of n scores below the quantile is binomial, whatever the distribution
        of the scores. With few images, the upper end is infinite, or the lower end for a small quantile.
        """
        from scipy.stats import binom

        values, outside = self.scores[score].tolist(), (1 - CONFIDENCE) / 2
        low, high = (int(binom.ppf(share, len(values), quantile)) for share in (outside, 1 - outside))
        return values[low - 1] if low else -math.inf, values[high] if high < len(values) else math.inf

    def tensors(self) -> dict[str, Tensor]:
        """The calibration as tensors for a file."""
        return {
            "code.mean": self.moments.mean,
            "code.whitening": self.moments.whitening,
            **{f"scores.{name}": values for name, values in self.scores.items()},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], model: Autoencoder) -> Calibration | None:
        """The calibration stored as ``tensors``; None unless they are a valid calibration of this model."""
        size = math.prod(model.code_shape)
        score_names = {f"scores.{name}" for name in scores_of(model)}
        if set(tensors) != {"code.mean", "code.whitening", *score_names}:
            return None
        mean, whitening = tensors["code.mean"], tensors["code.whitening"]
        shapes = {tuple(tensors[name].shape) for name in score_names}
        if tuple(mean.shape) != (size,) or tuple(whitening.shape) not in ((size,), (size, size)) or len(shapes) != 1:
            return None
        if any(tensors[name].ndim != 1 or not len(tensors[name]) for name in score_names):
            return None
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            return None
        # A threshold is a quantile of sorted scores; of others it would be wrong without looking so.
        if any(bool((tensors[name].diff() < 0).any()) for name in score_names):
            return None
        return cls(CodeMoments(mean, whitening), {name.removeprefix("scores."): tensors[name] for name in score_names})


def scores_of(model: Autoencoder) -> tuple[str, ...]:
    """The scores of a model, the default one first."""
    return ("neg_elbo", "error", "mahalanobis") if model.variational else ("error", "mahalanobis")


def check_score(model: Autoencoder, score: str | None) -> str:
    """The name of a score; None stands for the model's default.

    Raises:
        InputError: there is no score of that name for this model.
    """
    if score is None:
        return scores_of(model)[0]
    if score not in SCORES:
        raise InputError(f"score: expected {', '.join(SCORES)}, got {score!r}")
    if score not in scores_of(model):
        raise InputError(
            f"score {score} needs a variational model, which this is not; use {' or '.join(scores_of(model))}"
        )
    return score


def score_images(
    model: Autoencoder, images: Tensor, rows: range, config: Config, names: Sequence[str], moments: CodeMoments | None
) -> dict[str, Tensor]:
    """Scores of images [B, C, H, W] on [0, 1], each [B]. The encoder runs once for all of them.

    Args:
        rows: the positions of the images, which key the one ε of ``neg_elbo``.
        moments: needed for ``mahalanobis``.
    """
    mean, logvar = model.encode(images)
    scores = {}
    if "error" in names:
        squared = squared_error(images, model.decode(mean), model.missing)
        scores["error"] = squared / present(images, model.missing)
    if "neg_elbo" in names:
        assert logvar is not None
        epsilon = fixed_epsilon(rows, model.code_shape, images.device).to(images.dtype)
        raw = model.decode_raw(mean + torch.exp(0.5 * logvar) * epsilon)
        kind = model.bernoulli, model.standardized, model.missing
        if model.bernoulli:  # outside [0, 1] its likelihood is unbounded: the most damaged image would score best
            images = images.clamp(0, 1)
        output = Output(raw, mean, logvar, model.log_sigma, *kind)
        scores["neg_elbo"] = terms(output, images, config.objective, beta=1.0).loss
    if "mahalanobis" in names:
        assert moments is not None
        scores["mahalanobis"] = moments.distance(mean)
    return scores


def in_batches(
    reader: Reader, rows: Tensor, batch_size: int, runtime: Processes, stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[range, Tensor]]:
    """This process's parts of the batches of ``rows``: their positions in ``rows``, and the images [B, C, H, W].

    A part may be empty. A thread reads ahead.

    Raises:
        StopRequested: ``stop`` answered yes. It is asked before every part, equally often on every process.
    """
    batch, positions = max(batch_size, runtime.world), range(len(rows))
    mine = [share(positions[at : at + batch], runtime.rank, runtime.world) for at in positions[::batch]]
    images = reader.each([rows[places.start : places.stop] for places in mine])
    for places in mine:
        if stop():
            raise StopRequested
        yield places, next(images)


@torch.no_grad()
def code_moments(
    model: Autoencoder, train: Reader, batch_size: int, runtime: Processes, stop: Callable[[], bool] = lambda: False
) -> CodeMoments:
    """Mean and covariance of the codes of at most 10,000 evenly spaced training images, summed over processes.

    The covariance is shrunk towards a multiple of the identity as in Chen, Wiesel, Eldar and Hero (2010, OAS), which
    matters if there are few images for the length of the code. For a code longer than 2,048 numbers, only the variances
    are kept.
    """
    size = math.prod(model.code_shape)
    full = size <= FULL_COVARIANCE
    rows = evenly_spaced(len(train.split), SAMPLE)
    # Sums of differences from an approximate mean: for codes far from 0, plain squares would lose a small variance.
    center = model.encode(train.take(rows[:256]))[0].flatten(1).to(runtime.exact).mean(0)
    total = torch.zeros(size, dtype=runtime.exact, device=runtime.device)
    second = torch.zeros((size, size) if full else (size,), dtype=runtime.exact, device=runtime.device)
    for _, images in in_batches(train, rows, batch_size, runtime, stop):
        if len(images):
            codes = model.encode(images)[0].flatten(1).to(runtime.exact) - center
            total += codes.sum(0)
            second += codes.T @ codes if full else codes.square().sum(0)
    total, second = runtime.sum(total).cpu().double(), runtime.sum(second).cpu().double()
    offset = total / len(rows)
    mean = center.cpu().double() + offset
    if not full:
        variance = (second / len(rows) - offset.square()).clamp(min=0)
        floor = max(float(variance.mean()) * 1e-6, 1e-12)
        return CodeMoments(mean.float(), (variance + floor).rsqrt().float())
    covariance = second / len(rows) - torch.outer(offset, offset)
    scale = float(covariance.diagonal().mean())
    squares = float(covariance.square().mean())
    divisor = (len(rows) + 1) * (squares - scale**2 / size)
    shrinkage = 1.0 if divisor <= 0 else min((squares + scale**2) / divisor, 1.0)
    covariance *= 1 - shrinkage
    covariance.diagonal().add_(shrinkage * scale + max(scale * 1e-6, 1e-12))  # invertible, even for a collapsed code
    root = torch.linalg.cholesky(covariance)
    whitening = torch.linalg.solve_triangular(root, torch.eye(size, dtype=torch.float64), upper=False)
    return CodeMoments(mean.float(), whitening.float())


@torch.no_grad()
def calibrate(
    model: Autoencoder,
    train: Reader,
    held_out: Reader,
    config: Config,
    runtime: Processes,
    stop: Callable[[], bool] = lambda: False,
) -> Calibration:
    """The moments of the training images' codes, and every score of at most 10,000 evenly spaced held-out images.

    The model computes in its own type, without autocast. The result is the same on any number of processes, apart from
    rounding errors.

    Args:
        held_out: images that the model was not trained on and that are assumed to be normal.

    Raises:
        StopRequested: ``stop`` answered yes.
    """
    batch_size, names = config.evaluation.batch_size, scores_of(model)
    moments = code_moments(model, train, batch_size, runtime, stop)
    rows = evenly_spaced(len(held_out.split), SAMPLE)
    table = torch.zeros(len(names), len(rows), dtype=runtime.exact, device=runtime.device)
    for places, images in in_batches(held_out, rows, batch_size, runtime, stop):
        if len(images):
            by_name = score_images(model, images, places, config, names, moments)
            table[:, places.start : places.stop] = torch.stack([by_name[name] for name in names]).to(table)
    scores = runtime.sum(table).cpu().float().sort(1).values
    return Calibration(moments, {name: scores[number].clone() for number, name in enumerate(names)})
