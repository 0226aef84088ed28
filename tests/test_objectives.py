"""The equations, against torch.distributions and against themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as D

from dist_ae.config import ObjectiveConfig
from dist_ae.draws import Draws
from dist_ae.models import LOGVAR_RANGE, Output, build
from dist_ae.objectives import (
    bernoulli_distortion,
    charbonnier_distortion,
    discretized_distortion,
    gaussian_distortion,
    gaussian_kl,
    laplace_distortion,
    terms,
)
from dist_ae.presets import PRESETS
from dist_ae.scores import score_images
from dist_ae.timeline import beta

G = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


@pytest.mark.parametrize("prior", [(0.0, 0.0), (0.7, -1.3), (randn(1, 5), randn(1, 5))])
def test_closed_form_kl_equals_torch_distributions_for_any_prior(
    prior: tuple[float | torch.Tensor, float | torch.Tensor],
) -> None:
    mean, logvar = randn(64, 5), randn(64, 5)
    prior_mean, prior_logvar = (torch.as_tensor(p, dtype=torch.float64) for p in prior)
    expected = D.kl_divergence(
        D.Normal(mean, (logvar / 2).exp()), D.Normal(prior_mean.expand(64, 5), (prior_logvar / 2).exp().expand(64, 5))
    ).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, logvar, *prior), expected, rtol=1e-12, atol=1e-12)


def test_kl_is_zero_only_where_posterior_and_prior_are_equal() -> None:
    mean, logvar = randn(64, 5), randn(64, 5)
    assert (gaussian_kl(mean, logvar) > 0).all()
    assert gaussian_kl(mean, logvar, mean, logvar).abs().max() < 1e-12


def test_kl_equals_a_monte_carlo_estimate_within_its_error() -> None:
    mean, logvar = randn(1, 3), randn(1, 3)
    posterior, prior = D.Normal(mean, (logvar / 2).exp()), D.Normal(0.5, 2.0)
    z = mean + (logvar / 2).exp() * randn(200_000, 3)
    samples = (posterior.log_prob(z) - prior.log_prob(z)).sum(1)
    error = float(samples.std()) / math.sqrt(len(samples))
    assert float(gaussian_kl(mean, logvar, 0.5, math.log(4.0))) == pytest.approx(float(samples.mean()), abs=4 * error)


def test_kl_is_computed_in_fp32_from_half_precision_and_finite_over_the_allowed_range() -> None:
    for bound in LOGVAR_RANGE:
        assert (
            torch.tensor(bound, dtype=torch.float16).exp().isfinite()
            and torch.tensor(-bound, dtype=torch.float16).exp().isfinite()
        )
        kl = gaussian_kl(torch.zeros(1, 2, dtype=torch.float16), torch.full((1, 2), bound, dtype=torch.float16))
        assert kl.dtype == torch.float32 and kl.isfinite().all()


def test_likelihoods_equal_torch_distributions() -> None:
    images, raw = torch.rand(8, 1, 4, 4, generator=G, dtype=torch.float64), randn(8, 1, 4, 4)
    sigma = 0.3
    gaussian = -D.Normal(raw, sigma).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_distortion(images, raw, math.log(sigma)), gaussian)
    laplace = -D.Laplace(raw, sigma / math.sqrt(2)).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(laplace_distortion(images, raw, math.log(sigma)), laplace)
    torch.testing.assert_close(charbonnier_distortion(images, raw, math.log(sigma), 1e-7), laplace, rtol=1e-5, atol=0)
    bernoulli = -D.Bernoulli(logits=raw, validate_args=False).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(bernoulli_distortion(images, raw), bernoulli)


@pytest.mark.parametrize("sigma", [1e-3, 0.3])
def test_charbonnier_s_penalty_is_a_density(sigma: float) -> None:
    width = 40 * sigma + 1
    values = torch.linspace(-width, width, 2_000_001, dtype=torch.float64)
    found = charbonnier_distortion(
        values.view(-1, 1, 1, 1), torch.zeros_like(values).view(-1, 1, 1, 1), math.log(sigma), 0.002
    )
    assert float(torch.trapezoid((-found).exp(), values)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("sigma", [1e-4, 3e-3, 0.05, 3.0])
def test_the_discretized_likelihood_is_a_distribution_over_256_values(sigma: float) -> None:
    values = torch.arange(256, dtype=torch.float64) / 255
    for mean in (-0.2, 0.0, 0.3217, 0.5 / 255, 1.0, 1.4):
        reconstruction = torch.full((256, 1, 1, 1), mean, dtype=torch.float64)
        found = discretized_distortion(values.view(256, 1, 1, 1), reconstruction, math.log(sigma))
        assert found.isfinite().all() and float(torch.exp(-found).sum()) == pytest.approx(1, abs=1e-9)
    scale = sigma * math.sqrt(3) / math.pi  # in the middle, the mass of torch's logistic between the neighbours
    base = D.TransformedDistribution(
        D.Uniform(torch.zeros((), dtype=torch.float64), 1.0),
        [D.SigmoidTransform().inv, D.AffineTransform(0.49, scale)],
    )
    if sigma >= 0.05:
        expected = -torch.log(base.cdf(values[100:140] + 0.5 / 255) - base.cdf(values[100:140] - 0.5 / 255))
        reconstruction = torch.full((40, 1, 1, 1), 0.49, dtype=torch.float64)
        torch.testing.assert_close(
            discretized_distortion(values[100:140].view(40, 1, 1, 1), reconstruction, math.log(sigma)), expected
        )


def test_the_discretized_likelihood_is_finite_in_fp32_and_learns_its_sigma() -> None:
    config = PRESETS["conv-vae"].objective.model_copy(update={"likelihood": "discretized"})
    log_sigma = torch.tensor(-9.0, requires_grad=True)
    images, code = torch.rand(4, 1, 4, 4), torch.zeros(4, 2)
    output = Output(torch.full((4, 1, 4, 4), -3.0, requires_grad=True), code, code, log_sigma, False)
    loss = terms(output, images, config).loss
    loss.sum().backward()
    assert log_sigma.grad is not None and output.raw.grad is not None
    assert loss.isfinite().all() and log_sigma.grad < 0 and output.raw.grad.isfinite().all()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
def test_training_loss_of_a_vae_is_the_negative_elbo(likelihood: str) -> None:
    config = PRESETS["vae"].override(
        {"objective.likelihood": likelihood, "objective.sigma": 0.2, "model.hidden_dims": (16,), "model.latent_dim": 3}
    )
    model = build(config, (1, 4, 4)).double()
    images, epsilon = torch.rand(16, 1, 4, 4, generator=G, dtype=torch.float64), randn(16, 3)
    loss = terms(model(images, Draws(epsilon=epsilon)), images, config.objective).loss

    mean, logvar = model.encode(images)
    assert logvar is not None
    posterior = D.Normal(mean, (logvar / 2).exp())
    z = posterior.mean + posterior.stddev * epsilon
    raw = model.decode_raw(z)
    pixels: D.Distribution = {
        "bernoulli": D.Bernoulli(logits=raw, validate_args=False),
        "gaussian": D.Normal((raw + 1) / 2, 0.2),
        "laplace": D.Laplace((raw + 1) / 2, 0.2 / math.sqrt(2)),
    }[likelihood]
    elbo = pixels.log_prob(images).flatten(1).sum(1) - D.kl_divergence(
        posterior, D.Normal(torch.zeros_like(mean), 1.0)
    ).sum(1)
    torch.testing.assert_close(loss, -elbo, rtol=1e-5, atol=0)


def test_shapes_that_would_broadcast_raise() -> None:
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match="must have the same shape"):
        gaussian_distortion(images, images[:, 0], 0.0)
    with pytest.raises(ValueError, match="must have the same shape"):
        bernoulli_distortion(images, images[:, 0])
    with pytest.raises(ValueError, match="expected images of shape"):
        build(PRESETS["ae"], (1, 8, 8))(images[:, 0])


def test_learned_sigma_settles_at_the_root_mean_squared_error() -> None:
    images, reconstruction = torch.rand(32, 1, 4, 4), torch.rand(32, 1, 4, 4)
    log_sigma = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_sigma], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = gaussian_distortion(images, reconstruction, log_sigma).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(log_sigma.detach().exp()) == pytest.approx(
        float((images - reconstruction).square().mean().sqrt()), rel=1e-3
    )


def test_beta_warms_up_linearly_and_weighs_the_rate() -> None:
    config = ObjectiveConfig(beta=2.0, beta_warmup_steps=4)
    assert [beta(step, config) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    preset = PRESETS["vae"].override({"model.hidden_dims": (8,), "objective.beta": 3.0})
    model = build(preset, (1, 4, 4))
    found = terms(model(torch.rand(4, 1, 4, 4)), torch.rand(4, 1, 4, 4), preset.objective)
    torch.testing.assert_close(found.loss, found.distortion + 3 * found.rate)


def test_no_image_far_from_0_1_scores_better_than_a_bernoulli_model_allows() -> None:
    config = PRESETS["vae"].override({"model.hidden_dims": (16,), "model.latent_dim": 4})
    torch.manual_seed(0)
    model = build(config, (1, 8, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        images = torch.rand(64, 1, 8, 8)
        damaged = images + 4 * (model.decode(model.encode(images)[0]) - 0.5).sign()  # where the model is sure, and more
        found = score_images(model, damaged, range(64), config, ("neg_elbo",), None)["neg_elbo"]
    assert config.objective.likelihood == "bernoulli" and bool((found >= 0).all())
