"""Whole pictures of a packed set that are stored as the bytes of their files, and decoded when they are read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dist_ae.config import InputError
from dist_ae.data.decode import cores, processes_here
from dist_ae.data.deep import widened
from dist_ae.data.form import Form, decode, reason
from dist_ae.data.records import Array


class Encoded:
    """Pictures as the bytes of their files, one after the other in flat arrays, with the same pixels as ``Whole``.

    Decoding 12 megapixels of JPEG takes about 0.1 s of a core, so this is for sets whose pixels need too much room.
    """

    def __init__(
        self,
        parts: Sequence[Array],
        ends: Sequence[Array],
        sizes: Array,
        form: Form,
        channels: int,
        dtype: np.dtype[Any],
    ) -> None:
        """Args:
        parts: the bytes of the pictures of each shard, uint8.
        ends: where the pictures of each shard end in these bytes, int64 [n].
        sizes: heights and widths of all decoded pictures, int64 [N, 2].
        form: the form of the decoded pictures.
        """
        self.parts, self.sizes, self.channels, self.dtype = parts, sizes, channels, dtype
        self.nbytes = sum(part.nbytes for part in parts)
        self._part = np.repeat(np.arange(len(parts)), [len(shard_ends) for shard_ends in ends])
        self._end = np.concatenate(ends)
        self._start = np.concatenate([np.append(0, shard_ends[:-1]) for shard_ends in ends])
        self._form = form
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def picture(self, number: int) -> Array:
        """One picture [C, H, W], decoded.

        Raises:
            InputError: its bytes cannot be decoded, or not to the packed shape and type.
        """
        place = slice(int(self._start[number]), int(self._end[number]))
        try:
            pixels = decode(self.parts[int(self._part[number])][place].tobytes(), self._form)
        except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
            raise InputError(f"picture {number:,} of the packed set cannot be decoded ({reason(error)})") from None
        if self.dtype == np.uint16 and pixels.dtype == np.uint8:
            pixels = widened(pixels)
        shape = (self.channels, *self.sizes[number].tolist())
        if pixels.shape != shape or pixels.dtype != self.dtype:
            raise InputError(
                f"picture {number:,} of the packed set gives {pixels.dtype} {list(pixels.shape)}, but {self.dtype} "
                f"{list(shape)} was packed; pack again"
            )
        return pixels

    def work(self, function: Callable[[Any], None], pieces: Iterable[Any]) -> None:
        """Calls a function with each piece, on threads: decoders release Python's lock."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max(1, cores() // processes_here()), "decoding")
            weakref.finalize(self, self._threads.shutdown, cancel_futures=True)
        list(self._threads.map(function, pieces))
