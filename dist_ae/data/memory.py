"""Images handed over from Python: arrays, tensors and torch data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_ae.config import InputError
from dist_ae.data.arrays import as_array, check_images, split_images
from dist_ae.data.records import Array, Dataset, Split, fingerprint

Images = Array | Tensor | torch.utils.data.Dataset[Any]
Handed = Images | tuple[Images, Images]
NAME = "memory"  # what config.data.name says of such a run
KINDS = (
    "a numpy array or torch tensor of images [N, H, W], [N, C, H, W] or [N, H, W, C], uint8 or floats on [0, 1]; a "
    "torch Dataset of such images; or a pair (train, val) of these"
)


def memory_dataset(data: Handed, val_fraction: float) -> Dataset:
    """A data set of images in memory; without a validation part, a fixed share of it is held out.

    Raises:
        InputError: not images, or values out of range; names what was given.
    """
    if isinstance(data, tuple):
        if len(data) != 2:
            raise InputError(f"data: a tuple is a pair (training images, validation images), got {len(data)} parts")
        numbers = isinstance(data[1], list) and all(isinstance(value, int | float) for value in data[1])
        if numbers or getattr(data[1], "ndim", None) == 1:
            raise InputError(
                "data: a pair is (training images, validation images), and its second part has one dimension, as "
                "labels have; leave labels out, or give a torch Dataset of (image, label)"
            )
        train, val = (
            Split(check_images(images, f"data ({part})"), labels)
            for part, (images, labels) in zip(("train", "val"), map(_array, data), strict=True)
        )
        if train.images.shape[1:] != val.images.shape[1:]:
            raise InputError(
                f"data: training images {train.images.shape[1:]} and "
                f"validation images {val.images.shape[1:]} differ in shape"
            )
        return Dataset(NAME, train, val, fingerprint(train, val))
    images, labels = _array(data)
    train, val = split_images(check_images(images, "data"), labels, val_fraction, "data")
    return Dataset(NAME, train, val, fingerprint(train, val))


def _array(data: Any) -> tuple[Array, Array | None]:
    """Images and, where there are any, their labels."""
    if isinstance(data, np.ndarray | Tensor):
        return as_array(data), None
    if isinstance(data, torch.utils.data.Dataset) and hasattr(data, "__len__"):
        items = [data[i] for i in range(len(data))]
        if items and not isinstance(items[0], np.ndarray | Tensor | tuple | list | Image.Image):
            raise InputError(
                f"data: this torch Dataset gives items of type {type(items[0]).__name__}; expected an image or a pair "
                "(image, label)"
            )
        labelled = bool(items) and isinstance(items[0], tuple | list) and len(items[0]) > 0
        pictures = [as_array(item[0] if labelled else item) for item in items]
        if len({p.shape for p in pictures}) > 1:
            raise InputError("data: the images of this torch Dataset differ in shape; bring them to one shape first")
        found = np.array([item[1] for item in items]) if labelled and len(items[0]) > 1 else None
        labels = found if found is not None and found.ndim == 1 and np.issubdtype(found.dtype, np.integer) else None
        return np.stack(pictures) if pictures else np.empty((0, 1, 1)), labels
    stack = "; np.stack makes an array of a list" if isinstance(data, list) else ""
    raise InputError(f"data: expected {KINDS}; got {type(data).__name__}{stack}")
