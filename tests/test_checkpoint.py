"""Checkpoints survive a kill at every file operation, a power cut at every one of them, damage, malice, and a full
disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from conftest import forked

from dist_ae.config import InputError
from dist_ae.run import checkpoint
from dist_ae.run.checkpoint import MANIFEST, OPTIMIZER, STATE, WEIGHTS, Checkpoint, Damaged, read_checkpoint
from dist_ae.run.directory import RunDirectory, SaveError

TEMPLATES = {WEIGHTS: {"w": ((4, 3), torch.float32)}, OPTIMIZER: {"w.exp_avg": ((4, 3), torch.float32)}}
OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "rmdir", "rename", "replace", "unlink")


def example(step: int) -> Checkpoint:
    values = torch.full((4, 3), float(step))
    return Checkpoint(step, {WEIGHTS: {"w": values}, OPTIMIZER: {"w.exp_avg": values + 0.5}}, {"best": None})


def good(found: Checkpoint | None) -> int:
    """The step of a checkpoint that holds what was saved at that step."""
    assert found is not None
    assert torch.equal(found.files[WEIGHTS]["w"], torch.full((4, 3), float(found.step)))
    assert torch.equal(found.files[OPTIMIZER]["w.exp_avg"], torch.full((4, 3), found.step + 0.5))
    return found.step


def before_saving(root: Path) -> None:
    """A run with two kept checkpoints and the best one: the next save publishes and prunes."""
    folder = RunDirectory(root)
    for step in (1, 2, 3):
        assert folder.save(example(step), keep=2, best_step=1)
    folder.append_metrics({"step": 3, "split": "train"})
    folder.close()


def save_next(root: Path) -> None:
    folder = RunDirectory(root)
    folder.append_metrics({"step": 4, "split": "train"})
    folder.save(example(4), keep=2, best_step=1)
    folder.save(
        example(4), keep=2, best_step=1
    )  # again, as after an evaluation that was interrupted: replaces the first
    folder.write("result.json", {"steps": 4})
    folder.rewind_metrics(4, evaluated=True)
    folder.close()


@contextlib.contextmanager
def watched(
    before: Callable[[int, str, tuple[Any, ...]], None],
    after: Callable[[str, tuple[Any, ...], Any], None] = lambda *_: None,
) -> Iterator[None]:
    """Calls ``before`` with the number and name of every file operation the checkpoint writer does, and ``after``
    with its result.
    """
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            before(count, name, args)
            count += 1
            result = real(*args, **kwargs)
            after(name, args, result)
            return result

        return operation

    with contextlib.ExitStack() as stack:
        # By whole paths, which this test follows, in place of descriptors of folders.
        stack.enter_context(mock.patch.object(shutil, "_use_fd_functions", False))
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(os, name, wrap(name)))
        yield


def count_operations(root: Path) -> int:
    seen: list[str] = []
    with watched(lambda number, name, args: seen.append(name)):
        save_next(root)
    assert {"write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink"} <= set(seen)
    return len(seen)


def goes_on(root: Path) -> int:
    """A run can go on from what is left: the step it finds; then the next save works and clears what was left over."""
    folder = RunDirectory(root)
    step = good(folder.latest(TEMPLATES))
    assert folder.save(example(9), keep=2, best_step=1) and good(folder.latest(TEMPLATES)) == 9
    names = {path.name for path in folder.checkpoints.iterdir()}
    assert len(names) <= 3 and all(name.isdigit() for name in names) and "00000001" in names
    folder.close()
    return step


def killed_at(point: int, work: Callable[[], object], log: Path) -> None:
    """Does ``work`` in a process of its own, which SIGKILL ends at its file operation number ``point``."""

    def die(number: int, name: str, args: tuple[Any, ...]) -> None:
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(rank: int) -> None:
        with watched(die):
            work()

    assert forked(1, watch, log) == [-signal.SIGKILL]


@pytest.mark.slow
def test_sigkill_at_every_file_operation_loses_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before_saving(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "counted")
    total, survived = count_operations(tmp_path / "counted"), 0
    for point in range(total):
        root = tmp_path / f"run-{point}"
        shutil.copytree(tmp_path / "start", root)
        killed_at(point, partial(save_next, root), tmp_path / "log")
        assert goes_on(root) in (3, 4)
        survived += 1
        shutil.rmtree(root)
    with capsys.disabled():
        print(f"\n{survived} of {total} crash points survived")
    assert survived == total > 50


class Disk:
    """What a power cut leaves: names and contents that were synced are there; of the rest either nothing or, as bad,
    the names alone.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.journal, self.paths = root, [], {}  # type: ignore[var-annotated]

    def record(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self.paths[result] = Path(args[0])
            if args[1] & os.O_CREAT:
                self.journal.append(("create", self.paths[result]))
        elif name == "write":
            self.journal.append(("write", self.paths[args[0]], bytes(args[1][:result])))
        elif name == "fsync":
            self.journal.append(("fsync", self.paths[args[0]]))
        elif name in ("rename", "replace"):
            self.journal.append(("rename", Path(args[0]), Path(args[1])))
        elif name in ("mkdir", "rmdir", "unlink"):
            self.journal.append((name, Path(args[0])))

    def cut(self, point: int, start: Path, target: Path, names_persist: bool) -> None:
        """Builds in ``target`` what is left of ``start`` after the first ``point`` operations."""
        done = self.journal[:point]

        def synced(index: int, path: Path) -> bool:
            """Whether ``path`` (under its name of then) was synced after operation ``index``."""
            for entry in done[index + 1 :]:
                if entry[0] == "rename" and (entry[1] == path or entry[1] in path.parents):
                    path = entry[2] / path.relative_to(entry[1])
                if entry[0] == "fsync" and entry[1] == path:
                    return True
            return False

        shutil.copytree(start, target)

        def at(path: Path) -> Path:
            return target / path.relative_to(self.root)

        for index, entry in enumerate(done):
            kind, path = entry[0], entry[1]
            if kind == "fsync":
                continue
            if kind == "write":
                if synced(index, path) and at(path).exists():
                    with at(path).open("ab") as file:
                        file.write(entry[2])
                continue
            named = entry[2] if kind == "rename" else path
            if not names_persist and not synced(index, named.parent):
                continue
            with contextlib.suppress(FileNotFoundError, OSError):
                if kind == "create" and not at(path).exists():
                    at(path).touch()
                elif kind == "mkdir":
                    at(path).mkdir()
                elif kind == "rmdir":
                    at(path).rmdir()
                elif kind == "unlink":
                    at(path).unlink()
                elif kind == "rename":
                    os.replace(at(path), at(named))


@pytest.mark.slow
@pytest.mark.parametrize("names_persist", [False, True])
def test_a_power_cut_at_every_file_operation_loses_no_checkpoint(
    tmp_path: Path, names_persist: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before_saving(tmp_path / "start")
    (tmp_path / "start" / ".lock").unlink(missing_ok=True)
    shutil.copytree(tmp_path / "start", tmp_path / "run")
    disk = Disk(tmp_path / "run")
    with watched(lambda *_: None, disk.record):
        save_next(tmp_path / "run")
    disk.journal = [entry for entry in disk.journal if entry[1].name != ".lock"]
    survived = 0
    for point in range(len(disk.journal) + 1):
        disk.cut(point, tmp_path / "start", tmp_path / f"cut-{point}", names_persist)
        assert goes_on(tmp_path / f"cut-{point}") in (3, 4), disk.journal[:point][-1]
        survived += 1
    with capsys.disabled():
        print(
            f"\n{survived} of {len(disk.journal) + 1} power cuts survived (unsynced names "
            f"{'kept' if names_persist else 'dropped'})"
        )
    assert survived > 50


def test_the_power_cut_test_notices_a_missing_fsync(tmp_path: Path) -> None:
    before_saving(tmp_path / "start")
    (tmp_path / "start" / ".lock").unlink(missing_ok=True)
    shutil.copytree(tmp_path / "start", tmp_path / "run")
    disk = Disk(tmp_path / "run")
    with watched(lambda *_: None, disk.record):
        save_next(tmp_path / "run")
    unsynced = Disk(tmp_path / "run")  # the same writer, had it not synced its files
    unsynced.journal = [
        entry for entry in disk.journal if not (entry[0] == "fsync" and entry[1].suffix) and entry[1].name != ".lock"
    ]
    last = len(unsynced.journal)
    unsynced.cut(last, tmp_path / "start", tmp_path / "cut", names_persist=True)
    folder = RunDirectory(tmp_path / "cut")
    found = folder.latest(TEMPLATES)
    assert found is None or found.step < 4  # step 4 was published without its content: noticed, and set aside


# -- damage


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "emptied": lambda path: path.write_bytes(b""),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "bit-flipped": flip,
    "zeroed": zero,
    "deleted": Path.unlink,
    "swapped": lambda path: shutil.copy(path.parent.parent / "00000001" / path.name, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE, MANIFEST])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before_saving(tmp_path)
    DAMAGE[kind](tmp_path / "checkpoints" / "00000003" / name)
    folder = RunDirectory(tmp_path)
    assert good(folder.latest(TEMPLATES)) == 2
    assert {path.name for path in folder.checkpoints.iterdir()} == {"00000001", "00000002", "00000003.corrupt"}
    assert "00000003.corrupt" in capsys.readouterr().err
    assert folder.save(example(3), keep=2, best_step=1) and good(folder.latest(TEMPLATES)) == 3


def test_with_no_good_checkpoint_left_there_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    before_saving(tmp_path)
    for step in ("00000001", "00000002", "00000003"):
        flip(tmp_path / "checkpoints" / step / WEIGHTS)
    for _ in range(2):  # also the second time, when all are set aside already
        folder = RunDirectory(tmp_path)
        with pytest.raises(InputError, match="no good checkpoint is left"):
            folder.latest(TEMPLATES)
        folder.close()
    assert len(list((tmp_path / "checkpoints").glob("*.corrupt"))) == 3


# -- malice


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/dist-ae-payload-executed",)


def reseal(folder: Path, **files: bytes) -> None:
    """Rewrites files and the manifest so that sizes and hashes fit: what an attacker would do."""
    import hashlib

    manifest = json.loads((folder / MANIFEST).read_text())
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def tensors(**values: torch.Tensor) -> bytes:
    return safetensors.torch.save(values)


def header(text: str, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + rest


W = '{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]}'
HOSTILE: dict[str, Callable[[Path], object]] = {
    "pickle as weights": lambda f: reseal(f, weights__safetensors=pickle.dumps(Payload())),
    "pickle as state": lambda f: reseal(f, state__json=pickle.dumps(Payload())),
    "pickle as manifest": lambda f: (f / MANIFEST).write_bytes(pickle.dumps(Payload())),
    "torch archive as weights": lambda f: (
        torch.save({"w": torch.zeros(4, 3)}, f / "t"),
        reseal(f, weights__safetensors=(f / "t").read_bytes()),
    ),
    "huge header": lambda f: reseal(f, weights__safetensors=struct.pack("<Q", 1 << 62) + b"{}"),
    "header beyond the file": lambda f: reseal(f, weights__safetensors=struct.pack("<Q", 500) + b"{}"),
    "huge tensor": lambda f: reseal(
        f, weights__safetensors=header('{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}')
    ),
    "duplicate tensors": lambda f: reseal(f, weights__safetensors=header(f'{{"w":{W},"w":{W}}}', b"\0" * 48)),
    "overlapping tensors": lambda f: reseal(f, weights__safetensors=header(f'{{"w":{W},"v":{W}}}', b"\0" * 48)),
    "other tensors": lambda f: reseal(f, weights__safetensors=tensors(v=torch.zeros(4, 3))),
    "wrong shape": lambda f: reseal(f, weights__safetensors=tensors(w=torch.zeros(3, 4))),
    "wrong type": lambda f: reseal(f, weights__safetensors=tensors(w=torch.zeros(4, 3, dtype=torch.float64))),
    "NaN weights": lambda f: reseal(f, weights__safetensors=tensors(w=torch.full((4, 3), float("nan")))),
    "duplicate keys": lambda f: reseal(f, state__json=b'{"step": 3, "step": 2}'),
    "wrong step": lambda f: reseal(f, state__json=b'{"step": 7}'),
    "step as text": lambda f: reseal(f, state__json=b'{"step": "3"}'),
    "deep JSON": lambda f: reseal(f, state__json=b"[" * 100_000),
    "huge JSON": lambda f: reseal(f, state__json=b" " * (2 << 20)),
    "symlink out of the run": lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/etc/passwd")),
    "symlink to a good file": lambda f: (
        (f / WEIGHTS).unlink(),
        (f / WEIGHTS).symlink_to(f.parent / "00000002" / WEIGHTS),
    ),
    "pipe that never ends": lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)),
    "name out of the folder": lambda f: (f / MANIFEST).write_text(
        (f / MANIFEST).read_text().replace(OPTIMIZER, "../00000002/" + OPTIMIZER)
    ),
    "the folder is a symlink": lambda f: (shutil.rmtree(f), f.symlink_to(f.parent / "00000002")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_nothing_in_it_is_executed(tmp_path: Path, kind: str) -> None:
    before_saving(tmp_path)
    path = tmp_path / "checkpoints" / "00000003"
    HOSTILE[kind](path)
    with pytest.raises(Damaged, match="00000003"):
        read_checkpoint(path, TEMPLATES)
    folder = RunDirectory(tmp_path)
    assert good(folder.latest(TEMPLATES)) == 2
    assert not Path("/tmp/dist-ae-payload-executed").exists()


# -- full disk


@contextlib.contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Writes fail with ENOSPC after so many bytes, the last one writing what still fits."""
    left, real = after, os.write

    def write(descriptor: int, data: Any) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, bytes(data)[:left])
        left -= written
        return written

    with mock.patch.object(checkpoint.os, "write", write):
        yield


@pytest.mark.parametrize("space", [0, 10, 200, 400, 600])
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(
    tmp_path: Path, space: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before_saving(tmp_path)
    folder = RunDirectory(tmp_path)
    with full_disk(space):
        assert not folder.save(example(4), keep=2, best_step=1)
    assert "No space left on device; training goes on" in capsys.readouterr().err
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["00000001", "00000002", "00000003"]
    assert folder.save(example(5), keep=2, best_step=1) and good(folder.latest(TEMPLATES)) == 5


def test_a_disk_that_stays_full_ends_the_run_with_a_clear_error(tmp_path: Path) -> None:
    before_saving(tmp_path)
    folder = RunDirectory(tmp_path)
    with full_disk(0):
        assert not folder.save(example(4), keep=2, best_step=1)
        assert not folder.save(example(5), keep=2, best_step=1)
        with pytest.raises(SaveError, match="3 in a row, giving up"):
            folder.save(example(6), keep=2, best_step=1)
    assert good(folder.latest(TEMPLATES)) == 3


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    folder.append_metrics({"step": 1})
    with full_disk(5):
        folder.append_metrics({"step": 2})
        folder.append_metrics({"step": 3})
    folder.append_metrics({"step": 4})
    assert [json.loads(line)["step"] for line in folder.metrics_path.read_text().splitlines()] == [1, 2, 3, 4]


# -- lock


@pytest.mark.slow
def test_a_second_job_is_refused_and_names_the_first_and_a_dead_one_s_lock_is_taken_over(tmp_path: Path) -> None:
    import socket
    import time

    def hold(rank: int) -> None:
        kept = RunDirectory(tmp_path)
        (kept.path / "held").write_text(str(os.getpid()))
        time.sleep(60)

    from conftest import Forked

    holder = Forked(1, hold, tmp_path / "log")
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"in use by pid {holder.pids[0]} on {socket.gethostname()}"):
        RunDirectory(tmp_path)
    holder.kill()
    holder.wait()
    RunDirectory(tmp_path).close()


def finished(root: Path) -> None:
    """A run of four checkpoints whose best is the second."""
    folder = RunDirectory(root)
    for step in (1, 2, 3, 4):
        best = {"step": min(step, 2), "metric": "val.mse", "value": 1.0}
        assert folder.save(Checkpoint(step, example(step).files, {"best": best}), keep=9, best_step=2)
    folder.close()


def finish_it(root: Path, resumable: bool = True) -> None:
    folder = RunDirectory(root)
    folder.finish(4, resumable)
    folder.close()


def test_a_finished_run_keeps_its_last_checkpoint_and_the_best_weights(tmp_path: Path) -> None:
    finished(tmp_path)
    finish_it(tmp_path)
    kept = {path.name: sorted(each.name for each in path.iterdir()) for path in (tmp_path / "checkpoints").iterdir()}
    for_use = [MANIFEST, STATE, WEIGHTS]
    assert kept == {"00000002": for_use, "00000004": [MANIFEST, OPTIMIZER, STATE, WEIGHTS]}
    folder = RunDirectory(tmp_path)
    assert good(folder.latest(TEMPLATES)) == 4  # an extension begins there
    best = read_checkpoint(folder.checkpoints / "00000002", {WEIGHTS: TEMPLATES[WEIGHTS]}, part=True)
    assert torch.equal(best.files[WEIGHTS]["w"], torch.full((4, 3), 2.0))
    folder.close()
    finish_it(tmp_path, resumable=False)
    folder = RunDirectory(tmp_path)
    assert sorted(each.name for each in (folder.checkpoints / "00000004").iterdir()) == for_use
    with pytest.raises(InputError, match="--init-from"):
        folder.latest(TEMPLATES)
    assert not list(folder.checkpoints.glob("*.corrupt"))
    folder.close()


def test_nothing_is_removed_where_the_last_or_the_best_checkpoint_is_damaged(tmp_path: Path) -> None:
    for step in ("00000002", "00000004"):
        root = tmp_path / step
        finished(root)
        weights = root / "checkpoints" / step / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(Damaged):
            finish_it(root)
        assert len(list((root / "checkpoints").glob("0*"))) == 4


@pytest.mark.slow
def test_sigkill_at_every_file_operation_of_pruning_leaves_what_is_used(tmp_path: Path) -> None:
    finished(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "counted")
    seen: list[str] = []
    with watched(lambda number, name, args: seen.append(name)):
        finish_it(tmp_path / "counted")
    for point in range(len(seen)):
        root = tmp_path / f"run-{point}"
        shutil.copytree(tmp_path / "start", root)
        killed_at(point, partial(finish_it, root), tmp_path / "log")
        folder = RunDirectory(root)
        assert good(folder.latest(TEMPLATES)) == 4
        best = read_checkpoint(folder.checkpoints / "00000002", {WEIGHTS: TEMPLATES[WEIGHTS]}, part=True)
        assert torch.equal(best.files[WEIGHTS]["w"], torch.full((4, 3), 2.0))
        folder.close()
        finish_it(root)
        assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["00000002", "00000004"]
        shutil.rmtree(root)
    assert len(seen) > 20
