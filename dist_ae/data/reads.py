"""What a command reads, and so never writes to: the one place that decides where a command may write."""

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
    """The files and folders that a name of images stands for; none for a named data set, or where nothing is there."""
    try:
        name = with_prefix(name)
        prefix, colon, path = name.partition(":")
        if prefix == "packed":
            return packed_sets(path)
        if prefix == "tar" or (prefix == "table" and not expand(path).exists()):
            return [Path(found) for part in braces(os.fspath(expand(path))) for found in glob.glob(part)]
        return [expand(path)] if colon else []
    except InputError:  # whoever reads it says so
        return []


class Reads:
    """All that a command reads: the images it is given, the data of its run, wherever it lies, and the run's records.

    ``refuse`` is asked before anything is computed, and again for every single file before one is moved into a folder.
    """

    def __init__(
        self,
        given: Path | str | None = None,
        config: DataConfig | None = None,
        records: Iterable[Path] = (),
        also: Iterable[Path | None] = (),
    ) -> None:
        """Args:
        given: the images that the command is given.
        config: the data of the run.
        records: files and folders of the run itself.
        also: other files and folders that the command reads.
        """
        self._given = [] if given is None else [_real(path) for path in places(os.fspath(given))]
        own = [] if config is None else places(config.name)
        if config is not None:
            own += [] if config.root is None else [config.root]
            cache = expand(config.cache) if config.cache else cache_folder()
            if config.name.startswith((*PREFIXES, "table:")):
                own.append(cache / ("tables" if config.name.startswith("table:") else "packed"))
        self._own = [_real(path) for path in own]
        self._records = [_real(path) for path in (*records, *(path for path in also if path is not None))]
        files = [path for path in (*self._given, *self._own, *self._records) if path.is_file()]
        self._inodes = {(found.st_dev, found.st_ino): path for path in files for found in [path.stat()]}

    def refuse(self, target: Path, option: str, folder: bool = False, usual: bool = False) -> None:
        """Raises InputError where writing ``target`` would change something that is read, or go through a link.

        Args:
            option: what named the target, for the message.
            folder: pictures are to be written into it.
            usual: nobody named it: it is the usual place, in the run. A run may lie in the folder of its data.
        """
        if os.path.islink(target):
            raise InputError(f"{option} {shown(target)} is a link, and nothing is written through one: name the place")
        real = _real(target)
        for path in (*self._given, *self._own, *self._records):
            same = real == path or (folder and path in self._given and path.is_file() and real == path.parent)
            if same or (real.is_file() and self._inodes.get(_inode(real)) == path):
                what = "the images it is made of" if path not in self._records else "what it is made of"
                raise InputError(f"{option} {shown(target)} would replace {what}: give it another name")
            if path in real.parents and not (usual and path in self._own):
                raise InputError(
                    f"{option} {shown(target)} lies in {shown(path)}, which this command reads: choose another folder"
                )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
