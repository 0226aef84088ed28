"""Applies a model to whole pictures of any size: piece by piece, in bounded memory."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_ae.config import DataConfig, InputError
from dist_ae.data import deep
from dist_ae.data.form import Content, decode, reason
from dist_ae.data.given import Given, file_names
from dist_ae.data.names import with_prefix
from dist_ae.data.pictures import (
    EXTENSIONS,
    PREFIXES,
    Picture,
    colour_of,
    expand,
    form_of,
    left_out,
    of_others,
    open_source,
    shown,
)
from dist_ae.data.reads import Reads
from dist_ae.data.records import Array, Split
from dist_ae.evaluate import fixed_noise
from dist_ae.models import Autoencoder
from dist_ae.terminal import say
from dist_ae.use.trained import TrainedModel
from dist_ae.use.write import write_into, write_whole

ORIENTATION = 0x0112  # EXIF's tag
SINGLE_FILE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", "")  # endings of a single picture
CORE = 768  # side of a piece in pixels, without the margin that the model sees around it
AT_ONCE = 64  # windows of the model's own size in a batch


def reconstructed(
    model: Autoencoder, picture: Array, noise: Array | None = None, advance: Callable[[float], None] = lambda _: None
) -> Array:
    """The reconstruction of a picture [C, H, W] of any size, in the same type and size.

    A convolution with a grid code and ``norm position`` has a limited reach. Pieces with a margin of that reach give
    the result for the whole picture, up to rounding of float32. Any other model gets windows of its own size, each of
    which overlaps the next by half and fades out towards its edges.

    Args:
        picture: uint8, uint16, or floats on [0, 1].
        noise: float32 [C, H, W], added first.
        advance: called with the share of the picture that is done.
    """
    largest = 1.0 if picture.dtype.kind == "f" else float(np.iinfo(picture.dtype).max)
    result = np.empty(picture.shape, picture.dtype)

    def crop(top: Any, left: Any) -> Tensor:
        """Rows and columns of the picture, on the model's scale."""
        place = (slice(None), top, left) if isinstance(top, slice) else (slice(None), top[:, None], left)
        part = on_scale(model, np.asarray(picture[place]))
        return part if noise is None else part + torch.from_numpy(noise[place]).to(part.device)

    pieces = (_pieces if model.reach() is not None else _windows)(model, picture.shape, crop)
    device = next(model.parameters()).device
    for rows, columns, values in pieces:
        output = model.from_units(values.to(device)).cpu().numpy()
        if model.units_scale is None:
            output = output * np.float32(largest)
        result[:, rows, columns] = output if largest == 1 else np.rint(output.clip(0, largest))
        advance(rows.stop / picture.shape[1])
    return result


def on_scale(model: Autoencoder, picture: Array) -> Tensor:
    """Stored pixels [C, H, W] on the model's scale and device."""
    part = np.asarray(picture, np.float32)
    if model.units_scale is None and picture.dtype.kind != "f":
        part = part / np.float32(np.iinfo(picture.dtype).max)
    return model.to_units(torch.from_numpy(part).to(next(model.parameters()).device))


Crop = Callable[[Any, Any], Tensor]  # rows and columns → that part of a picture, on the model's scale
Pieces = Iterator[tuple[slice, slice, Tensor]]


@torch.no_grad()
def _pieces(model: Autoencoder, shape: tuple[int, ...], crop: Crop) -> Pieces:
    """Reconstructs a picture in pieces, each computed with a margin of the model's reach."""
    _, height, width = shape
    reach = model.reach()
    assert reach is not None
    for top in range(0, height, CORE):
        for left in range(0, width, CORE):
            bottom, right = min(top + CORE, height), min(left + CORE, width)
            y, x = max(0, top - reach), max(0, left - reach)
            piece = crop(slice(y, bottom + reach), slice(x, right + reach))
            sized = model.at(*piece.shape[1:])
            assert sized is not None
            output = sized(piece[None], None).reconstruction[0]
            yield slice(top, bottom), slice(left, right), output[:, top - y : bottom - y, left - x : right - x]


@torch.no_grad()
def _windows(model: Autoencoder, shape: tuple[int, ...], crop: Crop) -> Pieces:
    """Reconstructs a picture in bands of windows of the model's size; beyond its edges, the picture is mirrored."""
    _, height, width = shape
    down, across = (max(1, side // 2) for side in model.image_shape[1:])
    fade = _fade(model.image_shape[1], down)[:, None] * _fade(model.image_shape[2], across)
    lefts = range(-across, width, across)
    before: Tensor | None = None  # the lower half of the band above
    for top in range(-down, height, down):
        rows = _mirrored(top, model.image_shape[1], height)
        columns = [_mirrored(left, model.image_shape[2], width) for left in lefts]
        band = torch.zeros(shape[0], 2 * down, across * (len(lefts) + 1))
        for start in range(0, len(lefts), AT_ONCE):
            batch = torch.stack([crop(rows, window) for window in columns[start : start + AT_ONCE]])
            output = model(batch, None).reconstruction.cpu()[:, :, : 2 * down, : 2 * across] * fade
            for place, window in enumerate(output, start):
                band[:, :, place * across : (place + 2) * across] += window
        if before is not None:
            bottom = min(top + down, height)
            whole = (before + band[:, :down])[:, : bottom - top, across : across + width]
            yield slice(top, bottom), slice(0, width), whole
        before = band[:, down:]


def _fade(size: int, half: int) -> Tensor:
    """Weights of a window's pixels, which rise and fall so that those of overlapping windows add up to 1."""
    if size == 1:
        return torch.full((2,), 0.5)
    return torch.sin(math.pi * (torch.arange(2 * half) + 0.5) / (2 * half)).square()


def _mirrored(start: int, count: int, side: int) -> Array:
    """``count`` positions from ``start`` along a side of a picture, mirrored beyond its ends."""
    places = np.arange(start, start + count) % (2 * side)
    return np.where(places < side, places, 2 * side - 1 - places)


# -- files


class Metadata(NamedTuple):
    """The metadata of a picture, which is written again."""

    exif: Image.Exif
    profile: bytes | None  # ICC, of its colours

    @classmethod
    def of(cls, content: Content, channels: int) -> Metadata:
        """Args:
        channels: of the pixels to be written; a profile for another colour mode does not apply to them.
        """
        if not isinstance(content, str | bytes):
            return cls(Image.Exif(), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                exif, modes = image.getexif(), ("RGB", "RGBA") if channels > 1 else ("L", "LA", "I", "I;16", "F")
                exif.pop(ORIENTATION, None)  # the pixels are upright now
                profile = image.info.get("icc_profile") if image.mode in modes else None
                return cls(exif, profile)


@contextmanager
def readable(picture: Picture) -> Iterator[None]:
    """Raises InputError with the name of a picture that cannot be read."""
    try:
        yield
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        raise InputError(f"{shown(picture.name)}: cannot be read as a picture ({reason(error)})") from None


def write_picture(path: Path, pixels: Array, metadata: Metadata) -> None:
    """Writes pixels [C, H, W], uint8 or uint16, in the format of the file's ending."""
    if pixels.dtype == np.uint16:
        encode = deep.tiff if path.suffix.lower() in (".tif", ".tiff") else deep.png
        path.write_bytes(encode(pixels, metadata.exif, metadata.profile))
        return
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    quality: dict[str, Any] = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    image.save(path, exif=metadata.exif, icc_profile=metadata.profile, **quality)


def pictures_of(images: str | Path, config: DataConfig) -> tuple[list[Picture], bool]:
    """The pictures of a source, and whether it is a single file.

    Raises:
        InputError: arrays, tables and packed sets, whose images have one size.
    """
    name = with_prefix(os.fspath(images))
    if name.startswith(PREFIXES):
        source = open_source(name, of_others(config, name))
        if note := left_out(source):
            say(f"note: {note}", sys.stderr)
        return list(source.pictures()), False
    path = expand(name.removeprefix("array:"))
    if path.suffix.lower().lstrip(".") not in EXTENSIONS or not os.path.isfile(path):
        raise InputError(
            f"{shown(os.fspath(images))}: expected a picture, a folder of pictures, tar:PATTERN or hf:NAME, which keep "
            "their own size; --size model takes anything, at the model's size"
        )
    return [Picture(path.name, os.fspath(path))], True


def write_whole_pictures(
    trained: TrainedModel, pictures: Sequence[Picture], out: Path, reads: Reads, noise_std: float = 0.0
) -> Path:
    """Writes reconstructions of pictures at their own size: into a folder, or a single one to a file."""
    model, config = trained.model, trained.config.data.model_copy(update={"image_size": None})
    form = form_of(config, colour_of(config, model.image_shape[0]) or "rgb")
    endings = (".tif", ".tiff")
    names = file_names(Given(Split(np.empty((len(pictures), 0))), [picture.name for picture in pictures]), endings)

    def write(number: int, target: Path) -> None:
        picture = pictures[number]
        with readable(picture):
            pixels = decode(picture.content, form)
            metadata = Metadata.of(picture.content, len(pixels))
        noise = None
        if noise_std:
            noise = fixed_noise(noise_std, range(number, number + 1), pixels.shape, torch.device("cpu"))[0].numpy()
        target.parent.mkdir(parents=True, exist_ok=True)
        label = f"{names[number]}, {pixels.shape[2]:,} × {pixels.shape[1]:,}"
        with progress_of(label) as advance:
            write_picture(target, reconstructed(model, pixels, noise, advance), metadata)

    if out.suffix:
        return write_whole(out, lambda path: write(0, path))

    def fill(folder: Path) -> None:
        for number, name in enumerate(names):
            write(number, folder / name)

    return write_into(out, fill, reads)


@contextmanager
def progress_of(label: str) -> Iterator[Callable[[float], None]]:
    """Yields a function to call with the share that is done; on a terminal it moves a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda share: None
        return
    columns = (TextColumn(label, markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def own_size(
    trained: TrainedModel, images: str | Path | None, out: Path | None, size: Literal["own", "model"] | None
) -> tuple[list[Picture], tuple[str, ...]] | None:
    """The pictures to be used at their own size, and the endings for the output; None: use the model's size.

    Args:
        size: the user's choice; None: their own if the run was trained on crops and the pictures are files.

    Raises:
        InputError: ``size`` is "own", and that is not possible; says why.
    """
    crops = trained.config.data.crop is not None or trained.config.data.name == "photos"
    if size == "model" or images is None or (size is None and not crops):
        if size == "own":
            raise InputError("--size own is for pictures; name some")
        return None
    channels = trained.model.image_shape[0]
    if trained.config.model.record_shape is not None or colour_of(trained.config.data, channels) is None:
        raise InputError("--size own is for pictures in grey or colour, and the run was trained on none")
    try:
        pictures, single = pictures_of(images, trained.config.data)
    except InputError:
        if size == "own":
            raise
        return None  # arrays and packed sets have the model's size
    endings: tuple[str, ...] = SINGLE_FILE if single else ("",)
    if channels == 4:  # JPEG has no transparency
        endings = tuple(ending for ending in endings if ending not in (".jpg", ".jpeg"))
    if size is None and out is not None and out.suffix and out.suffix not in endings:
        return None  # a single file for many pictures
    return pictures, endings
