"""The order in which training takes images, and how processes share it."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_ae.draws import keyed_seed


def epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    """The permutation [num_images] of an epoch: a pure function, so resuming anywhere is arithmetic."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(keyed_seed(seed, "order", epoch)))


def share(rows: range, rank: int, world: int) -> range:
    """The contiguous part of ``rows`` that is this process's. Parts differ by at most one row; some may be empty."""
    return range(rows.start + len(rows) * rank // world, rows.start + len(rows) * (rank + 1) // world)
