"""A convolution along signals: patch PCA at the start, exact, in the data's own units, and odd positions by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cli, metrics, relative_difference, train_jobs, weights
from sklearn.decomposition import PCA

import dist_ae
from dist_ae import PRESETS, InputError
from dist_ae.use import commands

Array = np.ndarray[Any, np.dtype[Any]]
SMALL: dict[str, Any] = {
    "data.layout": "signals",
    "model.widths": (8, 12),
    "model.latent_dim": 2,
    "train.steps": 40,
    "optim.warmup_steps": 5,
    "train.log_every": 10,
    "train.eval_every": 20,
    "tracking.wandb": "off",
    "precision": "fp32",
}


def heartbeats(count: int, length: int = 62, seed: int = 0) -> Array:
    """Two leads of a heart [N, 2, L], in units of their own: beats of five waves at any place and rate, with noise."""
    draw, time = np.random.default_rng(seed), np.arange(length)
    first, period = draw.uniform(0, 40, (count, 1)), draw.uniform(40, 60, (count, 1))
    second = draw.uniform(0.3, 1.2, (count, 1))
    signals = np.zeros((count, 2, length))
    for place, height, width in ((-9, 0.15, 3), (-2.5, -0.15, 1), (0, 1, 1.2), (2.5, -0.25, 1), (14, 0.3, 5)):
        for beat in range(4):
            wave = height * np.exp(-0.5 * ((time - first - (beat - 1) * period - place) / width) ** 2)
            signals += np.stack([wave, wave * second], 1)
    signals += 0.02 * draw.standard_normal(signals.shape)
    return signals * [[300.0], [20.0]] + [[50.0], [-700.0]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    np.save(folder / "beats.npy", heartbeats(400))
    command = f"train conv --data.name array:{folder}/beats.npy --data.layout signals --run-dir {folder}/run"
    settings = "--model.widths 8 12 --model.latent-dim 2 --train.steps 300 --train.eval-every 100 --optim.lr 5e-3"
    done = cli(*command.split(), *settings.split(), "--optim.warmup-steps", "5", "--tracking.wandb", "off")
    assert done.returncode == 0, done.stderr
    (folder / "run" / "told.txt").write_text(done.stdout)
    return folder / "run"


def pieces(signals: Array, side: int) -> Array:
    """Standardized signals [N, C, L] as pieces of ``side`` values of all channels, the last value repeated."""
    padded = np.pad(signals, ((0, 0), (0, 0), (0, -signals.shape[2] % side)), mode="edge")
    cut = padded.reshape(len(signals), signals.shape[1], -1, side)
    return cut.transpose(0, 2, 1, 3).reshape(-1, signals.shape[1] * side)


@pytest.mark.parametrize("code", ["grid", "vector"])
def test_before_the_first_step_it_is_scikit_learns_pca_of_pieces_along_the_length(code: str, tmp_path: Path) -> None:
    signals = heartbeats(60)
    values = {**SMALL, "model.code": code, "precision": "fp64", "train.steps": 1, "optim.lr": 1e-30}
    dist_ae.train(PRESETS["conv"].override({**values, "run_dir": tmp_path}), data=(signals, signals[:20]))
    mean, deviation = signals.mean((0, 2), keepdims=True), signals.std((0, 2), keepdims=True)
    standard = (signals - mean) / deviation
    rows = pieces(standard, 4) if code == "grid" else standard.reshape(60, -1)
    pca = PCA(2, svd_solver="full").fit(rows)
    expected = pca.inverse_transform(pca.transform(rows))
    if code == "grid":
        expected = expected.reshape(60, 16, 2, 4).transpose(0, 2, 1, 3).reshape(60, 2, 64)[:, :, :62]
    model = dist_ae.load(tmp_path)
    assert model.model.code_shape == ((2, 1, 16) if code == "grid" else (2,))  # one row high: nothing is padded to four
    found = (model.reconstruct(signals).numpy() - mean) / deviation
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=2e-5)
    last = json.loads((tmp_path / "result.json").read_text())["metrics"]
    own = float(((expected.reshape(found.shape) - standard) ** 2)[:20].mean())
    assert last["val.pca_mse"] == pytest.approx(own, rel=1e-5)


@pytest.mark.slow
def test_it_learns_what_lies_at_any_place_far_below_pca(run: Path) -> None:
    found = json.loads((run / "result.json").read_text())["metrics"]
    assert found["val.mse"] < 0.5 * found["val.pca_mse"] and found["val.r2"] > 0.8
    assert "below PCA of pieces of 4 with 32 numbers" in (run / "told.txt").read_text()


def test_a_shifted_signal_gets_the_shifted_code() -> None:
    """What makes it a convolution along the length: away from the ends, a move by a piece moves the code by one."""
    from dist_ae.models import build

    model = build(PRESETS["conv"].override({**SMALL, "model.blocks": 1}), (2, 1, 256)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    signals = torch.zeros(1, 2, 1, 256, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    signals[..., 120:136] = torch.rand(2, 1, 16, dtype=torch.float64, generator=generator)
    code, moved = (model.encode(each)[0] for each in (signals, signals.roll(8, -1)))
    torch.testing.assert_close(code.roll(2, -1)[..., 10:-10], moved[..., 10:-10])


@pytest.mark.slow
def test_signals_with_missing_values_follow_the_float64_rule_on_1_2_and_3_processes(tmp_path: Path) -> None:
    signals = heartbeats(150, 30)
    signals[np.random.default_rng(0).random(signals.shape) < 0.05] = np.nan
    np.save(tmp_path / "gaps.npy", signals)
    jobs = {
        "plain": {},
        "all": {"model.variational": True, "objective.sigma": "learned", "objective.noise_std": 0.2},
        "vector": {"model.code": "vector", "model.dropout": 0.2},
    }
    for world in (1, 2, 3):
        own = {**SMALL, "data.name": f"array:{tmp_path / 'gaps.npy'}", "data.missing": "mask", "precision": "fp64"}
        own |= {"train.steps": 8, "train.log_every": 1, "train.eval_every": 4, "train.batch_size": 32}
        train_jobs(
            world,
            [
                {"preset": "conv", "overrides": {**own, **more, "run_dir": str(tmp_path / f"{name}-{world}")}}
                for name, more in jobs.items()
            ],
            tmp_path,
        )
    for name in jobs:
        one = tmp_path / f"{name}-1"
        for world in (2, 3):
            other = tmp_path / f"{name}-{world}"
            assert relative_difference(weights(other), weights(one)) < 1e-9
            for split in ("train", "val"):
                for line, same in zip(metrics(one, split), metrics(other, split), strict=True):
                    assert same.get("loss", 0.0) == pytest.approx(line.get("loss", 0.0), rel=1e-10)
                    assert same.get("mse", 0.0) == pytest.approx(line.get("mse", 0.0), rel=1e-10)


@pytest.mark.slow
def test_missing_stretches_come_back_better_than_by_the_mean(tmp_path: Path) -> None:
    whole = heartbeats(300)
    gaps = np.zeros(whole.shape, bool)
    for signal, start in enumerate(np.random.default_rng(1).integers(0, 55, 300)):
        gaps[signal, signal % 2, start : start + 4] = True
    own = {"data.missing": "mask", "train.steps": 150, "optim.lr": 5e-3, "run_dir": tmp_path}
    dist_ae.train(PRESETS["conv"].override({**SMALL, **own}), data=np.where(gaps, np.nan, whole))
    filled = dist_ae.load(tmp_path).reconstruct(np.where(gaps, np.nan, whole)).numpy()
    mean, deviation = whole.mean((0, 2)), whole.std((0, 2))
    error = ((filled - whole) / deviation[:, None])[gaps]
    by_mean = ((mean[:, None] - whole) / deviation[:, None])[gaps]
    assert np.isfinite(filled).all() and (error**2).mean() < 0.6 * (by_mean**2).mean()


def test_signals_go_through_every_use_and_odd_positions_are_named(run: Path, tmp_path: Path) -> None:
    signals = heartbeats(50, seed=1)
    signals[7, 1, 33] += 500  # a step that no heart makes
    np.save(tmp_path / "odd.npy", signals)
    scored = commands.score_run(run, str(tmp_path / "odd.npy"), tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(scored.scores.argmax()) == 7 and rows[7]["flagged"] == "True"
    assert rows[7]["odd_1"] == "channel 1 position 33" and len({rows[7][f"odd_{n}"] for n in (1, 2, 3)}) == 3
    seen = np.load(commands.reconstruct_run(run, str(tmp_path / "odd.npy"), tmp_path / "seen.npy"))
    assert (
        seen.shape == signals.shape and 0 < ((seen[:7] - signals[:7]) ** 2).mean() < signals[:7].std((0, 2)).max() ** 2
    )
    assert np.load(commands.embed_run(run, None, tmp_path / "codes.npy")).shape == (40, 2, 1, 16)
    page = commands.explore_run(run, None, tmp_path / "page.html").read_text()
    assert "40 of 40 records on the map" in page
    found = json.loads(commands.evaluate_run(run, out=tmp_path / "e.json").written[0].read_text())
    assert set(found["columns"]) == {"channel 0", "channel 1"}
    assert all(each["r2"] > each["pca_r2"] for each in found["columns"].values())


@pytest.mark.slow
def test_exports_take_and_give_signals_in_their_units(run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    signals = heartbeats(9, seed=2).astype(np.float32)
    path, *_ = commands.export_run(run, tmp_path / "model.onnx", format="onnx")
    seen, code = onnxruntime.InferenceSession(path).run(None, {"records": signals})
    model = dist_ae.load(run)
    assert np.abs((seen - model.reconstruct(signals).numpy()) / [[80.0], [5.0]]).max() < 1e-3
    assert np.abs(code - model.embed(signals).numpy()).max() < 1e-3
    folder, *_ = commands.export_run(run, tmp_path / "folder", format="safetensors")
    assert torch.equal(dist_ae.load(folder).reconstruct(signals), model.reconstruct(signals))
    card = (folder / "README.md").read_text()
    assert "--data.layout signals" in card and "--model.record-shape" not in card  # which follows from the data


@pytest.mark.slow
def test_signals_are_packed_and_trained_from_and_too_many_axes_are_refused(tmp_path: Path) -> None:
    signals, found = heartbeats(80).astype(np.float32), []
    np.save(tmp_path / "own.npy", signals)
    assert cli("pack", str(tmp_path / "own.npy"), str(tmp_path / "packed")).returncode == 0
    for number, name in enumerate((f"array:{tmp_path / 'own.npy'}", f"packed:{tmp_path / 'packed'}")):
        own = {**SMALL, "data.name": name, "train.steps": 3, "run_dir": tmp_path / str(number)}
        found.append(dist_ae.train(PRESETS["conv"].override(own)).metrics)
    assert found[0] == found[1]
    with pytest.raises(InputError, match=r"data.layout signals with \[N, L\] or \[N, C, L\]"):
        dist_ae.train(PRESETS["conv"].override({**SMALL, "run_dir": tmp_path / "no"}), data=signals[:, None])
