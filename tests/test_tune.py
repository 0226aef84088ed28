"""Sweeps without Ray: spaces, what the command line refuses, the ranking and the choice, the report."""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import html
import io
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import matplotlib
import numpy as np
import PIL.Image
import pytest
import tyro
from browser import cut_off
from conftest import REPOSITORY, SMALL, digits_file

import dist_ae
import tune
from dist_ae.config import Config, DataConfig, InputError
from dist_ae.data import sources
from dist_ae.presets import PRESETS
from tune.__main__ import Training, flat, main
from tune.budget import RUNGS, Budget, bounds, time_left
from tune.confirm import confirmation, next_runs, undecided
from tune.insight import End, ends, importance
from tune.plan import (
    Settings,
    Sweep,
    append_report,
    check_name,
    new_sweep,
    only_driver,
    plan_trials,
    read_reports,
    read_sweep,
    write_json,
)
from tune.results import Selection, front, parse_selection, results, select
from tune.spaces import (
    IMAGE_SHAPES,
    SPACES,
    Distribution,
    Metric,
    check,
    check_together,
    load_space,
    parse_overrides,
    parse_space,
)
from tune.sweep import check_data, checked
from tune.trial import train_trial

# -- spaces


@pytest.mark.parametrize("name", SPACES)
def test_a_shipped_space_gives_legal_configurations_over_what_matters_there(name: str) -> None:
    space = load_space(name, None)
    check(space, {}, workers=1)
    for part in space.parts.values():
        assert {"model.latent_dim", "optim.lr"} <= set(part)
    assert ("objective.noise_std" in space.parts.get("denoising", {})) == (name in ("denoising", "all"))
    assert ("model.dropout" in space.parts.get("dropout", {})) == (name in ("dropout", "all"))
    seen = set()
    for index in range(40):
        preset, values = space.sample(0, index)
        config = PRESETS[preset].override(values)
        assert dict(config.flat())["optim.lr"] == values["optim.lr"]
        seen.add((preset, values["optim.lr"]))
    assert len(seen) == 40
    assert {preset for preset, _ in seen} == set(space.parts)


def test_each_shipped_space_is_judged_by_its_own_task() -> None:
    metrics = {name: load_space(name, None).metric for name in SPACES}
    assert metrics == {
        "ae": "val.mse",
        "denoising": "val.denoised_psnr",
        "dropout": "val.mse",
        "vae": "val.neg_elbo",
        "all": "val.mse",
        "conv": "val.mse",
        "table": "val.mse",
    }


def test_sampling_is_a_pure_function_of_seed_and_number() -> None:
    space = load_space("all", None)
    assert space.sample(3, 7) == space.sample(3, 7)
    assert space.sample(3, 7) != space.sample(4, 7)
    assert space.sample(3, 7) != space.sample(3, 11)  # the same preset


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("uniform", 0.0, 0.5), ("loguniform", 1e-4, 1e-1), ("randint", 2, 5), ("lograndint", 2, 64)],
)
def test_a_range_is_sampled_within_its_ends_and_over_all_of_it(kind: str, low: float, high: float) -> None:
    import random

    d, rng = Distribution.model_validate({kind: [low, high]}), random.Random(0)
    values = [d.sample(rng) for _ in range(2000)]
    assert low <= min(values) <= max(values) <= high
    if "int" in kind:
        assert set(values) == set(range(int(low), int(high) + 1)) or kind == "lograndint"
        assert all(isinstance(v, int) for v in values)
    middle = math.sqrt(low * high) if "log" in kind else (low + high) / 2
    assert 0.4 < sum(v < middle for v in values) / len(values) < 0.62
    grid = d.grid()
    assert grid[0] == low and grid[-1] == high and len(grid) == 4


def test_a_file_in_json_or_toml_is_a_space(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'metric = "val.mse"\n[presets.ae]\n"model.hidden_dims" = {choice = [[32, 16], [64]]}\n'
        '"optim.lr" = {loguniform = [1e-4, 1e-2]}\n'
    )
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "presets": {
                    "ae": {"model.hidden_dims": {"choice": [[32, 16], [64]]}, "optim.lr": {"loguniform": [1e-4, 1e-2]}}
                }
            }
        )
    )
    toml, from_json = load_space(None, tmp_path / "a.toml"), load_space(None, tmp_path / "a.json")
    assert toml == from_json
    check(toml, {}, workers=1)
    assert parse_space(toml.to_data(), "a") == toml
    assert {PRESETS["ae"].override(values).model.hidden_dims for _, values in toml.grid()} == {(32, 16), (64,)}
    assert len(list(toml.grid())) == 8


def test_a_key_that_is_set_is_not_searched() -> None:
    space = load_space("denoising", None).pinned(parse_overrides(["model.latent_dim=8"]))
    assert space.searched() == ["optim.lr", "objective.noise_std"]


def test_overrides_are_read_as_json_or_as_lists() -> None:
    values = parse_overrides(["model.hidden_dims=64,32", "train.epochs=5", "data.name=digits", "optim.betas=[0.5,0.9]"])
    config = PRESETS["ae"].override(values)
    assert (config.model.hidden_dims, config.train.epochs, config.optim.betas) == ((64, 32), 5, (0.5, 0.9))


def test_the_known_image_shapes_are_the_datas(fashion_mnist: Path) -> None:
    for name in ("digits", "fashion_mnist"):
        assert sources.load(DataConfig(name=name)).image_shape == IMAGE_SHAPES[name]


# -- refusals


def command(*arguments: str, cwd: Path, **more: str) -> tuple[int, str]:
    """(exit status, stderr) of `python -m tune`; an import that takes seconds makes it fail."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tune", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert not imported & {"ray", "torch", "sklearn", "scipy", "optuna"}, "help and refusals need none of them"
    return done.returncode, "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says where it refuses, which must be one line and exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "") and err.startswith("error: ") and err.endswith("\n"), err
    assert err.count("\n") == 1 and len(err) < 1000, err
    return err


BAD_SPACES = {
    "unknown key": ({"presets": {"ae": {"model.latent": {"choice": [2]}}}}, "model.latent_dim"),
    "empty range": ({"presets": {"ae": {"optim.lr": {"loguniform": [0.1, 0.1]}}}}, "empty"),
    "turned range": ({"presets": {"ae": {"optim.lr": {"uniform": [0.2, 0.1]}}}}, "empty"),
    "no values": ({"presets": {"ae": {"optim.lr": {"choice": []}}}}, "at least 1 item"),
    "logarithm of 0": ({"presets": {"ae": {"model.dropout": {"loguniform": [0, 0.5]}}}}, "use uniform"),
    "illegal value": ({"presets": {"ae": {"model.dropout": {"uniform": [0.5, 1.5]}}}}, "dropout"),
    "fraction": ({"presets": {"ae": {"model.latent_dim": {"randint": [2, 8.5]}}}}, "valid integer"),
    "unknown kind": ({"presets": {"ae": {"optim.lr": {"normal": [0, 1]}}}}, "loguniform"),
    "unknown preset": ({"presets": {"gan": {"optim.lr": {"choice": [1e-3]}}}}, "gan"),
    "wrong metric": ({"metric": "val.loss", "presets": {"ae": {"optim.lr": {"choice": [1e-3]}}}}, "val.mse"),
    "metric of another model": (
        {"metric": "val.neg_elbo", "presets": {"ae": {"optim.lr": {"choice": [1e-3]}}}},
        "variational",
    ),
    "question searched": ({"presets": {"ae": {"evaluation.noise_std": {"uniform": [0.1, 0.3]}}}}, "same question"),
    "likelihood by ELBO": (
        {"presets": {"vae": {"objective.likelihood": {"choice": ["gaussian", "bernoulli"]}}}},
        "comparable",
    ),
    "code larger than the image": ({"presets": {"ae": {"model.latent_dim": {"choice": [8, 65]}}}}, "64 values"),
    "not a space": ({"optim.lr": [1, 2]}, "presets"),
    "fractions of a whole number": (
        {"presets": {"ae": {"model.latent_dim": {"uniform": [2, 5]}}}},
        "use randint or choice",
    ),
    "fractions on a log scale": ({"presets": {"ae": {"train.batch_size": {"loguniform": [8, 64]}}}}, "use lograndint"),
    "number of a flag": ({"presets": {"ae": {"train.compile": {"uniform": [0, 1]}}}}, "train.compile"),
    "text of a number": ({"presets": {"ae": {"optim.lr": {"choice": [1e-3, "fast"]}}}}, "optim.lr"),
    "metrics in a list": (
        {"metric": ["val.mse"], "presets": {"ae": {"optim.lr": {"choice": [1e-3]}}}},
        "should be 'val.mse'",
    ),
    "empty metric": ({"metric": "", "presets": {"ae": {"optim.lr": {"choice": [1e-3]}}}}, "should be 'val.mse'"),
    "number beyond 64 bits": (
        {"presets": {"ae": {"model.latent_dim": {"lograndint": [1, 10**400]}}}},
        "less than 9223372036854775808",
    ),
    "infinite width": ({"presets": {"ae": {"optim.lr": {"uniform": [-1e308, 1e308]}}}}, "finite"),
    "choice without end": ({"presets": {"ae": {"optim.lr": {"choice": [1e-3] * 100_000}}}}, "more than 10,000 values"),
    "many wrong values": ({"presets": {"ae": {"model.hidden_dims": {"choice": [[0] * 500]}}}}, "and 499 more"),
    "long text": ({"presets": {"ae": {"x" * 100_000: {"choice": [1]}}}}, "unknown configuration key"),
    "table in place of a key": ({"presets": {"ae": {"optim": {"lr": {"choice": [1e-3]}}}}}, '"optim.lr"'),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_SPACES)
def test_a_bad_space_is_refused_by_name(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, word = BAD_SPACES[case]
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert word in refused(capsys, "--space", str(tmp_path / "s.json"))


RANGES = ("uniform", "loguniform", "randint", "lograndint")
ODD = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, 1e308, -1e308, 5e-324]))
PLAIN = st.recursive(
    st.none() | st.booleans() | ODD | st.text(max_size=5) | st.sampled_from(["relu", "muon", "fp16", "fp64"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def ranges(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pair = st.tuples(numbers, numbers).map(sorted)
    return st.sampled_from(RANGES).flatmap(lambda kind: st.fixed_dictionaries({kind: pair}))


def choices(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({"choice": st.lists(values, max_size=4)})


TAME = st.integers(1, 70) | st.floats(0.001, 0.9)
TAME_KEYS = ["model.latent_dim", "optim.lr", "model.dropout", "train.batch_size", "train.epochs", "objective.beta"]
TAME_PART = st.dictionaries(st.sampled_from(TAME_KEYS), ranges(TAME) | choices(TAME), min_size=1, max_size=2)
WILD_KEYS = st.sampled_from([*dict(Config().flat()), "model", "model.latent", ""])
WILD_PART = st.dictionaries(WILD_KEYS, ranges(ODD | TAME) | choices(PLAIN) | PLAIN, max_size=3) | PLAIN
METRIC = st.fixed_dictionaries({}, optional={"metric": st.sampled_from(["val.mse", "val.neg_elbo"]) | PLAIN})
SPACE = st.one_of(
    st.builds(lambda part: {"presets": {"ae": part}}, TAME_PART),
    st.builds(
        lambda parts, metric: {"presets": parts, **metric},
        st.dictionaries(st.sampled_from([*PRESETS, "gan"]), TAME_PART | WILD_PART, max_size=3),
        METRIC,
    ),
    PLAIN,
)
accepted: list[Any] = []


@hypothesis.settings(
    max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(SPACE, st.sampled_from([1, 2, 3]))
def any_data_is_a_space_of_legal_configurations_or_refused(content: Any, workers: int) -> None:
    try:
        space = parse_space(content, "s")
        check(space, {}, workers)
        check_together({}, space.plan("random", 20, 0))
    except InputError as error:
        said = str(error)
    else:
        said = ""
        accepted.append(content)
        assert parse_space(space.to_data(), "s") == space
        assert space.grid_size() == len(list(space.grid()))
        for preset, values in [*space.plan("random", 20, 1), *space.grid()]:
            PRESETS[preset].override(values)
    assert "\n" not in said and len(said) < 1000


@pytest.mark.slow
def test_any_data_is_a_space_of_legal_configurations_or_refused_in_one_line() -> None:
    accepted.clear()
    any_data_is_a_space_of_legal_configurations_or_refused()
    assert len(accepted) > 20


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nested too deep": ("s.json", lambda path: path.write_text("[" * 100_000), "nested too deep"),
    "nested too deep, in TOML": ("s.toml", lambda path: path.write_text("a = " + "[" * 100_000), "nested too deep"),
    "nested a little too deep": (
        "s.json",
        lambda path: path.write_text("[" * 50 + "]" * 50),
        "expected a table of presets",
    ),
    "pipe": ("s.json", os.mkfifo, "not a regular file"),
    "folder": ("s.json", Path.mkdir, "not a regular file"),
    "not UTF-8": ("s.json", lambda path: path.write_bytes(b'{"presets": "\xff"}'), "not a readable JSON file"),
    "huge": ("s.json", lambda path: path.write_bytes(b" " * 3_000_000), "more than the 1048576"),
    "device without end": ("s.json", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "not there": ("s.json", lambda path: None, "No such file"),
    "name too long": ("s" * 300 + ".json", lambda path: None, "File name too long"),
    "number of 5,000 digits": ("s.json", lambda path: path.write_text("9" * 5000), "not a readable JSON file"),
    "number of 5,000 digits, in TOML": (
        "s.toml",
        lambda path: path.write_text("a = 0x" + "f" * 5000),
        "not a readable TOML file",
    ),
    "key given twice": (
        "s.json",
        lambda path: path.write_text('{"presets": {"ae": {}, "ae": {}}}'),
        "it repeats a key",
    ),
    "date": ("s.toml", lambda path: path.write_text("presets = 2020-01-01"), "valid dictionary, got '2020-01-01'"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_space_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, make, word = FILES[case]
    make(tmp_path / name)
    assert word in refused(capsys, "--space", str(tmp_path / name))


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_values_that_are_legal_only_apart_are_refused_before_a_trial_starts(
    search: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"precision": {"choice": ["fp32", "fp64"]}, "train.gradient_type": {"choice": ["exact", "bf16"]}}
    (tmp_path / "s.json").write_text(json.dumps({"presets": {"ae": both}}))
    assert "rounds; use one of the two" in refused(capsys, "--space", str(tmp_path / "s.json"), "--search", search)


def test_a_grid_too_large_is_refused_by_its_size_without_counting_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {key: {"choice": [i / 1000 for i in range(1, 100)]} for key in ("optim.lr", "optim.eps", "model.dropout")}
    part |= {key: {"uniform": [0.1, 0.9]} for key in ("optim.momentum", "optim.weight_decay", "objective.beta")}
    (tmp_path / "s.json").write_text(json.dumps({"presets": {"ae": part}}))
    err = refused(capsys, "--space", str(tmp_path / "s.json"), "--search", "grid")
    assert f"{99**3 * 4**3:,} points" in err and "--search random" in err


UNTRAINABLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no room for the principal components": ({"model.hidden_dims": {"choice": [[32], [1]]}}, {}, "at least 2 units"),
    "pca of logits": (
        {"objective.likelihood": {"choice": ["gaussian", "bernoulli"]}},
        {},
        "not the logits of objective.likelihood bernoulli",
    ),
    "precision of a GPU": ({"precision": {"choice": ["fp32", "fp16"]}}, {}, "fp16 needs a GPU"),
    "batch larger than the data": ({"train.batch_size": {"choice": [100, 5000]}}, {}, "training images"),
    "images of another shape": ({"optim.lr": {"choice": [1e-3]}}, {"model.image_shape": [1, 4, 4]}, "image_shape"),
}


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_what_no_trial_could_train_is_refused_before_ray_starts(case: str, tmp_path: Path) -> None:
    part, overrides, word = UNTRAINABLE[case]
    sweep = checked(parse_space({"presets": {"ae": part}}, "s"), overrides, None, Settings(num_trials=4), "s", tmp_path)
    with pytest.raises(InputError, match=word):
        check_data(sweep)


def test_a_pipe_in_place_of_data_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    name = f"array:{tmp_path}/pipe.npy"
    sweep = checked(load_space("ae", None), {"data.name": name}, None, Settings(num_trials=2), "s", tmp_path)
    with pytest.raises(InputError, match="not a file"):
        check_data(sweep)


def test_options_of_training_are_spelled_as_in_dist_ae_train() -> None:
    given = ["--train.batch-size", "64", "--model.hidden_dims", "64", "32", "--model.variational", "--data.root=/data"]
    given += ["--train.no-compile", "--precision", "fp64", "--train.steps", "None"]
    values = flat(tyro.cli(Training, args=given))
    assert values == {
        "train.batch_size": 64, "model.hidden_dims": [64, 32], "model.variational": True, "data.root": "/data",
        "train.compile": False, "precision": "fp64", "train.steps": None,
    }  # fmt: skip
    assert PRESETS["ae"].override(values).model.hidden_dims == (64, 32)
    every = {key for key, _ in Config().flat()} - {"name", "seed", "run_dir"}  # a sweep has its own of these
    shown = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(shown):
        tyro.cli(Training, args=["--help"])
    assert {key for key in every if f"--{key.replace('_', '-')}" in shown.getvalue()} == every


@pytest.mark.parametrize("stem", ["mein Raum!", ".hidden", "-dash", "räume", "x" * 200, "***"])
def test_any_file_name_gives_a_sweep_a_legal_name(stem: str, tmp_path: Path) -> None:
    path = tmp_path / f"{stem}.toml"
    path.write_text('[presets.ae]\n"optim.lr" = {choice = [1e-3]}\n')
    check_name(f"{load_space(None, path).name}-20260101-120000")


@pytest.mark.slow
def test_a_damaged_sweep_or_a_wrong_limit_of_a_resumed_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = checked(load_space("ae", None), {}, None, Settings(num_trials=2), "s", tmp_path)
    plan_trials(good)
    sweep_json, trial_json = good.path / "sweep.json", good.trial_dir(good.trials()[1].id) / "trial.json"
    again = ("--resume", "s", "--storage", str(tmp_path))
    said = refused(capsys, *again, "--max-concurrent", "-1")
    assert "--max-concurrent: Input should be greater than or equal to 1, got -1" in said
    whole = json.loads(sweep_json.read_text())
    damages: list[dict[str, Any]] = [
        {"settings": {"num_trials": "x"}},
        {"space": []},
        {"metric": []},
        {"overrides": 3},
        {"space": {"name": "s"}},
    ]
    for damaged in ({"format": whole["format"]}, *({**whole, **damage} for damage in damages)):
        sweep_json.write_text(json.dumps(damaged))
        assert "sweep.json is damaged" in refused(capsys, *again)
    sweep_json.write_text(json.dumps(whole))
    trial_json.write_text('{"id": 3}')
    assert "trial.json is missing or damaged" in refused(capsys, *again)


REFUSED = {
    "unknown space": (["aee"], "did you mean ae"),
    "unknown flag": (["ae", "--num-trails", "3"], "num-trials"),
    "unknown key": (["ae", "--set", "model.latent=3"], "model.latent_dim"),
    "empty range": (["--space", "empty.toml"], "empty"),
    "wrong metric": (["ae", "--metric", "val.neg_elbo"], "variational"),
    "code larger than the image": (["ae", "--set", "model.latent_dim=65"], "64 values"),
    "more workers than cores": (
        ["ae", "--workers-per-trial", "512", "--set", "train.batch_size=512"],
        "this machine has",
    ),
    "workers without an image": (["ae", "--workers-per-trial", "3", "--set", "train.batch_size=2"], "without an image"),
    "unwritable storage": (["ae", "--storage", "/proc/sweeps"], "cannot be written"),
    "storage that is a file": (["ae", "--storage", "empty.toml"], "cannot be written"),
    "clones of another size": (["ae", "--scheduler", "pbt"], "model.latent_dim cannot change"),
    "clones of several workers": (
        ["ae", "--scheduler", "pbt", "--workers-per-trial", "2", "--set", "model.latent_dim=4"],
        "workers-per-trial 1 only",
    ),
    "clones of other models": (["all", "--scheduler", "pbt", "--set", "model.latent_dim=4"], "different models"),
    "share of a GPU for several workers": (
        ["ae", "--workers-per-trial", "2", "--gpus-per-worker", "0.5"],
        "whole GPUs",
    ),
    "grid of another size": (["ae", "--search", "grid", "--num-trials", "7"], "24 points"),
    "no such sweep": (["--resume", "nothing"], "no sweep in"),
    "choice unknown": (["ae", "--select", "smallest"], "smallest-within-PCT"),
    "bad name": (["ae", "--name", "../x"], "--name"),
    "address": (["ae", "--address", "somewhere"], "HOST:PORT"),
    "port that is none": (["ae", "--address", "127.0.0.1:99999"], "HOST:PORT"),
    "host that is none": (["ae", "--address", "a" * 70 + ":80"], "nothing answers"),
    "trials without end": (
        ["ae", "--num-trials", "1000000000"],
        "--num-trials: Input should be less than or equal to 10000",
    ),
    "CPUs that are no number": (
        ["ae", "--cpus-per-worker", "nan"],
        "--cpus-per-worker: Input should be a finite number",
    ),
    "GPUs that are no number": (
        ["ae", "--gpus-per-worker", "nan"],
        "--gpus-per-worker: Input should be a finite number",
    ),
    "seeds without end": (["ae", "--confirm", "1000000000"], "2 to 100"),
    "budget of clones": (["ae", "--budget", "5", "--scheduler", "pbt"], "leave out --scheduler pbt"),
    "budget of no time": (["ae", "--budget", "0"], "--budget: Input should be greater than or equal to 1"),
    "one seed": (["ae", "--confirm", "1"], "says nothing about spread"),
    "nested value": (["ae", "--set", "train.epochs=" + "[" * 100_000], "train.epochs"),
    "dotted option without a value": (["ae", "--train.epochs"], "Missing value for argument"),
    "dotted option unknown": (["ae", "--model.latent", "3"], "--model.latent-dim"),
    "nothing to search": (["ae", "--model.latent-dim", "3", "--optim.lr", "1e-3"], "nothing is left to search"),
    "empty name": (["ae", "--name", ""], "--name"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_message_and_status_2_before_ray(case: str, tmp_path: Path) -> None:
    arguments, word = REFUSED[case]
    (tmp_path / "empty.toml").write_text('[presets.ae]\n"optim.lr" = {uniform = [2, 1]}\n')
    status, err = command(*arguments, cwd=tmp_path)
    assert status == 2, err
    assert word in re.sub(r"[│\s]+", " ", err)
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("sweep.json"))


@pytest.mark.slow
def test_help_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    status, err = command("--help", cwd=tmp_path)
    assert (status, err) == (0, "")


# -- folder and choice


def sweep_with(
    folder: Path,
    outcomes: Iterable[tuple[str, dict[str, Any], dict[str, float] | None]],
    metric: Metric = "val.mse",
    preset: str = "ae",
) -> Sweep:
    """A sweep of trials that went as told: (status, values, last metrics)."""
    space = load_space(preset, None)
    sweep = new_sweep(folder / "s", space, {}, metric, Settings())
    for number, (status, values, metrics) in enumerate(outcomes):
        others = {key: d.grid()[1] for key, d in space.parts[preset].items()} | {"optim.lr": 1e-3}
        trial = sweep.new_trial(number, preset, {**others, **values})
        if metrics is not None:
            progress = 100.0 if status == "finished" else 40.0
            for part in (progress / 2, progress):
                append_report(
                    sweep.trial_dir(trial.id), {"step": int(part), "progress": part, **metrics, "seconds": part}
                )
        if status == "finished":
            write_json(sweep.run_dir(trial) / "result.json", {"steps": 100})
        elif status in ("stopped", "failed"):
            sweep.end_trial(trial.id, status, "NonFinite: step 3" if status == "failed" else None)
    sweep.write()
    return sweep


def mse(value: float) -> dict[str, float]:
    return {"val.mse": value, "val.denoised_psnr": -10 * math.log10(value) if value > 0 else math.nan}


def test_the_ranking_puts_nan_last_and_finished_first(tmp_path: Path) -> None:
    sweep = sweep_with(
        tmp_path,
        [
            ("failed", {"model.latent_dim": 2}, {"val.mse": math.nan}),
            ("finished", {"model.latent_dim": 4}, mse(0.03)),
            ("stopped", {"model.latent_dim": 8}, mse(0.001)),
            ("finished", {"model.latent_dim": 8}, mse(0.02)),
            ("pending", {"model.latent_dim": 8}, None),
            ("failed", {"model.latent_dim": 8}, mse(0.5)),
        ],
    )
    rows = results(sweep)
    assert [row.trial.number for row in rows] == [3, 1, 2, 4, 5, 0]
    assert [row.outcome.status for row in rows] == ["finished", "finished", "stopped", "pending", "failed", "failed"]


@pytest.mark.slow
def test_a_resumed_sweep_refuses_what_it_decided_when_it_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_trials(checked(load_space("ae", None), {}, None, Settings(num_trials=2), "s", tmp_path))
    for given in (
        ["--num-trials", "9"],
        ["--scheduler", "asha"],
        ["--search", "grid"],
        ["--metric", "val.mse"],
        ["--name", "t"],
        ["--set", "train.epochs=3"],
        ["--train.epochs", "3"],
        ["--workers-per-trial", "2"],
    ):
        said = refused(capsys, "--resume", "s", "--storage", str(tmp_path), *given)
        assert f"leave out {given[0]}" in said and "--max-concurrent" in said, said


def test_a_refused_sweep_leaves_no_folder(tmp_path: Path) -> None:
    for given, words in (
        ({"init_from": str(tmp_path / "none")}, "not a run directory"),
        ({"train.batch_size": 9999}, "9"),
    ):
        with pytest.raises(InputError, match=words):
            tune.search("ae", given, num_trials=2, storage=tmp_path, name="s")
        assert not (tmp_path / "s").exists()


def test_the_command_that_goes_on_with_a_sweep_is_whole(tmp_path: Path) -> None:
    from tune.sweep import resuming

    sweep = new_sweep(tmp_path / "my runs" / "s", load_space("ae", None), {}, "val.mse", Settings())
    words = shlex.split(resuming(sweep, Selection("best-under", 32), 3))
    assert words[:3] == ["dist-ae", "sweep", "--resume"] and words[3] == "s"
    assert words[4:] == ["--storage", str(tmp_path / "my runs"), "--select", "best-under-32", "--confirm", "3"]


def test_a_trial_too_large_for_its_device_is_tried_twice_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune.trial import train_trial

    def full(*arguments: object, **more: object) -> None:
        raise dist_ae.OutOfMemory("cuda:0 has no memory left")

    sweep = sweep_with(tmp_path, [("pending", {"model.latent_dim": 4}, None)])
    (trial,) = sweep.trials()
    monkeypatch.setattr(dist_ae, "train", full)
    for rank in ("1", "0"):  # workers that fail in one try count it each for itself
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(dist_ae.OutOfMemory):
            train_trial(sweep, trial, lambda report: None)
    train_trial(sweep, trial, lambda report: None)
    outcome = sweep.outcome(trial)
    assert outcome.status == "failed" and "no memory left" in str(outcome.error)


def test_a_sweep_from_python_takes_the_path_of_a_space_as_text(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[presets.ae]\n"optim.lr" = {choice = [-1.0]}\n')
    with pytest.raises(InputError, match=r"mine\.toml|optim\.lr"):
        tune.search(str(tmp_path / "mine.toml"), storage=tmp_path)


def test_the_choice_is_the_best_the_smallest_nearly_best_or_the_best_small_one(tmp_path: Path) -> None:
    sizes = {2: 0.2, 8: 0.105, 16: 0.102, 32: 0.1}
    sweep = sweep_with(
        tmp_path, [("finished", {"model.latent_dim": size}, mse(value)) for size, value in sizes.items()]
    )

    def chosen(text: str) -> int | None:
        row = select(results(sweep), parse_selection(text), sweep)
        return row.latent_dim if row else None

    assert chosen("best") == 32
    assert [chosen(f"smallest-within-{percent}") for percent in ("1", "2.5", "6%", "150")] == [32, 16, 8, 2]
    assert [chosen(f"best-under-{size}") for size in (40, 16, 9, 1)] == [32, 16, 8, None]


def test_nearly_best_follows_the_direction_and_sign_of_the_metric(tmp_path: Path) -> None:
    psnr = [
        ("finished", {"model.latent_dim": size}, {"val.denoised_psnr": value, "val.mse": 0.1})
        for size, value in ((2, 18.0), (4, 19.5), (8, 20.0))
    ]
    sweep = sweep_with(tmp_path / "a", psnr, "val.denoised_psnr", "denoising")
    row = select(results(sweep), Selection("smallest-within", 3), sweep)
    assert row is not None and row.latent_dim == 4
    elbo = [
        ("finished", {"model.latent_dim": size}, {"val.neg_elbo": value, "val.mse": 0.1})
        for size, value in ((2, -90.0), (4, -98.0), (8, -100.0))
    ]
    sweep = sweep_with(tmp_path / "b", elbo, "val.neg_elbo", "vae")
    row = select(results(sweep), Selection("smallest-within", 3), sweep)
    assert row is not None and row.latent_dim == 4


def test_only_a_finished_trial_is_the_answer(tmp_path: Path) -> None:
    sweep = sweep_with(
        tmp_path,
        [("stopped", {"model.latent_dim": 4}, mse(0.001)), ("failed", {"model.latent_dim": 4}, {"val.mse": math.nan})],
    )
    assert select(results(sweep), Selection("best"), sweep) is None


def test_the_front_holds_no_trial_that_another_beats_in_size_and_error(tmp_path: Path) -> None:
    pairs = [(2, 0.2), (4, 0.3), (8, 0.1), (8, 0.09), (16, 0.09), (32, 0.05)]
    sweep = sweep_with(tmp_path, [("finished", {"model.latent_dim": size}, mse(value)) for size, value in pairs])
    rows = results(sweep)
    best = front(rows, {row.trial.id: row.value for row in rows})
    assert [(row.latent_dim, row.value) for row in best] == [(2, 0.2), (8, 0.09), (32, 0.05)]


def test_trials_are_ranked_by_the_weights_that_are_used_not_by_those_at_their_end(tmp_path: Path) -> None:
    sweep = sweep_with(
        tmp_path,
        [
            ("finished", {"model.latent_dim": 4}, mse(0.03)),
            ("finished", {"model.latent_dim": 8}, mse(0.5)),
            ("finished", {"model.latent_dim": 16}, mse(0.02)),
        ],
    )
    # The second was at 0.01 before it got worse; every use takes those weights.
    folder = sweep.trial_dir(sweep.trials()[1].id)
    last = json.loads((folder / "reports.jsonl").read_text().splitlines()[-1])
    with open(folder / "reports.jsonl", "w") as file:
        for step, value in ((1, 0.2), (2, 0.01), (3, 0.5)):
            file.write(json.dumps({**last, "step": step, **mse(value)}) + "\n")
    rows = results(sweep)
    assert [(row.trial.number, row.value) for row in rows] == [(1, 0.01), (2, 0.02), (0, 0.03)]


def test_reports_forget_what_a_retry_did_again_and_what_a_kill_tore(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        append_report(tmp_path, {"step": step, "progress": step, "from": "first"})
    with open(tmp_path / "reports.jsonl", "a") as file:
        file.write('{"step": 4, "progr')
    for step in (2, 3, 4):
        append_report(tmp_path, {"step": step, "progress": step, "from": "second"})
    assert [(r["step"], r["from"]) for r in read_reports(tmp_path)] == [
        (1, "first"),
        (2, "second"),
        (3, "second"),
        (4, "second"),
    ]


def test_a_name_is_used_once_and_by_one_driver(tmp_path: Path) -> None:
    sweep = checked(load_space("ae", None), {}, None, Settings(num_trials=2), "mine", tmp_path)
    with only_driver(sweep.path, new=True):
        plan_trials(sweep)
        with pytest.raises(InputError, match="is running"), only_driver(sweep.path, new=False):
            pass
    with pytest.raises(InputError, match="--resume mine"), only_driver(sweep.path, new=True):
        pass
    again = read_sweep(sweep.path)
    assert again.trials() == sweep.trials() and len(again.trials()) == 2
    assert again.space == sweep.space


def test_the_search_of_a_budget_leaves_time_for_fresh_seeds_whatever_a_trial_that_just_began_says() -> None:
    now = 0.0
    budget = Budget(10, 0.0, slots=2, held=4, clock=lambda: now)
    for number in range(2):
        budget.started(str(number))
        now += 5
        budget.reported(str(number), 20)
        now += 20
        budget.reported(str(number), 100)
    assert budget.pace() == pytest.approx(25)
    budget.started("late")
    now += 10  # most of it its start
    budget.reported("late", 1)
    assert budget.pace() == pytest.approx(25)
    now = budget.deadline + 10  # the search took a while to end
    budget.held = 0
    assert budget.fits(4)


def test_a_plan_that_never_began_is_planned_anew(tmp_path: Path) -> None:
    sweep = checked(load_space("ae", None), {}, None, Settings(num_trials=2), "mine", tmp_path)
    sweep.new_trial(5, "ae", {})  # what a driver leaves that dies before sweep.json is written
    with only_driver(sweep.path, new=True):
        plan_trials(sweep)
    assert [trial.number for trial in sweep.trials()] == [0, 1]


def test_a_trial_is_complete_only_with_its_last_report(tmp_path: Path) -> None:
    sweep = sweep_with(tmp_path, [("stopped", {"model.latent_dim": 4}, mse(0.1))])
    trial = sweep.trials()[0]
    write_json(sweep.run_dir(trial) / "result.json", {"steps": 100})  # the kill came before the report
    assert sweep.outcome(trial).status == "unfinished"


def test_a_trial_that_lost_a_peer_is_tried_again_and_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_ae.processes.watch import LostProcess
    from tune.trial import train_trial

    def lose(*arguments: Any, **more: Any) -> None:
        raise LostProcess("lost rank 1 of 2 processes at step 478")

    sweep = sweep_with(tmp_path, [("pending", {"model.latent_dim": 4}, None)])
    monkeypatch.setattr(dist_ae, "train", lose)
    with pytest.raises(LostProcess):
        train_trial(sweep, sweep.trials()[0], lambda report: None)
    assert sweep.outcome(sweep.trials()[0]).status == "pending"


def with_fresh_seeds(sweep: Sweep, values: dict[int, list[float]]) -> Sweep:
    """A sweep whose trials, by number, had these values with fresh seeds."""
    made = confirmation(sweep)
    for trial in sweep.trials():
        for seed, value in enumerate(values.get(trial.number, []), 1):
            again = made.new_trial(trial.number * 1000 + seed, trial.preset, {**trial.values, "seed": seed})
            append_report(made.trial_dir(again.id), {"step": 9, "progress": 100.0, **mse(value), "seconds": 1})
            write_json(made.run_dir(again) / "result.json", {"steps": 9})
    return sweep


@pytest.mark.slow
def test_fresh_seeds_decide_and_what_they_cannot_tell_apart_goes_to_the_smaller_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune.report import write_report

    def answer(name: str, values: dict[int, list[float]]) -> tuple[str, str, list[dict[str, str]]]:
        sizes = ((16, 0.010), (8, 0.0101), (4, 0.0102), (2, 0.09))
        trials = [("finished", {"model.latent_dim": size}, mse(value)) for size, value in sizes]
        sweep = with_fresh_seeds(sweep_with(tmp_path / name, trials), values)
        write_report(sweep, Selection("best"))
        table = list(csv.DictReader((sweep.path / "trials.csv").read_text().splitlines()))
        return capsys.readouterr().out, (sweep.path / "report.html").read_text(), table

    out, page, table = answer("apart", {0: [0.012, 0.0121, 0.0122], 1: [0.010, 0.0101, 0.0102], 2: [0.02, 0.021]})
    assert "best: ae with a code of 8" in out and "also leads with 3 fresh seeds: " in out and "worse by 0.002" in out
    assert [row["model.latent_dim"] for row in table] == ["8", "16", "4", "2"]
    assert [float(table[0][f"confirm.{name}"]) for name in ("mean", "low", "high")] == pytest.approx(
        [0.0101, 0.0101 - 4.3027 * 1e-4 / 3**0.5, 0.0101 + 4.3027 * 1e-4 / 3**0.5], rel=1e-4
    )
    assert table[0]["behind.low"] == table[3]["confirm.seeds"] == "" and float(table[2]["behind.low"]) > 0
    assert "leads with 3 fresh seeds" in page and ">behind, 95 %<" in page
    out, page, table = answer("alike", {0: [0.010, 0.012], 1: [0.012, 0.010], 2: [0.03, 0.031]})
    said = re.search(r"(\S+)-0000 is not distinguishable from (\S+)-0001 with 2 fresh seeds; the smaller code", out)
    assert said and said[0] in page and "best: ae with a code of 8" in out
    out, *_ = answer("failed", {0: [0.010, math.nan], 1: [0.012, 0.0121]})
    assert "best: ae with a code of 8" in out and "0000 failed" in out


def spend(truth: dict[str, float], noise: float, most: int, seed: int) -> tuple[str, dict[str, list[float]]]:
    """(best by the fresh seeds, runs) of a search over trials of a true loss, each seen once, then confirmed."""
    rng = random.Random(seed)
    searched = sorted(((name, rng.gauss(loss, noise)) for name, loss in truth.items()), key=lambda each: each[1])
    found: dict[str, list[float]] = {}
    while runs := next_runs(searched, found, most):
        for name, place in runs:
            assert len(found.setdefault(name, [])) == place - 1, "a seed was left out"
            found[name].append(rng.gauss(truth[name], noise))
    return undecided(found)[0], found


def test_only_as_many_runs_are_spent_as_tell_the_leader_from_the_next() -> None:
    clear = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    best, found = spend(clear, 0.01, 10, 0)
    assert best == "a" and {name: len(runs) for name, runs in found.items()}.keys() == {"a", "b"}
    assert sum(map(len, found.values())) <= 6
    same = dict.fromkeys("abcdefgh", 1.0)
    _, found = spend(same, 0.1, 4, 0)
    assert len(found) <= 5 and max(map(len, found.values())) == 4
    # A trial that one lucky seed put in front does not stay there, and one that seeds put third is looked at.
    close = {"a": 1.0, "b": 1.3, "c": 1.35, "d": 1.4, "e": 9.0}
    chosen = [spend(close, 0.2, 8, seed)[0] for seed in range(60)]
    draws = [random.Random(seed) for seed in range(60)]
    one_seed = [min((draw.gauss(loss, 0.2), name) for name, loss in close.items())[1] for draw in draws]
    assert chosen.count("a") >= 57 > 54 > one_seed.count("a")


# -- time


class Machine:
    """A simulated machine that trains trials of a budget, with ASHA's rule at its rungs, and changes its speed once."""

    def __init__(self, seed: int, minutes: float, slots: int, seconds: float, change: float, wanted: int = 0) -> None:
        self.rng, self.now, self.finished, self.begun = random.Random(seed), 0.0, 0, 0
        self.budget = Budget(minutes, 0.0, slots, wanted, clock=lambda: self.now)
        self.now = self.rng.uniform(4, 12)  # until Ray is there
        self._rungs: dict[float, list[float]] = {rung: [] for rung in RUNGS[1:]}
        self._changes, self._change, self._seconds = self.rng.uniform(0.1, 0.8) * 60 * minutes, change, seconds

    def run(self) -> float:
        """Seconds until the answer is there."""
        running: dict[str, list[float]] = {}  # progress, seconds of a whole trial, quality
        while not self.budget.is_over():
            while len(running) < self.budget.slots and self.budget.may_begin() and self._wants_more():
                name, self.begun = f"t{self.begun}", self.begun + 1
                whole = self._seconds * self.rng.uniform(0.7, 1.4)
                running[name] = [-300 / whole, whole, self.rng.random()]  # it loads for three seconds
                self.budget.started(name)
            if not running:
                break
            self.now += 0.5
            speed = self._change if self.now > self._changes else 1.0
            for name, (before, whole, quality) in list(running.items()):
                after = min(100.0, before + 50 * speed / whole)
                running[name][0] = after
                if int(after / 100 * 27) > int(before / 100 * 27):  # an evaluation
                    self.budget.reported(name, after)
                if after == 100 or self._stops(before, after, quality):
                    self.finished += after == 100
                    del running[name]
        return self.now + self.rng.uniform(2, 20)  # stopping, and the report

    def _wants_more(self) -> bool:
        return self.begun < (self.budget.wanted or 10**6)

    def _stops(self, before: float, after: float, quality: float) -> bool:
        for rung, seen in self._rungs.items():
            if before < rung <= after:
                seen.append(quality)
                return self.budget.rung() <= rung and quality < sorted(seen)[-max(1, len(seen) // 3)]
        return False


@pytest.mark.slow
@pytest.mark.parametrize("change", [0.5, 1.5, 1.0])
def test_a_budget_ends_in_time_with_an_answer_on_a_machine_that_changes_its_speed(change: float) -> None:
    for seed in range(10):
        for slots, seconds in ((1, 30.0), (2, 90.0), (2, 5.0), (4, 180.0)):
            machine = Machine(seed, 10, slots, seconds, change)
            ended = machine.run()
            assert 8 * 60 <= ended <= 10.5 * 60, (seed, slots, seconds, ended)
            assert machine.finished >= 1, (seed, slots, seconds)


def test_a_budget_plans_rungs_so_that_as_many_trials_fit_as_are_wanted() -> None:
    rungs = {}
    for seconds in (5.0, 30.0, 60.0, 200.0):
        machine = Machine(0, 10, 2, seconds, 1.0, wanted=16)
        machine.run()
        rungs[seconds] = machine.budget.rung()
        assert machine.begun >= (16 if seconds < 200 else 8), "without stopping, 5 would fit"
    assert rungs[5.0] == 100 and sorted(rungs.values(), reverse=True) == list(rungs.values()) and rungs[200.0] < 12
    held = Budget(10, 0.0, 2, held=6, clock=lambda: 100.0)
    before = held.deadline
    held.started("a")
    held.clock = lambda: 130.0
    held.reported("a", 50.0)
    assert held.deadline == before - 3 * 60 and not held.fits(20) and held.fits(4)


def test_the_time_that_is_left_is_told_rightly_from_the_second_finished_trial_on() -> None:
    told, right = 0, 0
    for seed in range(40):
        rng, slots, count = random.Random(seed), 2, 16
        costs = [rng.lognormvariate(4, 0.3) for _ in range(count)]
        free, ends, starts = [0.0] * slots, [], []
        for cost in costs:
            place = free.index(min(free))
            starts.append(free[place])
            free[place] += cost
            ends.append(free[place])
        order = sorted(range(count), key=lambda i: ends[i])
        for done in range(2, count):
            now = ends[order[done - 1]]
            running = [now - starts[i] for i in order[done:] if starts[i] < now]
            low, high = bounds([costs[i] for i in order[:done]], running, count - done - len(running), slots)
            told, right = told + 1, right + (low <= max(free) - now <= high)
    assert right / told > 0.9
    assert bounds([50.0], [3.0], 4, 2) == (0.0, math.inf) and time_left([50.0], [3.0], 4, 2) == ""
    assert re.fullmatch(r", \d+ to \d+ min left", time_left([50.0, 60.0], [3.0], 20, 2))
    slow = bounds([50.0] * 8 + [100.0] * 8, [0.0], 7, 1)
    assert slow[0] <= 800 <= slow[1] and slow[0] > 400, "the costs of a machine that became slower count"


# -- report


def test_pca_in_the_report_is_the_best_linear_code(tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    from dist_ae.sweeping import Linear

    sweep = sweep_with(tmp_path, [("finished", {"model.latent_dim": size}, mse(0.1)) for size in (2, 8, 64)])
    linear = Linear(PRESETS["ae"], [sweep.answer(trial) for trial in sweep.trials()])
    found = linear.errors(noisy=False)
    dataset: Any = sources.load(DataConfig(name="digits"))
    train, val = (split.images.reshape(len(split), -1) / 255.0 for split in (dataset.train, dataset.val))
    for size in (2, 8):
        model = PCA(size).fit(train)
        expected = float(np.square(model.inverse_transform(model.transform(val)) - val).mean())
        assert found[size] == pytest.approx(expected, rel=1e-5)
    assert found[64] < 1e-12
    found = linear.errors(noisy=True)
    # All of the noise goes through, of variance 0.09, but in the few directions in which no image varies.
    assert 0.08 < found[64] < 0.09
    assert found[8] < found[64] / 2


@pytest.mark.slow
def test_the_report_stands_alone_and_shows_what_was_found(tmp_path: Path) -> None:
    from tune.report import write_report

    pairs = [(2, 0.05), (8, 0.02), (16, 0.012), (32, 0.02)]
    trials = [
        ("finished", {"model.latent_dim": size, "optim.lr": 10.0**-i}, mse(value))
        for i, (size, value) in enumerate(pairs, 2)
    ]
    sweep = sweep_with(tmp_path, [*trials, ("failed", {"model.latent_dim": 64}, {"val.mse": math.nan})])
    answer = write_report(sweep, Selection("best"))
    assert answer is not None
    assert answer.path == sweep.path and dist_ae.load_config(sweep.path / "best.json") == answer.best
    assert [row["model.latent_dim"] for row in answer.trials] == [16, 8, 32, 2, 64]
    assert [row["model.latent_dim"] for row in answer.front] == [2, 8, 16] and answer.importance == []
    assert answer.run_dir == sweep.trial_dir(answer.trials[0]["trial"]) and "PCA" in str(answer)
    shown = answer._repr_html_()
    assert shown.count("<tr>") == 6 and 'src="data:image/png;base64,' in shown and answer.sentences[0] in shown
    page = (sweep.path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', page), "nothing is fetched"
    for heading in (
        "The answer",
        "Code size against error",
        "Learning curves",
        "Parameters and result",
        "Ranking",
    ):
        assert heading in page
    assert "best: ae with a code of 16, val.mse 0.012. It is" in page and "NonFinite: step 3" in page
    assert "Importance: 4 finished trials are too few" in page
    charts = re.findall(r'alt="Chart: [^"]+" src="data:image/png;base64,([^"]+)"', page)
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(chart))).convert("L") for chart in charts]
    assert len(pictures) == 3 and all(p.width > 900 and np.asarray(p).std() > 5 for p in pictures), "empty charts"
    rows = list(csv.DictReader((sweep.path / "trials.csv").read_text().splitlines()))
    assert [int(row["model.latent_dim"]) for row in rows] == [16, 8, 32, 2, 64]
    config = dist_ae.load_config(sweep.path / "best.json")
    assert (config.model.latent_dim, config.optim.lr, config.run_dir) == (16, 1e-4, None)


@pytest.mark.slow
def test_the_first_line_says_how_the_answer_compares_with_pca_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune.report import write_report

    cases = ((2, 0.04, "% better than PCA"), (2, 0.9, "% WORSE than PCA"), (64, 1e-6, "is exact"))
    for number, (size, value, words) in enumerate(cases):
        sweep = sweep_with(tmp_path / str(number), [("finished", {"model.latent_dim": size}, mse(value))])
        write_report(sweep, Selection("best"))
        first = capsys.readouterr().out.splitlines()[0]
        page = (sweep.path / "report.html").read_text()
        assert words in first and first in page.replace("&#34;", '"') and "The answer beside PCA" not in page
        assert first.startswith("WARNING: ") == ("WORSE" in words)
        assert ('class="warning">WARNING: best' in page) == ("WORSE" in words)
    # A run that is there is drawn beside PCA of its size: images, and of a table r2 by column.
    from sklearn.datasets import load_wine

    rows = [",".join(map(str, row)) for row in load_wine().data]
    (tmp_path / "wine.csv").write_text("\n".join([",".join(f"c{i}" for i in range(13)), *rows]))
    own = {"data.name": f"table:{tmp_path}/wine.csv", "data.cache": str(tmp_path / "cache")}
    for preset, overrides in (("ae", {}), ("denoising", {}), ("table", own)):
        metric = load_space(preset, None).metric
        sweep = sweep_with(tmp_path / preset, [], metric, preset)
        sweep = dataclasses.replace(sweep, overrides={**overrides, "train.steps": 5, "tracking.wandb": "off"})
        sweep.write()
        others = {key: d.grid()[1] for key, d in sweep.space.parts[preset].items()}
        trial = sweep.new_trial(0, preset, {**others, "model.latent_dim": 2, "optim.lr": 1e-3})
        train_trial(sweep, trial, lambda report: None)
        write_report(sweep, Selection("best"))
        page = (sweep.path / "report.html").read_text()
        (picture,) = re.findall(r'alt="[^"]*PCA[^"]*same size." src="data:image/png;base64,([^"]+)"', page)
        drawn = PIL.Image.open(io.BytesIO(base64.b64decode(picture))).convert("L")
        assert np.asarray(drawn).std() > 5 and ("r2 of each column" in page) == (preset == "table")


def with_settings(
    folder: Path, count: int, value: Callable[[dict[str, Any], random.Random], float], seed: int = 0
) -> Sweep:
    """A sweep over a code size, a learning rate and a dropout that finished with ``value`` of them."""
    keys = {"model.latent_dim": {"choice": [2, 4, 8, 16]}, "optim.lr": {"loguniform": [1e-4, 1e-2]}}
    space = parse_space({"presets": {"dropout": {**keys, "model.dropout": {"uniform": [0.0, 0.4]}}}}, "s")
    sweep, rng = new_sweep(folder, space, {}, "val.mse", Settings()), random.Random(seed)
    for number in range(count):
        preset, values = space.sample(seed, number)
        trial = sweep.new_trial(number, preset, values)
        report = {"step": 9, "progress": 100.0, **mse(value(values, rng)), "seconds": 1}
        append_report(sweep.trial_dir(trial.id), report)
        write_json(sweep.run_dir(trial) / "result.json", {"steps": 9})
    sweep.write()
    return sweep


@pytest.mark.slow
def test_importance_tells_what_matters_from_chance_and_says_where_it_cannot(tmp_path: Path) -> None:
    def error(values: dict[str, Any], rng: random.Random) -> float:
        return float(math.exp(abs(math.log10(values["optim.lr"]) + 3) + 0.02 * rng.gauss(0, 1)))

    few = with_settings(tmp_path / "few", 6, error)
    assert importance(few, results(few)) == []
    some = with_settings(tmp_path / "some", 24, error)
    found = {each.key: each for each in importance(some, results(some))}
    assert found["optim.lr"].tells and found["optim.lr"].share > 0.3
    assert not found["model.dropout"].tells and "may be chance" in str(found["model.dropout"])
    by_chance = [
        each.tells
        for seed in range(4)
        for sweep in [with_settings(tmp_path / f"none-{seed}", 16, lambda values, rng: rng.uniform(1, 2), seed)]
        for each in importance(sweep, results(sweep))
    ]
    assert len(by_chance) == 12 and sum(by_chance) <= 1, "intervals of 95 % that hold 0 less often than they say"


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 24])
def test_a_share_and_its_interval_lie_between_0_and_1_also_where_one_setting_alone_decides(
    count: int, tmp_path: Path
) -> None:
    for seed in range(3):
        sweep = with_settings(tmp_path / str(seed), count, lambda values, rng: 1 / values["model.latent_dim"], seed)
        found = importance(sweep, results(sweep))
        assert found[0].key == "model.latent_dim" and found[0].tells
        for each in found:
            assert 0 <= each.low <= each.share <= each.high <= 1, each
            assert re.fullmatch(r"\S+ [01]\.\d\d \([01]\.\d\d to [01]\.\d\d\)(, which may be chance)?", str(each))


@pytest.mark.slow
def test_a_winner_at_the_end_of_a_range_is_said_with_the_range_to_try_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune.report import write_report

    part = {
        "model.latent_dim": {"choice": [2, 4, 8]},
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
        "model.dropout": {"uniform": [0.0, 0.4]},
        "model.hidden_dims": {"choice": [[64, 32], [128, 64], [256, 128]]},
        "train.batch_size": {"randint": [10, 110]},
        "optim.warmup_steps": {"choice": [0, 10]},
    }

    def said(**values: Any) -> dict[str, End]:
        inside = {"model.latent_dim": 4, "optim.lr": 1e-3, "model.dropout": 0.2, "model.hidden_dims": [128, 64]}
        inside |= {"train.batch_size": 60, "optim.warmup_steps": 0}
        space = parse_space({"presets": {"dropout": part}}, "s")
        sweep = new_sweep(tmp_path / str(len(list(tmp_path.iterdir()))), space, {}, "val.mse", Settings())
        trial = sweep.new_trial(0, "dropout", inside | {key.replace("__", "."): v for key, v in values.items()})
        append_report(sweep.trial_dir(trial.id), {"step": 9, "progress": 100.0, **mse(0.01), "seconds": 1})
        write_json(sweep.run_dir(trial) / "result.json", {"steps": 9})
        sweep.write()
        found = {each.key: each for each in ends(sweep, results(sweep)[0])}
        write_report(sweep, Selection("best"))
        out, page = capsys.readouterr().out.splitlines(), html.unescape((sweep.path / "report.html").read_text())
        assert all(str(each) in out and str(each) in page for each in found.values())
        for each in found.values():  # what is said to try next is a space that can be searched, and goes on from here
            check(parse_space({"presets": {"dropout": {each.key: each.next}}}, "s"), {}, 1)
        return found

    assert said() == {}
    assert said(optim__lr=9e-3)["optim.lr"].next == {"loguniform": [0.0009, 0.09]}
    assert said(optim__lr=1e-4)["optim.lr"].next == {"loguniform": [1e-5, 1e-3]}
    assert said(train__batch_size=109)["train.batch_size"].next == {"randint": [59, 159]}
    assert said(train__batch_size=11)["train.batch_size"].next == {"randint": [1, 61]}
    assert said(model__dropout=0.39)["model.dropout"].next == {"uniform": [0.19, 0.59]}
    assert said(model__dropout=0.01) == {}, "nothing is legal below 0"
    assert said(optim__warmup_steps=10) == {}, "of two values one is always the last"
    assert said(model__hidden_dims=[256, 128])["model.hidden_dims"].next == {
        "choice": [[256, 128], [512, 256], [1024, 512]]
    }
    largest = said(model__latent_dim=8)["model.latent_dim"]
    assert largest.next == {"choice": [8, 16, 32]} and largest.expected and "WARNING" not in str(largest)
    assert said(model__latent_dim=2)["model.latent_dim"].next == {"choice": [1, 2]}
    assert str(said(optim__lr=9e-3)["optim.lr"]) == (
        "WARNING: optim.lr 0.009 of the answer lies at the upper end of its searched range: a better value may lie "
        "beyond."
        ' So try "optim.lr" = {loguniform = [0.0009, 0.09]} next'
    )


@pytest.mark.slow
def test_the_page_is_whole_on_a_telephone(tmp_path: Path) -> None:
    from tune.report import write_report

    trials = [("finished", {"model.latent_dim": 2 + i}, mse(0.01 + 0.1 / (i + 1))) for i in range(12)]
    sweep = sweep_with(tmp_path, [*trials, ("failed", {"model.latent_dim": 64}, {"val.mse": math.nan})], preset="ae")
    sweep.end_trial(sweep.trials()[-1].id, "failed", "Fault: " + "x" * 200)
    write_report(sweep, Selection("best"))
    for width in (390, 1360):
        assert cut_off(sweep.path / "report.html", width, tmp_path) == (0, 0), width


@pytest.mark.parametrize("spread", [1.0001, 1.02, 1.7, 8, 1000])
def test_no_axis_of_a_chart_says_a_number_twice(spread: float, tmp_path: Path) -> None:
    from tune.report import LOOK, charts

    rates, sizes = [1e-3 * spread ** (i / 5) for i in range(6)], [2, 4, 4, 8, 8, 16]
    trials = [
        ("finished", {"model.latent_dim": size, "optim.lr": rate}, mse(0.01 * spread ** (i / 5)))
        for i, (rate, size) in enumerate(zip(rates, sizes, strict=True))
    ]
    sweep = sweep_with(tmp_path, trials)
    rows = results(sweep)
    with matplotlib.rc_context(LOOK):
        figures = [figure for _, _, figure in charts(sweep, rows, rows[0], {2: 0.05, 4: 0.02})]
    assert len(figures) == 3
    for figure in figures:
        figure.draw_without_rendering()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            labels = [tick.label1.get_text() for tick in axis.get_major_ticks() if tick.label1.get_visible()]
            at = axis.get_majorticklocs()
            seen = [text for text, place in zip(labels, at, strict=False) if low <= place <= high and text]
            assert len(seen) == len(set(seen)), seen


@pytest.mark.slow
def test_a_report_of_many_trials_and_hostile_words_stays_small_and_inert(tmp_path: Path) -> None:
    from tune.report import write_report

    trials = [("finished", {"model.latent_dim": 2 + i % 60}, mse(0.01 + 0.1 / (i + 1))) for i in range(300)]
    sweep = sweep_with(tmp_path, trials)
    for trial in sweep.trials()[:20]:
        sweep.end_trial(trial.id, "failed", "<script>alert(1)</script>" + "x" * 100_000)
        (sweep.run_dir(trial) / "result.json").unlink()
    write_report(sweep, Selection("best-under-4"))
    page = (sweep.path / "report.html").read_text()
    assert len(page) < 2_000_000 and "<script" not in page
    assert "The first 30 of 300" in page and "best-under-4" in page


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted({preset for space in SPACES.values() for preset in space["presets"]}))
def test_a_sweep_of_every_preset_ends_in_its_answer(preset: str, tmp_path: Path) -> None:
    from tune.report import write_report

    metric = load_space(preset, None).metric
    trials = [("finished", {"model.latent_dim": size}, {**mse(0.1 / size), metric: 0.1 / size}) for size in (2, 4)]
    sweep = sweep_with(tmp_path, trials, metric, preset)
    assert write_report(sweep, Selection("best"))
    assert (sweep.path / "best.json").exists() and (sweep.path / "report.html").exists()


def test_a_report_of_nothing_but_failures_is_written_and_says_so(tmp_path: Path) -> None:
    from tune.report import write_report

    sweep = sweep_with(
        tmp_path,
        [("failed", {"model.latent_dim": 4}, {"val.mse": math.nan}), ("failed", {"model.latent_dim": 4}, None)],
    )
    assert not write_report(sweep, Selection("best"))
    assert "No trial finished" in (sweep.path / "report.html").read_text()


# -- the seams of the trainer


@pytest.mark.slow
def test_a_run_starts_from_another_runs_checkpoint_with_its_weights_and_optimizer(tmp_path: Path) -> None:
    base = PRESETS["ae"].override(
        {**SMALL, "data.name": digits_file(tmp_path, 300), "train.steps": 20, "train.eval_every": 5, "train.keep": 9}
    )
    dist_ae.train(base.override({"run_dir": tmp_path / "donor"}))
    start = tmp_path / "donor/checkpoints/00000010"
    reports: list[dist_ae.Report] = []
    same = dist_ae.train(base.override({"run_dir": tmp_path / "same"}), report=reports.append, start_from=start)
    assert [report.step for report in reports] == [10, 15, 20]
    assert same.weights_sha256 == json.loads((tmp_path / "donor/result.json").read_text())["weights_sha256"]
    other = dist_ae.train(base.override({"run_dir": tmp_path / "other", "optim.lr": 1e-2}), start_from=start)
    assert other.weights_sha256 != same.weights_sha256
    with pytest.raises(InputError, match="expected"):
        dist_ae.train(base.override({"run_dir": tmp_path / "larger", "model.latent_dim": 9}), start_from=start)


@pytest.mark.slow
def test_the_linear_probe_is_a_linear_classifier_of_the_codes(tmp_path: Path) -> None:
    from sklearn.linear_model import RidgeClassifier

    from dist_ae.sweeping import probe_accuracy

    result = dist_ae.train(PRESETS["ae"].override({**SMALL, "train.epochs": 5, "run_dir": tmp_path / "run"}))
    dataset, model = sources.load(DataConfig(name="digits")), dist_ae.load(result.run_dir)
    codes = [model.embed(split.images).double().numpy() for split in (dataset.train, dataset.val)]
    scale = codes[0].std(0)
    expected = (
        RidgeClassifier(alpha=1.0)
        .fit(codes[0] / scale, dataset.train.labels)
        .score(codes[1] / scale, dataset.val.labels)
    )
    found = probe_accuracy(result.run_dir)
    assert found == pytest.approx(expected, abs=0.011)
    assert found > 0.5


@pytest.mark.slow
def test_optuna_goes_on_from_what_the_folder_knows(tmp_path: Path) -> None:
    schedule = pytest.importorskip("tune.schedule")
    optuna = pytest.importorskip("optuna")
    space = parse_space(
        {"presets": {"ae": {"model.latent_dim": {"choice": [4, 8]}, "optim.lr": {"loguniform": [1e-4, 1e-1]}}}}, "s"
    )
    sweep = new_sweep(tmp_path / "s", space, {}, "val.mse", Settings(search="optuna", num_trials=40))
    for number in range(30):
        preset, values = schedule.Optimizer(sweep).ask()  # each time as after a restart
        trial = sweep.new_trial(number, preset, values)
        error = (math.log10(values["optim.lr"]) + 2.5) ** 2 + (values["model.latent_dim"] == 4)
        if number == 3:
            sweep.end_trial(trial.id, "failed", "NonFinite")
            continue
        append_report(sweep.trial_dir(trial.id), {"step": 1, "progress": 100.0, "val.mse": error, "seconds": 0})
        write_json(sweep.run_dir(trial) / "result.json", {"steps": 1})
    known = schedule.Optimizer(sweep)._study.trials
    assert sum(t.state == optuna.trial.TrialState.FAIL for t in known) == 1 and len(known) == 30
    late = [t.values for t in sweep.trials()[20:]]
    assert sum(v["model.latent_dim"] == 8 for v in late) >= 8
    assert np.median([abs(math.log10(v["optim.lr"]) + 2.5) for v in late]) < 0.4  # uniform sampling: 0.75


def test_ray_gets_a_short_folder_where_the_usual_one_is_too_long_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune.sweep import LONGEST_FOLDER, short_folder

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert short_folder() is None
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 60)))
    found = short_folder()
    assert found is not None and len(found) <= LONGEST_FOLDER
    socket_path = f"{found}/session_2026-11-28_14-51-29_123456_1234567/sockets/plasma_store"
    assert len(socket_path) <= 107
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="RAY_TMPDIR"):
        short_folder()
