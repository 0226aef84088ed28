"""Evaluates heat maps against masks of defects: pixel AUROC and AUPRO, as for MVTec AD."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dist_ae.config import DataConfig, InputError
from dist_ae.data.form import decode, reason
from dist_ae.data.names import with_prefix
from dist_ae.data.pictures import EXTENSIONS, expand, form_of, shown
from dist_ae.data.records import Array

MOST_FALSE_POSITIVES = 0.3  # share of the normal pixels up to which AUPRO integrates
SHIFT = 12  # bits of a float32 that are dropped: a score keeps 11 binary digits, that is 0.05 %
BINS = 2 ** (31 - SHIFT)
MASKS, SCORED = "ground_truth", "test"  # MVTec AD's folders


def masks_folder(images: str | os.PathLike[str] | None, given: Path | None) -> Path | None:
    """The folder of masks: the given one, or MVTec AD's ``ground_truth`` next to a folder ``test``.

    Raises:
        InputError: the given path is no folder, or there are no images to find masks for.
    """
    name = "" if images is None else with_prefix(os.fspath(images))
    root = expand(name.removeprefix("folder:")) if name.startswith("folder:") else None
    if given is not None:
        folder = expand(given)
        if root is None:
            raise InputError("--masks: masks are found by the names of pictures; name a folder with --images")
        if not folder.is_dir():
            raise InputError(f"--masks {shown(folder)}: {'not a folder' if folder.exists() else 'no such folder'}")
        return folder
    if root is None or root.name != SCORED or not (root.parent / MASKS).is_dir():
        return None
    return root.parent / MASKS


def masks_by_name(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The mask of each picture that has one: for broken/000.png, broken/000_mask.png or broken/000.png."""
    by_stem: dict[Path, Path] = {}
    for parent in {Path(name).parent for name in names}:
        if (folder / parent).is_dir():
            for path in sorted((folder / parent).iterdir()):
                if path.suffix.lower().lstrip(".") in EXTENSIONS:
                    by_stem.setdefault(parent / path.stem, path)
    masks = {}
    for name in names:
        stem = Path(name).with_suffix("")
        mask = by_stem.get(stem.with_name(f"{stem.name}_mask")) or by_stem.get(stem)
        if mask is not None:
            masks[name] = mask
    return masks


def read_mask(path: Path, config: DataConfig, size: tuple[int, int]) -> Array:
    """The white pixels of a mask, bool [H, W], at the model's size and with the fit of its pictures.

    Raises:
        InputError: it cannot be read.
    """
    black = config.model_copy(update={"background": "black", "pages": "first", "bits": "8"})
    try:
        return np.asarray(decode(os.fspath(path), form_of(black, "grey", size))[0] > 127)
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        raise InputError(f"{shown(path)}: cannot be read as a mask ({reason(error)})") from None


class Localization:
    """Accumulates maps and masks, one picture after the other, in memory that does not depend on their number.

    AUPRO is the area under the per-region overlap over the false positive rate, up to 30 % false positives and divided
    by these (Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021). A region is a connected part of a mask
    (corners connect), and all regions count the same, whatever their size. So AUPRO is a partial area under a ROC curve
    in which a pixel of a region of n pixels weighs 1 / n.
    """

    def __init__(self) -> None:
        self.normal_pixels, self.defect_pixels, self.overlap = (np.zeros(BINS) for _ in range(3))
        self.regions = 0

    def add(self, values: Array, mask: Array) -> None:
        """Adds a map [H, W], larger where a picture is odder, and the mask of its defects, bool [H, W]."""
        from scipy.ndimage import label

        bins = np.maximum(values.astype(np.float32), 0).view(np.uint32) >> SHIFT  # in the order of the values
        self.normal_pixels += np.bincount(bins[~mask], minlength=BINS)
        regions, count = label(mask, np.ones((3, 3)))
        self.regions += count
        if count:
            self.defect_pixels += np.bincount(bins[mask], minlength=BINS)
            weights = 1 / np.bincount(regions[mask])[regions[mask]]
            self.overlap += np.bincount(bins[mask], weights, minlength=BINS)

    def figures(self) -> dict[str, float]:
        """``pixel_auroc`` and ``aupro``; empty unless there are both kinds of pixels."""
        from sklearn.metrics import auc, roc_auc_score, roc_curve

        if not self.regions or not self.normal_pixels.any():
            return {}
        used = np.flatnonzero(self.normal_pixels + self.defect_pixels)
        scores, truth = np.concatenate([used, used]), np.repeat([0, 1], len(used))
        normal = self.normal_pixels[used]
        pixels = np.concatenate([normal, self.defect_pixels[used]])
        overlap = np.concatenate([normal, self.overlap[used]])
        auroc = float(roc_auc_score(truth, scores, sample_weight=pixels))
        false, true, _ = roc_curve(truth, scores, sample_weight=overlap, drop_intermediate=False)
        inside = false <= MOST_FALSE_POSITIVES
        rates, overlaps = false[inside], true[inside]
        if rates[-1] < MOST_FALSE_POSITIVES:
            rates = np.append(rates, MOST_FALSE_POSITIVES)
            overlaps = np.append(overlaps, np.interp(MOST_FALSE_POSITIVES, false, true))
        return {"pixel_auroc": auroc, "aupro": float(auc(rates, overlaps)) / MOST_FALSE_POSITIVES}


def localized(
    maps: Iterable[tuple[int, Array]],
    names: Sequence[str],
    truth: Array,
    masks: dict[str, Path],
    config: DataConfig,
    size: str,
) -> tuple[dict[str, float], list[str]]:
    """Pixel AUROC and AUPRO of maps [H, W], each with the place of its picture, and remarks on them.

    A picture without a mask has no defect if its folder says that it is normal; else it is left out.

    Args:
        truth: [N]: 1 for anomalous pictures, 0 for normal ones, -1 for unknown ones.
        config: how masks are brought to the size of the maps.
        size: that size in words.
    """
    sums, left_out, lost = Localization(), 0, 0
    for place, values in maps:
        path = masks.get(names[place])
        if path is None and truth[place] != 0:
            left_out += 1
            continue
        mask = np.zeros(values.shape, bool) if path is None else read_mask(path, config, values.shape)
        lost += path is not None and not mask.any()
        sums.add(values, mask)
    figures, remarks = sums.figures(), []
    if left_out:
        remarks.append(f"{left_out:,} anomalous pictures have no mask and do not count in the figures of pixels")
    if lost:
        remarks.append(f"{lost:,} masks are empty at {size}")
    if figures:
        remarks.append(f"figures of pixels: {sums.regions:,} regions in {len(masks):,} masks, at {size}")
    else:
        remarks.append("no figures of pixels: the masks mark none, or all of them")
    return figures, remarks
