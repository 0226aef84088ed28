"""`dist-ae evaluate`: how good a trained run is, as figures, JSON and one picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_ae import quality
from dist_ae.config import Config, InputError
from dist_ae.data.reader import Reader
from dist_ae.errors import install
from dist_ae.evaluate import ACTIVE_VARIANCE, collapsed
from dist_ae.files import to_json
from dist_ae.models import Autoencoder, Components
from dist_ae.processes.runtime import Runtime
from dist_ae.use.results import Evaluated
from dist_ae.use.write import write_whole

MEAN_OFF, VARIANCE_OFF = 0.3, 1.5  # bounds of a number's aggregate posterior beyond which it counts as off N(0, 1)


@dataclass(frozen=True)
class Assessed(Evaluated):
    """``Evaluated``, with the errors of single images for the picture."""

    per_image: quality.PerImage


def assess(
    model: Autoencoder, components: Components | None, train: Reader, reader: Reader, metrics: dict[str, float],
    levels: list[float], bm3d: bool, subset: int, samples: int, network: torch.nn.Module | None, config: Config,
    runtime: Runtime,
) -> Assessed:  # fmt: skip
    """Adds the metrics of ``quality`` to those of training, with remarks."""
    batch, count = config.evaluation.batch_size, len(reader.split)
    metrics, remarks = dict(metrics), []
    per_image = quality.per_image(model, components, reader, batch, runtime)
    for name, values in (("ssim", per_image.ssim), ("pca_ssim", per_image.pca_ssim)):
        if values is not None:
            metrics[name] = float(values.mean())
    if count > len(per_image.error):
        remarks.append(f"SSIM: of {len(per_image.error):,} evenly spaced images of {count:,}")
    if reader is train:
        remarks.append("no linear probe on training images: it is fitted on them")
    else:
        probed = quality.probe(model, components, train, reader, batch, runtime)
        metrics |= probed
        if not probed:
            remarks.append("no linear probe: the data has no labels of two classes, or the code is too long for one")
    denoised: dict[float, dict[str, float]] = {}
    columns: dict[str, dict[str, float]] = {}
    if model.record_shape is None:
        denoised = quality.denoising(model, reader, levels, bm3d, subset, config, runtime)
        remarks.append(f"denoising: of {min(count, quality.denoised_images(subset, model)):,} evenly spaced images")
        if not quality.has_non_local_means():
            remarks.append(f"no non-local means: it needs scikit-image, {install('evaluate')}")
    elif model.standardized:
        scores = quality.by_channel(model, components, reader, batch, runtime)
        names = config.data.columns or [f"channel {number}" for number in range(model.image_shape[0])]
        columns = {name: {key: values[i] for key, values in scores.items()} for i, name in enumerate(names)}
    code: dict[str, list[float]] = {}
    if model.variational:
        posterior = quality.posterior(model, reader, batch, runtime)
        bound = quality.importance_bound(model, reader, samples, subset, config, runtime)
        metrics |= {"neg_iw_bound": bound.bound, "subset_neg_elbo": bound.neg_elbo}
        remarks.append(
            f"importance-weighted bound: K = {samples}, of {min(count, subset):,} evenly spaced images, whose own "
            f"negative ELBO is {bound.neg_elbo:.6g}"
        )
        if config.objective.likelihood == "discretized":
            metrics["neg_iw_bound.bits_per_dim"] = bound.bound / math.prod(model.image_shape) / math.log(2)
        else:
            remarks.append(
                f"no bits per dimension: a {config.objective.likelihood} likelihood gives no probability of a byte; "
                "--objective.likelihood discretized does"
            )
        metrics["aggregate.mean"] = float(posterior.mean.abs().max())
        metrics["aggregate.variance.min"] = float(posterior.variance.min())
        metrics["aggregate.variance.max"] = float(posterior.variance.max())
        code = {
            "rate": posterior.rate.tolist(),
            "aggregate_mean": posterior.mean.tolist(),
            "aggregate_variance": posterior.variance.tolist(),
            "variance_of_means": posterior.variance_of_means.tolist(),
        }
        remarks += _code_remarks(posterior, metrics)
    if model.record_shape is not None:
        if network is not None:
            raise InputError("--features: FID and KID are of images, and the run's records are none")
    elif network is None:
        remarks.append("no FID, no KID: they need a feature network, --features FILE (TorchScript, uint8 RGB in)")
    else:
        metrics |= quality.feature_distances(model, reader, network, batch, runtime)
    return Assessed(metrics, denoised, code, columns, remarks, [], per_image)


def _code_remarks(posterior: quality.Posterior, metrics: dict[str, float]) -> list[str]:
    """Remarks on the problems of a variational code."""
    if warning := collapsed(metrics):
        return [warning]
    remarks = []
    idle = int((posterior.variance_of_means <= ACTIVE_VARIANCE).sum())
    if idle:
        remarks.append(
            f"{idle:,} of {len(posterior.rate):,} numbers of the code have collapsed: their means vary by less than "
            f"{ACTIVE_VARIANCE} over the images"
        )
    off = (posterior.mean.abs() > MEAN_OFF) | (posterior.variance.log().abs() > math.log(VARIANCE_OFF))
    if bool(off.any()):
        remarks.append(
            f"aggregate posterior: {int(off.sum()):,} of {len(off):,} numbers are off N(0, 1) (mean beyond "
            f"±{MEAN_OFF}, or variance beyond a factor of {VARIANCE_OFF}), so samples from N(0, I) miss some codes"
        )
    return remarks


def write_evaluation(assessed: Assessed, run: str, split: str, target: Path, lenient: bool) -> Assessed:
    """Writes JSON and the picture.

    ``lenient``: if they cannot be written, as into a read-only run, add a remark instead of raising an error.
    """
    metrics = {f"{split}.{name}": value for name, value in assessed.metrics.items()}
    content = {
        "run": run,
        "metrics": metrics,
        "denoising": {str(level): values for level, values in assessed.denoising.items()},
        "code": assessed.code,
        "columns": assessed.columns,
        "remarks": assessed.remarks,
    }

    def draw(path: Path) -> None:
        from dist_ae.figures import evaluation

        errors = assessed.per_image
        evaluation(run, errors.error, errors.pca_error, assessed.denoising, assessed.code, assessed.columns, path)

    written, remarks = [], list(assessed.remarks)
    try:
        written.append(write_whole(target, lambda path: path.write_bytes(to_json(content))))
        written.append(write_whole(target.with_suffix(".png"), draw))
    except InputError as error:
        if not lenient:
            raise
        remarks.append(str(error))
    return replace(assessed, metrics=metrics, remarks=remarks, written=written)
