"""What a user hands to a trained model: files, folders, arrays, tensors, pictures, in one form."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_ae.config import DataConfig, InputError
from dist_ae.data.arrays import NOISY_RANGE, as_array, read_images
from dist_ae.data.decode import decoded
from dist_ae.data.pack import refuse_unreadable
from dist_ae.data.packed import open_packed, packed_names, packed_sets, read_manifest
from dist_ae.data.pictures import (
    EXTENSIONS,
    PREFIXES,
    Form,
    Picture,
    decode,
    expand,
    form_of,
    not_there,
    open_source,
    reason,
    shown,
)
from dist_ae.data.reader import SHARE_OF_MEMORY, free_memory
from dist_ae.data.records import Array, Shards, Split, at_once, span
from dist_ae.data.sources import with_prefix
from dist_ae.terminal import say

Shape = tuple[int, int, int]


class Given(NamedTuple):
    """Images of a model's shape, their names where they come from files, and the names of their labels."""

    split: Split
    names: list[str] | None = None
    classes: tuple[str, ...] = ()


def given(images: Any, config: DataConfig, image_shape: Shape) -> Given:
    """A user's images for a model of ``image_shape``.

    Args:
        images: a path (a picture, a folder, .npy, .npz, a packed set; also ``folder:``, ``tar:``, ``hf:``, ``array:``,
            ``packed:``), a PIL image, an array or tensor ([N, C, H, W], [N, H, W, C], [N, H, W] for grey, or one
            image), or a list of such.
        config: the run's own settings, which bring pictures to the model's size. Arrays are taken as they are.

    Raises:
        InputError: naming what is not there, not readable, or not of the model's shape.
    """
    if isinstance(images, Given):
        return images
    if isinstance(images, str | os.PathLike):
        found = _from_path(os.fspath(images), config, image_shape)
    elif isinstance(images, Image.Image):
        found = Given(Split(_decode(images, "the picture", _form(config, image_shape))[None]))
    elif isinstance(images, np.ndarray | Tensor):
        found = Given(Split(arranged(as_array(images), image_shape)))
    elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        found = _from_list(list(images), config, image_shape)
    else:
        raise InputError(
            f"expected images as a path, a picture, an array, a tensor or a list of these, got {type(images).__name__}"
        )
    if found.split.images.shape[1:] != image_shape:
        where = shown(os.fspath(images)) if isinstance(images, str | os.PathLike) else "images"
        raise InputError(f"{where}: {_expected(image_shape)}, got {list(found.split.images.shape)}")
    return found


def _expected(image_shape: Shape) -> str:
    return f"the run's model takes images of shape [N, {', '.join(map(str, image_shape))}]"


def picked(one: Given, index: Array) -> Given:
    """The images at positions ``index``."""
    rows = index if one.split.rows is None else one.split.rows[index]
    labels = None if one.split.labels is None else one.split.labels[index]
    names = None if one.names is None else [one.names[i] for i in index]
    return Given(Split(one.split.images, labels, rows), names, one.classes)


def blocks(one: Given, size: int = 1000) -> list[range]:
    """The rows of the images in blocks of at most ``size``, smaller where images are large."""
    count, size = len(one.split), at_once(size, one.split.images.shape[1:])
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def floats(one: Given, rows: range) -> Tensor:
    """Images ``rows`` as float32 [len(rows), C, H, W].

    Raises:
        InputError: floats far outside [0, 1].
    """
    images = span(one.split, rows)
    if images.dtype == np.uint8:
        return torch.from_numpy(np.require(images, np.uint8, ["C", "W"])).float().div_(255)
    result = torch.from_numpy(np.require(images, np.float32, ["C", "W"]))
    if result.numel() and not bool(((result >= NOISY_RANGE[0]) & (result <= NOISY_RANGE[1])).all()):
        # Noisy images may leave the range a little; values far outside were never scaled.
        low, high = float(result.min()), float(result.max())
        raise InputError(
            f"expected floats on [0, 1] (noise may leave it a little), got values from {low} to {high}; divide by 255?"
        )
    return result


def arranged(images: Array, image_shape: Shape) -> Array:
    """An array in any usual layout as [N, C, H, W] of the model's shape.

    Raises:
        InputError: another shape, or values that are no pixels.
    """
    channels, height, width = image_shape
    last = (height, width, channels)
    shape = images.shape
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InputError(f"expected images as uint8 or floats on [0, 1], got {images.dtype}")
    if len(shape) == 4 and shape[0] and shape[1:] == image_shape:
        return images
    if len(shape) == 4 and shape[0] and shape[1:] == last:
        return images.transpose(0, 3, 1, 2)
    if len(shape) == 3 and shape[0] and channels == 1 and shape[1:] == (height, width):
        return images[:, None]
    if shape == image_shape:
        return images[None]
    if shape == last:
        return images.transpose(2, 0, 1)[None]
    if channels == 1 and shape == (height, width):
        return images[None, None]
    raise InputError(f"images: {_expected(image_shape)}, got {list(shape)}")


def _form(config: DataConfig, image_shape: Shape) -> Form:
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise InputError(f"pictures are grey or in colour, and {_expected(image_shape)}; give an array")
    return form_of(config, "grey" if channels == 1 else "rgb", (height, width))


def _decode(content: Any, name: str, form: Form) -> Array:
    try:
        return decode(content, form)
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        raise InputError(f"{name}: cannot be read as a picture ({reason(error)})") from None


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _from_list(items: Sequence[Any], config: DataConfig, image_shape: Shape) -> Given:
    if not items:
        raise InputError(f"images: {_expected(image_shape)}, got an empty list")
    if all(isinstance(item, str | os.PathLike) for item in items):
        names = [os.fspath(item) for item in items]
        for name in names:
            if not os.path.isfile(expand(name)) or not _is_picture(name):
                raise InputError(f"{shown(name)}: {'not a picture' if os.path.exists(name) else 'no such file'}")
        pictures = [Picture(name, os.fspath(expand(name))) for name in names]
        return _decode_pictures(pictures, len(names), "the list", config, image_shape)
    images = []
    for number, item in enumerate(items):
        if isinstance(item, Image.Image):
            images.append(_decode(item, f"picture {number}", _form(config, image_shape)))
        elif isinstance(item, np.ndarray | Tensor):
            one = arranged(as_array(item), image_shape)
            if len(one) != 1:
                raise InputError(
                    f"a list holds single images, and item {number} is {len(one)} of them; join them to one array"
                )
            images.append(one[0])
        else:
            raise InputError(
                f"expected a list of paths, of pictures or of arrays; item {number} is of type {type(item).__name__}"
            )
    if len({image.dtype == np.uint8 for image in images}) > 1:
        raise InputError("a list holds images as bytes or as floats, not both")
    return Given(Split(np.stack(images)))


def _from_path(name: str, config: DataConfig, image_shape: Shape) -> Given:
    name = with_prefix(name)
    if name.startswith("packed:"):
        folders = packed_sets(name.removeprefix("packed:"))
        manifests = [read_manifest(folder) for folder in folders]
        if (other := next((m.image_shape for m in manifests if m.image_shape != image_shape), None)) is not None:
            raise InputError(f"{shown(name)}: {_expected(image_shape)}, got {list(other)}")
        parts = [part for pair in zip(folders, manifests, strict=True) for part in open_packed(*pair)]
        names = [name for pair in zip(folders, manifests, strict=True) for name in packed_names(*pair)]
        return Given(Split(Shards(parts)), names)
    if name.startswith(PREFIXES):
        source = open_source(name)
        return _decode_pictures(source.pictures(), source.count, shown(name), config, image_shape)
    path = expand(name.removeprefix("array:"))
    if _is_picture(path.name):
        if not os.path.isfile(path):
            raise InputError(f"{shown(path)}: {not_there(path)}; expected a picture, a folder of pictures, or an array")
        image = _decode(os.fspath(path), shown(path), _form(config, image_shape))
        return Given(Split(image[None]), [path.name])
    images = read_images(path)
    return Given(Split(images if images.shape[1:] == image_shape else _own_layout(images, image_shape)))


def _own_layout(images: Array, image_shape: Shape) -> Array:
    """Undoes reading [N, H, W, C] as [N, C, H, W], which happens where the height could be a number of channels."""
    try:
        return arranged(images, image_shape)
    except InputError:
        return images


def _decode_pictures(
    pictures: Iterable[Picture], count: int | None, what: str, config: DataConfig, image_shape: Shape
) -> Given:
    room = SHARE_OF_MEMORY * free_memory()

    def refuse_above_room(num_images: int) -> None:
        if num_images * math.prod(image_shape) > room:
            raise InputError(f"{what}: too many images for the memory; pack them with `dist-ae pack` first")

    refuse_above_room(count or 0)
    images: list[Array] = []
    names: list[str] = []
    bad: list[tuple[str, str]] = []
    for picture, result in decoded(iter(pictures), _form(config, image_shape), count):
        if isinstance(result, np.ndarray):
            images.append(result)
            names.append(picture.name)
            refuse_above_room(len(images))  # a tar does not say how many it holds
        else:
            bad.append((shown(picture.name), str(result)))
    packing = "`dist-ae pack` them with --corrupt skip and give packed:OUT"
    refuse_unreadable(what, len(bad), len(bad) + len(images), bad[:5], config, packing)
    if bad and images:  # the run was trained with data.corrupt skip
        few = "; ".join(map(": ".join, bad[:5]))
        say(f"warning: {what}: {len(bad):,} pictures cannot be read and are left out ({few})", sys.stderr)
    if not images:
        raise InputError(f"{what}: none of its pictures can be read ({'; '.join(map(': '.join, bad[:5]))})")
    return Given(Split(np.stack(images)), names)


def file_names(one: Given) -> list[Path]:
    """A relative path that ends in .png for each image.

    It is the image's own name where it has one, and never leads out of the folder that it is put into.
    """
    if one.names is None:
        width = len(str(max(1, len(one.split) - 1)))
        return [Path(f"{index:0{width}d}.png") for index in range(len(one.split))]
    clean = [Path(*[part for part in Path(name).parts if part not in ("/", "..", ".")]) for name in one.names]
    if any(Path(name).is_absolute() for name in one.names):
        clean = [Path(path.name) for path in clean]
    targets = [path.with_suffix(".png") if path.name else Path("image.png") for path in clean]
    folders = {parent for target in targets for parent in target.parents}
    taken: set[Path] = set()
    numbers: dict[Path, int] = {}  # the last one that was given to a name
    result = []
    for target in targets:
        free, number = target, numbers.get(target, 0)
        while free in taken or free in folders:  # also where another picture was called so from the start
            number += 1
            free = target.with_name(f"{target.stem}-{number}.png")
        numbers[target] = number
        taken.add(free)
        result.append(free)
    return result
