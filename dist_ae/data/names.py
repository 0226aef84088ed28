"""The names of sources of images: a kind and a path, a bare path, or a named data set."""

from __future__ import annotations

import os

from dist_ae.config import InputError
from dist_ae.data.named import IDX
from dist_ae.data.packed import MANIFEST
from dist_ae.data.pictures import PREFIXES, expand
from dist_ae.data.tables import SUFFIXES, is_packed_table

NAMES = ("digits", "photos", "cifar10", *IDX)
IN_A_PATH = (*PREFIXES, "packed:", "array:", "table:")  # names that contain a path


def with_prefix(name: str) -> str:
    """Puts its kind in front of a bare path: folder, packed, table, array or tar. Other names are unchanged."""
    if name in ("", *IN_A_PATH):
        raise InputError(f"{name!r} names no images; is a shell variable empty?")
    if name in NAMES or name.startswith(IN_A_PATH):
        return name
    path = expand(name)
    if os.path.isdir(path):
        return f"{'packed' if (path / MANIFEST).is_file() or is_packed_table(path) else 'folder'}:{name}"
    if os.path.exists(path) and path.suffix.lower() in SUFFIXES:
        return f"table:{name}"
    if os.path.exists(path):
        return f"{'tar' if name.endswith(('.tar', '.tar.gz', '.tgz')) else 'array'}:{name}"
    return name


def absolute(name: str) -> str:
    """Makes the path in a name absolute, so that it is valid in any working folder. Other names are unchanged."""
    name = with_prefix(name)
    prefix, _, path = name.partition(":")
    is_path = prefix in ("folder", "tar", "packed", "array", "table") or (prefix == "hf" and expand(path).is_dir())
    return f"{prefix}:{os.path.abspath(expand(path))}" if path and is_path else name
