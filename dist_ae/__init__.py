"""Trains autoencoders (plain, denoising, dropout, variational) the same way on one process or many.

``train(config)`` trains, ``load(run_dir)`` brings a trained model back, ``PRESETS`` are the experiments to start from.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from dist_ae.errors import InputError

if TYPE_CHECKING:
    from dist_ae import objectives
    from dist_ae.config import Config, load_config
    from dist_ae.folds import train_folds
    from dist_ae.models import Autoencoder
    from dist_ae.outcome import NonFinite, OutOfMemory, Report, Result, Stopped
    from dist_ae.presets import PRESETS
    from dist_ae.trainer import train
    from dist_ae.use.model import load
    from dist_ae.use.trained import TrainedModel


def _is_busy() -> bool:
    """Whether other processes want a core now: in three looks, 2 ms apart, this process is never alone."""
    running = []
    for _ in range(3):
        try:
            with open("/proc/loadavg") as file:
                running.append(int(file.read().split()[3].partition("/")[0]))
        except (OSError, ValueError, IndexError):
            return False
        time.sleep(0.002)
    return min(running) > 1


# An idle thread of libgomp, which torch brings, looks for work 300,000 times before it sleeps, some milliseconds. On a
# busy machine that takes the core from whoever works: beside a busy program a step took 49 times as long as alone.
# With 1,000 it takes twice as long, which costs a tenth of the speed where nothing else runs; with 10,000 four times,
# and costs next to nothing. It is read when torch is imported, and the user's own setting is kept: benchmarks/busy.py.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000" if _is_busy() else "10000"

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
    "train_folds",
]

# Imported at first use: torch and Accelerate take 3 s, which help and error messages need not wait for, and the
# mathematics needs no pydantic.
_HOMES = {
    "PRESETS": "presets",
    "Autoencoder": "models",
    "Config": "config",
    "NonFinite": "outcome",
    "OutOfMemory": "outcome",
    "Report": "outcome",
    "Result": "outcome",
    "Stopped": "outcome",
    "TrainedModel": "use.trained",
    "load": "use.model",
    "load_config": "config",
    "train": "trainer",
    "train_folds": "folds",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"dist_ae.{_HOMES[name]}"), name)
    if name == "objectives":
        return importlib.import_module("dist_ae.objectives")
    raise AttributeError(f"module 'dist_ae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
