"""What is in a source of data, before anything is trained on it: figures, remarks and examples. Writes nothing."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_ae.config import DataConfig, InputError
from dist_ae.data.arrays import read_array
from dist_ae.data.decode import decoded
from dist_ae.data.facts import Facts, flat, look_alikes, remarks, summary, table, twins
from dist_ae.data.form import decode_all, facts_of_all
from dist_ae.data.layout import laid_out, named
from dist_ae.data.names import NAMES, with_prefix
from dist_ae.data.packed import of_pages
from dist_ae.data.pictures import PREFIXES, Picture, expand, form_of, open_source, paged, shown
from dist_ae.data.records import CHUNK_BYTES, Array
from dist_ae.data.tables import Table, column_types, table_paths
from dist_ae.terminal import Waiting

SIDE = 64  # of the pictures on the page, and the size that pictures are compared at
SHOWN = 48  # ordinary pictures on the page
ODD = 12  # pictures of each kind of odd ones
BATCHES = {"ae": 128, "conv": 32}
SIZES = (16, 32, 64, 128, 256)  # that a size is suggested from
CROP = 64  # side of the crops that are suggested, for pictures that are twice as large
OBLONG, ALIKE = 1.4, 1.15  # proportions that are no square, and that count as the same


class Sheet(NamedTuple):
    """Examples that the page shows together."""

    title: str
    images: list[Array]  # uint8 [3, SIDE, SIDE]
    names: list[str]


class Found(NamedTuple):
    """What was found: ``figures`` are JSON-ready."""

    figures: dict[str, Any]
    sheets: list[Sheet]


def look(name: str, config: DataConfig) -> Found:
    """Looks at pictures, an array or a table.

    Raises:
        InputError: there is no such source, or nothing in it can be looked at.
    """
    name = with_prefix(name)
    if name.startswith("table:"):
        return _table(name, config)
    if name.startswith("array:"):
        return _array(name, config)
    if not name.startswith(PREFIXES):
        what = f"{shown(name)}: "
        if name in NAMES:
            own = f"; the folder here is folder:{name}" if os.path.isdir(name) else ""
            what = f"{name} is a data set that comes with the program{own}. "
        raise InputError(
            f"{what}`dist-ae look` takes folder:PATH, tar:PATTERN, hf:NAME, array:PATH, table:PATH, or the path of a "
            "folder, array or table; `dist-ae doctor` looks at a packed set"
        )
    return _pictures(name, config)


# -- pictures


def _pictures(name: str, config: DataConfig) -> Found:
    source = paged(open_source(name, config), config.pages)
    form = form_of(config, "rgb", (SIDE, SIDE))
    facts: list[Facts] = []
    chosen: list[tuple[str, str | int | None, str | None]] = []  # name, label, split
    unreadable: list[tuple[str, str]] = []
    seen: set[str] = set()
    several: list[int] = []  # pages of the files that have more than one
    waiting = Waiting("looking", source.count, "pictures")
    for picture, (image, known) in decoded(source.pictures(), form, source.count, facts_of_all):
        waiting()
        seen.add(picture.name)
        several += [picture.pages] if picture.pages > 1 else []
        if known is None:
            unreadable.append((shown(picture.name), str(image)))
        else:
            facts.append(known)
            chosen.append((picture.name, picture.label, picture.split))
    records = table(facts)
    held_out = np.array([split == "val" for _, _, split in chosen], bool)
    alike = look_alikes(records) if len(records) else []
    labels = Counter(_class_name(label, source.classes) for _, label, _ in chosen if label is not None)
    figures: dict[str, Any] = {
        "source": shown(name),
        "kind": "pictures",
        **summary(records, held_out, alike),
        "unreadable": len(unreadable),
        "unreadable_first": unreadable[:5],
        "suffixes": dict(Counter(_suffix(name) for name, _, _ in chosen).most_common()),
        "ignored": dict(source.ignored),
        "ignored_suffixes": _ignored_suffixes(name, seen),
        "classes": dict(labels.most_common()),
        "splits": dict(Counter(split for _, _, split in chosen if split is not None)),
        "paged_files": len(several),
        "pages": sum(several),
    }
    pages = of_pages(len(several), sum(several))
    figures["transparent"] = sum(each.clear for each in facts)
    figures["remarks"] = [
        *_of_ignored(figures),
        *_of_transparent(figures, config),
        *([pages] if pages else []),
        *source.notes,
        *remarks(figures),
        *_of_classes(labels),
    ]
    figures["training"] = _training(name, figures, config)
    return Found(figures, _sheets(source.pictures(), records, [name for name, _, _ in chosen], form, alike))


def _class_name(label: str | int, classes: Sequence[str]) -> str:
    if isinstance(label, int):
        return classes[label] if 0 <= label < len(classes) else str(label)
    return shown(label)


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else "none"


def _ignored_suffixes(name: str, taken: set[str]) -> dict[str, int]:
    """The suffixes of files of a folder that are not taken, hidden ones left out."""
    if not name.startswith("folder:"):
        return {}
    root, found = os.fspath(expand(name.removeprefix("folder:"))), Counter[str]()
    for place, folders, files in os.walk(root):
        folders[:] = [each for each in folders if not each.startswith(".")]
        inner = os.path.relpath(place, root)
        for file in files:
            relative = file if inner == "." else f"{inner}/{file}"
            if not file.startswith(".") and relative not in taken:
                found[_suffix(file)] += 1
    return dict(found.most_common(20))


def _of_ignored(figures: dict[str, Any]) -> list[str]:
    left, taken = sum(figures["ignored_suffixes"].values()), figures["pictures"]
    found = []
    if left > taken:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in list(figures["ignored_suffixes"].items())[:4])
        found.append(f"more is ignored than taken: {left:,} files against {taken:,} pictures ({kinds})")
    if figures["unreadable"]:
        first = "; ".join(": ".join(each) for each in figures["unreadable_first"][:2])
        count = f"{figures['unreadable']:,} picture{'s' if figures['unreadable'] > 1 else ''}"
        found.append(f"{count} cannot be read ({first}); --data.corrupt skip leaves them out")
    return found


def _of_transparent(figures: dict[str, Any], config: DataConfig) -> list[str]:
    if not figures["transparent"]:
        return []
    return [
        f"{figures['transparent']:,} of {figures['pictures']:,} pictures are partly transparent, and get the colour "
        f"{config.background or 'white'} there unless --data.channels rgba keeps transparency as a fourth channel"
    ]


def _of_classes(labels: Counter[str]) -> list[str]:
    counts = labels.most_common()
    if len(counts) > 1 and counts[0][1] > 20 * counts[-1][1]:
        return [
            f"classes differ much in size: {counts[0][1]:,} of {counts[0][0]}, {counts[-1][1]:,} of {counts[-1][0]}"
        ]
    return []


def _training(name: str, figures: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """What training would take: a size of images, bytes, steps, and the command."""
    count = figures["pictures"]
    if not count:
        return {}
    several = figures["sizes"]["different"] > 1 or max(figures["largest"]) > SIZES[-1]
    size = config.image_size or (_suggested(figures) if several else None)
    height, width = DataConfig(image_size=size).size or (figures["largest"][1], figures["largest"][0])
    grey = all(mode.split()[-1] in ("L", "1", "LA", "I;16", "F", "I") for mode in figures["modes"])
    clear = 2 * figures["transparent"] >= count  # then transparency is part of the data, not an oddity of a few
    channels = 4 if clear else 1 if grey else 3
    option = f" --data.image-size {size}" if size else ""
    command = f"dist-ae train conv --data.name {shlex.quote(figures['source'])}{_chosen(config)}"
    command += " --data.channels rgba" if clear else ""
    # Photographs of many sizes lose most of themselves when they are shrunk to one.
    crops = figures["sizes"]["different"] > 1 and min(figures["smallest"]) >= 2 * CROP and config.image_size is None
    return {
        **({"crops": f"{command} --data.crop {CROP}"} if crops else {}),
        "image_size": size,
        "bytes": count * channels * height * width,
        "steps_an_epoch": {preset: math.ceil(0.9 * count / batch) for preset, batch in BATCHES.items()},
        "command": f"{command}{option}",
    }


def _chosen(config: DataConfig) -> str:
    """The options that chose among the pictures of a folder."""
    lists = [(key, getattr(config, key)) for key in ("include", "exclude")]
    chosen = "".join(f" --data.{key} {shlex.join(map(shown, patterns))}" for key, patterns in lists if patterns)
    return chosen + (" --data.links follow" if config.links == "follow" else "")


def _suggested(figures: dict[str, Any]) -> int | str:
    """A size for training: a square, or where nearly all pictures have other proportions, these."""
    shortest, (low, ratio, high) = min(figures["smallest"]), figures["ratio"]
    side = min(64, max(each for each in SIZES if each <= max(shortest, SIZES[0])))
    if max(ratio, 1 / ratio) < OBLONG or max(ratio / low, high / ratio) > ALIKE:
        return side
    longer = max(8, round(side * max(ratio, 1 / ratio) / 8) * 8)  # what three halvings of a convolution divide
    if longer > SIZES[-1]:
        return side
    return f"{side}x{longer}" if ratio > 1 else f"{longer}x{side}"


def _sheets(
    pictures: Any, records: Array, names: Sequence[str], form: Any, alike: Sequence[tuple[int, int]]
) -> list[Sheet]:
    """The ordinary and the odd, decoded again: what all pictures take would not fit into memory."""
    count = len(records)
    if not count:
        return []
    first = twins(records)
    copies = [row for row in range(count) if first[row] != row][: ODD // 2]
    ratio = np.abs(np.log(records["width"] / np.maximum(records["height"], 1)))
    area = records["width"].astype(np.int64) * records["height"]
    # How far the small copy is from the mean of all.
    small = records["small"].reshape(count, -1).astype(np.float32)
    apart = np.square(small - small.mean(0)).mean(1)
    rows = {
        "evenly spaced": np.linspace(0, count - 1, min(SHOWN, count)).astype(int).tolist(),
        "copies, each beside its first": [each for row in copies for each in (int(first[row]), row)],
        "look-alikes, in pairs": [row for pair in alike[: ODD // 2] for row in pair],
        "one colour": np.flatnonzero(flat(records))[:ODD].tolist(),
        "farthest from the mean": np.argsort(-apart, kind="stable")[:ODD].tolist(),
        "longest": np.argsort(-ratio, kind="stable")[:ODD].tolist() if ratio.max() > 0.7 else [],
        "smallest": np.argsort(area, kind="stable")[:ODD].tolist() if area.min() < area.max() / 4 else [],
    }
    wanted = {names[row] for group in rows.values() for row in group}
    images = {
        picture.name: read.image
        for picture in pictures
        if isinstance(picture, Picture) and picture.name in wanted
        for read in decode_all([picture.content], form)
        if isinstance(read.image, np.ndarray)
    }
    return [
        Sheet(
            title, [images[names[row]] for row in group if names[row] in images], [shown(names[row]) for row in group]
        )
        for title, group in rows.items()
        if group
    ]


# -- numbers


def _array(name: str, config: DataConfig) -> Found:
    path = expand(name.removeprefix("array:"))
    array = read_array(path)
    laid = laid_out(array, config.layout, shown(path))
    records = laid.records
    count, size = len(records), max(1, CHUNK_BYTES // max(1, records.nbytes // max(1, len(records))))
    axes = (0, 2, 3)
    low, high = np.full(records.shape[1], np.inf), np.full(records.shape[1], -np.inf)
    missing = infinite = 0
    digests = Counter[bytes]()
    for start in range(0, count, size):
        part = np.asarray(records[start : start + size])
        digests.update(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in part)
        if part.dtype.kind == "f":
            missing, infinite = missing + int(np.isnan(part).sum()), infinite + int(np.isinf(part).sum())
            part = np.where(np.isfinite(part), part, np.nan)
        low, high = np.fmin(low, np.fmin.reduce(part, axes)), np.fmax(high, np.fmax.reduce(part, axes))
    figures: dict[str, Any] = {
        "source": shown(name),
        "kind": "array",
        "records": count,
        "shape": list(array.shape),
        "read_as": named(laid.shape or tuple(records.shape[1:])),
        "type": str(array.dtype),
        "range": [float(low.min()), float(high.max())],
        "missing": missing,
        "infinite": infinite,
        "constant_channels": int((low == high).sum()),
        "channels": int(records.shape[1]),
        "copies": sum(number for number in digests.values() if number > 1),
    }
    figures["remarks"] = _of_numbers(figures, count, "records")
    if array.ndim == 4 and records.shape[1] not in (1, 3, 4):
        figures["remarks"].append(
            f"axis 1 is read as {records.shape[1]:,} channels; --data.layout volumes or signals says otherwise"
        )
    figures["training"] = {
        "bytes": int(records.nbytes),
        "command": f"dist-ae train ae --data.name {shlex.quote(shown(name))}",
    }
    return Found(figures, [])


def _table(name: str, config: DataConfig) -> Found:
    pattern = name.removeprefix("table:")
    first = table_paths(pattern)[0]
    types = column_types(first)
    text = tuple(each for each, kind in types.items() if kind != "number" and each not in config.exclude)
    found = Table(pattern, config.model_copy(update={"exclude": (*config.exclude, *text), "label": None}))
    low = np.full(len(found.columns), np.inf)
    high, missing, rows = -low, np.zeros(len(low), np.int64), 0
    digests = Counter[bytes]()
    for batch in found.batches():
        values = np.asarray(batch.values, np.float64)
        rows += len(values)
        missing += np.isnan(values).sum(0)
        low, high = np.fmin(low, np.fmin.reduce(values, 0)), np.fmax(high, np.fmax.reduce(values, 0))
        digests.update(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values)
    columns = {
        column: {
            "low": float(low[i]),
            "high": float(high[i]),
            "missing": int(missing[i]),
            "constant": bool(low[i] == high[i]),
        }
        for i, column in enumerate(found.columns)
    }
    figures: dict[str, Any] = {
        "source": shown(name),
        "kind": "table",
        "records": rows,
        "columns": columns,
        "no_numbers": {column: types[column] for column in text},
        "missing": int(missing.sum()),
        "infinite": 0,
        "constant_channels": sum(each["constant"] for each in columns.values()),
        "channels": len(columns),
        "copies": sum(number for number in digests.values() if number > 1),
        "range": [float(low.min()), float(high.max())],
    }
    figures["remarks"] = _of_numbers(figures, rows, "rows")
    if text:
        figures["remarks"].append(f"{len(text):,} columns hold no numbers: {', '.join(map(shown, text[:5]))}")
    left_out = (*config.exclude, *text)
    exclude = f" --data.exclude {shlex.join(map(shown, left_out))}" if left_out else ""
    mask = " --data.missing mask" if figures["missing"] else ""
    command = f"dist-ae train table --data.name {shlex.quote(shown(name))}{exclude}{mask}"
    figures["training"] = {"bytes": 4 * rows * len(columns), "command": command}
    return Found(figures, [])


def _of_numbers(figures: dict[str, Any], count: int, what: str) -> list[str]:
    found = []
    if figures["copies"]:
        found.append(f"{figures['copies']:,} of {count:,} {what} have a twin with the same values")
    if figures["missing"]:
        found.append(f"{figures['missing']:,} entries are missing; --data.missing mask takes them out of the loss")
    if figures["infinite"]:
        found.append(f"{figures['infinite']:,} entries are infinite, and numbers must be finite")
    if figures["constant_channels"] and figures["channels"] > 1:
        found.append(f"{figures['constant_channels']:,} of {figures['channels']:,} columns or channels do not vary")
    return found


def default_page(name: str) -> Path:
    """The name of the page about a source, in the current folder."""
    stem = Path(name.partition(":")[2] or name).stem or "data"
    return Path(f"look-{stem}.html")
