"""The run directory: one writer, and checkpoints that survive any crash. Only rank 0 needs to see the directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dist_ae.config import Fault, InputError
from dist_ae.files import (
    MAX_LINES,
    Damaged,
    append,
    clear_temporaries,
    inside,
    open_plainly,
    read_bounded,
    read_json,
    sync,
    to_json,
    write_atomically,
)
from dist_ae.run.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    Checkpoint,
    Template,
    copy_for_use,
    is_for_use,
    read_checkpoint,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from dist_ae.terminal import say

FAILED_SAVES = 3  # consecutive checkpoints that could not be written before a run gives up


# What a run writes into its folder, itself or through a tracker. None of these may be a link to another place.
FOLDERS = ("checkpoints", "calibration", "figures", "profile", "tensorboard", "wandb", "start")
FILES = (
    *(".lock", ".holder", "config.json", "metrics.jsonl", "result.json", "tracking.json"),
    *("nonfinite.json", "nonfinite.safetensors"),
)


class SaveError(Fault):
    """A part of the run could not be written. Older checkpoints are untouched."""


class RunDirectory:
    """A run's folder, as its one writer (rank 0) sees it. Opening it takes a lock that ends with its process."""

    def __init__(self, path: Path) -> None:
        """Makes the folder if it is not there, and locks it.

        Raises:
            InputError: the folder cannot be written, or another job is using it.
        """
        self.path, self.checkpoints, self.metrics_path = path, path / "checkpoints", path / "metrics.jsonl"
        self._lock, self._holder = FileLock(path / ".lock"), path / ".holder"
        try:
            path.mkdir(parents=True, exist_ok=True)
            refuse_strange(path)
            self.checkpoints.mkdir(exist_ok=True)
            self._lock.acquire(blocking=False)
            clear_temporaries(path)
            write_atomically(self._holder, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        except Timeout:
            holder = "another process"
            with contextlib.suppress(Damaged):
                holder = _one_line(read_bounded(self._holder, 1024))[:200]
            raise InputError(
                f"run directory {path} is in use by {holder}; wait for it, stop it, or choose another --run-dir"
            ) from None
        except OSError as error:
            self._lock.release()
            raise InputError(f"run directory {path} cannot be written: {error.strerror or error}") from None
        self._pending = b""  # metrics that are not yet on the disk
        self.failed_saves = 0

    def close(self) -> None:
        """Writes the remaining metrics and releases the lock."""
        self._flush_metrics()
        with contextlib.suppress(OSError):
            self._holder.unlink(missing_ok=True)
        self._lock.release()

    def warn(self, text: str) -> None:
        """Says what went wrong without ending the run."""
        say(f"warning: {text}", sys.stderr)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(f"{self.path / what} could not be written or read: {error.strerror or error}") from None

    # -- the experiment

    def claim(
        self,
        trajectory: Mapping[str, Any],
        description: Mapping[str, Any],
        unknown: Mapping[str, Any] = {},
        may_change: Iterable[str] = (),
    ) -> None:
        """Writes config.json, or checks that the folder holds the same experiment.

        Args:
            trajectory: the values that may not change during a run.
            description: further content of config.json.
            unknown: values for fields that an older version did not know.
            may_change: fields of the trajectory that may differ nevertheless.

        Raises:
            InputError: the folder holds another experiment. Shows each difference, old and new.
        """
        path = self.path / "config.json"
        if os.path.lexists(path):
            try:
                stored = {**unknown, **read_json(path)["trajectory"]}
            except (Damaged, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged ({error}); restore it, or choose another --run-dir") from None
            differences = [
                f"  {key}: {stored.get(key)!r} there, {trajectory.get(key)!r} now"
                if key != "data.fingerprint"
                else f"  {key}: the images have changed, or are other ones"
                for key in sorted({*stored, *trajectory})
                if stored.get(key) != trajectory.get(key) and key not in may_change
            ]
            if differences:
                lines, way_out = "\n".join(differences), ""
                if any(line.startswith("  precision:") for line in differences):
                    way_out = (
                        ". A run keeps its precision; to train on in another one, as on a processor without it, begin "
                        f"a run with these weights: --init-from {self.path} --run-dir ANOTHER"
                    )
                raise InputError(
                    f"run directory {self.path} holds another experiment:\n{lines}\n"
                    f"Use the same settings to resume it, or choose another --run-dir{way_out}"
                )
        elif self._steps():
            raise InputError(
                f"run directory {self.path} has checkpoints but no config.json that describes their experiment; "
                "restore it, or choose another --run-dir"
            )
        self.write("config.json", {**description, "trajectory": dict(trajectory)})

    def write(self, name: str, value: Any) -> None:
        """Replaces a JSON file of the run."""
        with self._explained(name):
            write_atomically(self.path / name, to_json(value))

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None if it does not exist or cannot be read."""
        try:
            return read_json(self.path / name)
        except Damaged:
            return None

    # -- metrics.jsonl

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line. While the disk is full, lines are kept in memory."""
        self._pending += to_json(line, indent=None)
        self._flush_metrics()

    def _flush_metrics(self) -> None:
        if not self._pending:
            return
        try:
            while self._pending:
                self._pending = self._pending[append(self.metrics_path, self._pending) :]
        except (OSError, Damaged) as error:
            reason = getattr(error, "strerror", None) or error
            self.warn(f"metrics.jsonl cannot be written ({reason}); kept in memory until it can be")

    def rewind_metrics(self, step: int, evaluated: bool) -> None:
        """Drops the lines that a killed run wrote after the resumed checkpoint, so that each step is there once."""
        if not os.path.lexists(self.metrics_path):
            return
        lines = []
        with self._explained("metrics.jsonl"):
            try:
                content = read_bounded(self.metrics_path, MAX_LINES)
            except Damaged as error:
                raise InputError(f"{self.path}: {error}; restore or remove it") from None
            for raw in content.splitlines():
                try:
                    line = json.loads(raw)
                    before = line["step"] < step or (line["step"] == step and (line["split"] == "train" or evaluated))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a line that the kill cut off
                if before:
                    lines.append(raw + b"\n")
            write_atomically(self.metrics_path, b"".join(lines))

    def metrics(self) -> bytes:
        """What metrics.jsonl holds; nothing where it cannot be read."""
        try:
            return read_bounded(self.metrics_path, MAX_LINES)
        except (Damaged, OSError):
            return b""

    # -- checkpoints

    def _steps(self) -> list[int]:
        return sorted(step for step in map(step_of, self.checkpoints.iterdir()) if step is not None)

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, whole or not."""
        return max(self._steps(), default=None)

    def holds(self, step: int) -> bool:
        """Whether a checkpoint of that step is on the disk."""
        return (self.checkpoints / f"{step:08d}" / MANIFEST).is_file()

    def save(self, checkpoint: Checkpoint, keep: int, best_step: int | None, seconds: float = 0.0) -> bool:
        """Publishes a checkpoint, then prunes older ones down to ``keep`` and the best.

        A checkpoint is whole or absent at every instant, and older ones are removed only once the new one is on the
        disk. If the disk cannot store it, removes what was written so far, warns, and returns False.

        Args:
            seconds: how long to keep trying.

        Raises:
            SaveError: the third failure in a row.
        """
        deadline, warned = time.monotonic() + seconds, False
        while True:
            try:
                self._publish(checkpoint)
                break
            except OSError as error:
                self._remove(self.checkpoints / f".tmp-{checkpoint.step:08d}")
                message = f"checkpoint {checkpoint.step} could not be written to {self.checkpoints}: {error.strerror}"
            if time.monotonic() < deadline:
                if not warned:
                    self.warn(f"{message}; trying again for {seconds:.0f} s")
                warned = True
                time.sleep(min(1.0, seconds / 4))
                continue
            self.failed_saves += 1
            if self.failed_saves >= FAILED_SAVES:
                raise SaveError(f"{message}; {self.failed_saves} in a row, giving up. Older checkpoints are untouched")
            self.warn(f"{message}; training goes on, and the next interval tries again")
            return False
        self.failed_saves = 0
        try:
            self._tidy()
            for step in self._steps()[:-keep]:
                if step != best_step:
                    self._prune(step)
        except OSError as error:
            self.warn(f"older checkpoints in {self.checkpoints} could not be removed: {error.strerror}")
        return True

    def finish(self, last: int, resumable: bool = True) -> None:
        """Prunes a finished run to its last checkpoint, and to the weights of the best one.

        At every instant both are whole. If this is killed, the same call finishes the work.

        Args:
            last: the step of the newest checkpoint, which names the best one.
            resumable: keep the optimizer state of the last checkpoint, which ``--extend`` needs.

        Raises:
            OSError: the disk does not allow it.
            Damaged: the last or the best checkpoint is not whole; nothing was removed.
        """
        self._tidy()
        newest = self.checkpoints / f"{last:08d}"
        verify_checkpoint(newest)
        best = read_json(newest / STATE).get("best")
        best_step = best.get("step") if isinstance(best, dict) else None
        used = [step for step in self._steps() if step in (last, best_step)]
        for step in used:
            path = self.checkpoints / f"{step:08d}"
            if (step == last and resumable) or is_for_use(path):
                continue
            self._remove(self.checkpoints / f".tmp-{step:08d}")
            copy_for_use(path, self.checkpoints / f".tmp-{step:08d}")
            self._put_in_place(step)
            self._tidy()
        for step in self._steps():
            if step not in used:
                self._prune(step)

    def _prune(self, step: int) -> None:
        """Removes a checkpoint. Renames it first, so that a crash in between leaves no half of a checkpoint."""
        aside = self.checkpoints / f".tmp-pruned-{step:08d}"
        os.rename(self.checkpoints / f"{step:08d}", aside)
        self._remove(aside)

    def _publish(self, checkpoint: Checkpoint) -> None:
        self._tidy()
        if self.metrics_path.exists():
            self._flush_metrics()
            sync(self.metrics_path)
        write_checkpoint(self.checkpoints / f".tmp-{checkpoint.step:08d}", checkpoint)
        self._put_in_place(checkpoint.step)

    def _put_in_place(self, step: int) -> None:
        """Moves a checkpoint from its temporary name to its own. _tidy puts .old back if we die in between."""
        final = self.checkpoints / f"{step:08d}"
        if final.exists():  # as if it was saved before an evaluation that was interrupted
            os.rename(final, self.checkpoints / f".old-{final.name}")
        os.rename(self.checkpoints / f".tmp-{step:08d}", final)
        sync(self.checkpoints)

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Cleans up after a killed writer.

        Removes half-written folders. Puts back a checkpoint that was moved aside, if its successor is missing.
        """
        for path in list(self.checkpoints.iterdir()):
            if path.name.startswith(".old-"):
                original = self.checkpoints / path.name.removeprefix(".old-")
                if original.exists():
                    self._remove(path)
                else:
                    os.rename(path, original)
            elif path.name.startswith(".tmp-"):
                self._remove(path)

    def latest(self, templates: Mapping[str, Template]) -> Checkpoint | None:
        """The newest good checkpoint; None for a fresh run.

        Damaged checkpoints are set aside as ``<step>.corrupt``, with a warning.

        Raises:
            InputError: there are checkpoints, but none of them is good.
        """
        with self._explained("checkpoints"):
            self._tidy()
            damaged, for_use = [], False
            for step in reversed(self._steps()):
                folder = self.checkpoints / f"{step:08d}"
                if not folder.exists():
                    folder = next(p for p in self.checkpoints.iterdir() if step_of(p) == step)
                if is_for_use(folder):
                    for_use = True
                    continue
                try:
                    return read_checkpoint(folder, templates)
                except Damaged as error:
                    damaged.append(str(error))
                    aside = _free_name(folder.with_name(f"{folder.name}.corrupt"))
                    os.rename(folder, aside)
                    self.warn(f"damaged checkpoint set aside as {aside}: {error}")
            damaged += [p.name for p in self.checkpoints.iterdir() if ".corrupt" in p.name and not damaged]
        if damaged:
            raise InputError(
                f"no good checkpoint is left in {self.checkpoints} ({'; '.join(damaged)}). Restore one from a backup, "
                "or start again with another --run-dir; nothing was overwritten"
            )
        if for_use:
            raise InputError(
                f"{self.path} holds weights without optimizer state, so it cannot be trained on; a new run can begin "
                f"with them: --init-from {self.path} --run-dir ANOTHER"
            )
        return None


def sizes(path: Path) -> tuple[int, int]:
    """Bytes of a run directory, and how many of them are optimizer state."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    sizes_by_name = [(file.name, file.lstat().st_size) for file in files]
    return sum(size for _, size in sizes_by_name), sum(size for name, size in sizes_by_name if name == OPTIMIZER)


def refuse_strange(path: Path) -> None:
    """Checks a run directory before anything in it is opened.

    Raises:
        InputError: one of the files or folders that a run writes is a link, a pipe or of another kind, so that writing
            would change something else, or wait for ever.
    """
    for name in (*FOLDERS, *FILES):
        try:
            inside(path, name)
            if name in FILES and os.path.lexists(path / name):
                os.close(open_plainly(path / name))
        except Damaged as error:
            raise InputError(f"run directory {path}: {error}; remove it, or choose another --run-dir") from None


def _one_line(data: bytes) -> str:
    """The text of a file as one printable line."""
    return "".join(c if c.isprintable() else " " for c in data.decode(errors="replace"))


def _free_name(path: Path) -> Path:
    """The path, or the path with the first number that is not taken yet."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
