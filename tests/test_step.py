"""A step is the same operations with the same arguments, whatever its number and the size of its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ae.config import Config, InputError
from dist_ae.data import sources
from dist_ae.models import build
from dist_ae.presets import PRESETS
from dist_ae.processes.runtime import Runtime
from dist_ae.step import Learner
from dist_ae.timeline import Timeline

KINDS = ("ae", "denoising", "dropout", "vae")
CONVOLUTIONS = ("conv", "conv-denoising", "conv-dropout", "conv-vae")


class Operations(TorchDispatchMode):
    """What is dispatched: the operation, the shapes of its tensors, and every other argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return f"tensor {tuple(value.shape)} {value.dtype}"
            if isinstance(value, (list, tuple)):
                return [plain(part) for part in value]
            return value

        if str(function).startswith("profiler."):  # marks for torch's profiler, which a graph does not hold
            return function(*args, **(kwargs or {}))
        self.seen.append((str(function), str([plain(args), plain(sorted((kwargs or {}).items()))])))
        return function(*args, **(kwargs or {}))


def learner(config: Config) -> Learner:
    dataset = sources.load(config.data)
    steps = Timeline.of(config.train, len(dataset.train))
    made = Learner(config, dataset, build(config, dataset.image_shape), Runtime(config), steps)
    made.prepare()
    return made


def operations(made: Learner, step: int) -> list[tuple[str, str]]:
    made.place(step)
    with Operations() as recorded:
        made.compute(len(made.timeline.positions(step)))
    seen: list[tuple[str, str]] = recorded.seen
    return seen


OPTIMIZERS = [{"optim.name": name} for name in ("adam", "adamw", "muon", "sgd")]


@pytest.mark.parametrize("more", [*OPTIMIZERS, {"optim.clip_norm": 1.0, "train.ema_decay": 0.9}])
@pytest.mark.parametrize("preset", [*KINDS, *CONVOLUTIONS])
def test_two_steps_dispatch_the_same_operations_with_the_same_arguments(preset: str, more: dict[str, Any]) -> None:
    # What a CUDA graph needs: all that changes from step to step is in tensors. Warm-ups make rate and β change.
    changing = {"optim.warmup_steps": 10, "optim.schedule": "cosine", "objective.beta_warmup_steps": 10}
    changing |= {"model.widths": (8, 16), "precision": "fp32"}
    made = learner(PRESETS[preset].override({**SMALL, **changing, **more}))
    made.step(0)
    assert operations(made, 1) == operations(made, 2)


@pytest.mark.parametrize("preset", KINDS)
def test_the_number_of_operations_does_not_depend_on_the_batch(preset: str) -> None:
    counts = {}
    for kind in ("ae", preset):
        for size in (96, 1500):
            made = learner(PRESETS[kind].override({**SMALL, "train.batch_size": size}))
            made.step(0)
            counts[kind, size] = len(operations(made, 1))
    assert counts[preset, 96] == counts[preset, 1500]
    # Each stream adds few operations to those of the plain autoencoder: here the mathematics of the system and its
    # draws.
    streams = {"ae": 0, "denoising": 1, "dropout": 4, "vae": 1}[preset]
    mathematics = {"ae": 0, "denoising": 0, "dropout": 0, "vae": 60}[preset]
    assert counts[preset, 96] - counts["ae", 96] <= 4 * streams + mathematics


def test_a_graph_reads_every_steps_rows_also_after_a_short_batch() -> None:
    # A stand-in for a CUDA graph: it does the step's work, on the rows that lay where it was captured.
    config = PRESETS["denoising"].override(
        {**SMALL, "train.batch_size": 400}
    )  # 1,500 images: the fourth batch is short
    eager, graphed = learner(config), learner(config)
    graphed.place(0)
    captured = graphed._rows = graphed._graph_rows = graphed._rows.clone()

    class Replay:
        replays = 0

        def replay(self) -> None:
            self.replays += 1
            graphed._rows = captured
            graphed.compute(400)

    graphed.graph = Replay()  # type: ignore[assignment]
    for step in range(9):
        eager.step(step)
        graphed.step(step)
    assert graphed.graph.replays == 7  # type: ignore[union-attr]
    for a, b in zip(eager.parameters, graphed.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_graph_that_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.cuda_graph on: it needs a CUDA device"):
        learner(PRESETS["ae"].override({**SMALL, "train.cuda_graph": "on"}))
