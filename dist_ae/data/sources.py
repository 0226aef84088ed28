"""Every source of images by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dist_ae.config import DataConfig, InputError
from dist_ae.data import named
from dist_ae.data.arrays import array_dataset
from dist_ae.data.given import NAME
from dist_ae.data.records import Dataset, Split, fingerprint


def load(config: DataConfig) -> Dataset:
    """The dataset a configuration names.

    Raises:
        InputError: an unknown name; no source found (every place tried, each way out); a file that is not what it should be.
    """
    if config.name.startswith("array:"):
        return array_dataset(Path(config.name.removeprefix("array:")).expanduser(), config.val_fraction)
    if config.name == NAME:
        raise InputError("the images of this run were handed over from Python (data=...): give them again")
    sources: dict[str, Callable[[DataConfig], tuple[Split, Split]]] = {
        "digits": named.digits,
        "cifar10": named.cifar10,
        **dict.fromkeys(named.IDX, named.idx_dataset),
    }
    if config.name not in sources:
        raise InputError(f"unknown dataset {config.name!r}: expected {', '.join(sources)} or array:PATH")
    if config.root is not None and not config.root.is_dir():
        raise InputError(f"data root {config.root} does not exist or is not a folder")
    train, val = sources[config.name](config)
    return Dataset(config.name, train, val, fingerprint(train, val))
