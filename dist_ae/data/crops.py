"""Squares of larger pictures: at new places in every step of training, at fixed places for everything measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dist_ae.config import DataConfig, InputError
from dist_ae.data.encoded import Encoded
from dist_ae.data.records import Array, Dataset, Shards, Split, Whole, is_mapped, read_ahead
from dist_ae.draws import philox
from dist_ae.draws.keyed import stream_key
from dist_ae.terminal import rank, say

MOST_A_PICTURE = 64  # crops of one picture in an epoch, unless data.crops says otherwise
MOST_HELD_OUT = 2000  # fixed crops of all held-out pictures, or one per picture: bounds the cost of an evaluation


class Crops:
    """All squares of ``size`` × ``size`` pixels in all pictures, as images that are cut when they are read.

    The number of a crop encodes its place: picture · 2³³ + mirrored · 2³² + y · 2¹⁶ + x. y and x are shares
    of the possible positions in 65,536ths. So drawing a place takes 16 bits for each, and a row of a split can be any
    crop.
    """

    def __init__(self, pictures: Array | Shards | Whole | Encoded, size: int) -> None:
        self.pictures, self.size = pictures, size
        channels = pictures.channels if isinstance(pictures, Whole | Encoded) else pictures.shape[1]
        self.shape: tuple[int, ...] = (len(pictures), channels, size, size)
        self.dtype = pictures.dtype
        self.nbytes = len(pictures) * channels * size * size * self.dtype.itemsize
        if isinstance(pictures, Whole | Encoded):
            self.sizes, parts = pictures.sizes, pictures.parts
            self.mapped = any(is_mapped(part) for part in parts)
        else:
            self.sizes = np.broadcast_to(np.array(pictures.shape[2:], np.int64), (len(pictures), 2))
            self.mapped = is_mapped(pictures)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        return self.take(np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows))

    def take(self, rows: Array) -> Array:
        """Crops by their numbers, [len(rows), C, size, size]."""
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        picture, mirrored = rows >> 33, rows >> 32 & 1
        room = self.sizes[picture] - self.size + 1
        y, x = (rows >> 16 & 0xFFFF) * room[:, 0] >> 16, (rows & 0xFFFF) * room[:, 1] >> 16
        places = list(zip(picture.tolist(), y.tolist(), x.tolist(), mirrored.tolist(), strict=True))

        def cut(crops: Sequence[int]) -> None:
            """Cuts crops of one picture, given by their positions in the result."""
            whole = self.picture(places[crops[0]][0])
            for number in crops:
                _, top, left, flip = places[number]
                square = whole[:, top : top + self.size, left : left + self.size]
                result[number] = square[:, :, ::-1] if flip else square

        if isinstance(self.pictures, Encoded):  # each picture is decoded once
            order = np.argsort(picture, kind="stable")
            self.pictures.work(cut, np.split(order, np.flatnonzero(np.diff(picture[order])) + 1) if len(rows) else [])
        else:
            for number in range(len(places)):
                cut((number,))
        return result

    def picture(self, number: int) -> Array:
        """The whole picture [C, H, W] that crops are cut from."""
        if not isinstance(self.pictures, np.ndarray):
            return self.pictures.picture(number)
        picture: Array = np.asarray(self.pictures)[number]
        return picture

    def read_ahead(self, rows: Array) -> None:
        """Asks the system to read the pictures of these crops ahead, if all pictures have the same size."""
        if not isinstance(self.pictures, Whole | Encoded):
            read_ahead(self.pictures, np.unique(rows >> 33))

    def tiles(self, number: int, stride: int | None = None) -> Array:
        """The numbers of fixed crops of a picture, row by row from its upper left corner.

        Args:
            stride: approximate distance of two crops in pixels; left out, they lie side by side.
        """
        down, across = (_starts(int(side), self.size, stride or self.size) for side in self.sizes[number])
        numbers: Array = ((number << 33) + (down[:, None] << 16) + across).ravel()
        return numbers


def _starts(side: int, size: int, stride: int) -> Array:
    """Evenly spread starts of squares along a side of a picture, as shares of the possible ones in 65,536ths."""
    count, room = (side - size) // stride + 1, side - size + 1
    pixels = np.arange(count) * (side - size) // max(1, count - 1)
    shares: Array = -(-pixels * 2**16 // room)  # rounded up, so that rounding down gives this pixel
    return shares


def cropped(dataset: Dataset, config: DataConfig) -> Dataset:
    """A data set of crops: new places in every step of training, fixed places for validation.

    Raises:
        InputError: records that are no pictures, or pictures that are all smaller than a crop.
    """
    if config.crop is None:
        if config.flip or config.crops is not None:
            key = "flip" if config.flip else "crops"
            raise InputError(f"data.{key} is for crops; give their size with --data.crop, such as 64")
        return dataset
    if isinstance(dataset.train.images, Crops):  # `photos` cuts its own
        return dataset
    if dataset.shape is not None:
        raise InputError(f"data.crop cuts squares out of pictures, and {dataset.name} has no pictures; leave it out")
    if dataset.test is not None:
        raise InputError("data.folds tests whole pictures, and data.crop trains on parts of them; leave one out")
    if config.window is not None:
        raise InputError("data.window reads whole pictures in groups, and data.crop reads parts of them; leave one out")
    fixed = max(1, min(MOST_A_PICTURE, MOST_HELD_OUT // len(dataset.val)))
    train, small = _fixed_crops(dataset.train, config.crop, config.crops or MOST_A_PICTURE, exactly=bool(config.crops))
    val, others = _fixed_crops(dataset.val, config.crop, fixed, exactly=False)
    for split, what in ((train, "training"), (val, "validation")):
        if not len(split):
            raise InputError(
                f"data.crop {config.crop}: all pictures of {dataset.name} for {what} are smaller; use a smaller one"
            )
    if small + others and rank() == 0:
        say(f"note: {small + others:,} pictures are smaller than a crop of {config.crop} and left out", sys.stderr)
    return replace(dataset, train=train, val=val, shards=None)


def _fixed_crops(split: Split, size: int, most: int, exactly: bool) -> tuple[Split, int]:
    """The fixed crops of a split, and how many of its pictures are too small.

    Args:
        most: most crops of one picture.
        exactly: repeat the crops of a picture that has fewer, so that an epoch has exactly as many.
    """
    assert isinstance(split.images, np.ndarray | Shards | Whole | Encoded)
    crops = Crops(split.images, size)
    pictures = np.arange(len(split.images)) if split.rows is None else split.rows
    large = crops.sizes[pictures].min(1) >= size
    tiles = [crops.tiles(number) for number in pictures[large].tolist()]
    tiles = [numbers if len(numbers) < most else numbers[np.arange(most) * len(numbers) // most] for numbers in tiles]
    if exactly:
        tiles = [np.resize(numbers, most) for numbers in tiles]
    labels = None if split.labels is None else np.repeat(split.labels[large], [len(numbers) for numbers in tiles])
    rows = np.concatenate([np.empty(0, np.int64), *tiles])
    return Split(crops, labels, rows), int((~large).sum())


def drawn_from(split: Split) -> Split:
    """The split that training steps read from: the split itself, or all crops of its pictures, by number."""
    return Split(split.images, None, None, split.scaling) if isinstance(split.images, Crops) else split


def placed(split: Split, rows: Array, seed: int, step: int, flip: bool) -> Array:
    """The rows of ``drawn_from(split)`` that a step reads for rows [B] of the split: crops at new places.

    A pure function of its arguments, so the same on any number of processes and after a resume.

    Args:
        flip: mirror half of the crops.
    """
    if not isinstance(split.images, Crops):
        return rows
    assert split.rows is not None
    drawn = philox.halves((seed % 2**64, stream_key("crop"), step), range(len(rows)), 3).astype(np.int64)
    mirrored = (drawn[:, 2] & 1) << 32 if flip else 0
    numbers: Array = (split.rows[rows] >> 33 << 33) + mirrored + (drawn[:, 0] << 16) + drawn[:, 1]
    return numbers
