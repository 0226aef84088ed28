"""A piece of work as one CUDA graph: the same kernels in the same order, launched by one call."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from dist_ae.terminal import first_line, say

WARM_UPS = 3  # as torch asks for before a capture


class Graph:
    """Captured work. The tensors that it reads and changes must keep their places in memory."""

    def __init__(self, work: Callable[[], None]) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work()

    def replay(self) -> None:
        """Does the work again, on what now lies in the places that it read."""
        self._graph.replay()


def capture(work: Callable[[], None], state: list[Tensor]) -> Graph | None:
    """A graph of ``work`` that was seen to give the same as the work itself, to the bit.

    None, with a warning, where it did not. Warm-ups, capture and trial leave no trace: ``state``, all that the work
    changes, is put back.
    """
    before = [tensor.clone() for tensor in state]

    def outcome(act: Callable[[], None]) -> list[Tensor]:
        act()
        after = [tensor.clone() for tensor in state]
        _restore(state, before)
        return after

    try:
        graph = Graph(work)
        _restore(state, before)
        eager, graphed = outcome(work), outcome(graph.replay)
    except RuntimeError as error:
        _restore(state, before)
        say(f"warning: the step could not be captured as a CUDA graph ({first_line(error)})", sys.stderr)
        return None
    if not all(torch.equal(a, b) for a, b in zip(eager, graphed, strict=True)):
        say("warning: the captured step differs from the step itself; it is not used", sys.stderr)
        return None
    return graph


@torch.no_grad()
def _restore(state: list[Tensor], before: list[Tensor]) -> None:
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)
