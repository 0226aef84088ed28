"""Images passed from Python: arrays, tensors and torch data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_ae.config import DataConfig, InputError
from dist_ae.data.arrays import as_array, handed_dataset
from dist_ae.data.layout import SHAPES
from dist_ae.data.records import Array, Dataset

Images = Array | Tensor | torch.utils.data.Dataset[Any]
Handed = Images | tuple[Images, Images]
NAME = "memory"  # config.data.name of such a run
KINDS = f"a numpy array or torch tensor, {SHAPES}; a torch Dataset of such records; or a pair (train, val) of these"


def memory_dataset(data: Handed, config: DataConfig) -> Dataset:
    """A data set of images in memory. Without a validation part, a fixed share is held out.

    Raises:
        InputError: these are no images, or values are out of range; names what was given.
    """
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        values, columns = frame_values(data, "data")
        return handed_dataset(NAME, [(values, None)], config, "data", columns=columns)
    if isinstance(data, tuple):
        if len(data) != 2:
            raise InputError(f"data: a tuple is a pair (training images, validation images), got {len(data)} parts")
        numbers = isinstance(data[1], list) and all(isinstance(value, int | float) for value in data[1])
        if numbers or getattr(data[1], "ndim", None) == 1:
            raise InputError(
                "data: a pair is (training images, validation images), and its second part has one dimension, as "
                "labels have; leave labels out, or give a torch Dataset of (image, label)"
            )
        return handed_dataset(NAME, [_array(part) for part in data], config, "data")
    return handed_dataset(NAME, [_array(data)], config, "data")


def frame_values(frame: Any, where: str) -> tuple[Array, tuple[str, ...]]:
    """The numbers of a pandas DataFrame (or polars', or another with ``columns``) as float64 [N, D], and their names.

    Raises:
        InputError: columns of the same name, or without numbers; names the first.
    """
    names = tuple(str(name) for name in frame.columns)
    if len(set(names)) < len(names):
        raise InputError(f"{where}: two columns are called {max(names, key=names.count)!r}; rename one")
    columns = [np.asarray(frame[name]) for name in frame.columns]
    for name, column in zip(names, columns, strict=True):
        if column.ndim != 1 or column.dtype.kind not in "biuf":
            raise InputError(
                f"{where}: column {name!r} holds {column.dtype}, and an autoencoder takes numbers; leave it out, or "
                "encode it first"
            )
    if not columns:
        raise InputError(f"{where}: has no columns")
    return np.stack([column.astype(np.float64) for column in columns], 1), names


def _array(data: Any) -> tuple[Array, Array | None]:
    """Images and their labels, if they have any."""
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
            raise InputError(
                "data: the images of this torch Dataset differ in shape; bring them to the same shape first"
            )
        second = np.array([item[1] for item in items]) if labelled and len(items[0]) > 1 else None
        labels = second if second is not None and second.ndim == 1 and np.issubdtype(second.dtype, np.integer) else None
        return np.stack(pictures) if pictures else np.empty((0, 1, 1)), labels
    stack = "; np.stack makes an array of a list" if isinstance(data, list) else ""
    raise InputError(f"data: expected {KINDS}; got {type(data).__name__}{stack}")
