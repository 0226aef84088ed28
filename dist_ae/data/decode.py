"""Pictures decoded in processes of their own, in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING

from dist_ae.data.form import Content, Form, Page, Read, decode_all
from dist_ae.errors import InputError

if TYPE_CHECKING:
    from dist_ae.data.pictures import Picture  # whose configuration takes a decoding process half a second to load

CHUNK = 32  # most pictures that a decoding process gets at once
CHUNK_BYTES = 32 << 20  # of pictures that come as bytes: a chunk, or what is looked at first, ends there
HELD_BYTES = 256 << 20  # of pictures that wait for a decoding process
INLINE = 64  # so few pictures are decoded sooner than a process starts


class DecoderKilled(InputError):
    """A decoding process was killed. What is packed so far can still be used."""


def decoded(
    pictures: Iterator[Picture],
    form: Form,
    count: int | None,
    work: Callable[[list[Content], Form], list[Read]] | None = None,
) -> Iterator[tuple[Picture, Read]]:
    """Each picture and what became of it, in order; decoded on all cores, a bounded number of pictures at a time.

    Args:
        work: what is done to some of them, in a process of its own; None: they are decoded.
    """
    work = work or decode_all
    workers = cores()
    head = some(pictures, INLINE)
    if workers == 1 or (len(head) < INLINE and size_of(head) < CHUNK_BYTES) or count == len(head):
        for picture in itertools.chain(head, pictures):
            yield picture, work([picture.content], form)[0]
        return
    size = CHUNK if count is None else max(1, min(CHUNK, count // (4 * workers)))  # of few, none waits for the others
    chunks = _chunks(itertools.chain(head, pictures), size)
    executor = ProcessPoolExecutor(workers, mp_context=_Context(), initializer=_begin)
    try:
        pending: deque[tuple[list[Picture], Future[list[Read]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, executor.submit(work, [picture.content for picture in chunk], form)))
            while len(pending) >= 3 * workers or sum(size_of(waiting) for waiting, _ in pending) > HELD_BYTES:
                yield from _delivered(*pending.popleft())
        while pending:
            yield from _delivered(*pending.popleft())
    except BrokenProcessPool:
        raise DecoderKilled("a process that decodes pictures was killed, most likely for lack of memory") from None
    finally:
        executor.shutdown(cancel_futures=True)


def cores() -> int:
    """Cores that this process may use; at most the 61 processes that Windows can wait for, where nothing tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else min(61, os.cpu_count() or 1)


def processes_here() -> int:
    """Processes of this run on this machine, which share its cores and its memory."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(here) if here.isdecimal() else 1)


def size_of(pictures: list[Picture]) -> int:
    """Bytes that these pictures hold in memory before they are decoded."""
    return sum(map(_held, pictures))


def _held(picture: Picture) -> int:
    content = picture.content.content if isinstance(picture.content, Page) else picture.content
    return len(content) if isinstance(content, bytes) else 0


def some(pictures: Iterator[Picture], most: int) -> list[Picture]:
    """The next pictures: at most so many, and fewer where their bytes take much memory."""
    found: list[Picture] = []
    held = 0
    while len(found) < most and held < CHUNK_BYTES and (picture := next(pictures, None)) is not None:
        found.append(picture)
        held += _held(picture)
    return found


def _chunks(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    while chunk := some(pictures, size):
        yield chunk


def _delivered(chunk: list[Picture], future: Future[list[Read]]) -> Iterator[tuple[Picture, Read]]:
    return zip(chunk, future.result(), strict=True)


def _begin() -> None:
    """Sets up a decoding process: it leaves Ctrl-C to its parent and ends with it, however the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


class _Process(SpawnProcess):
    def start(self) -> None:
        # A spawned process imports the main script again; a script without a __main__ guard would train once more.
        # Decoding needs nothing from that script.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process  # fork would copy locks that torch's threads hold
