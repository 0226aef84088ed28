"""Tries out what run directories and sweeps need of a file system: ``dist-ae doctor --storage DIR``."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
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

SIZE = 64 << 20  # bytes of the file that speed is measured with
SECONDS = 60.0  # how long another process may take for what it is asked to do
REPLACING = 0.5  # seconds for which a file is replaced again and again while another process reads it
READ = """
import os, sys
path, enough = sys.argv[1:]
print(flush=True)
while not os.path.exists(enough):
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        sys.exit(print("no file:", error.strerror))
    if len(data) != 4096 or len(set(data)) != 1:
        sys.exit(print("a torn file"))
"""
# Another process that takes a lock, says so, and keeps it.
HOLD = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
time.sleep(600)
"""


def examine_storage(folder: Path) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what) for each thing that run directories and sweeps need of the storage they lie on.

    Everything is tried in a folder of its own, which is removed afterwards. What other hosts see is not tried.

    Raises:
        InputError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"--storage {folder}: not a folder")
    try:
        own = Path(tempfile.mkdtemp(prefix=".dist-ae-storage-", dir=folder))
    except OSError as error:
        yield False, f"a new folder: {error.strerror}. Nothing can be kept here"
        return
    try:
        for what, otherwise, check in CHECKS:
            try:
                found = check(own)
            except Exception as error:  # whatever error a file system comes up with is its answer
                yield False, f"{what}: {getattr(error, 'strerror', None) or error}. {otherwise}"
            else:
                yield True, f"{what}: {found}" if found else what
    finally:
        shutil.rmtree(own, ignore_errors=True)


class Fails(Exception):
    """A file system does what it should not do."""


def _free(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 1e9:,.1f} of {usage.total / 1e9:,.1f} GB"


def _exclusive(folder: Path) -> None:
    write_new(folder / "exclusive", b"first")
    with contextlib.suppress(FileExistsError):
        write_new(folder / "exclusive", b"second")
        raise Fails("a file that exists is created again")


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
    """Checks that another process, which reads all the time, finds either the old content or the new one, whole."""
    path, temporary, enough = folder / "replaced", folder / "replacing", folder / "enough"
    contents = [bytes([65 + number]) * 4096 for number in range(2)]
    write_atomically(path, contents[0])
    command = [sys.executable, "-c", READ, str(path), str(enough)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
        try:
            assert reader.stdout is not None
            reader.stdout.readline()  # it has begun
            number, end = 0, time.monotonic() + REPLACING
            while time.monotonic() < end and reader.poll() is None:
                number += 1
                temporary.write_bytes(contents[number % 2])
                os.replace(temporary, path)
            enough.touch()
            found, _ = reader.communicate(timeout=SECONDS)
        finally:
            reader.kill()
    if found:
        raise Fails(f"a reader found {found.strip()}")


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
            said = holder.stderr.read().decode(errors="replace").strip().splitlines()
            raise Fails(said[-1] if said else f"none was given within {SECONDS:g} s")
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


def _visible(folder: Path) -> None:
    told = secrets.token_hex(16)
    command = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    path = folder / "told"
    list(folder.iterdir())  # a network file system's client may remember this listing
    subprocess.run([sys.executable, "-c", command, str(path), told], check=True, timeout=SECONDS, capture_output=True)
    if path not in list(folder.iterdir()) or path.read_text() != told:
        raise Fails("what another process wrote is not there")


def _map(folder: Path) -> None:
    data = secrets.token_bytes(1 << 20)
    write_new(folder / "mapped", data)
    with open(folder / "mapped", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if mapped[:] != data:
            raise Fails("a mapped file has other bytes")


def _speed(folder: Path) -> str:
    data, path = secrets.token_bytes(SIZE), folder / "large"
    since = time.perf_counter()
    write_new(path, data)
    written, since = time.perf_counter() - since, time.perf_counter()
    if path.read_bytes() != data:
        raise Fails(f"{SIZE >> 20} MiB come back different")
    read = time.perf_counter() - since
    rates = SIZE / 1e6 / written, SIZE / 1e6 / read
    return f"{rates[0]:,.0f} MB/s written and synced, {rates[1]:,.0f} MB/s read back (maybe from memory)"


# What is needed, what becomes of a run without it, and how it is tried.
CHECKS: list[tuple[str, str, Callable[[Path], str | None]]] = [
    ("free space", "A checkpoint that does not fit is lost", _free),
    ("a file is created only once", "Two jobs could write one run", _exclusive),
    ("a file is added to at its end", "metrics.jsonl cannot be kept here", _append),
    ("a file and a folder are synced", "A power cut can cost checkpoints that were reported as saved", _sync),
    ("a file is replaced at once", "A crash can leave half a file, and a reader can meet one", _replace),
    ("a folder is renamed", "Checkpoints cannot be published here", _rename_folder),
    ("a lock holds, and ends with its process", "Two jobs could write one run, or none after a crash", _lock),
    ("what another process writes is seen", "A sweep would miss what its trials report", _visible),
    ("a file is mapped into memory", "Data larger than memory cannot be read from here", _map),
    ("speed", "A checkpoint that does not fit is lost", _speed),
]
