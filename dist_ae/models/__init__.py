"""The models: one interface, one file per architecture, one row here for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from dist_ae.errors import InputError
from dist_ae.models.conv import Conv
from dist_ae.models.interface import (
    LOGVAR_RANGE,
    Autoencoder,
    Components,
    LinearCode,
    Output,
    as_bytes,
    centred,
    pad_to_multiple,
    pixels,
)
from dist_ae.models.mlp import MLP
from dist_ae.models.weights import initialize

if TYPE_CHECKING:
    from dist_ae.config import Config

__all__ = [
    "LOGVAR_RANGE",
    "MLP",
    "Autoencoder",
    "Builder",
    "Components",
    "Conv",
    "LinearCode",
    "Output",
    "as_bytes",
    "blank",
    "build",
    "centred",
    "initialize",
    "pad_to_multiple",
    "pixels",
]

ARCHITECTURES: dict[str, Callable[[Config, Sequence[int]], Autoencoder]] = {"mlp": MLP, "conv": Conv}
Builder = Callable[[tuple[int, ...]], Autoencoder]  # a model of the user's own, from the shape of an image


def blank(config: Config, image_shape: Sequence[int]) -> Autoencoder:
    """The model of a configuration on torch's meta device: shapes without memory."""
    with torch.device("meta"):
        model = ARCHITECTURES[config.model.architecture](config, image_shape)
        _take_units(model, config)
    return model


def _take_units(model: Autoencoder, config: Config) -> None:
    model.record_shape = config.model.record_shape
    if config.data.scale in ("standard", "range"):
        model.take_units(config.data.scale == "standard", config.data.missing == "mask")


def build(config: Config, image_shape: Sequence[int], own: Builder | None = None) -> Autoencoder:
    """The model of a configuration, on the CPU, with weights that follow from the seed alone.

    Args:
        own: a function that makes the user's own model; its initializers draw from a generator seeded by
            ``config.seed``.

    Raises:
        InputError: the run needs the user's own model and none is given, or the model does not fit the configuration.
    """
    if (config.model.architecture == "own") != (own is not None):
        raise InputError(
            "model.architecture own needs the function that builds the model: "
            "train(config, model=build) from Python, or load(run_dir, model=build)"
        )
    if own is None:
        model = initialize(blank(config, image_shape), config.seed)
        _take_units(model, config)  # these have no initial weights
        return model
    if isinstance(own, nn.Module):
        raise InputError("model: give a function that builds it from the shape of an image, not the model itself")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = own(tuple(image_shape))
        if not isinstance(model, Autoencoder):
            raise InputError(
                f"model: expected a dist_ae.Autoencoder, got {type(model).__name__}; see examples/own_model.py"
            )
        _check_own(model, tuple(image_shape))
        _take_units(model, config)
    fits = {
        "model.variational": (model.variational, config.model.variational),
        "objective.likelihood bernoulli": (model.bernoulli, config.objective.likelihood == "bernoulli"),
        "objective.sigma learned": (model.log_sigma is not None, config.objective.sigma == "learned"),
    }
    for what, (actual, expected) in fits.items():
        if actual != expected:
            raise InputError(f"model: it says {what} = {actual}, the configuration says {expected}; make both the same")
    return model


def _check_own(model: Autoencoder, image_shape: tuple[int, ...]) -> None:
    """Raises InputError if the user's own model cannot be trained, or not with exact results."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    if not any(p.requires_grad for _, p in parameters):
        raise InputError("model: none of its parameters asks for a gradient, so there is nothing to train")
    names: dict[int, str] = {}
    for name, parameter in parameters:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(f"model: {name} has no shape yet; build it with the sizes, not as a lazy layer")
        if (first := names.setdefault(id(parameter), name)) != name:
            raise InputError(
                f"model: {name} is {first}, and a checkpoint holds each tensor once; let both layers use the weight of "
                "one, as in F.linear(x, self.layer.weight)"
            )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise InputError(
                f"model: {name} is a {type(layer).__name__}. Statistics of a batch and torch's own dropout depend on "
                "how images are shared among processes; use GroupNorm, and mask_shapes for dropout (as dist_ae/models/"
                "mlp.py does)"
            )
    images = torch.linspace(0, 1, 3 * math.prod(image_shape)).view(3, *image_shape).to(parameters[0][1])
    with torch.no_grad():
        output, repeated, alone = model(images), model(images), model(images[:1])
    for what, tensor, shape in (
        ("encode_raw", output.mean, model.code_shape),
        ("decode_raw", output.raw, image_shape),
    ):
        if tensor.shape[1:] != torch.Size(shape):
            raise InputError(f"model: {what} gives {list(tensor.shape[1:])} for an image, expected {list(shape)}")
    if not torch.equal(output.raw.nan_to_num(), repeated.raw.nan_to_num()):
        raise InputError(
            "model: the same images give another result each time; draws must come from draw_shapes and mask_shapes, "
            "not from torch's generator"
        )
    if not torch.allclose(output.raw[:1], alone.raw, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise InputError(
            "model: the result for an image depends on the other images of its batch, so it would depend on the number "
            "of processes"
        )
