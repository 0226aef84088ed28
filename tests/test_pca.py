"""The PCA start is PCA: equal to scikit-learn's before the first step, on any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, forked, metrics, relative_difference, weights
from sklearn.decomposition import PCA

import dist_ae
from dist_ae import pca as components_of
from dist_ae.config import Config, InputError
from dist_ae.data import sources
from dist_ae.data.reader import Reader
from dist_ae.models import Autoencoder, build
from dist_ae.presets import PRESETS
from dist_ae.processes.runtime import Runtime

DIGITS: Any = sources.load(PRESETS["ae"].data)
TRAIN, VAL = (split.images.reshape(len(split.images), -1) / 255 for split in (DIGITS.train, DIGITS.val))


SHAPES: list[dict[str, Any]] = [
    {},
    {"model.activation": "gelu"},
    {"model.activation": "silu"},
    {"model.hidden_dims": ()},
    {"model.hidden_dims": (40,)},
    {"model.dropout": 0.5},
]


def started(config: Config) -> Autoencoder:
    """The model before its first step, as a run begins with it."""
    model, runtime = build(config, (1, 8, 8)).to(torch.float64), Runtime(config)
    components = components_of.of_model(model, Reader(DIGITS.train, runtime.device, torch.float64), runtime)
    assert components is not None
    model.start_from(components, config.objective)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.activation": "gelu"},
        {"model.activation": "silu"},
        {"model.hidden_dims": ()},
        {"model.hidden_dims": (40,)},
        {"model.dropout": 0.5},
    ],
)
@pytest.mark.parametrize("latent", [2, 8, 16])
def test_before_the_first_step_it_reconstructs_as_scikit_learns_pca(latent: int, overrides: dict[str, Any]) -> None:
    config = PRESETS["ae"].override(
        {
            "model.latent_dim": latent,
            "model.hidden_dims": (48, 32),
            "precision": "fp64",
            "model.start": "pca",
            **overrides,
        }
    )
    pca = PCA(latent, svd_solver="full").fit(TRAIN)
    expected = pca.inverse_transform(pca.transform(VAL))
    found = (
        started(config)(torch.from_numpy(VAL).view(-1, 1, 8, 8)).reconstruction.detach().numpy().reshape(len(VAL), -1)
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_code_that_does_not_fit_carries_the_leading_components() -> None:
    config = PRESETS["ae"].override(
        {"model.latent_dim": 30, "model.hidden_dims": (40, 20), "model.start": "pca", "precision": "fp64"}
    )
    pca = PCA(10, svd_solver="full").fit(TRAIN)
    found = (
        started(config)(torch.from_numpy(VAL).view(-1, 1, 8, 8)).reconstruction.detach().numpy().reshape(len(VAL), -1)
    )
    np.testing.assert_allclose(found, pca.inverse_transform(pca.transform(VAL)), atol=1e-9)


@pytest.mark.parametrize("sigma", [0.1, "learned"])
def test_a_vae_starts_as_probabilistic_pca(sigma: float | str) -> None:
    config = PRESETS["vae"].override(
        {
            "objective.likelihood": "gaussian",
            "objective.sigma": sigma,
            "model.latent_dim": 6,
            "model.start": "pca",
            "precision": "fp64",
        }
    )
    model = started(config)
    output = model(torch.from_numpy(VAL).view(-1, 1, 8, 8))
    assert output.logvar is not None
    pca = PCA(6, svd_solver="full").fit(TRAIN)
    values = pca.explained_variance_ * (len(TRAIN) - 1) / len(TRAIN)
    variance = sigma**2 if isinstance(sigma, float) else (TRAIN.var(0).sum() - values.sum()) / (64 - 6)
    scale = np.sqrt(np.clip(values - variance, 0, None))
    assert (scale > 0).all()
    mean = (VAL - pca.mean_) @ pca.components_.T * scale / values
    reconstruction = mean * scale @ pca.components_ + pca.mean_
    np.testing.assert_allclose(output.mean.detach().abs(), np.abs(mean), atol=1e-9)  # the sign of a component is open
    np.testing.assert_allclose(output.logvar.detach()[0], np.log(variance / values), atol=1e-9)
    np.testing.assert_allclose(output.reconstruction.detach().numpy().reshape(len(VAL), -1), reconstruction, atol=1e-9)
    if model.log_sigma is not None:
        assert float(model.log_sigma.detach().exp()) == pytest.approx(np.sqrt(variance))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    settings = {**SMALL, "model.start": "pca", "run_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match="not the logits"):
        dist_ae.train(PRESETS["vae"].override({**settings, "objective.likelihood": "bernoulli"}))
    with pytest.raises(InputError, match="at least 2 units"):
        dist_ae.train(PRESETS["ae"].override({**settings, "model.hidden_dims": (1,)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_from_pca_beats_pca_and_is_the_same_on_1_and_3_processes(tmp_path: Path) -> None:
    overrides = {**SMALL, "model.start": "pca", "model.hidden_dims": (64, 32), "precision": "fp64"}
    for world in (1, 3):
        config = PRESETS["ae"].override({**overrides, "train.steps": 50, "run_dir": str(tmp_path / str(world))})
        assert forked(world, lambda rank, config=config: dist_ae.train(config), tmp_path / "log") == [0] * world  # type: ignore[misc]
    losses = [[line["loss"] for line in metrics(tmp_path / world)] for world in ("1", "3")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    # PCA is a stationary point of the linear model: some gradients there are rounding and nothing else, which Adam
    # scales up.
    assert relative_difference(weights(tmp_path / "3"), weights(tmp_path / "1")) < 1e-6
    pca = PCA(8, svd_solver="full").fit(TRAIN)
    linear = float(((pca.inverse_transform(pca.transform(VAL)) - VAL) ** 2).mean())
    longer = dist_ae.train(
        PRESETS["ae"].override({**overrides, "train.steps": 150, "run_dir": str(tmp_path / "longer")})
    )
    assert longer.metrics["val.mse"] < 0.9 * linear


@pytest.mark.slow
def test_from_pca_muon_follows_one_process_however_small_the_pieces_of_a_batch_are(tmp_path: Path) -> None:
    # At the start all gradients but the last layer's are rounding, which depends on how a batch is cut.
    overrides = {
        **SMALL,
        "model.start": "pca",
        "model.hidden_dims": (64, 32),
        "precision": "fp64",
        "optim.name": "muon",
    }
    for world, most in ((1, None), (2, 1), (2, 2)):
        changes = {"train.steps": 50, "train.max_per_process": most, "run_dir": str(tmp_path / f"{world}-{most}")}
        config = PRESETS["ae"].override({**overrides, **changes})
        assert forked(world, lambda rank, config=config: dist_ae.train(config), tmp_path / "log") == [0] * world  # type: ignore[misc]
    straight = tmp_path / "1-None"
    for cut in (tmp_path / "2-1", tmp_path / "2-2"):
        losses = [[line["loss"] for line in metrics(run)] for run in (straight, cut)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-10)
        assert relative_difference(weights(cut), weights(straight)) < 1e-6
