"""Every source of images by its name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from dist_ae.config import Config, DataConfig, InputError
from dist_ae.data import named
from dist_ae.data.arrays import array_dataset
from dist_ae.data.memory import NAME
from dist_ae.data.pack import cached
from dist_ae.data.packed import MANIFEST, packed_dataset, packed_sets
from dist_ae.data.pictures import PREFIXES, expand, open_source, shown
from dist_ae.data.records import Dataset, Split, fingerprint

NAMED: dict[str, Callable[[DataConfig], tuple[Split, Split]]] = {
    "digits": named.digits,
    "photos": named.photos,
    "cifar10": named.cifar10,
    **dict.fromkeys(named.IDX, named.idx_dataset),
}
IN_A_PATH = (*PREFIXES, "packed:", "array:")  # what says itself where it lies


def load(config: DataConfig) -> Dataset:
    """The dataset that a configuration names. Pictures that are not packed yet are packed into the cache first.

    Raises:
        InputError: an unknown name, no source found (naming every place tried and each way out), or a file that is not
            what it should be.
    """
    if config.name == NAME:
        raise InputError("the images of this run were handed over from Python (data=...): give them again")
    name = with_prefix(config.name)
    if config.root is not None and name.startswith(IN_A_PATH):
        raise InputError(
            f"data.root is the folder of a named data set such as fashion_mnist, and {shown(name)} says itself where "
            "it lies; leave it out, and where the images have moved, put their new place into data.name"
        )
    if name.startswith(PREFIXES):
        packed = cached(name, open_source(name), config, expand(config.cache) if config.cache else named.cache_folder())
        return packed_dataset(shown(name), [packed], config, config.val_fraction)
    if name.startswith("packed:"):
        sets = packed_sets(name.removeprefix("packed:"))
        return packed_dataset(shown(name), sets, config, config.val_fraction)
    _refuse_settings(config, but=("image_size", "channels") if name == "photos" else ())
    if name.startswith("array:"):
        return array_dataset(expand(name.removeprefix("array:")), config.val_fraction)
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"unknown dataset {shown(name)!r}: {hint}expected {', '.join(NAMED)}, folder:PATH, tar:PATTERN, hf:NAME, "
            "packed:PATH, array:PATH, or the path of a folder, array file or packed set"
        )
    if config.root is not None and not config.root.is_dir():
        raise InputError(f"data root {shown(config.root)} does not exist or is not a folder")
    train, val = NAMED[name](config)
    if train.images.shape[1:] != val.images.shape[1:]:
        raise InputError(
            f"{name}: training images {train.images.shape[1:]} and "
            f"test images {val.images.shape[1:]} have differing shapes"
        )
    return Dataset(name, train, val, fingerprint(train, val), classes=named.CLASSES.get(name, ()))


def located(config: Config, root: Path | None) -> Config:
    """A run's configuration with its data where it lies on this machine.

    Args:
        root: of a named data set, the folder of its files; else any source of the same images, such as a folder or a
            packed set. None leaves the data where the run found it.
    """
    if root is None:
        return config
    if config.data.name in NAMED or config.data.name == NAME:
        return config.override({"data.root": root})
    name, before = with_prefix(str(root)), config.data.name.partition(":")[0]
    if not name.startswith(IN_A_PATH) and f"{before}:" in IN_A_PATH:
        name = f"{before}:{name}"
    return config.override({"data.name": absolute(name), "data.root": None})


def with_prefix(name: str) -> str:
    """A bare path with its kind in front: folder, packed, array or tar. Any other name is returned as it is."""
    if name in ("", *IN_A_PATH):
        raise InputError(f"{name!r} names no images; is a variable of the shell empty?")
    if name in NAMED or name.startswith(IN_A_PATH):
        return name
    path = expand(name)
    if os.path.isdir(path):
        return f"{'packed' if (path / MANIFEST).is_file() else 'folder'}:{name}"
    if os.path.exists(path):
        return f"{'tar' if name.endswith(('.tar', '.tar.gz', '.tgz')) else 'array'}:{name}"
    return name


def absolute(name: str) -> str:
    """A name that means the same in any working folder: paths are made absolute, other names stay as they are."""
    name = with_prefix(name)
    prefix, _, path = name.partition(":")
    is_path = prefix in ("folder", "tar", "packed", "array") or (prefix == "hf" and expand(path).is_dir())
    return f"{prefix}:{os.path.abspath(expand(path))}" if path and is_path else name


def _refuse_settings(config: DataConfig, but: tuple[str, ...]) -> None:
    for key in ("image_size", "fit", "channels", "background"):
        if getattr(config, key) is not None and key not in but:
            raise InputError(
                f"data.{key} is about pictures (folder:, tar:, hf: and photos), "
                f"and {shown(config.name)} is none; leave it out"
            )
