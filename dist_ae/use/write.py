"""Writes the output of commands: checks paths before anything is computed, and leaves nothing half-written."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dist_ae.config import InputError
from dist_ae.data import deep
from dist_ae.data.given import Given
from dist_ae.data.pictures import expand, shown
from dist_ae.data.reads import Reads
from dist_ae.data.records import Array
from dist_ae.errors import install
from dist_ae.files import Damaged, inside
from dist_ae.run.directory import FILES, FOLDERS
from dist_ae.saved import EXPORTED_WEIGHTS
from dist_ae.use.trained import TrainedModel

SHOWN = 12  # images in a picture of reconstructions, as in the run's own picture


def reads_of(run_dir: Path, trained: TrainedModel, images: Path | str | None = None, *also: Path | None) -> Reads:
    """All paths that a command on a run reads. ``also``: further files and folders."""
    return Reads(images, trained.config.data, (run_dir / name for name in (*FILES, *FOLDERS, EXPORTED_WEIGHTS)), also)


def destination(
    reads: Reads,
    run_dir: Path,
    out: Path | None,
    name: str,
    suffixes: tuple[str, ...],
    option: str = "--out",
    beside: tuple[str, ...] = (),
) -> Path:
    """The path to write: ``out``, else ``name`` in the run. The suffix "" stands for a folder.

    Args:
        beside: endings of further files that are written, see ``with_ending``.

    Raises:
        InputError: the path cannot be written, or the command reads from it. Raised before anything is computed.
    """
    if out is None:
        for target in (run_dir / name, *(with_ending(run_dir / name, ending) for ending in beside)):
            reads.refuse(target, option, usual=True)
        return run_dir / name
    out = expand(out)
    if out.name in ("", ".."):  # such as `.`, which has no parent to write a temporary file to
        out = out.resolve()
    like_folder = not out.suffix or suffixes == ("",) or (os.path.isdir(out) and out.suffix not in suffixes)
    folder = "" in suffixes and like_folder
    if out.suffix not in suffixes and not folder:
        names = " or ".join(suffix for suffix in suffixes if suffix)
        raise InputError(
            f"{option} {shown(out)}: expected a name that ends in {names}{', or a folder' if '' in suffixes else ''}"
        )
    above = next(path for path in out.absolute().parents if os.path.lexists(path))  # folders below it are created
    if not os.path.isdir(above):
        raise InputError(f"{option} {shown(out)}: {shown(above)} is no folder, so nothing can be written below it")
    if os.path.isdir(out) and not folder:
        raise InputError(f"{option} {shown(out)} is a folder: name a file in it")
    if folder and os.path.exists(out) and not os.path.isdir(out):
        file = ", or a file that ends in .npy or .png" if len(suffixes) > 1 else ""
        raise InputError(f"{option} {shown(out)} is a file: name a folder{file}")
    reads.refuse(out, option, folder)
    for ending in beside:
        reads.refuse(with_ending(out, ending), option)
    return out


def with_ending(out: Path, ending: str) -> Path:
    """The name of a file next to ``out``: scores.csv and "-roc.png" give scores-roc.png."""
    return out.with_name(f"{out.stem}{ending}")


def write_whole(out: Path, fill: Callable[[Path], object]) -> Path:
    """Writes under a temporary name next to ``out`` and renames, so that ``out`` is never half a file."""
    temporary = out.with_name(f".{secrets.token_hex(6)}.tmp{out.suffix}")  # some writers go by the suffix
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        if temporary.exists():
            os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"{shown(out)} cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
    return out


def write_into(out: Path, fill: Callable[[Path], object], reads: Reads, option: str = "--out") -> Path:
    """Writes files into a folder: all of them, or none. Other files in it stay.

    Raises:
        InputError: one of them would replace a folder or something that is read, or go through a link.
    """

    def move(temporary: Path) -> None:
        temporary.mkdir()
        fill(temporary)
        if out.exists():
            targets = {
                path: out / path.relative_to(temporary) for path in sorted(temporary.rglob("*")) if path.is_file()
            }
            refuse_targets(out, targets.values(), reads, option)
            for path, target in targets.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            shutil.rmtree(temporary)

    return write_whole(out, move)


def refuse_targets(out: Path, targets: Iterable[Path], reads: Reads, option: str) -> None:
    """Checks all files that are to be written into a folder, before the first one is written.

    Raises:
        InputError: one of them would replace a folder or something that is read, or go through a link.
    """
    for target in targets if out.exists() else ():
        try:
            inside(out, *target.relative_to(out).parts)
        except Damaged as error:
            raise InputError(f"{option} {shown(out)}: {error}; choose another folder") from None
        reads.refuse(target, option)
        if target.is_dir():
            raise InputError(f"{option} {shown(target)} is a folder: choose another one")


def write_array(out: Path, values: Tensor) -> Path:
    return write_whole(out, lambda path: np.save(path, values.numpy(), allow_pickle=False))


def write_images(out: Path, images: Tensor, columns: int) -> Path:
    """Writes images [..., C, H, W] as they are to .npy, or as a grid to .png."""
    if out.suffix == ".npy":
        return write_array(out, images)

    def draw(path: Path) -> None:
        from dist_ae.figures import image_grid

        image_grid(images.reshape(-1, *images.shape[-3:]), path, columns)

    return write_whole(out, draw)


def write_folder(out: Path, images: Iterable[tuple[Path, Array]], reads: Reads) -> Path:
    """Writes images [C, H, W] of uint8 or uint16 under their names: all of them, or none."""

    def fill(folder: Path) -> None:
        for name, image in images:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if image.dtype == np.uint16:
                target.write_bytes(deep.png(image) if target.suffix == ".png" else deep.tiff(image))
                continue
            pixels = image.transpose(1, 2, 0)
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(target)

    return write_into(out, fill, reads)


def write_table(out: Path, records: Given, columns: Mapping[str, Tensor | Sequence[str]]) -> Path:
    """Writes values of records to .csv or .parquet, with the images' paths, or row numbers if they have no names.

    Args:
        columns: numbers or text, by column name.
    """
    paths = [str(row) for row in range(len(records.split))] if records.names is None else records.names
    first = "row" if records.units is not None and records.names is None else "path"
    values = {name: cells.tolist() if isinstance(cells, Tensor) else list(cells) for name, cells in columns.items()}
    if out.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InputError(f"--out {shown(out)} needs pyarrow: {install('parquet')}; or write .csv") from None
        plain = {name: cells.numpy() if isinstance(cells, Tensor) else list(cells) for name, cells in columns.items()}
        keys = list(range(len(paths))) if records.names is None else [shown(path) for path in paths]
        named = {first: keys if first == "row" else list(map(str, keys)), **plain}
        return write_whole(out, lambda path: pyarrow.parquet.write_table(pyarrow.table(named), path))

    def fill(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow([first, *map(_harmless, columns)])
            rows = zip(map(_harmless, paths), *values.values(), strict=True)
            table.writerows(rows)

    return write_whole(out, fill)


def _harmless(path: str) -> str:
    """A relative path that no spreadsheet takes for a formula: the same path with ``./`` in front."""
    return f"./{path}" if re.match(r"[=+\-@\t\r]", path) else path
