"""The pictures of a run, drawn without a display."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dist_ae.config import Config
from dist_ae.data.reader import Reader
from dist_ae.draws import Draws, Step, normal
from dist_ae.evaluate import EVALUATION_SEED, fixed_noise
from dist_ae.models import Autoencoder


@torch.no_grad()
def run_pictures(
    model: Autoencoder, config: Config, validation: Reader, run_dir: Path, columns: int = 12, step: int | None = None
) -> dict[str, Path]:
    """Draws a run's pictures into ``figures/``: the loss curve; originals, reconstructions and their differences with
    the error under
    each (noisy images in place of the originals where noise is trained against); samples of a variational model.

    Args:
        columns: validation images shown.
        step: the step of the weights, for the title.

    Returns them by name.
    """
    folder = run_dir / "figures"
    rows = range(min(columns, len(validation.split)))
    clean = validation.span(rows)
    if config.objective.noise_std:
        noise = fixed_noise(config, rows, tuple(clean.shape[1:]), clean.device).to(clean.dtype)
        reconstruction = model(clean, Draws(noise=noise)).reconstruction
        shown = {"noisy": clean + noise, "reconstruction": reconstruction, "clean": clean}
    else:
        reconstruction = model(clean, None).reconstruction
        shown = {"original": clean, "reconstruction": reconstruction}
    difference = reconstruction - clean
    shown["difference"] = 0.5 + difference / 2  # grey is none, lighter or darker is more or less than there should be
    errors = difference.square().flatten(1).mean(1).tolist()
    title = f"{run_dir.name or config.name}{'' if step is None else f', step {step:,}'}"
    pictures = {
        "loss": loss_curve(run_dir / "metrics.jsonl", folder / "loss.png"),
        "reconstructions": image_rows(
            shown, folder / "reconstructions.png", title, [f"{error:.2g}" for error in errors], "mse"
        ),
    }
    if config.model.variational:
        code = normal(EVALUATION_SEED, "figures.samples", Step(0), range(64), model.code_shape, clean.device)
        pictures["samples"] = image_grid(model.decode(code.to(clean.dtype)), folder / "samples.png", title=title)
    return pictures


def loss_curve(metrics_path: Path, figure_path: Path) -> Path:
    """Training and validation over the steps, from metrics.jsonl: the objective on the left, the validation error on
    the right."""
    lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    train, val = ([line for line in lines if line["split"] == split] for split in ("train", "val"))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        [line["step"] for line in train], [line["loss"] for line in train], label="training loss", color="#1f6fb4"
    )
    if any("neg_elbo" in line for line in val):
        left.plot(
            [line["step"] for line in val],
            [line["neg_elbo"] for line in val],
            "o-",
            ms=3,
            label="validation −ELBO (β = 1)",
            color="#d1602c",
        )
    left.set(xlabel="step", ylabel="nats per image", title="objective")
    left.legend(frameon=False)
    right.plot(
        [line["step"] for line in val], [line["mse"] for line in val], "o-", ms=3, color="#d1602c", label="validation"
    )
    seen = [line for line in val if "train_mse" in line]
    if seen:
        points = [line["step"] for line in seen], [line["train_mse"] for line in seen]
        right.plot(*points, "o-", ms=3, color="#1f6fb4", label="training images")
    right.set(xlabel="step", ylabel="squared error per pixel, [0, 1]", title="reconstruction error", yscale="log")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, figure_path)


def image_rows(
    rows: dict[str, Tensor], figure_path: Path, title: str = "", notes: Sequence[str] = (), note_label: str = ""
) -> Path:
    """One labelled row of images per entry, each [N, C, H, W] on [0, 1] (values outside are clipped); ``notes`` stand
    under the columns."""
    return _tiles(torch.stack(list(rows.values())), list(rows), figure_path, title, notes, note_label)


def image_grid(images: Tensor, figure_path: Path, columns: int = 8, title: str = "") -> Path:
    """A grid of images [N, C, H, W] on [0, 1], row by row; where N is no multiple of ``columns`` the last row ends in
    white."""
    columns = min(columns, len(images))
    white = images.new_ones(-len(images) % columns, *images.shape[1:])
    return _tiles(torch.cat([images, white]).view(-1, columns, *images.shape[1:]), [], figure_path, title)


TILE, LINE = 0.62, 0.22  # inches: the width of an image, the height of a line of text
MOST_STRETCHED = 8  # a wider or taller image is shown stretched: one pixel high, it could not be seen


def _tiles(
    images: Tensor,
    labels: list[str],
    figure_path: Path,
    title: str = "",
    notes: Sequence[str] = (),
    note_label: str = "",
) -> Path:
    """Images [rows, columns, C, H, W] as one picture: a single array is drawn fifty times faster than an axis an
    image."""
    rows, columns, channels, height, width = images.shape
    gap_y, gap_x = max(1, height // 14), max(1, width // 14)
    tiles = images.new_ones(rows, columns, channels, height + gap_y, width + gap_x)
    tiles[..., :height, :width] = images.nan_to_num(0.0).clamp(0, 1)
    tall, wide = rows * (height + gap_y), columns * (width + gap_x)
    picture = (
        tiles.float().cpu().permute(0, 3, 1, 4, 2).reshape(tall, wide, channels)[: tall - gap_y, : wide - gap_x].numpy()
    )
    left = 1.3 if labels else 0.0
    above, below = (1.5 * LINE if title else 0.0), (LINE if notes else 0.0)
    shape = min(max((height + gap_y) / (width + gap_x), 1 / MOST_STRETCHED), MOST_STRETCHED)
    inches_wide, inches_tall = columns * TILE, rows * TILE * shape
    total_wide, total_tall = inches_wide + left, inches_tall + above + below
    figure = Figure(figsize=(total_wide, total_tall))
    axis = figure.add_axes((left / total_wide, below / total_tall, inches_wide / total_wide, inches_tall / total_tall))
    axis.axis("off")
    axis.imshow(
        picture if channels in (3, 4) else picture[..., 0],
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
    )
    style: dict[str, Any] = {"fontsize": 9, "color": "#333333"}
    beside = (left - 0.1) / total_wide
    for row, label in enumerate(labels):
        y = (below + inches_tall * (1 - (row * (height + gap_y) + height / 2) / (tall - gap_y))) / total_tall
        figure.text(beside, y, label, ha="right", va="center", **style)
    for column, note in enumerate(notes):
        x = (left + inches_wide * (column * (width + gap_x) + width / 2) / (wide - gap_x)) / total_wide
        figure.text(x, below / 2 / total_tall, note, ha="center", va="center", fontsize=7, color="#333333")
    if notes:
        figure.text(beside, below / 2 / total_tall, note_label, ha="right", va="center", **style)
    if title:
        figure.text(
            left / total_wide, 1 - above / 2 / total_tall, title, ha="left", va="center", parse_math=False, **style
        )
    return _save(figure, figure_path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # matplotlib refuses more than 65,535 pixels a side, which very tall images would reach.
    figure.savefig(path, dpi=min(150, 2**14 / max(figure.get_size_inches())))
    return path
