"""What a training step costs for one image: arithmetic, and memory until the gradient is taken."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_ae.models.interface import Autoencoder


class Cost(NamedTuple):
    """The cost of one image in one step."""

    operations: int  # of floating-point numbers, in matrix products and convolutions; an addition and a product are two
    kept: int  # bytes that the forward pass keeps for the backward pass


def cost_of(model: Autoencoder, lower: torch.dtype | None = None) -> Cost:
    """Counts on real passes over one and over two images, so that what is kept once per step counts for no image.

    torch's FlopCounterMode finds the same operations (a test compares them), but it imports torch's compiler. That
    takes one of the three seconds that a run needs to its first step.

    Args:
        lower: the type of autocast, where the run uses it.
    """
    one, two = (_pass(model, count, lower) for count in (1, 2))
    return Cost(two.operations - one.operations, two.kept - one.kept)


def _pass(model: Autoencoder, count: int, lower: torch.dtype | None) -> Cost:
    parameter = next(model.parameters())
    images = torch.zeros(count, *model.image_shape, dtype=parameter.dtype, device=parameter.device)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    operations, kept = 0, dict[int, int]()

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal operations
        weight, transposed = layer.weight, isinstance(layer, nn.modules.conv._ConvTransposeNd)
        assert isinstance(weight, Tensor)
        places = (inputs[0] if transposed else output).numel() // weight.shape[0]
        # Forward pass, gradient of the weights and, where it is needed, gradient of the input: each costs the same.
        operations += 2 * weight.numel() * places * (3 if inputs[0].requires_grad else 2)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers = [layer for layer in model.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) > 1]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with (
            torch.autocast(images.device.type, lower, enabled=lower is not None),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(images)  # what it keeps is freed with its output
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(operations, sum(kept.values()))
