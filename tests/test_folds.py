"""Folds: each record is tested on once, by a run that it took no part in, beside PCA, on any number of processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Forked, cli, run, weights
from PIL import Image
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA

import dist_ae
from dist_ae import PRESETS, InputError
from dist_ae.config import DataConfig
from dist_ae.data.memory import memory_dataset
from dist_ae.data.sources import load

SMALL: dict[str, Any] = {
    "model.hidden_dims": (32, 16),
    "model.latent_dim": 3,
    "train.steps": 60,
    "train.batch_size": 32,
    "train.log_every": 60,
    "train.eval_every": 20,
    "tracking.wandb": "off",
}


def sides(config: DataConfig, data: Any = None) -> list[set[int]]:
    dataset = load(config) if data is None else memory_dataset(data, config)
    assert dataset.test is not None
    return [set(map(int, side.rows)) for side in (dataset.train, dataset.val, dataset.test) if side.rows is not None]


def test_every_record_is_in_one_test_part_and_in_no_other_part_of_that_fold(tmp_path: Path) -> None:
    for number in range(40):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / f"{number:02}.png")
    Image.fromarray(np.full((4, 4), 3, np.uint8)).save(tmp_path / "copy.png")  # of 03.png
    cases: tuple[tuple[Any, dict[str, Any], int], ...] = (
        (load_wine().data, {}, 178),
        (None, {"name": f"folder:{tmp_path}", "cache": tmp_path / "cache"}, 41),
        (np.random.default_rng(0).random((9, 3)) * 100, {}, 9),
    )
    for data, own, count in cases:
        tested: list[int] = []
        for fold in (1, 2, 3, 4):
            train, val, test = sides(DataConfig(folds=4, fold=fold, val_fraction=0.2, **own), data)
            assert train and val and test and not (train & val or train & test or val & test)
            assert train | val | test == set(range(count))
            tested += test
            if data is None:
                assert any({3, 40} <= side for side in (train, val, test))  # 03.png, and its copy.png, the last
        assert sorted(tested) == list(range(count))


@pytest.mark.slow
def test_what_is_tested_on_takes_no_part_in_training(tmp_path: Path) -> None:
    """Other records in the test part, and the same weights: no scale, no PCA, no choice of the best has seen them."""
    data = load_wine().data
    config = PRESETS["table"].override({**SMALL, "data.folds": 3, "data.fold": 2})
    _, _, test = sides(config.data, data)
    other = data.copy()
    other[sorted(test)] *= 7
    for name, rows in (("one", data), ("other", other)):
        dist_ae.train(config.override({"run_dir": tmp_path / name}), data=rows)
    one, same = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert all(torch.equal(one[name], same[name]) for name in one)


@pytest.mark.slow
def test_mean_and_spread_beside_pca_on_one_and_two_processes(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "wine.csv", load_wine().data, delimiter=",", header=",".join("abcdefghijklm"), comments="")
    found = {}
    for world in (1, 2):
        command = f"-m dist_ae train table --data.name {tmp_path}/wine.csv --data.folds 3 --run-dir {tmp_path}/{world}"
        settings = "--model.hidden-dims 32 16 --model.latent-dim 3 --train.steps 60 --train.eval-every 20"
        more = f"--precision fp64 --optim.eps 1e-3 --tracking.wandb off --data.cache {tmp_path}/cache"
        done = run(world, *command.split(), *settings.split(), *more.split())
        assert [status for status, _, _ in done] == [0] * world, done
        assert "test mse over 3 folds: " in done[0][1] and " ± " in done[0][1] and "below it in " in done[0][1]
        assert done[0][1].count("test mse") == 4 and (world == 1 or "test mse" not in done[1][1])
        found[world] = json.loads((tmp_path / str(world) / "folds.json").read_text())
    for one, other in zip(found[1]["folds"], found[2]["folds"], strict=True):
        assert other["test_mse"] == pytest.approx(one["test_mse"], rel=1e-5)
        assert other["best_step"] == one["best_step"]
    # The figures are those of scikit-learn's PCA, and of the model, on the rows of the fold.
    data = load_wine().data.astype(np.float32).astype(np.float64)
    for each in found[1]["folds"]:
        config = DataConfig(name=f"table:{tmp_path}/wine.csv", folds=3, fold=each["fold"], cache=tmp_path / "cache")
        train, _, test = (sorted(side) for side in sides(config))
        mean, deviation = data[train].mean(0), data[train].std(0)
        standard, tested = (data[train] - mean) / deviation, (data[test] - mean) / deviation
        pca = PCA(3).fit(standard)
        linear = ((pca.inverse_transform(pca.transform(tested)) - tested) ** 2).mean()
        assert each["pca_mse"] == pytest.approx(linear, rel=1e-4) and each["records"] == len(test)
        seen = (dist_ae.load(each["run_dir"]).reconstruct(data[test]).numpy() - mean) / deviation
        assert each["test_mse"] == pytest.approx(((seen - tested) ** 2).mean(), rel=1e-3)
        assert each["test_r2"] == pytest.approx(1 - ((seen - tested) ** 2).sum() / (tested**2).sum(), rel=1e-3)


@pytest.mark.slow
def test_killed_in_the_second_fold_the_same_call_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    def folds(rank: int, name: str, dies: bool) -> None:
        from unittest import mock

        from dist_ae import step

        real = step.Learner.step

        def dying(self: Any, number: int) -> None:
            if dies and number == 50 and (tmp_path / name / "fold-2").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, number)

        with mock.patch.object(step.Learner, "step", dying):
            config = PRESETS["table"].override({**SMALL, "data.folds": 3, "run_dir": tmp_path / name})
            dist_ae.train_folds(config, data=load_wine().data)

    assert Forked(1, lambda rank: folds(rank, "plain", False), tmp_path / "a").wait() == [0]
    assert Forked(1, lambda rank: folds(rank, "killed", True), tmp_path / "b").wait() == [-9]
    assert not (tmp_path / "killed" / "folds.json").exists()
    assert Forked(1, lambda rank: folds(rank, "killed", False), tmp_path / "c").wait() == [0]
    plain, killed = (json.loads((tmp_path / name / "folds.json").read_text())["folds"] for name in ("plain", "killed"))
    for one, other in zip(plain, killed, strict=True):
        assert {**one, "run_dir": ""} == {**other, "run_dir": ""}


@pytest.mark.slow
def test_a_fold_that_is_used_later_is_the_one_that_was_trained(tmp_path: Path) -> None:
    np.save(tmp_path / "wine.npy", load_wine().data)
    own = {"data.name": f"array:{tmp_path}/wine.npy", "data.folds": 3, "run_dir": tmp_path / "run"}
    dist_ae.train_folds(PRESETS["table"].override({**SMALL, **own}))
    kept = dist_ae.load(tmp_path / "run" / "fold-2")
    assert kept.config.data.fold == 2 and len(kept.dataset().test or ()) == 60
    with pytest.raises(InputError, match=r"data\.folds"):  # other folds in the same place
        dist_ae.train_folds(PRESETS["table"].override({**SMALL, **own, "data.folds": 4}))


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    wine = load_wine().data
    table = PRESETS["table"].override({**SMALL, "run_dir": tmp_path / "run"})

    def refused(match: str, values: dict[str, Any], data: Any = wine, folds: bool = True) -> None:
        with pytest.raises(InputError, match=match) as error:
            (dist_ae.train_folds if folds else dist_ae.train)(table.override(values), data=data)
        assert "\n" not in str(error.value)

    refused("sets no number of folds", {})
    refused("data.folds 5 means 5 runs", {"data.folds": 5}, folds=False)
    refused("fold 6 does not exist: there are 5 folds", {"data.folds": 5, "data.fold": 6}, folds=False)
    refused("has a split of its own", {"data.folds": 5}, data=(wine, wine))
    refused("digits has a split of its own", {"data.folds": 5, "data.name": "digits"}, data=None)
    refused("too few records for data.folds 100: fold 1 leaves a side empty", {"data.folds": 100}, data=wine[:50])
    (tmp_path / "whole" / "checkpoints").mkdir(parents=True)
    refused("holds a run, and each fold needs a run of its own", {"data.folds": 5, "run_dir": tmp_path / "whole"})
    done = cli("train", "table", "--data.name", "digits", "--data.folds", "1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
