"""A training step as one CUDA graph: the same kernels in the same order, launched by one call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_ae.config import InputError
from dist_ae.terminal import say

if TYPE_CHECKING:
    from dist_ae.step import Learner

WARM_UPS = 3  # as torch asks for before a capture


def obstacle(learner: Learner) -> str | None:
    """Why the step of a run cannot be a graph, if so."""
    config, runtime = learner.config, learner.runtime
    reasons = {
        "it needs a CUDA device": runtime.device.type != "cuda",
        "it is for one process so far": runtime.world > 1,
        "its learning rate must live on the device, which adam and adamw can": config.optim.name
        not in ("adam", "adamw"),
        "float64 keeps its learning rate on the host": config.precision == "fp64",
        "fp16's gradient scaler reads back from the device": runtime.accelerator.scaler is not None,
        "the images do not fit on the device": learner.images.resident is None,
        "the random draws need Triton on the device": not learner.draws_on_device,
        "torch.compile makes graphs of its own": config.train.compile,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def wants_graph(learner: Learner) -> bool:
    """Whether the step is to be captured.

    Raises:
        InputError: it is asked for and cannot be, with the reason.
    """
    asked = learner.config.train.cuda_graph
    if asked == "off":
        return False
    reason = obstacle(learner)
    if asked == "on" and reason is not None:
        raise InputError(f"train.cuda_graph on: {reason}; use auto or off")
    return reason is None


class Graph:
    """A captured ``Learner.compute`` of a full batch."""

    def __init__(self, learner: Learner) -> None:
        size = learner.config.train.batch_size
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                learner.compute(size)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            learner.compute(size)

    def replay(self) -> None:
        self._graph.replay()


def capture(learner: Learner) -> Graph | None:
    """A graph of the step that was seen to give what the step gives, to the bit; None, with a warning, where it did not.

    Warm-ups, capture and the trial change no state: everything that a step changes is put back.
    """
    state = learner.changed_by_a_step()
    before = [tensor.clone() for tensor in state]

    def after(work: object) -> list[Tensor]:
        learner.place(0)
        work()  # type: ignore[operator]
        found = [tensor.clone() for tensor in state]
        restore(state, before)
        return found

    try:
        learner.place(0)
        graph = Graph(learner)
        restore(state, before)
        eager = after(lambda: learner.compute(learner.config.train.batch_size))
        graphed = after(graph.replay)
    except RuntimeError as error:
        restore(state, before)
        say(f"warning: the step could not be captured as a CUDA graph ({str(error).splitlines()[0]})", sys.stderr)
        return None
    if not all(torch.equal(a, b) for a, b in zip(eager, graphed, strict=True)):
        say("warning: the captured step differs from the step itself; it is not used", sys.stderr)
        return None
    return graph


@torch.no_grad()
def restore(state: list[Tensor], before: list[Tensor]) -> None:
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)
