"""What the tests share: real processes, small fast experiments, and readers of what a run left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import safetensors.torch
import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# One thread a process: the machine has two cores, and thread pools of several processes would fight for them.
os.environ.update({"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"})
# Tests use onnxruntime themselves, and its uploader reads the environment while others set it.
os.environ.update({"ORT_DISABLE_TELEMETRY": "1"})
# Ray's workers have a low priority, and would wait for whatever other test runs beside them.
os.environ.update({"RAY_worker_niceness": "0"})
torch.set_num_threads(1)

SMALL = {
    "data.name": "digits",
    "model.latent_dim": 8,
    "model.hidden_dims": (32, 16),
    "train.batch_size": 96,
    "train.log_every": 1,
    "tracking.wandb": "off",
    "precision": "fp32",  # the same on every machine, and as fast on one that has to emulate bf16
}


def digits_file(folder: Path, count: int) -> str:
    """The data name of ``count`` real digits in a .npy file."""
    from sklearn.datasets import load_digits

    path = folder / f"digits-{count}.npy"
    np.save(path, np.rint(load_digits().images[:count] * (255 / 16)).astype(np.uint8))
    return f"array:{path}"


def environment(rank: int = 0, world: int = 1, port: int = 0, **more: Any) -> dict[str, str]:
    """A launcher's variables for one process."""
    launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Of W&B's service that an earlier test began in this process, no other process is to know.
    here = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**here, "PYTHONPATH": str(REPOSITORY), **(launcher if world > 1 else {}), **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(world: int, *command: str, **more: str) -> list[forks.Process]:
    """Starts ``python *command`` as ``world`` processes of one group."""
    port, folder = free_port(), Path(tempfile.mkdtemp())
    return [
        forks.Process(
            forks.command(*command),
            environment(rank, world, port, **more),
            folder / f"out-{rank}",
            folder / f"err-{rank}",
        )
        for rank in range(world)
    ]


def finish(processes: list[forks.Process], timeout: float = 120) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each process; kills what outlives the time-out."""
    try:
        return [(p.wait(timeout), p.out.read_text(), p.err.read_text()) for p in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        shutil.rmtree(processes[0].out.parent)


def run(world: int, *command: str, timeout: float = 120, **more: Any) -> list[tuple[int, str, str]]:
    return finish(start(world, *command, **more), timeout)


def cli(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """``dist-ae`` with these arguments, in an environment with ``more`` in it."""
    ((status, out, err),) = run(1, "-m", "dist_ae", *arguments, timeout=60, **more)
    return subprocess.CompletedProcess(arguments, status, out, err)


class Forked:
    """``work(rank)`` in processes of one group."""

    def __init__(self, world: int, work: Callable[[int], object], log: Path) -> None:
        port = free_port()
        self.logs = [log.with_name(f"{log.name}-{rank}.log") for rank in range(world)]
        self.processes = [
            forks.Process(partial(work, rank), environment(rank, world, port), self.logs[rank], self.logs[rank])
            for rank in range(world)
        ]
        self.pids = [process.pid for process in self.processes]

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit statuses, negative for a signal; kills what outlives the time-out and fails."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.0, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)

    def output(self, rank: int | None = None) -> str:
        return "\n".join(path.read_text() for i, path in enumerate(self.logs) if rank in (None, i))


def forked(world: int, work: Callable[[int], object], log: Path, timeout: float = 120) -> list[int]:
    return Forked(world, work, log).wait(timeout)


def train_jobs(world: int, jobs: list[dict[str, Any]], tmp_path: Path) -> None:
    """Runs training jobs on ``world`` processes, one after the other, in one group of them."""
    import worker

    group = Forked(world, lambda rank: worker.run(jobs), tmp_path / f"jobs-{world}-{len(list(tmp_path.iterdir()))}")
    assert group.wait(240) == [0] * world, group.output()


def metrics(run_dir: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = max((p for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    return safetensors.torch.load_file(newest / "weights.safetensors")


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights, relative to the largest weight of its tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max()) for k in a)


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """A test that fails between start and wait leaves no process that trains beside all others."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def fashion_mnist() -> Path:
    """Debian's Fashion-MNIST. With CI=true a missing dataset fails."""
    if not FASHION_MNIST.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail("dataset-fashion-mnist is not installed")
        pytest.skip("needs apt-get install dataset-fashion-mnist")
    return FASHION_MNIST


# By stem, the longest first.
LONGEST = [
    "tune_ray",
    "hosts",
    "launch",
    "wandb_faults",
    "examples",
    "verdicts",
    "resume",
    "surroundings",
    "fuzz",
    "explore",
    "distributed",
    "checkpoint",
    "trainer",
    "conv",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: side by side, the last one to start decides when all are done."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)
