"""Files that are written whole or not at all, and whose content is never trusted when they are read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 20  # bytes. Ours are a few KB; a larger file was not written here and is not parsed
MAX_LINES = 1 << 30  # bytes of metrics.jsonl: some five million lines
# Windows has none of the first two, and without the third would translate the ends of lines.
_PLAINLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Damaged(Exception):
    """A file that is not what was written. The message says which one and what is wrong with it."""


# -- writing


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not exist yet, and syncs its content."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAINLY, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Syncs a folder's names or a file's content; on Windows, which opens no folder, it does nothing."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other writer uses, short enough wherever the path's own name is allowed."""
    return path.with_name(f".{secrets.token_hex(6)}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file. Whenever the machine stops, either the old content or the new one is there, whole.

    Any number of threads and processes may write the same file: one of the contents stays. Where a link lies there,
    the link is replaced, and not what it leads to.
    """
    temporary = temporary_beside(path)
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def clear_temporaries(folder: Path) -> None:
    """Removes what killed writers left in a folder. Only whoever holds the folder's lock may call this."""
    for path in folder.iterdir():
        if re.fullmatch(r"\.[0-9a-f]{12}\.tmp", path.name):
            path.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> int:
    """Adds to a regular file, made if it is not there. Returns how many bytes the disk took.

    Raises:
        Damaged: a link, a pipe or a folder lies there.
        OSError: the disk takes nothing.
    """
    try:
        descriptor = _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise Damaged(f"{path.parent.name}/{path.name}: not a regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Damaged(f"{path.parent.name}/{path.name}: not a regular file")
        return os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _opened(path: Path, flags: int) -> int:
    """A descriptor. Raises OSError, ELOOP of a link."""
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return os.open(path, flags | _PLAINLY, 0o644)


def plain_name(path: str) -> str:
    """The last name of a path or pattern, without characters that are special to a shell."""
    return re.sub(r"[^\w.-]+", "-", path.rstrip("/").rpartition("/")[2].rpartition(":")[2]).strip("-.")


def to_json(value: Any, indent: int | None = 2) -> bytes:
    """A value as JSON that every program reads: what is not finite, for which JSON has no word, becomes null."""
    return (json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- reading


def inside(folder: Path, *names: str) -> Path:
    """A path below a folder that a stranger may have made: no part of it, where it exists, is a link.

    The folder itself may be one; its user named it.

    Raises:
        Damaged: naming the link, or what lies where a folder belongs.
    """
    path = folder
    for place, name in enumerate(names):
        path = path / name
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(path).st_mode
            where = f"{folder.name}/{path.relative_to(folder)}"
            if stat.S_ISLNK(mode):
                raise Damaged(f"{where}: a symbolic link")
            if place < len(names) - 1 and not stat.S_ISDIR(mode):
                raise Damaged(f"{where}: not a folder")
    return path


def folder_inside(folder: Path, *names: str) -> Path:
    """Such a path as a folder, made where it is not there.

    Raises:
        Damaged: a link or something other than a folder lies there.
    """
    path = inside(folder, *names)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        raise Damaged(f"{folder.name}/{'/'.join(names)}: not a folder") from None
    return path


def files_inside(folder: Path, name: str, pattern: str) -> Iterator[Path]:
    """The regular files of a sub-folder whose whole names match a regular expression, sorted.

    None where the sub-folder is a link or not there.
    """
    with contextlib.suppress(Damaged, OSError):
        for path in sorted(inside(folder, name).iterdir()):
            if re.fullmatch(pattern, path.name) and stat.S_ISREG(os.lstat(path).st_mode):
                yield path


def open_plainly(path: Path) -> int:
    """A descriptor of a regular file. A link is not followed, and a pipe does not block.

    Raises:
        Damaged: it is missing, or something other than a file.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        descriptor = _opened(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        link = isinstance(error, OSError) and error.errno == errno.ELOOP
        raise Damaged(f"{where}: {'a symbolic link' if link else getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{where}: not a regular file")
    return descriptor


def read_bounded(path: Path, limit: int) -> bytes:
    """A regular file of at most ``limit`` bytes.

    Raises:
        Damaged: it is missing, something other than a file, or larger.
    """
    with os.fdopen(open_plainly(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise Damaged(f"{path.parent.name}/{path.name}: {size} bytes, more than the {limit} it can have")
        try:
            return file.read()
        except OSError as error:
            raise Damaged(f"{path.parent.name}/{path.name}: {error.strerror}") from None


def verify_file(path: Path, size: object, sha256: object) -> int:
    """The size of a regular file, once its size and SHA-256 are found to be as given. Reads it in pieces.

    Raises:
        Damaged: it has another size or SHA-256.
    """
    where = f"{path.parent.name}/{path.name}"
    with os.fdopen(open_plainly(path), "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise Damaged(f"{where}: {found} bytes, not the {size} it should have")
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise Damaged(f"{where}: its SHA-256 is not what was written")
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook. Raises Damaged where a key stands twice, of which json would drop the first silently."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Damaged("a key stands in it twice")
    return made


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Damaged: anything else, also an object that is nested too deeply to parse or has a key twice.
    """
    try:
        value = json.loads(data, object_pairs_hook=unique_keys)
    except Damaged as error:
        raise Damaged(f"{name}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: not JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{name}: not a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        Damaged: it cannot be read, or is something other than a JSON object.
    """
    return parse_json(read_bounded(path, MAX_JSON), f"{path.parent.name}/{path.name}")
