"""The order in which training takes images, and how processes share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_ae.draws import keyed_seed


def evenly_spaced(count: int, most: int) -> Tensor:
    """At most ``most`` evenly spaced rows of ``count``; all of them if there are fewer."""
    size = min(count, most)
    return torch.arange(size) * count // max(size, 1)


def epoch_order(
    seed: int, epoch: int, num_images: int, shards: Sequence[int] | None = None, window: int | None = None
) -> Tensor:
    """The permutation [num_images] of an epoch: a pure function, so resuming anywhere is arithmetic.

    With ``window``, first the shards (of ``shards`` images each) are permuted, then the images within each group of
    ``window`` shards. Then only that many shards are read at a time, as a slow disk or network needs.
    """
    generator = torch.Generator().manual_seed(keyed_seed(seed, "order", epoch))
    if window is None or shards is None or len(shards) <= window:
        return torch.randperm(num_images, generator=generator)
    assert sum(shards) == num_images
    sizes = torch.tensor(shards)
    starts = sizes.cumsum(0) - sizes
    parts = []
    for group in torch.split(torch.randperm(len(shards), generator=generator), window):
        spans = torch.stack([starts, sizes], 1)[group].tolist()
        rows = torch.cat([torch.arange(start, start + size) for start, size in spans])
        parts.append(rows[torch.randperm(len(rows), generator=generator)])
    return torch.cat(parts)


def share(rows: range, rank: int, world: int) -> range:
    """This process's contiguous part of ``rows``. Parts differ by at most one row; some may be empty."""
    return range(rows.start + len(rows) * rank // world, rows.start + len(rows) * (rank + 1) // world)
