"""Brings a user's records for a trained model (files, folders, arrays, tensors, pictures) into one form."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_ae.config import DataConfig, InputError
from dist_ae.data.arrays import NOISY_RANGE, as_array, read_array, typed, value_range
from dist_ae.data.decode import decoded
from dist_ae.data.deep import widened
from dist_ae.data.facts import Facts
from dist_ae.data.form import Form, examined, reason
from dist_ae.data.layout import Layout, fitted, named
from dist_ae.data.memory import frame_values
from dist_ae.data.names import with_prefix
from dist_ae.data.pack import refuse_unreadable
from dist_ae.data.packed import open_packed, packed_names, packed_sets, read_manifest
from dist_ae.data.pictures import (
    EXTENSIONS,
    PREFIXES,
    Picture,
    colour_of,
    expand,
    form_of,
    left_out,
    not_there,
    of_others,
    open_source,
    paged,
    pages_of,
    shown,
)
from dist_ae.data.reader import SHARE_OF_MEMORY, free_memory
from dist_ae.data.records import Array, Shards, Split, at_once, span
from dist_ae.data.tables import Table, is_packed_table, open_packed_table
from dist_ae.terminal import say

Shape = tuple[int, int, int]


class Units(NamedTuple):
    """Records have their own units, as models of standardized records expect them."""

    missing: bool  # NaN stands for a missing entry


class Shapes(NamedTuple):
    """The form of a model's records."""

    image: Shape  # channels, height, width
    outside: tuple[int, ...] | None = None  # of a record that is no image: (D,), (C, L) or (C, D, H, W)
    units: Units | None = None  # None: images on [0, 1]


class Given(NamedTuple):
    """Records of a model's shape, their names if they come from files, and the names of their labels."""

    split: Split
    names: list[str] | None = None
    classes: tuple[str, ...] = ()
    units: Units | None = None
    note: str = ""  # which pictures were left out, and how others were brought to the model's size, in words


def given(images: Any, config: DataConfig, shapes: Shapes) -> Given:
    """A user's records for a model.

    Args:
        images: a path (a picture, a folder, .npy, .npz, .csv, .parquet, a packed set; also ``folder:``, ``tar:``,
            ``hf:``, ``array:``, ``table:``, ``packed:``), a PIL image, an array or tensor (in the layout of the
            training data, or one record), a data frame, or a list of such.
        config: the run's settings, which bring pictures to the model's size and choose the columns of tables. Arrays
            are used as they are.

    Raises:
        InputError: naming what is missing, not readable, or not of the model's shape.
    """
    if isinstance(images, Given):
        return images
    if isinstance(images, str | os.PathLike):
        records = _from_path(os.fspath(images), config, shapes)
    elif isinstance(images, Image.Image):
        records = _one_picture(images, "the picture", config, shapes)
    elif isinstance(images, np.ndarray | Tensor):
        records = Given(Split(arranged(as_array(images), shapes)))
    elif hasattr(images, "columns") and hasattr(images, "to_numpy"):
        records = Given(Split(arranged(_frame(images, config), shapes)))
    elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        records = _from_list(list(images), config, shapes)
    else:
        raise InputError(
            "expected records as a path, a picture, an array, a tensor, a data frame or a list of these, got "
            f"{type(images).__name__}"
        )
    if records.split.images.shape[1:] != shapes.image:
        where = shown(os.fspath(images)) if isinstance(images, str | os.PathLike) else "images"
        raise InputError(f"{where}: {_expected(shapes)}, got {list(records.split.images.shape)}")
    return records._replace(units=shapes.units)


def _frame(frame: Any, config: DataConfig) -> Array:
    """The columns of a data frame that the run was trained on, in that order."""
    names = [str(name) for name in frame.columns]
    if config.columns is not None:
        if lacking := [name for name in config.columns if name not in names]:
            raise InputError(f"the data frame has no column {lacking[0]!r}, which the run was trained on")
        frame = frame[[frame.columns[names.index(name)] for name in config.columns]]
    return frame_values(frame, "the data frame")[0]


def _expected(shapes: Shapes) -> str:
    if shapes.outside is not None:
        return f"the run's model takes {named(shapes.outside)}, [N, {', '.join(map(str, shapes.outside))}]"
    return f"the run's model takes images of shape [N, {', '.join(map(str, shapes.image))}]"


def picked(records: Given, index: Array) -> Given:
    """The images at positions ``index``."""
    rows = index if records.split.rows is None else records.split.rows[index]
    labels = None if records.split.labels is None else records.split.labels[index]
    names = None if records.names is None else [records.names[i] for i in index]
    return Given(Split(records.split.images, labels, rows), names, records.classes, records.units)


def blocks(records: Given, size: int = 1000) -> list[range]:
    """The rows of the images in blocks of at most ``size``, smaller if images are large."""
    count, size = len(records.split), at_once(size, records.split.images.shape[1:])
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def floats(records: Given, rows: range) -> Tensor:
    """Records ``rows`` as float32 [len(rows), C, H, W]: images on [0, 1], other records in their own units.

    Raises:
        InputError: floats of images far outside [0, 1], or numbers of records that are not finite.
    """
    images = span(records.split, rows)
    result = torch.from_numpy(np.require(images, np.float32, ["C", "W"]))
    if records.units is not None:
        bad = result.isinf() if records.units.missing else ~result.isfinite()
        if bool(bad.any()):
            row, *index = bad.nonzero()[0].tolist()
            value, place = float(result[(row, *index)]), f"record {rows.start + row}, index {tuple(index)}"
            raise InputError(f"{value} at {place}, and numbers must be finite")
        return result
    if images.dtype in (np.uint8, np.uint16):
        return result.div_(np.iinfo(images.dtype).max)
    if result.numel():
        _refuse_unscaled(float(result.min()), float(result.max()), "")
    return result


def _refuse_unscaled(low: float, high: float, where: str) -> None:
    """Raises InputError for values far outside [0, 1], which were never scaled. Noise may exceed it a little."""
    if not (low >= NOISY_RANGE[0] and high <= NOISY_RANGE[1]):
        hint = "; divide by 255?" if NOISY_RANGE[1] < high <= 255 and low >= 0 else ""
        raise InputError(
            f"{where}expected floats on [0, 1] (noise may exceed it a little), got values from {low} to {high}{hint}"
        )


def arranged(images: Array, shapes: Shapes) -> Array:
    """An array in any usual layout as [N, C, H, W] of the model's shape.

    Raises:
        InputError: another shape, or values of a wrong type.
    """
    layout: Layout = "table" if shapes.units is not None else "auto"  # a table's whole numbers become floats
    fitting = fitted(typed(images, layout, "images"), shapes.image, shapes.outside)
    if fitting is None:
        raise InputError(f"images: {_expected(shapes)}, got {list(images.shape)}")
    return fitting


def _form(config: DataConfig, shapes: Shapes) -> Form:
    channels, (height, width) = shapes.image[0], (shapes.outside or shapes.image)[-2:]
    colour = colour_of(config, channels)
    if colour is None or (shapes.outside is not None) != (config.pages == "volume"):
        raise InputError(f"pictures are grey or in colour, and {_expected(shapes)}; give an array")
    form = form_of(config, colour, (height, width))
    # A model of stored numbers needs pictures of as many bits as those that it was trained on.
    return form._replace(bits="8") if shapes.units is not None and config.bits != "16" else form


def _one_picture(content: Any, what: str, config: DataConfig, shapes: Shapes, names: list[str] | None = None) -> Given:
    image, facts = _decode(content, what, _form(config, shapes))
    return Given(Split(image[None]), names, note=_resized([facts], config, shapes))


def _resized(facts: Sequence[Facts], config: DataConfig, shapes: Shapes) -> str:
    """How pictures of another size were brought to the model's size, in words; "" if there were none."""
    height, width = (shapes.outside or shapes.image)[-2:]
    others = [picture for picture in facts if (picture.width, picture.height) != (width, height)]
    if not others:
        return ""
    largest = max(others, key=lambda picture: picture.width * picture.height)
    changed = sum(picture.width * height != picture.height * width for picture in others)
    how = {"crop": "of which only the middle is seen", "pad": "with bars beside them", "stretch": "stretched"}
    kinds = f", {changed:,} of them {how[config.fit or 'crop']}" if changed else ""
    return (
        f"{len(others):,} of {len(facts):,} pictures were brought to the model's {width} × {height}{kinds}; the "
        f"largest was {largest.width:,} × {largest.height:,}, and results have the model's size"
    )


def _decode(content: Any, name: str, form: Form) -> tuple[Array, Facts]:
    try:
        image, facts = examined(content, form)
        return image if image.ndim == 3 else image.reshape(image.shape[0], -1, image.shape[-1]), facts
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        raise InputError(f"{name}: cannot be read as a picture ({reason(error)})") from None


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _from_list(items: Sequence[Any], config: DataConfig, shapes: Shapes) -> Given:
    if not items:
        raise InputError(f"images: {_expected(shapes)}, got an empty list")
    if all(isinstance(item, str | os.PathLike) for item in items):
        names = [os.fspath(item) for item in items]
        for name in names:
            if not os.path.isfile(expand(name)) or not _is_picture(name):
                raise InputError(f"{shown(name)}: {'not a picture' if os.path.exists(name) else 'no such file'}")
        files = [Picture(name, os.fspath(expand(name))) for name in names]
        pictures = [page for file in files for page in pages_of(file, config.pages)]
        return _decode_pictures(pictures, len(pictures), "the list", config, shapes)
    images: list[Array] = []
    all_facts: list[Facts] = []
    for number, item in enumerate(items):
        if isinstance(item, Image.Image):
            image, facts = _decode(item, f"picture {number}", _form(config, shapes))
            images.append(image)
            all_facts.append(facts)
        elif isinstance(item, np.ndarray | Tensor):
            batch = arranged(as_array(item), shapes)
            if len(batch) != 1:
                raise InputError(
                    f"a list holds single images, and item {number} has {len(batch)}; concatenate them to one array"
                )
            images.append(batch[0])
        else:
            raise InputError(
                f"expected a list of paths, of pictures or of arrays; item {number} is of type {type(item).__name__}"
            )
    if len({image.dtype.kind for image in images}) > 1:
        raise InputError("a list holds images as bytes or as floats, not both")
    return Given(Split(_stacked(images)), note=_resized(all_facts, config, shapes))


def _from_path(name: str, config: DataConfig, shapes: Shapes) -> Given:
    name = with_prefix(name)
    if name.startswith("table:"):
        return _from_table(name.removeprefix("table:"), config)
    if name.startswith("packed:"):
        folders = packed_sets(name.removeprefix("packed:"))
        if len(folders) == 1 and is_packed_table(folders[0]):
            manifest, records, labels = open_packed_table(folders[0])
            return Given(Split(arranged(records, shapes), labels), classes=tuple(manifest["classes"]))
        manifests = [read_manifest(folder) for folder in folders]
        if any(m.whole for m in manifests):
            raise InputError(f"{shown(name)}: whole pictures of different sizes; give the pictures themselves")
        if (other := next((m.image_shape for m in manifests if m.image_shape != shapes.image), None)) is not None:
            raise InputError(f"{shown(name)}: {_expected(shapes)}, got {list(other)}")
        parts = [part for pair in zip(folders, manifests, strict=True) for part in open_packed(*pair)]
        names = [name for pair in zip(folders, manifests, strict=True) for name in packed_names(*pair)]
        return Given(Split(Shards(parts)), names)
    if name.startswith(PREFIXES):
        source = paged(open_source(name, of_others(config, name)), config.pages)
        found = _decode_pictures(source.pictures(), source.count, shown(name), config, shapes)
        return found._replace(note="; ".join(filter(None, (left_out(source), found.note))))
    path = expand(name.removeprefix("array:"))
    if _is_picture(path.name):
        if not os.path.isfile(path):
            raise InputError(f"{shown(path)}: {not_there(path)}; expected a picture, a folder of pictures, or an array")
        if config.pages != "first":
            pages = pages_of(Picture(path.name, os.fspath(path)), config.pages)
            return _decode_pictures(pages, len(pages), shown(path), config, shapes)
        return _one_picture(os.fspath(path), shown(path), config, shapes, [path.name])
    array = read_array(path)
    try:
        records = arranged(array, shapes)
    except InputError as error:
        raise InputError(f"{shown(path)}: {str(error).removeprefix('images: ')}") from None
    missing = shapes.units is not None and shapes.units.missing
    low, high = value_range(records, shown(path), missing, shapes.outside, config.columns or ())
    if shapes.units is None:
        _refuse_unscaled(low, high, f"{shown(path)}: ")
    return Given(Split(records))


def _from_table(pattern: str, config: DataConfig) -> Given:
    """The columns of a table that the run was trained on, and its labels if it has them."""
    try:
        table = Table(pattern, config)
    except InputError:
        if config.label is None:
            raise
        table = Table(pattern, config.model_copy(update={"label": None}))  # a table without the column of labels
    parts = list(table.batches())
    records = np.concatenate([part.values for part in parts]).astype(np.float32)[:, :, None, None]
    if table.label is None:
        return Given(Split(records))
    texts = [text for part in parts if part.labels is not None for text in part.labels]
    classes: dict[str, int] = {}
    numbers = [-1 if text is None else classes.setdefault(str(text), len(classes)) for text in texts]
    return Given(Split(records, np.array(numbers, np.int64)), classes=tuple(classes))


def _decode_pictures(
    pictures: Iterable[Picture], count: int | None, what: str, config: DataConfig, shapes: Shapes
) -> Given:
    room = SHARE_OF_MEMORY * free_memory()

    def refuse_above_room(num_images: int) -> None:
        if num_images * math.prod(shapes.image) > room:
            raise InputError(f"{what}: too many images for the memory; pack them with `dist-ae pack` first")

    refuse_above_room(count or 0)
    images: list[Array] = []
    names: list[str] = []
    bad: list[tuple[str, str]] = []
    all_facts: list[Facts] = []
    for picture, (image, facts) in decoded(iter(pictures), _form(config, shapes), count):
        if isinstance(image, np.ndarray) and facts is not None:
            if image.ndim == 4 and image.shape != shapes.outside:
                raise InputError(f"{shown(picture.name)}: {_expected(shapes)}, got {list(image.shape)}")
            images.append(image.reshape(shapes.image) if image.ndim == 4 else image)
            names.append(picture.name)
            all_facts.append(facts)
            refuse_above_room(len(images))  # the number of pictures in a tar is unknown
        else:
            bad.append((shown(picture.name), str(image)))
    packing = "`dist-ae pack` them with --corrupt skip and give packed:OUT"
    refuse_unreadable(what, len(bad), len(bad) + len(images), bad[:5], config, packing)
    if bad and images:  # the run was trained with data.corrupt skip
        first = "; ".join(map(": ".join, bad[:5]))
        say(f"warning: {what}: {len(bad):,} pictures cannot be read and are left out ({first})", sys.stderr)
    if not images:
        raise InputError(f"{what}: none of its pictures can be read ({'; '.join(map(': '.join, bad[:5]))})")
    return Given(Split(_stacked(images)), names, note=_resized(all_facts, config, shapes))


def _stacked(images: Sequence[Array]) -> Array:
    """Images as one array. If some have 16 bits, those of 8 bits are widened."""
    if len({image.dtype for image in images} & {np.dtype(np.uint8), np.dtype(np.uint16)}) < 2:
        return np.stack(images)
    return np.stack([widened(image) if image.dtype == np.uint8 else image for image in images])


def file_names(records: Given, own_endings: Sequence[str] = ()) -> list[Path]:
    """A relative path for each image. It ends in .png, or in the image's own ending if ``own_endings`` has it.

    It is based on the image's own name if it has one, and never leads out of the folder that it is put into.
    """
    if records.names is None:
        width = len(str(max(1, len(records.split) - 1)))
        return [Path(f"{index:0{width}d}.png") for index in range(len(records.split))]
    names = [re.sub(r"(\.tiff?)#(\d+)$", r"-\2\1", name, flags=re.IGNORECASE) for name in records.names]  # pages
    clean = [Path(*[part for part in Path(name).parts if part not in ("/", "..", ".")]) for name in names]
    if any(Path(name).is_absolute() for name in records.names):
        clean = [Path(path.name) for path in clean]
    targets = [
        path.with_suffix(path.suffix if path.suffix.lower() in own_endings else ".png")
        if path.name
        else Path("image.png")
        for path in clean
    ]
    folders = {parent for target in targets for parent in target.parents}
    taken: set[Path] = set()
    numbers: dict[Path, int] = {}  # the last number used for a name
    result = []
    for target in targets:
        free, number = target, numbers.get(target, 0)
        while free in taken or free in folders:  # also if another picture has that name of its own
            number += 1
            free = target.with_name(f"{target.stem}-{number}{target.suffix}")
        numbers[target] = number
        taken.add(free)
        result.append(free)
    return result
