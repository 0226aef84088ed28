"""Runs one trial, in its own run directory.

A retry, on any node, is the same call again. dist_ae continues from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

import dist_ae
from dist_ae.sweeping import can_retry, probe_accuracy, tell_resources

from .plan import Sweep, Trial, append_report, read_object, read_reports, read_sweep, write_json

RETRIES = 5  # how often a trial continues after losing its process, before it is left for --resume
LOCK_SECONDS = 120  # how long the process before a retry may still hold the run directory
WORKERS = "workers.json"  # names the placement group of a trial's workers while they hold one
Send = Callable[[dict[str, Any]], None]


def run_trial(assignment: dict[str, Any]) -> None:
    """A trial with one worker, in a Ray Tune actor."""
    import ray.tune

    sweep = read_sweep(Path(assignment["sweep_dir"]))
    trial = sweep.trial(ray.tune.get_context().get_trial_name())
    checkpoint = ray.tune.get_checkpoint()
    if checkpoint is not None and assignment.get("clone") not in (None, trial.clone):
        trial = adopt(sweep, trial, assignment, Path(checkpoint.path))
    with _own_log(sweep.trial_dir(trial.id)):
        train_trial(sweep, trial, lambda report: _report_to_tune(sweep, trial, report))


def _report_to_tune(sweep: Sweep, trial: Trial, report: dict[str, Any]) -> None:
    import ray.tune

    checkpoint = sweep.run_dir(trial) / "checkpoints" / f"{report['step']:08d}"
    if sweep.settings.scheduler == "pbt" and checkpoint.is_dir():
        ray.tune.report(report, checkpoint=ray.tune.Checkpoint.from_directory(str(checkpoint)))
    else:
        ray.tune.report(report)


def run_distributed_trial(assignment: dict[str, Any]) -> None:
    """A trial with several workers. This actor only drives Ray Train, whose workers train together by Accelerate."""
    import ray.train
    import ray.tune
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    sweep = read_sweep(Path(assignment["sweep_dir"]))
    trial = sweep.trial(ray.tune.get_context().get_trial_name())
    settings, gpu = sweep.settings, sweep.settings.gpus_per_worker > 0
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": settings.gpus_per_worker} if gpu else {})
    timeout = int(sweep.config(trial).train.timeout)
    workers = settings.workers_per_trial
    scaling = ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources)
    TorchTrainer(
        run_worker,
        train_loop_config={"sweep_dir": assignment["sweep_dir"], "id": trial.id},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=timeout),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            # The name of this attempt. The state of earlier attempts is in the run directory.
            name=f"{trial.id}-{uuid.uuid4().hex[:6]}",
            storage_path=str(sweep.path / "ray"),
            # Tune retries the whole trial. Ray Train would also retry a trial that was stopped.
            failure_config=ray.train.FailureConfig(max_failures=0),
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def run_worker(loop: dict[str, Any]) -> None:
    """One worker of a trial with several workers."""
    import ray.train
    import ray.util

    sweep = read_sweep(Path(loop["sweep_dir"]))
    trial = sweep.trial(loop["id"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would log every report
    group = ray.util.get_current_placement_group()
    if group is not None and ray.train.get_context().get_world_rank() == 0:
        write_json(sweep.trial_dir(trial.id) / WORKERS, {"placement_group": group.id.hex()})
    with _own_log(sweep.trial_dir(trial.id), name=f"log-{ray.train.get_context().get_world_rank()}.txt"):
        train_trial(sweep, trial, ray.train.report)


def free_workers(trial_dir: Path) -> None:
    """Frees the resources of a trial's workers, and ends them, even if their driver is gone.

    Without the dashboard, Ray keeps the resources of an aborted Ray Train run until the whole job ends. The next trial
    would wait for them for ever.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    group = read_object(trial_dir / WORKERS)
    if group is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group["placement_group"])))
        (trial_dir / WORKERS).unlink(missing_ok=True)


def train_trial(sweep: Sweep, trial: Trial, send: Send) -> None:
    """Trains, or continues training, and reports each evaluation. Every worker of every kind of trial calls this.

    An error of the code, the data or the arithmetic is recorded and not raised, since a retry would only repeat it. An
    error that a retry can mend (memory, storage, a lost peer) is raised.
    """
    folder = sweep.trial_dir(trial.id)
    if (read_object(folder / "outcome.json") or {}).get("status") == "failed":
        return  # another worker recorded the failure, and this one was only waiting for it
    tell_resources(sweep.settings.cpus_per_worker, sweep.settings.gpus_per_worker)
    rank = int(os.environ.get("RANK", 0))
    main = rank == 0
    run_dir, started = sweep.run_dir(trial), time.monotonic()
    before = sum(r["seconds"] for r in read_reports(folder)[-1:])
    last = {"step": 0, "progress": 0.0}

    def announce(step: int, progress: float, metrics: dict[str, float]) -> None:
        if sweep.metric == "val.probe_accuracy":
            # Rank 0 computes it for the trial.
            metrics = {**metrics, "val.probe_accuracy": probe_accuracy(run_dir) if main else math.nan}
        report = {"step": step, "progress": progress, **metrics, "seconds": before + time.monotonic() - started}
        last.update(step=step, progress=progress)
        if main:
            append_report(folder, report)
        send(report)

    def on_evaluation(report: dist_ae.Report) -> None:
        if report.step < report.total_steps:  # the last one is sent after result.json: a stop could come in between
            announce(report.step, 100 * report.step / report.total_steps, report.metrics)

    try:
        if main:
            _wait_for_lock(run_dir)
            _fix_tracking_id(run_dir, trial.id)
        start = next((run_dir / "start").glob("[0-9]*"), None)
        result = dist_ae.train(sweep.config(trial), report=on_evaluation, start_from=start)
        announce(result.steps, 100.0, result.metrics)
    except Exception as error:
        if can_retry(error) and not (isinstance(error, dist_ae.OutOfMemory) and _seen_before(folder, rank)):
            raise
        # All workers raise InputError and NonFinite at once.
        if main or not isinstance(error, (dist_ae.InputError, dist_ae.NonFinite)):
            sweep.end_trial(trial.id, "failed", f"{type(error).__name__}: {error}")
            import traceback

            (folder / "error.txt").write_text(traceback.format_exc())
        send({**last, sweep.metric: math.nan, "failed": True})


def _seen_before(folder: Path, rank: int) -> bool:
    """Whether this worker of the trial has run out of a device's memory before.

    The first time, another trial may have held some of it. A second time, the trial itself is too large, and the sweep
    continues without it. Each worker counts separately, since all of them may fail in one attempt.
    """
    marker = folder / f"out-of-memory-{rank}"
    seen = marker.exists()
    marker.touch()
    return seen


def _wait_for_lock(run_dir: Path) -> None:
    """Waits until the process before this one releases the run directory.

    That process was stopped or paused, or it is cut off on a node that Ray has given up.
    """
    if (run_dir / ".lock").exists():
        FileLock(run_dir / ".lock").acquire(timeout=LOCK_SECONDS).lock.release()


def _fix_tracking_id(run_dir: Path, trial_id: str) -> None:
    """Gives W&B the trial's id, in every generation and after every retry."""
    if read_object(run_dir / "tracking.json") is None:
        write_json(run_dir / "tracking.json", {"wandb_id": trial_id})


@contextlib.contextmanager
def _own_log(folder: Path, name: str = "log.txt") -> Iterator[None]:
    """Redirects the output of training into the trial's folder. The terminal shows the sweep."""
    with open(folder / name, "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def adopt(sweep: Sweep, trial: Trial, assignment: dict[str, Any], checkpoint: Path) -> Trial:
    """Begins a trial's next generation with a better trial's weights, optimizer state and step, and with new values.

    The copy is complete before trial.json names the generation, so a crash leaves the old generation or the new one.
    """
    values = {key: assignment[key] for key in trial.values}
    donors, generation = (*trial.donors, str(assignment["donor"])), trial.generation + 1
    clone = replace(trial, values=values, generation=generation, clone=assignment["clone"], donors=donors)
    start = sweep.run_dir(clone) / "start"
    shutil.rmtree(sweep.run_dir(clone), ignore_errors=True)
    start.mkdir(parents=True)
    step = int(json.loads((checkpoint / "state.json").read_text())["step"])
    shutil.copytree(checkpoint, start / f"{step:08d}", ignore=shutil.ignore_patterns(".*"))
    sweep.write_trial(clone)
    return clone


def sees(path: str) -> bool:
    """Whether this node sees a file that the driver wrote."""
    return Path(path).exists()
