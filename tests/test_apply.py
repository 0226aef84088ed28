"""A trained run can be loaded and used, from Python and from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, run

import dist_ae
from dist_ae import data
from dist_ae.config import PRESETS, InputError

IMAGES = data.load(PRESETS["ae"].data).val.images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    for preset in ("ae", "vae"):
        dist_ae.train(PRESETS[preset].override({**SMALL, "train.steps": 100, "optim.lr": 0.01, "run_dir": str(root / preset)}))
    return root


def test_a_loaded_model_gives_the_figures_of_its_run(trained: Path) -> None:
    for preset, metric in (("ae", "val.mse"), ("vae", "val.neg_elbo")):
        model = dist_ae.load(trained / preset)
        expected = json.loads((trained / preset / "result.json").read_text())["metrics"]
        assert float(model.score(IMAGES).mean()) == pytest.approx(expected[metric], rel=1e-5)
    reconstruction = dist_ae.load(trained / "vae").reconstruct(IMAGES)
    assert reconstruction.shape == (297, 1, 8, 8) and reconstruction.min() >= 0 and reconstruction.max() <= 1


def test_bytes_floats_arrays_and_tensors_are_the_same_images(trained: Path) -> None:
    model = dist_ae.load(trained / "ae")
    expected = model.embed(IMAGES)
    assert expected.shape == (297, 8)
    for images in (IMAGES / 255, torch.from_numpy(IMAGES), torch.from_numpy(IMAGES).double() / 255):
        torch.testing.assert_close(model.embed(images), expected)
    torch.testing.assert_close(model.embed(IMAGES, batch_size=10), expected)


def test_samples_follow_from_the_seed_and_look_like_images(trained: Path) -> None:
    model = dist_ae.load(trained / "vae")
    samples = model.sample(64, seed=0)
    assert samples.shape == (64, 1, 8, 8) and samples.min() >= 0 and samples.max() <= 1
    assert torch.equal(samples[:16], model.sample(16, seed=0)) and not torch.equal(samples, model.sample(64, seed=1))
    assert float(samples.mean()) == pytest.approx(float(IMAGES.mean()) / 255, abs=0.1)
    with pytest.raises(InputError, match="only a variational model can sample"):
        dist_ae.load(trained / "ae").sample(4)


def test_wrong_images_are_refused(trained: Path) -> None:
    model = dist_ae.load(trained / "ae")
    for images, expected in (
        (IMAGES[:, 0], r"shape \[N, 1, 8, 8\]"),
        (IMAGES[:0], "shape"),
        (IMAGES.astype(np.float32), "divide by 255"),
        (IMAGES.astype(np.int64), "int64"),
        (np.full((2, 1, 8, 8), np.nan), "nan"),
    ):
        with pytest.raises(InputError, match=expected):
            model.embed(images)


def test_best_is_the_checkpoint_with_the_best_validation(tmp_path: Path) -> None:
    # A learning rate that spoils the model in the end: constant and far too large after a good start.
    overrides = {**SMALL, "train.steps": 60, "train.eval_every": 5, "optim.lr": 0.05, "run_dir": str(tmp_path / "run"), "optim.schedule": "constant"}
    result = dist_ae.train(PRESETS["ae"].override(overrides))
    best, last = (float(dist_ae.load(tmp_path / "run", which=which).score(IMAGES).mean()) for which in ("best", "last"))
    values = {line["step"]: line["mse"] for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if line["split"] == "val"}
    assert result.best_step == min(values, key=values.__getitem__)
    assert best == pytest.approx(min(values.values()), rel=1e-5) and last == pytest.approx(result.metrics["val.mse"], rel=1e-5)


def test_evaluate_gives_the_run_s_own_figures_on_any_number_of_processes(trained: Path) -> None:
    expected = json.loads((trained / "vae" / "result.json").read_text())["metrics"]
    for world in (1, 2):
        outputs = run(world, "-m", "dist_ae", "evaluate", str(trained / "vae"), "--batch-size", "50")
        assert all(status == 0 for status, _, _ in outputs), outputs
        table = dict(line.split()[:2] for line in outputs[0][1].splitlines() if "val." in line)
        assert {name: float(value) for name, value in table.items()} == pytest.approx(expected, rel=1e-5)
        assert world == 1 or "val." not in outputs[1][1]


def test_what_is_not_a_run_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        dist_ae.load(tmp_path)
    shutil.copytree(trained / "ae", tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoints/*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="no whole checkpoint"):
        dist_ae.load(tmp_path / "run")
    ((_, _, err),) = run(1, "-m", "dist_ae", "evaluate", str(tmp_path / "nowhere"))
    assert "is not a run directory" in err and "Traceback" not in err
