"""One self-contained page about a model of tables, signals or volumes: a map of records, with their values on hover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_ae.config import InputError
from dist_ae.data.given import Given, blocks, floats, picked
from dist_ae.data.order import evenly_spaced
from dist_ae.files import to_json
from dist_ae.use.explore import LARGEST_PAGE, _escaped, _map, _principal, _text
from dist_ae.use.trained import TrainedModel

TEMPLATE = Path(__file__).with_name("explore_records.html")
LARGEST_VALUES = 10_000_000  # bytes of the page, in base64, for the values of the records and of their reconstructions


def records_page(trained: TrainedModel, records: Given, title: str, facts: Sequence[str] = ()) -> str:
    """The page as HTML, with as many evenly spaced records as it has room for.

    Raises:
        InputError: there are fewer than three records, or one alone is too large for a page.
    """
    shape = trained.config.model.record_shape
    assert shape is not None
    size = math.prod(shape)
    most = LARGEST_VALUES * 3 // 4 // (8 * size)
    count = len(records.split)
    if count < 3 or most < 3:
        raise InputError(
            f"a map needs at least 3 records, got {count}"
            if count < 3
            else f"records of {size:,} numbers are too large for a page; `dist-ae embed` writes their codes"
        )
    if count > most:
        records = picked(records, evenly_spaced(count, most).numpy())
    values = np.concatenate([floats(records, rows).flatten(1).numpy() for rows in blocks(records)])
    reconstructions = trained.reconstruct(records).flatten(1).numpy()
    contributions = trained.contributions(records).flatten(1).numpy()
    codes = trained.embed(records).flatten(1).numpy()
    if not (np.isfinite(codes).all() and np.isfinite(reconstructions).all()):
        raise InputError(
            "the model's codes or reconstructions of these records are not finite, so they cannot be put on a map"
        )
    mean, directions, _ = _principal(codes)
    labels = records.split.labels
    page: dict[str, Any] = {
        "facts": [*facts, f"{len(values):,} of {count:,} records on the map"],
        "shape": list(shape),
        "columns": list(trained.config.data.columns or map(str, range(size if len(shape) == 1 else 0))),
        "points": _text(_map((codes - mean) @ directions.T)),
        "errors": _text(contributions.mean(1).astype("<f4")),
        "values": _text(values.astype("<f4")),
        "reconstructions": _text(reconstructions.astype("<f4")),
        "scale": _text(_scale(trained, size)),
        "labels": None if labels is None else labels.tolist(),
        "classes": list(records.classes),
    }
    # With "<", a column's name could end the element that holds the data.
    data = to_json(page, indent=None).decode().replace("<", "\\u003c")
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", _escaped(title)).replace("{{data}}", data)
    assert len(html) <= LARGEST_PAGE
    return html


def _scale(trained: TrainedModel, size: int) -> np.ndarray[Any, np.dtype[Any]]:
    """The standard deviation of each number of a record, as the scale for differences."""
    scale = trained.model.units_scale
    channels = np.ones(1) if scale is None else scale.flatten().cpu().numpy()
    return np.repeat(channels, size // len(channels)).astype("<f4")
