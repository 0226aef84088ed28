"""What the tests share: real processes, small fast experiments, and readers of what a run left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# One thread a process: the machine has two cores, and thread pools of several processes would fight for them.
os.environ.update({"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"})
torch.set_num_threads(1)

SMALL = {
    "data.name": "digits",
    "model.latent_dim": 8,
    "model.hidden_dims": (32, 16),
    "train.batch_size": 96,
    "train.log_every": 1,
    "tracking.wandb": "off",
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
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **(launcher if world > 1 else {}), **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(world: int, *command: str, **more: str) -> list[subprocess.Popen[str]]:
    """Starts ``python *command`` as ``world`` processes of one group."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, world, port, **more),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each process; kills what outlives the time-out."""
    try:
        return [(p.returncode, out, err) for p in processes for out, err in [p.communicate(timeout=timeout)]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def run(world: int, *command: str, timeout: float = 120, **more: Any) -> list[tuple[int, str, str]]:
    return finish(start(world, *command, **more), timeout)


class Forked:
    """``work(rank)`` in forked processes of one group: as real as any, and started in milliseconds, since torch is
    already there.
    """

    def __init__(self, world: int, work: Callable[[int], object], log: Path) -> None:
        port = free_port()
        self.logs = [log.with_name(f"{log.name}-{rank}.log") for rank in range(world)]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [self._fork(rank, world, port, work) for rank in range(world)]
        self.statuses: dict[int, int] = {}

    def _fork(self, rank: int, world: int, port: int, work: Callable[[int], object]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.environ.update(environment(rank, world, port))
            descriptor = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
            work(rank)
            status = 0
        except Exception as error:
            status = getattr(error, "exit_status", 1)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit statuses, negative for a signal; kills what outlives the time-out and fails."""
        end = time.monotonic() + timeout
        while len(self.statuses) < len(self.pids):
            self.poll()
            time.sleep(0.01)
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {timeout} s:\n{self.output()}")
        return [self.statuses[rank] for rank in range(len(self.pids))]

    def poll(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.statuses[rank] = os.waitstatus_to_exitcode(found[1])

    def kill(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                os.kill(pid, signal.SIGKILL)

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
