"""Processes wait for each other before they form a group: one of them may first have hours of packing to do."""

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
# Kept as long as the process lives: if rank 0 closed its store after a run, a process that already forms the next group
# would connect to a server that is about to end.
_stores: dict[tuple[str, int], TCPStore] = {}
_groups = itertools.count()  # every process forms as many, so their numbers agree


def _group_name() -> str:
    """A name that no earlier group has. torch leaves the addresses of earlier groups in the store.

    A launcher of one host counts its restarts; those of several hosts count each for themselves.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return f"dist_ae/{restarts}/{next(_groups)}"


class Arrival:
    """A sign of life of each process, once a second, until all are ready to form their group.

    Signs of life go through torch's rendezvous store, which then also forms the group. After ``timeout`` seconds the
    other processes name one that fell silent before it was ready, or that never came. A process that still works may
    take as long as it likes.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.world = launched_world()
        self._timeout = timeout
        self._store: PrefixStore | None = None
        self._error: RuntimeError | None = None
        self._done, self._connected = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._give_signs, name="arrival", daemon=True)
        self._needed = self.world > 1 and not dist.is_initialized()
        if self._needed:
            self._name = _group_name()
            self._thread.start()

    def _give_signs(self) -> None:
        try:
            self._store = self._connect()
        except (RuntimeError, OSError) as error:
            self._error = RuntimeError(str(error))
        self._connected.set()
        with contextlib.suppress(Exception):  # the store is gone: the other processes report it
            while self._store is not None and not self._done.is_set():
                self._store.set(f"host/{self.rank}", socket.gethostname())
                self._store.add(f"alive/{self.rank}", 1)
                self._done.wait(INTERVAL)

    def _connect(self) -> PrefixStore | None:
        host, port = address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=max(1.0, self._timeout))
        if address not in _stores:
            is_server = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            if not is_server and not self._reaches(address):
                return None
            _stores[address] = TCPStore(
                host, port, self.world, is_server, wait, wait_for_workers=False, multi_tenant=True
            )
        _stores[address].set_timeout(wait)
        return PrefixStore(self._name, _stores[address])

    def _reaches(self, address: tuple[str, int]) -> bool:
        """Waits for the store in short attempts, so that the thread can end at any time."""
        end = time.monotonic() + self._timeout
        while not self._done.is_set():
            try:
                socket.create_connection(address, INTERVAL).close()
                return True
            except OSError:
                if time.monotonic() > end:
                    raise
                self._done.wait(INTERVAL / 4)
        return False

    def meet(self) -> PrefixStore | None:
        """Waits until every process is ready, and returns the store of their group; None if no group is to be formed.

        Raises:
            InputError: other hosts cannot reach the main process's address.
            Fault: a process never came or ended before it was ready, or the store cannot be reached.
        """
        if not self._needed:
            return None
        with interface_to_main(True):  # raises for an address that other hosts cannot reach
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
        last_sign, checked, reported = dict.fromkeys(range(self.world), (0, time.monotonic())), time.monotonic(), False
        while self._store.add("ready", 0) < self.world:
            time.sleep(INTERVAL / 10)
            now = time.monotonic()
            if now - checked < max(INTERVAL, self.world / 50):
                continue
            checked = now
            not_ready = [rank for rank in last_sign if not self._store.add(f"ready/{rank}", 0)]
            for rank in not_ready:
                count = self._store.add(f"alive/{rank}", 0)
                last_sign[rank] = (count, now) if count != last_sign[rank][0] else last_sign[rank]
            lost = [rank for rank in not_ready if now - last_sign[rank][1] > self._timeout]
            if lost:
                places = ", ".join(f"rank {rank} ({self._place(rank, last_sign[rank][0])})" for rank in lost[:8])
                raise Fault(
                    f"{places} of {self.world} processes did not get ready, and gave no sign of life for "
                    f"{self._timeout:g} s (train.timeout): it ended (see its own messages), or its host is lost"
                )
            if not_ready and not reported and self.rank == 0:
                say(f"waiting for rank {', '.join(map(str, not_ready[:8]))}, still at work on its data", sys.stderr)
                reported = True
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
