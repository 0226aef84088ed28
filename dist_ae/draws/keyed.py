"""Random draws as a function of (seed, stream, step, row), the same on any number of processes and on every device.

A process draws the rows it needs and nothing else. Nothing here touches torch's global generators.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dist_ae import devices
from dist_ae.draws import philox
from dist_ae.terminal import first_line, say

VERSION = 2  # of the draws, kept in config.json. Version 1 re-seeded one of torch's generators for every 32 rows


class Draws(NamedTuple):
    """The random draws of a forward pass for B images. ``None`` and () mean that the model has no such draw."""

    noise: Tensor | None = None  # [B, C, H, W], already scaled: added to the input
    masks: tuple[Tensor, ...] = ()  # one [B, *mask_shape] per dropout layer, encoder first: 0 or 1 / keep
    epsilon: Tensor | None = None  # [B, *code_shape], standard normal


class DrawShapes(NamedTuple):
    """The shapes of one image's draws. ``None`` and () mean that the model has no such draw."""

    noise: tuple[int, ...]
    masks: tuple[tuple[int, ...], ...]
    epsilon: tuple[int, ...] | None


class Step(NamedTuple):
    """A training step, twice: as a number for the host, and on the device, where a captured graph reads it."""

    number: int
    on_device: Tensor | None = None  # int64 []


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from any key, for torch's generators.

    torch's CPU generator uses the low 32 bits, which a hash fills evenly.
    """
    packed = b"".join(struct.pack("<q", part) if isinstance(part, int) else part.encode() + b"\0" for part in key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=1024)
def stream_key(stream: str) -> int:
    """The second word of a stream's key: 64 bits of a hash of its name."""
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


def drawn_on(device: torch.device) -> bool:
    """Whether draws are made on this device. Otherwise they are made on the host and copied."""
    return device.type == "cpu" or (devices.runs_kernels(device) and _kernel_works(device))


@lru_cache(maxsize=16)
def _kernel_works(device: torch.device) -> bool:
    """Whether the kernel runs on this device and gives the host's draws, to the bit. Tried once; warns if not.

    Triton builds a part of itself with a C compiler when a kernel is first launched, and many container images have
    none.
    """
    from dist_ae.draws.philox_triton import draw_on_device

    rows, width, std = range(1, 3), 20, 0.5
    try:
        now = torch.full((), 7, dtype=torch.int64, device=device)
        drawn = draw_on_device(3, 5, now, rows, width, device, std, 1.0).cpu()
        if torch.equal(drawn, torch.from_numpy(philox.numbers((3, 5, 7), rows, width, std))):
            return True
        reason = "its bits differ from the host's"
    except Exception as error:  # of Triton, the compiler that it calls, or the driver: of many types
        reason = f"{type(error).__name__}: {first_line(error)}"
    say(
        f"warning: the kernel for random draws does not run on {device} ({reason}); they are drawn on the host and "
        "copied, and no step becomes a graph. Triton needs a C compiler (gcc) and Python's headers (python3-dev)",
        sys.stderr,
    )
    return False


def _draw(
    seed: int,
    stream: str,
    step: Step,
    rows: range,
    shape: Sequence[int],
    device: torch.device,
    values: float | tuple[float, float] | None,
    keep: float,
) -> Tensor:
    width = math.prod(shape)
    seed, key = seed % 2**64, stream_key(stream)
    if device.type != "cpu" and drawn_on(device):
        from dist_ae.draws.philox_triton import draw_on_device

        # Fill, since the host would have to wait for a copy.
        now = step.on_device
        now = torch.full((), step.number, dtype=torch.int64, device=device) if now is None else now
        return draw_on_device(seed, key, now, rows, width, device, values, keep).view(len(rows), *shape)
    words = (seed, key, step.number)
    table = philox.masks(words, rows, width, keep) if values is None else philox.numbers(words, rows, width, values)
    return torch.from_numpy(table).view(len(rows), *shape).to(device)


def normal(
    seed: int, stream: str, step: Step, rows: range, shape: Sequence[int], device: torch.device, std: float = 1.0
) -> Tensor:
    """Rows ``rows`` of an endless table of normal draws, float32 [len(rows), *shape].

    Evaluation uses the rows of the data set and step 0.
    """
    return _draw(seed, stream, step, rows, shape, device, std, 1.0)


def mask(
    seed: int, stream: str, step: Step, rows: range, shape: Sequence[int], device: torch.device, keep: float
) -> Tensor:
    """Rows of an endless table of dropout masks, float32: 0, or 1 / keep with probability ``keep``, to 1 / 65,536."""
    return _draw(seed, stream, step, rows, shape, device, None, keep)


def draw(
    shapes: DrawShapes,
    step: Step,
    rows: range,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int,
    std: float | tuple[float, float] = 0.0,
    keep: float = 1.0,
) -> Draws:
    """The draws of one training step for rows ``rows`` of its global batch, in one call per stream.

    They are always drawn in float32, so that fp64 repeats the fp32 experiment.

    Args:
        std: standard deviation of the noise; 0 for none; given two numbers, each row draws its own between them.
        keep: probability that dropout keeps a unit; 1 for no dropout.
    """
    noise = None
    if isinstance(std, tuple):
        level = _draw(seed, "noise.level", step, rows, (1,) * len(shapes.noise), device, std, 1.0)
        noise = (level * normal(seed, "noise", step, rows, shapes.noise, device)).to(dtype)
    elif std:
        noise = normal(seed, "noise", step, rows, shapes.noise, device, std).to(dtype)
    masks: tuple[Tensor, ...] = ()
    if keep < 1:
        named = ((f"mask.{layer}", shape) for layer, shape in enumerate(shapes.masks))
        masks = tuple(mask(seed, stream, step, rows, shape, device, keep).to(dtype) for stream, shape in named)
    epsilon = None if shapes.epsilon is None else normal(seed, "epsilon", step, rows, shapes.epsilon, device).to(dtype)
    return Draws(noise, masks, epsilon)
