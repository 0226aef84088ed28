"""Whole pictures of a packed set that stay as their files have them, and are decoded where they are read."""

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
    """Pictures as the bytes of their files, one after the other in flat arrays. Their pixels are those of ``Whole``.

    Decoding 12 megapixels of JPEG takes about 0.1 s of a core, so it is for sets whose pixels have no room.
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
        parts: of each shard, the bytes of its pictures, uint8.
        ends: of each shard, where pictures end in them, int64 [n].
        sizes: heights and widths of all pictures once they are decoded, int64 [N, 2].
        form: what they are decoded to.
        """
        self.parts, self.sizes, self.channels, self.dtype = parts, sizes, channels, dtype
        self.nbytes = sum(part.nbytes for part in parts)
        self._part = np.repeat(np.arange(len(parts)), [len(each) for each in ends])
        self._end = np.concatenate(ends)
        self._start = np.concatenate([np.append(0, each[:-1]) for each in ends])
        self._form = form
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def picture(self, number: int) -> Array:
        """One picture [C, H, W], decoded.

        Raises:
            InputError: its bytes give no such picture.
        """
        place = slice(int(self._start[number]), int(self._end[number]))
        try:
            pixels = decode(self.parts[int(self._part[number])][place].tobytes(), self._form)
        except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
            raise InputError(f"picture {number:,} of the packed set cannot be decoded ({reason(error)})") from None
        if self.dtype == np.uint16 and pixels.dtype == np.uint8:
            pixels = widened(pixels)
        wanted = (self.channels, *self.sizes[number].tolist())
        if pixels.shape != wanted or pixels.dtype != self.dtype:
            raise InputError(
                f"picture {number:,} of the packed set gives {pixels.dtype} {list(pixels.shape)}, and {self.dtype} "
                f"{list(wanted)} was packed; pack again"
            )
        return pixels

    def work(self, function: Callable[[Any], None], pieces: Iterable[Any]) -> None:
        """Calls a function with each piece, on the threads of this process: decoders leave Python's lock free."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max(1, cores() // processes_here()), "decoding")
            weakref.finalize(self, self._threads.shutdown, cancel_futures=True)
        list(self._threads.map(function, pieces))
