"""Trains autoencoders (plain, denoising, dropout, variational) the same way on one process or many.

``train(config)`` trains, ``load(run_dir)`` brings a trained model back, ``PRESETS`` are the experiments to start from.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dist_ae.config import Config, InputError, load_config
from dist_ae.presets import PRESETS

if TYPE_CHECKING:
    from dist_ae import objectives
    from dist_ae.models import Autoencoder
    from dist_ae.outcome import NonFinite, OutOfMemory, Report, Result, Stopped
    from dist_ae.trainer import train
    from dist_ae.use.trained import TrainedModel, load

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Autoencoder",
    "Config",
    "InputError",
    "NonFinite",
    "OutOfMemory",
    "Report",
    "Result",
    "Stopped",
    "TrainedModel",
    "load",
    "load_config",
    "objectives",
    "train",
]

# Imported at first use: torch and Accelerate take 3 s, which help and error messages need not wait for.
_HOMES = {
    "Autoencoder": "models",
    "NonFinite": "outcome",
    "OutOfMemory": "outcome",
    "Report": "outcome",
    "Result": "outcome",
    "Stopped": "outcome",
    "TrainedModel": "use.trained",
    "load": "use.trained",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"dist_ae.{_HOMES[name]}"), name)
    if name == "objectives":
        return importlib.import_module("dist_ae.objectives")
    raise AttributeError(f"module 'dist_ae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
