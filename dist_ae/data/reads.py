"""The paths that a command reads, and so must not write: the one place that decides where a command may write."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from dist_ae.config import DataConfig, InputError
from dist_ae.data.named import cache_folder
from dist_ae.data.names import with_prefix
from dist_ae.data.packed import packed_sets
from dist_ae.data.pictures import PREFIXES, braces, expand, shown


def places(name: str) -> list[Path]:
    """The files and folders that a name of images stands for; none for a named data set, or if nothing exists."""
    try:
        name = with_prefix(name)
        prefix, colon, path = name.partition(":")
        if prefix == "packed":
            return packed_sets(path)
        if prefix == "tar" or (prefix == "table" and not expand(path).exists()):
            return [Path(match) for part in braces(os.fspath(expand(path))) for match in glob.glob(part)]
        return [expand(path)] if colon else []
    except InputError:  # its reader reports the error
        return []


class Reads:
    """The paths that a command reads: the given images, the data of its run, and the run's records.

    ``refuse`` is called before anything is computed, and again for every file before any is moved into a folder.
    """

    def __init__(
        self,
        given: Path | str | None = None,
        config: DataConfig | None = None,
        records: Iterable[Path] = (),
        also: Iterable[Path | None] = (),
    ) -> None:
        """Args:
        given: the images given to the command.
        config: the data of the run.
        records: files and folders of the run itself.
        also: other files and folders that the command reads.
        """
        self._given = [] if given is None else [_real(path) for path in places(os.fspath(given))]
        data = [] if config is None else places(config.name)
        if config is not None:
            data += [] if config.root is None else [config.root]
            cache = expand(config.cache) if config.cache else cache_folder()
            if config.name.startswith((*PREFIXES, "table:")):
                data.append(cache / ("tables" if config.name.startswith("table:") else "packed"))
        self._data = [_real(path) for path in data]
        self._records = [_real(path) for path in (*records, *(path for path in also if path is not None))]
        files = [path for path in (*self._given, *self._data, *self._records) if path.is_file()]
        self._inodes = {_inode(path): path for path in files}

    def refuse(self, target: Path, option: str, folder: bool = False, usual: bool = False) -> None:
        """Raises InputError if writing ``target`` would change a path that is read, or go through a link.

        Args:
            option: the option that named the target, for the message.
            folder: pictures are to be written into it.
            usual: it is the default path, in the run. A run may lie in the folder of its data.
        """
        if os.path.islink(target):
            raise InputError(
                f"{option} {shown(target)} is a link, and nothing is written through links: name its target"
            )
        real = _real(target)
        for path in (*self._given, *self._data, *self._records):
            same = real == path or (folder and path in self._given and path.is_file() and real == path.parent)
            if same or (real.is_file() and self._inodes.get(_inode(real)) == path):
                what = "the images it is made of" if path not in self._records else "what it is made of"
                raise InputError(f"{option} {shown(target)} would replace {what}: give it another name")
            if path in real.parents and not (usual and path in self._data):
                raise InputError(
                    f"{option} {shown(target)} lies in {shown(path)}, which this command reads: choose another folder"
                )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _inode(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
