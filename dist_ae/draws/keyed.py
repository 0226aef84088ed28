"""Keyed random draws: the noise, masks and ε of a step as a function of (seed, stream, step, block of 32 rows).

A process draws the blocks its rows lie in and nothing else, so the draws do not depend on how many processes there are,
on accumulation, or on what was drawn before. Nothing here touches torch's global generators.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_ae.config import Config

BLOCK = 32  # rows per generator seed: small enough for small shares, large enough that seeding costs 5 % of drawing


class Draws(NamedTuple):
    """What is random in one forward pass, for B images. ``None`` means that this model has no such draw."""

    noise: Tensor | None = None  # [B, C, H, W], already scaled: added to the input
    masks: tuple[Tensor, ...] = ()  # one [B, width] per hidden layer, encoder first: 0 or 1 / (1 - p)
    epsilon: Tensor | None = None  # [B, latent_dim], standard normal


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from any key. torch's CPU generator uses the low 32 bits, which a cryptographic hash fills evenly."""
    packed = b"".join(struct.pack("<q", part) if isinstance(part, int) else part.encode() + b"\0" for part in key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def keyed(
    kind: str, key: tuple[int, str, int], rows: range, shape: Sequence[int], device: torch.device, keep: float = 1.0
) -> Tensor:
    """Rows ``rows`` of an endless keyed table of draws, float32 [len(rows), *shape].

    Args:
        kind: "normal", or "mask" for 1 / keep with probability ``keep`` and else 0.
        key: seed, stream, step. Evaluation uses the rows of the dataset and step 0.
    """
    generator = torch.Generator(device)
    first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
    # Whole blocks, also at the ends: a block cut short would be drawn by another code path of torch and differ.
    table = torch.empty((last - first) * BLOCK, *shape, device=device)
    for block in range(first, last):
        generator.manual_seed(keyed_seed(*key, block))
        part = table[(block - first) * BLOCK : (block - first + 1) * BLOCK]
        if kind == "normal":
            part.normal_(generator=generator)
        else:
            part.bernoulli_(keep, generator=generator)
    if kind == "mask":
        table.div_(keep)
    return table[rows.start - first * BLOCK : rows.stop - first * BLOCK]


class DrawShapes(NamedTuple):
    """The shapes of one image's draws. ``None`` and () mean that the model has no such draw."""

    noise: tuple[int, ...]
    masks: tuple[tuple[int, ...], ...]
    epsilon: tuple[int, ...] | None


def draw(
    shapes: DrawShapes,
    config: Config,
    step: int,
    rows: range,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Draws:
    """The draws of one training step for rows ``rows`` of its global batch.

    They are always drawn in float32, so that fp64 repeats the fp32 experiment.
    """
    std, dropout = config.objective.noise_std, config.model.dropout

    def normal(stream: str, shape: Sequence[int]) -> Tensor:
        return keyed("normal", (config.seed, stream, step), rows, shape, device).to(dtype)

    def mask(layer: int, shape: Sequence[int]) -> Tensor:
        return keyed("mask", (config.seed, f"mask.{layer}", step), rows, shape, device, keep=1 - dropout).to(dtype)

    return Draws(
        noise=normal("noise", shapes.noise).mul_(std) if std else None,
        masks=tuple(mask(layer, shape) for layer, shape in enumerate(shapes.masks)) if dropout else (),
        epsilon=normal("epsilon", shapes.epsilon) if shapes.epsilon is not None else None,
    )
