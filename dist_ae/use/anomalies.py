"""`dist-ae score`: scores, thresholds, how well they separate images known to be anomalous, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ae import pca
from dist_ae.config import InputError
from dist_ae.data.given import Given, blocks, file_names, floats
from dist_ae.data.pictures import shown
from dist_ae.data.reader import Reader
from dist_ae.data.reads import Reads
from dist_ae.data.records import Array
from dist_ae.files import to_json
from dist_ae.processes.runtime import Alone
from dist_ae.scores import CONFIDENCE
from dist_ae.use.pixels import localized, masks_by_name
from dist_ae.use.results import Scored
from dist_ae.use.trained import TrainedModel
from dist_ae.use.views import Kind, View
from dist_ae.use.write import SHOWN, refuse_targets, with_ending, write_whole

NORMAL, ANOMALOUS = "normal", "anomalous"
MVTEC_NORMAL = "good"  # MVTec AD's name for its folder of pictures without a defect
EXTREMES, ROC = "-extremes.png", "-roc.png"  # endings of the pictures beside the scores
VERDICT = "-verdict.json"  # of the threshold and the figures
ODD_PLACES = 3  # columns of a row, or positions of a signal, that the scores name
ODD_WINDOWS = 32  # windows of a signal, each represented by its oddest position: neighbours say the same
SATURATED = 0.01  # share of images whose map may exceed the common scale of all maps


class Limit(NamedTuple):
    """A threshold, and where it comes from."""

    value: float
    basis: str  # in words
    interval: tuple[float, float] | None = None  # of a quantile; its ends may be infinite
    remarks: tuple[str, ...] = ()


class Separation(NamedTuple):
    """How well scores separate anomalous images from normal ones."""

    auroc: float
    average_precision: float
    false_positives: Array  # of the ROC, rates on [0, 1]
    true_positives: Array


def truth_of(names: Sequence[str] | None, what: str) -> Array | None:
    """Which images are anomalous, by their folders: 1, 0, or -1 for neither; None if there are no such folders.

    The folders are ``normal/`` and ``anomalous/``, or MVTec AD's ``good/`` and one folder for each defect (``test`` of
    a category).

    Raises:
        InputError: there is only one of the two kinds, or the folder is a whole category of MVTec, whose masks are
            pictures, too.
    """
    if names is None:
        return None
    folders = [Path(name).parts[:-1] for name in names]
    folder_names = {part for parts in folders for part in parts}
    if "ground_truth" in folder_names and MVTEC_NORMAL in folder_names:
        raise InputError(
            f"{what}: holds MVTec's ground_truth, whose masks are no pictures of the object; score its folder test/"
        )
    if folder_names & {NORMAL, ANOMALOUS}:
        truth = np.array([1 if ANOMALOUS in parts else 0 if NORMAL in parts else -1 for parts in folders])
    elif MVTEC_NORMAL in folder_names:
        truth = np.array([-1 if not parts else 0 if MVTEC_NORMAL in parts else 1 for parts in folders])
    else:
        return None
    for value, present, absent in ((1, "normal", "anomalous"), (0, "anomalous", "normal")):
        if not (truth == value).any():
            raise InputError(
                f"{what}: its folders name {present} pictures and no {absent} ones, so there is nothing to separate; "
                f"give both ({NORMAL}/ and {ANOMALOUS}/, or {MVTEC_NORMAL}/ and a folder a defect), or one inner folder"
            )
    return truth


def best_threshold(truth: Array, scores: Tensor) -> float:
    """The threshold whose flags have the largest F1, halfway to the next lower score.

    Of several equally good thresholds it is the highest, which flags the fewest images.
    """
    from sklearn.metrics import precision_recall_curve

    known = truth >= 0
    values = scores.double().numpy()[known]
    precision, recall, candidates = precision_recall_curve(truth[known], values)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    lowest = float(candidates[np.flatnonzero(f1[:-1] == f1[:-1].max())[-1]])  # the lowest flagged score
    below = values[values < lowest]
    if not len(below):
        return float(np.nextafter(np.float32(lowest), np.float32(-np.inf)))
    middle = float(np.float32((lowest + below.max()) / 2))  # float32, as the scores that are compared with it
    return middle if middle < lowest else float(below.max())


def flagging(truth: Array, scores: Tensor, threshold: float) -> dict[str, float]:
    """Precision, recall and F1 of flagging scores above a threshold, over the images whose truth is known."""
    from sklearn.metrics import precision_recall_fscore_support

    known = truth >= 0
    values = precision_recall_fscore_support(
        truth[known], (scores > threshold).numpy()[known], average="binary", zero_division=0.0
    )
    return dict(zip(("precision", "recall", "f1"), map(float, values), strict=False))


def separation(truth: Array, scores: Tensor) -> Separation:
    """Area under the ROC curve, average precision and the curve itself, over the images whose truth is known."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    known = truth >= 0
    labels, values = truth[known], scores.double().numpy()[known]
    false_positives, true_positives, _ = roc_curve(labels, values)
    auroc, precision = float(roc_auc_score(labels, values)), float(average_precision_score(labels, values))
    return Separation(auroc, precision, false_positives, true_positives)


def limit_of(
    view: View,
    name: str,
    quantile: float,
    threshold: float | Literal["from-labels"] | None,
    truth: Array | None,
    scores: Tensor,
    what: str,
) -> Limit:
    """The threshold: the given one, the best on labelled images, or a quantile of the validation images.

    Raises:
        InputError: there are no labels, or no validation images.
    """
    if threshold is None:
        return _quantile(view, name, quantile)
    if not isinstance(threshold, str):
        return Limit(threshold, "as given")
    if truth is None:
        raise InputError(
            f"--threshold from-labels: no folder of {what} says which images are anomalous; expected {NORMAL}/ and "
            f"{ANOMALOUS}/, or {MVTEC_NORMAL}/ and a folder a defect"
        )
    value = best_threshold(truth, scores)
    remarks = ["the threshold was chosen on the same images, which flatters precision, recall and F1"]
    try:
        default = _quantile(view, name, quantile)
    except InputError as error:
        remarks.append(f"no quantile to compare with: {error}")
    else:
        figures = flagging(truth, scores, default.value).items()
        listed = ", ".join(f"{key} {value:.4g}" for key, value in figures)
        remarks += [f"for comparison, {default.basis}: {default.value:.6g}, with {listed}", *default.remarks]
    known = truth[truth >= 0]
    basis = f"the best F1 on {int(known.sum()):,} anomalous and {int((1 - known).sum()):,} normal images"
    return Limit(value, basis, None, tuple(remarks))


def _quantile(view: View, name: str, quantile: float) -> Limit:
    """The threshold at a quantile of the held-out images, and the confidence interval of that quantile."""
    calibration = view.calibration(name)
    value = calibration.threshold(name, quantile)
    count, (low, high) = len(calibration.scores[name]), calibration.interval(name, quantile)
    between = f"{low:.4g} to {high:.4g}" if math.isfinite(low) else f"at most {high:.4g}"
    between = between if math.isfinite(high) else f"{low:.4g} or more" if math.isfinite(low) else "anything"
    basis = f"the {100 * quantile:g} % quantile of {count:,} {view.held_out} (95 % interval: {between})"
    remarks = []
    if count * (1 - quantile) < 1:
        above = 1 - (1 - CONFIDENCE) ** (1 / count)
        remarks.append(
            f"the threshold is the largest score of {count:,} {view.held_out}: too few for a quantile. Up to "
            f"{above:.1%} of normal images may lie above it (95 % confidence)"
        )
    return Limit(value, basis, (low, high), tuple(remarks))


def pca_scores(view: View) -> Tensor | None:
    """The squared error per pixel of the training images' PCA (or PCA of patches), with as many numbers as the code.

    None for a model that has no linear counterpart.

    Raises:
        InputError: the run's training images are missing.
    """
    model = view.trained.model
    code = model.linear_code()
    if code is None:
        return None
    dataset, alone = view.trained.dataset(), Alone(torch.device("cpu"))
    components = pca.of_model(model, Reader(dataset.train, alone.device), alone)
    assert components is not None
    return view.each(lambda images, rows: pca.errors(components, code.patch, images.cpu()))


def scale_of(view: View, kind: Kind) -> float:
    """The upper end of the common scale of all maps. In one image of a hundred, the largest value exceeds it."""
    largest = [float(difference.values.max()) for difference in view.maps(kind)]
    return max(float(np.quantile(largest, 1 - SATURATED, method="inverted_cdf")), 1e-6)


# -- the command


def odd_places(trained: TrainedModel, records: Given) -> dict[str, list[str]]:
    """The largest contributions to the error of each row or signal, largest first: ``odd_1`` to ``odd_3``.

    Each is the name of a table's column; or a position of a signal, counted from 0, with its channel if there are
    several.
    """
    channels, _, length = trained.model.image_shape
    window = -(-length // ODD_WINDOWS)  # 1 for a table
    parts = []
    for rows in blocks(records):
        errors = trained.contributions(floats(records, rows)).reshape(-1, channels, length)
        largest, positions = F.max_pool1d(errors, window, ceil_mode=True, return_indices=True)
        order = largest.flatten(1).topk(min(ODD_PLACES, largest[0].numel()), 1).indices
        parts.append(torch.stack([order // largest.shape[2], positions.flatten(1).gather(1, order)], 2))
    places = torch.cat(parts).tolist()  # [N, ranks, (channel, position)]

    def name(channel: int, position: int) -> str:
        if length == 1:
            return trained.columns[channel]
        return f"position {position}" if channels == 1 else f"channel {channel} position {position}"

    return {f"odd_{rank + 1}": [name(*row[rank]) for row in places] for rank in range(len(places[0]))}


def draw_extremes(view: View, out: Path, scores: Tensor, name: str, limit: Limit) -> Path:
    order = scores.argsort(descending=True, stable=True)
    count = min(SHOWN, len(order))
    places = {"highest": order[:count], "lowest": order.flip(0)[:count]}
    rows = {label: view.shown(index.tolist()) for label, index in places.items()}
    notes = [[f"{value:.3g}" for value in scores[index].tolist()] for index in places.values()]
    alarms = [(scores[index] > limit.value).tolist() for index in places.values()]
    flagged = int((scores > limit.value).sum())
    title = f"{name}: {flagged:,} of {len(scores):,} above {limit.value:.3g}, {limit.basis.partition(' (')[0]} (red)"

    def draw(path: Path) -> None:
        from dist_ae.figures import extremes

        extremes(rows, notes, alarms, path, title)

    return write_whole(with_ending(out, EXTREMES), draw)


def judge(
    view: View, truth: Array, scores: Tensor, name: str, out: Path, limit: float
) -> tuple[dict[str, float], Path, list[str]]:
    """Figures, the picture of the ROC, and remarks.

    The figures are AUROC and average precision of the scores and of PCA's, and precision, recall and F1 at the
    threshold ``limit`` and at the best one.
    """
    remarks = []
    separations = {name: separation(truth, scores)}
    try:
        linear = pca_scores(view)
    except InputError as error:
        linear = None
        remarks.append(f"no comparison with PCA: the run's training images are missing ({error})")
    if linear is not None:
        numbers = math.prod(view.trained.model.code_shape)
        separations[f"PCA, {numbers:,} numbers"] = separation(truth, linear)
    figures: dict[str, float] = {}
    for prefix, result in zip(("", "pca."), separations.values(), strict=False):
        figures |= {f"{prefix}auroc": result.auroc, f"{prefix}average_precision": result.average_precision}
    best = best_threshold(truth, scores)
    figures |= flagging(truth, scores, limit)
    figures |= {"best_f1": flagging(truth, scores, best)["f1"], "best_f1_threshold": best}
    known = truth[truth >= 0]
    if len(known) < len(truth):
        remarks.append(
            f"{len(truth) - len(known):,} images lie in neither kind of folder and do not count in these figures"
        )
    title = f"{int(known.sum()):,} anomalous and {int((1 - known).sum()):,} normal images"

    def draw(path: Path) -> None:
        from dist_ae.figures import roc

        curves = {}
        for label, result in separations.items():
            text = f"{label}: AUROC {result.auroc:.3f}, AP {result.average_precision:.3f}"
            curves[text] = (result.false_positives, result.true_positives)
        roc(curves, path, title)

    return figures, write_whole(with_ending(out, ROC), draw), remarks


def judge_maps(view: View, truth: Array | None, kind: Kind, masks: Path) -> tuple[dict[str, float], list[str]]:
    """Pixel AUROC and AUPRO of the heat maps against a folder of masks, and remarks on them."""
    names = view.records.names
    if names is None:
        return {}, ["no figures of pixels: masks are found by the names of pictures, and these have none"]
    mask_paths = masks_by_name(masks, names)
    if not mask_paths:
        return {}, [f"no figures of pixels: {shown(masks)} holds no mask of these pictures"]
    truth = np.full(len(names), -1) if truth is None else truth
    maps = ((difference.place, difference.values.numpy()) for difference in view.maps(kind))
    return localized(maps, names, truth, mask_paths, view.masks, view.size)


def write_verdict(scored: Scored, out: Path) -> Path:
    """Writes the threshold, its origin, and the figures as JSON next to the scores."""
    low, high = scored.interval or (None, None)
    content = {
        "score": scored.score, "threshold": scored.threshold, "basis": scored.basis,
        "interval": None if scored.interval is None else {"low": low, "high": high, "confidence": CONFIDENCE},
        "images": len(scored.scores), "flagged": int(scored.flagged.sum()),
        "figures": scored.figures, "remarks": scored.remarks,
    }  # fmt: skip
    return write_whole(with_ending(out, VERDICT), lambda path: path.write_bytes(to_json(content)))


def write_maps(view: View, scores: Tensor, name: str, limit: float, folder: Path, kind: Kind, reads: Reads) -> Path:
    """Writes a picture of every image with its heat map, all on the same scale, each as soon as it is drawn."""
    from dist_ae.figures import HeatMaps

    label, upper = "squared error" if kind == "error" else "1 - SSIM", scale_of(view, kind)
    panels: dict[torch.Size, HeatMaps] = {}
    targets = [folder / name for name in file_names(view.records)]
    refuse_targets(folder, targets, reads, "--maps")
    for place, image, reconstruction, values in view.maps(kind):
        if values.shape not in panels:
            height, width = values.shape
            panels = {values.shape: HeatMaps(height, width, upper, label, view.largest)}
        value = float(scores[place])
        note = f"{name} {value:.3g}, threshold {limit:.3g}{', flagged' if value > limit else ''}"
        picture = panels[values.shape].picture(image, reconstruction, values, note, value > limit)
        write_whole(targets[place], picture.save)  # one by one, so that finished pictures stay if this is stopped
    return folder
