"""Writes files whole or not at all, and reads them without trusting their content."""

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

MAX_JSON = 1 << 20  # bytes. Ours are a few KB; a larger file is not ours and is not parsed
MAX_LINES = 1 << 30  # bytes of metrics.jsonl: some five million lines
# Windows lacks the first two flags, and would translate line ends without the third.
_PLAINLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Damaged(Exception):
    """A file that is not as it was written. The message names the file and what is wrong with it."""


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
    """A name in the same folder that no other writer uses, short enough for any file system."""
    return path.with_name(f".{secrets.token_hex(6)}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file. Whenever the machine stops, the file has either the old content or the new one.

    Any number of threads and processes may write the same file: one of the contents stays. If the path is a link, the
    link itself is replaced, not its target.
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
    """Removes temporary files of killed writers. Only the holder of the folder's lock may call this."""
    for path in folder.iterdir():
        if re.fullmatch(r"\.[0-9a-f]{12}\.tmp", path.name):
            path.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> int:
    """Appends to a regular file, which is created if it does not exist. Returns how many bytes were written.

    Raises:
        Damaged: the path is a link, a pipe or a folder.
        OSError: nothing could be written.
    """
    try:
        descriptor = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
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


def _open(path: Path, flags: int) -> int:
    """A file descriptor. Raises OSError; for a link, its number is ELOOP."""
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return os.open(path, flags | _PLAINLY, 0o644)


def plain_name(path: str) -> str:
    """The last name of a path or pattern, without characters that are special to a shell."""
    return re.sub(r"[^\w.-]+", "-", path.rstrip("/").rpartition("/")[2].rpartition(":")[2]).strip("-.")


def to_json(value: Any, indent: int | None = 2) -> bytes:
    """A value as JSON that every program can read: numbers that are not finite, which JSON lacks, become null."""
    return (json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- reading


def inside(folder: Path, *names: str) -> Path:
    """A path below a folder that a stranger may have made: no existing part of it is a link.

    The folder itself may be a link; the user named it.

    Raises:
        Damaged: naming the link, or a parent that is no folder.
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
    """A path from ``inside`` as a folder, which is created if it does not exist.

    Raises:
        Damaged: the path exists and is no folder.
    """
    path = inside(folder, *names)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        raise Damaged(f"{folder.name}/{'/'.join(names)}: not a folder") from None
    return path


def files_inside(folder: Path, name: str, pattern: str) -> Iterator[Path]:
    """The regular files of a sub-folder whose whole names match a regular expression, sorted.

    Empty if the sub-folder is a link or does not exist.
    """
    with contextlib.suppress(Damaged, OSError):
        for path in sorted(inside(folder, name).iterdir()):
            if re.fullmatch(pattern, path.name) and stat.S_ISREG(os.lstat(path).st_mode):
                yield path


def open_plainly(path: Path) -> int:
    """A file descriptor of a regular file. Links are not followed, and pipes do not block.

    Raises:
        Damaged: the file is missing, or no regular file.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        descriptor = _open(path, os.O_RDONLY)
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
        Damaged: it is missing, no regular file, or larger.
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
    """Checks size and SHA-256 of a regular file, reading it in pieces, and returns its size.

    Raises:
        Damaged: it has another size or SHA-256.
    """
    where = f"{path.parent.name}/{path.name}"
    with os.fdopen(open_plainly(path), "rb") as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            raise Damaged(f"{where}: {actual} bytes, not the {size} it should have")
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise Damaged(f"{where}: its SHA-256 is not what was written")
    return actual


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook. Raises Damaged for a repeated key, of which json would silently drop the first."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise Damaged("it repeats a key")
    return unique


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Damaged: anything else, also an object that is nested too deeply or repeats a key.
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
        Damaged: it cannot be read, or is no JSON object.
    """
    return parse_json(read_bounded(path, MAX_JSON), f"{path.parent.name}/{path.name}")
