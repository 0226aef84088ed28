"""The configuration refuses what it does not know, and the command line says so in one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from accelerate.state import PartialState
from conftest import SMALL, cli, environment

from dist_ae.config import Config, InputError, _walk, load_config
from dist_ae.presets import DESCRIPTIONS, PRESETS
from dist_ae.processes import runtime


def test_presets_are_the_four_systems_and_the_tutorials() -> None:
    kinds = ("ae", "denoising", "dropout", "vae")
    conv = ("conv", "conv-denoising", "conv-dropout", "conv-vae", "conv-fast")
    more = (f"{kind}-{recipe}" for recipe in ("fast", "reference") for kind in kinds)
    tables = ("table", "table-denoising", "table-vae")
    assert list(PRESETS) == [*kinds, *more, *conv, *tables] and list(DESCRIPTIONS) == list(PRESETS)
    reference = PRESETS["ae-reference"]
    assert (reference.optim.lr, reference.optim.betas, reference.optim.schedule) == (1e-3, (0.5, 0.999), "constant")
    assert (
        reference.model.hidden_dims,
        reference.model.latent_dim,
        reference.train.batch_size,
        reference.train.epochs,
    ) == ((512, 256), 128, 128, 20)
    assert [
        bool(PRESETS[f"{name}-reference"].objective.noise_std) for name in ("ae", "denoising", "dropout", "vae")
    ] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model.latnt_dim": 3}, "unknown configuration key 'model.latnt_dim'; did you mean model.latent_dim"),
        ({"model.latent_dim": 0}, "model.latent_dim: .*greater than 0, got 0"),
        ({"model.dropout": 1.0}, "model.dropout: .*less than 1, got 1.0"),
        ({"objective.noise_std": -0.1}, "objective.noise_std"),
        ({"optim.lr": float("nan")}, "optim.lr: .*finite"),
        ({"optim.lr": "fast"}, "optim.lr"),
        ({"optim.betas": (0.9, 1.0)}, "betas must lie in"),
        ({"objective.sigma": 0.0}, "sigma must be greater than 0"),
        ({"objective.sigma": "learned", "objective.likelihood": "bernoulli"}, "a Bernoulli pixel has no sigma"),
        ({"model": 3}, "unknown configuration key 'model'"),
    ],
)
def test_a_wrong_override_is_an_error_that_names_it(values: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        PRESETS["ae"].override(values)


def test_every_field_is_classed_as_trajectory_or_free_and_described() -> None:
    unclassed = [key for key, _, on_resume in _walk(Config(), "") if on_resume not in ("trajectory", "free")]
    assert unclassed == []


def test_a_configuration_survives_json(tmp_path: Path) -> None:
    for preset in PRESETS.values():
        (tmp_path / "config.json").write_text(preset.model_dump_json())
        assert load_config(tmp_path / "config.json") == preset
    (tmp_path / "config.json").write_text('{"model": {"latent_dim": 0, "colour": 1}}')
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(tmp_path / "config.json")


def test_the_default_run_directory_follows_from_what_is_computed() -> None:
    vae = PRESETS["vae"]
    assert vae.directory() == PRESETS["vae"].override({"train.log_every": 7, "tracking.wandb": "off"}).directory()
    others = [vae.override({"seed": 1}), vae.override({"model.latent_dim": 8}), vae.override({"train.epochs": 3})]
    assert len({config.directory() for config in [vae, *others]}) == 4


@pytest.mark.slow
def test_help_needs_no_torch() -> None:
    for arguments in (["--help"], ["train", "--help"], ["train", "vae", "--help"], ["evaluate", "--help"]):
        code = f"import sys; sys.argv = ['dist-ae', *{arguments}]\nimport dist_ae.__main__ as m\n"
        code += "try: m.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert done.returncode == 0 and "usage: dist-ae" in done.stdout, done.stderr


BAD_INPUT = {
    "unknown option": (["--model.latent-dims", "3"], "latent-dim"),
    "unknown preset": None,
    "latent size 0": (["--model.latent-dim", "0"], "model.latent_dim: Input should be greater than 0, got 0"),
    "dropout 1": (["--model.dropout", "1"], "model.dropout"),
    "negative noise": (["--objective.noise-std", "-1"], "objective.noise_std"),
    "lr nan": (["--optim.lr", "nan"], "optim.lr"),
    "lr as a word": (["--optim.lr", "fast"], "--optim.lr"),
    "batch larger than the dataset": (["--train.batch-size", "9999"], "use --train.batch-size 1500 or less"),
    "data root that does not exist": (["--data.name", "mnist", "--data.root", "/nowhere"], "/nowhere"),
    "data root of a folder": (["--data.name", "folder:/usr", "--data.root", "/tmp"], "contains its own path"),
    "two settings that exclude each other": (["--profile", "3"], "error: profile must be FROM:TO"),
    "a preset and a whole configuration": (["--config", "some.json"], "leave out the preset ae"),
    "no configuration named": (["--config"], "--config: expected a file"),
    "precision the device lacks": (["--precision", "fp16"], "use bf16 or fp32"),
    "tf32 without the GPU it needs": (["--precision", "tf32"], "needs an NVIDIA GPU"),
    "another image shape": (["--model.image-shape", "1", "9", "9"], "(1, 9, 9)"),
    "unknown dataset": (["--data.name", "digit"], "expected digits"),
    "run directory that cannot be written": (["--run-dir", "/proc/nowhere"], "/proc/nowhere"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
@pytest.mark.slow
def test_bad_input_is_one_message_and_status_2(kind: str, tmp_path: Path) -> None:
    arguments, expected = BAD_INPUT[kind] or ([], "unknown")
    preset = "aee" if BAD_INPUT[kind] is None else "ae"
    expected = "aee" if BAD_INPUT[kind] is None else expected
    done = cli(
        "train", preset, *(["--run-dir", str(tmp_path / "run")] if "--run-dir" not in arguments else []), *arguments
    )
    assert done.returncode == 2
    assert expected in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_pixels_are_refused_on_the_command_line(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.full((10, 4, 4), np.nan))
    done = cli("train", "ae", "--data.name", f"array:{tmp_path / 'own.npy'}", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and "image 0, index (0, 0, 0)" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_directory_of_another_experiment_is_refused_showing_old_and_new(tmp_path: Path) -> None:
    arguments = [
        "--run-dir",
        str(tmp_path / "run"),
        "--tracking.wandb",
        "off",
        "--train.steps",
        "2",
        "--model.hidden-dims",
        "8",
    ]
    assert cli("train", "ae", *arguments).returncode == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*.json*"))
    done = cli("train", "ae", *arguments, "--model.latent-dim", "5", "--optim.lr", "0.01")
    assert done.returncode == 2
    assert "model.latent_dim: 32 there, 5 now" in done.stderr and "optim.lr: 0.001 there, 0.01 now" in done.stderr
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*.json*"))


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}],
)
def test_a_launch_without_what_processes_need_to_find_each_other_is_refused(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    done = cli("train", "ae", "--run-dir", str(tmp_path / "run"), "--tracking.wandb", "off", **variables)
    assert done.returncode == 2 and "MASTER_PORT is not set" in done.stderr and not (tmp_path / "run").exists()


def test_a_launch_whose_world_is_not_what_accelerate_sees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # What Accelerate does with settings that it does not take for distributed: it trains alone, once a process.
    def alone(*arguments: Any, **settings: Any) -> PartialState:
        with mock.patch.dict(os.environ, {"LOCAL_RANK": "-1", "WORLD_SIZE": "1"}):
            return PartialState(*arguments, **settings)

    monkeypatch.setattr(runtime, "PartialState", alone)
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"announced 2 processes \(WORLD_SIZE\) but Accelerate sees 1"):
        runtime.Runtime(PRESETS["ae"])


@pytest.mark.slow
def test_config_file_reproduces_a_run(tmp_path: Path) -> None:
    config = PRESETS["dropout"].override({**SMALL, "train.steps": 3, "run_dir": str(tmp_path / "a")})
    (tmp_path / "best.json").write_text(config.model_dump_json())
    assert cli("train", f"--config={tmp_path / 'best.json'}").returncode == 0
    assert (
        cli("train", "--config", str(tmp_path / "a" / "config.json"), "--run-dir", str(tmp_path / "b")).returncode == 0
    )
    hashes = [json.loads((tmp_path / run / "result.json").read_text())["weights_sha256"] for run in ("a", "b")]
    assert hashes[0] == hashes[1]
