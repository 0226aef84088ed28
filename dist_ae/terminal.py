"""Output for a person. A closed or full terminal never stops a run."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again


def prepare_streams() -> None:
    """Makes the standard streams safe to use. Called once, before any file is opened.

    A closed stream (``>&-``) would hand its number to the next file opened, so it becomes the null device. A character
    that the terminal's encoding lacks is replaced.
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
    """Writes one line at once. A reader that is gone, or a full disk, silences the stream and ends nothing."""
    stream = stream or sys.stdout
    try:
        stream.write(f"{text}\n")  # not print, which Ray Train replaces by one that writes twice
        stream.flush()
    except (OSError, ValueError):
        silence(stream)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name where it has no message."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def rank() -> int:
    """This process's rank as the launcher gives it; 0 where it gives none that can be read."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def silence(stream: TextIO) -> None:
    """Sends everything written from now on to the null device, also what Python flushes at its end."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass  # a stream without a descriptor, such as a test's


class Waiting:
    """Says how far a long piece of work is, and about how long it still takes, after half a minute without a word.

    It is called with each part that is done. It never answers yes, so that it can stand where a question to stop does.
    """

    SECONDS = 30.0

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._since = self._said = time.monotonic()

    def __call__(self, parts: int = 1) -> bool:
        self._done += parts
        now = time.monotonic()
        if now - self._said >= self.SECONDS and rank() == 0:
            self._said = now
            of = "" if self._total is None else f" of {self._total:,}"
            left = time_left(now - self._since, self._done - self._first, (self._total or self._done) - self._done)
            say(f"{self._what}: {self._done:,}{of} {self._unit}{left if self._total else ''}", sys.stderr)
        return False


def time_left(seconds: float, done: float, left: float) -> str:
    """About how long what is left takes, where so much is done; "" where nothing can be said, or is worth saying."""
    if done <= 0 or left <= 0:
        return ""
    rest = seconds / done * left
    if rest < 10:
        return ""
    shown = f"{rest:.0f} s" if rest < 100 else f"{rest / 60:.0f} min" if rest < 6000 else f"{rest / 3600:.1f} h"
    return f", about {shown} left"
