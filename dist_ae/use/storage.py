"""Tests whether a file system can append, rename and lock as run directories need: `dist-ae doctor --storage DIR`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dist_ae.config import InputError
from dist_ae.files import sync, write_atomically, write_new

SECONDS = 60.0  # how long another process may take
# Another process that reads a file again and again while it is replaced: for at least that time and that often.
READ = """
import sys, time
path, seconds, times = sys.argv[1], 0.5, 200
print(flush=True)
end, number = time.monotonic() + seconds, 0
while number < times or time.monotonic() < end:
    number += 1
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        sys.exit(print("no file:", error.strerror))
    if len(data) != 4096 or len(set(data)) != 1:
        sys.exit(print("a torn file"))
"""
# Another process that takes a lock, reports it, and keeps it.
HOLD = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
time.sleep(600)
"""


def examine_storage(folder: Path) -> Iterator[tuple[bool, str]]:
    """(whether it works, description) of each feature of the file system that run directories and sweeps need.

    Tests run in a new folder, which is removed afterwards. They do not cover what other hosts see.

    Raises:
        InputError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"--storage {folder}: not a folder")
    try:
        test_folder = Path(tempfile.mkdtemp(prefix=".dist-ae-storage-", dir=folder))
    except OSError as error:
        yield False, f"a new folder: {error.strerror}. Nothing can be kept here"
        return
    try:
        for what, consequence, check in CHECKS:
            try:
                detail = check(test_folder)
            except Exception as error:  # file systems fail in many ways
                yield False, f"{what}: {getattr(error, 'strerror', None) or error}. {consequence}"
            else:
                yield True, f"{what}: {detail}" if detail else what
    finally:
        shutil.rmtree(test_folder, ignore_errors=True)


class Fails(Exception):
    """A file system does not behave as it should."""


def _append(folder: Path) -> None:
    path = folder / "appended"
    for part in (b"one", b"two"):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, part)
        finally:
            os.close(descriptor)
    if path.read_bytes() != b"onetwo":
        raise Fails(f"what is appended reads as {path.read_bytes()!r}")


def _sync(folder: Path) -> str:
    seconds = []
    for number in range(10):
        since = time.perf_counter()
        write_new(folder / f"synced-{number}", b"x")
        sync(folder)
        seconds.append(time.perf_counter() - since)
    return f"{1000 * statistics.median(seconds):.2f} ms for a small file with its folder"


def _replace(folder: Path) -> None:
    """Checks that another process that reads all the time always finds the whole old or the whole new content."""
    path, temporary = folder / "replaced", folder / "replacing"
    contents = [bytes([65 + number]) * 4096 for number in range(2)]
    write_atomically(path, contents[0])
    command = [sys.executable, "-c", READ, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
        try:
            assert reader.stdout is not None
            reader.stdout.readline()  # it has begun
            number, end = 0, time.monotonic() + SECONDS
            while reader.poll() is None and time.monotonic() < end:
                number += 1
                temporary.write_bytes(contents[number % 2])
                os.replace(temporary, path)
            problem, _ = reader.communicate(timeout=SECONDS)
        finally:
            reader.kill()
    if problem:
        raise Fails(f"a reader found {problem.strip()}")


def _rename_folder(folder: Path) -> None:
    (folder / "before").mkdir()
    write_new(folder / "before" / "file", b"x")
    os.rename(folder / "before", folder / "after")
    sync(folder)
    if (folder / "before").exists() or (folder / "after" / "file").read_bytes() != b"x":
        raise Fails("the folder is not where it was moved")


def _lock(folder: Path) -> None:
    path = folder / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    timer = threading.Timer(SECONDS, holder.kill)
    timer.start()
    try:
        assert holder.stdout is not None and holder.stderr is not None
        if not holder.stdout.readline():
            holder.kill()
            lines = holder.stderr.read().decode(errors="replace").strip().splitlines()
            raise Fails(lines[-1] if lines else f"no lock was granted within {SECONDS:g} s")
        with contextlib.suppress(Timeout), FileLock(path).acquire(blocking=False):
            raise Fails("two processes hold the same lock")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        FileLock(path).acquire(timeout=5).lock.release()  # the lock of the killed process is free
    except Timeout:
        raise Fails("a killed process keeps its lock") from None
    finally:
        timer.cancel()
        holder.kill()
        holder.communicate()


# A feature, the consequence without it, and its test.
CHECKS: list[tuple[str, str, Callable[[Path], str | None]]] = [
    ("a file is added to at its end", "metrics.jsonl cannot be kept here", _append),
    ("a file and a folder are synced", "A power cut can cost checkpoints that were reported as saved", _sync),
    ("a file is replaced at once", "A crash can leave half a file, and a reader can meet one", _replace),
    ("a folder is renamed", "Checkpoints cannot be published here", _rename_folder),
    ("a lock holds, and ends with its process", "Two jobs could write one run, or none after a crash", _lock),
]
