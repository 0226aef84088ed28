"""A run can be killed anywhere and goes on as if nothing had happened, on the same number of processes or another."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import SMALL, Forked, digits_file, forked, metrics, relative_difference, weights

import dist_ae
from dist_ae import step, validation
from dist_ae.config import Config, InputError
from dist_ae.evaluate import evaluate
from dist_ae.presets import PRESETS
from dist_ae.processes import host_memory
from dist_ae.processes.watch import blame
from dist_ae.run import checkpoint
from dist_ae.run.directory import RunDirectory
from dist_ae.use import doctor

pytestmark = pytest.mark.slow

PRESET_NAMES = ("ae", "denoising", "dropout", "vae")
KILLED = -signal.SIGKILL


def experiment(preset: str, run_dir: Path, **overrides: Any) -> Config:
    """30 steps of 11 to the epoch: evaluation, and so a checkpoint, every 11; checkpoints every 4 as well."""
    data = digits_file(run_dir.parent, 1115)
    settings = {**SMALL, "data.name": data, "train.steps": 30, "train.save_every": 4, "run_dir": str(run_dir)}
    return PRESETS[preset].override({**settings, **overrides})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(config: Config, at_step: int | None = None, in_save: int | None = None) -> Callable[[int], object]:
    """Training that is killed before a step, or inside the n-th checkpoint write after its first file."""

    def work(rank: int) -> None:
        real_step, real_write, saves = step.Learner.step, checkpoint.write_new, 0

        def step_or_die(self: step.Learner, number: int) -> None:
            if number == at_step:
                die()
            real_step(self, number)

        def write_or_die(path: Path, data: bytes) -> None:
            nonlocal saves
            saves += path.name == checkpoint.OPTIMIZER
            if saves == in_save and path.name == checkpoint.OPTIMIZER:
                die()
            real_write(path, data)

        with (
            mock.patch.object(step.Learner, "step", step_or_die),
            mock.patch.object(checkpoint, "write_new", write_or_die),
        ):
            dist_ae.train(config)

    return work


def train(config: Config) -> Callable[[int], object]:
    return lambda rank: dist_ae.train(config) and None


def run(world: int, work: Callable[[int], object], run_dir: Path) -> list[int]:
    return forked(world, work, run_dir.parent / f"log-{run_dir.name}")


def curve(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(run_dir)]


def same_records(a: Path, b: Path) -> None:
    """Every step once, with the same values but for the speed."""
    for split in ("train", "val"):
        lines = [
            [
                {k: v for k, v in line.items() if not k.startswith(("images_per_second", "time_", "slowest_"))}
                for line in metrics(path, split)
            ]
            for path in (a, b)
        ]
        assert lines[0] == lines[1]


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_test_above_all_others(preset: str, tmp_path: Path) -> None:
    """1 process, SIGKILL, 2 processes, SIGKILL inside a checkpoint write, 4 processes: as N steps uninterrupted on
    one process.
    """
    plain, broken = (experiment(preset, tmp_path / name, precision="fp64") for name in ("plain", "broken"))
    assert run(1, train(plain), tmp_path / "plain") == [0]
    assert run(1, train_and_die(broken, at_step=7), tmp_path / "broken") == [KILLED]
    assert KILLED in run(2, train_and_die(broken, in_save=3), tmp_path / "broken")
    assert not (tmp_path / "broken" / "result.json").exists()
    assert run(4, train(broken), tmp_path / "broken") == [0] * 4
    assert relative_difference(weights(tmp_path / "broken"), weights(tmp_path / "plain")) < 1e-10
    curves = curve(tmp_path / "plain"), curve(tmp_path / "broken")
    assert [at for at, _ in curves[0]] == [at for at, _ in curves[1]] == list(range(1, 31))
    assert [loss for _, loss in curves[1]] == pytest.approx([loss for _, loss in curves[0]], rel=1e-10)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_one_process_killed_in_mid_epoch_at_its_end_and_in_a_save_ends_bit_equal(preset: str, tmp_path: Path) -> None:
    more = {"train.ema_decay": 0.9, "train.log_every": 3}
    plain, broken = (experiment(preset, tmp_path / name, **more) for name in ("plain", "broken"))
    assert run(1, train(plain), tmp_path / "plain") == [0]
    for death in ({"at_step": 6}, {"at_step": 11}, {"in_save": 2}, {"at_step": 29}):
        assert run(1, train_and_die(broken, **death), tmp_path / "broken") == [KILLED]
    assert run(1, train(broken), tmp_path / "broken") == [0]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("plain", "broken")]
    for result in results:
        del result["images_per_second"]
    assert results[0] == results[1]  # weights_sha256 among it
    same_records(tmp_path / "plain", tmp_path / "broken")


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_killed_end_bit_equal_on_the_same_number(world: int, tmp_path: Path) -> None:
    plain, broken = (experiment("vae", tmp_path / name) for name in ("plain", "broken"))
    assert run(world, train(plain), tmp_path / "plain") == [0] * world
    assert run(world, train_and_die(broken, at_step=13), tmp_path / "broken") == [KILLED] * world
    assert run(world, train(broken), tmp_path / "broken") == [0] * world
    hashes = [
        json.loads((tmp_path / name / "result.json").read_text())["weights_sha256"] for name in ("plain", "broken")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_every_optimizer_resumes_bit_equal(optimizer: str, tmp_path: Path) -> None:
    plain, broken = (experiment("ae", tmp_path / name, **{"optim.name": optimizer}) for name in ("plain", "broken"))
    assert run(1, train(plain), tmp_path / "plain") == [0]
    assert run(1, train_and_die(broken, at_step=18), tmp_path / "broken") == [KILLED]
    assert run(1, train(broken), tmp_path / "broken") == [0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "plain").values(), weights(tmp_path / "broken").values(), strict=True)
    )


def test_a_mutation_that_forgets_the_optimizer_is_noticed(tmp_path: Path) -> None:
    plain, broken = (experiment("ae", tmp_path / name) for name in ("plain", "broken"))
    assert run(1, train(plain), tmp_path / "plain") == [0]
    assert run(1, train_and_die(broken, at_step=18), tmp_path / "broken") == [KILLED]

    def forgetful(rank: int) -> None:
        real = step.Learner.load

        def load(self: step.Learner, *arguments: Any) -> None:
            real(self, *arguments)
            for tensor in self.tensors()["optimizer"].values():
                tensor.zero_()

        with mock.patch.object(step.Learner, "load", load):
            dist_ae.train(broken)

    assert run(1, forgetful, tmp_path / "broken") == [0]
    assert relative_difference(weights(tmp_path / "broken"), weights(tmp_path / "plain")) > 1e-4


# -- changed configurations


def test_free_fields_may_change_on_resume_and_a_constant_schedule_may_be_prolonged(tmp_path: Path) -> None:
    constant = {"optim.schedule": "constant"}
    long = experiment("ae", tmp_path / "long", **constant)
    assert run(1, train(long), tmp_path / "long") == [0]
    short = experiment("ae", tmp_path / "short", **constant, **{"train.steps": 14, "train.log_every": 7})
    assert run(1, train(short), tmp_path / "short") == [0]
    prolonged = short.override(
        {
            "train.steps": 30,
            "train.save_every": 9,
            "train.log_every": 1,
            "evaluation.batch_size": 17,
            "train.max_per_process": 1000,
        }
    )
    assert run(1, train(prolonged), tmp_path / "short") == [0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "long").values(), weights(tmp_path / "short").values(), strict=True)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optim.lr": 0.5},
        {"objective.noise_std": 0.1},
        {"train.batch_size": 48},
        {"precision": "bf16"},
        {"model.hidden_dims": (9,)},
        {"train.steps": 40},
    ],
)
def test_a_changed_trajectory_field_is_refused_with_old_and_new(change: dict[str, Any], tmp_path: Path) -> None:
    config = experiment("ae", tmp_path / "run", **{"train.steps": 4})  # schedule linear: its length decides every step
    dist_ae.train(config)
    ((key, value),) = change.items()
    old = dict(config.flat())[key] if key != "train.steps" else 4
    new = list(value) if isinstance(value, tuple) else value
    old = list(old) if isinstance(old, tuple) else old
    with pytest.raises(InputError, match="holds another experiment") as error:
        dist_ae.train(config.override(change))
    assert f"{'total_steps' if key == 'train.steps' else key}: {old!r} there, {new!r} now" in str(error.value)


def test_changed_data_is_refused(tmp_path: Path) -> None:
    dist_ae.train(experiment("ae", tmp_path / "run", **{"train.steps": 4}))
    images = np.load(tmp_path / "digits-1115.npy")
    images[5, 3, 3] ^= 1
    np.save(tmp_path / "digits-1115.npy", images)
    with (
        mock.patch("test_resume.digits_file", return_value=f"array:{tmp_path / 'digits-1115.npy'}"),
        pytest.raises(InputError, match=r"data\.fingerprint"),
    ):
        dist_ae.train(experiment("ae", tmp_path / "run", **{"train.steps": 4}))


# -- small data


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
def test_small_data_takes_each_image_once_an_epoch_or_is_refused(count: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "small.npz",
        train=rng.integers(0, 256, (count, 4, 4), dtype=np.uint8),
        val=rng.integers(0, 256, (5, 4, 4), dtype=np.uint8),
    )
    losses = {}
    for world in (1, 2, 4):
        size = {0: 4, 1: 1, 2: 2, 3: 2}.get(count, 4)
        settings = {
            "data.name": f"array:{tmp_path / 'small.npz'}",
            "train.batch_size": size,
            "train.epochs": 3,
            "precision": "fp64",
        }
        run_dir = tmp_path / f"run-{world}"
        config = PRESETS["vae"].override({**SMALL, "model.latent_dim": 2, **settings, "run_dir": str(run_dir)})
        statuses = run(world, train(config), run_dir)
        if count == 0:
            assert statuses == [2] * world and not run_dir.exists()
            continue
        assert statuses == [0] * world
        losses[world] = [line["loss"] for line in metrics(run_dir)]
        assert len(losses[world]) == 3 * -(-count // size)
    for found in losses.values():
        assert found == pytest.approx(losses[1], rel=1e-10)


# -- signals


def stop_and_resume(tmp_path: Path, world: int, where: str, victim: int, number: signal.Signals) -> None:
    plain, broken = (
        experiment("ae", tmp_path / name, **{"train.save_every": 4 if where == "checkpoint write" else 1000})
        for name in ("plain", "broken")
    )

    def work(rank: int) -> None:
        real_step, real_write, here = step.Learner.step, checkpoint.write_new, rank == victim

        def signal_in_step(self: step.Learner, at: int) -> None:
            if here and at == {"first batch": 0, "training": 9}.get(where):
                os.kill(os.getpid(), number)
            time.sleep(0.1 if world > 1 else 0)  # agreement comes about once a second: leave it time
            real_step(self, at)

        evaluations: list[int] = []

        def signal_in_evaluation(*arguments: Any) -> Any:
            evaluations.append(1)
            if here and where == "evaluation" and len(evaluations) == 2:  # the first is that of the start
                os.kill(os.getpid(), number)
            return evaluate(*arguments)

        def signal_in_write(path: Path, data: bytes) -> None:
            if here and where == "checkpoint write" and path.name == checkpoint.STATE:
                os.kill(os.getpid(), number)
            real_write(path, data)

        patches = [
            (step.Learner, "step", signal_in_step),
            (validation, "evaluate", signal_in_evaluation),
            (checkpoint, "write_new", signal_in_write),
        ]
        with mock.patch.object(*patches[0]), mock.patch.object(*patches[1]), mock.patch.object(*patches[2]):
            dist_ae.train(broken)

    start = time.monotonic()
    assert run(world, work, tmp_path / "broken") == [75] * world
    assert time.monotonic() - start < 10
    assert not (tmp_path / "broken" / "result.json").exists()
    trained = [line["step"] for line in metrics(tmp_path / "broken")]
    newest = max(int(path.name) for path in (tmp_path / "broken" / "checkpoints").iterdir()) if trained else 0
    assert trained == list(range(1, newest + 1))  # no step lost: what was trained was saved
    assert run(world, train(broken), tmp_path / "broken") == [0] * world
    assert run(world, train(plain), tmp_path / "plain") == [0] * world
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "plain").values(), weights(tmp_path / "broken").values(), strict=True)
    )
    same_records(tmp_path / "plain", tmp_path / "broken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["first batch", "training", "evaluation", "checkpoint write"])
def test_a_signal_anywhere_saves_at_the_current_step_and_ends_with_75(
    where: str, number: signal.Signals, tmp_path: Path
) -> None:
    stop_and_resume(tmp_path, 1, where, 0, number)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_any_one_process_stops_all_at_the_same_step(victim: int, tmp_path: Path) -> None:
    stop_and_resume(tmp_path, 2, "training", victim, signal.SIGTERM)


# -- a process dead or frozen


@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]
)
def test_a_dead_or_frozen_process_is_named_and_the_others_end(
    victim: int, number: signal.Signals, tmp_path: Path
) -> None:
    config = experiment(
        "ae", tmp_path / "run", **{"train.steps": 100_000, "train.timeout": 6.0, "train.log_every": 1000}
    )
    group = Forked(3, train(config), tmp_path / "log")
    end = time.monotonic() + 30
    while not list((tmp_path / "run").glob("checkpoints/0*")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(group.pids[victim], number)
    struck = time.monotonic()
    others = [rank for rank in range(3) if rank != victim]
    statuses = [group.processes[rank].wait(40) for rank in others]
    took = time.monotonic() - struck
    os.kill(group.pids[victim], signal.SIGKILL) if number == signal.SIGSTOP else None
    group.wait()
    assert took < 25
    assert statuses == [1, 1]
    for rank in others:
        assert f"lost rank {victim} (last known at step" in group.output(rank), group.output(rank)
    RunDirectory(tmp_path / "run").close()  # the lock is free: opening a held one raises


@pytest.mark.slow
def test_a_process_that_is_slow_and_alive_is_waited_for_beyond_the_time_out(tmp_path: Path) -> None:
    # As one that compiles: it hears of no time-out of the collective that the others wait in.
    config = experiment("ae", tmp_path / "run", **{"train.steps": 4, "train.timeout": 4.0})

    def slow(rank: int) -> None:
        real = step.Learner.step

        def step_(self: step.Learner, number: int) -> None:
            time.sleep(9 if (rank, number) == (1, 2) else 0)
            real(self, number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_memory, "FOLDER", "/nonexistent")  # gradients go over the network, as between hosts
            patch.setattr(step.Learner, "step", step_)
            train(config)(rank)

    assert forked(2, slow, tmp_path / "log") == [0, 0], (tmp_path / "log-0.log").read_text()


def test_silence_of_the_store_is_blamed_on_rank_0_alone() -> None:
    since = dict.fromkeys((0, 2), 93.5)  # seconds of a clock that now shows 100
    assert blame(since, answered=94.5, now=100, limit=6) == []  # the store just froze
    assert blame(since, answered=93.0, now=100, limit=6) == [0]  # it is frozen for long
    assert blame(since, answered=100.0, now=100, limit=6) == [0, 2]  # it lives, and the others are silent
    # Rank 2 was silent for long when the store went, which left because of it.
    assert blame({0: 93.5, 2: 86.0}, answered=93.0, now=100, limit=6) == [2]


# -- non-finite


@pytest.mark.parametrize("victim", [0, 1])
def test_a_non_finite_loss_on_one_process_stops_all_before_the_update(victim: int, tmp_path: Path) -> None:
    config = experiment("denoising", tmp_path / "run", **{"train.log_every": 6})

    def poisoned(rank: int) -> None:
        real = step.draw

        def draw(shapes: Any, at: Any, rows: range, *rest: Any, **settings: Any) -> Any:
            draws: Any = real(shapes, at, rows, *rest, **settings)
            if rank == victim and at.number == 13 and len(rows):
                draws.noise[0, 0, 0, 0] = torch.inf
            return draws

        with mock.patch.object(step, "draw", draw):
            dist_ae.train(config)

    assert run(2, poisoned, tmp_path / "run") == [1, 1]
    bundle = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert bundle["step"] == 13 and len(bundle["rows"]) == 96
    # The last checkpoint is clean, and without the poison the run goes on to what it would have been.
    assert run(2, train(config), tmp_path / "run") == [0, 0]
    plain = experiment("denoising", tmp_path / "plain", **{"train.log_every": 6})
    assert run(2, train(plain), tmp_path / "plain") == [0, 0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "plain").values(), weights(tmp_path / "run").values(), strict=True)
    )


def test_a_non_finite_step_can_be_replayed_on_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = experiment("vae", tmp_path / "run", **{"optim.lr": 1e6, "train.log_every": 5})
    assert run(2, train(config), tmp_path / "run") == [1, 1]
    step_number = json.loads((tmp_path / "run" / "nonfinite.json").read_text())["step"]
    found = doctor.replay(tmp_path / "run")
    assert found and all(line.startswith(f"step {step_number}: ") and line.endswith("is not finite") for line in found)
    assert any(not good and "nonfinite.json" in what for good, what in doctor.examine(tmp_path / "run"))
    with pytest.raises(InputError, match="no step to replay"):
        doctor.replay(tmp_path / "nowhere")


def test_doctor_says_what_is_wrong_with_a_run_directory(tmp_path: Path) -> None:
    dist_ae.train(experiment("ae", tmp_path / "run"))
    assert all(good for good, _ in doctor.examine(tmp_path / "run"))
    newest = tmp_path / "run" / "checkpoints" / "00000030" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "split": "train"}\n{"step"')
    wrong = [what for good, what in doctor.examine(tmp_path / "run") if not good]
    assert len(wrong) == 3
    assert "00000030/weights.safetensors" in wrong[0] and "repeats train step 30" in wrong[1] and "cut off" in wrong[2]


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_by_the_clock_is_one_of_all_processes_and_changes_no_weight(world: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    rarely = {"train.save_every": 10**6, "train.eval_every": 10**6, "train.log_every": 100}
    wanted = {**rarely, "optim.schedule": "constant", "train.steps": 10**6, "train.save_minutes": 0.005}
    group = Forked(world, train(experiment("vae", run_dir, **wanted)), tmp_path / "log-killed")
    end, seen = time.monotonic() + 60, set[str]()
    while len(seen) < 2 and time.monotonic() < end:
        seen |= {path.name for path in run_dir.glob("checkpoints/0*")}
        time.sleep(0.02)
    group.kill()
    assert group.wait() == [KILLED] * world, group.output()
    assert len(seen) >= 2, group.output()

    last = int(max(path.name for path in run_dir.glob("checkpoints/0*")))
    wanted |= {"train.steps": last + 5}
    assert run(world, train(experiment("vae", run_dir, **wanted)), run_dir) == [0] * world
    del wanted["train.save_minutes"]
    assert run(world, train(experiment("vae", tmp_path / "straight", **wanted)), tmp_path / "straight") == [0] * world
    resumed, straight = weights(run_dir), weights(tmp_path / "straight")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert [line["step"] for line in metrics(run_dir)] == [*range(100, last + 5, 100), last + 5]
