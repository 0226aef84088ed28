"""A user's own images in a .npy or .npz file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_ae.config import InputError
from dist_ae.data.pictures import expand, not_there, shown
from dist_ae.data.records import CHUNK_BYTES, Array, Dataset, Split, fingerprint

SAMPLED_BYTES = 4 * 2**30  # the fingerprint of a larger .npy is taken from a sample
READ_BYTES = 2**20  # a smaller .npy is read at once
NOISY_RANGE = (-2.0, 3.0)  # noise takes images on [0, 1] no further; values outside were never scaled


def read_images(path: Path) -> Array:
    """A user's images for a trained model, from a .npy or .npz: [N, C, H, W], uint8 or floats.

    Of a .npz it takes ``images``, else ``val``, else the only array. Layouts and types are those of ``array:PATH``, but
    floats may leave [0, 1] as far as noise takes them. The images are memory-mapped where the file is.

    Raises:
        InputError: naming the file: not there or not readable, several arrays, another layout or type, or the first
            value out of range.
    """
    path = expand(path)
    arrays = _arrays(path)
    key = next((name for name in ("images", "val") if name in arrays), next(iter(arrays), None))
    if key is None or (len(arrays) > 1 and key not in ("images", "val")):
        raise InputError(f"{shown(path)}: expected one array, or 'images', or 'val'; found {_names(arrays)}")
    return check_images(arrays[key], shown(path), *NOISY_RANGE)


def _names(arrays: dict[str, Array]) -> str:
    return ", ".join(arrays) or "nothing"


def _arrays(path: Path) -> dict[str, Array]:
    """The named arrays of a .npz, or that of a .npy as ``images``."""
    if not os.path.isfile(path):  # unlike Path.is_file, it never raises, whatever the path
        raise InputError(
            f"{shown(path)}: {not_there(path)}; expected a .npy or .npz of images [N, H, W], [N, C, H, W] or "
            "[N, H, W, C]"
        )
    try:
        mapped = path.suffix == ".npy" and path.stat().st_size > READ_BYTES
        loaded = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        arrays = dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else {"images": loaded}
    except Exception as error:  # OSError, ValueError, zipfile.BadZipFile and what else a damaged archive raises
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise InputError(
                f"{shown(path)}: holds objects, not one array of numbers; images of differing shapes? "
                "Bring them to one shape first"
            ) from None
        # numpy takes a file of neither format for a pickle, and advises loading it unsafely.
        reason = "it is in neither format" if "pickle" in str(error) else error
        raise InputError(f"{shown(path)}: not a readable .npy or .npz file ({reason})") from None
    other = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if other:
        raise InputError(f"{shown(path)}: holds what is no array: {other[0]!a}")
    return arrays


def array_dataset(path: Path, val_fraction: float) -> Dataset:
    """The images of a file, split as the file says, else by ``val_fraction``.

    Nothing is copied: ``Reader`` decides what is held in memory.
    """
    arrays = _arrays(path)
    name = f"array:{path.name}"
    sampled = path.suffix == ".npy" and path.stat().st_size > SAMPLED_BYTES
    if "train" in arrays and "val" in arrays:
        train, val = (Split(check_images(arrays[key], f"{shown(path)}[{key}]")) for key in ("train", "val"))
        if train.images.shape[1:] != val.images.shape[1:]:
            raise InputError(
                f"{shown(path)}: train images {train.images.shape[1:]} and "
                f"val images {val.images.shape[1:]} have differing shapes"
            )
        return Dataset(name, train, val, fingerprint(train, val))
    key = "images" if "images" in arrays else next(iter(arrays), None)
    if key is None or (len(arrays) > 1 and key != "images"):
        raise InputError(
            f"{shown(path)}: expected one array, or 'images', or 'train' and 'val'; found {_names(arrays)}"
        )
    images = check_images(arrays[key], shown(path))
    labels = _check_labels(arrays["labels"], f"{shown(path)}[labels]", len(images)) if "labels" in arrays else None
    train, val = split_images(images, labels, val_fraction, shown(path))
    return Dataset(name, train, val, fingerprint(train, val, sampled=sampled))


def split_images(images: Array, labels: Array | None, val_fraction: float, where: str) -> tuple[Split, Split]:
    """Training and validation images as rows of one array: a share is held out.

    The split is the same whatever the seed of the run, so that figures of different runs are about the same images.
    """
    num_val = min(max(1, round(len(images) * val_fraction)), len(images) - 1)
    if num_val < 1:
        raise InputError(
            f"{where}: {len(images)} image cannot be split into training and validation; at least 2 are needed"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
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
    """What a person handed over, as numpy has it: a tensor of any device, and of bfloat16, which numpy has not."""
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    return np.asarray(images)


def check_images(images: Array, where: str, low: float = 0.0, high: float = 1.0) -> Array:
    """Images as [N, C, H, W], uint8 or floats on [0, 1]; every value is checked to lie on [low, high].

    A memory-mapped array stays one, in its own layout and type. Other floats become float32.
    """
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(
            f"{where}: expected images [N, H, W], [N, C, H, W] or [N, H, W, C] with at least one, "
            f"got shape {images.shape}"
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{where}: expected uint8, or floats on [0, 1], got {images.dtype}")
    size = max(1, CHUNK_BYTES // (images.nbytes // len(images)))
    for start in range(0, len(images), size):
        part = np.asarray(images[start : start + size])
        bad = ~((part >= low) & (part <= high))  # a NaN fails both comparisons
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{where}: value {part[first]} at image {start + first[0]}, index {first[1:]}; "
                "expected floats on [0, 1] (divide by 255?)"
            )
    return images if isinstance(images, np.memmap) else images.astype(np.float32, copy=False)
