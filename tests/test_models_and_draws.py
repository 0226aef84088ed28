"""The model is a pure function of images and draws; the draws are a function of their keys."""

from __future__ import annotations

import itertools

import pytest
import torch

from dist_ae.draws import BLOCK, DrawShapes, draw, keyed, keyed_seed
from dist_ae.models import build
from dist_ae.presets import PRESETS

CPU = torch.device("cpu")
EVERYTHING = PRESETS["vae"].override(
    {"objective.noise_std": 0.2, "model.dropout": 0.3, "model.hidden_dims": (16, 12), "model.latent_dim": 5}
)


def shapes(image_shape: tuple[int, ...]) -> DrawShapes:
    return build(EVERYTHING, image_shape).draw_shapes()


def test_draws_of_rows_are_the_rows_of_the_whole_batch() -> None:
    whole = draw(shapes((1, 4, 4)), EVERYTHING, step=7, rows=range(100), device=CPU)
    for rows in (range(32), range(32, 64), range(5, 9), range(31, 65), range(90, 100), range(10, 10)):
        part = draw(shapes((1, 4, 4)), EVERYTHING, step=7, rows=rows, device=CPU)
        for a, b in zip(
            [part.noise, part.epsilon, *part.masks], [whole.noise, whole.epsilon, *whole.masks], strict=True
        ):
            assert a is not None and b is not None
            assert torch.equal(a, b[rows.start : rows.stop])


def test_draws_differ_between_steps_streams_seeds_and_blocks() -> None:
    keys = list(itertools.product((0, 1), ("noise", "epsilon"), (0, 1)))
    tables = [keyed("normal", key, range(2 * BLOCK), (8,), CPU) for key in keys]
    blocks = [part for table in tables for part in table.split(BLOCK)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(blocks, 2))
    assert (
        len(
            {
                keyed_seed(seed, stream, step) & 0xFFFFFFFF
                for seed in range(10)
                for stream in ("a", "b")
                for step in range(500)
            }
        )
        == 10_000
    )


def test_draws_have_the_distributions_they_are_named_for() -> None:
    draws = draw(shapes((1, 8, 8)), EVERYTHING, step=0, rows=range(2000), device=CPU)
    assert draws.noise is not None and draws.epsilon is not None
    assert float(draws.noise.std()) == pytest.approx(0.2, rel=0.02)
    assert float(draws.epsilon.mean()) == pytest.approx(0, abs=0.03)
    for mask in draws.masks:
        assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
        assert float(mask.mean()) == pytest.approx(1, rel=0.03)
    assert [mask.shape[1] for mask in draws.masks] == [16, 12, 12, 16]


def test_forward_is_a_pure_function_of_images_and_draws() -> None:
    model = build(EVERYTHING, (1, 4, 4))
    images = torch.rand(8, 1, 4, 4)
    draws = draw(shapes((1, 4, 4)), EVERYTHING, 0, range(8), CPU)
    before = torch.get_rng_state()
    first, again, plain = model(images, draws), model(images, draws), model(images)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.reconstruction, again.reconstruction)
    assert not torch.equal(first.reconstruction, plain.reconstruction)
    assert (
        plain.reconstruction.shape == images.shape
        and plain.reconstruction.min() >= 0
        and plain.reconstruction.max() <= 1
    )


@pytest.mark.parametrize("preset", ["ae", "denoising", "dropout", "vae"])
def test_a_batch_gives_each_image_what_it_gets_alone(preset: str) -> None:
    config = PRESETS[preset].override({"model.hidden_dims": (16, 12)})
    model = build(config, (3, 5, 4)).double()
    images = torch.rand(6, 3, 5, 4, dtype=torch.float64)
    together = model(images).reconstruction
    alone = torch.cat([model(image[None]).reconstruction for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_start_weights_follow_from_the_seed_alone() -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        return build(EVERYTHING.override({"seed": seed}), (1, 4, 4)).state_dict()

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    again, other = start(0), start(1)
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k]) for k in first)
    assert float(first["encoder.0.weight"].abs().max()) <= 16**-0.5


def test_the_model_can_be_exported_with_its_draws() -> None:
    model = build(EVERYTHING, (1, 4, 4))
    images, draws = torch.rand(8, 1, 4, 4), draw(shapes((1, 4, 4)), EVERYTHING, 0, range(8), CPU)
    exported = torch.export.export(model, (images, draws)).module()
    torch.testing.assert_close(exported(images, draws).reconstruction, model(images, draws).reconstruction)
