"""Processes whose data takes unequal time to prepare meet, and what ends before it is ready is named."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Forked, digits_file
from pictures import make_folder
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import dist_ae
from dist_ae.config import InputError
from dist_ae.data import decode
from dist_ae.processes.runtime import Runtime

pytestmark = pytest.mark.slow


def group(tmp_path: Path, slow: int, ends: bool = False) -> Forked:
    """Two processes with a cache each, of which one packs for twice train.timeout, or ends while it does."""
    root = make_folder(tmp_path / "in", 30, sizes=False)

    def work(rank: int) -> None:
        real: Any = decode.decode_all

        def slowly(*given: Any) -> Any:
            time.sleep(0.2)
            return real(*given)

        def ended(*given: Any) -> Any:
            raise InputError("the disk of this host is not there")

        if rank == slow:
            setattr(decode, "decode_all", ended if ends else slowly)  # noqa: B010
        small = {**SMALL, "train.steps": 3, "train.batch_size": 8, "train.timeout": 3.0, "tracking.pictures": False}
        small |= {"data.name": f"folder:{root}", "data.cache": tmp_path / f"cache-{rank}", "run_dir": tmp_path / "run"}
        dist_ae.train(dist_ae.PRESETS["ae"].override(small))
        assert os.environ["WORLD_SIZE"] == "2"

    return Forked(2, work, tmp_path / "log")


@pytest.mark.parametrize("slow", [0, 1])
def test_a_process_that_has_packed_waits_for_one_that_packs_longer_than_the_time_out(slow: int, tmp_path: Path) -> None:
    processes = group(tmp_path, slow)
    assert processes.wait() == [0, 0], processes.output()
    assert ("waiting for rank 1, still at work" in processes.output(0)) == (slow == 1)
    assert (tmp_path / "run/result.json").is_file()


@pytest.mark.parametrize("slow", [0, 1])
def test_a_process_that_ends_before_it_is_ready_is_named_by_the_other(slow: int, tmp_path: Path) -> None:
    processes = group(tmp_path, slow, ends=True)
    status = processes.wait(60)
    assert status[slow] == 2 and status[1 - slow] == 1, processes.output()
    said = processes.output(1 - slow)
    assert "did not meet all 2 processes" in said if slow == 0 else "rank 1 (on host" in said, said
    assert "not get ready" in said or slow == 0


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("keeper", ["rank 0", "torchrun"])
def test_runs_follow_each_other_in_the_same_processes_whichever_leaves_late(
    keeper: str, late: int, tmp_path: Path
) -> None:
    """As folds do, and with torchrun's store also in the processes that replace those of a failure."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if keeper == "torchrun" else None
    digits = digits_file(tmp_path, 64)

    def work(start: int, rank: int) -> None:
        if keeper == "torchrun":
            own = {"USE_AGENT_STORE": "True", "RESTART_COUNT": str(start), "MAX_RESTARTS": "1"}
            os.environ.update({f"TORCHELASTIC_{name}": value for name, value in own.items()}, MASTER_PORT=str(port))
        real = Runtime.close

        def close(runtime: Runtime) -> None:
            time.sleep(1.5 * (rank == late))
            real(runtime)

        setattr(Runtime, "close", close)  # noqa: B010
        for number in range(3):
            small = {**SMALL, "train.steps": 3, "train.batch_size": 8, "train.timeout": 20, "tracking.pictures": False}
            small |= {"data.name": digits, "run_dir": tmp_path / f"run-{start}-{number}"}
            dist_ae.train(dist_ae.PRESETS["ae"].override(small))

    port = server.port if server else None
    for start in range(1 if server is None else 2):
        processes = Forked(2, partial(work, start), tmp_path / f"log-{start}")
        assert processes.wait() == [0, 0], processes.output()
