"""Arrays in .npy files, packed once, as tables are, as records that training maps into memory."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_ae.config import DataConfig, InputError
from dist_ae.data.arrays import read_array, typed, value_range
from dist_ae.data.names import with_prefix
from dist_ae.data.pictures import expand, scan, shown
from dist_ae.data.reads import Reads
from dist_ae.data.records import CHUNK_BYTES, Array, npy_header
from dist_ae.data.tables import FORMAT, MANIFEST, RECORDS, Table, pack_table, packed_whole
from dist_ae.files import sync, write_new
from dist_ae.terminal import say

Each = Literal["record", "records"]


def pack_numbers(name: str, out: Path, config: DataConfig, each: Each | None) -> dict[str, Any] | None:
    """``dist-ae pack`` for a table, a .npy or a folder of .npy: its manifest. None for a source of pictures."""
    out, name = Path(os.path.abspath(expand(out))), with_prefix(name)
    kind, _, path = name.partition(":")
    files = array_files(expand(path)) if kind in ("array", "folder") else []
    if kind == "folder" and files and each is None and scan(os.fspath(expand(path)))[0]:
        files = []  # arrays among pictures, which training uses
    if kind != "table" and not files:
        return None
    if config.include:
        raise InputError("--include chooses among the pictures of a folder, and this source has numbers; leave it out")
    Reads(name).refuse(out, "OUT", folder=True)
    return pack_table(Table(path, config), out) if kind == "table" else pack_arrays(files, out, each)


def array_files(path: Path) -> list[Path]:
    """The .npy files of a path: itself, or those of a folder, sorted by name; none for other paths."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix == ".npy" and file.is_file())
    return [path] if path.suffix in (".npy", ".npz") and path.is_file() else []


def pack_arrays(paths: list[Path], out: Path, each: Each | None) -> dict[str, Any]:
    """Packs .npy files into the folder ``out``, whole or not at all, unless they are already there.

    Args:
        each: whether each of several files is one record, or an array of records [n, …].

    Raises:
        InputError: files differ in shape or type, or numbers cannot be packed; names the file.
    """
    if len(paths) > 1 and each is None:
        raise InputError(
            f"{shown(paths[0].parent)}: {len(paths):,} arrays; say what each of them is: --each record (one "
            "record), or --each records (an array of them)"
        )
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    identity = hashlib.sha256(json.dumps([FORMAT, "arrays", each, stats]).encode(errors="surrogateescape")).hexdigest()
    return packed_whole(identity, out, partial(_write, paths, each, identity))


def _write(paths: list[Path], each: Each | None, identity: str, folder: Path) -> None:
    say(f"packing {', '.join(path.name for path in paths[:3])}{', …' if len(paths) > 3 else ''}")
    rows, missing, low, high = 0, 0, np.inf, -np.inf
    form: tuple[tuple[int, ...], np.dtype[Any]] | None = None
    digest = hashlib.sha256()
    with (folder / RECORDS).open("wb") as file:
        file.write(bytes(128))
        for path in paths:
            array = read_array(expand(path))
            array = array[None] if each == "record" else array
            if array.ndim < 2 or 0 in array.shape:
                raise InputError(f"{shown(path)}: shape {list(array.shape)}, and an array of records is [N, …]")
            for start in range(0, len(array), step := max(1, CHUNK_BYTES // array[0].nbytes)):
                part = _stored(np.asarray(array[start : start + step]), path)
                if form is None:
                    form = part.shape[1:], part.dtype
                if form != (part.shape[1:], part.dtype):
                    raise InputError(
                        f"{shown(path)}: records of {part.dtype} {list(part.shape[1:])}, and {shown(paths[0])} has "
                        f"{form[1]} {list(form[0])}; bring them to the same shape and type first"
                    )
                if part.dtype.kind == "f":
                    missing += int(np.isnan(part).sum())
                    if np.isfinite(part).any():
                        least, most = value_range(part, shown(path), True, None, ())
                        low, high = min(low, least), max(high, most)
                digest.update(part.data)
                file.write(part.data)
            rows += len(array)
        assert form is not None
        file.seek(0)
        file.write(npy_header((rows, *form[0]), form[1]))
        file.flush()
        os.fsync(file.fileno())
    if rows < 2:
        raise InputError(f"{shown(paths[0])}: {rows} record; at least 2 are needed")
    if form[1].kind != "f":
        low, high = 0.0, 1.0
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "rows": rows,
        "shape": list(form[0]),
        "dtype": str(form[1]),
        "columns": [],
        "missing": [missing],
        "low": [low if np.isfinite(low) else None],
        "high": [high if np.isfinite(high) else None],
        "classes": [],
        "label": None,
        "sha256": digest.hexdigest(),
    }
    write_new(folder / MANIFEST, (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())
    sync(folder)


def _stored(part: Array, path: Path) -> Array:
    """Records in their packed type: uint8, uint16 or float32.

    Raises:
        InputError: another type, infinities, or numbers beyond float32.
    """
    part = typed(part, "auto", shown(path))
    if part.dtype.kind != "f":
        return np.ascontiguousarray(part)
    with np.errstate(over="ignore"):  # reported below
        single = np.ascontiguousarray(part, np.float32)
    if np.isinf(single).any():
        value = part[np.isinf(single)][0]
        raise InputError(f"{shown(path)}: the value {value:g} is beyond float32, the type of packed records")
    return single
