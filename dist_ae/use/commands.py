"""The functions behind the commands that use a trained run, as tyro and Python call them.

Each loads a run, applies its model, writes files, and returns their paths. All raise InputError for a run that does not
exist; for images that are missing, unreadable or do not fit the model; and for a path that cannot be written. Imports
that need torch are inside the functions, so that help comes at once.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dist_ae.errors import InputError
from dist_ae.use.results import Evaluated, ExportedTo, Scored

if TYPE_CHECKING:
    from dist_ae.models import Autoencoder

TILES = 100  # most rows or columns of a picture: more are too many to look at, and take megabytes
SAMPLE_COLUMNS = 8

PICTURES = "pictures (a file, a folder, tar:PATTERN or hf:NAME), a .npy or .npz, or packed:PATH; left out, the run's "
TRUTH = (
    "If the images lie in normal/ and anomalous/ (or in MVTec's folders), "
    "AUROC, average precision and the ROC are reported, with PCA for comparison."
)
RunDir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="the run.")]
Images = Annotated[str | Path | None, tyro.conf.arg(metavar="IMAGES", help=f"{PICTURES}validation images.")]
Noisy = Annotated[
    str | Path | None,
    tyro.conf.arg(metavar="IMAGES", help=f"noisy {PICTURES}validation images with noise added."),
]
Scorable = Annotated[str | Path | None, tyro.conf.arg(metavar="IMAGES", help=f"{PICTURES}validation images. {TRUTH}")]
Which = Annotated[
    Literal["best", "last"],
    tyro.conf.arg(help="use the best weights by validation, or those of the newest checkpoint."),
]
Root = Annotated[
    Path | None,
    tyro.conf.arg(
        name="data.root",  # as `train` spells it
        help="folder of the run's data, if it has moved since training.",
    ),
]
Format = Literal["torch", "onnx", "safetensors"]
Part = Literal["whole", "encoder", "decoder"]
Size = Annotated[
    Literal["own", "model"] | None,
    tyro.conf.arg(
        help="size of pictures: their own, piece by piece, or the model's; left out, their own if the run was trained "
        "on crops (--data.crop)."
    ),
]
ScoredSize = Annotated[
    Literal["own", "model"] | None,
    tyro.conf.arg(
        help="size of pictures: their own, with the score of their oddest square, or the model's; left out, their own "
        "if the run was trained on crops (--data.crop)."
    ),
]


def evaluate_run(
    run_dir: RunDir,
    split: Literal["val", "train"] = "val",
    which: Which = "best",
    noise_std: float | None = None,
    batch_size: int | None = None,
    data_root: Root = None,
    out: Path | None = None,
    subset: int = 200,
    samples: int = 50,
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5),
    bm3d: bool = False,
    features: Path | None = None,
) -> Evaluated:
    """Evaluates a trained run, compared with PCA and classical filters: a table, JSON and one picture.

    It runs on any number of processes.

    Args:
        split: the images to evaluate on.
        noise_std: noise of the fixed noisy copy; left out, the run's own setting.
        batch_size: images at once over all processes; does not change the results.
        out: .json; the picture gets the same name; left out, RUN_DIR/evaluation.json.
        subset: evenly spaced images for the slow parts: denoising, and a variational run's importance-weighted bound.
        samples: draws K of that bound.
        noise_levels: noise, on [0, 1] pixels, for the comparison with a median filter and non-local means.
        bm3d: also compare with BM3D: `pip install bm3d` (free for non-commercial use); takes seconds per image.
        features: a TorchScript file of a feature network (uint8 RGB in, features out), for FID and KID. It is a
            program: use one that you trust.
    """
    from dataclasses import replace

    from dist_ae import pca, quality
    from dist_ae.data import sources
    from dist_ae.data.pictures import expand
    from dist_ae.data.reader import Reader
    from dist_ae.data.records import at_once
    from dist_ae.evaluate import evaluate
    from dist_ae.processes.arrival import arriving
    from dist_ae.processes.environment import launched_world, pinned_torch
    from dist_ae.processes.runtime import Runtime, check_device
    from dist_ae.saved import run_config
    from dist_ae.terminal import Waiting
    from dist_ae.use.evaluation import assess, write_evaluation
    from dist_ae.use.trained import load
    from dist_ae.use.write import destination, reads_of

    config = sources.located(run_config(run_dir), data_root)
    changes = {"evaluation.noise_std": noise_std, "evaluation.batch_size": batch_size}
    # The run's batch size and precision are for training; all metrics are those of the float32 (or float64) model.
    precision = {"precision": "fp64" if config.precision == "fp64" else "fp32"}
    config = config.override({**{key: value for key, value in changes.items() if value is not None}, **precision})
    check_device(config)
    for name, value in (("--subset", subset), ("--samples", samples)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    for level in noise_levels:
        if not 0 < level <= 1:
            raise InputError(f"--noise-levels: expected standard deviations on [0, 1] pixels above 0, got {level}")
    if bm3d:
        quality.require_bm3d()
    network = None if features is None else quality.feature_network(expand(features))
    trained = load(run_dir, which)
    trained.config = config
    reads = reads_of(run_dir, trained, None, features)
    target = destination(reads, run_dir, out, "evaluation.json", (".json",), beside=(".png",))
    with pinned_torch(config.precision), arriving(config.train.timeout) as arrival:
        dataset = trained.dataset()
        batch = at_once(config.evaluation.batch_size, dataset.image_shape, launched_world()[1])
        config = config.override({"evaluation.batch_size": batch})
        runtime = Runtime(config, arrival.meet())
        try:
            raw = trained.model.to(runtime.device, runtime.dtype)
            model = runtime.accelerator.prepare_model(raw, evaluation_mode=True)
            train, val = (Reader(part, runtime.device, runtime.dtype) for part in (dataset.train, dataset.val))
            reader = train if split == "train" else val
            waiting = Waiting("evaluating", math.ceil(len(reader.split) / batch), "batches")
            metrics = evaluate(model, reader, config.objective, config.evaluation, runtime, waiting)
            components = pca.of_model(raw, train, runtime)
            if components is not None:
                metrics["pca_mse"] = pca.baseline(raw, components, reader, runtime)
            levels = sorted({*noise_levels, *([config.evaluation.noise_std] if config.evaluation.noise_std else [])})
            evaluated = assess(
                raw, components, train, reader, metrics, levels, bm3d, subset, samples, network, config, runtime
            )
            if runtime.is_main:
                run = f"{run_dir.name or run_dir}, {split}, step {trained.source[1] if trained.source else '?'}"
                evaluated = write_evaluation(evaluated, run, split, target, lenient=out is None)
            else:
                evaluated = replace(
                    evaluated, metrics={f"{split}.{name}": value for name, value in evaluated.metrics.items()}
                )
            return evaluated
        finally:
            runtime.close()


def reconstruct_run(
    run_dir: RunDir,
    images: Images = None,
    out: Path | None = None,
    size: Size = None,
    which: Which = "best",
    data_root: Root = None,
) -> Path:
    """Writes reconstructions of images; noisy images come out denoised.

    Args:
        out: .npy, float32 [N, C, H, W] on [0, 1]; .png, the first 12 originals over their reconstructions; or a folder
            with a picture for each image; left out, RUN_DIR/reconstructions.npy. For pictures at their own size: a
            folder, or the file of a single one (.png, .jpg, .webp, .tif); left out, RUN_DIR/reconstructions.
    """
    from dist_ae.data import sources
    from dist_ae.use.reconstructions import forms, write_reconstructions
    from dist_ae.use.trained import images_of, load
    from dist_ae.use.whole import own_size, write_whole_pictures
    from dist_ae.use.write import destination, reads_of

    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    reads = reads_of(run_dir, trained, images)
    if (whole := own_size(trained, images, out, size)) is not None:
        return write_whole_pictures(
            trained, whole[0], destination(reads, run_dir, out, "reconstructions", whole[1]), reads
        )
    out = destination(reads, run_dir, out, *forms(trained, "reconstructions", out))
    records = images_of(trained, images)
    return write_reconstructions(trained, records, out, reads, "original", "reconstruction")


def denoise_run(
    run_dir: RunDir,
    images: Noisy = None,
    out: Path | None = None,
    noise_std: float | None = None,
    size: Size = None,
    which: Which = "best",
    data_root: Root = None,
) -> Path:
    """Writes noisy images without their noise, as `reconstruct` does.

    Args:
        out: .npy, float32 [N, C, H, W] on [0, 1]; .png, the first 12 over their reconstructions; or a folder with a
            picture for each image; left out, RUN_DIR/denoised.npy. For pictures at their own size: a folder, or the
            file of a single one (.png, .jpg, .webp, .tif); left out, RUN_DIR/denoised.
        noise_std: first add noise of this standard deviation on [0, 1]; left out, none for given images, and the run's
            evaluation.noise_std for its validation images.
    """
    from dist_ae.data import sources
    from dist_ae.use.reconstructions import forms, write_reconstructions
    from dist_ae.use.trained import images_of, load
    from dist_ae.use.whole import own_size, write_whole_pictures
    from dist_ae.use.write import destination, reads_of

    trained = load(run_dir, which)
    most = 1 if trained.model.units_scale is None else 100
    if noise_std is not None and not 0 <= noise_std <= most:
        raise InputError(f"--noise-std: expected a standard deviation from 0 to {most}, got {noise_std}")
    trained.config = sources.located(trained.config, data_root)
    reads = reads_of(run_dir, trained, images)
    if (whole := own_size(trained, images, out, size)) is not None:
        out = destination(reads, run_dir, out, "denoised", whole[1])
        return write_whole_pictures(trained, whole[0], out, reads, noise_std or 0.0)
    out = destination(reads, run_dir, out, *forms(trained, "denoised", out))
    records = images_of(trained, images)
    if noise_std is None and images is None:
        noise_std = trained.config.evaluation.noise_std
    return write_reconstructions(trained, records, out, reads, "noisy", "denoised", noise_std or 0.0)


def sample_run(run_dir: RunDir, num: int = 64, seed: int = 0, out: Path | None = None, which: Which = "best") -> Path:
    """Writes new images from a variational run, decoded from z ~ N(0, I).

    Args:
        num: how many.
        seed: the same seed gives the same images.
        out: .png, or .npy, float32 [num, C, H, W] on [0, 1]; left out, RUN_DIR/samples.png.
    """
    from dist_ae.use.trained import load
    from dist_ae.use.write import destination, reads_of, write_images

    trained = load(run_dir, which)
    pictures = trained.config.model.record_shape is None
    forms = ("samples.png", (".png", ".npy")) if pictures else ("samples.npy", (".npy",))
    out = destination(reads_of(run_dir, trained), run_dir, out, *forms)
    if out.suffix == ".png" and num > TILES * SAMPLE_COLUMNS:
        raise InputError(
            f"a picture holds at most {TILES * SAMPLE_COLUMNS} samples, not {num}; "
            f"--out {out.with_suffix('.npy')} takes any number"
        )
    images = trained.sample(num, seed)
    return write_images(out, trained.pictures(images) if out.suffix == ".png" else images, SAMPLE_COLUMNS)


def interpolate_run(
    run_dir: RunDir,
    pairs: int = 8,
    steps: int = 10,
    images: Images = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Root = None,
) -> Path:
    """Writes images between images: decoded straight lines between the codes of images 0 and 1, 2 and 3, ….

    Args:
        pairs: how many pairs of images.
        steps: images from one reconstruction to the other, both included.
        out: .png, with a row for each pair, or .npy, float32 [pairs, steps, C, H, W] on [0, 1]; left out,
            RUN_DIR/interpolation.png.
    """
    import numpy as np
    import torch

    from dist_ae.data import sources
    from dist_ae.data.given import floats, picked
    from dist_ae.data.pictures import shown
    from dist_ae.use.trained import images_of, load
    from dist_ae.use.write import destination, reads_of, write_array, write_images

    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    pictures = trained.config.model.record_shape is None
    forms = ("interpolation.png", (".png", ".npy")) if pictures else ("interpolation.npy", (".npy",))
    out = destination(reads_of(run_dir, trained, images), run_dir, out, *forms)
    records = images_of(trained, images)
    count = len(records.split)
    if not 1 <= pairs <= count // 2:
        where = shown(images) if images else "the run's validation images"
        way_out = f"ask for 1 to {count // 2}" if count > 1 else "at least two images are needed"
        raise InputError(f"{where}: {count} images make {count // 2} pairs, but --pairs asks for {pairs}; {way_out}")
    if out.suffix == ".png" and max(pairs, steps) > TILES:
        raise InputError(
            f"a picture holds at most {TILES} pairs of {TILES} steps, not {pairs} of {steps}; "
            f"--out {out.with_suffix('.npy')} takes any number"
        )
    first, second = (picked(records, np.arange(start, 2 * pairs, 2)) for start in (0, 1))
    lines = trained.interpolate(first, second, steps)
    if out.suffix == ".npy":
        return write_array(out, lines)
    ends = [floats(images, range(pairs))[:, None] for images in (first, second)]
    return write_images(out, trained.pictures(torch.cat([ends[0], lines, ends[1]], 1)), steps + 2)


def embed_run(
    run_dir: RunDir, images: Images = None, out: Path | None = None, which: Which = "best", data_root: Root = None
) -> Path:
    """Writes the codes of images; for a variational run, the means of the codes.

    Args:
        out: .npy, float32 [N, *code shape]; or .csv or .parquet, with the path and label of each image, and x and y,
            the first two principal components of the codes; left out, RUN_DIR/codes.npy.
    """
    import torch
    from torch import Tensor

    from dist_ae.data import sources
    from dist_ae.use.explore import plane
    from dist_ae.use.trained import images_of, load
    from dist_ae.use.write import destination, reads_of, write_array, write_table

    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    out = destination(reads_of(run_dir, trained, images), run_dir, out, "codes.npy", (".npy", ".csv", ".parquet"))
    records = images_of(trained, images)
    codes = trained.embed(records)
    if out.suffix == ".npy":
        return write_array(out, codes)
    codes = codes.flatten(1)
    columns: dict[str, Tensor | list[str]] = {}
    labels = records.split.labels
    if labels is not None and records.units is not None and records.classes:  # the classes of the table
        columns["label"] = [records.classes[label] if label >= 0 else "" for label in labels.tolist()]
    elif labels is not None:
        columns["label"] = torch.from_numpy(labels)
    columns |= dict(zip("xy", plane(codes).unbind(1), strict=True))
    columns |= {f"code_{number}": codes[:, number] for number in range(codes.shape[1])}
    return write_table(out, records, columns)


def score_run(
    run_dir: RunDir,
    images: Scorable = None,
    out: Path | None = None,
    size: ScoredSize = None,
    which: Which = "best",
    data_root: Root = None,
    score: Literal["error", "neg_elbo", "mahalanobis"] | None = None,
    quantile: float = 0.99,
    threshold: float | Literal["from-labels"] | None = None,
    maps: Path | None = None,
    map: Literal["error", "ssim"] = "error",
    masks: Path | None = None,
) -> Scored:
    """Writes an anomaly score for each image and flags those above a quantile of the validation scores.

    Args:
        out: .csv or .parquet with path, score and flagged; .npy, float32 [N]; left out, RUN_DIR/scores.csv. Threshold
            and figures go to the file of that name with -verdict.json.
        score: error: squared error per pixel; neg_elbo: nats, of a variational run; mahalanobis: distance of the code
            from those of training images; left out, neg_elbo for a variational run, else error.
        quantile: flag above this quantile of the validation images' scores.
        threshold: flag above this score instead; from-labels: the score with the best F1 on these images, whose folders
            name the anomalous ones.
        maps: a folder for heat maps, a .png for each image, all on the same scale.
        map: content of the heat maps: the squared error, smoothed, or 1 - SSIM.
        masks: a folder of masks, such as broken/000_mask.png for broken/000.png, for pixel AUROC and AUPRO of the heat
            maps; left out, MVTec's ground_truth/ next to a folder test/.
    """
    import torch
    from torch import Tensor

    from dist_ae.data import sources
    from dist_ae.data.pictures import shown
    from dist_ae.scores import check_score
    from dist_ae.use.anomalies import (
        EXTREMES,
        ROC,
        VERDICT,
        draw_extremes,
        judge,
        judge_maps,
        limit_of,
        odd_places,
        truth_of,
        write_maps,
        write_verdict,
    )
    from dist_ae.use.pixels import masks_folder
    from dist_ae.use.trained import load
    from dist_ae.use.views import view_of
    from dist_ae.use.write import destination, reads_of, write_array, write_table

    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    name = check_score(trained.model, score)
    if isinstance(threshold, float | int) and not math.isfinite(threshold):
        raise InputError(f"--threshold: expected a score, got {threshold}")
    mask_folder = masks_folder(images, masks)
    reads = reads_of(run_dir, trained, images, mask_folder)
    endings = (EXTREMES, ROC, VERDICT)
    out = destination(reads, run_dir, out, "scores.csv", (".csv", ".parquet", ".npy"), beside=endings)
    if maps is not None and trained.config.model.record_shape is not None:
        raise InputError("--maps: heat maps are for images; the scores name the columns or positions that are odd")
    if maps is not None:
        maps = destination(reads, run_dir, maps, "", ("",), "--maps")
    what = shown(os.fspath(images)) if images is not None else "the run's validation images"
    if threshold is None:
        trained.threshold(quantile, name)  # raises its errors before anything is computed
    view = view_of(trained, images, size)
    records = view.records
    truth = truth_of(records.names, what)
    scores = view.scores(name)
    limit = limit_of(view, name, quantile, threshold, truth, scores, what)

    columns: dict[str, Tensor | list[str]] = {"score": scores, "flagged": scores > limit.value}
    shape = trained.config.model.record_shape
    if shape is not None and len(shape) <= 2 and name != "mahalanobis" and out.suffix != ".npy":
        columns |= odd_places(trained, records)
    if truth is not None:
        columns["anomalous"] = torch.from_numpy(truth)
    path = write_array(out, scores) if out.suffix == ".npy" else write_table(out, records, columns)
    pictures = [] if shape is not None else [draw_extremes(view, out, scores, name, limit)]
    figures: dict[str, float] = {}
    remarks = list(limit.remarks)
    if truth is not None:
        figures, picture, new_remarks = judge(view, truth, scores, name, out, limit.value)
        pictures.append(picture)
        remarks += new_remarks
    if mask_folder is not None and shape is None:
        pixel_figures, new_remarks = judge_maps(view, truth, map, mask_folder)
        figures |= pixel_figures
        remarks += new_remarks
    if maps is not None:
        pictures.append(write_maps(view, scores, name, limit.value, maps, map, reads))
    names = None if records.names is None else [shown(name) for name in records.names]
    scored = Scored(path, name, scores, limit.value, limit.basis, limit.interval, names, figures, pictures, remarks)
    write_verdict(scored, out)
    return scored


def export_run(
    run_dir: RunDir,
    out: Path | None = None,
    which: Which = "best",
    format: Format = "torch",
    part: Part = "whole",
    license: str = "other",
    push_to_hub: str | None = None,
) -> ExportedTo:
    """Writes the deterministic model for other programs: images on [0, 1] to reconstruction and code.

    Args:
        out: file or folder to write; left out, model.pt2, model.onnx or the folder export/ in RUN_DIR.
        format: torch, a .pt2 that needs only torch; onnx, first compared with torch by onnxruntime; safetensors, a
            folder with a model card, for dist_ae.load.
        part: the whole model, or one half of it.
        license: licence in the model card, by the Hugging Face Hub's identifiers.
        push_to_hub: OWNER/NAME to upload the safetensors folder to; dist_ae.load("hf:OWNER/NAME") loads it from there.
    """
    from dist_ae.data.pictures import expand, shown
    from dist_ae.use import export, hub
    from dist_ae.use.program import onnx_bytes, torch_bytes
    from dist_ae.use.trained import load
    from dist_ae.use.write import destination, reads_of, write_into, write_whole

    if format != "safetensors" and push_to_hub is not None:
        raise InputError("--push-to-hub uploads a folder with a model card: add --format safetensors")
    if format == "safetensors" and part != "whole":
        raise InputError(f"--part {part}: a safetensors folder holds the whole model; leave it out, or --format onnx")
    if not re.fullmatch(r"[\w.+-]+", license):
        raise InputError(f"--license {shown(license)}: expected an identifier, such as apache-2.0 or cc-by-4.0")
    trained = load(run_dir, which)
    names = {"torch": ("model.pt2", ".pt2"), "onnx": ("model.onnx", ".onnx"), "safetensors": ("export", "")}
    name, suffix = names[format]
    name = name if part == "whole" else f"{part}{suffix}"
    reads = reads_of(run_dir, trained)
    if format == "safetensors" and out is not None and (expand(out) / "checkpoints").exists():
        raise InputError(f"--out {shown(out)} is a run, which an exported model would replace: name another folder")
    out = destination(reads, run_dir, out, name, (suffix,))
    if format != "safetensors":
        content = (torch_bytes if format == "torch" else onnx_bytes)(trained.model, part)
        write_whole(out, lambda path: path.write_bytes(content))
        return ExportedTo(out, _how_to_load(trained.model, out, format, part))
    written = write_into(out, lambda folder: export.write_folder(trained, run_dir, folder, license), reads)
    address = None if push_to_hub is None else hub.push(written, push_to_hub, export.PUBLISHED)
    return ExportedTo(written, _how_to_load(trained.model, written, format, part), address)


def _how_to_load(model: Autoencoder, path: Path, format: Format, part: Part) -> str:
    """A line of Python that loads an exported model, with its inputs and outputs."""
    shape = model.record_shape
    records, entry = ("images", "pictures") if shape is None else ("records", "records")
    axes = "C, H, W" if shape is None else ", ".join(map(str, shape))
    array = f"[N, {axes}] {'on [0, 1]' if model.units_scale is None else 'in their own units'}"
    results = {"whole": "reconstruction, code", "encoder": "code", "decoder": records}[part]
    argument, entry, values = (records, entry, array) if part != "decoder" else ("code", "code", "codes")
    name = repr(str(path))
    return {
        "torch": f"{results} = torch.export.load({name}).module()({argument})  # float32 {values}, any N",
        "onnx": f"onnxruntime.InferenceSession({name}).run(None, {{{entry!r}: {argument}}})  # float32 {values}, any N",
        "safetensors": f"model = dist_ae.load({name})",
    }[format]


def explore_run(
    run_dir: RunDir,
    images: Images = None,
    out: Path | None = None,
    num: int = 10_000,
    onnxruntime_web: Path | None = None,
    which: Which = "best",
    data_root: Root = None,
) -> Path:
    """Writes a self-contained HTML page about a run.

    It shows a map of images by their codes, neighbours, best and worst reconstructions, directions of the code, and
    lines between images.

    Args:
        out: .html; left out, RUN_DIR/explore.html.
        num: most images on the map.
        onnxruntime_web: the folder node_modules/onnxruntime-web from `npm install onnxruntime-web`: puts the decoder of
            a convolutional model, or of your own model, into the page (4 MB). The decoder of an mlp does not need it.
    """
    from dist_ae.data import sources
    from dist_ae.data.pictures import shown
    from dist_ae.use.model import page_of
    from dist_ae.use.trained import images_of, load
    from dist_ae.use.write import destination, reads_of, write_whole

    if num < 3:
        raise InputError(f"--num: a map needs at least 3 images, got {num}")
    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    out = destination(reads_of(run_dir, trained, images, onnxruntime_web), run_dir, out, "explore.html", (".html",))
    records = images_of(trained, images)
    lines = [f"weights: {which}", *([f"images of {shown(images)}"] if images is not None else [])]
    page = page_of(trained, records, Path(run_dir).resolve().name, lines, num, onnxruntime_web)
    return write_whole(out, lambda path: path.write_text(page, encoding="utf-8"))


def prune_run(run_dir: RunDir, weights_only: bool = False) -> tuple[int, int]:
    """Removes what a finished run no longer needs: all but its last checkpoint and the best weights.

    Args:
        weights_only: also remove the optimizer state; the run can then be used but not extended.
    """
    from dist_ae.use.prune import prune

    return prune(run_dir, weights_only)
