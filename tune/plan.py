"""The sweep's folder: planned trials and their outcomes. A sweep resumes from these files, not from Ray's.

sweep.json                     the space, the settings, the metric; written once, after the first trials are planned
trials/<id>/trial.json         preset and sampled values, written before the trial starts
trials/<id>/                   the trial's run directory, as dist-ae train writes it; result.json once it is finished
trials/<id>/reports.jsonl      the trial's reports, one line per evaluation
trials/<id>/outcome.json       only if it was stopped early or failed for good
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dist_ae import PRESETS, Config, InputError
from dist_ae.sweeping import selection, to_json, write_atomically

from .spaces import MAX_TRIALS, METRICS, Metric, Space, Values, explained, shown

FORMAT = 1


class Settings(BaseModel):
    """How a sweep is run. The space says what is searched."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    num_trials: int = Field(0, ge=0, le=MAX_TRIALS, description="trials to run; 0: 16, or all points of a grid")
    scheduler: Literal["none", "asha", "median", "pbt"] = Field(
        "none",
        description="asha and median stop weak trials early; pbt clones strong ones and changes lr, noise and dropout",
    )
    search: Literal["random", "grid", "optuna"] = Field("random", description="where the next configuration comes from")
    workers_per_trial: int = Field(1, ge=1, le=MAX_TRIALS, description="processes that train one trial together")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of each worker")
    gpus_per_worker: float = Field(
        0, ge=0, description="GPUs of each worker; 0.25 lets four one-worker trials share one"
    )
    max_concurrent: int | None = Field(
        None, ge=1, le=MAX_TRIALS, description="most trials at once; left out, all that fit"
    )
    address: str | None = Field(None, description="local, the default; auto: this machine's cluster; or HOST:PORT")
    seed: int = Field(0, description="seed of the search")
    budget: float | None = Field(
        None, ge=1, le=100_000, description="minutes in which to end with an answer; plans trials and stops weak ones"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(f"--{explained(error).replace('_', '-')}") from None

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.workers_per_trial > 1 and self.gpus_per_worker % 1:
            raise InputError(
                f"--gpus-per-worker {self.gpus_per_worker}: workers of one trial cannot share a GPU (NCCL refuses it); "
                "use whole GPUs, or --workers-per-trial 1 with a share of one"
            )
        if self.scheduler == "pbt" and self.workers_per_trial > 1:
            raise InputError(
                "--scheduler pbt works with --workers-per-trial 1 only: Ray Train owns the checkpoints of a trial of "
                "several workers, and Ray Tune would silently skip the cloning. Use --scheduler asha"
            )
        if self.budget is not None and self.scheduler in ("median", "pbt"):
            reason = "--budget stops weak trials by ASHA's rule, as time allows"
            raise InputError(f"{reason}; leave out --scheduler {self.scheduler}")
        if self.scheduler == "pbt" and self.search == "optuna":
            reason = "changes the values of running trials, which would mislead --search optuna"
            raise InputError(f"--scheduler pbt {reason}; use --search random")
        if self.scheduler == "pbt" and self.num_trials == 1:
            reason = "needs at least two trials to clone one into the other"
            raise InputError(f"--scheduler pbt {reason}; raise --num-trials")
        return self


@dataclass(frozen=True)
class Trial:
    """A planned trial.

    Population-based training changes values during training. Each clone is a new generation with its own run
    directory.
    """

    id: str
    preset: str
    values: Values
    generation: int = 0
    clone: str | None = None  # identifies the cloning that began this generation
    donors: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        return int(self.id.rpartition("-")[2])


@dataclass(frozen=True)
class Outcome:
    """The state of a trial.

    ``status`` is ``pending``, ``unfinished``, ``finished``, ``stopped`` by the scheduler, or ``failed`` for good.
    """

    status: str
    error: str | None = None
    reports: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    def metric(self, name: str) -> float | None:
        """The last value of a metric."""
        return next((float(r[name]) for r in reversed(self.reports) if name in r), None)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and the content of its sweep.json."""

    path: Path
    name: str
    space: Space
    overrides: Values
    metric: Metric
    settings: Settings
    key: str  # makes trial ids unique among all sweeps, since W&B keeps one list of runs

    @property
    def sign(self) -> int:
        """+1 if a larger metric is better, else -1."""
        return METRICS[self.metric][0]

    # -- trials

    def trial_dir(self, trial_id: str) -> Path:
        return self.path / "trials" / trial_id

    def trials(self) -> list[Trial]:
        """All planned trials, in order."""
        trials = [self.trial(path.parent.name) for path in (self.path / "trials").glob("*/trial.json")]
        return sorted(trials, key=lambda t: t.number)

    def trial(self, trial_id: str) -> Trial:
        path = self.trial_dir(trial_id) / "trial.json"
        try:
            return TypeAdapter(Trial).validate_json(path.read_bytes())
        except (OSError, ValidationError):
            hint = f"is {self.path} on storage that every node sees?"
            raise InputError(f"{path} is missing or damaged; {hint}") from None

    def new_trial(self, number: int, preset: str, values: Values) -> Trial:
        """Plans a trial and writes it down, so that it outlives this process."""
        trial = Trial(f"{self.key}-{number:04d}", preset, values)
        self.write_trial(trial)
        return trial

    def write_trial(self, trial: Trial) -> None:
        write_json(self.trial_dir(trial.id) / "trial.json", asdict(trial))

    def run_dir(self, trial: Trial) -> Path:
        """The run directory of the trial's present generation."""
        folder = self.trial_dir(trial.id)
        return folder / f"generation-{trial.generation}" if trial.generation else folder

    def config(self, trial: Trial) -> Config:
        """The complete configuration of a trial."""
        values = {**self.overrides, **trial.values, "name": f"{self.name}-{trial.number:04d}"}
        values |= {"tracking.group": self.name, "run_dir": self.run_dir(trial)}
        if self.settings.scheduler == "pbt":
            values["train.save_every"] = None  # so that every report has a checkpoint to clone
        return PRESETS[trial.preset].override(values)

    def answer(self, trial: Trial) -> Config:
        """The trial's configuration as a separate experiment, as in best.json."""
        return PRESETS[trial.preset].override({**self.overrides, **trial.values})

    def outcome(self, trial: Trial) -> Outcome:
        """The state of a trial, read only from its folder."""
        reports = tuple(read_reports(self.trial_dir(trial.id)))
        stored = read_object(self.trial_dir(trial.id) / "outcome.json") or {}
        if read_object(self.run_dir(trial) / "result.json") is not None:
            # A linear probe comes after the result. Without its accuracy, the trial is not done.
            done = reports and self.metric in reports[-1] and reports[-1]["progress"] >= 100
            status = "finished" if done else "unfinished"
        elif stored.get("status") in ("stopped", "failed"):
            status = stored["status"]
        else:
            status = "unfinished" if reports or (self.run_dir(trial) / "checkpoints").exists() else "pending"
        return Outcome(status, stored.get("error"), reports)

    def value(self, trial: Trial, outcome: Outcome) -> float | None:
        """A trial's value of the sweep's metric, for the weights of its best evaluation, which its run uses.

        A metric that only the last report has, as a probe's, already belongs to these weights. The run of a clone only
        has evaluations since the cloning, which its reports do not distinguish from earlier ones: its last report
        counts.
        """
        config = self.answer(trial)
        standardized = any("val.r2" in report for report in outcome.reports)
        judge, sign = selection(config.model.variational, config.objective.noise_std, standardized)
        judged = [r for r in outcome.reports if math.isfinite(r.get(f"val.{judge}", math.nan)) and self.metric in r]
        if trial.generation or not judged or self.metric.startswith("val.probe"):
            return outcome.metric(self.metric)
        return float(max(judged, key=lambda report: sign * report[f"val.{judge}"])[self.metric])

    def end_trial(self, trial_id: str, status: str, error: str | None = None) -> None:
        """Records that a trial will not be continued, and why."""
        write_json(self.trial_dir(trial_id) / "outcome.json", {"status": status, "error": error})

    # -- sweep.json

    def write(self) -> None:
        """Writes sweep.json. From here on, the sweep exists."""
        data = {"format": FORMAT, "name": self.name, "key": self.key, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        data |= {"space": self.space.to_data(), "overrides": self.overrides, "metric": self.metric}
        write_json(self.path / "sweep.json", {**data, "settings": self.settings.model_dump()})


def read_sweep(path: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
        InputError: there is none, or its sweep.json cannot be read.
    """
    data = read_object(path / "sweep.json")
    if data is None or data.get("format") != FORMAT:
        others = ", ".join(sorted(p.parent.name for p in path.parent.glob("*/sweep.json"))) or "none"
        raise InputError(f"no sweep in {path}; the sweeps in {path.parent} are: {others}")
    try:
        return TypeAdapter(Sweep).validate_python({**data, "path": path})
    except (InputError, ValidationError) as error:
        reason = explained(error) if isinstance(error, ValidationError) else error
        raise InputError(f"{path}/sweep.json is damaged ({reason}); begin a new sweep") from None


def new_sweep(path: Path, space: Space, overrides: Values, metric: Metric, settings: Settings) -> Sweep:
    """A sweep that is not on the disk yet."""
    return Sweep(path, path.name, space, overrides, metric, settings, uuid.uuid4().hex[:6])


def plan_trials(sweep: Sweep) -> None:
    """Plans the trials that are known in advance (all of a random search or a grid), then writes sweep.json."""
    shutil.rmtree(sweep.path / "trials", ignore_errors=True)  # left by a driver that died before it wrote sweep.json
    settings = sweep.settings
    if settings.search != "optuna":
        points = sweep.space.plan(settings.search, settings.num_trials, settings.seed)
        for number, (preset, values) in enumerate(points):
            sweep.new_trial(number, preset, values)
    sweep.write()


def check_name(name: str) -> None:
    """Raises InputError unless the name is valid for both a folder and a W&B group."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        hint = "use at most 100 letters, digits, '.', '_' and '-', beginning with a letter or digit"
        raise InputError(f"--name {shown(name)}: {hint}")


@contextmanager
def only_driver(path: Path, new: bool) -> Iterator[None]:
    """Locks a sweep's folder for one driver. A dead driver does not keep the lock.

    Raises:
        InputError: the folder cannot be written, is in use, or (for a new sweep) holds a sweep already.
    """
    if not new and not path.is_dir():
        read_sweep(path)  # raises: there is no sweep
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock").acquire(timeout=0)
    except Timeout:
        reason = f"another process holds {path}; wait for it or stop it"
        raise InputError(f"the sweep {path.name} is running: {reason}") from None
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror}"
        raise InputError(f"--storage {path.parent}: {reason}; choose another folder") from None
    with lock:
        if new and (path / "sweep.json").exists():
            ways_out = f"--resume {path.name} continues it, another --name begins a new one"
            raise InputError(f"there is a sweep {path.name} in {path.parent} already; {ways_out}")
        yield


# -- small files


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file. Whenever the machine stops, the file has either the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(value))


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it does not exist or cannot be read."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def append_report(trial_dir: Path, report: Mapping[str, Any]) -> None:
    """Adds a line to reports.jsonl."""
    with open(trial_dir / "reports.jsonl", "ab") as file:
        file.write(b"\n" + to_json(report, indent=None))  # the first newline ends a line that a kill cut short


def read_reports(trial_dir: Path) -> list[dict[str, Any]]:
    """A trial's reports, by increasing step. Reports after a retry or a cloning replace those of the same steps."""
    reports: list[dict[str, Any]] = []
    try:
        lines = (trial_dir / "reports.jsonl").read_text().splitlines()
    except OSError:
        return reports
    for line in lines:
        try:
            report = json.loads(line)
            step, _ = int(report["step"]), float(report["progress"])
            report = {key: math.nan if value is None else value for key, value in report.items()}
        except (ValueError, KeyError, TypeError):
            continue  # an empty line, or one that a kill cut off
        while reports and reports[-1]["step"] >= step:
            reports.pop()
        reports.append(report)
    return reports
