"""The pictures of a run, drawn without a display."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dist_ae.config import Config
from dist_ae.data.reader import Reader
from dist_ae.draws import Draws, Step, normal
from dist_ae.evaluate import EVALUATION_SEED, fixed_noise
from dist_ae.files import MAX_LINES, folder_inside, inside, read_bounded, write_atomically
from dist_ae.models import Autoencoder, as_bytes


@torch.no_grad()
def run_pictures(
    model: Autoencoder, config: Config, validation: Reader, run_dir: Path, columns: int = 12, step: int | None = None
) -> dict[str, Path]:
    """Draws a run's pictures into ``figures/`` and returns their paths by name.

    They are the loss curve; and for images: originals, reconstructions and their differences, with the error under
    each, and samples of a variational model. If the model is trained to remove noise, noisy images replace the
    originals.

    Args:
        columns: validation images shown.
        step: the step of the weights, for the title.
    """
    folder = folder_inside(run_dir, "figures")
    curve = loss_curve(inside(run_dir, "metrics.jsonl"), folder / "loss.png")
    if model.record_shape is not None:
        return {"loss": curve}
    rows = range(min(columns, len(validation.split)))
    clean = validation.span(rows)
    if config.objective.noise_std:
        noise = fixed_noise(config.evaluation.noise_std, rows, clean.shape[1:], clean.device).to(clean.dtype)
        reconstruction = model(clean, Draws(noise=noise)).reconstruction
        shown = {"noisy": clean + noise, "reconstruction": reconstruction, "clean": clean}
    else:
        reconstruction = model(clean, None).reconstruction
        shown = {"original": clean, "reconstruction": reconstruction}
    difference = reconstruction - clean
    shown = {name: model.visible(images) for name, images in shown.items()}
    # Grey means no difference; lighter or darker pixels are larger or smaller than they should be.
    shown["difference"] = 0.5 + (model.visible(reconstruction) - model.visible(clean)) / 2
    notes = [f"{error:.2g}" for error in difference.square().flatten(1).mean(1).tolist()]
    title = f"{run_dir.name or config.name}{'' if step is None else f', step {step:,}'}"
    pictures = {
        "loss": curve,
        "reconstructions": image_rows(shown, folder / "reconstructions.png", title, notes, "mse"),
    }
    if config.model.variational:
        code = normal(EVALUATION_SEED, "figures.samples", Step(0), range(64), model.code_shape, clean.device)
        pictures["samples"] = image_grid(
            model.visible(model.decode(code.to(clean.dtype))), folder / "samples.png", title=title
        )
    return pictures


def loss_curve(metrics_path: Path, figure_path: Path) -> Path:
    """Training and validation over the steps, from metrics.jsonl: objective on the left, error on the right."""
    lines = [json.loads(line) for line in read_bounded(metrics_path, MAX_LINES).splitlines()]
    train, val = ([line for line in lines if line["split"] == split] for split in ("train", "val"))
    figure = Figure(figsize=(9, 3.4))
    # Fixed margins, for labels of seven characters: matplotlib's own layout draws everything twice, and this picture is
    # drawn often.
    places = {"left": 0.115, "right": 0.985, "bottom": 0.15, "top": 0.9, "wspace": 0.3}
    left, right = figure.subplots(1, 2, gridspec_kw=places)
    style = "-" if len(train) > 1 else "o"  # a line of one point is invisible
    points = [line["step"] for line in train], [line["loss"] for line in train]
    left.plot(*points, style, ms=3, label="training loss", color="#1f6fb4")
    if any("neg_elbo" in line for line in val):
        points = [line["step"] for line in val], [line["neg_elbo"] for line in val]
        left.plot(*points, "o-", ms=3, label="validation −ELBO (β = 1)", color="#d1602c")
    left.set(xlabel="step", ylabel="nats per image", title="objective")
    left.legend(frameon=False)
    points = [line["step"] for line in val], [line["mse"] for line in val]
    right.plot(*points, "o-", ms=3, color="#d1602c", label="validation")
    with_train = [line for line in val if "train_mse" in line]
    if with_train:
        points = [line["step"] for line in with_train], [line["train_mse"] for line in with_train]
        right.plot(*points, "o-", ms=3, color="#1f6fb4", label="training images")
    unit = "share of variance unexplained" if any("r2" in line for line in val) else "squared error per pixel, [0, 1]"
    right.set(xlabel="step", ylabel=unit, title="reconstruction error")
    if any(line["mse"] > 0 for line in val):
        right.set_yscale("log")
        _number_logarithmic(right.yaxis, right.get_ylim()[1] / right.get_ylim()[0])
    right.legend(frameon=False)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, figure_path)


def _number_logarithmic(axis: Axis, span: float) -> None:
    """Plain numbers on a logarithmic axis from a to ``span`` · a; several of them even if ``span`` is small."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def image_rows(
    rows: dict[str, Tensor], figure_path: Path, title: str = "", notes: Sequence[str] = (), note_label: str = ""
) -> Path:
    """One labelled row of images per entry, each [N, C, H, W] on [0, 1]; values outside are clipped.

    ``notes`` stand under the columns.
    """
    return _tiles(torch.stack(list(rows.values())), list(rows), figure_path, title, notes, note_label)


def image_grid(images: Tensor, figure_path: Path, columns: int = 8, title: str = "") -> Path:
    """A grid of images [N, C, H, W] on [0, 1], row by row. An incomplete last row is filled with white."""
    columns = min(columns, len(images))
    white = images.new_ones(-len(images) % columns, *images.shape[1:])
    return _tiles(torch.cat([images, white]).view(-1, columns, *images.shape[1:]), [], figure_path, title)


MOST_NAMES = 40  # most columns whose names fit into a picture
INK, ALARM, BLUE, GREY = "#333333", "#c0392b", "#1f6fb4", "#999999"


def extremes(
    rows: dict[str, Tensor], notes: Sequence[Sequence[str]], alarms: Sequence[Sequence[bool]], path: Path, title: str
) -> Path:
    """One labelled row of images [N, C, H, W] per entry, a note under each image; in red where ``alarms`` is true."""
    columns = max(len(images) for images in rows.values())
    height, width = next(iter(rows.values())).shape[-2:]
    shape = min(max(height / width, 1 / MOST_STRETCHED), MOST_STRETCHED)
    aspect = shape * width / height  # 1 unless the images are shown stretched
    size = (max(0.9 + 0.8 * columns, 6.5), 0.35 + len(rows) * (0.75 * shape + 0.3))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=9, color=INK, x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for line, (label, images) in enumerate(rows.items()):
        axes[line, 0].set_ylabel(label, fontsize=9, color=INK, rotation=0, ha="right", va="center")
        for column, image in enumerate(images):
            pixels = image.nan_to_num(0.0).clamp(0, 1).float().cpu().permute(1, 2, 0).numpy()
            pixels = pixels if pixels.shape[2] in (3, 4) else pixels[..., 0]
            axes[line, column].imshow(pixels, cmap="gray", vmin=0, vmax=1, aspect=aspect)
            alarm = alarms[line][column]
            axes[line, column].set_xlabel(notes[line][column], fontsize=7, color=ALARM if alarm else INK, labelpad=2)
    return _save(figure, path)


def roc(curves: dict[str, tuple[Any, Any]], path: Path, title: str) -> Path:
    """ROC curves by label: rates of false and of true positives. The first curve is drawn strongest."""
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], ":", lw=1, color=GREY)
    for (label, (false_positives, true_positives)), color in zip(curves.items(), (ALARM, BLUE), strict=False):
        axis.plot(false_positives, true_positives, color=color, lw=2 if color == ALARM else 1.4, label=label)
    axis.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.set_title(title, fontsize=9, parse_math=False)
    axis.set_aspect("equal")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="lower right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def evaluation(
    title: str,
    error: Tensor,
    pca_error: Tensor | None,
    denoising: dict[float, dict[str, float]],
    code: dict[str, list[float]],
    columns: dict[str, dict[str, float]],
    path: Path,
) -> Path:
    """One picture of an evaluation: errors of single records compared with PCA, and denoising compared with filters.

    Records that are no images have r2 by column instead of denoising. For a variational code it also shows the rate
    and the aggregate posterior, number by number.
    """
    figure = Figure(figsize=(9.6, 6.6 if code else 3.5), layout="constrained")
    figure.suptitle(title, fontsize=9, color=INK, parse_math=False)
    axes = figure.subplots(2 if code else 1, 2).flatten().tolist()
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    values = [(error, "model", ALARM)] + ([] if pca_error is None else [(pca_error, "PCA, as many numbers", BLUE)])
    low = max(min(float(errors.clamp(min=1e-12).min()) for errors, _, _ in values), 1e-8)
    high = max(*(float(errors.max()) for errors, _, _ in values), 2 * low)
    bins = np.geomspace(low, high, 40)
    for errors, label, color in reversed(values):
        axes[0].hist(errors.numpy(), bins, color=color, alpha=0.55, label=f"{label}: mean {float(errors.mean()):.3g}")
    axes[0].set(xscale="log", xlabel="squared error per pixel, [0, 1]", ylabel="images", title="reconstruction")
    _number_logarithmic(axes[0].xaxis, high / low)
    axes[0].set_ylim(top=1.3 * axes[0].get_ylim()[1])  # room for the legend
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    if columns:
        _by_column(axes[1], columns)
    else:
        _denoising(axes[1], denoising)
    if code:
        rate = np.array(code["rate"])
        order = np.argsort(-rate, kind="stable")
        places = np.arange(1, len(rate) + 1)
        width = 0.8 if len(rate) <= 128 else 1.0
        axes[2].bar(places, rate[order], width, color=ALARM)
        what = "numbers of the code, largest rate first"
        axes[2].set(xlabel=what, ylabel="rate, nats per image", title=f"rate by number: {rate.sum():.4g} nats in all")
        mean, variance = (np.array(code[f"aggregate_{name}"])[order] for name in ("mean", "variance"))
        axes[3].axhline(0, color=BLUE, lw=0.8, alpha=0.5)
        axes[3].axhline(1, color=ALARM, lw=0.8, alpha=0.5)
        axes[3].plot(places, variance, "o", ms=3, color=ALARM, label="variance, of N(0, I): 1")
        axes[3].plot(places, mean, "s", ms=3, color=BLUE, label="mean, of N(0, I): 0")
        axes[3].set(xlabel=what, title="aggregate posterior")
        axes[3].legend(frameon=False, fontsize=8)
        for axis in axes[2:]:
            axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
    return _save(figure, path)


def _denoising(axis: Axes, denoising: dict[float, dict[str, float]]) -> None:
    styles = {
        "model": (ALARM, "o-"),
        "non-local means": (BLUE, "s-"),
        "BM3D": ("#8a5fb0", "d-"),
        "median": ("#2e8b57", "^-"),
        "noisy": (GREY, ":"),
    }
    for name, (color, style) in styles.items():
        if denoising and all(name in psnr for psnr in denoising.values()):
            psnrs = [psnr[name] for psnr in denoising.values()]
            axis.plot(list(denoising), psnrs, style, color=color, ms=4, lw=1.4, label=name)
    axis.set(xlabel="standard deviation of the noise, [0, 1]", ylabel="PSNR, dB", title="denoising")
    axis.legend(frameon=False, fontsize=8)


def columns_beside(columns: dict[str, tuple[float, float]], path: Path) -> Path:
    """r2 of a model and of PCA by column, lowest first."""
    figure = Figure(figsize=(6, min(8.0, 1.4 + 0.16 * len(columns))), layout="constrained")
    axis = figure.subplots()
    _by_column(axis, {name: {"r2": r2, "pca_r2": pca_r2} for name, (r2, pca_r2) in columns.items()})
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _by_column(axis: Axes, columns: dict[str, dict[str, float]]) -> None:
    """r2 of each column and of PCA, lowest first, with the names of the columns if they fit."""
    names = sorted(columns, key=lambda name: columns[name]["r2"])
    places = np.arange(len(names))
    for key, label, color, style in (("r2", "model", ALARM, "o"), ("pca_r2", "PCA, as many numbers", BLUE, "s")):
        if all(key in columns[name] for name in names):
            axis.plot([columns[name][key] for name in names], places, style, color=color, ms=3, label=label)
    if len(names) <= MOST_NAMES:
        axis.set_yticks(places, [name[:24] for name in names], fontsize=5 if len(names) > 20 else 7, parse_math=False)
    low = min(0.0, min(value for scores in columns.values() for value in scores.values()))
    axis.set(xlabel="r2 (1: exact, 0: the mean)", ylabel="columns", title="by column", xlim=(max(low, -1) - 0.05, 1.05))
    axis.legend(frameon=False, fontsize=8)


class HeatMaps:
    """Pictures of an image, its reconstruction and its map, side by side, on a common scale with one colour bar.

    The common parts are drawn once; a figure for each picture would take fifty times as long.
    """

    PANEL, GAP, CAPTION, BAR = 192, 8, 22, 92  # pixels

    def __init__(self, height: int, width: int, upper: float, label: str, largest: int) -> None:
        """Args:
        height, width: of an image.
        upper: the value at the upper end of the scale, which begins at 0.
        label: the content of the map.
        largest: pixels of the longer side, to which larger images are shrunk.
        """
        longer = max(height, width)
        zoom = max(1, round(self.PANEL / longer)) if longer <= largest else largest / longer
        self.size = max(1, round(width * zoom)), max(1, round(height * zoom))
        panel = max(self.size[0], 90)  # wide enough for its caption
        tall = max(self.size[1], 100)
        total = (3 * (panel + self.GAP) + self.BAR, tall + 2 * self.CAPTION)
        figure = Figure(figsize=(total[0] / 100, total[1] / 100), dpi=100)
        self.places = [(index * (panel + self.GAP) + (panel - self.size[0]) // 2, self.CAPTION) for index in range(3)]
        for index, text in enumerate(("image", "reconstruction", label)):
            x = (index * (panel + self.GAP) + panel / 2) / total[0]
            figure.text(x, 1 - self.CAPTION / 2 / total[1], text, ha="center", va="center", fontsize=8, color=INK)
        left, bottom = 3 * (panel + self.GAP) / total[0], (self.CAPTION + 4) / total[1]
        bar = figure.add_axes((left, bottom, 12 / total[0], (tall - 8) / total[1]))
        self._colours = ScalarMappable(Normalize(0, upper), "inferno")
        figure.colorbar(self._colours, cax=bar, extend="max").ax.tick_params(labelsize=7)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # type: ignore[no-untyped-call]
        self._blank = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
        self._font = ImageFont.load_default(size=11)

    def picture(self, image: Tensor, reconstruction: Tensor, values: Tensor, note: str, alarm: bool) -> Image.Image:
        """Image and reconstruction [C, H, W] on [0, 1] and the map [H, W], with a line of text below."""
        result = self._blank.copy()
        panels = [self._pixels(image), self._pixels(reconstruction)]
        panels.append(self._colours.to_rgba(values.numpy(), bytes=True)[..., :3])
        for place, panel in zip(self.places, panels, strict=True):
            enlarged = self.size[0] >= panel.shape[1]
            how = Image.Resampling.NEAREST if enlarged else Image.Resampling.BILINEAR
            result.paste(Image.fromarray(np.ascontiguousarray(panel)).resize(self.size, how), place)
        corner = (4, result.height - self.CAPTION + 4)
        ImageDraw.Draw(result).text(corner, note, fill=ALARM if alarm else INK, font=self._font)
        return result

    @staticmethod
    def _pixels(image: Tensor) -> Any:
        if len(image) == 4:  # colour and transparency, as it is seen on white
            image = image[:3] * image[3:] + 1 - image[3:]
        bytes_ = as_bytes(image).permute(1, 2, 0).numpy()
        return bytes_ if bytes_.shape[2] == 3 else np.repeat(bytes_[..., :1], 3, 2)


TILE, LINE = 0.62, 0.22  # inches: the width of an image, the height of a line of text
MOST_STRETCHED = 8  # images of more extreme proportions are stretched, since they would hardly be visible


def _tiles(
    images: Tensor,
    labels: list[str],
    figure_path: Path,
    title: str = "",
    notes: Sequence[str] = (),
    note_label: str = "",
) -> Path:
    """Images [rows, columns, C, H, W] as one picture.

    Drawing a single array is fifty times faster than an axis for each image.
    """
    rows, columns, channels, height, width = images.shape
    gap_y, gap_x = max(1, height // 14), max(1, width // 14)
    tiles = images.new_ones(rows, columns, channels, height + gap_y, width + gap_x)
    tiles[..., :height, :width] = images.nan_to_num(0.0).clamp(0, 1)
    tall, wide = rows * (height + gap_y), columns * (width + gap_x)
    sheet = tiles.float().cpu().permute(0, 3, 1, 4, 2).reshape(tall, wide, channels)
    picture = sheet[: tall - gap_y, : wide - gap_x].numpy()
    left = 1.3 if labels else 0.0
    above, below = (1.5 * LINE if title else 0.0), (LINE if notes else 0.0)
    shape = min(max((height + gap_y) / (width + gap_x), 1 / MOST_STRETCHED), MOST_STRETCHED)
    inches_wide, inches_tall = columns * TILE, rows * TILE * shape
    total_wide, total_tall = inches_wide + left, inches_tall + above + below
    figure = Figure(figsize=(total_wide, total_tall))
    axis = figure.add_axes((left / total_wide, below / total_tall, inches_wide / total_wide, inches_tall / total_tall))
    axis.axis("off")
    shown = picture if channels in (3, 4) else picture[..., 0]
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
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
        x, y = left / total_wide, 1 - above / 2 / total_tall
        figure.text(x, y, title, ha="left", va="center", parse_math=False, **style)
    return _save(figure, figure_path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    # matplotlib refuses more than 65,535 pixels per side, which very tall images would reach.
    figure.savefig(picture, dpi=min(150, 2**14 / max(figure.get_size_inches())))
    write_atomically(path, picture.getvalue())  # someone may be looking at the picture that it replaces
    return path
