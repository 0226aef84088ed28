"""The processes of a run: Accelerate's set-up, the batch plan, exact reductions, and agreeing to stop."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

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
        raise InputError(f"train.batch_size {global_size} does not divide over {world} processes; the nearest that do are {nearest}")
    per_process = global_size // world
    accumulate = -(-per_process // min(max_per_process or per_process, per_process))
    return -(-per_process // accumulate), accumulate


def launched_world() -> tuple[int, int]:
    """(rank, number of processes) as the launcher put them into the environment.

    Raises:
        InputError: several processes are announced, but not all that they need to find each other.
    """
    world = max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    missing = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing and not dist.is_initialized():
        raise InputError(f"the environment announces {world} processes but {', '.join(missing)} is not set. {_HOW_TO_START}")
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
    if config.precision == "tf32" and (on_cpu or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8):
        raise InputError("precision tf32 needs an NVIDIA GPU of the Ampere generation or later; use fp32 or bf16")
    if config.precision == "bf16" and not on_cpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError(f"precision bf16 is not supported by {torch.cuda.get_device_name()}; use fp16 or fp32")
    if config.precision == "fp64" and not on_cpu and not torch.cuda.is_available():
        raise InputError("precision fp64 is not supported by this accelerator; set ACCELERATE_USE_CPU=true to run it on the CPU")


def _use_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()


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
            mixed_precision=PRECISIONS[config.precision],  # explicit: None would fall back to what `accelerate launch` exports
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.train.timeout)),
                # static_graph does not go with no_sync, which accumulation needs.
                # On a CPU nothing overlaps, the cores are busy with the backward: one bucket, one exchange a step.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, static_graph=accumulate == 1, bucket_cap_mb=100 if on_cpu else 25),
            ],
        )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        if self.world != launched:
            raise InputError(
                f"the launcher announced {launched} processes (WORLD_SIZE) but Accelerate sees {self.world}; "
                f"they would train apart in one folder. {_HOW_TO_START}"
            )
        if self.device.type == "cuda":  # process-wide, so said either way: a run before this one may have wanted the other
            torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.exact = torch.float32 if self.device.type == "mps" else torch.float64  # type of sums over many images
        # Host-side agreement does not wait for the device's queue.
        self.host_group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.train.timeout)) if self.world > 1 else None

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


class LostProcess(Exception):
    """A process of the run died or stopped answering; the message names it and the step."""

    exit_status = 1


class Watch:
    """Each process's heartbeat, once a second, so that the others can name who is lost and end instead of waiting for ever.

    A collective that waits for a dead or frozen process cannot be interrupted from Python: a thread ends the process in its place.
    """

    INTERVAL = 1.0  # seconds

    def __init__(self, runtime: Runtime, timeout: float) -> None:
        self.step, self._runtime, self._timeout = 0, runtime, timeout
        self._done = threading.Event()
        self._watching = runtime.world > 1 and "MASTER_ADDR" in os.environ
        if not self._watching:
            return
        wait = timedelta(seconds=min(timeout, 10))
        host = os.environ["MASTER_ADDR"]
        server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait) if runtime.is_main else None
        port = runtime.on_main(lambda: server.port if server else 0)
        self._store = server or TCPStore(host, port, is_master=False, timeout=wait)
        self._beat()
        runtime.wait()
        now = time.monotonic()
        self._answered = now  # when the store, which rank 0 keeps, last answered
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(range(runtime.world), (b"", now))  # last heartbeat, since when
        # Two threads: an exchange with a frozen store does not come back, and somebody must notice.
        self._threads = [threading.Thread(target=work, name="watch", daemon=True) for work in (self._exchange, self._guard)]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        self._store.set(str(self._runtime.rank), f"{time.monotonic()} {self.step}")

    def _exchange(self) -> None:
        while not self._done.is_set():
            with contextlib.suppress(Exception):  # the store is gone: `_answered` ages, and rank 0 is named
                self._beat()
                values = self._store.multi_get([str(rank) for rank in range(self._runtime.world)])
                now = self._answered = time.monotonic()
                for rank, value in enumerate(values):
                    if self._seen[rank][0] != value:
                        self._seen[rank] = (value, now)
            self._done.wait(self.INTERVAL)

    def _guard(self) -> None:
        while not self._done.wait(self.INTERVAL):
            if lost := self._lost(self._timeout):
                print(f"error: {self._describe(lost)}", file=sys.stderr, flush=True)
                os._exit(1)

    def _lost(self, seconds: float) -> list[int]:
        """The processes that were not heard of for so long."""
        # Up to the store's last answer, since of the time after it nothing is known: who was silent by then went first, and a store
        # that just froze is no one else's silence. Only when all others were well by then is it rank 0, which keeps the store.
        silent = [rank for rank, (_, since) in self._seen.items() if self._answered - since > seconds and rank != self._runtime.rank]
        return silent or ([0] if time.monotonic() - self._answered > seconds else [])

    def _describe(self, lost: list[int]) -> str:
        steps = {rank: self._seen[rank][0].decode().partition(" ")[2] or "?" for rank in lost}
        who = ", ".join(f"rank {rank} (last known at step {step})" for rank, step in steps.items())
        return f"lost {who} of {self._runtime.world} processes at step {self.step}; this one ends. The same command goes on from the last checkpoint"

    def explain(self, error: Exception) -> Exception:
        """What a failed collective was: the processes that no longer answer, or the error itself where all do."""
        if not self._watching:
            return error
        # The living are heard of at least once in that time. Rank 0 stays longer: some wait for it and not for the one that died, and
        # find out when it leaves; by then they must have heard who was silent.
        time.sleep((7 if self._runtime.is_main else 4) * self.INTERVAL)
        lost = self._lost(3 * self.INTERVAL)
        self._done.set()
        return LostProcess(self._describe(lost)) if lost else error

    def close(self) -> None:
        """Ends watching, together with the others: none takes the first to leave for lost."""
        self._done.set()
        if self._watching:
            # A thread that still talks to the store while the interpreter ends can abort the process after all its work is done.
            for thread in self._threads:
                thread.join(10 * self.INTERVAL)
            self._runtime.wait()


class Signals:
    """SIGTERM and SIGINT as a request that is looked at between two steps."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Signals]:
        """Handles the signals for the length of a run; outside the main thread (a sweep's actor) there is nothing to handle."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self.requested = True

        _end_with_parent()
        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _end_with_parent() -> None:
    """Asks Linux for SIGTERM when the launcher dies: a single-process `accelerate launch` passes no signal on, and leaves no orphan this way."""
    if sys.platform == "linux" and ("ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Agreement:
    """All processes' answer to "was any of us asked to stop?", found about once a second without touching the device.

    Each of them asks equally often, between pieces of work of about the same length: one agreement for steps, one for evaluation batches.
    """

    SECONDS = 1.0

    def __init__(self, runtime: Runtime, signals: Signals) -> None:
        self._runtime, self._signals = runtime, signals
        self._calls, self._every, self._since = 0, 1, time.monotonic()

    def stop(self) -> bool:
        """The same answer on every process."""
        if self._runtime.world == 1:
            return self._signals.requested
        self._calls += 1
        if self._calls < self._every:
            return False
        now = time.monotonic()
        # The largest of both, bit-equal everywhere, so that all count to the same next time. At most twice as far as the last time:
        # the first calls come faster than the work they are to measure.
        wanted, seconds = self._runtime.largest(float(self._signals.requested), now - self._since)
        self._every = max(1, min(2 * self._every, int(self.SECONDS * self._calls / max(seconds, 1e-6))))
        self._calls, self._since = 0, now
        return wanted > 0
