"""Every source of images by its name."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path

from dist_ae.config import Config, DataConfig, InputError
from dist_ae.data import named
from dist_ae.data.arrays import array_dataset, handed_dataset
from dist_ae.data.crops import cropped
from dist_ae.data.memory import NAME
from dist_ae.data.names import IN_A_PATH, absolute, with_prefix
from dist_ae.data.pack import cached
from dist_ae.data.packed import left_pages, of_16_bits, packed_dataset, packed_sets, read_manifest
from dist_ae.data.pictures import PREFIXES, expand, open_source, shown
from dist_ae.data.records import Dataset, Split, fingerprint
from dist_ae.data.scaling import scaling_of
from dist_ae.data.tables import Table, is_packed_table, open_packed_table, pack_table
from dist_ae.files import plain_name
from dist_ae.terminal import rank, say

NAMED: dict[str, Callable[[DataConfig], tuple[Split, Split]]] = {
    "digits": named.digits,
    "photos": named.photos,
    "cifar10": named.cifar10,
    **dict.fromkeys(named.IDX, named.idx_dataset),
}


def load(config: DataConfig) -> Dataset:
    """The dataset that a configuration names. Pictures that are not packed yet are packed into the cache first.

    Raises:
        InputError: an unknown name, no source found (naming all places tried and the ways out), or a damaged file.
    """
    if config.name == NAME:
        raise InputError(
            "the images of this run were handed over from Python (data=...): pass them again, or save them (with "
            "numpy.save, or a pair with numpy.savez, train= and val=) and name the file: --data.root images.npy"
        )
    name = with_prefix(config.name)
    if config.root is not None and name.startswith(IN_A_PATH):
        raise InputError(
            f"data.root is the folder of a named data set such as fashion_mnist, and {shown(name)} contains its own "
            "path; leave data.root out, and if the images have moved, put their new path into data.name"
        )
    if name.startswith(PREFIXES):
        packed = cached(name, open_source(name, config), config, _cache(config))
        return _pictures(shown(name), [packed], config)
    if name.startswith("packed:"):
        sets = packed_sets(name.removeprefix("packed:"))
        if len(sets) == 1 and is_packed_table(sets[0]):
            return packed_table_dataset(shown(name), sets[0], config)
        return _pictures(shown(name), sets, config)
    if config.include and name.startswith("table:"):
        raise InputError(
            "data.include chooses among the pictures of a folder; --data.columns chooses columns of a table"
        )
    of_photos = ("image_size", "channels") if name == "photos" else ()
    _refuse_settings(config, but=("exclude",) if name.startswith("table:") else of_photos)
    if name.startswith("table:"):
        table = Table(name.removeprefix("table:"), config)
        out = _cache(config) / "tables" / f"{plain_name(shown(name))[:40] or 'table'}-{table.identity[:16]}"
        pack_table(table, out)
        return packed_table_dataset(shown(name), out, config)
    if name.startswith("array:"):
        return array_dataset(expand(name.removeprefix("array:")), config)
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"unknown dataset {shown(name)!r}: {hint}expected {', '.join(NAMED)}, folder:PATH, tar:PATTERN, hf:NAME, "
            "table:PATH, packed:PATH, array:PATH, or the path of a folder, array file, table or packed set"
        )
    if config.fold is not None:
        raise InputError(f"data.folds divides tables, arrays and pictures, and {name} has a split of its own")
    if config.root is not None and not config.root.is_dir():
        raise InputError(f"data root {shown(config.root)} does not exist or is not a folder")
    train, val = NAMED[name](config)
    if train.images.shape[1:] != val.images.shape[1:]:
        raise InputError(
            f"{name}: training images {train.images.shape[1:]} and "
            f"test images {val.images.shape[1:]} have different shapes"
        )
    return _cropped_and_scaled(
        Dataset(name, train, val, fingerprint(train, val), classes=named.CLASSES.get(name, ())), config
    )


def _cache(config: DataConfig) -> Path:
    return expand(config.cache) if config.cache else named.cache_folder()


def packed_table_dataset(name: str, folder: Path, config: DataConfig) -> Dataset:
    """The rows of a packed table, memory-mapped; a share of them is held out."""
    manifest, records, labels = open_packed_table(folder)
    # The range was computed when the table was packed. If entries are missing and may not be, the pass over the records
    # is made all the same, since it names their place.
    present = [bound for bound in (*manifest["low"], *manifest["high"]) if isinstance(bound, float | int)]
    known = (
        (min(present), max(present)) if present and (config.missing == "mask" or not any(manifest["missing"])) else None
    )
    return handed_dataset(
        name,
        ((records, labels),),
        config,
        name,
        columns=manifest["columns"],
        classes=manifest["classes"],
        digest=manifest["sha256"],
        known=known,
    )


def _pictures(name: str, folders: list[Path], config: DataConfig) -> Dataset:
    dataset = packed_dataset(name, folders, config, config.val_fraction)
    for manifest in map(read_manifest, folders):
        for note in (of_16_bits(manifest, config.scale), left_pages(manifest)):
            if note and rank() == 0:
                say(f"note: {name}: {note}", sys.stderr)
    return _cropped_and_scaled(dataset, config)


def _cropped_and_scaled(dataset: Dataset, config: DataConfig) -> Dataset:
    """Applies crops and scale to pictures, if they are asked for."""
    dataset = cropped(dataset, config)
    scaling = scaling_of(dataset.train, config.scale, missing=False)
    if scaling is None:
        return dataset
    return dataset.with_scaling(scaling, "standard" if scaling.standardized else "range")


def located(config: Config, root: Path | None) -> Config:
    """A run's configuration with the place of its data on this machine.

    Args:
        root: the folder of a named data set's files; else any source of the same images, such as a folder or a packed
            set. None: the data is where it was during training.
    """
    if root is None:
        return config
    if config.data.name in NAMED:
        return config.override({"data.root": root})
    name, kind = with_prefix(str(root)), config.data.name.partition(":")[0]
    if not name.startswith(IN_A_PATH) and f"{kind}:" in IN_A_PATH:
        name = f"{kind}:{name}"
    return config.override({"data.name": absolute(name), "data.root": None})


def _refuse_settings(config: DataConfig, but: tuple[str, ...]) -> None:
    for key in ("image_size", "fit", "channels", "background", "group", "budget", "include", "exclude"):
        if getattr(config, key) not in (None, ()) and key not in but:
            raise InputError(
                f"data.{key} is for pictures (folder:, tar:, hf: and photos), "
                f"and {shown(config.name)} is none; leave it out"
            )
