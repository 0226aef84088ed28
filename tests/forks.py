"""Processes forked from a clean one: as real as any, and started in milliseconds instead of seconds.

The clean one imports what the product needs and does nothing else. Forked from pytest itself, they would begin with
what other tests left there: threads that are gone in the copy, and once a broken heap.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import cloudpickle

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(
    [
        *("pytest", "hypothesis", "accelerate", "torchmetrics", "sklearn.datasets", "sklearn.decomposition"),
        *("skimage.restoration", "PIL.PngImagePlugin", "PIL.JpegImagePlugin"),
        # What a run of one process imports on its way, 0.9 s, and one of several, 1.9 s: torch's compiler, too.
        *("torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"),
        *("dist_ae.__main__", "dist_ae.trainer", "dist_ae.figures", "dist_ae.use.commands", "dist_ae.use.evaluation"),
        *("dist_ae.use.anomalies", "dist_ae.use.doctor", "dist_ae.use.explore", "dist_ae.data.pack"),
    ]
)


class Process:
    """``work()`` in a process of its own, with an environment and files for what it says."""

    def __init__(self, work: Callable[[], object], variables: Mapping[str, str], out: Path, err: Path) -> None:
        self.out, self.err = out, err
        start = (cloudpickle.dumps(work), dict(variables), os.getcwd(), out, err)
        self._process = CLEAN.Process(target=_begin, args=start)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Raises TimeoutExpired after killing it."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            said = self.out.read_text() + self.err.read_text()
            raise subprocess.TimeoutExpired(f"process {self.pid}, which said: {said}", timeout)
        return self.returncode


def command(*words: str) -> Callable[[], object]:
    """What ``python *words`` does, for ``-m module`` and ``-c code``."""

    def work() -> None:
        if words[0] == "-c":
            sys.argv = list(words[:1] + words[2:])
            sys.path.insert(0, "")
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(words[1:])
            sys.modules.pop(f"{words[1]}.__main__", None)  # a program finds itself fresh
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)

    return work


def _begin(work: bytes, variables: dict[str, str], folder: str, out: Path, err: Path) -> None:
    gc.freeze()  # what is shared with the clean one stays shared: the collector would write to all of it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    status = 1
    try:
        cloudpickle.loads(work)()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        status = getattr(error, "exit_status", 1)
        traceback.print_exc()
    # What Python does when a program ends.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
