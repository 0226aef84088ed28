"""The processes of a run: Accelerate's set-up, the split of a batch, and exact reductions."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from dist_ae import devices
from dist_ae.config import Config, Fault, InputError
from dist_ae.processes.clock import Clock
from dist_ae.processes.environment import (
    HOW_TO_START,
    explained_rendezvous,
    interface_to_main,
    launched_world,
    leaves_mps,
    use_cpu,
    whole_number,
    without_accelerates_variables,
)
from dist_ae.terminal import rank, say

PATIENCE = 3600.0  # seconds that processes wait for one of them that is alive and working
PRECISIONS = {"fp32": "no", "tf32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


def accumulation_steps(global_batch: int, world: int, max_per_process: int | None = None) -> int:
    """How many pieces each process cuts its share of the global batch into. Shares differ by at most one image."""
    share = -(-global_batch // world)
    return -(-share // min(max_per_process or share, share))


def largest_piece(global_batch: int, world: int, max_per_process: int | None = None) -> int:
    """The most images of a batch that a process computes at once."""
    return -(-global_batch // (world * accumulation_steps(global_batch, world, max_per_process)))


def check_device(config: Config) -> None:
    """Refuses a precision that the device lacks, before any process group starts.

    Raises:
        InputError: with the reason and what to use instead.
    """
    on_cpu = use_cpu()
    if on_cpu and leaves_mps() and rank() == 0:
        text = (
            "note: on the CPU, since nothing was ever run on a Mac's GPU (MPS); ACCELERATE_USE_CPU=false uses that GPU"
        )
        say(text, sys.stderr)
    local_world, gpus = whole_number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if not on_cpu and torch.cuda.is_available() and local_world > gpus:
        raise InputError(
            f"{local_world} processes were started on host {socket.gethostname()}, which has {gpus} "
            f"GPU{'s' * (gpus > 1)}: NCCL refuses two on one. Start {gpus} a host: --num_processes counts those of "
            "all hosts, torchrun's --nproc_per_node those of one"
        )
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


def usual_precision() -> Literal["bf16", "fp32"]:
    """What ``precision auto`` means on this machine: bf16 where it is multiplied natively, else fp32."""
    device = None if use_cpu() else torch.accelerator.current_accelerator()
    return "bf16" if devices.multiplies_bf16(device or torch.device("cpu")) else "fp32"


# Its name in older versions of torch was a private one.
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


class Processes(Protocol):
    """The processes that share some work, as one of them sees it."""

    world: int
    rank: int
    device: torch.device
    exact: torch.dtype  # for sums over many images

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        ...


class Alone:
    """A single process: rank 0 of 1."""

    def __init__(self, device: torch.device) -> None:
        self.world, self.rank = 1, 0
        self.device, self.exact = device, devices.exact_type(device)

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


class Runtime:
    """A process of a training run: its rank, its device, and sums over all processes."""

    def __init__(self, config: Config, store: PrefixStore | None = None) -> None:
        """Starts (or joins) the process group, through ``store`` if one is given, as by ``Arrival.meet``.

        Precision and run directory are rank 0's, which depend on its machine and disk: ``self.config`` has them.

        Raises:
            InputError: the launcher announced another number of processes than Accelerate sees, or other hosts cannot
                reach the address of the main process.
            Fault: the processes did not all meet within ``train.timeout``.
        """
        launched_rank, num_launched = launched_world()
        # Reset Accelerate's state, which is process-wide: a second run in one process (a sweep's reused actor, a
        # notebook) may use another precision.
        self._owns_group = not dist.is_initialized()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accumulates = accumulation_steps(config.train.batch_size, num_launched, config.train.max_per_process) > 1
        on_cpu, timeout = use_cpu(), timedelta(seconds=config.train.timeout)
        joins = num_launched > 1 and self._owns_group
        with explained_rendezvous(config.train.timeout), interface_to_main(joins), without_accelerates_variables():
            group: dict[str, Any] = {}
            if joins and store is not None:
                group = {"store": store, "rank": launched_rank, "world_size": num_launched}
            state = PartialState(on_cpu, timeout=timeout, **group)
            if state.device.type == "cuda":  # Accelerate leaves this out for a device that was named by hand
                torch.cuda.set_device(state.device)
            self.world, self.rank, self.is_main = state.num_processes, state.process_index, state.is_main_process
            if self.world != num_launched:
                raise InputError(
                    f"the launcher announced {num_launched} processes (WORLD_SIZE) but Accelerate sees {self.world}; "
                    f"they would train apart in one folder. {HOW_TO_START}"
                )
            # The others wait while one process works for all (a checkpoint on a slow disk) or is slow itself (it
            # compiles). `Watch` finds a dead or frozen process after `train.timeout`.
            patience = max(timeout, timedelta(seconds=PATIENCE))
            if joins:
                _set_timeout(patience)
            # Agreement on the host need not wait for the device's queue.
            self.host_group: Any = dist.new_group(backend="gloo", timeout=patience) if self.world > 1 else None
            if config.precision == "auto":
                config = config.override({"precision": usual_precision()})
            from_main = self.on_main(lambda: {"precision": config.precision, "run_dir": str(config.directory())})
            self.config = config = config.override(from_main)
            self.accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision=PRECISIONS[config.precision],
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                kwargs_handlers=[
                    # static_graph excludes no_sync, which accumulation needs. On a CPU the backward pass keeps the
                    # cores busy and nothing overlaps, so there is one bucket and one exchange a step.
                    DistributedDataParallelKwargs(
                        # A model's buffers (the scale of its records) never change.
                        broadcast_buffers=False,
                        gradient_as_bucket_view=True,
                        static_graph=not accumulates,
                        bucket_cap_mb=100 if on_cpu else 25,
                    ),
                ],
            )
        self.device: torch.device = self.accelerator.device
        self.dtype, self.exact = devices.weight_type(config.precision), devices.exact_type(self.device)
        self.lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)  # autocast's type
        emulates = config.precision == "bf16" and not devices.multiplies_bf16(self.device)
        self.emulates = bool(self.largest(emulates)[0])  # true if one process does, since the others wait for it
        self.clock = Clock(self.device)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return values
        reduced: Tensor = self.accelerator.reduce(values, reduction="sum")
        return reduced

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes, the same to the bit on each. Only the host takes part."""
        if self.host_group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return [float(v) for v in tensor]

    def _gather_text(self, text: str) -> list[str]:
        """The text of each process, by rank; cut after 250 bytes."""
        if self.host_group is None:
            return [text]
        data = text.encode()[:250]
        buffer = torch.zeros(256, dtype=torch.uint8)
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        gathered = [torch.empty_like(buffer) for _ in range(self.world)]
        dist.all_gather(gathered, buffer, group=self.host_group)
        return [bytes(received.tolist()).rstrip(b"\0").decode(errors="replace") for received in gathered]

    def places(self) -> list[tuple[str, str]]:
        """Host and device of each process, by rank."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        lines = (text.partition("\n") for text in self._gather_text(f"{socket.gethostname()}\n{device}"))
        return [(host, device) for host, _, device in lines]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Gives every process what ``work`` returns on rank 0.

        The value must be small and JSON-ready: it travels as text, never as a pickle.

        Raises:
            InputError, Fault: ``work`` raised it. Every process raises it, so that none waits for the others.
        """
        if self.host_group is None:
            return work()
        answer: dict[str, Any] = {}
        if self.is_main:
            try:
                answer = {"value": work()}
            except (InputError, Fault) as error:
                answer = {"error": str(error), "status": error.exit_status}
        data = json.dumps(answer).encode()
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self.host_group)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, 0, group=self.host_group)
        answer = json.loads(bytes(buffer.tolist()))
        if "error" in answer:
            raise (InputError if answer["status"] == InputError.exit_status else Fault)(answer["error"])
        return answer["value"]

    def wait(self) -> None:
        """Waits until every process has called this."""
        self.largest(0.0)

    def close(self) -> None:
        """Leaves the process group, where this run started it."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def emulation_notes(runtime: Runtime) -> list[str]:
    """One line if the run uses bf16 and a machine has to emulate it."""
    if not runtime.emulates:
        return []
    if runtime.device.type == "cuda":
        return [
            "note: bf16 is emulated: NVIDIA's GPUs have it from compute capability 8.0 on. --precision fp16, or fp32, "
            "trains a run of its own faster"
        ]
    return [
        "note: bf16 is emulated: this processor has no instructions for it, and steps took 8 to 12 times as long as in "
        "fp32 where it was measured. --precision fp32 trains a run of its own that fast; --init-from this run begins "
        "it with these weights"
    ]
