"""The one form of data that training reads: images in memory or memory-mapped, in two splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Split(NamedTuple):
    """One split: images uint8 or float32 on [0, 1], [N, C, H, W]; labels [N] int64 where the source has them.

    ``rows`` picks images of a memory-mapped array without copying it; None means all of them, in order.
    """

    images: Array
    labels: Array | None = None
    rows: Array | None = None

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)


@dataclass(frozen=True)
class Dataset:
    """Training and validation images of one source. ``fingerprint`` identifies their content."""

    name: str
    train: Split
    val: Split
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def fingerprint(*splits: Split) -> str:
    """SHA-256 of the content; of a memory-mapped array its shape and 1,024 evenly spaced images, since reading all would cost an epoch."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"{split.images.dtype}{split.images.shape[1:]}{len(split)}".encode())
        if isinstance(split.images, np.memmap):
            rows = np.linspace(0, len(split) - 1, min(1024, len(split))).astype(np.int64)
            digest.update(
                np.ascontiguousarray(split.images[rows if split.rows is None else split.rows[rows]]).tobytes()
            )
        else:
            digest.update(split.images.data if split.images.flags.c_contiguous else split.images.tobytes())
    return digest.hexdigest()
