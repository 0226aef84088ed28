"""The same experiment gives the same training run on one process or many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL, digits_file, metrics, relative_difference, train_jobs, weights

pytestmark = pytest.mark.slow

# Processes and accumulation steps. 3 and 5 do not divide the batch of 96: their shares differ by one image.
LAYOUTS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (5, 1))
PRESETS = ("ae", "denoising", "dropout", "vae")


def job(preset: str, run_dir: Path, **overrides: object) -> dict[str, object]:
    # 1,003 training images in batches of 96 leave 43 for the last batch of an epoch: the shares of it differ in size,
    # and no block of draws is whole.
    data = digits_file(run_dir.parent, 1115)
    return {
        "preset": preset,
        "overrides": {
            **SMALL,
            "data.name": data,
            "precision": "fp64",
            "train.steps": 50,
            "train.eval_every": 25,
            "run_dir": str(run_dir),
            **overrides,
        },
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every preset on 1, 2 and 4 processes and with 1, 2 and 4 accumulation steps, in float64; without accumulation
    in fp32, too.
    """
    root = tmp_path_factory.mktemp("runs")
    for world in (1, 2, 3, 4, 5):
        jobs = []
        for preset in PRESETS:
            for parts in (parts for w, parts in LAYOUTS if w == world):
                jobs.append(
                    job(
                        preset,
                        root / f"{preset}-{world}-{parts}",
                        **{"train.max_per_process": -(-96 // world // parts)},
                    )
                )
            if world in (1, 2, 4):
                jobs.append(job(preset, root / f"{preset}-{world}-fp32", precision="fp32"))
        jobs.append(
            job("vae", root / f"muon-{world}", **{"optim.name": "muon", "optim.lr": 0.02, "optim.weight_decay": 0.1})
        )
        if world > 1:
            jobs.append(
                {**job("ae", root / f"ae-{world}-through-gloo", precision="fp32"), "mutation": "no shared memory"}
            )
        if world == 2:
            jobs.append(job("ae", root / "ae-2-bf16-gradients", precision="fp32", **{"train.gradient_type": "bf16"}))
        train_jobs(world, jobs, root)
    return root


@pytest.mark.parametrize("preset", PRESETS)
def test_float64_weights_agree_on_any_number_of_processes_and_accumulation_steps(runs: Path, preset: str) -> None:
    reference = weights(runs / f"{preset}-1-1")
    differences = {
        layout: relative_difference(weights(runs / f"{preset}-{layout[0]}-{layout[1]}"), reference)
        for layout in LAYOUTS
    }
    # PCA is a stationary point of the linear model: from there some gradients are rounding and nothing else, which Adam
    # scales up. Where a share has so few images that its products are summed in another order, weights show it.
    limit = {layout: 1e-6 if layout[0] == 5 and preset != "vae" else 1e-10 for layout in LAYOUTS}
    assert all(difference < limit[layout] for layout, difference in differences.items()), differences
    losses = [[line["loss"] for line in metrics(runs / f"{preset}-{world}-{parts}")] for world, parts in LAYOUTS]
    assert all(loss == pytest.approx(losses[0], rel=1e-10) for loss in losses)


def test_float64_weights_agree_with_muon_too(runs: Path) -> None:
    differences = [relative_difference(weights(runs / f"muon-{world}"), weights(runs / "muon-1")) for world in (2, 4)]
    assert max(differences) < 1e-10, differences


@pytest.mark.parametrize("preset", PRESETS)
def test_fp32_loss_curves_agree_on_any_number_of_processes(runs: Path, preset: str) -> None:
    curves = [[line["loss"] for line in metrics(runs / f"{preset}-{world}-fp32")] for world in (1, 2, 4)]
    assert len(curves[0]) == 50
    scale = max(map(abs, curves[0]))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4, abs=1e-4 * scale)


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_is_the_same_on_any_number_of_processes(runs: Path, preset: str) -> None:
    results = [json.loads((runs / f"{preset}-{world}-1" / "result.json").read_text()) for world in (1, 2, 4)]
    assert [result["world_size"] for result in results] == [1, 2, 4]
    for result in results[1:]:
        assert result["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-9)


def test_gradients_through_shared_memory_are_those_through_gloo(runs: Path) -> None:
    assert (
        relative_difference(weights(runs / "ae-2-through-gloo"), weights(runs / "ae-2-fp32")) == 0
    )  # of two, every order of adding is the same
    assert (
        0 < relative_difference(weights(runs / "ae-4-through-gloo"), weights(runs / "ae-4-fp32")) < 1e-3
    )  # of four, it is not
    assert not list(Path("/dev/shm").glob("dist_ae-*"))


def test_bf16_gradients_change_the_run_by_their_rounding_and_no_more(runs: Path) -> None:
    exact, rounded = weights(runs / "ae-2-fp32"), weights(runs / "ae-2-bf16-gradients")
    assert 1e-5 < relative_difference(rounded, exact) < 0.1
    curves = [[line["loss"] for line in metrics(runs / name)] for name in ("ae-2-fp32", "ae-2-bf16-gradients")]
    assert curves[1] == pytest.approx(curves[0], abs=5e-3 * max(map(abs, curves[0])))


def test_no_step_touches_torchs_global_generators(runs: Path) -> None:
    assert not list(runs.rglob("global_generator_touched"))


# Errors put in on purpose: what the tests above would say if the trainer made them.
MUTATIONS = {
    "same noise on every process": "denoising",
    "averages per process": "ae",
    "drops what does not divide": "ae",
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutants")
    train_jobs(4, [{**job(preset, root / name), "mutation": name} for name, preset in MUTATIONS.items()], root)
    train_jobs(1, [job(preset, root / f"sound {preset}") for preset in ("ae", "denoising")], root)
    return root


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_the_trainer_is_noticed(mutants: Path, mutation: str) -> None:
    sound = weights(mutants / f"sound {MUTATIONS[mutation]}")
    assert relative_difference(weights(mutants / mutation), sound) > 1e-6


def test_a_draw_from_the_global_generator_is_noticed(tmp_path: Path) -> None:
    mutated = {**job("ae", tmp_path / "run", **{"train.steps": 2}), "mutation": "draws from torch's global generator"}
    train_jobs(1, [mutated], tmp_path)
    assert (tmp_path / "run" / "global_generator_touched").exists()
