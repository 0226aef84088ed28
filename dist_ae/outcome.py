"""How a run ends, and what it reports while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_ae.config import Fault
from dist_ae.terminal import EXIT_STOPPED


class Stopped(Exception):
    """A signal stopped the run; the same command resumes it."""

    exit_status = EXIT_STOPPED


class OutOfMemory(Fault):
    """A device had no memory left for a step or an evaluation."""


class NonFinite(Fault):
    """A loss or gradient was not finite. The weights are those before that step, and so is the last checkpoint."""


@dataclass(frozen=True)
class Result:
    """The result of a finished run, as in ``result.json``. ``metrics`` holds ``val.mse`` and so on."""

    metrics: dict[str, float]
    run_dir: Path
    steps: int
    world_size: int
    images_per_second: float
    weights_sha256: str
    best_step: int


@dataclass(frozen=True)
class Report:
    """What ``train`` passes to its caller after each evaluation, on every process. Metrics cover all processes."""

    step: int
    total_steps: int
    epoch: float
    metrics: dict[str, float]
    run_dir: Path


Reporter = Callable[[Report], None]
