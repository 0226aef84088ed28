"""Images of a split as floats on a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_ae.data.records import Split


class Reader:
    """Images of a split on a device, as floats on [0, 1].

    A split that fits lives on the device in its stored type and is indexed there; a larger one is read from the memory map
    batch by batch, through pinned memory, which costs a host copy per image.
    """

    def __init__(self, split: Split, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.split, self.device, self.dtype = split, device, dtype
        self.resident: Tensor | None = None
        if not isinstance(split.images, np.memmap) and split.images.nbytes <= _free_bytes(device) // 2:
            self.resident = torch.from_numpy(split.images).to(device)

    @property
    def placement(self) -> str:
        """How large the images are and where they are kept, for a person."""
        size = len(self.split) * self.split.images[0].nbytes
        amount = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        return f"{amount} {'in memory' if self.resident is not None else 'memory-mapped'}"

    def raw(self, rows: Tensor) -> Tensor:
        """rows [B], int64 → images [B, C, H, W] on the host, as they are stored."""
        index = rows.cpu().numpy()
        index = index if self.split.rows is None else self.split.rows[index]
        return torch.from_numpy(np.ascontiguousarray(self.split.images[index]))

    def take(self, rows: Tensor) -> Tensor:
        """rows [B], int64, on the host or the device → images [B, C, H, W] on [0, 1]."""
        if self.resident is not None:
            images = self.resident.index_select(0, rows.to(self.device, non_blocking=True))
        else:
            index = rows.cpu().numpy()
            index = index if self.split.rows is None else self.split.rows[index]
            images = torch.from_numpy(self.split.images[index])
            if self.device.type == "cuda":
                images = images.pin_memory()
            images = images.to(self.device, non_blocking=True)
        floats = images.to(self.dtype)
        return floats.div_(255) if images.dtype == torch.uint8 else floats

    def span(self, rows: range) -> Tensor:
        """Images ``rows`` of the split, in order."""
        return self.take(torch.arange(rows.start, rows.stop))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**62
