"""The run directory: one writer, and checkpoints that survive any crash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from dist_ae.config import InputError
from dist_ae.run import checkpoint as files
from dist_ae.run.checkpoint import (
    FORMAT,
    MANIFEST,
    MAX_JSON,
    STATE,
    Checkpoint,
    Damaged,
    Template,
    _parse,
    _read,
    _remove_folder,
    _step_of,
    _sync_file,
    _sync_folder,
    read_checkpoint,
    to_json,
    write_atomically,
)

FAILED_SAVES = 3  # consecutive checkpoints that could not be written before a run gives up


class SaveError(Exception):
    """Checkpoints could not be written several times in a row. Older ones are untouched."""

    exit_status = 1


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
            raise InputError(
                f"run directory {path} is in use by {holder}; wait for it, stop it, or choose another --run-dir"
            ) from None
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
                f"  {key}: {kept.get(key)!r} there, {trajectory.get(key)!r} now"
                for key in sorted({*kept, *trajectory})
                if kept.get(key) != trajectory.get(key)
            ]
            if differences:
                lines = "\n".join(differences)
                raise InputError(
                    f"run directory {self.path} holds another experiment:\n{lines}\nUse the same settings to resume it, or choose another --run-dir"
                )
        elif self._steps():
            raise InputError(
                f"run directory {self.path} has checkpoints but no config.json to tell whose; restore it, or choose another --run-dir"
            )
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
            print(
                f"warning: metrics.jsonl cannot be written ({error.strerror}); kept in memory, tried again",
                file=sys.stderr,
                flush=True,
            )

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
                files._write_new(temporary / name, data)
                manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            files._write_new(temporary / MANIFEST, to_json(manifest))
            _sync_folder(temporary)
            if (
                final.exists()
            ):  # saved before its evaluation, which was interrupted: _tidy puts .old back if we die in between
                os.rename(final, self.checkpoints / f".old-{final.name}")
            os.rename(temporary, final)
            _sync_folder(self.checkpoints)
        except OSError as error:
            if temporary.exists():
                _remove_folder(temporary)
            self.failed_saves += 1
            message = f"checkpoint {checkpoint.step} could not be written to {self.checkpoints}: {error.strerror}"
            if self.failed_saves >= FAILED_SAVES:
                raise SaveError(
                    f"{message}; {self.failed_saves} in a row, giving up. Older checkpoints are untouched"
                ) from None
            print(
                f"warning: {message}; training goes on, tried again at the next interval", file=sys.stderr, flush=True
            )
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
