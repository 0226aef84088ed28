"""The commands on a trained run: each writes one file, or prints figures."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_ae import pca, quality
from dist_ae.config import Config, InputError
from dist_ae.data import sources
from dist_ae.data.given import Given, blocks, file_names, floats, picked
from dist_ae.data.pictures import expand, shown
from dist_ae.data.reader import Reader
from dist_ae.data.records import Array
from dist_ae.evaluate import ACTIVE_VARIANCE, collapsed, evaluate, fixed_noise
from dist_ae.files import to_json
from dist_ae.models import Autoencoder, Components
from dist_ae.processes.environment import pinned_torch
from dist_ae.processes.runtime import Runtime, check_device
from dist_ae.saved import Which, run_config
from dist_ae.scores import check_score
from dist_ae.use import export, hub
from dist_ae.use.explore import explore_page, plane
from dist_ae.use.trained import TrainedModel, load

SHOWN = 12  # images in a picture of reconstructions, as in the run's own
TILES = 100  # rows or columns of a picture at most: beyond it images are too many to look at, and megabytes
SAMPLE_COLUMNS = 8
NOISE_LEVELS = (0.1, 0.3, 0.5)  # standard deviations on [0, 1] at which an evaluation denoises
MEAN_OFF, VARIANCE_OFF = 0.3, 1.5  # of a number's aggregate posterior: beyond them it is said to be off N(0, 1)


@dataclass(frozen=True)
class Evaluated:
    """What ``evaluate_run`` found, on every process, and what the first one wrote."""

    metrics: dict[str, float]  # by split: "val.mse"
    denoising: dict[float, dict[str, float]]  # PSNR in dB by noise and method
    code: dict[str, list[float]]  # of a variational model, number by number
    remarks: list[str]  # in words: what was computed of how many images, what is missing, what is wrong
    written: list[Path]


def evaluate_run(
    run_dir: Path, split: Literal["val", "train"] = "val", which: Which = "best", noise_std: float | None = None,
    batch_size: int | None = None, data_root: Path | None = None, *, out: Path | None = None, subset: int = 200,
    samples: int = 50, noise_levels: Sequence[float] = NOISE_LEVELS, features: Path | None = None,
) -> Evaluated:  # fmt: skip
    """How good a trained run is, on as many processes as the launcher started; each image counts once.

    The metrics of training; SSIM, PCA and a linear probe beside; denoising beside classical filters; of a variational
    run what its code carries. ``quality`` says how each is found. Writes JSON and one picture.

    Args:
        out: .json; None is RUN_DIR/evaluation.json. The picture stands beside it.
        subset: evenly spaced images that what is dear is computed of: denoising and the importance-weighted bound.
        samples: K of that bound.
        noise_levels: standard deviations on [0, 1] at which is denoised; the run's own is added.
        features: a TorchScript feature network, for FID and KID.

    Raises:
        InputError: no such run, its data is not there, or a value out of range.
    """
    config = run_config(run_dir)
    changes = {"evaluation.noise_std": noise_std, "evaluation.batch_size": batch_size, "data.root": data_root}
    # The run's batch plan and precision are about training; every figure is of the float32 (or float64) model.
    precision = {"precision": "fp64" if config.precision == "fp64" else "fp32"}
    config = config.override({**{key: value for key, value in changes.items() if value is not None}, **precision})
    check_device(config)
    for name, value in (("--subset", subset), ("--samples", samples)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    for level in noise_levels:
        if not 0 < level <= 1:
            raise InputError(f"--noise-levels: expected standard deviations on [0, 1] pixels above 0, got {level}")
    target = _destination(run_dir, out, "evaluation.json", (".json",))
    network = None if features is None else quality.feature_network(expand(features))
    trained = load(run_dir, which)
    dataset = sources.load(config.data)
    with pinned_torch(config.precision):
        runtime = Runtime(config)
        try:
            raw = trained.model.to(runtime.device, runtime.dtype)
            model = runtime.accelerator.prepare_model(raw, evaluation_mode=True)
            train, val = (Reader(part, runtime.device, runtime.dtype) for part in (dataset.train, dataset.val))
            reader = train if split == "train" else val
            metrics = evaluate(model, reader, config, runtime)
            components = pca.of_model(raw, train, runtime)
            if components is not None:
                metrics["pca_mse"] = pca.baseline(raw, components, reader, runtime)
            levels = sorted({*noise_levels, *([config.evaluation.noise_std] if config.evaluation.noise_std else [])})
            found = _assess(raw, components, train, reader, metrics, levels, subset, samples, network, config, runtime)
            if runtime.is_main:
                run = f"{run_dir.name or run_dir}, {split}, step {trained.source[1] if trained.source else '?'}"
                found = _write_evaluation(found, run, split, target, lenient=out is None)
            else:
                found = replace(found, metrics={f"{split}.{name}": value for name, value in found.metrics.items()})
            return found
        finally:
            runtime.close()


@dataclass(frozen=True)
class _Assessed(Evaluated):
    """With what only the picture shows."""

    per_image: quality.PerImage


def _assess(
    model: Autoencoder, components: Components | None, train: Reader, reader: Reader, metrics: dict[str, float],
    levels: list[float], subset: int, samples: int, network: torch.nn.Module | None, config: Config, runtime: Runtime,
) -> _Assessed:  # fmt: skip
    """What ``quality`` finds, beside the metrics of training, and what is to be said of it."""
    batch, count = config.evaluation.batch_size, len(reader.split)
    found, remarks = dict(metrics), []
    each = quality.per_image(model, components, reader, batch, runtime)
    for name, values in (("ssim", each.ssim), ("pca_ssim", each.pca_ssim)):
        if values is not None:
            found[name] = float(values.mean())
    if count > len(each.error):
        remarks.append(f"SSIM: of {len(each.error):,} evenly spaced images of {count:,}")
    if reader is train:
        remarks.append("no linear probe on training images: it is fitted on them")
    else:
        probed = quality.probe(model, components, train, reader, batch, runtime)
        found |= probed
        if not probed:
            remarks.append("no linear probe: the data has no labels of two classes, or the code is too long for one")
    denoised = quality.denoising(model, reader, levels, subset, config, runtime)
    remarks.append(f"denoising: of {min(count, quality.denoised_images(subset, model)):,} evenly spaced images")
    if not quality.has_non_local_means():
        remarks.append("no non-local means: it needs scikit-image, pip install 'dist-ae[evaluate]'")
    code: dict[str, list[float]] = {}
    if model.variational:
        posterior = quality.posterior(model, reader, batch, runtime)
        bound = quality.importance_bound(model, reader, samples, subset, config, runtime)
        found |= {"neg_iw_bound": bound.bound, "subset_neg_elbo": bound.neg_elbo}
        remarks.append(
            f"importance-weighted bound: K = {samples}, of {min(count, subset):,} evenly spaced images, whose own "
            f"negative ELBO is {bound.neg_elbo:.6g}"
        )
        if config.objective.likelihood == "discretized":
            found["neg_iw_bound.bits_per_dim"] = bound.bound / math.prod(model.image_shape) / math.log(2)
        else:
            remarks.append(
                f"no bits per dimension: a {config.objective.likelihood} likelihood gives no probability of a byte; "
                "--objective.likelihood discretized does"
            )
        found["aggregate.mean"] = float(posterior.mean.abs().max())
        found["aggregate.variance.min"] = float(posterior.variance.min())
        found["aggregate.variance.max"] = float(posterior.variance.max())
        code = {
            "rate": posterior.rate.tolist(),
            "aggregate_mean": posterior.mean.tolist(),
            "aggregate_variance": posterior.variance.tolist(),
            "variance_of_means": posterior.variance_of_means.tolist(),
        }
        remarks += _of_posterior(posterior, found)
    if network is None:
        remarks.append("no FID, no KID: they need a feature network, --features FILE (TorchScript, uint8 RGB in)")
    else:
        found |= quality.feature_distances(model, reader, network, batch, runtime)
    return _Assessed(found, denoised, code, remarks, [], each)


def _of_posterior(posterior: quality.Posterior, metrics: dict[str, float]) -> list[str]:
    """What is wrong with a variational code, in words."""
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


def _write_evaluation(found: _Assessed, run: str, split: str, target: Path, lenient: bool) -> _Assessed:
    """JSON and the picture. A run that is only to be read still gets its figures, where no place was asked for."""
    metrics = {f"{split}.{name}": value for name, value in found.metrics.items()}
    content = {
        "run": run,
        "metrics": metrics,
        "denoising": {str(level): values for level, values in found.denoising.items()},
        "code": found.code,
        "remarks": found.remarks,
    }

    def draw(path: Path) -> None:
        from dist_ae.figures import evaluation

        each = found.per_image
        evaluation(run, each.error, each.pca_error, found.denoising, found.code, path)

    written, remarks = [], list(found.remarks)
    try:
        written.append(_write(target, lambda path: path.write_bytes(to_json(content))))
        written.append(_write(target.with_suffix(".png"), draw))
    except InputError as error:
        if not lenient:
            raise
        remarks.append(str(error))
    return replace(found, metrics=metrics, remarks=remarks, written=written)


# -- what is written to files
#
# Each loads a run, applies its model to the user's images or else to the run's validation images, writes, and returns
# the path. All raise InputError: no such run; images that are not there, not readable or not the model's; a place that
# cannot be written.


def reconstruct_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes reconstructions: .npy, float32 [N, C, H, W] on [0, 1]; .png, the first 12 originals over their
    reconstructions; or a folder, a .png for each image."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "reconstructions.npy", (".npy", ".png", ""), images)
    one = _given(trained, images, data_root)
    return _write_reconstructions(trained, one, out, "original", "reconstruction")


def denoise_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
    noise_std: float | None = None,
) -> Path:
    """Writes noisy images denoised, as ``reconstruct_run`` does; validation images get noise first, as at an
    evaluation.

    Args:
        noise_std: noise to add, on [0, 1] pixels; None adds none to ``images``, and the run's own to validation images.
    """
    if noise_std is not None and not 0 <= noise_std <= 1:
        raise InputError(f"--noise-std: expected a standard deviation on [0, 1] pixels, got {noise_std}")
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "denoised.npy", (".npy", ".png", ""), images)
    one = _given(trained, images, data_root)
    if noise_std is None and images is None:
        noise_std = trained.config.evaluation.noise_std
    return _write_reconstructions(trained, one, out, "noisy", "denoised", noise_std or 0.0)


def _write_reconstructions(
    trained: TrainedModel, one: Given, out: Path, before: str, after: str, noise_std: float = 0.0
) -> Path:
    config = trained.config.override({"evaluation.noise_std": noise_std})

    def inputs(rows: range) -> Tensor:
        clean = floats(one, rows)
        return clean + fixed_noise(config, rows, clean.shape[1:], clean.device) if noise_std else clean

    def outputs(rows: range) -> Tensor:
        return trained.reconstruct(inputs(rows))

    if out.suffix == ".png":
        shown = range(min(SHOWN, len(one.split)))
        rows = {before: inputs(shown), after: outputs(shown)}
        if noise_std:
            rows["clean"] = floats(one, shown)

        def draw(path: Path) -> None:
            from dist_ae.figures import image_rows  # matplotlib takes a second to import

            image_rows(rows, path)

        return _write(out, draw)
    cut = blocks(len(one.split))
    if out.suffix == ".npy":
        return _write_array(out, torch.cat([outputs(rows) for rows in cut]))
    names = file_names(one)
    return _write_folder(
        out, ((names[row], image) for rows in cut for row, image in zip(rows, outputs(rows), strict=True))
    )


def sample_run(run_dir: Path, num: int = 64, seed: int = 0, out: Path | None = None, which: Which = "best") -> Path:
    """Writes ``num`` new images of a variational run: .png, eight in a row, or .npy, float32 [num, C, H, W] on [0,
    1]."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "samples.png", (".png", ".npy"))
    if out.suffix == ".png" and num > TILES * SAMPLE_COLUMNS:
        raise InputError(
            f"a picture holds at most {TILES * SAMPLE_COLUMNS} samples, not {num}; "
            f"--out {out.with_suffix('.npy')} takes any number"
        )
    return _write_images(out, trained.sample(num, seed), SAMPLE_COLUMNS)


def interpolate_run(
    run_dir: Path,
    pairs: int = 8,
    steps: int = 10,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes the lines between images 0 and 1, 2 and 3, …: .png, a row a pair with the two images at its ends, or
    .npy, float32 [pairs, steps, C, H, W] on [0, 1]."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "interpolation.png", (".png", ".npy"), images)
    one = _given(trained, images, data_root)
    count = len(one.split)
    if not 1 <= pairs <= count // 2:
        where = shown(images) if images else "the run's validation images"
        way_out = f"ask for 1 to {count // 2}" if count > 1 else "at least two images are needed"
        raise InputError(
            f"{where}: number of images {count}, which make {count // 2} pairs, but --pairs asks for {pairs}; {way_out}"
        )
    if out.suffix == ".png" and max(pairs, steps) > TILES:
        raise InputError(
            f"a picture holds at most {TILES} pairs of {TILES} steps, not {pairs} of {steps}; "
            f"--out {out.with_suffix('.npy')} takes any number"
        )
    first, second = (picked(one, np.arange(start, 2 * pairs, 2)) for start in (0, 1))
    lines = trained.interpolate(first, second, steps)
    if out.suffix == ".npy":
        return _write_array(out, lines)
    ends = [floats(each, range(pairs))[:, None] for each in (first, second)]
    return _write_images(out, torch.cat([ends[0], lines, ends[1]], 1), steps + 2)


def embed_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes codes, of a variational model their means: .npy, float32 [N, *code_shape], or .csv or .parquet with the
    images' paths, their labels where they have some, and x and y, the codes' first two principal components."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "codes.npy", (".npy", ".csv", ".parquet"), images)
    one = _given(trained, images, data_root)
    codes = trained.embed(one)
    if out.suffix == ".npy":
        return _write_array(out, codes)
    codes = codes.flatten(1)
    columns: dict[str, Tensor] = {}
    if one.split.labels is not None:
        columns["label"] = torch.from_numpy(one.split.labels)
    columns |= dict(zip("xy", plane(codes).unbind(1), strict=True))
    columns |= {f"code_{number}": codes[:, number] for number in range(codes.shape[1])}
    return _write_table(out, one, columns)


@dataclass(frozen=True)
class Scored:
    """What ``score_run`` found, and what it wrote."""

    path: Path
    score: str  # its name
    scores: Tensor  # [N]
    threshold: float
    basis: str  # where the threshold comes from, in words
    names: list[str] | None
    figures: dict[str, float]  # AUROC and average precision, where folders say what is anomalous
    pictures: list[Path]
    remarks: list[str]

    @property
    def flagged(self) -> Tensor:
        """Which images score above the threshold, [N]."""
        return self.scores > self.threshold


def score_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
    *,
    score: str | None = None,
    quantile: float = 0.99,
    threshold: float | None = None,
    maps: Path | None = None,
    map_of: Literal["error", "ssim"] = "error",
) -> Scored:
    """Writes scores, high where the model expects an image little: .csv or .parquet with path, score and whether it is
    flagged; .npy, float32 [N].

    A picture of the highest and the lowest stands beside it. Where the images lie in ``normal/`` and ``anomalous/``, or
    in MVTec's folders, it also finds AUROC and average precision, those of PCA, and draws the ROC.

    Args:
        score: as ``TrainedModel.score`` has it.
        quantile: of the scores of the run's validation images: above it, an image is flagged.
        threshold: flag above this score instead.
        maps: a folder for heat maps, a .png for each image.
        map_of: what they show.
    """
    from dist_ae.use import anomalies

    trained = load(run_dir, which)
    if data_root is not None:
        trained.config = trained.config.override({"data.root": data_root})
    name = check_score(trained.model, score)
    if threshold is not None and not math.isfinite(threshold):
        raise InputError(f"--threshold: expected a score, got {threshold}")
    out = _destination(run_dir, out, "scores.csv", (".csv", ".parquet", ".npy"), images)
    if maps is not None:
        maps = _destination(run_dir, maps, "", ("",), images, "--maps")
    what = shown(os.fspath(images)) if images is not None else "the run's validation images"
    limit = trained.threshold(quantile, name) if threshold is None else threshold
    basis = "as given"
    remarks: list[str] = []
    if threshold is None:
        count = len(trained.calibration().scores[name])
        basis = f"the {100 * quantile:g} % quantile of {count:,} validation images"
        if count * (1 - quantile) < 1:
            remarks.append(f"the threshold is the largest score of {count:,} validation images: too few for a quantile")
    one = _given(trained, images, data_root)
    truth = anomalies.truth_of(one.names, what)
    scores = trained.score(one, score=name)

    columns: dict[str, Tensor] = {"score": scores, "flagged": scores > limit}
    if truth is not None:
        columns["anomalous"] = torch.from_numpy(truth)
    path = _write_array(out, scores) if out.suffix == ".npy" else _write_table(out, one, columns)
    pictures = [_draw_extremes(out, one, scores, name, limit, basis)]
    figures: dict[str, float] = {}
    if truth is not None:
        figures, picture, more = _judge(trained, one, truth, scores, name, out)
        pictures.append(picture)
        remarks += more
    if maps is not None:
        pictures.append(_write_maps(trained, one, scores, name, limit, maps, map_of))
    names = None if one.names is None else [shown(each) for each in one.names]
    return Scored(path, name, scores, limit, basis, names, figures, pictures, remarks)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.stem}-{ending}.png")


def _draw_extremes(out: Path, one: Given, scores: Tensor, name: str, limit: float, basis: str) -> Path:
    order = scores.argsort(descending=True, stable=True)
    count = min(SHOWN, len(order))
    places = {"highest": order[:count], "lowest": order.flip(0)[:count]}
    rows = {label: floats(picked(one, index.numpy()), range(count)) for label, index in places.items()}
    notes = [[f"{value:.3g}" for value in scores[index].tolist()] for index in places.values()]
    alarms = [(scores[index] > limit).tolist() for index in places.values()]
    flagged = int((scores > limit).sum())
    title = f"{name}: {flagged:,} of {len(scores):,} above {limit:.3g}, {basis} (red)"

    def draw(path: Path) -> None:
        from dist_ae.figures import extremes

        extremes(rows, notes, alarms, path, title)

    return _write(_beside(out, "extremes"), draw)


def _judge(
    trained: TrainedModel, one: Given, truth: Array, scores: Tensor, name: str, out: Path
) -> tuple[dict[str, float], Path, list[str]]:
    """AUROC and average precision of the scores and of PCA's, the picture of the ROC, and what is to be said of it."""
    from dist_ae.use import anomalies

    remarks = []
    found = {name: anomalies.separation(truth, scores)}
    try:
        linear = anomalies.pca_scores(trained, trained.dataset(), one)
    except InputError as error:
        linear = None
        remarks.append(f"no PCA beside: the run's training images are not there ({error})")
    if linear is not None:
        numbers = math.prod(trained.model.code_shape)
        found[f"PCA, {numbers:,} numbers"] = anomalies.separation(truth, linear)
    figures: dict[str, float] = {}
    for key, each in zip(("", "pca."), found.values(), strict=False):
        figures |= {f"{key}auroc": each.auroc, f"{key}average_precision": each.average_precision}
    known = truth[truth >= 0]
    if len(known) < len(truth):
        remarks.append(f"{len(truth) - len(known):,} images lie in neither kind of folder and are not in these figures")
    title = f"{int(known.sum()):,} anomalous and {int((1 - known).sum()):,} normal images"

    def draw(path: Path) -> None:
        from dist_ae.figures import roc

        labels = {
            f"{label}: AUROC {each.auroc:.3f}, AP {each.average_precision:.3f}": each for label, each in found.items()
        }
        curves = {label: (each.false_positives, each.true_positives) for label, each in labels.items()}
        roc(curves, path, title)

    return figures, _write(_beside(out, "roc"), draw), remarks


def _write_maps(
    trained: TrainedModel,
    one: Given,
    scores: Tensor,
    name: str,
    limit: float,
    folder: Path,
    kind: Literal["error", "ssim"],
) -> Path:
    """A picture of every image with its heat map, all on one scale."""
    from dist_ae.figures import HeatMaps
    from dist_ae.use import anomalies

    _, height, width = trained.model.image_shape
    label = "squared error" if kind == "error" else "1 - SSIM"
    maps = HeatMaps(height, width, anomalies.scale_of(trained, one, kind), label)
    names = file_names(one)

    def write(path: Path) -> None:
        for place, image, reconstruction, values in anomalies.maps_of(trained, one, kind):
            value = float(scores[place])
            note = f"{name} {value:.3g}, threshold {limit:.3g}{', flagged' if value > limit else ''}"
            target = path / names[place]
            target.parent.mkdir(parents=True, exist_ok=True)
            maps.picture(image, reconstruction, values, note, value > limit).save(target)

    return _write_into(folder, write)


def export_run(
    run_dir: Path,
    out: Path | None = None,
    which: Which = "best",
    format: export.Format = "torch",
    part: export.Part = "whole",
    license: str = "other",
    push_to_hub: str | None = None,
) -> tuple[Path, str | None]:
    """Writes the model for other programs: .pt2 for ``torch.export.load``, .onnx, or a folder of safetensors with a
    model card, which ``load`` takes.

    Returns the path, and the address on the Hugging Face Hub where it was uploaded.
    """
    if format != "safetensors" and push_to_hub is not None:
        raise InputError("--push-to-hub uploads a folder with a model card: add --format safetensors")
    if format == "safetensors" and part != "whole":
        raise InputError(f"--part {part}: a safetensors folder holds the whole model; leave it out, or --format onnx")
    trained = load(run_dir, which)
    name, suffix = {"torch": ("model.pt2", ".pt2"), "onnx": ("model.onnx", ".onnx"), "safetensors": ("export", "")}[
        format
    ]
    name = name if part == "whole" else f"{part}{suffix}"
    out = _destination(run_dir, out, name, (suffix,))
    if format != "safetensors":
        content = (export.torch_bytes if format == "torch" else export.onnx_bytes)(trained, part)
        return _write(out, lambda path: path.write_bytes(content)), None
    written = _write_into(out, lambda folder: export.write_folder(trained, run_dir, folder, license))
    return written, None if push_to_hub is None else hub.push(written, push_to_hub)


def explore_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    num: int = 10_000,
    runtime: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes one self-contained page about a run, .html; of more than ``num`` images, that many evenly spaced ones."""
    if num < 3:
        raise InputError(f"--num: a map needs at least 3 images, got {num}")
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "explore.html", (".html",), images)
    one = _given(trained, images, data_root)
    count = len(one.split)
    if count > num:
        one = picked(one, np.linspace(0, count - 1, num).astype(np.int64))
    config = trained.config
    numbers = torch.Size(trained.model.code_shape).numel()
    facts = [f"{config.name} on {shown(config.data.name)}", f"code of {numbers:,} numbers", f"weights: {which}"]
    if images is not None:
        facts.append(f"images of {shown(images)}")
    if count > num:
        facts.append(f"{num:,} of {count:,} images, evenly spaced")
    page = explore_page(trained, one, Path(run_dir).resolve().name, facts, runtime)
    return _write(out, lambda path: path.write_text(page, encoding="utf-8"))


def _given(trained: TrainedModel, images: Path | str | None, data_root: Path | None) -> Given:
    """The user's images, or else the run's validation images."""
    if images is not None:
        return trained.given(images)
    config = trained.config if data_root is None else trained.config.override({"data.root": data_root})
    dataset = sources.load(config.data)
    validation = dataset.val
    if validation.images.shape[1:] != trained.model.image_shape:
        raise InputError(
            f"validation images of {shown(config.data.name)}: the run's model takes images of shape "
            f"{list(trained.model.image_shape)}, got {list(validation.images.shape[1:])}"
        )
    return Given(validation, classes=dataset.classes)


def _destination(
    run_dir: Path,
    out: Path | None,
    name: str,
    suffixes: tuple[str, ...],
    images: Path | str | None = None,
    option: str = "--out",
) -> Path:
    """Where to write: ``out``, else ``name`` in the run. Found wrong before anything is computed. The suffix "" is a
    folder's."""
    if out is None:
        return run_dir / name
    out = expand(out)
    folder = "" in suffixes and (
        not out.suffix or suffixes == ("",) or (os.path.isdir(out) and out.suffix not in suffixes)
    )
    if out.suffix not in suffixes and not folder:
        names = " or ".join(suffix for suffix in suffixes if suffix)
        raise InputError(
            f"{option} {shown(out)}: expected a name that ends in {names}{', or a folder' if '' in suffixes else ''}"
        )
    if not os.path.isdir(out.parent):
        raise InputError(f"{option} {shown(out)}: the folder {shown(out.parent)} does not exist; make it first")
    if os.path.isdir(out) and not folder:
        raise InputError(f"{option} {shown(out)} is a folder: name a file in it")
    if folder and os.path.exists(out) and not os.path.isdir(out):
        file = ", or a file that ends in .npy or .png" if len(suffixes) > 1 else ""
        raise InputError(f"{option} {shown(out)} is a file: name a folder{file}")
    given = None if images is None else os.fspath(images).removeprefix("folder:").removeprefix("array:")
    if given is not None and out.resolve() == expand(given).resolve():
        raise InputError(f"{option} {shown(out)} would replace the images it is made of: give it another name")
    return out


def _write_images(out: Path, images: Tensor, columns: int) -> Path:
    """Images [..., C, H, W] as they are to .npy, or as a grid to .png."""
    if out.suffix == ".npy":
        return _write_array(out, images)

    def draw(path: Path) -> None:
        from dist_ae.figures import image_grid

        image_grid(images.reshape(-1, *images.shape[-3:]), path, columns)

    return _write(out, draw)


def _write_folder(out: Path, images: Iterable[tuple[Path, Tensor]]) -> Path:
    """Writes images [C, H, W] on [0, 1] under their names: all of them, or none."""

    def write(folder: Path) -> None:
        for name, image in images:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            pixels = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(target)

    return _write_into(out, write)


def _write_into(out: Path, write: Callable[[Path], object]) -> Path:
    """Writes files into a folder: all of them, or none. What else is in it stays."""

    def move(temporary: Path) -> None:
        temporary.mkdir()
        write(temporary)
        if out.exists():
            for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
                target = out / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            shutil.rmtree(temporary)

    return _write(out, move)


def _write_table(out: Path, one: Given, columns: dict[str, Tensor]) -> Path:
    """Writes figures of images with the images' paths, or their numbers where they have none, to .csv or .parquet."""
    paths = [str(row) for row in range(len(one.split))] if one.names is None else one.names
    if out.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InputError(
                f"--out {shown(out)} needs pyarrow: pip install 'dist-ae[parquet]', or write .csv"
            ) from None
        named = {"path": [shown(path) for path in paths], **{name: values.numpy() for name, values in columns.items()}}
        return _write(out, lambda path: pyarrow.parquet.write_table(pyarrow.table(named), path))

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["path", *columns])
            table.writerows(zip(paths, *(values.tolist() for values in columns.values()), strict=True))

    return _write(out, write)


def _write_array(out: Path, values: Tensor) -> Path:
    return _write(out, lambda path: np.save(path, values.numpy(), allow_pickle=False))


def _write(out: Path, write: Callable[[Path], object]) -> Path:
    """Writes under another name beside ``out`` and renames, so that a reader, or a fault, never meets half a file."""
    temporary = out.with_name(f".{os.getpid()}-{out.name}")
    try:
        write(temporary)
        if temporary.exists():
            os.replace(temporary, out)
    except OSError as error:
        raise InputError(
            f"{shown(out)} cannot be written ({error.strerror or error}); choose another place with --out"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
    return out
