"""A user's own records in a .npy or .npz file, and data sets of arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_ae.config import DataConfig, InputError
from dist_ae.data.layout import SHAPES, Layout, laid_out
from dist_ae.data.pictures import expand, not_there, shown
from dist_ae.data.records import CHUNK_BYTES, Array, Dataset, Split, fingerprint, folded, shuffled
from dist_ae.data.scaling import resolved, scaling_of

SAMPLED_BYTES = 4 * 2**30  # the fingerprint of a larger .npy is taken from a sample
READ_BYTES = 2**20  # a smaller .npy is read at once
NOISY_RANGE = (-2.0, 3.0)  # the range of noisy images on [0, 1]; values outside were never scaled


def read_array(path: Path) -> Array:
    """A user's records for a trained model, from a .npy or .npz, in any layout; a large .npy is memory-mapped.

    From a .npz it takes ``images``, else ``val``, else the only array.

    Raises:
        InputError: naming a file that is missing, not readable, or has several arrays.
    """
    path = expand(path)
    arrays = _arrays(path)
    key = next((name for name in ("images", "val") if name in arrays), next(iter(arrays), None))
    if key is None or (len(arrays) > 1 and key not in ("images", "val")):
        raise InputError(f"{shown(path)}: expected one array, or 'images', or 'val'; found {_names(arrays)}")
    return arrays[key]


def _names(arrays: dict[str, Array]) -> str:
    return ", ".join(arrays) or "nothing"


def _arrays(path: Path) -> dict[str, Array]:
    """The named arrays of a .npz, or the array of a .npy as ``images``."""
    if not os.path.isfile(path):  # unlike Path.is_file, it never raises, whatever the path
        raise InputError(f"{shown(path)}: {not_there(path)}; expected a .npy or .npz of {SHAPES}")
    try:
        mapped = path.suffix == ".npy" and path.stat().st_size > READ_BYTES
        loaded = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        arrays = dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else {"images": loaded}
    except Exception as error:  # OSError, ValueError, zipfile.BadZipFile and others, for a damaged archive
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise InputError(
                f"{shown(path)}: holds objects, not one array of numbers; images of different shapes? "
                "Bring them to the same shape first"
            ) from None
        # numpy takes a file of another format for a pickle, and advises loading it unsafely.
        reason = "it is in neither format" if "pickle" in str(error) else error
        raise InputError(f"{shown(path)}: not a readable .npy or .npz file ({reason})") from None
    other = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if other:
        raise InputError(f"{shown(path)}: holds what is no array: {other[0]!a}")
    return arrays


def array_dataset(path: Path, config: DataConfig) -> Dataset:
    """The records of a file, with the file's own split if it has one, else split by ``val_fraction``.

    Nothing is copied: ``Reader`` decides whether images are held in memory.
    """
    arrays = _arrays(path)
    name = f"array:{path.name}"
    sampled = path.suffix == ".npy" and path.stat().st_size > SAMPLED_BYTES
    if "train" in arrays and "val" in arrays:
        pair = ((arrays["train"], None), (arrays["val"], None))
        return handed_dataset(name, pair, config, shown(path))
    key = "images" if "images" in arrays else next(iter(arrays), None)
    if key is None or (len(arrays) > 1 and key != "images"):
        raise InputError(
            f"{shown(path)}: expected one array, or 'images', or 'train' and 'val'; found {_names(arrays)}"
        )
    labels = None
    if "labels" in arrays:
        labels = _check_labels(arrays["labels"], f"{shown(path)}[labels]", len(arrays[key]))
    return handed_dataset(name, ((arrays[key], labels),), config, shown(path), sampled=sampled)


def handed_dataset(
    name: str,
    parts: Sequence[tuple[Array, Array | None]],
    config: DataConfig,
    where: str,
    *,
    sampled: bool = False,
    columns: Sequence[str] = (),
    classes: Sequence[str] = (),
    digest: str | None = None,
    known: tuple[float, float] | None = None,
) -> Dataset:
    """A data set of arrays in any layout and of any scale.

    Args:
        parts: (records, labels) of training and validation, or of one part, a share of which is held out.
        where: the source in words, for messages.
        sampled: compute the fingerprint from a sample.
        columns: names of the columns.
        digest: identifies the content, if that is already known.
        known: the smallest and the largest value, if they are known: then no pass over the records looks for them and
            for values that are not finite.

    Raises:
        InputError: a layout, type or value is not supported; says which and where.
    """
    places = [where] if len(parts) == 1 else [f"{where} ({side})" for side in ("train", "val")]
    laid = [
        laid_out(typed(array, config.layout, place), config.layout, place)
        for (array, _), place in zip(parts, places, strict=True)
    ]
    if len(laid) == 2 and (laid[0].records.shape[1:], laid[0].shape) != (laid[1].records.shape[1:], laid[1].shape):
        first, second = (list(array.shape[1:]) for array, _ in parts)
        raise InputError(
            f"{where}: training records of shape {first} and validation records of {second} differ in shape"
        )
    shape = laid[0].shape
    ranges = [
        known or value_range(part.records, place, config.missing == "mask", shape, columns)
        for part, place in zip(laid, places, strict=True)
    ]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    scale = resolved(config.scale, config.missing, laid[0].records.dtype, low, high, where)
    records = [_as_stored(part.records) for part in laid]
    test = None
    if config.fold is not None and config.folds is not None:
        if len(parts) == 2:
            raise InputError(f"{where}: has a split of its own, and data.folds makes others; leave it out")
        spots = np.empty(len(records[0]))
        spots[shuffled(len(spots))] = (np.arange(len(spots)) + 0.5) / len(spots)
        train, val, test = (
            Split(records[0], None if parts[0][1] is None else parts[0][1][rows], rows)
            for rows in folded(spots, config.folds, config.fold, config.val_fraction, where)
        )
    elif len(parts) == 2:
        train, val = (Split(array, labels) for array, (_, labels) in zip(records, parts, strict=True))
    else:
        train, val = split_images(records[0], parts[0][1], config.val_fraction, where)
    content = f"{digest} {config.val_fraction!r}" if digest is not None else fingerprint(train, val, sampled=sampled)
    content += "" if test is None else f" {config.fold}/{config.folds}"
    from dist_ae.data.crops import cropped  # which needs torch

    dataset = cropped(
        Dataset(name, train, val, content, classes=tuple(classes), shape=shape, columns=tuple(columns), test=test),
        config,
    )
    scaling = scaling_of(dataset.train, scale, config.missing == "mask")
    return dataset.with_scaling(scaling, "none" if scaling is None else scale)


def _as_stored(records: Array) -> Array:
    """Converts floats in memory to float32; a mapped array stays as it is."""
    if isinstance(records, np.memmap) or records.dtype.kind != "f":
        return records
    return records.astype(np.float32, copy=False)


def typed(records: Array, layout: Layout, where: str) -> Array:
    """Records as uint8, uint16 or floats; whole numbers of other types become float32 unless they are images.

    Raises:
        InputError: another type.
    """
    if records.dtype in (np.uint8, np.uint16) or records.dtype.kind == "f":
        return records
    if records.dtype.kind in "biu" and (records.ndim == 2 or layout in ("table", "signals", "volumes")):
        return records.astype(np.float32)
    raise InputError(f"{where}: expected uint8, uint16 or floats, got {records.dtype}")


def value_range(
    records: Array, where: str, missing: bool, shape: Sequence[int] | None, columns: Sequence[str]
) -> tuple[float, float]:
    """The smallest and the largest value of records [N, C, H, W].

    Raises:
        InputError: a value is infinite, or NaN unless entries may be ``missing``; names its place.
    """
    if records.dtype.kind != "f":
        return 0.0, 1.0
    low, high, any_present = np.inf, -np.inf, False
    size = max(1, CHUNK_BYTES // (records.nbytes // len(records)))
    for start in range(0, len(records), size):
        part = np.asarray(records[start : start + size])
        bad = np.isinf(part) if missing else ~np.isfinite(part)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            place = _place(start + first[0], first[1:], shape, columns)
            way_out = ""
            if np.isnan(part[first]):
                way_out = "; data.missing mask leaves missing entries out of the loss and fills them in"
            raise InputError(f"{where}: value {part[first]} at {place}; numbers must be finite{way_out}")
        present = part[np.isfinite(part)] if missing else part
        if present.size:
            low, high, any_present = min(low, float(present.min())), max(high, float(present.max())), True
    if not any_present:
        raise InputError(f"{where}: every entry is missing")
    return low, high


def _place(row: int, index: Sequence[int], shape: Sequence[int] | None, columns: Sequence[str]) -> str:
    """The place of a value, in the terms of its source."""
    if shape is not None and len(shape) == 1:
        column = f"column {columns[index[0]]!r}" if columns else f"column {index[0]}"
        return f"row {row + 1 if columns else row}, {column}"
    return f"{'image' if shape is None else 'record'} {row}, index {tuple(index)}"


def split_images(images: Array, labels: Array | None, val_fraction: float, where: str) -> tuple[Split, Split]:
    """Training and validation images as rows of one array: a share is held out.

    The split does not depend on the seed of the run, so that all runs are evaluated on the same images.
    """
    num_val = min(max(1, round(len(images) * val_fraction)), len(images) - 1)
    if num_val < 1:
        raise InputError(
            f"{where}: {len(images)} image cannot be split into training and validation; at least 2 are needed"
        )
    order = shuffled(len(images))
    train, val = (
        Split(images, None if labels is None else labels[rows], rows)
        for rows in (np.sort(order[num_val:]), np.sort(order[:num_val]))
    )
    return train, val


def _check_labels(labels: Array, where: str, count: int) -> Array:
    """Labels [count] as int64; whole numbers of any type are accepted."""
    if labels.shape != (count,):
        raise InputError(f"{where}: expected one label per image, shape ({count},), got {labels.shape}")
    if labels.dtype.kind not in "biuf":
        raise InputError(f"{where}: expected whole numbers, got {labels.dtype}")
    with np.errstate(invalid="ignore"):
        whole = np.isfinite(labels) & (labels == np.trunc(labels)) if labels.dtype.kind == "f" else np.ones(count, bool)
        whole &= (labels >= -(2.0**62)) & (labels <= 2.0**62)
    if not whole.all():
        first = int(np.argmin(whole))
        raise InputError(f"{where}: expected whole numbers of at most 62 bits, got {labels[first]} at image {first}")
    return labels.astype(np.int64)


def as_array(images: Any) -> Array:
    """A numpy array from an array or tensor, also one on a device, or of bfloat16, which numpy lacks."""
    torch: Any = sys.modules.get("torch")  # if it was never loaded, there are no tensors
    if torch is not None and isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    return np.asarray(images)
