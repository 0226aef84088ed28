"""The convolutional model: it starts as the best linear patch code, and all that holds for the others holds for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, digits_file, metrics, relative_difference, train_jobs, weights
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA

import dist_ae
from dist_ae import pca as components_of
from dist_ae.config import Config, InputError
from dist_ae.data.reader import Reader
from dist_ae.data.records import Split
from dist_ae.draws import Step, draw
from dist_ae.models import Autoencoder, Conv, build
from dist_ae.presets import PRESETS
from dist_ae.processes.runtime import Runtime

CPU = torch.device("cpu")
SYSTEMS = ("conv", "conv-denoising", "conv-dropout", "conv-vae")
TINY: dict[str, Any] = {**SMALL, "model.widths": (6, 8), "model.latent_dim": 3}
EVERYTHING = PRESETS["conv-vae"].override({**TINY, "objective.noise_std": 0.2, "model.dropout": 0.3})


def photographs(channels: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """Pieces of scikit-learn's two photographs, uint8 [N, C, H, W]."""
    pictures = np.stack(load_sample_images().images)[:, : 427 // height * height, : 640 // width * width]
    pieces = pictures.reshape(2, 427 // height, height, 640 // width, width, 3).transpose(0, 1, 3, 5, 2, 4)
    pieces = pieces.reshape(-1, 3, height, width)[::5]
    return np.ascontiguousarray(pieces if channels == 3 else pieces[:, :1])


def vectors(images: np.ndarray[Any, Any], side: int | None) -> np.ndarray[Any, Any]:
    """Images, or their patches with the edge repeated, as rows on [0, 1]: what PCA is given."""
    scaled = images / 255
    if side is None:
        return scaled.reshape(len(images), -1)
    _, channels, height, width = images.shape
    padded = np.pad(scaled, ((0, 0), (0, 0), (0, -height % side), (0, -width % side)), mode="edge")
    rows, columns = padded.shape[2] // side, padded.shape[3] // side
    cut = padded.reshape(len(images), channels, rows, side, columns, side).transpose(0, 2, 4, 1, 3, 5)
    return cut.reshape(-1, channels * side * side)


def started(config: Config, images: np.ndarray[Any, Any]) -> Autoencoder:
    """The model before its first step, as a run begins with it."""
    runtime = Runtime(config)
    model = build(config, images.shape[1:]).to(runtime.dtype)
    components = components_of.of_model(model, Reader(Split(images), CPU, runtime.dtype), runtime)
    assert components is not None
    model.start_from(components, config.objective)
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("code", ["grid", "vector"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (3, 13, 10), (1, 7, 9), (1, 3, 2)])
def test_before_the_first_step_it_reconstructs_as_scikit_learns_pca(
    shape: tuple[int, int, int], code: str, precision: str
) -> None:
    images = photographs(*shape)
    config = PRESETS["conv"].override({**TINY, "model.code": code, "precision": precision})
    side = 4 if code == "grid" else None
    rows = vectors(images, side)
    pca = PCA(3, svd_solver="full").fit(rows)
    expected = pca.inverse_transform(pca.transform(rows))
    model = started(config, images)
    given = torch.from_numpy(images / 255).to(torch.float64 if precision == "fp64" else torch.float32)
    found = model(given).reconstruction.detach()
    assert found.shape == given.shape
    if side is not None:  # the model's picture is cropped, so the patches are, too
        patches = torch.from_numpy(expected * 2 - 1)
        padded = (len(images), *shape)
        expected = (components_of.unpatched(patches, torch.Size(padded), (side, side)).numpy() + 1) / 2
    np.testing.assert_allclose(
        found.numpy().reshape(expected.shape), expected, atol=1e-9 if precision == "fp64" else 1e-5
    )
    codes = model.encode(given)[0].detach()
    assert codes.shape[1:] == model.code_shape
    np.testing.assert_allclose(codes.transpose(0, 1).flatten(1).var(1, correction=0), np.ones(3), rtol=1e-3)


@pytest.mark.parametrize("code", ["grid", "vector"])
@pytest.mark.parametrize("sigma", [0.1, "learned"])
def test_a_vae_starts_as_probabilistic_pca(sigma: float | str, code: str) -> None:
    images = photographs(3, 8, 12)
    config = PRESETS["conv-vae"].override(
        {**TINY, "model.code": code, "objective.sigma": sigma, "precision": "fp64", "model.latent_dim": 2}
    )
    rows = vectors(images, 4 if code == "grid" else None)
    size = rows.shape[1]
    pca = PCA(2, svd_solver="full").fit(rows)
    values = pca.explained_variance_ * (len(rows) - 1) / len(rows)
    variance = sigma**2 if isinstance(sigma, float) else (rows.var(0).sum() - values.sum()) / (size - 2)
    scale = np.sqrt(values - variance)
    model = started(config, images)
    output = model(torch.from_numpy(images / 255))
    assert output.logvar is not None
    mean = (rows - pca.mean_) @ pca.components_.T * scale / values

    def per_patch(code: torch.Tensor) -> torch.Tensor:
        return code.detach().view(len(images), 2, -1).transpose(1, 2).reshape(-1, 2)

    np.testing.assert_allclose(per_patch(output.mean).abs(), np.abs(mean), atol=1e-9)  # a component's sign is open
    logvar = np.broadcast_to(np.log(variance / values), mean.shape)
    np.testing.assert_allclose(per_patch(output.logvar), logvar, atol=1e-9)
    np.testing.assert_allclose(
        vectors(output.reconstruction.detach().numpy() * 255, 4 if code == "grid" else None),
        mean * scale @ pca.components_ + pca.mean_,
        atol=1e-9,
    )
    if model.log_sigma is not None:
        assert float(model.log_sigma.detach().exp()) == pytest.approx(np.sqrt(variance))


@pytest.mark.parametrize("overrides", [{}, {"model.code": "vector"}, {"model.widths": (5, 7, 20), "model.blocks": 2}])
def test_a_batch_gives_each_image_what_it_gets_alone(overrides: dict[str, Any]) -> None:
    model = trained_looking(build(EVERYTHING.override(overrides), (3, 13, 10)).double())
    images = torch.rand(6, 3, 13, 10, dtype=torch.float64)
    together = model(images).reconstruction
    alone = torch.cat([model(image[None]).reconstruction for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert model(images[:0]).reconstruction.shape == (0, 3, 13, 10)


def trained_looking(model: Autoencoder) -> Autoencoder:
    """Random weights in the layers that start at zero, too, so that every layer matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in model.zeros:
            layer = model.get_submodule(name)
            layer.weight.normal_(0, 0.1, generator=generator)  # type: ignore[operator]
    return model


def test_forward_is_a_pure_function_of_images_and_draws_and_masks_drop_whole_channels() -> None:
    model = trained_looking(build(EVERYTHING, (1, 8, 8)))
    assert isinstance(model, Conv) and model.mask_shapes == ((6, 1, 1), (8, 1, 1), (8, 1, 1), (6, 1, 1))
    assert model.encoder_masks == 2
    images = torch.rand(8, 1, 8, 8)
    draws = draw(model.draw_shapes(), Step(0), range(8), CPU, seed=0, std=0.2, keep=0.7)
    before = torch.get_rng_state()
    first, again, plain = model(images, draws), model(images, draws), model(images)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.raw, again.raw) and not torch.equal(first.raw, plain.raw)
    for number in range(4):  # every mask has a say
        masks = list(draws.masks)
        masks[number] = torch.ones_like(masks[number])
        assert not torch.equal(model(images, draws._replace(masks=tuple(masks))).raw, first.raw)


def test_half_precisions_stay_close_to_fp32() -> None:
    images = photographs(3, 13, 10)
    model = trained_looking(started(PRESETS["conv"].override(TINY), images))
    given = torch.from_numpy(images / 255).float()
    exact = model(given).reconstruction
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            half = model(given).reconstruction
        assert float((half.float() - exact).detach().square().mean()) < 1e-4


# ------------------------------------------------------------------------------------------- one process or many

LAYOUTS = ((1, 1), (1, 3), (2, 1), (4, 1))
JOBS = (*SYSTEMS, "muon", "vector")


def job(name: str, run_dir: Path, **overrides: object) -> dict[str, object]:
    more = {
        "muon": {"optim.name": "muon", "optim.lr": 0.02, "optim.weight_decay": 0.1},
        "vector": {"model.code": "vector", "train.ema_decay": 0.9},
    }.get(name, {})
    settings = {**TINY, "data.name": digits_file(run_dir.parent, 500), "precision": "fp64", "train.steps": 6}
    overrides = {**settings, **more, "run_dir": str(run_dir), **overrides}
    return {"preset": name if name in PRESETS else "conv", "overrides": overrides}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four systems, Muon and a vector code with a moving average, on 1, 2 and 4 processes, in float64."""
    root = tmp_path_factory.mktemp("runs")
    for world in (1, 2, 4):
        layouts = [parts for w, parts in LAYOUTS if w == world]
        jobs = [
            job(name, root / f"{name}-{world}-{parts}", **{"train.max_per_process": -(-96 // world // parts)})
            for name in JOBS
            for parts in layouts
        ]
        train_jobs(world, jobs, root)
    return root


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.slow
def test_float64_weights_agree_on_any_number_of_processes_and_accumulation_steps(runs: Path, name: str) -> None:
    reference = weights(runs / f"{name}-1-1")
    losses = [[line["loss"] for line in metrics(runs / f"{name}-{world}-{parts}")] for world, parts in LAYOUTS]
    assert all(loss == pytest.approx(losses[0], rel=1e-9) for loss in losses)
    found = {
        (world, parts): relative_difference(weights(runs / f"{name}-{world}-{parts}"), reference)
        for world, parts in LAYOUTS
    }
    assert max(found.values()) < 1e-9, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv-vae", "vector"])
def test_a_resumed_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    def config(folder: str, steps: int) -> Config:
        described = job(name, tmp_path / folder, precision="bf16", **{"optim.schedule": "constant"})
        overrides = {**described["overrides"], "train.steps": steps}  # type: ignore[dict-item]
        return PRESETS[str(described["preset"])].override(overrides)

    whole = dist_ae.train(config("whole", 9))
    dist_ae.train(config("parts", 5))
    assert dist_ae.train(config("parts", 9)).weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("preset", SYSTEMS)
def test_two_steps_dispatch_the_same_operations_with_the_same_arguments(preset: str) -> None:
    from test_step import learner, operations

    changing = {"optim.warmup_steps": 10, "optim.schedule": "cosine", "objective.beta_warmup_steps": 10}
    made = learner(PRESETS[preset].override({**TINY, **changing}))
    made.step(0)
    assert operations(made, 1) == operations(made, 2)


@pytest.mark.slow
def test_training_beats_patch_pca_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"data.name": "digits", "model.widths": (16, 32), "tracking.wandb": "off", "run_dir": str(tmp_path)}
    result = dist_ae.train(PRESETS["conv"].override({**settings, "model.latent_dim": 2, "train.steps": 150}))
    assert result.metrics["val.mse"] < 0.6 * result.metrics["val.pca_mse"]
    assert "below PCA of 4 × 4 patches with 8 numbers" in capsys.readouterr().out


@pytest.mark.slow
def test_a_collapsed_posterior_is_named_and_bits_per_dimension_are_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**TINY, "objective.likelihood": "discretized", "train.steps": 30, "optim.warmup_steps": 5}
    sound = dist_ae.train(PRESETS["conv-vae"].override({**settings, "run_dir": str(tmp_path / "sound")}))
    assert "posterior collapse" not in capsys.readouterr().out
    assert 0 < sound.metrics["val.active_units"] <= 3 * 4
    nats_of_bits = sound.metrics["val.bits_per_dim"] * 64 * np.log(2)
    assert nats_of_bits == pytest.approx(sound.metrics["val.neg_elbo"]) and 0 < sound.metrics["val.bits_per_dim"] < 8
    np.save(tmp_path / "same.npy", np.full((120, 8, 8), 77, np.uint8))  # nothing to tell about an image
    same = {**settings, "data.name": f"array:{tmp_path / 'same.npy'}", "run_dir": str(tmp_path / "collapsed")}
    lost = dist_ae.train(PRESETS["conv-vae"].override({**same, "model.start": "random"}))
    assert lost.metrics["val.active_units"] == 0
    assert "posterior collapse: no number of the code" in capsys.readouterr().out


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"model.widths": ()}, {"model.widths": (8, 0)}, {"model.blocks": 0}, {"model.code": "rows"}):
        with pytest.raises(InputError, match=rf"^{next(iter(wrong))}"):
            PRESETS["conv"].override(wrong)


# Last: after torch.export and before a first backward pass, autograd's threads would forbid the forks above.
@pytest.mark.slow
def test_the_model_can_be_exported_with_its_draws_and_for_any_number_of_images(tmp_path: Path) -> None:
    model = trained_looking(build(EVERYTHING, (1, 7, 9)))
    images, draws = torch.rand(8, 1, 7, 9), draw(model.draw_shapes(), Step(0), range(8), CPU, seed=0, std=0.2, keep=0.7)
    exported = torch.export.export(model, (images, draws)).module()
    torch.testing.assert_close(exported(images, draws).raw, model(images, draws).raw)
    for code in ("grid", "vector"):
        trained = dist_ae.train(
            PRESETS["conv"].override(
                {**TINY, "model.code": code, "train.steps": 2, "run_dir": str(tmp_path / code), "model.blocks": 2}
            )
        )
        loaded = dist_ae.load(trained.run_dir)
        pictures = torch.rand(5, 1, 8, 8)
        reconstruction, codes = loaded.export().module()(pictures)
        torch.testing.assert_close(reconstruction, loaded.reconstruct(pictures))
        torch.testing.assert_close(codes, loaded.embed(pictures))
        assert loaded.interpolate(pictures[:2], pictures[2:4], 3).shape == (2, 3, 1, 8, 8)
