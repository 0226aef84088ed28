"""Counter-based random numbers on the CPU: Philox 4x64-10 (Salmon et al. 2011), as in numpy.

A table of draws has rows of a fixed width. A block of the generator gives 4 words of 64 bits, that is 16 halves of 16
bits, and a row takes whole blocks. Any range of rows is a range of counters and takes one call. No row depends on the
others.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

HALVES = 16  # halves of 16 bits in a block
LEVELS = 2**16
Key = tuple[int, int, int]  # seed and stream, each 64 bits, and step

Array = np.ndarray[Any, np.dtype[Any]]


def blocks_per_row(width: int) -> int:
    """Blocks that a row of ``width`` values takes."""
    return -(-width // HALVES)


def halves(key: Key, rows: range, width: int) -> Array:
    """Rows ``rows`` of the table as random 16-bit numbers, uint16 [len(rows), width]."""
    seed, stream, step = key
    blocks = blocks_per_row(width)
    # numpy increments the counter before each block: block i of the table is counter i + 1.
    counter = np.array([rows.start * blocks, step, 0, 0], np.uint64)
    generator = np.random.Philox(counter=counter, key=np.array([seed, stream], np.uint64))
    words = generator.random_raw(len(rows) * blocks * 4)
    return words.astype("<u8", copy=False).view("<u2").reshape(len(rows), blocks * HALVES)[:, :width]


@lru_cache(maxsize=8)
def normal_table(std: float = 1.0) -> Array:
    """The 65,536 normal quantiles at (i + ½) / 65,536, scaled to standard deviation ``std``, float32.

    A table replaces logarithms and cosines: it gives the same bits on every device and needs a quarter of the random
    words. The price is that values end at 4.33 standard deviations, which one normal in 70,000 exceeds, and that the
    kurtosis is 2.998.
    """
    places = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    quantiles = torch.special.ndtri(places)
    scaled: Array = (quantiles / quantiles.square().mean().sqrt()).float().numpy() * np.float32(std)
    return scaled


@lru_cache(maxsize=8)
def uniform_table(low: float, high: float) -> Array:
    """The 65,536 middles of equal parts of [low, high], float32."""
    middles: Array = (low + (np.arange(LEVELS) + 0.5) / LEVELS * (high - low)).astype(np.float32)
    return middles


def table_of(values: float | tuple[float, float]) -> Array:
    """The values of the 16-bit numbers: normal with a standard deviation, or uniform between two numbers."""
    return uniform_table(*values) if isinstance(values, tuple) else normal_table(values)


def threshold(keep: float) -> int:
    """The half below which a unit is kept.

    Kept units are scaled by LEVELS / threshold, so masks average to exactly 1.
    """
    return min(max(round(keep * LEVELS), 1), LEVELS)


def numbers(key: Key, rows: range, width: int, values: float | tuple[float, float]) -> Array:
    """Draws of ``table_of(values)``, float32 [len(rows), width]."""
    return np.take(table_of(values), halves(key, rows, width))


def masks(key: Key, rows: range, width: int, keep: float) -> Array:
    """Dropout masks, float32 [len(rows), width]: LEVELS / threshold with probability threshold / LEVELS, else 0."""
    limit = threshold(keep)
    return np.multiply(halves(key, rows, width) < limit, np.float32(LEVELS / limit), dtype=np.float32)
