"""The models: one interface, one file per architecture, one row here for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dist_ae.config import Config, InputError
from dist_ae.models.conv import Conv
from dist_ae.models.interface import (
    LOGVAR_RANGE,
    Autoencoder,
    Components,
    LinearCode,
    Output,
    centred,
    pad_to_multiple,
    pixels,
)
from dist_ae.models.mlp import MLP
from dist_ae.models.weights import initialize

__all__ = [
    "LOGVAR_RANGE",
    "MLP",
    "Autoencoder",
    "Builder",
    "Components",
    "Conv",
    "LinearCode",
    "Output",
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
    """The model of a configuration without weights, on torch's meta device: its shapes at no cost."""
    with torch.device("meta"):
        return ARCHITECTURES[config.model.architecture](config, image_shape)


def build(config: Config, image_shape: Sequence[int], own: Builder | None = None) -> Autoencoder:
    """The model of a configuration, on the CPU, with weights that follow from the seed alone.

    Args:
        own: makes a model of the user's own; its initializers draw from a generator seeded by ``config.seed``.

    Raises:
        InputError: the run needs a model of the user's own and none is given, or it does not fit the configuration.
    """
    if (config.model.architecture == "own") != (own is not None):
        raise InputError(
            "model.architecture own needs the function that builds the model: "
            "train(config, model=build) from Python, or load(run_dir, model=build)"
        )
    if own is None:
        return initialize(blank(config, image_shape), config.seed)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = own(tuple(image_shape))
    if not isinstance(model, Autoencoder):
        raise InputError(
            f"model: expected a dist_ae.Autoencoder, got {type(model).__name__}; see examples/own_model.py"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise InputError(
                f"model: {name} is a {type(layer).__name__}. Statistics of a batch and torch's own dropout depend on "
                "how images are shared among processes; use GroupNorm, and mask_shapes for dropout (as dist_ae/models/"
                "mlp.py does)"
            )
    fits = {
        "model.variational": (model.variational, config.model.variational),
        "objective.likelihood bernoulli": (model.bernoulli, config.objective.likelihood == "bernoulli"),
        "objective.sigma learned": (model.log_sigma is not None, config.objective.sigma == "learned"),
    }
    for what, (has, wanted) in fits.items():
        if has != wanted:
            raise InputError(f"model: it says {what} = {has}, the configuration says {wanted}; make both the same")
    return model
