"""Output to the terminal. A closed or full terminal never stops a run."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again


def prepare_streams() -> None:
    """Makes the standard streams safe to use. Called once, before any file is opened.

    The next opened file would get the descriptor of a closed stream (``>&-``), so such a stream becomes the null
    device. Characters that the terminal's encoding lacks are replaced.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Writes one line and flushes it. If the reader is gone or the disk is full, silences the stream."""
    stream = stream or sys.stdout
    try:
        stream.write(f"{text}\n")  # not print, which Ray Train replaces by one that writes twice
        stream.flush()
    except (OSError, ValueError):
        silence(stream)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def rank() -> int:
    """This process's rank from the launcher's environment; 0 if that has none, or an invalid one."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def silence(stream: TextIO) -> None:
    """Redirects all further output to the null device, including what Python flushes at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass  # a stream without a descriptor, such as a test's


class Waiting:
    """Reports the progress of long work, and about how long it still takes, after half a minute without a report.

    Call it with each finished part. It always returns False, so that it can serve as a ``Stop``.
    """

    SECONDS = 30.0

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._since = self._last_report = time.monotonic()

    def __call__(self, parts: int = 1) -> bool:
        self._done += parts
        now = time.monotonic()
        if now - self._last_report >= self.SECONDS and rank() == 0:
            self._last_report = now
            of = "" if self._total is None else f" of {self._total:,}"
            left = time_left(now - self._since, self._done - self._first, (self._total or self._done) - self._done)
            say(f"{self._what}: {self._done:,}{of} {self._unit}{left if self._total else ''}", sys.stderr)
        return False


def time_left(seconds: float, done: float, left: float) -> str:
    """About how long the work that is left takes; "" if that is unknown, or too short to mention."""
    if done <= 0 or left <= 0:
        return ""
    rest = seconds / done * left
    if rest < 10:
        return ""
    shown = f"{rest:.0f} s" if rest < 100 else f"{rest / 60:.0f} min" if rest < 6000 else f"{rest / 3600:.1f} h"
    return f", about {shown} left"
