"""A run in progress: how it begins or resumes, what it puts on the disk, and when it must not go on."""

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
from dist_ae.processes.runtime import Runtime, slow
from dist_ae.run import calibration
from dist_ae.run.checkpoint import Checkpoint, read_checkpoint, template_of
from dist_ae.run.directory import RunDirectory, SaveError
from dist_ae.run.progress import Display, processes_table
from dist_ae.run.records import Records
from dist_ae.run.tracking import Tracking, new_run_id
from dist_ae.saved import read_weights, saved_weights
from dist_ae.step import WEIGHTS, Learner
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
    line: Timeline
    state: State
    learner: Learner
    validation: Validation
    records: Records
    folder: RunDirectory | None  # None on all but rank 0
    saved: tuple[int, bool]  # the key of the state that is on the disk
    looked: Mapping[str, Any] = field(default_factory=dict)  # what was found in the pictures when they were packed

    @property
    def path(self) -> Path:
        return self.config.directory()

    @property
    def metrics(self) -> dict[str, float]:
        return {f"val.{name}": value for name, value in self.state.metrics.items()}


# -- its beginning


def finished_before(prepared: Prepared, folder: RunDirectory | None, runtime: Runtime) -> Result | None:
    """The result of a run that was finished before. Every process takes part."""
    run_dir = prepared.config.directory()
    kept = runtime.on_main(lambda: _kept_result(folder, prepared) if folder else None)
    if kept is None:
        return None
    if prepared.config.model.architecture == "own":
        saved_weights(run_dir, prepared.model.to(runtime.dtype))  # refuses a model that is another by now
    if runtime.is_main:
        if folder is not None:  # where a kill came between the result and this
            keep_what_is_used(folder, prepared.config, kept["steps"])
        say(f"{run_dir} was finished before, at step {kept['steps']}; nothing is trained")
    return Result(**kept, run_dir=run_dir)


def _kept_result(folder: RunDirectory, prepared: Prepared) -> dict[str, Any] | None:
    """What ``result.json`` says of a finished run, which is one whose last step is on the disk."""
    kept, patience = folder.read("result.json"), prepared.config.train.patience
    wanted = {f.name for f in fields(Result)} - {"run_dir"}
    if kept is None or not wanted <= set(kept) or not isinstance(kept["steps"], int):
        return None
    figures = kept["metrics"]
    numbers = [kept[name] for name in ("world_size", "images_per_second", "best_step")]
    numbers += figures.values() if isinstance(figures, dict) else [None]
    if not all(isinstance(number, int | float) for number in numbers):  # not as a run writes it: it is written again
        return None
    ran_out = patience is not None and kept.get("patience") == patience
    if not folder.holds(kept["steps"]) or not (kept["steps"] == prepared.line.total_steps or ran_out):
        return None
    return {name: kept[name] for name in wanted}


def begin(prepared: Prepared, folder: RunDirectory | None, start_from: Path | None, runtime: Runtime) -> Run:
    """Starts or resumes: fills learner and state, and says what is trained and where."""
    config, dataset, line = prepared.config, prepared.dataset, prepared.line
    learner = Learner(config, dataset, prepared.model, runtime, line)
    state = _resume(learner, folder, start_from)
    display = Display(runtime.is_main, state.step, line.total_steps, bool(config.objective.noise_std))
    for text in (*notes(config), *slow(runtime), *remarks(dataset.looked), _headline(prepared, learner, state)):
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
        display.say(sentences.collapse_foretold(variances, sigma, config.objective.beta, numbers, unit))
    learner.prepare()
    if runtime.world > 1:
        shares = [len(share(range(config.train.batch_size), rank, runtime.world)) for rank in range(runtime.world)]
        for text in processes_table(runtime.places(), shares, config.precision, learner.exchange):
            display.say(text)
    records = Records(folder, _start_tracking(prepared, folder, display) if folder else None, display, line)
    return Run(config, line, state, learner, validation, records, folder, saved=state.key(), looked=dataset.looked)


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
            checkpoint.state |= {"evaluated": False, "best": None, "metrics": {}}  # what it held is the other run's
        if checkpoint is None:
            folder.rewind_metrics(0, evaluated=False)
            return None
        config, best = learner.config, checkpoint.state.get("best")
        metric, _ = selection(config.model.variational, config.objective.noise_std, config.data.scale == "standard")
        if isinstance(best, dict) and not comparable(best, metric, config.evaluation.noise_std):
            folder.warn("evaluation.noise_std is another one now, so the best evaluation is sought anew from here on")
            checkpoint.state |= {"evaluated": False, "best": None, "metrics": {}}
        total = learner.timeline.total_steps
        if checkpoint.step > total:
            raise InputError(
                f"{folder.path} was already trained for {checkpoint.step} steps, more than the {total} asked for; "
                "ask for more, or choose another --run-dir"
            )
        folder.rewind_metrics(checkpoint.step, bool(checkpoint.state.get("evaluated")))
        return {"step": checkpoint.step, **checkpoint.state}

    kept = learner.runtime.on_main(read)
    if kept is None:
        return State()
    files = {} if checkpoint is None else checkpoint.files
    try:
        learner.load({name.removesuffix(".safetensors"): part for name, part in files.items()}, kept)
        return State.of(kept)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise InputError(
            f"checkpoint {kept['step']} of {learner.config.directory()}: its state.json lacks what a resume needs "
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
        records=f"{_counted(dataset)} {named(dataset.shape or dataset.image_shape)}{scale}",
        held=learner.images.held,
        numbers=torch.Size(learner.raw_model.code_shape).numel(),
        parameters=sum(p.numel() for p in learner.parameters),
        operations=cost.operations,
        memory=learner.memory(cost.kept),
        where=f"{processes} on {runtime.device.type}, {config.precision}",
        how=f"{start} → {config.directory()}",
    )


def _counted(dataset: Dataset) -> str:
    train = dataset.train
    count = f"{len(train):,}"
    if not isinstance(train.images, Crops) or train.rows is None:
        return count
    return f"{len(np.unique(train.rows >> 33)):,} pictures, an epoch of {count} crops:"


def _start_tracking(prepared: Prepared, folder: RunDirectory, display: Display) -> Tracking:
    config, kept = prepared.config, folder.read("tracking.json") or {}
    if not re.fullmatch(r"[\w-]{1,64}", str(kept.get("wandb_id", ""))):  # it becomes the name of a folder
        kept = {"wandb_id": new_run_id()}
        folder.write("tracking.json", kept)
    tags = (config.name, Path(config.data.name).name, config.model.architecture)
    run_id = str(kept["wandb_id"])
    name = str(prepared.description["label"])

    def renamed(new: str) -> None:
        with contextlib.suppress(OSError):  # the next start finds out again
            folder.write("tracking.json", {"wandb_id": new})

    return Tracking(
        config.tracking, folder.path, name, run_id, prepared.description, display.say, tags, renamed=renamed
    )


# -- its files


def save(run: Run, last: bool, stopping: bool) -> None:
    """Puts a checkpoint of the state on the disk, unless there is one.

    Raises:
        Stopped: where the run is ``stopping``, whether or not it could be written.
        SaveError: the ``last`` checkpoint of the run could not be written.
    """
    state, learner, folder = run.state, run.learner, run.folder
    learner.runtime.clock.pause("saving")
    if run.saved != state.key():
        refuse_non_finite(run)
        parts, values = learner.state()
        for name, part in parts.items():  # a checkpoint that holds what is not finite would be refused by every reader
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
        raise Stopped(sentences.stopped(state.step, run.saved[0], run.line.total_steps, run.path))
    if last and run.saved[0] != state.step:
        raise SaveError(sentences.unsaved(state.step, run.saved[0], run.path))


def refuse_non_finite(run: Run) -> None:
    """Reads the guard, which says the same on every process, and writes what ``dist-ae doctor --replay`` needs.

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
        weights = safetensors.torch.save(learner.tensors()[WEIGHTS])
        write_atomically(run.folder.path / "nonfinite.safetensors", weights)
    # The command that repeats the step has neither images nor a model from Python.
    from_python = config.data.name == NAME or config.model.architecture == "own"
    raise NonFinite(sentences.non_finite(step, None if from_python else run.path))


def keep_thresholds(run: Run, stop: Stop) -> None:
    """Keeps in the run what thresholds of its scores need, for the last weights and for the best.

    A full disk does not fail the run: `dist-ae score` can find what is missing from the data again.

    Raises:
        StopRequested: ``stop`` said so.
    """
    learner, folder, last = run.learner, run.folder, run.state.step
    assert run.state.best is not None
    best = run.state.best.step

    def keep(step: int) -> None:
        found = run.validation.calibration(learner, stop)
        if folder is not None:
            try:
                calibration.keep(folder.path, step, found.tensors())
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
        with learner.weights_from(read) as whole:
            if whole:
                keep(best)
    if folder is not None:
        calibration.keep_only(folder.path, (last, best))


def keep_what_is_used(folder: RunDirectory, config: Config, last: int) -> None:
    """Removes what a finished run needs no more, unless more checkpoints were asked for than the usual two."""
    if config.train.keep != TrainConfig().keep:
        return
    try:
        folder.finish(last)
    except (OSError, Damaged) as error:
        reason = getattr(error, "strerror", None) or error
        folder.warn(f"older checkpoints in {folder.checkpoints} could not be removed: {reason}")


def write_result(run: Run, result: Result) -> Result:
    """Writes ``result.json``, which makes the run a finished one."""

    def write() -> None:
        assert run.folder is not None
        kept = {name: value for name, value in asdict(result).items() if name != "run_dir"}
        # Where patience ended the run, how patient it was: the same command then finds it finished.
        early = {"patience": run.config.train.patience} if result.steps < run.line.total_steps else {}
        data = {"data": looked} if (looked := dict(run.looked)) else {}
        run.folder.write("result.json", {**kept, **early, **data})

    run.learner.runtime.on_main(write)
    return result
