"""Sums the gradients of several processes, by a communication hook of DDP.

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

Gradient = torch.futures.Future[torch.Tensor]  # what a hook returns: the summed gradient, once it is there


def sum_gradients(model: nn.Module, runtime: Runtime, rounded: bool) -> str:
    """Makes DDP sum gradients, through shared memory if all processes are on one machine's CPU.

    Args:
        model: the model as Accelerate prepared it for several processes.
        rounded: exchange gradients as bfloat16, which halves the bytes.

    Returns:
        A description of the exchange.
    """
    dtype = torch.bfloat16 if rounded else runtime.dtype
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    slots = share_memory(runtime, num_bytes) if runtime.device.type == "cpu" else None
    if slots is not None:
        model.register_comm_hook(None, SharedSum(slots, runtime, dtype).hook)  # type: ignore[operator]
    else:
        model.register_comm_hook(runtime, _sum_rounded if rounded else _sum)  # type: ignore[operator]
    way = f"by {dist.get_backend()}" if slots is None else "through shared memory"
    return f"{num_bytes:,} bytes a step as {str(dtype).removeprefix('torch.')}, added up {way}"


def add_up(parameters: Sequence[nn.Parameter]) -> None:
    """Sums the gradients of all processes in one exchange, which a CUDA graph can hold."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _sum(runtime: Runtime, bucket: dist.GradBucket) -> Gradient:  # type: ignore[name-defined]
    since = _start_of_exchange(runtime)
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    summed: Gradient = work.get_future().then(lambda future: _count_exchange(runtime, since, future.value()[0]))
    return summed


def _sum_rounded(runtime: Runtime, bucket: dist.GradBucket) -> Gradient:  # type: ignore[name-defined]
    since, gradient = _start_of_exchange(runtime), bucket.buffer()
    work = dist.all_reduce(gradient.to(torch.bfloat16), async_op=True)
    future = work.get_future()
    summed: Gradient = future.then(lambda sums: _count_exchange(runtime, since, gradient.copy_(sums.value()[0])))
    return summed


def _start_of_exchange(runtime: Runtime) -> float | None:
    """When an exchange begins. On a GPU the host does not see it, and only a profile shows it (--profile)."""
    return time.perf_counter() if runtime.device.type == "cpu" else None


def _count_exchange(runtime: Runtime, since: float | None, gradient: torch.Tensor) -> torch.Tensor:
    if since is not None:
        runtime.clock.count("communication", since)
    return gradient
