"""The same draws on a GPU, to the bit: one kernel per stream and step.

Imported only when it is used, since it needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from dist_ae import devices
from dist_ae.draws.philox import HALVES, LEVELS, blocks_per_row, table_of, threshold

BLOCKS = 128  # generator blocks that one program works on


@triton.jit
def _fill(
    out, table, key, step, first, num_blocks, width, per_row, limit, scale, MASK: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    c0 = (first + block + 1).to(tl.uint64)  # numpy increments the counter before each block
    zero = c0 * 0
    c1 = zero + tl.load(step).to(tl.uint64)
    k0 = tl.load(key).to(tl.uint64, bitcast=True)
    k1 = tl.load(key + 1).to(tl.uint64, bitcast=True)
    w0, w1, w2, w3 = philox_impl(c0, c1, zero, zero, k0, k1)
    # [BLOCKS, 16]: the 16 halves of a block lie side by side, so one store takes whole lines of memory.
    half = tl.arange(0, 16)[None, :]
    low, high = tl.where(half < 4, w0[:, None], w1[:, None]), tl.where(half < 12, w2[:, None], w3[:, None])
    word = tl.where(half < 8, low, high)
    bits = ((word >> (16 * (half % 4)).to(tl.uint64)) & 0xFFFF).to(tl.int32)
    if MASK:
        value = tl.where(bits < limit, scale, 0.0)
    else:
        value = tl.load(table + bits)
    column = ((block % per_row) * 16)[:, None] + half
    tl.store(out + ((block // per_row) * width)[:, None] + column, value, mask=inside[:, None] & (column < width))


Values = float | tuple[float, float]  # see philox.table_of
_tables: dict[tuple[torch.device, Values], Tensor] = {}
_keys: dict[tuple[torch.device, int, int], Tensor] = {}


def _table(device: torch.device, values: Values) -> Tensor:
    if (device, values) not in _tables:
        _tables[device, values] = torch.from_numpy(table_of(values)).to(device)
    return _tables[device, values]


def _key(device: torch.device, seed: int, stream: int) -> Tensor:
    if (device, seed, stream) not in _keys:
        signed = [value - 2**64 if value >= 2**63 else value for value in (seed, stream)]
        _keys[device, seed, stream] = torch.tensor(signed, dtype=torch.int64, device=device)
    return _keys[device, seed, stream]


def draw_on_device(
    seed: int,
    stream: int,
    step: Tensor,
    rows: range,
    width: int,
    device: torch.device,
    values: Values | None,
    keep: float,
) -> Tensor:
    """Rows of a table of draws, float32 [len(rows), width]: ``philox.numbers`` of ``values``, else ``philox.masks``.

    Args:
        step: int64 [], on the device, so that a captured kernel can be replayed at another step.
    """
    out = torch.empty(len(rows), width, device=device)
    per_row, limit = blocks_per_row(width), threshold(keep)
    num_blocks = len(rows) * per_row
    if num_blocks:
        table, key = out if values is None else _table(device, values), _key(device, seed, stream)
        grid, first, scale = (triton.cdiv(num_blocks, BLOCKS),), rows.start * per_row, LEVELS / limit
        with devices.current(device):  # Triton launches on the current device, wherever its tensors are
            _fill[grid](
                out,
                table,
                key,
                step,
                first,
                num_blocks,
                width,
                per_row,
                limit,
                scale,
                MASK=values is None,
                BLOCKS=BLOCKS,
            )
    return out


assert HALVES == 16  # the kernel's loop relies on it
