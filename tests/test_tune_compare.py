"""Sweeps beside each other: which is better at which size, how certain that is, and what is refused."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import cut_off
from conftest import free_port
from test_tracking import wandb_records
from test_tune import mse, refused, sweep_with, with_fresh_seeds

import tune
from dist_ae.config import InputError
from tune.__main__ import main
from tune.plan import Settings, Sweep, new_sweep, write_json
from tune.report import write_report
from tune.results import Selection
from tune.spaces import Metric, parse_space
from tune.sweep import track
from tune.trial import train_trial


def at(folder: Path, errors: dict[int, float], fresh: dict[int, list[float]] | None = None) -> Sweep:
    """A sweep that finished with these errors by code size, and had these with fresh seeds, by place."""
    trials = [("finished", {"model.latent_dim": size}, mse(error)) for size, error in errors.items()]
    return with_fresh_seeds(sweep_with(folder, trials), fresh or {})


def trained(folder: Path, name: str, rate: float, **overrides: Any) -> Sweep:
    """A sweep of two sizes on digits that was really trained, without Ray."""
    part = {"model.latent_dim": {"choice": [2, 8]}, "optim.lr": {"loguniform": [rate / 2, rate * 2]}}
    fixed = {"train.steps": 60, "model.hidden_dims": (32,), "train.eval_every": 60, "tracking.wandb": "off"}
    fixed |= {"tracking.pictures": False, "train.batch_size": 100}
    fixed |= {key.replace("__", "."): value for key, value in overrides.items()}
    sweep = new_sweep(folder / name, parse_space({"presets": {"ae": part}}, "s"), fixed, "val.mse", Settings())
    for number, size in enumerate((2, 8)):
        train_trial(sweep, sweep.new_trial(number, "ae", {"model.latent_dim": size, "optim.lr": rate}), lambda _: None)
    sweep.write()
    return sweep


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sweep]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, [trained(folder, "slow", 1e-5), trained(folder, "fast", 3e-3, model__activation="silu")]


@pytest.mark.slow
def test_sweeps_beside_each_other_say_which_is_better_what_differs_and_how_each_stands_beside_pca(
    two: tuple[Path, list[Sweep]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = two
    main(["--compare", "slow", "fast", "--storage", str(folder), "--name", "both"])
    out = capsys.readouterr().out
    page, data = (folder / "both.html").read_text(), json.loads((folder / "both.json").read_text())
    assert re.search(r"^With 2 and 8 numbers, fast is ahead of slow by [\d.]+% to [\d.]+%, with one seed$", out, re.M)
    assert "--resume fast" in out and "--confirm 3" in out
    assert re.search(r"^(WARNING: )?fast, best: ae with a code of 8, .* PCA with as many numbers", out, re.M)
    assert all(line in html.unescape(page) for line in data["said"]) and data["said"] == out.splitlines()[:-1]
    assert data["differs"]["model.activation"] == {"slow": "gelu", "fast": "silu"}
    assert set(data["differs"]) - {"finished trials", "training steps", "seconds of trials"} == {
        "model.activation",
        "optim.lr",
    }
    assert [level["verdict"] for level in data["levels"]] == [{"slow": "one seed"}] * 2
    assert data["sweeps"]["fast"]["front"][0]["size"] == 2 and data["sweeps"]["fast"]["pca"] > 0
    # One self-contained page, with the fronts and both answers beside PCA.
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', page), "nothing is fetched"


def test_sweeps_are_compared_from_python_and_show_themselves(two: tuple[Path, list[Sweep]]) -> None:
    folder, (slow, fast) = two
    found = tune.compare(slow.path, str(fast.path), page=folder / "here.html")
    assert found.path == folder / "here.html" and found.path.exists() and found.levels[0].leader == "fast"
    shown = found._repr_html_()
    assert (
        "model.activation" in shown
        and 'src="data:image/png;base64,' in shown
        and str(found) in "\n".join(found.sentences)
    )


def test_fresh_seeds_tell_sweeps_apart_or_say_that_they_cannot(tmp_path: Path) -> None:
    clear = {0: [0.021, 0.0211, 0.0212], 1: [0.0100, 0.0101, 0.0102]}
    worse = at(tmp_path / "a", {4: 0.02, 8: 0.01, 16: 0.005}, clear)
    better = at(tmp_path / "b", {4: 0.03, 8: 0.009, 16: 0.004}, {0: [0.015, 0.0151], 1: [0.0090, 0.0110]})
    found = tune.compare(worse.path, better.path, page=tmp_path / "page.html")
    one, other = str(worse.path), str(better.path)  # both have one name
    assert [(level.numbers, level.leader, level.verdict) for level in found.levels] == [
        (4, other, {one: "worse"}),
        (8, other, {one: "alike"}),
        (16, other, {one: "one seed"}),
    ]
    first, second, third, *_ = found.sentences
    assert first == f"With 4 numbers, {other} is better than {one} by 28.7%, which fresh seeds confirm"
    assert second == f"With 8 numbers, {other} and {one} cannot be told apart with 2 fresh seeds"
    assert third == f"With 16 numbers, {other} is ahead of {one} by 20.0%, with one seed"
    gap = found.levels[0].behind[one]
    from scipy.stats import ttest_ind

    expected = ttest_ind(clear[0], [0.015, 0.0151], equal_var=False).confidence_interval()
    assert gap == pytest.approx((expected.low, expected.high))


def test_sweeps_without_a_common_size_are_compared_by_their_best_with_at_most_so_many_numbers(tmp_path: Path) -> None:
    small, large = at(tmp_path / "a", {2: 0.05, 8: 0.02}), at(tmp_path / "b", {4: 0.06, 16: 0.01, 32: 0.03})
    found = tune.compare(small.path, large.path, page=tmp_path / "page.html")
    assert [(level.numbers, level.leader) for level in found.levels] == [
        (4, str(small.path)),
        (8, str(small.path)),
        (16, str(large.path)),
    ]
    assert found.sentences[0].startswith("With at most 4 and 8 numbers, ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "val.probe_accuracy"}, "metric is val.mse in x and val.probe_accuracy in s"),
        ({"overrides": {"data.val_fraction": 0.2}}, "data.val_fraction is 0.1 in x and 0.2 in s"),
        ({"overrides": {"data.name": "fashion_mnist"}}, "data.name is digits in x and fashion_mnist in s"),
    ],
)
def test_sweeps_of_another_question_are_refused_by_what_differs(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = at(tmp_path, {4: 0.02})
    one.path.rename(tmp_path / "x")
    write_json(tmp_path / "x/sweep.json", json.loads((tmp_path / "x/sweep.json").read_text()) | {"name": "x"})
    other = dataclasses.replace(at(tmp_path, {4: 0.02}), **change)
    other.write()
    assert said in refused(capsys, "--compare", "x", "s", "--storage", str(tmp_path))
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.slow
def test_the_same_name_of_other_data_is_refused_and_the_same_data_of_another_name_is_not(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    for name, content in (("a", images), ("copy", images), ("other", images[::-1])):
        np.save(tmp_path / f"{name}.npy", content)
    a, copy, other = (
        trained(tmp_path, name, 1e-3, data__name=f"array:{tmp_path}/{name}.npy") for name in ("a", "copy", "other")
    )
    assert tune.compare(a.path, copy.path).levels
    with pytest.raises(InputError, match=r"the content of the data is \w+ in a and \w+ in other"):
        tune.compare(a.path, other.path)


def test_noise_and_likelihood_are_of_the_question_where_the_metric_depends_on_them(tmp_path: Path) -> None:
    cases: list[tuple[Metric, str, str, Any]] = [
        ("val.denoised_psnr", "denoising", "evaluation.noise_std", 0.5),
        ("val.neg_elbo", "vae", "objective.likelihood", "gaussian"),
    ]
    for metric, preset, key, value in cases:
        trials = [("finished", {"model.latent_dim": 4}, {**mse(0.02), metric: 10.0})]
        sweeps = [sweep_with(tmp_path / f"{preset}-{i}", trials, metric, preset) for i in range(2)]
        dataclasses.replace(sweeps[1], overrides={key: value}).write()
        with pytest.raises(InputError, match=f"{key} is "):
            tune.compare(*(sweep.path for sweep in sweeps))


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at(tmp_path, {4: 0.02})
    storage = ("--storage", str(tmp_path))
    assert "2 to 8 different sweeps" in refused(capsys, "--compare", "s", "s", *storage)
    assert "2 to 8 different sweeps" in refused(capsys, "--compare", "s", *storage)
    assert "no sweep in" in refused(capsys, "--compare", "s", "none", *storage)
    given = refused(capsys, "ae", "--compare", "s", "t", "--num-trials", "3", "--train.epochs", "2", *storage)
    assert "leave out SPACE, --num-trials, --train.epochs" in given
    with pytest.raises(InputError, match=r"page\.html cannot be written"):
        tune.compare(tmp_path / "s", at(tmp_path / "t", {4: 0.03}).path, page="/proc/page.html")
    empty = sweep_with(tmp_path / "e", [("failed", {"model.latent_dim": 4}, None)])
    assert "finds no finished trial" in refused(capsys, "--compare", "s", str(empty.path), *storage)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["none", "down"])
def test_a_sweep_s_answer_is_a_run_of_its_group_in_wandb_with_front_and_report(
    server: str, two: tuple[Path, list[Sweep]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = dataclasses.replace(two[1][1], overrides={**two[1][1].overrides, "tracking.wandb": "auto"})
    monkeypatch.setenv("WANDB_MODE", "offline" if server == "none" else "online")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    (sweep.trial_dir(sweep.trials()[0].id) / "wandb/offline-run-1").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(sweep.path / "wandb", ignore_errors=True)
    answer = write_report(sweep, Selection("smallest-within", 1000))
    assert answer is not None and answer.trials[0]["model.latent_dim"] == 8
    track(sweep, answer, "dist-ae sweep --resume fast")
    out, err = capfd.readouterr()
    paths = [f"{sweep.path}/{part}wandb/offline-run-*" for part in ("", "trials/*/")]
    assert out.splitlines()[-1] == f"Weights & Biases: to upload, wandb sync {' '.join(paths)}"
    assert ("does not answer" in err) == (server == "down") and "--resume" not in err
    (folder,) = sweep.path.glob("wandb/offline-run-*")
    records: list[Any] = []
    deadline = time.monotonic() + 30
    while not records or records[-1].WhichOneof("record_type") != "exit":  # W&B's own process may still be writing
        assert time.monotonic() < deadline, "the run's file has no end"
        records = list(wandb_records(next(folder.glob("*.wandb"))))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.display_name) == (f"{sweep.key}-summary", "fast", "fast-summary")
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["answer/model.latent_dim"] == 2 and answer.sentences[0] in summary["said"]
    assert next(folder.glob("files/media/html/*.html")).read_text() == (sweep.path / "report.html").read_text()
    table = json.loads(next(folder.glob("files/media/table/front*.json")).read_text())
    front = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["model.latent_dim"] for row in front] == [2, 8] and front[0]["trial"] == answer.front[0]["trial"]


@pytest.mark.slow
def test_the_page_of_a_comparison_is_whole_on_a_telephone(two: tuple[Path, list[Sweep]], tmp_path: Path) -> None:
    _, (slow, fast) = two
    found = tune.compare(slow.path, fast.path, page=tmp_path / "page.html")
    for width in (390, 1200):
        assert cut_off(found.path, width, tmp_path) == (0, 0), width
