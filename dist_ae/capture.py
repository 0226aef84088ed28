"""Work captured as one CUDA graph: the same kernels in the same order, launched by one call."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from dist_ae import devices
from dist_ae.terminal import first_line, say

WARM_UPS = 3  # before a capture, as torch recommends; with DDP, 11


class Graph:
    """Captured work. The tensors that it reads and changes must keep their places in memory."""

    def __init__(
        self, work: Callable[[], None], recorded: Callable[[], None], device: torch.device, warm_ups: int
    ) -> None:
        self._device = device
        with devices.current(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            # Also around the capture: if the capture fails at its end, torch does not leave the stream itself.
            with torch.cuda.stream(stream):
                for _ in range(warm_ups):
                    work()
                stream.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                # Other threads (the reader's, NCCL's watchdog) run on, and their calls must not spoil the capture.
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    recorded()
            torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        """Repeats the work, on the present values of the tensors that it reads."""
        with devices.current(self._device):
            self._graph.replay()


def capture(
    work: Callable[[], None],
    state: list[Tensor],
    device: torch.device,
    *,
    recorded: Callable[[], None] | None = None,
    drop: Callable[[], None] = lambda: None,
    warm_ups: int = WARM_UPS,
) -> Graph | None:
    """A graph of ``work``, tried once and found to give the same result as the work itself, to the bit.

    Returns None, with a warning, if it does not. Warm-ups, capture and trial leave no trace: ``state`` is restored.

    Args:
        state: all tensors that the work changes and that outlive it.
        recorded: the work as it is captured, if that differs from ``work``.
        drop: discards whatever else the work leaves behind. A failed capture leaves memory that was never written.
    """
    before = [tensor.clone() for tensor in state]

    def outcome(act: Callable[[], None]) -> list[Tensor]:
        act()
        after = [tensor.clone() for tensor in state]
        _restore(state, before)
        return after

    graph, problem = None, ""
    try:
        graph = Graph(work, recorded or work, device, warm_ups)
        _restore(state, before)
        eager, graphed = outcome(work), outcome(graph.replay)
        if not all(torch.equal(a, b) for a, b in zip(eager, graphed, strict=True)):
            problem = "the captured step differs from the step itself"
    except RuntimeError as error:
        _restore(state, before)
        problem = f"the step could not be captured as a CUDA graph ({first_line(error)})"
    if problem:
        drop()
        say(f"warning: {problem}; it runs without one", sys.stderr)
        return None
    return graph


@torch.no_grad()
def _restore(state: list[Tensor], before: list[Tensor]) -> None:
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)
