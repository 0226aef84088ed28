"""Evaluation counts every image once and gives the same figure however it is cut."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, run

from dist_ae.data import sources
from dist_ae.data.reader import Reader
from dist_ae.draws import Draws
from dist_ae.evaluate import evaluate, fixed_epsilon, fixed_noise
from dist_ae.models import build
from dist_ae.presets import PRESETS
from dist_ae.processes.runtime import Runtime

VAE = PRESETS["vae"].override({"model.hidden_dims": (16,), "model.latent_dim": 3, "train.batch_size": 12})


def main(path: str) -> None:
    """What each process of the test below runs: a validation set that divides by nothing, three evaluation batch
    sizes.
    """
    found = {}
    dataset = sources.load(VAE.data.model_copy(update={"name": f"array:{path}"}))
    runtime = Runtime(VAE)
    model = runtime.accelerator.prepare(build(VAE, dataset.image_shape))
    for size in (64, 1000, 20_000):
        config = VAE.override({"evaluation.batch_size": size})
        found[size] = evaluate(model, Reader(dataset.val, runtime.device), config.objective, config.evaluation, runtime)
    if runtime.is_main:
        print(json.dumps(list(found.values())))
    runtime.close()


@pytest.mark.slow
def test_10007_images_give_the_same_figures_on_1_2_and_3_processes_and_any_batch_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "odd.npz",
        train=rng.integers(0, 256, (20, 4, 4), dtype=np.uint8),
        val=rng.integers(0, 256, (10_007, 4, 4), dtype=np.uint8),
    )
    figures = []
    for world in (1, 2, 3):
        outputs = run(
            world,
            "-c",
            f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_evaluate; "
            f"test_evaluate.main({str(tmp_path / 'odd.npz')!r})",
        )
        assert all(status == 0 for status, _, _ in outputs), outputs
        figures += json.loads(outputs[0][1].splitlines()[-1])
    assert len(figures) == 9 and "neg_elbo" in figures[0]
    for found in figures[1:]:
        assert found == pytest.approx(figures[0], rel=1e-6)


def test_figures_are_what_their_names_say(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (333, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train=images, val=images)
    dataset = sources.load(VAE.data.model_copy(update={"name": f"array:{tmp_path / 'a.npz'}"}))
    model, runtime = build(VAE, (1, 4, 4)), Runtime(VAE)
    found = evaluate(model, Reader(dataset.val, runtime.device), VAE.objective, VAE.evaluation, runtime)

    x, rows = torch.from_numpy(images)[:, None] / 255, range(333)
    mse = float((model(x).reconstruction - x).square().mean())
    noise = fixed_noise(VAE.evaluation.noise_std, rows, (1, 4, 4), runtime.device)
    denoised = float((model(x, Draws(noise=noise)).reconstruction - x).square().mean())
    assert float(noise.std()) == pytest.approx(0.3, rel=0.03)
    assert found["mse"] == pytest.approx(mse, rel=1e-6) and found["psnr"] == pytest.approx(
        -10 * np.log10(mse), rel=1e-6
    )
    assert found["denoised_psnr"] == pytest.approx(-10 * np.log10(denoised), rel=1e-6)
    epsilon = fixed_epsilon(rows, (3,), runtime.device)
    output = model(x, Draws(epsilon=epsilon))
    posterior = torch.distributions.Normal(output.mean, (output.logvar / 2).exp())
    rate = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    distortion = -torch.distributions.Bernoulli(logits=output.raw, validate_args=False).log_prob(x).flatten(1).sum(1)
    assert found["rate"] == pytest.approx(float(rate.mean()), rel=1e-5)
    assert found["neg_elbo"] == pytest.approx(float((rate + distortion).mean()), rel=1e-5)


def test_evaluation_does_not_depend_on_what_was_trained_with(tmp_path: Path) -> None:
    dataset = sources.load(VAE.data)
    runtime = Runtime(VAE)
    reader = Reader(dataset.val, runtime.device)
    model = build(VAE, dataset.image_shape)
    changed = VAE.override({"objective.noise_std": 0.9, "model.dropout": 0.5, "objective.beta": 7.0, "seed": 5})
    found, again = (evaluate(model, reader, each.objective, each.evaluation, runtime) for each in (VAE, changed))
    assert found == again


if __name__ == "__main__":
    main(sys.argv[1])
