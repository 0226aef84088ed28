"""What a run says of itself while it goes: who takes part, where the time goes, and a profile of its steps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import SMALL, forked, metrics, run, weights

import dist_ae
from dist_ae import step
from dist_ae.config import InputError
from dist_ae.processes.clock import PARTS, shares
from dist_ae.run.progress import processes_table


def experiment(run_dir: Path, **more: Any) -> dist_ae.Config:
    return dist_ae.PRESETS["ae"].override({**SMALL, "train.steps": 20, "run_dir": run_dir, **more})


def test_the_table_has_a_line_a_host_with_its_devices_and_shares() -> None:
    places = [("a", "H100")] * 2 + [("b", "H100"), ("b", "A100"), ("b", "A100")]
    assert processes_table(places, [21, 20, 20, 20, 20], "bf16", "4,544 bytes a step") == [
        "host  ranks  devices              images of a batch",
        "a     0-1    2 × H100             1 × 21 + 1 × 20",
        "b     2-4    1 × H100 + 2 × A100  3 × 20",
        "5 processes on 2 hosts share a batch of 101, bf16; gradients: 4,544 bytes a step",
    ]
    many = processes_table([(f"host{i // 8}", "H100") for i in range(1024)], [8] * 1024, "bf16", "none")
    assert len(many) == 19 and many[17] == "… and 112 more hosts"


def test_shares_of_the_time_add_up_and_the_one_that_nobody_waits_for_is_the_slowest() -> None:
    rows = [dict(zip(PARTS, row, strict=True)) for row in ((1, 4, 0, 1, 10), (1, 1, 0, 1, 10), (1, 4, 0, 1, 10))]
    found = shares([list(row.values()) for row in rows])
    assert sum(value for name, value in found.items() if name.startswith("time_")) == pytest.approx(1)
    assert found["time_communication"] == pytest.approx(0.3)
    assert found["slowest_rank"] == 1 and found["slowest_costs"] == pytest.approx(0.2)  # 2 of 10 seconds on average
    assert "slowest_rank" not in shares([[1, 0, 0, 1, 10]])


@pytest.mark.slow
def test_two_processes_say_who_takes_part_where_the_time_goes_and_who_is_slow(tmp_path: Path) -> None:
    real = step.Learner.compute

    def work(rank: int) -> None:
        def slowly(self: step.Learner, batch_size: int, update: bool = True) -> None:
            time.sleep(0.02 * rank)
            real(self, batch_size)

        with mock.patch.object(step.Learner, "compute", slowly):
            dist_ae.train(experiment(tmp_path / "run", **{"train.log_every": 5, "train.eval_every": 10}))

    assert forked(2, work, tmp_path / "log") == [0, 0]
    said = (tmp_path / "log-0.log").read_text()
    assert "2 processes on 1 host share a batch of 96, fp32; gradients: " in said and "through shared memory" in said
    lines = metrics(tmp_path / "run")
    for line in lines:
        assert sum(value for name, value in line.items() if name.startswith("time_")) == pytest.approx(1)
    assert [line["slowest_rank"] for line in lines] == [1] * 4
    assert [line["time_evaluation"] > 0 for line in lines] == [True, False, True, False]  # in the line after it
    for line in (lines[0], lines[1], lines[3]):
        assert line["slowest_costs"] > 0.1 and line["time_communication"] > 0.1


@pytest.mark.slow
def test_a_profile_leaves_a_trace_and_a_table_and_the_same_weights(tmp_path: Path) -> None:
    words = "train ae --model.hidden-dims 16 --train.steps 20 --tracking.wandb off --run-dir"
    [(status, said, error)] = run(1, "-m", "dist_ae", *words.split(), str(tmp_path / "a"), "--profile", "5:8")
    assert status == 0, error
    assert f"profile: {tmp_path / 'a' / 'profile' / 'table-5-8.txt'}" in said
    assert "aten::addmm" in (tmp_path / "a" / "profile" / "table-5-8.txt").read_text()
    trace = json.loads((tmp_path / "a" / "profile" / "trace-5-8.json").read_text())
    assert sum(event["name"] == "Optimizer.step#Adam.step" for event in trace["traceEvents"]) == 3  # three steps
    assert run(1, "-m", "dist_ae", *words.split(), str(tmp_path / "b"))[0][0] == 0
    watched, alone = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


@pytest.mark.parametrize("steps", ["5", "8:5", "5:5", "a:b", "-1:3"])
def test_steps_that_are_none_are_refused(steps: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="profile must be FROM:TO"):
        experiment(tmp_path / "run", profile=steps)
