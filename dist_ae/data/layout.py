"""Brings every input array into one form: records [N, C, H, W], and the shape that a record has outside.

A row of a table is a record of D channels of one value, a signal C channels of one row, an image C channels of H rows,
a volume C channels of D · H rows. So the scale of a channel is that of a column, a sensor or a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dist_ae.config import InputError
from dist_ae.data.records import Array

Layout = Literal["auto", "table", "signals", "images", "images-last", "volumes"]
MOST_CHANNELS = 16  # up to this length, the last axis of images could be channels
SHAPES = "[N, H, W], [N, C, H, W] or [N, H, W, C] (images), [N, D] (a table), [N, C, L] with data.layout signals"


class Laid(NamedTuple):
    """Records in the form used inside, and the shape of a record outside, if that differs."""

    records: Array  # [N, C, H, W], a view of the input
    shape: tuple[int, ...] | None  # (D,), (C, L) or (C, D, H, W); None for images


def laid_out(records: Array, layout: Layout, where: str) -> Laid:
    """An array in any usual layout as records [N, C, H, W].

    Raises:
        InputError: the array does not have this layout, is empty, or is ambiguous.
    """
    kind = layout if layout != "auto" else {2: "table", 5: "volumes"}.get(records.ndim, "images")
    axes: dict[str, tuple[int, ...]] = {"table": (2,), "signals": (2, 3), "volumes": (4, 5)}
    if records.ndim not in axes.get(kind, (3, 4)) or 0 in records.shape:
        way_out = "; reshape one column to [N, 1]" if records.ndim == 1 else ""
        what = SHAPES if layout == "auto" else f"data.layout {layout} with {_axes(kind)}"
        raise InputError(f"{where}: expected {what} and at least one, got shape {list(records.shape)}{way_out}")
    if kind == "table":
        return Laid(records[:, :, None, None], (records.shape[1],))
    if kind == "signals":
        shape = (1, *records.shape[1:])[-2:]
        return Laid(records.reshape(len(records), shape[0], 1, shape[1]), shape)
    if kind == "volumes":
        channels, depth, height, width = (1, *records.shape[1:])[-4:]
        return Laid(records.reshape(len(records), channels, depth * height, width), (channels, depth, height, width))
    if records.ndim == 3:
        return Laid(records[:, None], None)
    first, last = records.shape[1], records.shape[-1]
    if kind == "images-last" or (layout == "auto" and last in (1, 3, 4) and first not in (1, 3, 4)):
        return Laid(records.transpose(0, 3, 1, 2), None)
    if layout == "auto" and last <= MOST_CHANNELS < first:
        raise InputError(
            f"{where}: shape {list(records.shape)} can be {first} channels of {records.shape[2]} × {last}, or images "
            f"of {first} × {records.shape[2]} with {last} channels; choose one: data.layout images or images-last"
        )
    return Laid(records, None)


def _axes(kind: str) -> str:
    return {
        "table": "[N, D]",
        "signals": "[N, L] or [N, C, L]",
        "volumes": "[N, D, H, W] or [N, C, D, H, W]",
        "images-last": "[N, H, W, C]",
    }.get(kind, "[N, H, W] or [N, C, H, W]")


def fitted(records: Array, image_shape: Sequence[int], shape: Sequence[int] | None) -> Array | None:
    """An array in any usual layout, or a single record, as [N, C, H, W] of a model's shape; None if it does not fit.

    Args:
        image_shape: channels, height and width of a record inside.
        shape: of a record outside, if that differs.
    """
    channels, height, width = image_shape
    actual = tuple(records.shape)
    if shape is not None:
        full = tuple(shape)
        without_channel = full[1:] if full[0] == 1 and len(full) > 1 else full
        for record in (full, without_channel, tuple(image_shape)):
            if actual == record or (actual[1:] == record and actual[0]):
                return records.reshape(-1, *image_shape)
        return None
    orders = [(tuple(image_shape), None), ((height, width, channels), (0, 3, 1, 2))]
    if channels == 1:
        orders.append(((height, width), None))
    for image, axes in orders:
        if actual == image or (actual[1:] == image and actual[0]):
            batch = records if actual[1:] == image else records[None]
            return batch.transpose(axes) if axes else batch.reshape(len(batch), *image_shape)
    return None


def named(shape: Sequence[int]) -> str:
    """The shape of a record outside, in words, for messages and the headline."""
    if len(shape) == 1:
        return f"rows of {shape[0]:,} columns"
    if len(shape) == 2:
        return f"signals of {shape[0]:,} × {shape[1]:,}"
    if len(shape) == 4:
        return f"volumes of {' × '.join(map(str, shape))}"
    if shape[0] not in (1, 3, 4):  # such as the pages of a volume, which may not be meant as channels
        return f"images of {shape[0]:,} channels, each {shape[1]:,} × {shape[2]:,}"
    return f"images of {' × '.join(map(str, shape))}"


def outside(values: Array, shape: Sequence[int] | None) -> Array:
    """Records [N, C, H, W] in their shape outside."""
    return values if shape is None else values.reshape(-1, *shape)
