"""The training loop and what surrounds it: checking the input, resuming, evaluating, saving, stopping."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch

from dist_ae import pca
from dist_ae.config import Config, InputError
from dist_ae.data import sources
from dist_ae.data.reader import Reader
from dist_ae.data.records import Dataset
from dist_ae.evaluate import Interrupted, evaluate, selection
from dist_ae.models.weights import weights_sha256
from dist_ae.optim import factor_at
from dist_ae.processes.runtime import Runtime, check_device, launched_world, plan_batch
from dist_ae.processes.stop import Agreement, Signals
from dist_ae.processes.watch import Watch
from dist_ae.run.checkpoint import Checkpoint, Damaged, Tensors, read_checkpoint, write_atomically
from dist_ae.run.directory import RunDirectory
from dist_ae.run.progress import Display
from dist_ae.run.tracking import Tracking, new_run_id
from dist_ae.step import Learner


class Stopped(Exception):
    """A signal stopped the run; its state is saved and the same command goes on from there."""

    exit_status = 75  # EX_TEMPFAIL


class NonFinite(Exception):
    """A loss or gradient was not finite. The weights are those before that step, and so is the last checkpoint."""

    exit_status = 1


@dataclass(frozen=True)
class Result:
    """What a finished run gives. ``metrics`` has ``val.mse`` and so on; all of it stands in ``result.json``."""

    metrics: dict[str, float]
    run_dir: Path
    steps: int
    world_size: int
    images_per_second: float
    weights_sha256: str
    best_step: int


@dataclass(frozen=True)
class Report:
    """What ``train`` hands to its caller after each evaluation, on every process. Metrics are over all processes."""

    step: int
    total_steps: int
    epoch: float
    metrics: dict[str, float]
    run_dir: Path


Reporter = Callable[[Report], None]


@dataclass
class State:
    """Where a run is. With the configuration and the tensors, all that its future depends on."""

    step: int = 0
    evaluated: bool = False  # whether the evaluation due at this step was done
    best: dict[str, Any] | None = None  # step, metric and value of the best evaluation so far


def train(config: Config, report: Reporter | None = None, start_from: Path | None = None) -> Result:
    """Trains one autoencoder, on as many processes as the launcher started; resumes what its run directory holds.

    Args:
        config: the experiment. Neither the hardware nor the number of processes is in it.
        report: called after each evaluation on every process; a sweep's seam.
        start_from: a checkpoint folder of another run of the same model: a run directory that has no checkpoint yet begins with its
            weights, optimizer state and step. Population-based training clones a trial with it.

    Raises:
        InputError: bad configuration, data or run directory; before any process group starts.
        Stopped: by SIGTERM or SIGINT, after a checkpoint at the current step.
        NonFinite: a loss or gradient was not finite.
        LostProcess: another process died or stopped answering.
    """
    with Signals().listening() as signals:
        config, dataset = prepare(config)
        with _run_directory(config, dataset) as folder:
            return _train_together(Job(config, dataset, folder, report, start_from, signals))


@dataclass(frozen=True)
class Job:
    """What one process was asked to do."""

    config: Config
    dataset: Dataset
    folder: RunDirectory | None  # None on all but rank 0
    report: Reporter | None
    start_from: Path | None
    signals: Signals


def _train_together(job: Job) -> Result:
    """Joins the other processes, trains, and says who is lost where one is."""
    runtime = Runtime(job.config)
    watch = Watch(runtime, job.config.train.timeout)
    try:
        result = _train(job, runtime, watch)
        watch.close()
        return result
    except RuntimeError as error:  # what a collective raises when a process is gone
        raise watch.explain(error) from error
    finally:
        runtime.close()


def prepare(config: Config) -> tuple[Config, Dataset]:
    """Finds everything that can be wrong with the input, before any process group starts, and fills in the image shape."""
    check_device(config)
    plan_batch(config.train.batch_size, launched_world()[1], config.train.max_per_process)
    dataset = sources.load(config.data)
    if config.model.image_shape not in (None, dataset.image_shape):
        raise InputError(
            f"model.image_shape is {config.model.image_shape}, but the images of {dataset.name} are {dataset.image_shape}"
        )
    pca.check(config, math.prod(dataset.image_shape))
    if config.train.batch_size > len(dataset.train):
        raise InputError(
            f"train.batch_size {config.train.batch_size} is larger than the dataset: {dataset.name} has {len(dataset.train)} training images"
        )
    return config.override({"model.image_shape": dataset.image_shape, "run_dir": config.directory()}), dataset


@contextmanager
def _run_directory(config: Config, dataset: Dataset) -> Iterator[RunDirectory | None]:
    """The locked run directory on rank 0, None on the others."""
    if launched_world()[0] != 0:
        yield None
        return
    folder = RunDirectory(config.directory())
    try:
        trajectory = {**config.trajectory_values(), "data.fingerprint": dataset.fingerprint}
        if (
            config.optim.schedule != "constant"
        ):  # it ends at the last step: another length is another learning rate from the start
            trajectory["total_steps"] = _total_steps(config, dataset)
        folder.claim(trajectory, describe(config))
        yield folder
    finally:
        folder.close()


def _total_steps(config: Config, dataset: Dataset) -> int:
    return config.train.steps or config.train.epochs * -(-len(dataset.train) // config.train.batch_size)


def describe(config: Config) -> dict[str, Any]:
    """The resolved configuration, the versions and the number of processes, for config.json and the trackers."""
    import accelerate

    versions = {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}
    return {"config": config.model_dump(mode="json"), "versions": versions, "world_size": launched_world()[1]}


def _train(job: Job, runtime: Runtime, watch: Watch) -> Result:
    config, dataset, folder = job.config, job.dataset, job.folder
    run_dir, total_steps = config.directory(), _total_steps(config, dataset)
    finished = runtime.on_main(lambda: folder.read("result.json") if folder else None)
    if finished is not None and finished.get("steps") == total_steps:
        return Result(**{**finished, "run_dir": run_dir})

    learner = Learner(config, dataset, runtime, total_steps)
    state = _resume(learner, folder, job.start_from)
    if config.model.start == "pca" and state.step == 0:
        pca.pca_start(learner.raw_model, config, learner.images, runtime)
    learner.prepare()
    validation = Reader(dataset.val, runtime.device, runtime.dtype)
    display = Display(runtime.is_main, state.step, total_steps)
    display.say(_headline(config, dataset, learner, state))
    tracking = _start_tracking(config, folder, display) if folder else None
    eval_every = config.train.eval_every or learner.steps_per_epoch
    save_every = config.train.save_every or eval_every
    clock, steps, batches = Clock(runtime), Agreement(runtime, job.signals), Agreement(runtime, job.signals)
    metrics: dict[str, float] = {}
    saved = (state.step, state.evaluated)

    def record(split: str, values: dict[str, float]) -> None:
        if folder is not None:
            folder.append_metrics({"step": state.step, "epoch": learner.epoch(state.step), "split": split, **values})
        if tracking is not None:
            tracking.log({f"{split}/{name}": value for name, value in values.items()}, state.step)

    def save() -> None:
        nonlocal saved
        if saved != (state.step, state.evaluated):
            _refuse_non_finite(learner, folder)
            _save(learner, state, folder)
            saved = (state.step, state.evaluated)

    def stop() -> NoReturn:
        save()
        raise Stopped(f"stopped at step {state.step} of {total_steps}; the same command goes on from there ({run_dir})")

    with display, tracking or nullcontext():
        while True:
            due = (state.step % eval_every == 0 and state.step > 0) or state.step == total_steps
            if due and not (state.evaluated and metrics):
                clock.pause()
                _refuse_non_finite(learner, folder)
                try:
                    with learner.evaluation_weights():
                        metrics = evaluate(learner.model, validation, config, runtime, batches.stop)
                except Interrupted:
                    stop()
                if (
                    not state.evaluated
                ):  # else resumed from a checkpoint after its evaluation: only the figures were missing
                    state.evaluated = True
                    state.best = _best(state, config, metrics)
                    record("val", metrics)
                display.evaluated(state.step, total_steps, learner.epoch(state.step), metrics, clock.rate())
            if state.step % save_every == 0 or state.step == total_steps:
                clock.pause()
                save()
            if due and job.report is not None:
                job.report(Report(state.step, total_steps, learner.epoch(state.step), _prefixed(metrics), run_dir))
            if state.step == total_steps:
                break
            if steps.stop():
                stop()
            clock.start()
            watch.step = state.step
            learner.step(state.step)
            state.step, state.evaluated = state.step + 1, False
            clock.images += learner.batch_size(state.step - 1)
            if state.step % config.train.log_every == 0 or state.step == total_steps:
                _refuse_non_finite(learner, folder)
                rate = factor_at(state.step - 1, total_steps, config.optim) * config.optim.lr
                values = {**learner.take_window(), "lr": rate, "images_per_second": clock.rate()}
                record("train", values)
                display.advance(state.step, values["loss"], values["images_per_second"])
        return _finish(learner, state, metrics, validation, clock, folder, tracking)


def _resume(learner: Learner, folder: RunDirectory | None, start_from: Path | None) -> State:
    """Fills the learner from the newest good checkpoint, else from ``start_from``; rank 0 reads it, ``Learner.prepare`` hands the tensors on."""
    live = _files(learner)

    def read() -> dict[str, Any] | None:
        assert folder is not None
        templates = {
            name: {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} for name, tensors in live.items()
        }
        checkpoint = folder.latest(templates)
        if checkpoint is None and start_from is not None:
            try:
                checkpoint = read_checkpoint(start_from, templates)
            except Damaged as error:
                raise InputError(f"start_from {start_from}: {error}") from None
            checkpoint.state |= {"evaluated": False, "best": None}  # those were the other run's
        if checkpoint is None:
            folder.rewind_metrics(0, evaluated=False)
            return None
        if checkpoint.step > learner.total_steps:
            raise InputError(
                f"{folder.path} was already trained for {checkpoint.step} steps, more than the {learner.total_steps} asked for; "
                "ask for more, or choose another --run-dir"
            )
        with torch.no_grad():
            for name, tensors in checkpoint.files.items():
                for key, tensor in tensors.items():
                    live[name][key].copy_(tensor)
        folder.rewind_metrics(checkpoint.step, bool(checkpoint.state["evaluated"]))
        return {"step": checkpoint.step, **checkpoint.state}

    kept = learner.runtime.on_main(read)
    if kept is None:
        return State()
    learner.window_images = int(kept["window_images"])
    if folder is not None:  # the sums of all processes go on in rank 0's
        learner.window.copy_(torch.tensor(kept["window"], dtype=learner.window.dtype))
    if kept["scaler"] and learner.runtime.accelerator.scaler is not None:
        learner.runtime.accelerator.scaler.load_state_dict(kept["scaler"])
    return State(int(kept["step"]), bool(kept["evaluated"]), kept["best"])


def _save(learner: Learner, state: State, folder: RunDirectory | None) -> None:
    window = learner.runtime.sum(learner.window.clone()).tolist()
    if folder is None:
        return
    scaler = learner.runtime.accelerator.scaler
    rest = {
        "evaluated": state.evaluated,
        "best": state.best,
        "images_seen": learner.images_seen(state.step),
        "window": window,
        "window_images": learner.window_images,
        "scaler": scaler.state_dict() if scaler else None,
    }
    folder.save(
        Checkpoint(state.step, _files(learner), rest),
        learner.config.train.keep,
        state.best["step"] if state.best else None,
    )


def _files(learner: Learner) -> dict[str, Tensors]:
    """The learner's live tensors by the checkpoint file that holds them."""
    return {f"{name}.safetensors": tensors for name, tensors in learner.tensors().items()}


def _refuse_non_finite(learner: Learner, folder: RunDirectory | None) -> None:
    """Reads the guard; every process finds the same. Writes what ``dist-ae doctor --replay`` needs.

    Raises:
        NonFinite: naming the step.
    """
    step = learner.guard.bad_step()
    if step is None:
        return
    if folder is not None:
        bundle = {
            "step": step,
            "seed": learner.config.seed,
            "rows": learner.rows(step).tolist(),
            "config": learner.config.model_dump(mode="json"),
        }
        folder.write("nonfinite.json", bundle)
        write_atomically(folder.path / "nonfinite.safetensors", safetensors.torch.save(learner.tensors()["weights"]))
    raise NonFinite(
        f"the loss or gradient of step {step} is not finite. No weight was changed by it, and the last checkpoint is from before it. "
        f"`dist-ae doctor {learner.config.directory()} --replay` repeats that step on one process; a lower optim.lr or optim.clip_norm may help"
    )


def _best(state: State, config: Config, metrics: dict[str, float]) -> dict[str, Any]:
    name, sign = selection(config)
    if state.best is not None and sign * metrics[name] <= sign * state.best["value"]:
        return state.best
    return {"step": state.step, "metric": f"val.{name}", "value": metrics[name]}


def _finish(
    learner: Learner,
    state: State,
    metrics: dict[str, float],
    validation: Reader,
    clock: Clock,
    folder: RunDirectory | None,
    tracking: Tracking | None,
) -> Result:
    """The pictures and ``result.json``, on rank 0; the same result on every process."""

    learner.refuse_divergence()

    def write() -> dict[str, Any]:
        from dist_ae.figures import (
            run_pictures,  # matplotlib takes 0.5 s to import, which the first step need not wait for
        )

        assert folder is not None
        weights = learner.tensors()["ema" if learner.ema else "weights"]
        with learner.evaluation_weights():
            pictures = run_pictures(learner.raw_model, learner.config, validation, folder.path)
        for name, path in pictures.items():
            if tracking is not None:
                tracking.log_image(name, path, state.step)
        assert state.best is not None
        result = {
            "metrics": _prefixed(metrics),
            "steps": state.step,
            "world_size": learner.runtime.world,
            "images_per_second": clock.rate(),
            "weights_sha256": weights_sha256(weights),
            "best_step": state.best["step"],
        }
        folder.write("result.json", result)
        return result

    return Result(**learner.runtime.on_main(write), run_dir=learner.config.directory())


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {f"val.{name}": value for name, value in metrics.items()}


def _headline(config: Config, dataset: Dataset, learner: Learner, state: State) -> str:
    world, parameters = learner.runtime.world, sum(p.numel() for p in learner.parameters)
    where = f"{world} process{'es' if world > 1 else ''} on {learner.runtime.device.type}, {config.precision}"
    start = f"resuming at step {state.step}" if state.step else f"{learner.total_steps} steps"
    return f"{config.name} on {dataset.name}: {len(dataset.train)} images, {parameters:,} parameters, {where}; {start} → {config.directory()}"


def _start_tracking(config: Config, folder: RunDirectory, display: Display) -> Tracking:
    kept = folder.read("tracking.json") or {}
    if "wandb_id" not in kept:
        kept = {"wandb_id": new_run_id()}
        folder.write("tracking.json", kept)
    return Tracking(config.tracking, folder.path, config.name, str(kept["wandb_id"]), describe(config), display.say)


class Clock:
    """Images per second of training; evaluation and saving are not counted."""

    def __init__(self, runtime: Runtime) -> None:
        self.images, self._seconds, self._device = 0, 0.0, runtime.device
        self._since: float | None = None

    def start(self) -> None:
        """Training goes on."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Training pauses; waits for the device, so that what it still has to do is counted."""
        if self._since is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def rate(self) -> float:
        """Images per second over all processes since this process began."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self.images / max(self._seconds + running, 1e-9)
