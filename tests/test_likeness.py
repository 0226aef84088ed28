"""Terms beside the likelihood: MS-SSIM, and the distance of a network's features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, forked, metrics, relative_difference, weights
from torch import nn
from torch.nn import functional as F

import dist_ae
from dist_ae.config import Config, InputError, ObjectiveConfig
from dist_ae.likeness import Likeness, distance, ms_ssim

G = torch.Generator().manual_seed(0)


class Features(nn.Module):
    """Two layers of a small network, as published feature networks give theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = F.relu(self.first(images))
        return first, F.relu(self.second(first))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "network.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.jit.script(Features()).save(str(path))  # type: ignore[no-untyped-call]
    return path


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(*shape, generator=G)
    return images, (images + 0.1 * torch.randn(*shape, generator=G)).clamp(0, 1)


def test_ms_ssim_is_torchmetrics_at_five_scales_and_one_of_equal_images_of_any_size() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    images, others = pair(3, 3, 176, 200)
    expected = multiscale_structural_similarity_index_measure(others, images, data_range=1.0, reduction="none")
    torch.testing.assert_close(ms_ssim(images, others), expected, rtol=1e-5, atol=0)
    for size in (11, 28, 64):
        images, others = pair(2, 1, size, size + 3)
        torch.testing.assert_close(ms_ssim(images, images), torch.ones(2))
        assert (ms_ssim(images, others) < 1).all()


def test_ms_ssim_of_opposites_has_a_finite_gradient() -> None:
    images = torch.rand(2, 1, 32, 32, generator=G)
    opposite = (1 - images).requires_grad_()
    (1 - ms_ssim(images, opposite)).sum().backward()
    assert opposite.grad is not None and opposite.grad.isfinite().all()


def test_the_distance_is_that_of_unit_features_layer_by_layer(network: Path) -> None:
    images, others = pair(3, 1, 12, 12)
    expected = torch.zeros(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = Features()
    with torch.no_grad():
        for a, b in zip(features(images.expand(-1, 3, -1, -1)), features(others.expand(-1, 3, -1, -1)), strict=True):
            for row in range(3):
                places = []
                for y in range(a.shape[2]):
                    for x in range(a.shape[3]):
                        one, two = a[row, :, y, x], b[row, :, y, x]
                        gap = one / one.norm().clamp(min=1e-10) - two / two.norm().clamp(min=1e-10)
                        places.append(float(gap.square().sum()))
                expected[row] += sum(places) / len(places)
    torch.testing.assert_close(distance(torch.jit.load(network), images, others), expected)  # type: ignore[no-untyped-call]
    likeness = Likeness(ObjectiveConfig(ms_ssim=3, perceptual=network, perceptual_weight=2), torch.device("cpu"))
    torch.testing.assert_close(likeness(images, others), 3 * (1 - ms_ssim(images, others)) + 2 * expected)


def test_on_a_device_ms_ssim_does_not_make_the_host_wait(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        import pydevice

        images, others = pair(2, 3, 24, 24)
        likeness = Likeness(ObjectiveConfig(ms_ssim=3), torch.device("cpu"))
        usual = likeness(images, others)
        with pydevice.computing():
            there = [each.to(pydevice.GPU) for each in (images, others)]
            before = len(pydevice.reads), len(pydevice.copies)
            found = likeness(*there)
            assert (len(pydevice.reads), len(pydevice.copies)) == before
            assert torch.equal(found.cpu(), usual)

    assert forked(1, work, tmp_path / "log") == [0], (tmp_path / "log-0.log").read_text()


def experiment(run_dir: Path, network: Path, **overrides: Any) -> Config:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16)).astype(np.uint8)
    np.save(run_dir.parent / "images.npy", images)
    small = {
        **SMALL, "data.name": f"array:{run_dir.parent}/images.npy", "model.widths": (8, 16), "model.latent_dim": 4,
        "train.batch_size": 6, "train.steps": 4, "train.save_every": 2, "train.eval_every": 4, "precision": "fp64",
        "tracking.pictures": False, "objective.likelihood": "charbonnier", "objective.ms_ssim": 300.0,
        "objective.perceptual": network, "objective.perceptual_weight": 100.0, "run_dir": run_dir, **overrides,
    }  # fmt: skip
    return dist_ae.PRESETS["conv"].override(small)


@pytest.mark.slow
def test_a_run_with_both_is_the_same_on_one_and_three_processes_and_after_a_resume(
    network: Path, tmp_path: Path
) -> None:
    def trains(name: str, *ends: int) -> Callable[[int], object]:
        def work(rank: int) -> None:
            for end in ends:
                more = {"optim.schedule": "constant", "train.steps": end}
                dist_ae.train(experiment(tmp_path / name, network, **more))

        return work

    for name, world, ends in (("one", 1, (4,)), ("three", 3, (4,)), ("resumed", 1, (2, 4))):
        assert forked(world, trains(name, *ends), tmp_path / f"log-{name}") == [0] * world
    # The network computes in float32, so pieces of a batch differ by its rounding.
    assert relative_difference(weights(tmp_path / "one"), weights(tmp_path / "three")) < 1e-6
    assert relative_difference(weights(tmp_path / "one"), weights(tmp_path / "resumed")) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "one")]
    distortions = [line["distortion"] for line in metrics(tmp_path / "one")]
    assert all(loss > distortion + 1 for loss, distortion in zip(losses, distortions, strict=True))


def test_what_these_terms_cannot_be_is_one_sentence(network: Path, tmp_path: Path) -> None:
    digits: dict[str, Any] = {**SMALL, "train.steps": 2, "tracking.pictures": False}
    wrong = tmp_path / "text.pt"
    wrong.write_text("no program")
    flat = tmp_path / "flat.pt"
    torch.jit.script(nn.Linear(7, 2)).save(str(flat))  # type: ignore[no-untyped-call]
    for overrides, said in (
        ({"objective.ms_ssim": 1.0}, "at least 11 pixels"),
        ({"objective.perceptual": wrong}, "not a program of torch"),
        ({"objective.perceptual": flat}, "gives no features of images"),
        ({"objective.perceptual": tmp_path / "none.pt"}, "No such file"),
        ({"objective.likelihood": "charbonnier", "objective.sigma": "learned"}, "use laplace"),
    ):
        with pytest.raises(InputError, match=said):
            dist_ae.train(dist_ae.PRESETS["ae"].override({**digits, **overrides, "run_dir": tmp_path / "run"}))
        assert not (tmp_path / "run").exists()
    # Another network in the same file is another experiment.
    run = {**digits, "objective.perceptual": tmp_path / "kept.pt", "run_dir": tmp_path / "kept"}
    (tmp_path / "kept.pt").write_bytes(network.read_bytes())
    dist_ae.train(dist_ae.PRESETS["ae"].override(run))
    torch.jit.script(Features()).save(str(tmp_path / "kept.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match="perceptual_sha256"):
        dist_ae.train(dist_ae.PRESETS["ae"].override({**run, "train.steps": 3}))
