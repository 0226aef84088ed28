"""The commands that apply a trained run to images, or to its own validation images.

Each loads a run, applies its model, writes, and returns the path. All raise InputError for a run that does not exist;
for images that are missing, unreadable or do not fit the model; and for a place that cannot be written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_ae.config import InputError
from dist_ae.data import sources
from dist_ae.data.given import Given, blocks, file_names, floats, picked
from dist_ae.data.pictures import expand, shown
from dist_ae.data.reads import Reads
from dist_ae.evaluate import fixed_noise
from dist_ae.saved import Which
from dist_ae.use import export, hub
from dist_ae.use.explore import explore_page, plane
from dist_ae.use.explore_records import records_page
from dist_ae.use.trained import TrainedModel, images_of, load
from dist_ae.use.write import (
    SHOWN,
    destination,
    reads_of,
    write_array,
    write_folder,
    write_images,
    write_into,
    write_table,
    write_whole,
)

TABLES = (".csv", ".parquet")
TILES = 100  # most rows or columns of a picture: more images are too many to look at, and take megabytes
SAMPLE_COLUMNS = 8


def reconstruct_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes reconstructions.

    ``out`` is .npy, float32 [N, C, H, W] on [0, 1]; .png, the first 12 originals over their reconstructions; or a
    folder, a .png for each image. Records that are no images go to .npy, and rows of tables also to .csv or .parquet,
    in their own units.
    """
    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    reads = reads_of(run_dir, trained, images)
    out = destination(reads, run_dir, out, *_forms(trained, "reconstructions"))
    one = images_of(trained, images)
    return _write_reconstructions(trained, one, out, reads, "original", "reconstruction")


def denoise_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
    noise_std: float | None = None,
) -> Path:
    """Writes noisy images denoised, in the forms of ``reconstruct_run``.

    Args:
        noise_std: noise to add first, on [0, 1] pixels or in standard deviations. None adds none to ``images``, and to
            validation images as much as an evaluation does.
    """
    trained = load(run_dir, which)
    most = 1 if trained.model.units_scale is None else 100
    if noise_std is not None and not 0 <= noise_std <= most:
        raise InputError(f"--noise-std: expected a standard deviation from 0 to {most}, got {noise_std}")
    trained.config = sources.located(trained.config, data_root)
    reads = reads_of(run_dir, trained, images)
    out = destination(reads, run_dir, out, *_forms(trained, "denoised"))
    one = images_of(trained, images)
    if noise_std is None and images is None:
        noise_std = trained.config.evaluation.noise_std
    return _write_reconstructions(trained, one, out, reads, "noisy", "denoised", noise_std or 0.0)


def _forms(trained: TrainedModel, name: str) -> tuple[str, tuple[str, ...]]:
    """Where reconstructions go by default, and the endings of all forms that they can have."""
    shape = trained.config.model.record_shape
    if shape is None:
        return f"{name}.npy", (".npy", ".png", "")
    return (f"{name}.csv", (*TABLES, ".npy")) if len(shape) == 1 else (f"{name}.npy", (".npy",))


def _columns(trained: TrainedModel) -> Sequence[str]:
    """The names of a table's columns, or their numbers."""
    return trained.config.data.columns or [f"column_{number}" for number in range(trained.model.image_shape[0])]


def _write_reconstructions(
    trained: TrainedModel, one: Given, out: Path, reads: Reads, before: str, after: str, noise_std: float = 0.0
) -> Path:
    def inputs(rows: range) -> Tensor:
        clean = floats(one, rows)
        if not noise_std:
            return clean
        scale = 1.0 if trained.model.units_scale is None else trained.model.units_scale.cpu()
        return clean + scale * fixed_noise(noise_std, rows, clean.shape[1:], clean.device)

    def outputs(rows: range) -> Tensor:
        return trained.reconstruct(inputs(rows))

    if out.suffix == ".png":
        shown = range(min(SHOWN, len(one.split)))
        rows = {before: inputs(shown), after: outputs(shown)}
        if noise_std:
            rows["clean"] = floats(one, shown)

        def draw(path: Path) -> None:
            from dist_ae.figures import image_rows  # here, since matplotlib takes a second to import

            image_rows(rows, path)

        return write_whole(out, draw)
    cut = blocks(one)
    if out.suffix == ".npy":
        return write_array(out, torch.cat([outputs(rows) for rows in cut]))
    if out.suffix in TABLES:
        found = torch.cat([outputs(rows) for rows in cut])
        return write_table(out, one, dict(zip(_columns(trained), found.unbind(1), strict=True)))
    names = file_names(one)
    pairs = ((names[row], image) for rows in cut for row, image in zip(rows, outputs(rows), strict=True))
    return write_folder(out, pairs, reads)


def sample_run(run_dir: Path, num: int = 64, seed: int = 0, out: Path | None = None, which: Which = "best") -> Path:
    """Writes ``num`` new images of a variational run.

    ``out`` is .png, eight in a row, or .npy, float32 [num, C, H, W] on [0, 1].
    """
    trained = load(run_dir, which)
    pictures = trained.config.model.record_shape is None
    forms = ("samples.png", (".png", ".npy")) if pictures else ("samples.npy", (".npy",))
    out = destination(reads_of(run_dir, trained), run_dir, out, *forms)
    if out.suffix == ".png" and num > TILES * SAMPLE_COLUMNS:
        raise InputError(
            f"a picture holds at most {TILES * SAMPLE_COLUMNS} samples, not {num}; "
            f"--out {out.with_suffix('.npy')} takes any number"
        )
    return write_images(out, trained.sample(num, seed), SAMPLE_COLUMNS)


def interpolate_run(
    run_dir: Path,
    pairs: int = 8,
    steps: int = 10,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes the lines between images 0 and 1, 2 and 3, …

    ``out`` is .png, a row for each pair between its two images, or .npy, float32 [pairs, steps, C, H, W] on [0, 1].
    """
    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    pictures = trained.config.model.record_shape is None
    forms = ("interpolation.png", (".png", ".npy")) if pictures else ("interpolation.npy", (".npy",))
    out = destination(reads_of(run_dir, trained, images), run_dir, out, *forms)
    one = images_of(trained, images)
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
        return write_array(out, lines)
    ends = [floats(each, range(pairs))[:, None] for each in (first, second)]
    return write_images(out, torch.cat([ends[0], lines, ends[1]], 1), steps + 2)


def embed_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes codes; those of a variational model are the means.

    ``out`` is .npy, float32 [N, *code_shape], or .csv or .parquet with the images' paths, their labels where they have
    some, and x and y, the codes' first two principal components.
    """
    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    out = destination(reads_of(run_dir, trained, images), run_dir, out, "codes.npy", (".npy", ".csv", ".parquet"))
    one = images_of(trained, images)
    codes = trained.embed(one)
    if out.suffix == ".npy":
        return write_array(out, codes)
    codes = codes.flatten(1)
    columns: dict[str, Tensor | list[str]] = {}
    labels = one.split.labels
    if labels is not None and one.units is not None and one.classes:  # as the table has them
        columns["label"] = [one.classes[label] if label >= 0 else "" for label in labels.tolist()]
    elif labels is not None:
        columns["label"] = torch.from_numpy(labels)
    columns |= dict(zip("xy", plane(codes).unbind(1), strict=True))
    columns |= {f"code_{number}": codes[:, number] for number in range(codes.shape[1])}
    return write_table(out, one, columns)


def export_run(
    run_dir: Path,
    out: Path | None = None,
    which: Which = "best",
    format: export.Format = "torch",
    part: export.Part = "whole",
    license: str = "other",
    push_to_hub: str | None = None,
) -> tuple[Path, str | None]:
    """Writes the model for other programs.

    ``out`` is .pt2 for ``torch.export.load``, .onnx, or a folder of safetensors with a model card, which ``load``
    takes. Returns the path, and the address on the Hugging Face Hub where it was uploaded.
    """
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
        content = (export.torch_bytes if format == "torch" else export.onnx_bytes)(trained, part)
        return write_whole(out, lambda path: path.write_bytes(content)), None
    written = write_into(out, lambda folder: export.write_folder(trained, run_dir, folder, license), reads)
    return written, None if push_to_hub is None else hub.push(written, push_to_hub, export.PUBLISHED)


def explore_run(
    run_dir: Path,
    images: Path | str | None = None,
    out: Path | None = None,
    num: int = 10_000,
    runtime: Path | None = None,
    which: Which = "best",
    data_root: Path | None = None,
) -> Path:
    """Writes one self-contained .html page about a run. Of more than ``num`` images, it shows ``num`` evenly spaced."""
    if num < 3:
        raise InputError(f"--num: a map needs at least 3 images, got {num}")
    trained = load(run_dir, which)
    trained.config = sources.located(trained.config, data_root)
    out = destination(reads_of(run_dir, trained, images, runtime), run_dir, out, "explore.html", (".html",))
    one = images_of(trained, images)
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
    name = Path(run_dir).resolve().name
    if config.model.record_shape is None:
        page = explore_page(trained, one, name, facts, runtime)
    elif runtime is not None:
        raise InputError("--runtime is for the decoder of images, and the run's records are none")
    else:
        page = records_page(trained, one, name, facts)
    return write_whole(out, lambda path: path.write_text(page, encoding="utf-8"))
