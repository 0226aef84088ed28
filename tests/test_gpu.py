"""What needs CUDA: `make test-gpu`, the most telling first. On other machines one line says that all of it is skipped.

With `python -m benchmarks.gpu` it is meant to take less than eight minutes of one H100. It has not run on one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, metrics, relative_difference, run, weights

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: make test-gpu is for machines that have one", allow_module_level=True)

import dist_ae  # noqa: E402
from dist_ae.data import reader  # noqa: E402
from dist_ae.draws import Step, mask, normal  # noqa: E402
from dist_ae.presets import PRESETS  # noqa: E402

GPU, CPU = torch.device("cuda"), torch.device("cpu")
KINDS = ("ae", "denoising", "dropout", "vae", "conv", "conv-vae")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")


def trained(preset: str, run_dir: Path, **more: Any) -> dist_ae.Result:
    settings = {**SMALL, "train.steps": 30, "precision": "fp32", "run_dir": str(run_dir), **more}
    return dist_ae.train(PRESETS[preset].override(settings))


@pytest.mark.parametrize("width", [1, 16, 20, 784, 12288])
def test_draws_are_those_of_the_cpu_to_the_bit(width: int) -> None:
    for rows in (range(3), range(100, 163), range(2**20, 2**20 + 5)):
        for step in (0, 7, 2**33):
            a, b = (normal(2**62, "noise", Step(step), rows, (width,), device, std=0.3) for device in (CPU, GPU))
            assert torch.equal(a, b.cpu())
            a, b = (mask(1, "mask.0", Step(step), rows, (width,), device, keep=0.9) for device in (CPU, GPU))
            assert torch.equal(a, b.cpu())


# With `on`, a step that cannot be captured ends the run: these never compare an eager run with itself.
GRAPHED: list[tuple[str, dict[str, Any]]] = [
    *((preset, {}) for preset in KINDS),
    ("conv-vae", {"precision": "bf16"}),
    ("vae", {"optim.clip_norm": 1.0, "train.ema_decay": 0.9}),
    ("vae", {"optim.name": "muon"}),
    ("vae", {"optim.name": "sgd"}),
    ("vae", {"precision": "fp16"}),
    ("ae", {"objective.likelihood": "discretized", "model.start": "random"}),
]


@pytest.mark.parametrize(("preset", "more"), GRAPHED, ids=str)
def test_a_run_of_graphs_is_the_eager_run_to_the_bit(preset: str, more: dict[str, Any], tmp_path: Path) -> None:
    hashes = {
        graph: trained(preset, tmp_path / graph, **{"train.cuda_graph": graph, **more}).weights_sha256
        for graph in ("on", "off")
    }
    assert hashes["on"] == hashes["off"]


@pytest.mark.parametrize("preset", KINDS)
def test_a_float64_run_on_the_gpu_is_the_cpus(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"precision": "fp64", "model.start": "random"}
    trained(preset, tmp_path / "gpu", **settings)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trained(preset, tmp_path / "cpu", **settings)
    losses = [[line["loss"] for line in metrics(tmp_path / where)] for where in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert relative_difference(weights(tmp_path / "gpu"), weights(tmp_path / "cpu")) < 1e-7


def test_fp16_whose_gradients_are_never_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(dist_ae.NonFinite, match="--precision bf16"):
        trained("ae", tmp_path / "run", precision="fp16", **{"train.steps": 200, "objective.sigma": 1e-30})


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_every_precision_of_a_gpu_trains(precision: str, tmp_path: Path) -> None:
    result = trained("vae", tmp_path / "run", precision=precision, **{"train.steps": 200})
    losses = [line["loss"] for line in metrics(result.run_dir)]
    assert losses[-1] < losses[0] and all(map(np.isfinite, losses))


def test_a_data_set_that_does_not_fit_on_the_device_trains_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = trained("ae", tmp_path / "device", **{"train.cuda_graph": "off"}).weights_sha256
    monkeypatch.setattr(reader, "SHARE_OF_MEMORY", 0)
    assert trained("ae", tmp_path / "host").weights_sha256 == on_device


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two processes on one GPU")
def test_two_processes_on_two_gpus_train_as_one(tmp_path: Path) -> None:
    settings = ["--precision", "fp64", "--model.start", "random", "--train.steps", "20", "--tracking.wandb", "off"]
    for world in (1, 2):
        command = ("-m", "dist_ae", "train", "vae", *settings, "--run-dir", str(tmp_path / str(world)))
        found = run(world, *command, ACCELERATE_USE_CPU="false")
        assert all(status == 0 for status, _, _ in found), found
    assert json.loads((tmp_path / "2" / "result.json").read_text())["world_size"] == 2
    assert relative_difference(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-9
