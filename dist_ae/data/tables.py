"""Tables: CSV and Parquet files, read in batches, packed once as float32 records [N, D] that training maps into memory.

A packed table is a folder of ``records.npy`` (float32 [N, D], NaN for a missing entry), ``labels.npy`` (int64 [N], if
a column of labels was named) and ``records.json``. Arrays are packed in the same way (``array_files.py``): their
records have any shape, are uint8, uint16 or float32, and ``columns`` is empty.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from dist_ae.config import DataConfig, InputError
from dist_ae.data.pictures import braces, expand, shown
from dist_ae.data.records import Array, npy_header
from dist_ae.errors import install
from dist_ae.files import MAX_JSON, Damaged, open_plainly, read_json, sync, write_new
from dist_ae.terminal import first_line, say

FORMAT = 1
MANIFEST, RECORDS, LABELS = "records.json", "records.npy", "labels.npy"
MOST_COLUMNS = 10_000  # each run's config.json has their names
BATCH_VALUES = 2**20  # numbers in a batch, which fits in a processor's cache while columns become rows
LARGEST = float(np.finfo(np.float32).max)
SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".pq")


class Rows(NamedTuple):
    """Some rows of a table, and their statistics."""

    values: Array  # [n, D] float32 if all columns of the file are, else float64; NaN for a missing entry
    labels: Array | None  # [n] of objects
    missing: Array  # [D], number of missing entries
    low: Array  # [D], of the present entries; NaN if all are missing
    high: Array


class Table:
    """The numeric columns of one or several files of one kind, in the order of their names."""

    def __init__(self, pattern: str, config: DataConfig) -> None:
        """Args:
        pattern: a file, a folder of files, or a pattern with braces and globs.
        config: ``columns`` to use, ``exclude`` to leave out, ``label``.

        Raises:
            InputError: no such file, or columns that are missing or no numbers; names file and column, and the way
                out.
        """
        self._pattern = pattern
        self.paths = table_paths(pattern)
        self.label = config.label
        types = column_types(self.paths[0])
        self.columns = self._choose(types, config)
        for path in self.paths[1:]:
            if lacking := [name for name in (*self.columns, *_optional(self.label)) if name not in column_types(path)]:
                raise InputError(f"{shown(path)}: has no column {lacking[0]!r}, which {shown(self.paths[0])} has")
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        chosen = json.dumps([FORMAT, stats, self.columns, self.label])
        self.identity = hashlib.sha256(chosen.encode(errors="surrogateescape")).hexdigest()

    def _choose(self, types: dict[str, str], config: DataConfig) -> list[str]:
        where = shown(self.paths[0])
        for option, names in (
            ("columns", config.columns or ()),
            ("exclude", config.exclude),
            ("label", _optional(config.label)),
        ):
            if unknown := [name for name in names if name not in types]:
                listed = ", ".join(map(repr, itertools.islice(types, 8)))
                raise InputError(f"{where}: data.{option} names {unknown[0]!r}, and its columns are {listed}, …")
        chosen = [name for name in config.columns or types if name not in (*config.exclude, *_optional(config.label))]
        not_numeric = [name for name in chosen if types[name] != "number"]
        if len(not_numeric) == len(chosen):
            raise InputError(
                f"{where}: has no numeric column{f' but those left out: {len(types)}' if not chosen else ''}"
            )
        if not_numeric:
            others = f" (and {len(not_numeric) - 1} more)" if len(not_numeric) > 1 else ""
            hint = _decimal_comma(self.paths[0], not_numeric[0])
            exclude = " ".join(json.dumps(name) for name in not_numeric[:20])
            raise InputError(
                f"{where}: column {not_numeric[0]!r}{others} holds {hint or types[not_numeric[0]]}, and an autoencoder "
                f"takes numbers. Leave it out with --data.exclude {exclude}, use it as the label with --data.label, or "
                "encode it"
            )
        if len(chosen) > MOST_COLUMNS:
            raise InputError(
                f"{where}: {len(chosen):,} columns are more than {MOST_COLUMNS:,}; save the numbers as a .npy, which "
                "array:PATH reads without names, or choose some with --data.columns"
            )
        return chosen

    def batches(self) -> Iterator[Rows]:
        """The rows, batch by batch.

        Raises:
            InputError: a row that cannot be read; names file, row and column.
        """
        names = [*self.columns, *_optional(self.label)]
        for path in self.paths:
            done = 0
            try:
                for batch in _read(path, names, self.label):
                    columns = [batch.column(i).to_numpy(zero_copy_only=False) for i in range(len(self.columns))]
                    single = all(column.dtype in (np.float32, np.float16) for column in columns)
                    values = np.stack(columns, 1, dtype=np.float32 if single else np.float64, casting="unsafe")
                    labels = (
                        None if self.label is None else np.array(batch.column(len(self.columns)).to_pylist(), object)
                    )
                    # Minimum and maximum also show NaN and infinities: one pass for all checks.
                    low, high = values.min(0, initial=np.inf), values.max(0, initial=-np.inf)
                    missing = np.zeros(len(low), np.int64)
                    if np.isnan(low).any():
                        missing = np.isnan(values).sum(0)
                        low, high = np.fmin.reduce(values, 0), np.fmax.reduce(values, 0)
                    if len(values) and (np.isinf(low).any() or np.isinf(high).any()):
                        row, column = (int(i) for i in np.argwhere(np.isinf(values))[0])
                        raise InputError(
                            f"{shown(path)}: {values[row, column]} in column {self.columns[column]!r} of row "
                            f"{done + row + 1}; numbers must be finite. Mend the row, or leave the entry empty"
                        )
                    done += len(values)
                    yield Rows(values, labels, missing, low, high)
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
                raise InputError(_explained(path, error, names, self.label)) from None


def _optional(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def table_paths(pattern: str) -> list[Path]:
    plain = expand(pattern)
    if plain.is_dir():
        paths = sorted(path for path in plain.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    elif os.path.lexists(plain):
        paths = [plain]
    else:
        paths = sorted({Path(path) for part in braces(os.fspath(plain)) for path in glob.glob(part)})
    if not paths:
        raise InputError(f"table:{shown(pattern)}: no such file, or no {', '.join(SUFFIXES)} in the folder")
    for path in paths:
        if not path.is_file():
            raise InputError(f"{shown(path)}: not a file")
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{shown(path)}: expected {', '.join(SUFFIXES)}; pandas and polars convert other formats")
    if len({_is_parquet(path) for path in paths}) > 1:
        raise InputError(f"table:{shown(pattern)}: holds both CSV and Parquet; name one kind with a pattern")
    return paths


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _pyarrow() -> Any:
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"tables need pyarrow: {install('table')}") from None
    return pyarrow


def _delimiter(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline(1 << 20)
    counts = {mark: header.count(mark) for mark in (",", ";", "\t", "|")}
    return max(counts, key=lambda mark: counts[mark]) if any(counts.values()) else ","


def column_types(path: Path) -> dict[str, str]:
    """The kind of each column of a file: ``number``, or a description of its content."""
    pa = _pyarrow()
    try:
        if _is_parquet(path):
            schema = pa.parquet.read_schema(path)
        else:
            parse = pa.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True)
            # The first megabytes determine the types; a later row of another type fails when it is read.
            with pa.csv.open_csv(path, pa.csv.ReadOptions(use_threads=False), parse) as reader:
                schema = reader.schema
    except (OSError, ValueError) as error:
        raise InputError(_explained(path, error, [], None)) from None
    repeated = (
        next((name for name in schema.names if schema.names.count(name) > 1), None)
        if len(set(schema.names)) < len(schema.names)
        else None
    )
    if repeated is not None:
        raise InputError(f"{shown(path)}: two columns are called {repeated!r}; rename one")

    def kind(field: Any) -> str:
        t = pa.types
        if (
            t.is_integer(field.type)
            or t.is_floating(field.type)
            or t.is_boolean(field.type)
            or t.is_decimal(field.type)
        ):
            return "number"
        if t.is_null(field.type):
            return "number"  # the first rows have only missing entries
        if t.is_temporal(field.type):
            return "dates or times"
        return "text" if t.is_string(field.type) or t.is_large_string(field.type) else f"values of type {field.type}"

    return {field.name: kind(field) for field in schema}


def _read(path: Path, names: list[str], label: str | None) -> Iterator[Any]:
    pa = _pyarrow()
    rows = max(1, BATCH_VALUES // max(1, len(names)))
    numbers = [name for name in names if name != label]
    if _is_parquet(path):
        # With pre_buffer, pyarrow would hold the whole file in memory.
        with pa.parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=2**20) as file:
            for batch in file.iter_batches(rows, columns=names):
                yield batch.select(names)
        return
    options = pa.csv.ConvertOptions(
        column_types={name: pa.float64() for name in numbers} | ({label: pa.string()} if label else {}),
        include_columns=names,
        strings_can_be_null=True,
    )
    parse = pa.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True)
    with pa.csv.open_csv(path, pa.csv.ReadOptions(use_threads=False, block_size=1 << 23), parse, options) as reader:
        yield from reader


def _decimal_comma(path: Path, column: str) -> str:
    """Describes a column of numbers with decimal commas; "" for any other column."""
    if _is_parquet(path):
        return ""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter=_delimiter(path))
        values = [str(row.get(column) or "").strip() for row in itertools.islice(rows, 100)]
    if values and all(re.fullmatch(r"[-+]?\d*,\d+|[-+]?\d+|", value) for value in values):
        return f"decimal commas ({next((value for value in values if ',' in value), values[0])!r} in row 1)"
    return ""


def _explained(path: Path, error: Exception, names: list[str], label: str | None) -> str:
    """One sentence about a table that cannot be read, with file, row and column if a second reading finds them."""
    if not _is_parquet(path):
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.reader(file, delimiter=_delimiter(path))
                header = next(rows, None)
                if not header:
                    return f"{shown(path)}: empty"
                for number, row in enumerate(rows, 1):
                    if row and len(row) != len(header):
                        return (
                            f"{shown(path)}: row {number} has {len(row)} entries, and the header has {len(header)}; "
                            "mend that row"
                        )
                    for name, value in zip(header, row, strict=False):
                        if name in names and name != label and not _is_number(value):
                            return (
                                f"{shown(path)}: {value[:40]!r} in column {name!r} of row {number} is no number; mend "
                                "the entry, leave it empty, or leave the column out with --data.exclude"
                            )
        except UnicodeDecodeError as bad:
            return f"{shown(path)}: not UTF-8 ({bad.reason} at byte {bad.start}); save it as UTF-8"
        except (OSError, csv.Error) as failure:
            return f"{shown(path)}: cannot be read ({failure})"
    return f"{shown(path)}: cannot be read ({ascii(first_line(error))[1:-1][:200]})"


def _is_number(text: str) -> bool:
    # pyarrow's spellings of a missing entry.
    if text.strip() in ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "#N/A", "n/a", "-NaN", "-nan", "#NA", "1.#IND"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- packing


def pack_table(table: Table, out: Path) -> dict[str, Any]:
    """Packs a table into the folder ``out``, whole or not at all, unless it is already there.

    Raises:
        InputError: rows cannot be read, there is no room, or the folder holds something else.
    """
    return packed_whole(table.identity, out, partial(_write, table))


def packed_whole(identity: str, out: Path, write: Callable[[Path], None]) -> dict[str, Any]:
    """Fills ``out`` by ``write``, whole or not at all, unless it is already there, and returns its manifest.

    Raises:
        InputError: there is no room, or the folder holds something else.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f".{out.name}.lock")):  # several processes may want the same table
            manifest = read_packed_table(out) if (out / MANIFEST).is_file() else None
            if manifest is not None and manifest.get("identity") == identity:
                return manifest
            if out.exists() and (manifest is not None or not out.is_dir() or any(out.iterdir())):
                raise InputError(f"{shown(out)} exists and holds something else: remove it, or give another name")
            temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            try:
                write(temporary)
                if out.is_dir():
                    out.rmdir()
                os.rename(temporary, out)
                sync(out.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{shown(out)}: cannot be written ({error.strerror or error}); give another place: --data.cache DIR"
        ) from None
    return read_packed_table(out)


def _write(table: Table, folder: Path) -> None:
    say(f"packing {', '.join(path.name for path in table.paths[:3])}{', …' if len(table.paths) > 3 else ''}")
    rows, missing, digest = 0, np.zeros(len(table.columns), np.int64), hashlib.sha256()
    low, high = np.full(len(table.columns), np.inf), np.full(len(table.columns), -np.inf)
    classes: dict[str, int] = {}
    numbers: list[Array] = []
    with (folder / RECORDS).open("wb") as file:
        file.write(npy_header((2**62, len(table.columns))))
        for values, labels, absent, lowest, highest in table.batches():
            missing, low, high = missing + absent, np.fmin(low, lowest), np.fmax(high, highest)
            with np.errstate(over="ignore"):  # reported below
                records = np.ascontiguousarray(values, np.float32)
            if np.fmax.reduce(np.abs([lowest, highest]), None) > LARGEST and np.isinf(records).any():
                row, column = (int(i) for i in np.argwhere(np.isinf(records))[0])
                raise InputError(
                    f"row {rows + row + 1}: {values[row, column]:g} in column {table.columns[column]!r} is beyond "
                    "float32, the type of packed records; divide the column"
                )
            digest.update(records.data)
            file.write(records.data)
            if labels is not None:
                indices = [-1 if label is None else classes.setdefault(str(label), len(classes)) for label in labels]
                numbers.append(np.array(indices, np.int64))
            rows += len(records)
        file.seek(0)
        file.write(npy_header((rows, len(table.columns))))
        file.flush()
        os.fsync(file.fileno())
    if rows < 2:
        raise InputError(f"{shown(table.paths[0])}: {rows} row{'s' if rows != 1 else ''}; at least 2 are needed")
    if numbers:
        np.save(folder / LABELS, np.concatenate(numbers), allow_pickle=False)
    manifest = {
        "format": FORMAT,
        "identity": table.identity,
        "rows": rows,
        "columns": table.columns,
        "missing": missing.tolist(),
        "low": [None if np.isinf(bound) else float(bound) for bound in low],
        "high": [None if np.isinf(bound) else float(bound) for bound in high],
        "classes": list(classes),
        "label": table.label,
        "sha256": digest.hexdigest(),
    }
    content = (json.dumps(manifest, allow_nan=False) + "\n").encode()
    if len(content) > MAX_JSON:
        raise InputError(f"{shown(table.paths[0])}: the names of its columns and classes are too long; shorten them")
    write_new(folder / MANIFEST, content)
    sync(folder)


def is_packed_table(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and not (folder / "config.json").exists()


def read_packed_table(folder: Path) -> dict[str, Any]:
    """The manifest of a packed table.

    Raises:
        InputError: there is none, or it is not ours.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        rows, columns = manifest["rows"], manifest["columns"]
        valid = (
            manifest["format"] == FORMAT and isinstance(rows, int) and rows > 1 and isinstance(manifest["sha256"], str)
        )
        shape = manifest.setdefault("shape", [len(columns)])
        valid &= isinstance(columns, list) and all(isinstance(name, str) for name in columns)
        valid &= isinstance(shape, list) and all(isinstance(side, int) and 0 < side < 2**40 for side in shape)
        valid &= manifest.setdefault("dtype", "float32") in ("uint8", "uint16", "float32")
        valid &= not columns or shape == [len(columns)]
        valid &= all(
            isinstance(manifest[key], list) and len(manifest[key]) == (len(columns) or 1)
            for key in ("missing", "low", "high")
        )
        valid &= isinstance(manifest["classes"], list)
    except (Damaged, KeyError, TypeError) as error:
        raise InputError(f"{shown(path)} is damaged ({error}); pack the table again") from None
    if not valid:
        raise InputError(f"{shown(path)} is damaged; pack the table again")
    return manifest


def open_packed_table(folder: Path) -> tuple[dict[str, Any], Array, Array | None]:
    """The manifest, the records [N, D] or [N, …], memory-mapped, and the labels [N] of a packed table.

    Raises:
        InputError: files differ from the manifest.
    """
    manifest = read_packed_table(folder)
    shape = (manifest["rows"], *manifest["shape"])
    try:
        for name in (RECORDS, LABELS) if manifest["label"] is not None else (RECORDS,):
            os.close(open_plainly(folder / name))  # no link, no pipe
        records = np.load(folder / RECORDS, mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / LABELS, allow_pickle=False) if manifest["label"] is not None else None
    except Exception as error:  # numpy raises several for a damaged file
        raise InputError(f"{shown(folder)}: damaged ({error}); pack the table again") from None
    if records.dtype != manifest["dtype"] or records.shape != shape:
        raise InputError(f"{shown(folder)}: {RECORDS} holds {records.dtype} {records.shape}, not {shape}; pack again")
    if labels is not None and (labels.dtype != np.int64 or labels.shape != shape[:1]):
        raise InputError(f"{shown(folder)}: {LABELS} is damaged; pack again")
    return manifest, records, labels


def examine_packed_table(folder: Path) -> Iterator[tuple[bool, str]]:
    """(whole, description) of each part of a packed table or array. Reads and checks every byte."""
    try:
        manifest, records, labels = open_packed_table(folder)
    except InputError as error:
        yield False, str(error)
        return
    what = f"{len(manifest['columns']):,} columns" if manifest["columns"] else f"shape {manifest['shape']}"
    yield True, f"{MANIFEST}: {manifest['rows']:,} records of {what}"
    digest = hashlib.sha256()
    step = max(1, 2**22 // max(1, records[0].nbytes))
    for start in range(0, len(records), step):
        digest.update(np.ascontiguousarray(records[start : start + step]).data)
    whole = digest.hexdigest() == manifest["sha256"]
    yield whole, RECORDS if whole else f"{RECORDS} is not what was written: its SHA-256 differs"
    if labels is not None:
        whole = bool(((labels >= -1) & (labels < len(manifest["classes"]))).all())
        yield whole, LABELS if whole else f"{LABELS} holds numbers of classes that {MANIFEST} does not name"
