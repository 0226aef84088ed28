"""Every launch file has keys that the installed Accelerate knows, and starts the processes it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import BaseConfig, ClusterConfig
from conftest import REPOSITORY, environment

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
    command += ["-m", "dist_ae", "train", "ae", "--train.steps", "2", "--tracking.wandb", "off", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == processes
    assert done.stdout.count("val.mse") == 1  # rank 0 only
