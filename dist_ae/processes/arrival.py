"""Processes wait for each other before their group forms: one of them may have hours of packing to do first."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dist_ae.config import Fault
from dist_ae.processes.environment import explained_rendezvous, interface_to_main, launched_world
from dist_ae.terminal import say

INTERVAL = 1.0  # seconds between two signs of life
# Kept for as long as the process lives: one that forms its next group while rank 0 still leaves the last one would
# find a server that is about to end.
_stores: dict[tuple[str, int], TCPStore] = {}
_groups = itertools.count()  # every process forms as many, so their numbers agree


def _name_of_group() -> str:
    """Keeps a group from the addresses of those before it, which torch leaves in the store.

    A launcher of one host counts its restarts; those of several hosts count each for themselves.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return f"dist_ae/{restarts}/{next(_groups)}"


class Arrival:
    """A sign of life of each process, once a second, until all are ready to form their group.

    It goes through torch's rendezvous store, in which the group is formed then. A process that falls silent before it
    is ready, or never comes, is named by the others after ``timeout`` seconds; one that is at work may take as long as
    it likes.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.world = launched_world()
        self._timeout = timeout
        self._store: PrefixStore | None = None
        self._error: RuntimeError | None = None
        self._done, self._connected = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="arrival", daemon=True)
        self._needed = self.world > 1 and not dist.is_initialized()
        if self._needed:
            self._name = _name_of_group()
            self._thread.start()

    def _live(self) -> None:
        try:
            self._store = self._connect()
        except (RuntimeError, OSError) as error:
            self._error = RuntimeError(str(error))
        self._connected.set()
        with contextlib.suppress(Exception):  # a store that is gone: the others say so
            while self._store is not None and not self._done.is_set():
                self._store.set(f"host/{self.rank}", socket.gethostname())
                self._store.add(f"alive/{self.rank}", 1)
                self._done.wait(INTERVAL)

    def _connect(self) -> PrefixStore | None:
        host, port = where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=max(1.0, self._timeout))
        if where not in _stores:
            keeps = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            if not keeps and not self._reaches(where):
                return None
            _stores[where] = TCPStore(host, port, self.world, keeps, wait, wait_for_workers=False, multi_tenant=True)
        _stores[where].set_timeout(wait)
        return PrefixStore(self._name, _stores[where])

    def _reaches(self, where: tuple[str, int]) -> bool:
        """Waits for the store, in short trials, so that the thread can end at any time."""
        end = time.monotonic() + self._timeout
        while not self._done.is_set():
            try:
                socket.create_connection(where, INTERVAL).close()
                return True
            except OSError:
                if time.monotonic() > end:
                    raise
                self._done.wait(INTERVAL / 4)
        return False

    def meet(self) -> PrefixStore | None:
        """Waits until every process is ready, and returns the store of their group; None where none is to be formed.

        Raises:
            InputError: the main process's address is one that other hosts cannot reach.
            Fault: processes that are not there, or ended before they were ready, or a store that cannot be reached.
        """
        if not self._needed:
            return None
        with interface_to_main(True):  # finds an address that cannot be
            pass
        with explained_rendezvous(self._timeout):
            return PrefixStore("group", self._ready())

    def _ready(self) -> PrefixStore:
        self._connected.wait()
        if self._error is not None:
            raise self._error
        assert self._store is not None
        self._store.add(f"ready/{self.rank}", 1)
        self._store.add("ready", 1)
        heard, looked, said = dict.fromkeys(range(self.world), (0, time.monotonic())), time.monotonic(), False
        while self._store.add("ready", 0) < self.world:
            time.sleep(INTERVAL / 10)
            now = time.monotonic()
            if now - looked < max(INTERVAL, self.world / 50):
                continue
            looked = now
            late = [rank for rank in heard if not self._store.add(f"ready/{rank}", 0)]
            for rank in late:
                count = self._store.add(f"alive/{rank}", 0)
                heard[rank] = (count, now) if count != heard[rank][0] else heard[rank]
            lost = [rank for rank in late if now - heard[rank][1] > self._timeout]
            if lost:
                places = ", ".join(f"rank {rank} ({self._place(rank, heard[rank][0])})" for rank in lost[:8])
                raise Fault(
                    f"{places} of {self.world} processes did not get ready, and gave no sign of life for "
                    f"{self._timeout:g} s (train.timeout): it ended, as its own messages tell, or its host is lost"
                )
            if late and not said and self.rank == 0:
                say(f"waiting for rank {', '.join(map(str, late[:8]))}, still at work on its data", sys.stderr)
                said = True
        return self._store

    def _place(self, rank: int, alive: int) -> str:
        assert self._store is not None
        return f"on host {self._store.get(f'host/{rank}').decode()}" if alive else "never heard of"

    def close(self) -> None:
        self._done.set()
        if self._needed:
            self._thread.join(5 * INTERVAL)
        self._store = None


@contextlib.contextmanager
def arriving(timeout: float) -> Iterator[Arrival]:
    """An ``Arrival`` for as long as a process gets ready and joins the others."""
    arrival = Arrival(timeout)
    try:
        yield arrival
    finally:
        arrival.close()
