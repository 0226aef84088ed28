"""The scale of records that are not pictures: mean and deviation, or range, of each column or channel."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from dist_ae.config import InputError
from dist_ae.data.records import Array, Scaling, Split, chunks, span

Scale = Literal["auto", "none", "standard", "range"]
# Least share of [0, 1] that floats must cover to be used as they are. A step of Adam moves the weights by the same
# amount whatever the contrast, and bf16 has three digits of a value however little it varies: on values from 0.05 to
# 0.15, training lost the start from PCA; standardized, it ended 7 % below PCA at the same rate.
CONTRAST = 0.25


def resolved(scale: Scale, missing: str, dtype: np.dtype[Any], low: float, high: float, where: str) -> Scale:
    """The scale that ``auto`` stands for: none for bytes, 16 bits and floats that cover [0, 1], else standard.

    Args:
        low, high: the smallest and the largest value.

    Raises:
        InputError: the values do not fit the scale.
    """
    unit = dtype in (np.uint8, np.uint16) or (low >= 0 and high <= 1)
    if scale == "auto":
        faint = dtype.kind == "f" and 0 < high - low < CONTRAST
        return "none" if unit and not faint and missing == "refuse" else "standard"
    if missing == "mask" and scale != "standard":
        raise InputError(
            f"data.missing mask replaces missing entries by the mean, which needs data.scale standard, and data.scale "
            f"is {scale}"
        )
    if scale == "none" and not unit:
        raise InputError(
            f"{where}: values from {low:g} to {high:g}, and data.scale none takes floats on [0, 1]; leave data.scale "
            "out, or divide by the largest value"
        )
    return scale


def scaling_of(split: Split, scale: Scale, missing: bool) -> Scaling | None:
    """The scale of each channel over the training records, in float64; None for values that are already on [0, 1].

    Every process computes it from all records in the same order, so it does not depend on their number. A channel that
    does not vary is only shifted.
    """
    if scale not in ("standard", "range"):
        return None
    shape = (1, split.images.shape[1], 1, 1)
    if scale == "range":
        low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
        for rows in chunks(split):
            values = span(split, rows)
            low = np.minimum(low, values.min((0, 2, 3), keepdims=True))
            high = np.maximum(high, values.max((0, 2, 3), keepdims=True))
        return Scaling(low[0], _usable(high - low)[0], False, False)
    # Mean and squared deviations, chunk by chunk, combined as by Chan, Golub and LeVeque (1979): one pass, which unlike
    # a sum of squares loses no variance of values far from 0 that vary little.
    count, mean, squares = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for rows in chunks(split):
        values = span(split, rows).astype(np.float64)
        if missing:
            present = np.isfinite(values)
            part_count = present.sum((0, 2, 3), keepdims=True)
            centre = np.where(present, values, 0).sum((0, 2, 3), keepdims=True) / np.maximum(part_count, 1)
            values = np.where(present, values - centre, 0)
        else:
            part_count = np.full(shape, float(values[:, 0].size))
            centre = values.mean((0, 2, 3), keepdims=True)
            values -= centre
        part_squares = np.einsum("nchw,nchw->c", values, values).reshape(shape)
        total, shift = np.maximum(count + part_count, 1), centre - mean
        squares += part_squares + shift**2 * (count * part_count / total)
        mean += shift * (part_count / total)
        count += part_count
    deviation = np.sqrt(squares / np.maximum(count, 1))
    # The deviation of a constant is only rounding.
    deviation[deviation <= 1e-7 * np.abs(mean)] = 0
    return Scaling(mean[0], _usable(deviation)[0], True, missing)


def _usable(spread: Array) -> Array:
    return np.where(spread > 0, spread, 1.0)
