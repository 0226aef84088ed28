"""A run in progress: how it begins or resumes, what it writes to the disk, and when it has to stop."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dist_ae import sentences
from dist_ae.begin import Prepared
from dist_ae.config import Config, InputError, TrainConfig
from dist_ae.data.crops import Crops
from dist_ae.data.facts import remarks
from dist_ae.data.layout import named
from dist_ae.data.memory import NAME
from dist_ae.data.order import share
from dist_ae.data.records import Dataset
from dist_ae.evaluate import Stop, comparable
from dist_ae.files import Damaged, write_atomically
from dist_ae.models.cost import cost_of
from dist_ae.outcome import NonFinite, Result, Stopped
from dist_ae.processes.environment import notes
from dist_ae.processes.runtime import Runtime, emulation_notes
from dist_ae.run import calibration
from dist_ae.run.checkpoint import Checkpoint, read_checkpoint, template_of
from dist_ae.run.directory import RunDirectory, SaveError
from dist_ae.run.progress import Display, processes_table
from dist_ae.run.records import Records
from dist_ae.run.tracking import Tracking, new_run_id
from dist_ae.saved import read_weights, saved_weights
from dist_ae.step import WEIGHTS_PART, Learner
from dist_ae.terminal import say
from dist_ae.timeline import State, Timeline, selection
from dist_ae.validation import Validation

LAST_SAVE_SECONDS = 30.0  # how long the end of a run waits for room on the disk
STOP_SAVE_SECONDS = 4.0  # the same when a run is stopped, which must not take longer than 10 s in all
SMALLEST_SCALE = 2.0**-14  # of fp16's gradients: 30 overflows in a row, each of which halves it


@dataclass
class Run:
    """A run in progress, as one of its processes sees it."""

    config: Config
    timeline: Timeline
    state: State
    learner: Learner
    validation: Validation
    records: Records
    folder: RunDirectory | None  # None on all but rank 0
    saved: tuple[int, bool]  # the key of the state that is on the disk
    looked: Mapping[str, Any] = field(default_factory=dict)  # facts about the pictures, gathered when they were packed

    @property
    def path(self) -> Path:
        return self.config.directory()

    @property
    def metrics(self) -> dict[str, float]:
        return {f"val.{name}": value for name, value in self.state.metrics.items()}


# -- its beginning


def finished_before(prepared: Prepared, folder: RunDirectory | None, runtime: Runtime) -> Result | None:
    """The result of a run that was finished before; None for any other run. Every process takes part."""
    run_dir = prepared.config.directory()
    stored = runtime.on_main(lambda: _stored_result(folder, prepared) if folder else None)
    if stored is None:
        return None
    if prepared.config.model.architecture == "own":
        saved_weights(run_dir, prepared.model.to(runtime.dtype))  # refuses a model that has changed since
    if runtime.is_main:
        if folder is not None:  # the run may have been killed after it wrote its result and before this
            prune_finished(folder, prepared.config, stored["steps"])
        say(f"{run_dir} was finished before, at step {stored['steps']}; nothing is trained")
    return Result(**stored, run_dir=run_dir)


def _stored_result(folder: RunDirectory, prepared: Prepared) -> dict[str, Any] | None:
    """The contents of ``result.json`` if the run is finished, that is, if its last step is on the disk; else None."""
    stored, patience = folder.read("result.json"), prepared.config.train.patience
    names = {f.name for f in fields(Result)} - {"run_dir"}
    if stored is None or not names <= set(stored) or not isinstance(stored["steps"], int):
        return None
    figures = stored["metrics"]
    numbers = [stored[name] for name in ("world_size", "images_per_second", "best_step")]
    numbers += figures.values() if isinstance(figures, dict) else [None]
    if not all(isinstance(number, int | float) for number in numbers):  # no run wrote this: write it again
        return None
    ran_out = patience is not None and stored.get("patience") == patience
    if not folder.holds(stored["steps"]) or not (stored["steps"] == prepared.timeline.total_steps or ran_out):
        return None
    return {name: stored[name] for name in names}


def begin(prepared: Prepared, folder: RunDirectory | None, start_from: Path | None, runtime: Runtime) -> Run:
    """Starts or resumes: fills learner and state, and prints what is trained and where."""
    config, dataset, timeline = prepared.config, prepared.dataset, prepared.timeline
    learner = Learner(config, dataset, prepared.model, runtime, timeline)
    state = _resume(learner, folder, start_from)
    display = Display(runtime.is_main, state.step, timeline.total_steps, bool(config.objective.noise_std))
    for text in (
        *notes(config),
        *emulation_notes(runtime),
        *remarks(dataset.looked),
        _headline(prepared, learner, state),
    ):
        display.say(text)
    validation = Validation(dataset, config, runtime)
    if config.model.start == "pca" and state.step == 0 and config.init_from is None:
        validation.start(learner)
    sigma = config.objective.sigma
    if (
        config.model.variational
        and config.objective.likelihood == "gaussian"
        and sigma != "learned"
        and state.step == 0
    ):
        variances, unit = validation.variances(learner), 1.0 if learner.raw_model.standardized else 2.0
        numbers = torch.Size(learner.raw_model.code_shape).numel()
        display.say(sentences.expected_collapse(variances, sigma, config.objective.beta, numbers, unit))
    learner.prepare()
    if runtime.world > 1:
        shares = [len(share(range(config.train.batch_size), rank, runtime.world)) for rank in range(runtime.world)]
        for text in processes_table(runtime.places(), shares, config.precision, learner.exchange):
            display.say(text)
    tracking = _start_tracking(prepared, folder, display, state.step) if folder else None
    records = Records(folder, tracking, display, timeline)
    return Run(config, timeline, state, learner, validation, records, folder, saved=state.key(), looked=dataset.looked)


def _resume(learner: Learner, folder: RunDirectory | None, start_from: Path | None) -> State:
    """Fills the learner from the newest good checkpoint, else from ``start_from``, and returns the state of the run."""
    checkpoint: Checkpoint | None = None

    def read() -> dict[str, Any] | None:
        nonlocal checkpoint
        assert folder is not None
        templates = {f"{name}.safetensors": template_of(part) for name, part in learner.tensors().items()}
        checkpoint = folder.latest(templates)
        if checkpoint is None and start_from is not None:
            try:
                checkpoint = read_checkpoint(start_from, templates)
            except Damaged as error:
                raise InputError(f"start_from {start_from}: {error}") from None
            checkpoint.state |= {"evaluated": False, "best": None, "metrics": {}}  # these are the other run's
        if checkpoint is None:
            folder.rewind_metrics(0, evaluated=False)
            return None
        config, best = learner.config, checkpoint.state.get("best")
        metric, _ = selection(config.model.variational, config.objective.noise_std, config.data.scale == "standard")
        if isinstance(best, dict) and not comparable(best, metric, config.evaluation.noise_std):
            folder.warn("evaluation.noise_std has changed, so the search for the best evaluation begins anew")
            checkpoint.state |= {"evaluated": False, "best": None, "metrics": {}}
        total = learner.timeline.total_steps
        if checkpoint.step > total:
            raise InputError(
                f"{folder.path} was already trained for {checkpoint.step} steps, more than the {total} asked for; "
                "ask for more, or choose another --run-dir"
            )
        folder.rewind_metrics(checkpoint.step, bool(checkpoint.state.get("evaluated")))
        return {"step": checkpoint.step, **checkpoint.state}

    values = learner.runtime.on_main(read)
    if values is None:
        return State()
    files = {} if checkpoint is None else checkpoint.files
    try:
        learner.load({name.removesuffix(".safetensors"): part for name, part in files.items()}, values)
        return State.of(values)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise InputError(
            f"checkpoint {values['step']} of {learner.config.directory()}: its state.json lacks what a resume needs "
            f"({error!r}). Remove that checkpoint to resume from the one before it"
        ) from None


def _headline(prepared: Prepared, learner: Learner, state: State) -> str:
    config, runtime, dataset = prepared.config, learner.runtime, prepared.dataset
    cost = cost_of(learner.raw_model, runtime.lower)
    processes = f"{runtime.world} process{'es' if runtime.world > 1 else ''}"
    scale = {"standard": ", standardized", "range": ", scaled to [0, 1]"}.get(dataset.scale, "")
    start = f"resuming at step {state.step}" if state.step else f"{learner.timeline.total_steps} steps"
    return sentences.headline(
        what=f"{config.name} on {dataset.name}",
        records=f"{_count_of(dataset)} {named(dataset.shape or dataset.image_shape)}{scale}",
        held=learner.images.held,
        numbers=torch.Size(learner.raw_model.code_shape).numel(),
        parameters=sum(p.numel() for p in learner.parameters),
        operations=cost.operations,
        memory=learner.memory(cost.kept),
        where=f"{processes} on {runtime.device.type}, {config.precision}",
        how=f"{start} → {config.directory()}",
    )


def _count_of(dataset: Dataset) -> str:
    """The number of training records, in words: of crops also that of their pictures."""
    train = dataset.train
    count = f"{len(train):,}"
    if not isinstance(train.images, Crops) or train.rows is None:
        return count
    return f"{len(np.unique(train.rows >> 33)):,} pictures, an epoch of {count} crops:"


def _start_tracking(prepared: Prepared, folder: RunDirectory, display: Display, step: int) -> Tracking:
    config, stored = prepared.config, folder.read("tracking.json") or {}
    if not re.fullmatch(r"[\w-]{1,64}", str(stored.get("wandb_id", ""))):  # it becomes the name of a folder
        stored = {"wandb_id": new_run_id()}
        folder.write("tracking.json", stored)
    tags = (config.name, Path(config.data.name).name, config.model.architecture)
    run_id = str(stored["wandb_id"])
    name = str(prepared.description["label"])

    def renamed(new: str) -> None:
        with contextlib.suppress(OSError):  # the next start renames it again
            folder.write("tracking.json", {"wandb_id": new})

    before = (step, folder.metrics() if step else b"")
    about = (prepared.description, display.say, tags)
    return Tracking(config.tracking, folder.path, name, run_id, *about, renamed=renamed, before=before)


# -- its files


def save(run: Run, last: bool, stopping: bool) -> None:
    """Writes a checkpoint of the state, unless there is one already.

    Raises:
        Stopped: the run is ``stopping``, whether or not the checkpoint could be written.
        SaveError: the ``last`` checkpoint of the run could not be written.
    """
    state, learner, folder = run.state, run.learner, run.folder
    learner.runtime.clock.pause("saving")
    if run.saved != state.key():
        refuse_non_finite(run)
        parts, values = learner.state()
        for name, part in parts.items():  # every reader refuses a checkpoint with values that are not finite
            if not all(bool(tensor.isfinite().all()) for tensor in part.values()):
                raise NonFinite(sentences.bad_state(state.step, name))
        files = {f"{name}.safetensors": part for name, part in parts.items()}
        seconds = STOP_SAVE_SECONDS if stopping else LAST_SAVE_SECONDS if last else 0.0

        def write() -> bool:
            assert folder is not None
            checkpoint = Checkpoint(state.step, files, {**state.to_json(), **values})
            best = state.best.step if state.best else None
            return folder.save(checkpoint, run.config.train.keep, best, min(seconds, run.config.train.timeout / 2))

        if learner.runtime.on_main(write):
            run.saved = state.key()
    if stopping:
        raise Stopped(sentences.stopped(state.step, run.saved[0], run.timeline.total_steps, run.path))
    if last and run.saved[0] != state.step:
        raise SaveError(sentences.unsaved(state.step, run.saved[0], run.path))


def refuse_non_finite(run: Run) -> None:
    """Ends a run whose loss or gradient was not finite, and writes what ``dist-ae doctor --replay`` needs.

    The guard says the same on every process.

    Raises:
        NonFinite: naming the step.
    """
    config, learner, scaler = run.config, run.learner, run.learner.runtime.accelerator.scaler
    if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
        raise NonFinite(sentences.exhausted_scale(scaler.get_scale()))
    step = learner.guard.bad_step()
    if step is None:
        return
    if run.folder is not None:
        rows = learner.rows(step).tolist()
        bundle = {"step": step, "seed": config.seed, "rows": rows, "config": config.model_dump(mode="json")}
        run.folder.write("nonfinite.json", bundle)
        weights = safetensors.torch.save(learner.tensors()[WEIGHTS_PART])
        write_atomically(run.folder.path / "nonfinite.safetensors", weights)
    # The command that repeats the step cannot have images or a model that came from Python.
    from_python = config.data.name == NAME or config.model.architecture == "own"
    raise NonFinite(sentences.non_finite(step, None if from_python else run.path))


def save_calibrations(run: Run, stop: Stop) -> None:
    """Writes the calibration of the scores, which thresholds need, for the last weights and for the best.

    A full disk does not fail the run: `dist-ae score` can compute a missing calibration from the data again.

    Raises:
        StopRequested: ``stop`` answered yes.
    """
    learner, folder, last = run.learner, run.folder, run.state.step
    assert run.state.best is not None
    best = run.state.best.step

    def keep(step: int) -> None:
        measured = run.validation.calibration(learner, stop)
        if folder is not None:
            try:
                calibration.write(folder.path, step, measured.tensors())
            except (OSError, Damaged) as error:
                reason = getattr(error, "strerror", None) or error
                run.records.warn(f"the threshold of step {step} could not be kept in {run.path}: {reason}")

    def read() -> dict[str, Tensor] | None:
        assert folder is not None
        try:
            return read_weights(folder.checkpoints / f"{best:08d}", learner.raw_model)[1]
        except Damaged:
            return None

    with learner.evaluation_weights():
        keep(last)
    if best != last:
        with learner.weights_from(read) as readable:
            if readable:
                keep(best)
    if folder is not None:
        calibration.keep_only(folder.path, (last, best))


def prune_finished(folder: RunDirectory, config: Config, last: int) -> None:
    """Removes what a finished run no longer needs, unless the user asked for more checkpoints than the default."""
    if config.train.keep != TrainConfig().keep:
        return
    try:
        folder.finish(last)
    except (OSError, Damaged) as error:
        reason = getattr(error, "strerror", None) or error
        folder.warn(f"older checkpoints in {folder.checkpoints} could not be removed: {reason}")


def write_result(run: Run, result: Result) -> Result:
    """Writes ``result.json``, which marks the run as finished."""

    def write() -> None:
        assert run.folder is not None
        content = {name: value for name, value in asdict(result).items() if name != "run_dir"}
        # A run that ended early keeps its patience, so that the same command finds it finished.
        early = {"patience": run.config.train.patience} if result.steps < run.timeline.total_steps else {}
        data = {"data": looked} if (looked := dict(run.looked)) else {}
        run.folder.write("result.json", {**content, **early, **data})

    run.learner.runtime.on_main(write)
    return result
