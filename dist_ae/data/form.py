"""How a picture becomes an image of a form, and what it says about itself.

What a process that decodes pictures needs, and no more: it starts without torch and pydantic, in half the time.
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from dist_ae.data import deep
from dist_ae.data.facts import DEEP, Facts, digest_of, of_pixels, small_copy
from dist_ae.data.records import Array
from dist_ae.terminal import first_line

HEIC = ("heic", "heif") if importlib.util.find_spec("pillow_heif") else ()
MAX_HELD = 16 << 20  # bytes of a file that is held while it is decoded


class Unusable(NamedTuple):
    """In place of a picture that is not even opened: why."""

    reason: str


class Page(NamedTuple):
    """One page of a TIFF."""

    content: str | bytes
    number: int  # from 0


Content = str | bytes | Page | Image.Image | Array | Unusable  # a path, a file's bytes, pixels, or why there are none


class Form(NamedTuple):
    """What every picture of a set becomes."""

    size: tuple[int, int] | None  # height, width; None: as it is
    fit: str = "crop"
    channels: str = "rgb"  # or grey, or rgba
    background: tuple[int, int, int] = (255, 255, 255)
    colour_is_news: bool = False  # a picture in colour is reported rather than made grey
    bits: str = "8"  # 16; auto: 16 of a picture that has more than 8, else 8
    volume: bool = False  # all pages of a TIFF are one record


class ColourMet(Exception):
    """A picture in colour where all were taken to be grey."""


def decode(content: Content, form: Form) -> Array:
    """One picture as uint8 [C, H, W], or as uint16 where the form keeps more bits; as [C, D, H, W] of a volume.

    Raises:
        ColourMet: where the form asks to be told.
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    with _opened(content) as image:
        return _shaped(image, form, content)[0]


def examined(content: Content, form: Form) -> tuple[Array, Facts]:
    """A picture as ``decode`` gives it, and what it says about itself; raises what that does."""
    content = _in_memory(content)
    with _opened(content) as image:
        mode, kind = image.mode, image.format or ""
        pixels, (width, height) = _shaped(image, form, content)
        clear = _is_clear(image)
        values = np.asarray(image) if mode.startswith(DEEP) and not form.volume else pixels[:3]
    whole = isinstance(content, str | bytes | np.ndarray)  # a page is known by its pixels: its file may be large
    digest = digest_of(content if whole else pixels if isinstance(content, Page) else np.asarray(content))
    seen = pixels[:, pixels.shape[1] // 2] if pixels.ndim == 4 else pixels[:3]  # not the transparency
    seen = seen if seen.dtype == np.uint8 else deep.narrowed(seen)
    low, high = float(values.min()), float(values.max())
    return pixels, Facts(width, height, mode, kind, low, high, digest, small_copy(seen), clear)


def _in_memory(content: Content) -> Content:
    """The bytes of a file that is not large, which is then read once and not twice."""
    if not isinstance(content, str) or content.lower().endswith(("heic", "heif")):
        return content
    with open(content, "rb") as file:
        return file.read() if os.fstat(file.fileno()).st_size <= MAX_HELD else content


@contextmanager
def _opened(content: Content) -> Iterator[Image.Image]:
    if isinstance(content, Unusable):
        raise ValueError(content.reason)
    page = 0
    if isinstance(content, Page):
        content, page = content
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content)
    if isinstance(content, Image.Image):
        yield content
        return
    is_heic = content.lower().endswith(HEIC) if isinstance(content, str) else content[4:8] == b"ftyp"
    if HEIC and is_heic:
        importlib.import_module("pillow_heif").register_heif_opener()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures, odd tags and palettes, and reads them
        with _file(content) as image:
            if page:
                image.seek(page)
            yield image


def _file(content: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def _again(content: Content) -> Callable[[], Image.Image] | None:
    """Opens the file of a picture once more, which colour of 16 bits needs; None where there is no file."""
    whole = content.content if isinstance(content, Page) else content
    return (lambda: _file(whole)) if isinstance(whole, str | bytes) else None


Size = tuple[int, int]  # width, height


def _shaped(image: Image.Image, form: Form, content: Content) -> tuple[Array, Size]:
    """A picture in its form, [C, H, W] or as a volume [C, D, H, W], and the size that it had, as it is seen."""
    again = _again(content)
    if not form.volume or again is None:
        pixels, size = _formed(image, form, again)
        return (pixels[:, None] if form.volume else pixels), size
    pages: list[Array] = []
    for number in range(getattr(image, "n_frames", 1) if image.format == "TIFF" else 1):
        if number:
            image.seek(number)
        pixels, size = _formed(image, form, again)
        pages.append(pixels)
        if pages[-1].shape != pages[0].shape:
            first, other = (f"{shape[2]} x {shape[1]}" for shape in (pages[0].shape, pages[-1].shape))
            raise ValueError(
                f"page {number + 1} is {other}, and those before it are {first}; --data.image-size makes them one size"
            )
    if len({each.dtype for each in pages}) > 1:
        pages = [deep.widened(each) if each.dtype == np.uint8 else each for each in pages]
    return np.stack(pages, 1), size


def _formed(image: Image.Image, form: Form, again: Callable[[], Image.Image] | None) -> tuple[Array, Size]:
    """Pixels [C, H, W] in the form, and the width and height that the picture had, as it is seen."""
    if form.colour_is_news and _has_colour(image):
        raise ColourMet
    if deep.is_deep(image) and form.bits != "8":
        return _formed_deep(image, form, again)
    flat, size = _formed_flat(image, form)
    pixels = np.asarray(flat)
    if form.channels == "rgba":
        pixels = pixels.copy()
        pixels[pixels[..., 3] == 0, :3] = form.background  # what a file says there is never seen
    pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return deep.widened(pixels) if form.bits == "16" else pixels, size


def _formed_flat(image: Image.Image, form: Form) -> tuple[Image.Image, Size]:
    """A picture of 8 bits in the form, and the size that it had."""
    extent, size = None, image.size
    if form.size is not None:
        # JPEG decodes at 1/2, 1/4 or 1/8 of its size at a fraction of the cost. Twice the wanted size is asked for, so
        # that the filter still has something to smooth.
        drafted = image.draft("", (2 * max(form.size), 2 * max(form.size)))
        extent = drafted and drafted[1][2:]  # without the rest of the last blocks
    image.load()
    orientation = _orientation(image)
    size = _size_of(image, size, orientation)
    image = _flat(image, {"grey": "L", "rgb": "RGB", "rgba": "RGBA"}[form.channels], form.background)
    behind: Any = (*form.background, 0)
    if form.fit == "pad" and form.channels != "rgba":
        behind = Image.new("RGB", (1, 1), form.background).convert(image.mode).getpixel((0, 0))
    return _upright(image, form, orientation, behind, extent), size


def _size_of(image: Image.Image, before: Size, orientation: int) -> Size:
    """The size of a picture that is loaded, as it is seen. ``before``: the one that it had before it was loaded."""
    size = image.size if image.format == "TIFF" else before  # loading turns a TIFF, and a JPEG may be read smaller
    return (size[1], size[0]) if orientation in SIDEWAYS else size


def _formed_deep(image: Image.Image, form: Form, opened: Callable[[], Image.Image] | None) -> tuple[Array, Size]:
    """A picture of more than 8 bits as uint16 [C, H, W]; it is resized channel by channel, in floating point."""
    before, pixels = image.size, deep.pixels_of(image, opened, form.channels == "grey", form.background)
    orientation, behind = _orientation(image), deep.shade_of(form.background, form.channels == "grey")
    size = _size_of(image, before, orientation)
    if form.size is None and orientation not in ORIENTATIONS:
        return pixels, size
    planes = [
        np.asarray(_upright(Image.fromarray(plane.astype(np.float32)), form, orientation, shade, None))
        for plane, shade in zip(pixels, behind, strict=True)
    ]
    return deep.rounded(np.stack(planes)), size


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(0x0112)  # after load, which turns a TIFF by itself; a damaged one may be anything
    return found if isinstance(found, int) else 1


def _upright(
    image: Image.Image, form: Form, orientation: int, behind: Any, extent: tuple[float, float] | None
) -> Image.Image:
    """A picture at its size, turned upright. ``behind``: the colour around a padded one, in the image's mode."""
    if form.size is not None:
        height, width = form.size
        wanted = (width, height) if orientation in SIDEWAYS else (height, width)
        image = _fitted(image, wanted, extent or image.size, form.fit, behind)
    # Turned last, when there is least to turn.
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


ORIENTATIONS = {  # EXIF's, and what brings a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


SIDEWAYS = (5, 6, 7, 8)


def _is_clear(image: Image.Image) -> bool:
    """Whether some of a picture that is loaded is transparent."""
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa"):
        return False
    lowest: Any = image.getchannel(len(image.getbands()) - 1).getextrema()[0]
    return bool(lowest < 255)


def _has_colour(image: Image.Image) -> bool:
    if image.mode == "P":
        palette = np.frombuffer(bytes(image.getpalette("RGB") or b""), np.uint8).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any())
    return image.mode not in ("1", "L", "LA", "La", "F") and not image.mode.startswith("I")


def _flat(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """8 bits a channel, nothing transparent unless the mode is RGBA."""
    if image.mode == "F" or image.mode.startswith("I"):
        clear = image.info.get("transparency")  # of a PNG: the one value that is not seen
        seen = None if not isinstance(clear, int) else np.asarray(image) != clear
        image = Image.fromarray(deep.narrowed(deep.grey_of(image)))
        if seen is not None and not seen.all():
            mask = Image.fromarray((seen * 255).astype(np.uint8))
            if mode == "RGBA":
                image = image.convert("RGBA")
                image.putalpha(mask)
                return image
            behind = Image.new("RGB", image.size, background)
            behind.paste(image.convert("RGB"), mask=mask)
            image = behind
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        front = image if image.mode == "RGBA" else image.convert("RGBA")
        if mode == "RGBA":
            return front
        image = Image.new("RGB", front.size, background)
        image.paste(front, mask=front)  # what alpha_composite gives, in half the time
    elif image.mode not in ("L", "RGB", "1"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _fitted(
    image: Image.Image, size: tuple[int, int], extent: tuple[float, float], fit: str, behind: Any
) -> Image.Image:
    """A picture of (width, height) ``extent`` at height and width ``size``; ``behind``: the colour around it."""
    height, width = size
    if image.size == (width, height) == extent:
        return image
    box = (0.0, 0.0, *extent)
    inner = (width, height)
    scales = (width / extent[0], height / extent[1])
    if fit == "crop":  # the largest box in the middle that has the wanted proportions
        left, top = max(0.0, (extent[0] - width / max(scales)) / 2), max(0.0, (extent[1] - height / max(scales)) / 2)
        box = (left, top, extent[0] - left, extent[1] - top)
    elif fit == "pad":
        inner = (max(1, round(extent[0] * min(scales))), max(1, round(extent[1] * min(scales))))
    elif fit == "whole":  # the shorter side gets the size
        inner = (max(1, round(extent[0] * max(scales))), max(1, round(extent[1] * max(scales))))
        if image.size == inner == extent:
            return image
    resized = image.resize(inner, Image.Resampling.BICUBIC, box, reducing_gap=2.0)
    if inner == (width, height) or fit == "whole":
        return resized
    canvas = Image.new(image.mode, (width, height), behind)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


Decoded = Array | str | None  # an image, why there is none, or None for ColourMet


class Read(NamedTuple):
    """What became of a picture."""

    image: Decoded
    facts: Facts | None = None


def decode_all(contents: Sequence[Any], form: Form) -> list[Read]:
    """What becomes of each of some pictures; runs in a process of its own."""
    results: list[Read] = []
    for content in contents:
        try:
            results.append(Read(*examined(content, form)))
        except ColourMet:
            results.append(Read(None))
        except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
            results.append(Read(reason(error)))
    return results


def facts_of_all(contents: Sequence[Any], form: Form) -> list[Read]:
    """What pictures say about themselves, or why they cannot be read; the facts are those of ``decode_all``.

    Small pictures cost more calls than pixels, so what is asked of pixels is asked of all pictures at once.

    Args:
        form: of a size, as high as a multiple of 8.
    """
    found: list[Read] = []
    small: dict[int, Image.Image] = {}  # row → the picture in the form, where it has 8 bits
    for row, content in enumerate(contents):
        try:
            facts, image = _facts_but_pixels(content, form)
        except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
            found.append(Read(reason(error)))
            continue
        found.append(Read(None, facts))
        if image is not None:
            small[row] = image
    for row, low, high, copy in zip(small, *of_pixels(list(small.values())), strict=True):
        known = found[row].facts
        assert known is not None
        found[row] = Read(None, known._replace(low=low, high=high, small=copy))
    return found


def _facts_but_pixels(content: Content, form: Form) -> tuple[Facts, Image.Image | None]:
    """The facts of a picture without those of its pixels, and these; or all of its facts."""
    content = _in_memory(content)
    if isinstance(content, str | bytes) and form.channels == "rgb" and not form.volume:
        with _opened(content) as image:
            if not deep.is_deep(image):
                mode, kind = image.mode, image.format or ""
                # Three equal channels, of which one is enough.
                is_grey = mode in ("1", "L") and "transparency" not in image.info and form.fit != "pad"
                small, size = _formed_flat(image, form._replace(channels="grey") if is_grey else form)
                return Facts(*size, mode, kind, 0, 0, digest_of(content), b"", _is_clear(image)), small
    return examined(content, form)[1], None


def reason(error: Exception) -> str:
    """An error in a few words, without the path that the message around it names."""
    if isinstance(error, Image.DecompressionBombError):
        return "a decompression bomb: far more pixels than a picture has"
    if isinstance(error, UnidentifiedImageError):
        return "in no format that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return ascii(first_line(error))[1:-1][:200]
