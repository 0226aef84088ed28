"""A user's own images in a .npy or .npz file."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import torch

from dist_ae.config import InputError
from dist_ae.data.records import Array, Dataset, Split, fingerprint

IN_MEMORY_BYTES = 4 * 2**30  # an array file larger than this stays on disk, memory-mapped
CHUNK = 4096  # images looked at together when values are checked
NOISY_RANGE = (-2.0, 3.0)  # noise takes images on [0, 1] no further; what is outside was not scaled


def read_images(path: Path) -> Array:
    """A user's images for a trained model: those of a .npy; of a .npz its ``images``, else its ``val``, else its only array.

    Layouts and types as for ``array:PATH``, but floats may leave [0, 1] as far as noise takes them. Returns [N, C, H, W], uint8 or float32.

    Raises:
        InputError: naming the file: not there or not readable, several arrays, another layout or type, the first value out of range.
    """
    path = path.expanduser()
    arrays = _arrays(path)
    key = next((name for name in ("images", "val") if name in arrays), next(iter(arrays), None))
    if key is None or (len(arrays) > 1 and key not in ("images", "val")):
        raise InputError(f"{path}: expected one array, or 'images', or 'val'; found {', '.join(arrays) or 'nothing'}")
    return check_images(arrays[key], str(path), *NOISY_RANGE)


def _arrays(path: Path) -> dict[str, Array]:
    """The named arrays of a .npz, or that of a .npy as ``images``."""
    if not os.path.isfile(path):  # unlike Path.is_file it raises nothing, whatever the path
        raise InputError(
            f"{path}: no such file; expected a .npy or .npz of images [N, H, W], [N, C, H, W] or [N, H, W, C]"
        )
    try:
        loaded = np.load(
            path,
            mmap_mode="r" if path.suffix == ".npy" and path.stat().st_size > IN_MEMORY_BYTES else None,
            allow_pickle=False,
        )
        return dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else {"images": loaded}
    except (OSError, ValueError, EOFError, zlib.error, KeyError) as error:
        if "Object arrays" in str(error):
            raise InputError(
                f"{path}: holds objects, not one array of numbers; images of differing shapes? Bring them to one shape first"
            ) from None
        # What is neither format numpy takes for a pickle, and its advice is to load it unsafely.
        reason = "it is in neither format" if "pickle" in str(error) else error
        raise InputError(f"{path}: not a readable .npy or .npz file ({reason})") from None
    except Exception as error:  # zipfile.BadZipFile and what else a damaged archive raises
        raise InputError(f"{path}: not a readable .npy or .npz file ({error})") from None


def array_dataset(path: Path, val_fraction: float) -> Dataset:
    arrays = _arrays(path)
    name = f"array:{path.name}"
    if "train" in arrays and "val" in arrays:
        train, val = (Split(check_images(arrays[key], f"{path}[{key}]")) for key in ("train", "val"))
        if train.images.shape[1:] != val.images.shape[1:]:
            raise InputError(
                f"{path}: train images {train.images.shape[1:]} and val images {val.images.shape[1:]} have differing shapes"
            )
        return Dataset(name, train, val, fingerprint(train, val))
    key = "images" if "images" in arrays else next(iter(arrays), None)
    if key is None or (len(arrays) > 1 and key != "images"):
        raise InputError(
            f"{path}: expected one array, or 'images', or 'train' and 'val'; found {', '.join(arrays) or 'nothing'}"
        )
    images = check_images(arrays[key], str(path))
    labels = arrays.get("labels")
    if labels is not None and labels.shape != (len(images),):
        raise InputError(f"{path}[labels]: expected one label per image, shape ({len(images)},), got {labels.shape}")
    train, val = split_images(images, labels, val_fraction, str(path))
    return Dataset(name, train, val, fingerprint(train, val))


def split_images(images: Array, labels: Array | None, val_fraction: float, where: str) -> tuple[Split, Split]:
    """Training and validation images: a share is held out, the same whatever the seed of the run, so that figures of different
    runs are about the same images."""
    num_val = min(max(1, round(len(images) * val_fraction)), len(images) - 1)
    if num_val < 1:
        raise InputError(
            f"{where}: {len(images)} image cannot be split into training and validation; at least 2 are needed"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    train, val = (_pick(images, labels, np.sort(rows)) for rows in (order[num_val:], order[:num_val]))
    return train, val


def _pick(images: Array, labels: Array | None, rows: Array) -> Split:
    labels = None if labels is None else labels[rows].astype(np.int64)
    return Split(images, labels, rows) if isinstance(images, np.memmap) else Split(images[rows], labels)


def check_images(images: Array, where: str, low: float = 0.0, high: float = 1.0) -> Array:
    """Images as [N, C, H, W], uint8 or float32 on [0, 1], every value looked at: a float outside [low, high] is refused."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(
            f"{where}: expected images [N, H, W], [N, C, H, W] or [N, H, W, C] with at least one, got shape {images.shape}"
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{where}: expected uint8, or floats on [0, 1], got {images.dtype}")
    if images.dtype != np.uint8:
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            bad = ~((part >= low) & (part <= high))  # a NaN fails both comparisons
            if bad.any():
                first = tuple(int(i) for i in np.argwhere(bad)[0])
                raise InputError(
                    f"{where}: value {part[first]} at image {start + first[0]}, index {first[1:]}; expected floats on [0, 1] (divide by 255?)"
                )
        if not isinstance(images, np.memmap):
            images = images.astype(np.float32)
    return images if isinstance(images, np.memmap) else np.ascontiguousarray(images)
