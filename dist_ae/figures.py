"""The pictures of a run, drawn without a display."""

from __future__ import annotations

import json
from pathlib import Path

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
    """Draws a run's pictures into ``figures/``: the loss curve, originals over reconstructions (noisy, reconstruction and clean where
    noise is trained against), and samples of a variational model. Returns them by name."""
    folder = run_dir / "figures"
    rows = range(min(columns, len(validation.split)))
    clean = validation.span(rows)
    if config.objective.noise_std:
        noise = fixed_noise(config, rows, tuple(clean.shape[1:]), clean.device).to(clean.dtype)
        reconstruction = model(clean, Draws(noise=noise)).reconstruction
        shown = {"noisy": clean + noise, "reconstruction": reconstruction, "clean": clean}
    else:
        shown = {"original": clean, "reconstruction": model(clean, None).reconstruction}
    pictures = {
        "loss": loss_curve(run_dir / "metrics.jsonl", folder / "loss.png"),
        "reconstructions": image_rows(shown, folder / "reconstructions.png"),
    }
    if config.model.variational:
        code = normal(EVALUATION_SEED, "figures.samples", Step(0), range(64), model.code_shape, clean.device)
        pictures["samples"] = image_grid(model.decode(code.to(clean.dtype)), folder / "samples.png")
    return pictures


def loss_curve(metrics_path: Path, figure_path: Path) -> Path:
    """Training and validation over the steps, from metrics.jsonl: the objective on the left, the validation error on the right."""
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
    right.set(xlabel="step", ylabel="squared error per pixel, [0, 1]", title="reconstruction error", yscale="log")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, figure_path)


def image_rows(rows: dict[str, Tensor], figure_path: Path) -> Path:
    """One labelled row of images per entry, each [N, C, H, W] on [0, 1] (values outside are clipped)."""
    return _tiles(torch.stack(list(rows.values())), list(rows), figure_path)


def image_grid(images: Tensor, figure_path: Path, columns: int = 8) -> Path:
    """A grid of images [N, C, H, W] on [0, 1], row by row; where N is no multiple of ``columns`` the last row ends in white."""
    columns = min(columns, len(images))
    white = images.new_ones(-len(images) % columns, *images.shape[1:])
    return _tiles(torch.cat([images, white]).view(-1, columns, *images.shape[1:]), [], figure_path)


def _tiles(images: Tensor, labels: list[str], figure_path: Path) -> Path:
    """Images [rows, columns, C, H, W] as one picture: a single array is drawn fifty times faster than an axis an image."""
    rows, columns, channels, height, width = images.shape
    gap_y, gap_x = max(1, height // 14), max(1, width // 14)
    tiles = images.new_ones(rows, columns, channels, height + gap_y, width + gap_x)
    tiles[..., :height, :width] = images.clamp(0, 1)
    tall, wide = rows * (height + gap_y), columns * (width + gap_x)
    picture = (
        tiles.float().cpu().permute(0, 3, 1, 4, 2).reshape(tall, wide, channels)[: tall - gap_y, : wide - gap_x].numpy()
    )
    margin = 1.3 if labels else 0.0  # inches
    inches_wide, inches_tall = columns * 0.62, columns * 0.62 * tall / wide
    figure = Figure(figsize=(inches_wide + margin, inches_tall))
    axis = figure.add_axes((margin / (inches_wide + margin), 0, inches_wide / (inches_wide + margin), 1))
    axis.axis("off")
    axis.imshow(
        picture if channels in (3, 4) else picture[..., 0],
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
    )
    for row, label in enumerate(labels):
        y = row * (height + gap_y) + height / 2
        axis.text(-wide * 0.01, y, label, ha="right", va="center", fontsize=9, color="#333333")
    return _save(figure, figure_path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # matplotlib refuses more than 65,535 pixels a side, which very tall images would reach.
    figure.savefig(path, dpi=min(150, 2**14 / max(figure.get_size_inches())))
    return path
