"""The run directory: one writer, checkpoints that survive any crash, and a reader that trusts nothing it finds.

Everything is safetensors or JSON; no pickle is written or read. Nothing in it depends on a rank or on the number of processes.
Only rank 0 needs to see the directory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dist_ae.config import InputError

FORMAT = 1
WEIGHTS, OPTIMIZER, EMA, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json"
MAX_JSON = 1 << 20  # bytes; ours are a few KB. A larger one was not written here and is not parsed
MAX_HEADER = 8 << 20  # bytes of a safetensors header
FAILED_SAVES = 3  # consecutive checkpoints that could not be written before a run gives up

Tensors = dict[str, Tensor]
Template = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # the tensors a file must hold: name → shape, type


class SaveError(Exception):
    """Checkpoints could not be written several times in a row. Older ones are untouched."""

    exit_status = 1


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says which file and what is wrong with it."""


@dataclass
class Checkpoint:
    """What a run needs to go on: step, tensors by file, and the JSON state."""

    step: int
    files: dict[str, Tensors]
    state: dict[str, Any] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------- durable files


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file: whenever the machine stops, the old content or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        _write_new(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _remove_folder(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in os.listdir(path):
        _remove_folder(path / name)
    os.rmdir(path)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=True) + "\n").encode()


# ------------------------------------------------------------------------------------------------ reading with suspicion


def _read(folder: Path, name: str, limit: int) -> bytes:
    try:
        # Neither a link out of the folder nor a pipe that blocks the open is followed.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Damaged(f"{folder.name}/{name}: {'a symbolic link' if error.errno == errno.ELOOP else error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Damaged(f"{folder.name}/{name}: not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise Damaged(f"{folder.name}/{name}: {status.st_size} bytes, more than the {limit} it can have")
        return file.read()


def _parse(data: bytes, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise Damaged(f"{name}: a key stands in it twice")
        return keys

    try:
        value = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: not JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{name}: not a JSON object")
    return value


def parse_tensors(data: bytes, name: str, template: Template | None = None) -> Tensors:
    """Tensors of a safetensors file, each finite; with a template, exactly those.

    Raises:
        Damaged: naming the file and what is wrong with it.
    """
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header > min(MAX_HEADER, len(data) - 8):
        raise Damaged(f"{name}: not a safetensors file (header of {header} bytes in {len(data)})")
    names = set(_parse(data[8 : 8 + header], name)) - {"__metadata__"}
    if template is not None and names != set(template):
        unexpected = sorted(names ^ set(template))[:3]
        raise Damaged(f"{name}: other tensors than this model's ({', '.join(unexpected)} …)")
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise Damaged(f"{name}: not a safetensors file ({error})") from None
    for key, tensor in tensors.items():
        if template is not None and (tuple(tensor.shape), tensor.dtype) != template[key]:
            raise Damaged(f"{name}: {key} is {tuple(tensor.shape)} {tensor.dtype}, expected {template[key][0]} {template[key][1]}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Damaged(f"{name}: {key} holds values that are not finite")
    return tensors


def _bytes_of(template: Template) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in template.values()) + MAX_HEADER


def read_checkpoint(folder: Path, templates: Mapping[str, Template] | None = None) -> Checkpoint:
    """Reads and verifies a checkpoint folder: manifest, sizes, SHA-256, then names, shapes, types and finiteness.

    Args:
        templates: the tensors each file must hold. Without, any model's are accepted (``doctor`` knows no model).

    Raises:
        Damaged: naming the file and what is wrong. Nothing of a damaged checkpoint is executed or kept; memory stays within
            twice what the template needs.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder.name}: not a folder")
    manifest = _parse(_read(folder, MANIFEST, MAX_JSON), f"{folder.name}/{MANIFEST}")
    entries = manifest.get("files")
    allowed = {WEIGHTS, OPTIMIZER, EMA, STATE}
    if manifest.get("format") != FORMAT or not isinstance(entries, dict) or not {WEIGHTS, STATE} <= set(entries) <= allowed:
        raise Damaged(f"{folder.name}/{MANIFEST}: not a manifest of format {FORMAT}")
    if templates is not None and set(entries) - {STATE} != set(templates):
        raise Damaged(f"{folder.name}: holds {', '.join(sorted(entries))}; expected {', '.join(sorted([*templates, STATE]))}")
    files: dict[str, Tensors] = {}
    state: dict[str, Any] = {}
    for name, entry in entries.items():
        where = f"{folder.name}/{name}"
        limit = MAX_JSON if name == STATE else (2**63 if templates is None else _bytes_of(templates[name]))
        data = _read(folder, name, limit)
        if not isinstance(entry, dict) or entry.get("bytes") != len(data):
            raise Damaged(f"{where}: {len(data)} bytes, not what the manifest says")
        if entry.get("sha256") != hashlib.sha256(data).hexdigest():
            raise Damaged(f"{where}: its SHA-256 is not what the manifest says")
        if name == STATE:
            state = _parse(data, where)
        else:
            files[name] = parse_tensors(data, where, None if templates is None else templates[name])
    if state.get("step") != _step_of(folder) or isinstance(state.get("step"), bool):
        raise Damaged(f"{folder.name}/{STATE}: of step {state.get('step')!r}")
    return Checkpoint(int(state["step"]), files, state)


def _step_of(folder: Path) -> int | None:
    return int(folder.name) if re.fullmatch(r"[0-9]{1,18}", folder.name) else None


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values: equal for equal weights, whatever file they were in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- the run directory


class RunDirectory:
    """A run's folder, as its one writer (rank 0) sees it. Opening takes a lock that a dead process cannot keep."""

    def __init__(self, path: Path) -> None:
        """Makes the folder if need be and locks it.

        Raises:
            InputError: the folder cannot be written, or another job is using it.
        """
        self.path, self.checkpoints, self.metrics_path = path, path / "checkpoints", path / "metrics.jsonl"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"run directory {path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 200).decode(errors="replace").strip() or "another process"
            os.close(self._lock)
            raise InputError(f"run directory {path} is in use by {holder}; wait for it, stop it, or choose another --run-dir") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._pending = b""  # metrics that the disk did not take yet
        self.failed_saves = 0

    def close(self) -> None:
        """Writes what metrics are left and gives the lock back."""
        self._flush_metrics()
        os.ftruncate(self._lock, 0)
        os.close(self._lock)

    # -- the experiment

    def claim(self, trajectory: Mapping[str, Any], description: Mapping[str, Any]) -> None:
        """Writes config.json, or checks that the run kept here is the same experiment.

        Raises:
            InputError: another experiment is kept here; shows each difference, old and new.
        """
        path = self.path / "config.json"
        if path.exists():
            try:
                kept = _parse(_read(self.path, "config.json", MAX_JSON), "config.json")["trajectory"]
            except (Damaged, KeyError) as error:
                raise InputError(f"{path} is damaged ({error}); restore it, or choose another --run-dir") from None
            differences = [
                f"  {key}: {kept.get(key)!r} there, {trajectory.get(key)!r} now" for key in sorted({*kept, *trajectory}) if kept.get(key) != trajectory.get(key)
            ]
            if differences:
                lines = "\n".join(differences)
                raise InputError(
                    f"run directory {self.path} holds another experiment:\n{lines}\nUse the same settings to resume it, or choose another --run-dir"
                )
        elif self._steps():
            raise InputError(f"run directory {self.path} has checkpoints but no config.json to tell whose; restore it, or choose another --run-dir")
        write_atomically(path, to_json({**description, "trajectory": dict(trajectory)}))

    def write(self, name: str, value: Any) -> None:
        """Replaces a JSON file of the run."""
        write_atomically(self.path / name, to_json(value))

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, or None where there is none that can be read."""
        try:
            return _parse(_read(self.path, name, MAX_JSON), name)
        except Damaged:
            return None

    # -- metrics.jsonl

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line. A full disk keeps it in memory until the disk takes it again."""
        self._pending += json.dumps(line).encode() + b"\n"
        self._flush_metrics()

    def _flush_metrics(self) -> None:
        if not self._pending:
            return
        try:
            descriptor = os.open(self.metrics_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while self._pending:
                    self._pending = self._pending[os.write(descriptor, self._pending) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            print(f"warning: metrics.jsonl cannot be written ({error.strerror}); kept in memory, tried again", file=sys.stderr, flush=True)

    def rewind_metrics(self, step: int, evaluated: bool) -> None:
        """Drops what a killed run wrote after the checkpoint it resumes from, so every step stands in the file once."""
        if not self.metrics_path.exists():
            return
        kept = []
        for raw in self.metrics_path.read_bytes().splitlines():
            try:
                line = json.loads(raw)
                before = line["step"] < step or (line["step"] == step and (line["split"] == "train" or evaluated))
            except (ValueError, KeyError, TypeError):
                continue  # a line torn by the kill
            if before:
                kept.append(raw + b"\n")
        write_atomically(self.metrics_path, b"".join(kept))

    # -- checkpoints

    def _steps(self) -> list[int]:
        return sorted(step for step in map(_step_of, self.checkpoints.iterdir()) if step is not None)

    def save(self, checkpoint: Checkpoint, keep: int, best_step: int | None) -> bool:
        """Publishes a checkpoint, then prunes older ones down to ``keep`` and the best.

        A checkpoint is whole or absent at every instant, and older ones go only when the new one is on the disk. Returns
        False, with a warning, where the disk does not take it; the files written so far are removed.

        Raises:
            SaveError: the third failure in a row.
        """
        final = self.checkpoints / f"{checkpoint.step:08d}"
        temporary = self.checkpoints / f".tmp-{checkpoint.step:08d}"
        try:
            self._tidy()
            if self.metrics_path.exists():
                self._flush_metrics()
                _sync_file(self.metrics_path)
            os.mkdir(temporary)
            manifest: dict[str, Any] = {"format": FORMAT, "files": {}}
            contents = {name: safetensors.torch.save(tensors) for name, tensors in checkpoint.files.items()}
            contents[STATE] = to_json({"step": checkpoint.step, **checkpoint.state})
            for name, data in contents.items():
                _write_new(temporary / name, data)
                manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _write_new(temporary / MANIFEST, to_json(manifest))
            _sync_folder(temporary)
            if final.exists():  # saved before its evaluation, which was interrupted: _tidy puts .old back if we die in between
                os.rename(final, self.checkpoints / f".old-{final.name}")
            os.rename(temporary, final)
            _sync_folder(self.checkpoints)
        except OSError as error:
            if temporary.exists():
                _remove_folder(temporary)
            self.failed_saves += 1
            message = f"checkpoint {checkpoint.step} could not be written to {self.checkpoints}: {error.strerror}"
            if self.failed_saves >= FAILED_SAVES:
                raise SaveError(f"{message}; {self.failed_saves} in a row, giving up. Older checkpoints are untouched") from None
            print(f"warning: {message}; training goes on, tried again at the next interval", file=sys.stderr, flush=True)
            return False
        self.failed_saves = 0
        self._tidy()
        for step in self._steps()[:-keep]:
            if step != best_step:  # renamed first: what a crash leaves of it is then no checkpoint
                aside = self.checkpoints / f".tmp-pruned-{step:08d}"
                os.rename(self.checkpoints / f"{step:08d}", aside)
                _remove_folder(aside)
        return True

    def _tidy(self) -> None:
        """Clears what a killed writer left: half-written folders go; a checkpoint moved aside comes back if its successor is missing."""
        for path in list(self.checkpoints.iterdir()):
            if path.name.startswith(".old-"):
                original = self.checkpoints / path.name.removeprefix(".old-")
                if original.exists():
                    _remove_folder(path)
                else:
                    os.rename(path, original)
            elif path.name.startswith(".tmp-"):
                _remove_folder(path)

    def latest(self, templates: Mapping[str, Template]) -> Checkpoint | None:
        """The newest good checkpoint; damaged ones are set aside as ``<step>.corrupt``, loudly. None for a fresh run.

        Raises:
            InputError: there are checkpoints, and none of them is good.
        """
        self._tidy()
        damaged = []
        for step in reversed(self._steps()):
            folder = self.checkpoints / f"{step:08d}"
            if not folder.exists():
                folder = next(p for p in self.checkpoints.iterdir() if _step_of(p) == step)
            try:
                return read_checkpoint(folder, templates)
            except Damaged as error:
                aside = folder.with_name(f"{folder.name}.corrupt")
                number = 1
                while aside.exists() or aside.is_symlink():
                    number += 1
                    aside = folder.with_name(f"{folder.name}.corrupt-{number}")
                os.rename(folder, aside)
                damaged.append(str(error))
                print(f"warning: damaged checkpoint set aside as {aside}: {error}", file=sys.stderr, flush=True)
        damaged += [p.name for p in self.checkpoints.iterdir() if ".corrupt" in p.name and not damaged]
        if damaged:
            raise InputError(
                f"no good checkpoint is left in {self.checkpoints} ({'; '.join(damaged)}). Restore one from a backup, "
                "or start again with another --run-dir; nothing was overwritten"
            )
        return None


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
