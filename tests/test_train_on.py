"""Training on from a run: its weights in another run, more epochs, an end when nothing gets better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, metrics, run, train_jobs, weights

import dist_ae
from dist_ae.config import InputError
from dist_ae.presets import PRESETS

pytestmark = pytest.mark.slow

DECAYING = {**SMALL, "optim.schedule": "linear", "train.steps": 32}


def trained(run_dir: Path, preset: str = "ae", **values: Any) -> dist_ae.Result:
    changes = {key.replace("__", "."): value for key, value in values.items()}
    return dist_ae.train(PRESETS[preset].override({**DECAYING, **changes, "run_dir": str(run_dir)}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("source") / "run"
    trained(run_dir)
    return run_dir


def test_a_run_begins_with_the_weights_of_another_on_any_number_of_processes_and_resumes_without_it(
    source: Path, tmp_path: Path
) -> None:
    # A rate of next to nothing leaves the weights as they came.
    values = {**DECAYING, "init_from": str(source), "objective.noise_std": 0.2, "optim.lr": 1e-30, "train.steps": 1}
    for world in (1, 2):
        train_jobs(
            world, [{"preset": "denoising", "overrides": {**values, "run_dir": f"{tmp_path / str(world)}"}}], tmp_path
        )
        found, wanted = weights(tmp_path / str(world)), weights(source)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    moved = source.rename(source.with_name("elsewhere"))
    try:
        longer = PRESETS["denoising"].override(
            {**values, "optim.schedule": "constant", "run_dir": str(tmp_path / "new"), "train.steps": 2}
        )
        with pytest.raises(InputError, match="not a run directory"):
            dist_ae.train(longer)
        again = PRESETS["denoising"].override({**values, "run_dir": str(tmp_path / "1")})
        (tmp_path / "1" / "result.json").unlink()
        assert dist_ae.train(again).steps == 1
    finally:
        moved.rename(source)


def test_weights_of_another_likelihood_fit_and_those_of_another_shape_are_refused_by_name(
    source: Path, tmp_path: Path
) -> None:
    bernoulli = trained(tmp_path / "bernoulli", init_from=source, objective__likelihood="bernoulli")
    assert bernoulli.steps == 32
    learned = trained(tmp_path / "learned", init_from=source, objective__sigma="learned")
    assert "val.mse" in learned.metrics
    status, _, error = run(
        1, "-m", "dist_ae", "train", "ae", "--init-from", str(source), "--run-dir", str(tmp_path / "other"),
        "--model.latent-dim", "9", "--model.hidden-dims", "32", "16", "--tracking.wandb", "off",
    )[0]  # fmt: skip
    assert status == 2 and "Traceback" not in error
    assert "to_code.weight is [9, 16] here, [8, 16] there" in error, error
    assert not (tmp_path / "other").exists()


def test_an_exported_folder_serves_as_a_start(source: Path, tmp_path: Path) -> None:
    from dist_ae.use.commands import export_run

    folder, *_ = export_run(source, tmp_path / "out", format="safetensors")
    trained(tmp_path / "run", init_from=folder, optim__lr=1e-30, train__steps=1)
    best, found = dist_ae.load(source).model.state_dict(), weights(tmp_path / "run")
    assert all(torch.equal(found[name], best[name]) for name in best)


def test_a_decaying_run_is_extended_only_on_request_and_says_what_changes(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    with pytest.raises(InputError, match="total_steps: 32 there, 64 now"):
        trained(tmp_path / "run", train__steps=64)
    command = ["train", "ae", "--train.steps", "64", "--extend", "--run-dir", str(tmp_path / "run")]
    settings = [
        "--model.latent-dim", "8", "--model.hidden-dims", "32", "16", "--train.batch-size", "96",
        "--tracking.wandb", "off",
    ]  # fmt: skip
    ((status, out, error),) = run(1, "-m", "dist_ae", *command, *settings)
    assert status == 0, error
    assert "extended from 32 to 64 steps: at step 32 the learning rate goes from 0% to 50% of its peak" in out
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 64
    assert len({line["step"] for line in metrics(tmp_path / "run")}) == len(metrics(tmp_path / "run"))
    # From then on it is a run of 64 steps: the same command without --extend finds it finished.
    assert trained(tmp_path / "run", train__steps=64, train__log_every=50).steps == 64
    with pytest.raises(InputError, match="has 64 steps, more than the 32 asked for"):
        trained(tmp_path / "run", extend=True)
    with pytest.raises(InputError, match="holds no run to resume"):
        trained(tmp_path / "none", extend=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_training_ends_when_patience_runs_out_at_the_same_step_on_any_number_of_processes(
    world: int, tmp_path: Path
) -> None:
    values = {
        **SMALL, "train.steps": 400, "train.eval_every": 5, "train.patience": 3, "optim.lr": 0.5,
        "optim.schedule": "constant", "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    train_jobs(world, [{"preset": "ae", "overrides": values}], tmp_path)
    result = json.loads((tmp_path / "run/result.json").read_text())
    found = {line["step"]: line["mse"] for line in metrics(tmp_path / "run", "val")}
    best = min(found, key=found.__getitem__)
    assert result["best_step"] == best and result["steps"] == max(found) == best + 15 < 400
    # Again: finished. With more patience it goes on, as if it had had it from the start.
    config = PRESETS["ae"].override(values)
    assert dist_ae.train(config).steps == result["steps"]
    assert dist_ae.train(config.override({"train.patience": 6})).steps > result["steps"]


def test_the_end_of_a_run_says_which_weights_are_used_and_shows_the_error_on_training_images(tmp_path: Path) -> None:
    ((status, out, error),) = run(
        1, "-m", "dist_ae", "train", "ae", "--run-dir", str(tmp_path / "run"), "--train.steps", "40",
        "--train.eval-every", "1", "--train.patience", "2", "--optim.lr", "0.2", "--optim.schedule", "constant",
        "--model.hidden-dims", "64", "--precision", "fp32", "--tracking.wandb", "off",
    )  # fmt: skip
    assert status == 0, error
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert f"was at step {result['best_step']}, and the weights of that step are used" in out
    assert f"no better evaluation since step {result['best_step']}: ended at {result['steps']} of 40" in out
    best = next(line for line in metrics(tmp_path / "run", "val") if line["step"] == result["best_step"])
    model = dist_ae.load(tmp_path / "run")
    from dist_ae.data import sources

    dataset = sources.load(PRESETS["ae"].data)
    assert float(model.score(dataset.val.images).mean()) == pytest.approx(best["mse"], rel=1e-5)
    few = dataset.train.images[torch.linspace(0, 1499, len(dataset.val), dtype=torch.float64).long().numpy()]
    assert float(model.score(few).mean()) == pytest.approx(best["train_mse"], rel=1e-5)
