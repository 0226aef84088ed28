"""The cost of a training step per image: arithmetic, and memory between forward and backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_ae.models.interface import Autoencoder


class Cost(NamedTuple):
    """The cost of one image in one step."""

    operations: int  # floating-point operations of matrix products and convolutions; a multiply-add counts as two
    kept: int  # bytes that the forward pass keeps for the backward pass


def cost_of(model: Autoencoder, lower: torch.dtype | None = None) -> Cost:
    """Counts during real passes over one and over two images; the difference leaves out what a step needs only once.

    torch's FlopCounterMode counts the same operations (a test compares them), but it imports torch's compiler, which
    takes one of the three seconds that a run needs to its first step.

    Args:
        lower: the type of autocast, if the run uses it.
    """
    one, two = (_pass(model, count, lower) for count in (1, 2))
    return Cost(two.operations - one.operations, two.kept - one.kept)


def _pass(model: Autoencoder, count: int, lower: torch.dtype | None) -> Cost:
    parameter = next(model.parameters())
    images = torch.zeros(count, *model.image_shape, dtype=parameter.dtype, device=parameter.device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    operations, saved = 0, dict[int, int]()

    def count_operations(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal operations
        weight, transposed = layer.weight, isinstance(layer, nn.modules.conv._ConvTransposeNd)
        assert isinstance(weight, Tensor)
        places = (inputs[0] if transposed else output).numel() // weight.shape[0]
        # Forward pass, gradient of the weights and, where it is needed, gradient of the input: each costs the same.
        operations += 2 * weight.numel() * places * (3 if inputs[0].requires_grad else 2)

    def count_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers = [layer for layer in model.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) > 1]
    hooks = [layer.register_forward_hook(count_operations) for layer in layers]
    try:
        with (
            torch.autocast(images.device.type, lower, enabled=lower is not None),
            torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor),
        ):
            model(images)  # frees what it saved together with its output
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(operations, sum(saved.values()))
