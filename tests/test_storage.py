"""``dist-ae doctor --storage DIR`` tells storage that runs can lie on from storage that they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment

from dist_ae.config import InputError
from dist_ae.use import storage
from dist_ae.use.storage import CHECKS, examine_storage


def doctor(*arguments: str, mounted: str = "") -> tuple[int, list[str], str]:
    """(status, lines, errors) of the command; ``mounted`` are options of a file system in memory that DIR is put on."""
    command = [sys.executable, "-m", "dist_ae", "doctor", *arguments]
    if mounted:
        command = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount -t tmpfs -o {mounted} none "$0" && exec "$@"',
            arguments[-1],
            *command,
        ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_a_disk_holds_all_that_is_asked_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    status, lines, error = doctor("--storage", str(tmp_path))
    assert status == 0 and error == ""
    assert len(lines) == len(CHECKS) and all(line.startswith("ok ") for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_takes_nothing_is_named_with_status_1(tmp_path: Path) -> None:
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine forbids mount namespaces: {tried.stderr.strip()}")
    status, lines, error = doctor("--storage", str(tmp_path), mounted="ro")
    (bad,) = [line for line in lines if not line.startswith("ok ")]
    assert status == 1 and error == "" and bad.startswith("FAILS   a new folder: Read-only file system")


def test_what_a_mounted_bucket_does_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renames by copying and removing, appends by replacing, forgets locks."""

    def copy(source: Path, target: Path) -> None:
        data = source.read_bytes()
        target.unlink(missing_ok=True)
        time.sleep(0.01)  # over a network
        target.write_bytes(data)

    real_open = os.open
    monkeypatch.setattr(storage.os, "replace", copy)
    monkeypatch.setattr(storage.os, "open", lambda path, flags, *a, **k: real_open(path, flags & ~os.O_APPEND, *a, **k))
    monkeypatch.setattr(storage, "HOLD", storage.HOLD.replace("sys.argv[1]", "sys.argv[1] + '-elsewhere'"))
    bad = {what.partition(":")[0] for good, what in examine_storage(tmp_path) if not good}
    assert bad == {
        "a file is added to at its end",
        "a file is replaced at once",
        "a lock holds, and ends with its process",
    }
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        list(examine_storage(tmp_path / "nothing"))


@pytest.mark.slow
def test_doctor_without_anything_to_examine_says_what_it_takes() -> None:
    status, _, error = doctor()
    assert status == 2 and "name a run directory or a packed set, or --storage DIR" in error
