"""Reads images of a split as floats on a device."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.filesize import decimal
from torch import Tensor

from dist_ae import devices
from dist_ae.data.crops import Crops
from dist_ae.data.decode import processes_here
from dist_ae.data.records import Array, Split, chunks, gather, is_mapped, read_ahead, span, stored_order

# Share of the free memory for all images that a process holds. The rest is for weights, activations and other programs.
SHARE_OF_MEMORY = 0.5
MOST_COPIED = 2**28  # bytes of mapped floats that are copied into a process's own memory
_held: dict[torch.device, int] = {}  # bytes that this process's readers hold


class Reader:
    """Images of a split on a device, as floats on [0, 1], or standardized. Values do not depend on their place.

    A split that fits lives on the device in its stored type and is indexed there. A larger one is read batch by batch
    from its mapped file; a thread can gather the next batch in the meantime (``then`` of ``take``).

    ``resident`` is the split on the device, or None; ``held`` describes the choice in words. ``standardized`` and
    ``missing`` are those of the split's scaling.
    """

    def __init__(self, split: Split, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.split, self.device, self.dtype = split, device, dtype
        self.standardized = split.scaling is not None and split.scaling.standardized
        self.missing = split.scaling is not None and split.scaling.missing
        self._units: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # offset and scale, by the type of the values
        self.resident: Tensor | None = None
        self._rows: Tensor | None = None  # rows of the split in `resident`, if that holds more images
        axes = stored_order(split.images) if isinstance(split.images, np.ndarray) else (0, 1, 2, 3)
        self._axes = axes if axes[0] == 0 else (0, 1, 2, 3)  # images that are not contiguous are copied
        self._ahead: tuple[Array, Future[Tensor]] | None = None
        self._thread: ThreadPoolExecutor | None = None
        stored_type = _stored_type(split.images.dtype)
        num_bytes = len(split) * int(np.prod(split.images.shape[1:])) * np.dtype(stored_type).itemsize
        whole = split.images
        endless = isinstance(whole, Crops) and split.rows is None  # crops at any place cannot be held
        if device.type == "cpu" and isinstance(whole, np.ndarray) and not is_mapped(whole) and axes[0] == 0:
            # Already in memory: no second copy, even if another split has the other rows.
            self.resident = _tensor(whole, self._axes)
            self._rows = None if split.rows is None else torch.from_numpy(split.rows)
        elif not endless and num_bytes <= min(_room(device), MOST_COPIED if _is_warm(split, device) else math.inf):
            self.resident = self._copy()
            _held[device] = _held.get(device, 0) + num_bytes
            weakref.finalize(self, _give_back, device, num_bytes)
        # A tensor on the device: CUDA's kernel replaces the division by a host number by a product with 1 / 255, which
        # differs in the last bits.
        largest = 1.0 if stored_type is np.float32 else float(np.iinfo(stored_type).max)
        self._levels = torch.full((), largest, dtype=dtype, device=device)
        where = "in memory" if device.type == "cpu" else f"on {device.type}"
        if self.resident is None:
            where = "memory-mapped" if is_mapped(split.images) else "in the memory of the host"
        if isinstance(whole, Crops) and endless:
            num_bytes = whole.pictures.nbytes
        self.held = f"{decimal(num_bytes)} {where}"

    def _copy(self) -> Tensor:
        kind = _tensor(self.split.images[:0], self._axes).dtype
        shape = [self.split.images.shape[axis] for axis in self._axes[1:]]
        result = torch.empty(len(self.split), *shape, dtype=kind, device=self.device)
        for rows in chunks(self.split):
            result[rows.start : rows.stop] = _tensor(span(self.split, rows), self._axes)
        return result

    def raw(self, rows: Tensor, then: Tensor | None = None) -> Tensor:
        """rows [B], int64, on the host or the device → images [B, C, H, W] on the device, in their stored type.

        Args and errors are those of ``take``.
        """
        if self.resident is not None:
            rows = rows.to(self.device, non_blocking=True)
            images = self.resident.index_select(0, rows if self._rows is None else self._rows[rows])
        else:
            index = rows.cpu().numpy()
            ahead, self._ahead = self._ahead, None
            if ahead is not None and np.array_equal(ahead[0], index):
                images = ahead[1].result()
            else:
                images = _collect(self.split, index, self._axes, devices.pins(self.device))
            if then is not None:
                self._start(then.cpu().numpy())
            images = images.to(self.device, non_blocking=True)
        return images.permute(*np.argsort(self._axes).tolist())

    def take(self, rows: Tensor, then: Tensor | None = None) -> Tensor:
        """rows [B], int64, on the host or the device → images [B, C, H, W] on [0, 1].

        Args:
            then: the rows of the next call, which a thread starts to gather after this call. Only a hint: the next call
                may ask for other rows.

        Raises:
            OSError, IndexError: from gathering, also in the thread.
        """
        return self.scaled(self.raw(rows, then), self.dtype)

    def each(self, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """``take`` of one piece of rows after the other, while a thread reads the next one."""
        for rows, then in zip_longest(pieces, pieces[1:]):
            yield self.take(rows, None if self.resident is not None else then)

    def scaled(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored images [B, C, H, W] → floats of ``dtype`` on the model's scale."""
        if stored.dtype == torch.int16:  # holds the bits of uint16, for which torch has few operations
            stored = stored.to(torch.int32).bitwise_and_(0xFFFF)
        floats = stored.to(dtype, memory_format=torch.contiguous_format)
        if self.split.scaling is None:
            return floats.contiguous() if stored.is_floating_point() else floats.div_(self._levels.to(dtype))
        if dtype not in self._units:
            offset, scale = (torch.from_numpy(units).to(dtype).to(stored.device) for units in self.split.scaling[:2])
            self._units[dtype] = offset, scale
        offset, scale = self._units[dtype]
        return floats.sub(offset).div_(scale).contiguous()  # a new tensor: the stored records are kept

    def _start(self, index: Array) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "images")
            weakref.finalize(self, self._thread.shutdown, cancel_futures=True)  # it ends with the reader
        pin = devices.pins(self.device)
        self._ahead = index, self._thread.submit(_collect, self.split, index, self._axes, pin)

    def span(self, rows: range) -> Tensor:
        """Images ``rows`` of the split, in order."""
        return self.take(torch.arange(rows.start, rows.stop))


def _collect(split: Split, index: Array, axes: tuple[int, ...], pin: bool) -> Tensor:
    """Images at positions ``index``, with their axes in stored order."""
    rows = index if split.rows is None else split.rows[index]
    if is_mapped(split.images):
        read_ahead(split.images, rows)
    images = _tensor(gather(split.images, rows), axes)
    return images.pin_memory() if pin else images


def _stored_type(dtype: np.dtype[Any]) -> type:
    """The type of images in memory: uint8 and uint16 stay, all others become float32."""
    return {np.dtype(np.uint8): np.uint8, np.dtype(np.uint16): np.uint16}.get(dtype, np.float32)


def _tensor(images: Array, axes: tuple[int, ...]) -> Tensor:
    stored = np.require(images.transpose(axes), _stored_type(images.dtype), ["C", "W"])
    return torch.from_numpy(stored.view(np.int16) if stored.dtype == np.uint16 else stored)


def _is_warm(split: Split, device: torch.device) -> bool:
    """Whether the system's cache holds the records already, because their scale was just computed.

    All processes share that cache, and the system shrinks it when memory is short.
    """
    return device.type == "cpu" and is_mapped(split.images) and split.scaling is not None


def _room(device: torch.device) -> int:
    """Bytes that a reader may still use: all readers of this process share one budget."""
    held = _held.get(device, 0)
    return int(SHARE_OF_MEMORY * (_free_bytes(device, held) + held)) - held


def _give_back(device: torch.device, num_bytes: int) -> None:
    _held[device] -= num_bytes


def _free_bytes(device: torch.device, held: int = 0) -> int:
    free = devices.free_bytes(device, held)
    if free is not None:
        return free
    # Each process of this machine holds its own copy, and all of them check at about the same time.
    return free_memory() // processes_here()


def free_memory(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still allocate.

    The least of the machine's free memory, the room in its control groups (v1 and v2), and the room under `ulimit -v`.
    """
    free: int = psutil.virtual_memory().available
    with contextlib.suppress(OSError):
        for line in cgroup.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                free = min(free, *_group_free(root, path, "memory.max", "memory.current", "inactive_file"), free)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                free = min(free, *_group_free(root / "memory", path, *names), free)
    with contextlib.suppress(ModuleNotFoundError):  # on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - psutil.Process().memory_info().vms)
    return max(0, free)


def _group_free(root: Path, path: str, limit: str, used: str, cache: str) -> list[int]:
    """The free bytes of each control group, from this process's own up to the root.

    File pages that can be dropped count as free.
    """
    free = []
    group = root / path.strip("/")
    for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())  # "max": no limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        free.append(most - now + int(stat.get(cache, 0)))
    return free
