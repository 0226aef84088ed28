"""What a run needs to know of its processes: Accelerate's set-up, the batch plan and exact reductions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from dist_ae.config import Config, InputError

PRECISIONS = {"fp32": "no", "tf32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


def plan_batch(global_size: int, world: int, max_per_process: int | None = None) -> tuple[int, int]:
    """Cuts a global batch: (images per process and accumulation step, accumulation steps).

    Raises:
        InputError: the batch does not divide over the processes; names the nearest sizes that do.
    """
    if global_size % world:
        below, above = global_size // world * world, -(-global_size // world) * world
        nearest = f"{below} or {above}" if below else str(above)
        raise InputError(
            f"train.batch_size {global_size} does not divide over {world} processes; the nearest that do are {nearest}"
        )
    per_process = global_size // world
    accumulate = -(-per_process // min(max_per_process or per_process, per_process))
    return -(-per_process // accumulate), accumulate


def launched_world() -> tuple[int, int]:
    """(rank, number of processes) as the launcher put them into the environment.

    Raises:
        InputError: several processes are announced, but not all that they need to find each other.
    """
    world = max(
        int(os.environ.get(name, 1))
        for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    missing = [
        name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if world > 1 and missing and not dist.is_initialized():
        raise InputError(
            f"the environment announces {world} processes but {', '.join(missing)} is not set. {_HOW_TO_START}"
        )
    return int(os.environ.get("RANK", 0)), world


_HOW_TO_START = "Start with `accelerate launch` or `torchrun`, as in launch/README.md"


def check_device(config: Config) -> None:
    """Refuses a precision the device lacks, before any process group starts.

    Raises:
        InputError: with the reason and what to use instead.
    """
    on_cpu = _use_cpu()
    if config.precision == "fp16" and on_cpu:
        raise InputError("precision fp16 needs a GPU: torch has no gradient scaling for it on a CPU; use bf16 or fp32")
    if config.precision == "tf32" and (
        on_cpu or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8
    ):
        raise InputError("precision tf32 needs an NVIDIA GPU of the Ampere generation or later; use fp32 or bf16")
    if config.precision == "bf16" and not on_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError(f"precision bf16 is not supported by {torch.cuda.get_device_name()}; use fp16 or fp32")
    if config.precision == "fp64" and not on_cpu and not torch.cuda.is_available():
        raise InputError(
            "precision fp64 is not supported by this accelerator; set ACCELERATE_USE_CPU=true to run it on the CPU"
        )


def _use_cpu() -> bool:
    return (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()
    )


class Runtime:
    """What a training run needs to know of the processes it is made of."""

    def __init__(self, config: Config) -> None:
        """Starts (or joins) the process group.

        Raises:
            InputError: the launcher promised another number of processes than Accelerate sees.
        """
        _, launched = launched_world()
        # A second run in one process (a sweep's reused actor, a notebook) may want another precision: Accelerate's state is process-wide.
        self._owns_group = not dist.is_initialized()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        _, accumulate = plan_batch(config.train.batch_size, launched, config.train.max_per_process)
        on_cpu = _use_cpu()
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=PRECISIONS[
                config.precision
            ],  # explicit: None would fall back to what `accelerate launch` exports
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.train.timeout)),
                # static_graph does not go with no_sync, which accumulation needs.
                # On a CPU nothing overlaps, the cores are busy with the backward: one bucket, one exchange a step.
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, static_graph=accumulate == 1, bucket_cap_mb=100 if on_cpu else 25
                ),
            ],
        )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        if self.world != launched:
            raise InputError(
                f"the launcher announced {launched} processes (WORLD_SIZE) but Accelerate sees {self.world}; "
                f"they would train apart in one folder. {_HOW_TO_START}"
            )
        if (
            self.device.type == "cuda"
        ):  # process-wide, so said either way: a run before this one may have wanted the other
            torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.exact = torch.float32 if self.device.type == "mps" else torch.float64  # type of sums over many images
        # Host-side agreement does not wait for the device's queue.
        self.host_group: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=config.train.timeout)) if self.world > 1 else None
        )

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return values
        reduced: Tensor = self.accelerator.reduce(values, reduction="sum")
        return reduced

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes, the same to the bit on each of them; host only."""
        if self.host_group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return [float(v) for v in tensor]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns on rank 0, on every process: small and JSON-ready (it travels as text, never as a pickle).

        Raises:
            InputError: where ``work`` raises one, on every process, so that none waits for the others.
        """
        if self.host_group is None:
            return work()
        answer: dict[str, Any] = {}
        if self.is_main:
            try:
                answer = {"value": work()}
            except InputError as error:
                answer = {"error": str(error)}
        data = json.dumps(answer).encode()
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self.host_group)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, 0, group=self.host_group)
        answer = json.loads(bytes(buffer.tolist()))
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["value"]

    def wait(self) -> None:
        """Until every process is here."""
        self.largest(0.0)

    def close(self) -> None:
        """Leaves the process group, where this run started it."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
