"""Runs of an older version live on: they load, evaluate, export, and resume where nothing of them was random."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from conftest import HERE, relative_difference, run, weights

import dist_ae
from dist_ae.config import Config, InputError
from dist_ae.presets import PRESETS
from dist_ae.use.commands import evaluate_run
from dist_ae.use.doctor import examine

KEPT = HERE / "kept"


def settings(preset: str, run_dir: Path, **more: Any) -> Config:
    """What was typed for the kept runs."""
    typed = {"model.latent_dim": 8, "model.hidden_dims": (32, 16), "train.batch_size": 96, "train.log_every": 1}
    typed |= {"tracking.wandb": "off", "optim.schedule": "constant", "train.eval_every": 12, "precision": "fp64"}
    return PRESETS[preset].override({**typed, "run_dir": str(run_dir), **more})


@pytest.fixture(params=["ae", "vae"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT / f"first-stage-{request.param}", tmp_path / request.param))


@pytest.mark.slow
def test_a_run_of_the_first_stage_loads_evaluates_to_its_figures_and_exports(kept: Path, tmp_path: Path) -> None:
    written = json.loads((kept / "result.json").read_text())["metrics"]
    found = evaluate_run(kept).metrics
    assert found["val.mse"] == pytest.approx(written["val.mse"], rel=1e-6)
    # Noise and ε of an evaluation are other numbers now: the same figures to their spread over so many images.
    assert found["val.denoised_psnr"] == pytest.approx(written["val.denoised_psnr"], abs=0.05)
    if "val.neg_elbo" in written:
        assert found["val.rate"] == pytest.approx(written["val.rate"], rel=1e-6)
        assert found["val.neg_elbo"] == pytest.approx(written["val.neg_elbo"], rel=0.01)
    ((status, _, error),) = run(1, "-m", "dist_ae", "export", str(kept), "--out", str(tmp_path / "model.pt2"))
    assert status == 0 and (tmp_path / "model.pt2").is_file(), error
    assert all(whole for whole, _ in examine(kept))


def test_a_run_without_random_draws_resumes_to_what_it_would_have_been(tmp_path: Path) -> None:
    kept = Path(shutil.copytree(KEPT / "first-stage-ae", tmp_path / "ae"))
    dist_ae.train(settings("ae", kept, **{"train.steps": 24}))
    expected = safetensors.torch.load_file(kept / "weights-at-24.safetensors")
    assert relative_difference(weights(kept), expected) < 1e-10


def test_a_run_whose_draws_would_change_is_not_resumed_and_says_why(tmp_path: Path) -> None:
    kept = Path(shutil.copytree(KEPT / "first-stage-vae", tmp_path / "vae"))
    before = {path: path.read_bytes() for path in kept.rglob("*.json")}
    with pytest.raises(InputError, match=r"version 1 of the random draws.*choose another --run-dir"):
        dist_ae.train(settings("vae", kept, **{"train.steps": 24}))
    assert before == {path: path.read_bytes() for path in kept.rglob("*.json")}
