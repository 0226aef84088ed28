"""How gradients of several processes become one: their sum, by a hook of DDP's.

DDP by itself takes a mean. A sum lets every image weigh the same to the bit on any number of processes: 1 / batch.
"""

# No `from __future__ import annotations`: DDP compares the annotations of a hook with the types themselves.

import torch
import torch.distributed as dist
from torch import nn

from dist_ae.processes.host_memory import SharedSum, share_memory
from dist_ae.processes.runtime import Runtime


def sum_gradients(model: nn.Module, runtime: Runtime, rounded: bool) -> None:
    """Makes DDP add up gradients, through shared memory where all processes are on one machine's CPU.

    Args:
        model: what Accelerate prepared for several processes.
        rounded: gradients travel as bfloat16, half the bytes.
    """
    dtype = torch.bfloat16 if rounded else runtime.dtype
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    slots = share_memory(runtime, num_bytes) if runtime.device.type == "cpu" else None
    hook = _add_rounded if rounded else _add
    model.register_comm_hook(None, hook if slots is None else SharedSum(slots, runtime, dtype).hook)  # type: ignore[operator]


def _add(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _add_rounded(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    gradient = bucket.buffer()
    work = dist.all_reduce(gradient.to(torch.bfloat16), async_op=True)
    return work.get_future().then(lambda future: gradient.copy_(future.value()[0]))
