"""How the gradients of several processes become one: their sum, by a communication hook of DDP.

DDP itself takes a mean. With a sum, every image weighs the same to the bit on any number of processes: 1 / batch.
"""

# Without `from __future__ import annotations`: DDP compares a hook's annotations with the types themselves.

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from dist_ae.processes.host_memory import SharedSum, share_memory
from dist_ae.processes.runtime import Runtime

Gradient = torch.futures.Future[torch.Tensor]  # what a hook returns: the gradient once it has arrived


def sum_gradients(model: nn.Module, runtime: Runtime, rounded: bool) -> str:
    """Makes DDP add up gradients, through shared memory where all processes are on one machine's CPU.

    Args:
        model: what Accelerate prepared for several processes.
        rounded: gradients travel as bfloat16, which halves the bytes.

    Returns:
        How they travel, in words.
    """
    dtype = torch.bfloat16 if rounded else runtime.dtype
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    slots = share_memory(runtime, num_bytes) if runtime.device.type == "cpu" else None
    if slots is not None:
        model.register_comm_hook(None, SharedSum(slots, runtime, dtype).hook)  # type: ignore[operator]
    else:
        model.register_comm_hook(runtime, _add_rounded if rounded else _add)  # type: ignore[operator]
    way = f"by {dist.get_backend()}" if slots is None else "through shared memory"
    return f"{num_bytes:,} bytes a step as {str(dtype).removeprefix('torch.')}, added up {way}"


def add_up(parameters: Sequence[nn.Parameter]) -> None:
    """Adds up the gradients of all processes, in one piece and one exchange that a CUDA graph can hold."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _add(runtime: Runtime, bucket: dist.GradBucket) -> Gradient:  # type: ignore[name-defined]
    since = _now(runtime)
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    arrived: Gradient = work.get_future().then(lambda future: _arrived(runtime, since, future.value()[0]))
    return arrived


def _add_rounded(runtime: Runtime, bucket: dist.GradBucket) -> Gradient:  # type: ignore[name-defined]
    since, gradient = _now(runtime), bucket.buffer()
    work = dist.all_reduce(gradient.to(torch.bfloat16), async_op=True)
    future = work.get_future()
    arrived: Gradient = future.then(lambda sums: _arrived(runtime, since, gradient.copy_(sums.value()[0])))
    return arrived


def _now(runtime: Runtime) -> float | None:
    """When a gradient sets out. On a GPU it travels unseen by the host, and only a profile shows it (--profile)."""
    return time.perf_counter() if runtime.device.type == "cpu" else None


def _arrived(runtime: Runtime, since: float | None, gradient: torch.Tensor) -> torch.Tensor:
    if since is not None:
        runtime.clock.count("communication", since)
    return gradient
