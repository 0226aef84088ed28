"""Files that are written whole or not at all, and whose content is never trusted when they are read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 20  # bytes. Ours are a few KB; a larger file was not written here and is not parsed


class Damaged(Exception):
    """A file that is not what was written. The message says which one and what is wrong with it."""


# -- writing


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not exist yet, and syncs its content."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Syncs a folder's names or a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file. Whenever the machine stops, either the old content or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def plain_name(path: str) -> str:
    """The last name of a path or pattern, without characters that are special to a shell."""
    return re.sub(r"[^\w.-]+", "-", path.rstrip("/").rpartition("/")[2].rpartition(":")[2]).strip("-.")


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=True) + "\n").encode()


# -- reading


def open_plainly(path: Path) -> int:
    """A descriptor of a regular file. A link is not followed, and a pipe does not block.

    Raises:
        Damaged: it is missing, or something other than a file.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
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


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Damaged: anything else, also an object that is nested too deeply to parse or has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise Damaged(f"{name}: a key stands in it twice")
        return keys

    try:
        value = json.loads(data, object_pairs_hook=once)
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
