"""Every launch file has keys that the installed Accelerate knows, and starts the processes it promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import BaseConfig, ClusterConfig
from conftest import REPOSITORY, environment, free_port, metrics, relative_difference, weights

from dist_ae.presets import PRESETS
from dist_ae.processes.environment import notes

pytestmark = pytest.mark.slow

FILES = sorted((REPOSITORY / "launch" / "accelerate").glob("*.yaml"))


def test_there_is_a_file_for_each_place() -> None:
    assert [path.stem for path in FILES] == ["cpu", "cpu_processes", "gpu", "gpus", "nodes"]
    table = (REPOSITORY / "launch" / "README.md").read_text()
    assert all(f"launch/accelerate/{path.name}" in table for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keys_are_those_of_the_installed_accelerate(path: Path) -> None:
    known = {field.name for field in [*fields(BaseConfig), *fields(ClusterConfig)]}
    values = yaml.safe_load(path.read_text())
    assert set(values) <= known
    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes == values["num_processes"] and config.use_cpu == values["use_cpu"]


@pytest.mark.parametrize(("name", "processes"), [("cpu", 1), ("cpu_processes", 2), ("gpu", 1)])
def test_a_file_starts_the_processes_it_promises(name: str, processes: int, tmp_path: Path) -> None:
    # gpu.yaml on a machine without one: one process, on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{name}.yaml"]
    command += [
        "-m",
        "dist_ae",
        "train",
        "ae",
        "--train.steps",
        "2",
        "--tracking.wandb",
        "off",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == processes
    assert done.stdout.count("val.psnr") == 1  # rank 0 only


def processes_of(run_dir: Path) -> list[int]:
    """Every process whose command names a run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue  # ended meanwhile
        if str(run_dir).encode() in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("name", ["cpu", "cpu_processes"])
def test_a_signal_to_the_launcher_saves_at_the_current_step_and_leaves_no_process(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"launch/accelerate/{name}.yaml",
        "-m",
        "dist_ae",
        "train",
        "ae",
    ]
    command += [
        "--train.steps",
        "1000000",
        "--train.log-every",
        "1",
        "--train.eval-every",
        "100000",
        "--tracking.wandb",
        "off",
        "--run-dir",
        str(run_dir),
    ]
    launcher = subprocess.Popen(
        command, env=environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while not ((run_dir / "metrics.jsonl").exists() and metrics(run_dir)) and time.monotonic() < end:
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        struck = time.monotonic()
        while processes_of(run_dir) and time.monotonic() - struck < 10:
            time.sleep(0.05)
            launcher.poll()
        assert processes_of(run_dir) == []
    finally:
        launcher.kill()
        launcher.wait()
    trained = [line["step"] for line in metrics(run_dir)]
    assert trained == list(range(1, trained[-1] + 1))
    assert max(int(path.name) for path in (run_dir / "checkpoints").iterdir()) == trained[-1]


def test_the_restart_policy_goes_on_after_a_stop_backs_off_after_a_fault_and_gives_up_on_a_mistake(
    tmp_path: Path,
) -> None:
    def statuses(*wanted: int, tries: int = 8) -> tuple[int, int, str]:
        """(status of restart.sh, how often the command ran, what was said) for a command that ends as wanted."""
        left = tmp_path / "left"
        left.write_text("".join(f"{status}\n" for status in wanted))
        command = f'read s < {left}; sed -i 1d {left}; exit "$s"'
        done = subprocess.run(
            ["sh", "launch/restart.sh", "sh", "-c", command],
            env=environment(TRIES=str(tries)), cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, len(wanted) - len(left.read_text().split()), done.stderr

    assert statuses(75, 75, 0) == (0, 3, "")
    assert statuses(2, 0) == (2, 1, "")
    status, ran, said = statuses(1, 1, 0)
    assert (status, ran) == (0, 3) and "again in 1 s" in said and "again in 2 s" in said
    assert statuses(1, 1, 0, tries=2)[:2] == (1, 2)


@pytest.mark.parametrize(
    ("shared", "restarts", "here", "said"),
    [("True", "3", 1, True), ("True", "3", 2, False), ("True", "0", 1, False), ("False", "3", 1, False)],
)
def test_torchruns_restarts_on_several_hosts_into_a_used_store_are_named(
    shared: str, restarts: str, here: int, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(0, 2, 29500, LOCAL_WORLD_SIZE=str(here)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert any("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in note for note in notes(PRESETS["ae"])) == said


def test_a_killed_process_is_replaced_and_the_run_ends_as_undisturbed(tmp_path: Path) -> None:
    words = "ae --model.hidden-dims 16 --precision fp64 --train.batch-size 96 --train.log-every 1 --train.save-every 20"
    more = "--train.eval-every 1000000 --tracking.wandb off --run-dir"

    def experiment(run_dir: Path, steps: int) -> list[str]:
        return [*words.split(), "--train.steps", str(steps), *more.split(), str(run_dir)]

    here: dict[str, Any] = {
        "MAIN": "127.0.0.1",
        "HOSTS": "1",
        "PROCESSES": "2",
        "PORT": str(free_port()),
        "LAST_CALL": "1",
    }
    here["PYTHON"] = sys.executable
    run_dir = tmp_path / "run"
    launcher = subprocess.Popen(
        ["launch/torchrun/elastic.sh", *experiment(run_dir, 600)], env=environment(**here), cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not list(run_dir.glob("checkpoints/*[1-9]0")) and time.monotonic() < end:  # beside that of the start
            time.sleep(0.05)
        workers = [
            pid
            for pid in processes_of(run_dir)
            if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(launcher.pid)
        ]
        os.kill(max(workers), signal.SIGKILL)
        said, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said
    assert said.count("2 processes on cpu") == 2 and "resuming at step" in said
    done = subprocess.run(
        [sys.executable, "-m", "dist_ae", "train", *experiment(tmp_path / "alone", 600)],
        env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert relative_difference(weights(run_dir), weights(tmp_path / "alone")) < 1e-9
