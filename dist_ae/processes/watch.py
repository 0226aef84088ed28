"""Heartbeats, which show that a process is lost, and which one."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

from dist_ae.config import Fault
from dist_ae.processes.runtime import Runtime
from dist_ae.terminal import say

INTERVAL = 1.0  # seconds between two heartbeats
KNOWN_AFTER = 3 * INTERVAL  # a living process is heard from at least once in that time
LEFT = "left"  # in place of a heartbeat: this process left because others were lost, and is not lost itself


class LostProcess(Fault):
    """A process of the run died or stopped answering. The message names it and the step."""


def blame(silent_since: Mapping[int, float], answered: float, now: float, limit: float) -> list[int]:
    """The ranks that have not been heard from for ``limit`` seconds. All times are of one monotonic clock.

    Silence counts up to the store's last answer, since nothing is known of the time after it. A process that was silent
    by then went first, and a store that has just frozen does not count as the silence of others. Rank 0, which keeps
    the store, is blamed only if all others were well by then.

    Args:
        silent_since: when the heartbeat of each other rank last changed.
        answered: when the store last answered.
    """
    silent = [rank for rank, since in silent_since.items() if answered - since > limit]
    return silent or ([0] if now - answered > limit else [])


class Watch:
    """Sends this process's heartbeat once a second and watches those of the others.

    Python cannot interrupt a collective that waits for a dead or frozen process. So a thread ends the waiting process,
    with a message that names the lost one.
    """

    def __init__(self, runtime: Runtime, timeout: float) -> None:
        self.step, self._runtime, self._timeout = 0, runtime, timeout
        self._done = threading.Event()
        self._watching = runtime.world > 1 and "MASTER_ADDR" in os.environ
        if not self._watching:
            return
        self._host = socket.gethostname()
        wait = timedelta(seconds=min(timeout, 10))
        host = os.environ["MASTER_ADDR"]
        server = _listen(host, wait) if runtime.is_main else None
        port = runtime.on_main(lambda: server.port if server else 0)
        self._store = server or TCPStore(host, port, is_master=False, timeout=wait)
        self._beat()
        runtime.wait()
        self._answered = now = time.monotonic()
        self._heard: dict[int, tuple[bytes, float]] = dict.fromkeys(range(runtime.world), (b"", now))
        # Two threads: an exchange with a frozen store never returns, and the other thread must notice.
        work = (self._exchange, self._guard)
        self._threads = [threading.Thread(target=target, name="watch", daemon=True) for target in work]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        self._store.set(str(self._runtime.rank), f"{time.monotonic()} {self.step} {self._host}")

    def _exchange(self) -> None:
        while not self._done.is_set():
            try:
                self._beat()
                values = self._store.multi_get([str(rank) for rank in range(self._runtime.world)])
                now = self._answered = time.monotonic()
                for rank, value in enumerate(values):
                    if self._heard[rank][0] != value:
                        self._heard[rank] = (value, now)
            except DistNetworkError:  # the store is gone for good: `_answered` ages, and rank 0 gets the blame
                return
            except Exception:  # the store was slow to answer
                pass
            self._done.wait(INTERVAL)

    def _guard(self) -> None:
        while not self._done.wait(INTERVAL):
            if lost := self._lost(self._timeout):
                # The processes of a lost host fall silent within a heartbeat of each other: name them all.
                lost = self._lost(max(self._timeout - KNOWN_AFTER, KNOWN_AFTER)) or lost
                say(f"error: {self._describe(lost)}", sys.stderr)
                self._leave()
                os._exit(1)

    def _lost(self, limit: float) -> list[int]:
        present = {rank: since for rank, (value, since) in self._heard.items() if value.decode() != LEFT}
        others = {rank: since for rank, since in present.items() if rank != self._runtime.rank}
        return blame(others, self._answered, time.monotonic(), limit)

    def _describe(self, lost: list[int]) -> str:
        def known(rank: int) -> str:
            _, step, host = (*self._heard[rank][0].decode().split(" ", 2), "?", "?", "?")[:3]
            return f"rank {rank} (last known at step {step}, on host {host})"

        return (
            f"lost {', '.join(map(known, lost))} of {self._runtime.world} processes at step {self.step}; this one "
            "ends. The same command resumes from the last checkpoint"
        )

    def explain(self, error: Exception) -> Exception:
        """Why a collective failed: the processes that no longer answer, or the error itself if all answer."""
        if not self._watching:
            return error
        # Rank 0 stays longer: some processes wait for it, not for the one that died, and fail only when it leaves. By
        # then they must know which one was silent.
        time.sleep(KNOWN_AFTER + (4 if self._runtime.is_main else 1) * INTERVAL)
        lost = self._lost(KNOWN_AFTER)
        self._done.set()
        if lost:
            self._leave()
        return LostProcess(self._describe(lost)) if lost else error

    def _leave(self) -> None:
        """Tells the others, for at most a second, that this process is not lost."""

        def leave() -> None:
            with contextlib.suppress(Exception):
                self._store.set(str(self._runtime.rank), LEFT)

        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        thread.join(INTERVAL)

    def close(self) -> None:
        """Stops watching together with the others, so that the first to leave does not look lost."""
        self._done.set()
        if self._watching:
            # A thread that still talks to the store while the interpreter exits can abort the process, even though all
            # its work is done.
            for thread in self._threads:
                thread.join(10 * INTERVAL)
            self._runtime.wait()


def _listen(host: str, wait: timedelta) -> TCPStore:
    """Rank 0's store. It listens only on the main process's address; the default is to listen on all addresses."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(address[:2])
    except OSError:  # not an address of this machine, as behind a container's port mapping
        listener.bind(("", 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    handle = listener.detach()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=wait, master_listen_fd=handle)
