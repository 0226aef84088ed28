"""Reads and writes pictures of more than 8 bits, as 16 bits.

Imports no torch: the processes that decode pictures start without it.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dist_ae.data.records import Array

MOST = 65535
BITS_PER_SAMPLE, PLANES = 258, 284  # tags of a TIFF
LUMA = np.array([0.299, 0.587, 0.114])  # Pillow's weights for grey
OTHER_WAY = "save it as a PNG or TIFF of red, green and blue, or use 8 bits of each: --data.bits 8"


def is_deep(image: Image.Image) -> bool:
    """Whether a picture that is not loaded yet has more than 8 bits per value, so that it needs ``pixels_of``."""
    if image.mode == "F" or image.mode.startswith("I"):
        return True
    tags = getattr(image, "tag_v2", {})
    if image.mode in ("RGB", "RGBA") and max(_numbers(tags.get(BITS_PER_SAMPLE))) > 8 and tags.get(PLANES) == 2:
        raise ValueError(f"16-bit colour in separate planes, which Pillow misreads; {OTHER_WAY.partition(',')[0]}")
    return any(";16" in _raw_mode(tile) for tile in getattr(image, "tile", ()) if image.mode in ("RGB", "RGBA"))


def _numbers(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) and value else (8,)


def _raw_mode(tile: Any) -> str:
    args = tile[3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def grey_of(image: Image.Image) -> Array:
    """Grey of 16 or 32 bits, or floats on [0, 1], as uint16 [H, W].

    Raises:
        ValueError: the values do not fit into 16 bits.
    """
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"floats from {pixels.min()} to {pixels.max()}; expected [0, 1]")
        return rounded(pixels * float(MOST))
    if pixels.min() < 0 or pixels.max() > MOST:
        raise ValueError(f"integers from {pixels.min()} to {pixels.max()}; expected 16 bits")
    if pixels.dtype.itemsize > 2 and 0 < pixels.max() < 256:  # as 16 bits they would be black
        raise ValueError(f"integers of 32 bits up to {pixels.max()}: 8 or 16 bits? Save it as one of the two")
    return pixels.astype(np.uint16)


def colour_of(image: Any, opened: Callable[[], Any] | None) -> Array:
    """Colour of 16 bits as uint16 [H, W, 3 or 4].

    Pillow has no such mode, and reads one byte of two. With the byte order swapped, it reads the other one.

    Raises:
        ValueError: Pillow can read only one byte of this format.
    """
    if opened is None:
        raise ValueError("16-bit colour of which only 8 bits are available")
    with opened() as again:
        again.seek(image.tell())
        again.tile = [tile._replace(args=_swapped(tile[3])) for tile in again.tile]
        try:
            low = np.asarray(again)
        except ValueError:
            raise ValueError(
                f"16-bit {_raw_mode(image.tile[0]).partition(';')[0]}, of which Pillow reads 8 bits; {OTHER_WAY}"
            ) from None
    high = np.asarray(image)
    both: Array = high.astype(np.uint16) << 8 | low
    return both


def _swapped(args: Any) -> Any:
    order = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
    mode = args[0] if isinstance(args, tuple) else args
    for ending, other in order.items():
        if mode.endswith(ending):
            mode = mode.removesuffix(ending) + other
            break
    return (mode, *args[1:]) if isinstance(args, tuple) else mode


def pixels_of(
    image: Image.Image, opened: Callable[[], Image.Image] | None, grey: bool, background: tuple[int, int, int]
) -> Array:
    """A deep picture as uint16 [1 or 3, H, W], on a background if it is transparent."""
    clear = image.info.get("transparency")  # of a PNG: the value or colour that is transparent
    pixels = grey_of(image)[..., None] if image.mode == "F" or image.mode.startswith("I") else colour_of(image, opened)
    colours = pixels[..., :3]
    opacity: Array | None = pixels[..., 3:] / MOST if pixels.shape[2] == 4 else None
    if isinstance(clear, int | tuple):
        opacity = (colours != np.array(clear)).any(2, keepdims=True)
    if opacity is not None and not np.all(opacity == 1):
        behind = np.array(background) * 257.0
        colours = rounded(colours * opacity + behind * (1 - opacity))
    if grey and colours.shape[2] == 3:
        colours = rounded(colours @ LUMA)[..., None]
    if not grey and colours.shape[2] == 1:
        colours = colours.repeat(3, 2)
    return np.ascontiguousarray(colours.transpose(2, 0, 1))


def shade_of(colour: tuple[int, int, int], grey: bool) -> list[float]:
    """A colour of 8 bits as values of 16 bits, one per channel."""
    return [float(np.dot(colour, LUMA)) * 257] if grey else [value * 257.0 for value in colour]


def rounded(values: Array) -> Array:
    whole: Array = np.rint(np.clip(values, 0, MOST)).astype(np.uint16)
    return whole


def widened(pixels: Array) -> Array:
    """8 bits as 16, exactly: v / 255 = 257 v / 65,535."""
    wide: Array = pixels.astype(np.uint16) * np.uint16(257)
    return wide


def narrowed(pixels: Array) -> Array:
    """16 bits as 8, rounded."""
    narrow: Array = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return narrow


def png(pixels: Array, exif: Image.Exif | None = None, profile: bytes | None = None) -> bytes:
    """uint16 [C, H, W], grey or colour, as a PNG of 16 bits; Pillow can write only grey.

    Args:
        profile: ICC, of its colours.
    """
    channels, height, width = pixels.shape
    lines = pixels.transpose(1, 2, 0).astype(">u2").tobytes()
    size = len(lines) // height
    rows = b"".join(b"\0" + lines[at : at + size] for at in range(0, len(lines), size))  # 0: no filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    whole = chunk(b"IHDR", head)
    if profile:
        whole += chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
    if exif:
        whole += chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    return b"\x89PNG\r\n\x1a\n" + whole + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels: Array, exif: Image.Exif | None = None, profile: bytes | None = None) -> bytes:
    """uint16 [1, H, W] as a TIFF."""
    file, options = io.BytesIO(), {"exif": exif} if exif else {}
    Image.fromarray(pixels[0]).save(file, "TIFF", compression="tiff_adobe_deflate", icc_profile=profile, **options)
    return file.getvalue()
