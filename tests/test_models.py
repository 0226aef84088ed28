"""The model is a pure function of images and draws."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_ae.draws import DrawShapes, Step, draw
from dist_ae.models import Autoencoder, build
from dist_ae.models.cost import cost_of
from dist_ae.presets import PRESETS

CPU = torch.device("cpu")
EVERYTHING = PRESETS["vae"].override(
    {"objective.noise_std": 0.2, "model.dropout": 0.3, "model.hidden_dims": (16, 12), "model.latent_dim": 5}
)


def shapes(image_shape: tuple[int, ...]) -> DrawShapes:
    return build(EVERYTHING, image_shape).draw_shapes()


def test_forward_is_a_pure_function_of_images_and_draws() -> None:
    model = build(EVERYTHING, (1, 4, 4))
    images = torch.rand(8, 1, 4, 4)
    draws = draw(shapes((1, 4, 4)), Step(0), range(8), CPU, seed=0, std=0.2, keep=0.7)
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
    images, draws = torch.rand(8, 1, 4, 4), draw(shapes((1, 4, 4)), Step(0), range(8), CPU, seed=0, std=0.2, keep=0.7)
    exported = torch.export.export(model, (images, draws)).module()
    torch.testing.assert_close(exported(images, draws).reconstruction, model(images, draws).reconstruction)


@pytest.mark.parametrize("preset", ["ae", "vae", "conv", "conv-dropout"])
@pytest.mark.parametrize("lower", [None, torch.bfloat16])
def test_the_cost_of_an_image_is_what_torch_counts_and_adds_up_over_images(
    preset: str, lower: torch.dtype | None
) -> None:
    model = build(PRESETS[preset], (1, 20, 28))
    cost = cost_of(model, lower)
    kept = dict[int, int]()
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = 50
    with (
        FlopCounterMode(display=False) as counted,
        torch.autocast("cpu", torch.bfloat16, enabled=lower is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = model(torch.rand(images, 1, 20, 28))
        (output.raw.float().sum() + output.mean.float().sum()).backward()
    assert counted.get_total_flops() == images * cost.operations
    # What is kept once: at most the weights in autocast's type.
    once = sum(parameter.nbytes for parameter in model.parameters())
    assert images * cost.kept <= sum(kept.values()) <= images * cost.kept + once


def test_the_cost_counts_layers_of_a_users_own_model_too() -> None:
    class Own(Autoencoder):
        def __init__(self) -> None:
            super().__init__((1, 8, 8), (4, 4, 4))
            self.down, self.up = nn.Conv2d(1, 4, 2, 2), nn.ConvTranspose2d(4, 1, 2, 2)

        def encode_raw(self, images: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
            code: torch.Tensor = self.down(images)
            return code

        def decode_raw(self, code: torch.Tensor, masks: Sequence[torch.Tensor] = ()) -> torch.Tensor:
            raw: torch.Tensor = self.up(code)
            return raw

    # 16 places of 4 · 4 weights, twice for each product and sum; no gradient for the images.
    assert cost_of(Own()).operations == 2 * 16 * 16 * (2 + 3)
