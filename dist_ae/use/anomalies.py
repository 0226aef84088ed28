"""What `dist-ae score` makes of scores: which images are known to be anomalous, how well that is told, heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_ae import pca
from dist_ae.config import InputError
from dist_ae.data.given import Given, blocks, floats
from dist_ae.data.reader import Reader
from dist_ae.data.records import Array, Dataset
from dist_ae.processes.runtime import Alone
from dist_ae.quality import structural_similarity
from dist_ae.use.trained import TrainedModel

NORMAL, ANOMALOUS = "normal", "anomalous"
MVTEC_NORMAL = "good"  # as MVTec AD names its folder of pictures without a defect
SATURATED = 0.01  # share of images whose map may go beyond the one scale of all maps


class Separation(NamedTuple):
    """How well scores tell anomalous images from normal ones."""

    auroc: float
    average_precision: float
    false_positives: Array  # of the ROC, rates on [0, 1]
    true_positives: Array


def truth_of(names: Sequence[str] | None, what: str) -> Array | None:
    """Which images are anomalous by the folders they lie in: 1, 0, or -1 for neither; None where no folder says it.

    ``normal/`` and ``anomalous/``, or MVTec AD's ``good/`` beside one folder a defect (``test`` of a category).

    Raises:
        InputError: only one of the two; or MVTec's whole category, whose masks are pictures, too.
    """
    if names is None:
        return None
    folders = [Path(name).parts[:-1] for name in names]
    seen = {part for parts in folders for part in parts}
    if "ground_truth" in seen and MVTEC_NORMAL in seen:
        raise InputError(
            f"{what}: holds MVTec's ground_truth, whose masks are no pictures of the object; score its folder test/"
        )
    if seen & {NORMAL, ANOMALOUS}:
        truth = np.array([1 if ANOMALOUS in parts else 0 if NORMAL in parts else -1 for parts in folders])
    elif MVTEC_NORMAL in seen:
        truth = np.array([-1 if not parts else 0 if MVTEC_NORMAL in parts else 1 for parts in folders])
    else:
        return None
    for value, has, lacks in ((1, "normal", "anomalous"), (0, "anomalous", "normal")):
        if not (truth == value).any():
            raise InputError(
                f"{what}: its folders name {has} pictures and no {lacks} ones, so there is nothing to tell apart; "
                f"give both ({NORMAL}/ and {ANOMALOUS}/, or {MVTEC_NORMAL}/ and a folder a defect), or one inner folder"
            )
    return truth


def separation(truth: Array, scores: Tensor) -> Separation:
    """Area under the ROC curve, average precision and the curve itself, of the images of known truth."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    known = truth >= 0
    labels, values = truth[known], scores.double().numpy()[known]
    false_positives, true_positives, _ = roc_curve(labels, values)
    return Separation(
        float(roc_auc_score(labels, values)),
        float(average_precision_score(labels, values)),
        false_positives,
        true_positives,
    )


def pca_scores(trained: TrainedModel, dataset: Dataset, one: Given) -> Tensor | None:
    """The squared error per pixel of PCA (or PCA of patches) of the training images with as many numbers as the code.

    None for a model that has no linear counterpart.
    """
    code = trained.model.linear_code()
    if code is None:
        return None
    alone = Alone(torch.device("cpu"))
    components = pca.of_model(trained.model, Reader(dataset.train, alone.device), alone)
    assert components is not None
    return torch.cat([pca.errors(components, code.patch, floats(one, rows)) for rows in blocks(len(one.split))])


def error_maps(images: Tensor, reconstructions: Tensor, kind: str) -> Tensor:
    """Where images and reconstructions [B, C, H, W] differ, [B, H, W].

    ``error``: squared error, mean over channels, smoothed by a Gaussian of 1/32 of the shorter side, at least one
    pixel. ``ssim``: 1 - structural similarity, [0, 2], in windows of 11 × 11.
    """
    if kind == "ssim":
        return 1 - structural_similarity(images, reconstructions)[1].mean(1)
    from torchvision.transforms.v2 import functional

    squared = (images - reconstructions).square().mean(1, keepdim=True)
    sigma = max(1.0, min(images.shape[-2:]) / 32)
    # A window of three σ to each side, where the image is as large as that.
    widths = [2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in images.shape[-2:]]
    blurred: Tensor = functional.gaussian_blur(squared, [widths[1], widths[0]], [sigma, sigma])
    return blurred[:, 0]


def maps_of(trained: TrainedModel, one: Given, kind: str) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Place, image, reconstruction [C, H, W] and map [H, W] of every image."""
    for rows in blocks(len(one.split)):
        images = floats(one, rows)
        reconstructions = trained.reconstruct(images)
        maps = error_maps(images, reconstructions, kind)
        yield from zip(rows, images, reconstructions, maps, strict=True)


def scale_of(trained: TrainedModel, one: Given, kind: str) -> float:
    """The upper end of the one scale of all maps: what the largest value of a map exceeds in one image of a hundred."""
    largest = [float(values.max()) for _, _, _, values in maps_of(trained, one, kind)]
    return max(float(np.quantile(largest, 1 - SATURATED, method="inverted_cdf")), 1e-6)
