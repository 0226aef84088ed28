"""Heartbeats, so that the loss of a process is noticed and named."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dist_ae.processes.runtime import Runtime


class LostProcess(Exception):
    """A process of the run died or stopped answering; the message names it and the step."""

    exit_status = 1


class Watch:
    """Each process's heartbeat, once a second, so that the others can name who is lost and end instead of waiting for ever.

    A collective that waits for a dead or frozen process cannot be interrupted from Python: a thread ends the process in its place.
    """

    INTERVAL = 1.0  # seconds

    def __init__(self, runtime: Runtime, timeout: float) -> None:
        self.step, self._runtime, self._timeout = 0, runtime, timeout
        self._done = threading.Event()
        self._watching = runtime.world > 1 and "MASTER_ADDR" in os.environ
        if not self._watching:
            return
        wait = timedelta(seconds=min(timeout, 10))
        host = os.environ["MASTER_ADDR"]
        server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait) if runtime.is_main else None
        port = runtime.on_main(lambda: server.port if server else 0)
        self._store = server or TCPStore(host, port, is_master=False, timeout=wait)
        self._beat()
        runtime.wait()
        now = time.monotonic()
        self._answered = now  # when the store, which rank 0 keeps, last answered
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(
            range(runtime.world), (b"", now)
        )  # last heartbeat, since when
        # Two threads: an exchange with a frozen store does not come back, and somebody must notice.
        self._threads = [
            threading.Thread(target=work, name="watch", daemon=True) for work in (self._exchange, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        self._store.set(str(self._runtime.rank), f"{time.monotonic()} {self.step}")

    def _exchange(self) -> None:
        while not self._done.is_set():
            with contextlib.suppress(Exception):  # the store is gone: `_answered` ages, and rank 0 is named
                self._beat()
                values = self._store.multi_get([str(rank) for rank in range(self._runtime.world)])
                now = self._answered = time.monotonic()
                for rank, value in enumerate(values):
                    if self._seen[rank][0] != value:
                        self._seen[rank] = (value, now)
            self._done.wait(self.INTERVAL)

    def _guard(self) -> None:
        while not self._done.wait(self.INTERVAL):
            if lost := self._lost(self._timeout):
                print(f"error: {self._describe(lost)}", file=sys.stderr, flush=True)
                os._exit(1)

    def _lost(self, seconds: float) -> list[int]:
        """The processes that were not heard of for so long."""
        # Up to the store's last answer, since of the time after it nothing is known: who was silent by then went first, and a store
        # that just froze is no one else's silence. Only when all others were well by then is it rank 0, which keeps the store.
        silent = [
            rank
            for rank, (_, since) in self._seen.items()
            if self._answered - since > seconds and rank != self._runtime.rank
        ]
        return silent or ([0] if time.monotonic() - self._answered > seconds else [])

    def _describe(self, lost: list[int]) -> str:
        steps = {rank: self._seen[rank][0].decode().partition(" ")[2] or "?" for rank in lost}
        who = ", ".join(f"rank {rank} (last known at step {step})" for rank, step in steps.items())
        return f"lost {who} of {self._runtime.world} processes at step {self.step}; this one ends. The same command goes on from the last checkpoint"

    def explain(self, error: Exception) -> Exception:
        """What a failed collective was: the processes that no longer answer, or the error itself where all do."""
        if not self._watching:
            return error
        # The living are heard of at least once in that time. Rank 0 stays longer: some wait for it and not for the one that died, and
        # find out when it leaves; by then they must have heard who was silent.
        time.sleep((7 if self._runtime.is_main else 4) * self.INTERVAL)
        lost = self._lost(3 * self.INTERVAL)
        self._done.set()
        return LostProcess(self._describe(lost)) if lost else error

    def close(self) -> None:
        """Ends watching, together with the others: none takes the first to leave for lost."""
        self._done.set()
        if self._watching:
            # A thread that still talks to the store while the interpreter ends can abort the process after all its work is done.
            for thread in self._threads:
                thread.join(10 * self.INTERVAL)
            self._runtime.wait()
