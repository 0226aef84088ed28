"""Signals, and the agreement of all processes to stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from dist_ae.outcome import Stopped
from dist_ae.processes.environment import launched_world
from dist_ae.processes.runtime import Runtime
from dist_ae.terminal import EXIT_STOPPED, rank, say
from dist_ae.timeline import Asked

TOO_EARLY = "stopped before training began: there is nothing to save. The same command starts again"


class StopRequested(Exception):
    """A stop was requested during a longer piece of work. Every process raises it at the same point."""


class Signals:
    """SIGTERM and SIGINT as a request that is checked between two steps.

    Until there is something to save (``has_work``), a signal stops the run at once. In a process that belongs to the
    run (a command, or one of several processes) a thread ends the process: Python's own handlers only run once a
    blocking call into C++ returns, such as waiting for the other processes to join. In somebody else's process, such as
    a notebook, ``Stopped`` is raised.
    """

    ends_process = False  # set by a command, whose process belongs to the run

    def __init__(self) -> None:
        self.requested = False
        self.has_work = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Signals]:
        """Handles the signals for the length of a run. Outside the main thread there is nothing to handle."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        _end_with_parent()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(end is ours)
        thread = threading.Thread(target=self._end_at_once, args=(ours,), name="signals", daemon=True)
        thread.start()
        old_descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_descriptor)
            theirs.close()  # the thread reads this as the end
            thread.join()
            ours.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.has_work and not self._ends():
            raise Stopped(TOO_EARLY)

    def _ends(self) -> bool:
        return self.ends_process or launched_world()[1] > 1

    def _end_at_once(self, received: socket.socket) -> None:
        while numbers := received.recv(64):
            # Leave a signal alone that something else handles meanwhile, such as packing, which has work to save.
            handled = [
                n for n in (signal.SIGTERM, signal.SIGINT) if n in numbers and signal.getsignal(n) == self._handle
            ]
            if handled and not self.has_work and self._ends():
                if rank() == 0:
                    say(TOO_EARLY, sys.stderr)
                os._exit(EXIT_STOPPED)


def _end_with_parent() -> None:
    """Asks Linux for SIGTERM when the launcher dies, so that no orphan is left.

    A single-process `accelerate launch` passes no signal on.
    """
    if sys.platform == "linux" and ("ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Agreement:
    """All processes' common answer to "was any of us asked to stop?", about once a second, without using the device.

    Every process asks equally often, between pieces of work of about the same length. Steps have one agreement,
    evaluation batches another. The same exchange agrees on checkpoints by the clock.
    """

    SECONDS = 1.0

    def __init__(self, runtime: Runtime, signals: Signals, save_minutes: float | None = None) -> None:
        self._runtime, self._signals = runtime, signals
        self._calls, self._every, self._since = 0, 1, time.monotonic()
        self._save_every = float("inf") if save_minutes is None else 60 * save_minutes
        self.saved()

    def saved(self) -> None:
        """A checkpoint is on the disk: the next is due ``save_minutes`` from now."""
        self.save, self._save_at = False, time.monotonic() + self._save_every

    def asked(self) -> Asked:
        """Whether to stop, and whether to save a checkpoint; the same on every process."""
        return Asked(self.stop(), self.save)

    def stop(self) -> bool:
        """Whether to stop, the same on every process."""
        if self._runtime.world == 1:
            self.save = time.monotonic() >= self._save_at
            return self._signals.requested
        self._calls += 1
        if self._calls < self._every:
            return False
        now = time.monotonic()
        # The largest of each is bit-equal everywhere, so all processes count to the same next exchange. The interval at
        # most doubles, since the first calls come faster than the work whose length they measure.
        requests = float(self._signals.requested), float(now >= self._save_at), now - self._since
        stop, save, seconds = self._runtime.largest(*requests)
        self._every = max(1, min(2 * self._every, int(self.SECONDS * self._calls / max(seconds, 1e-6))))
        self._calls, self._since, self.save = 0, now, save > 0
        return stop > 0
