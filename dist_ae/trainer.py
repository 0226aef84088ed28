"""The training loop and what surrounds it: resuming, evaluating, saving, stopping."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from dist_ae import pca, timeline
from dist_ae.begin import claimed, describe, prepare
from dist_ae.config import Config, Fault, InputError
from dist_ae.data.memory import NAME, Handed
from dist_ae.data.order import share
from dist_ae.data.reader import Reader
from dist_ae.data.records import Dataset, Split
from dist_ae.evaluate import collapsed, evaluate, selection
from dist_ae.files import Damaged, write_atomically
from dist_ae.models import Autoencoder, Builder
from dist_ae.models.cost import cost_of
from dist_ae.models.weights import weights_sha256
from dist_ae.processes.clock import Clock
from dist_ae.processes.environment import meeting, notes, pinned_torch
from dist_ae.processes.runtime import Runtime, largest_piece
from dist_ae.processes.stop import Agreement, Signals, StopRequested
from dist_ae.processes.watch import Watch
from dist_ae.run import calibration
from dist_ae.run.checkpoint import Checkpoint, Tensors, read_checkpoint, template_of
from dist_ae.run.directory import RunDirectory, SaveError
from dist_ae.run.profile import Profile
from dist_ae.run.progress import Display, processes_table
from dist_ae.run.tracking import Tracking, new_run_id
from dist_ae.saved import read_weights, saved_weights
from dist_ae.scores import calibrate
from dist_ae.step import Learner
from dist_ae.terminal import EXIT_STOPPED, say, size_of
from dist_ae.timeline import Timeline

LAST_SAVE_SECONDS = 30.0  # how long the end of a run waits for room on the disk
STOP_SAVE_SECONDS = 4.0  # the same when a run is stopped, which must not take longer than 10 s in all
EXACT = 1e-9  # a squared error of PCA below which it loses nothing: its code is as long as the images need
SMALLEST_SCALE = 2.0**-14  # of fp16's gradients: 30 overflows in a row, each of which halves it
TRAIN_SAMPLE = 2000  # training images that are evaluated beside those of validation


class Stopped(Exception):
    """A signal stopped the run; the same command resumes it."""

    exit_status = EXIT_STOPPED


class OutOfMemory(Fault):
    """A device had no memory left for a step or an evaluation."""


class NonFinite(Fault):
    """A loss or gradient was not finite. The weights are those before that step, and so is the last checkpoint."""


@dataclass(frozen=True)
class Result:
    """What a finished run gives. ``metrics`` has ``val.mse`` and so on. ``result.json`` holds it, too."""

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
    """Where a run is. Together with the configuration and the tensors, it is all that the run's future depends on."""

    step: int = 0
    evaluated: bool = False  # whether the evaluation due at this step was done
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: dict[str, Any] | None = None  # step, metric and value of the best evaluation so far
    pca_mse: float | None = None  # the error of the best linear code of the same size, once it is known

    def key(self) -> tuple[int, bool]:
        """What tells a checkpoint of this state from one of another state."""
        return self.step, self.evaluated


@dataclass(frozen=True)
class Job:
    """What one process was asked to do."""

    config: Config
    dataset: Dataset
    model: Autoencoder
    folder: RunDirectory | None  # None on all but rank 0
    report: Reporter | None
    start_from: Path | None
    signals: Signals


def train(
    config: Config,
    report: Reporter | None = None,
    start_from: Path | None = None,
    *,
    data: Handed | None = None,
    model: Builder | None = None,
) -> Result:
    """Trains one autoencoder on as many processes as the launcher started, and resumes what its run directory holds.

    Args:
        config: the experiment. Neither the hardware nor the number of processes is in it.
        report: called after each evaluation, on every process. Sweeps use it.
        start_from: a checkpoint folder of another run of the same model. A run directory without a checkpoint begins
            with its weights, optimizer state and step. Population-based training clones a trial this way.
        data: images in place of ``config.data``: an array or tensor, uint8 or floats on [0, 1], [N, H, W], [N, C, H, W]
            or [N, H, W, C]; a torch ``Dataset`` of them; or a pair of these, for training and validation.
        model: a function that makes a model of your own from the shape of an image; see ``examples/own_model.py``.

    Raises:
        InputError: bad configuration, data or run directory, found before any process group starts.
        Stopped: SIGTERM or SIGINT came; a checkpoint of the current step was written.
        NonFinite: a loss or gradient was not finite.
        SaveError: the last checkpoint could not be written.
        OutOfMemory: a GPU had no memory left.
        LostProcess: another process died or stopped answering.
    """
    if not isinstance(config, Config):
        raise InputError(f"train: expected a dist_ae.Config, such as PRESETS['ae'], got {type(config).__name__}")
    with Signals().listening() as signals, pinned_torch(config.precision):
        config, dataset, built = prepare(config, data, model)
        with claimed(config, dataset) as folder:
            return _train_together(Job(config, dataset, built, folder, report, start_from, signals))


def _train_together(job: Job) -> Result:
    """Joins the other processes and trains. Where a process is lost, says which."""
    runtime = Runtime(job.config)
    with meeting(job.config.train.timeout):
        watch = Watch(runtime, job.config.train.timeout)
    try:
        result = _train(job, runtime, watch)
        watch.close()
        return result
    except torch.OutOfMemoryError as error:
        now = largest_piece(job.config.train.batch_size, runtime.world, job.config.train.max_per_process)
        raise OutOfMemory(
            f"{runtime.device} has no memory left ({str(error).partition('. ')[0]}). A step computes {now} images at "
            f"once on each process: --train.max-per-process {max(1, now // 2)} adds up smaller parts, with the same "
            "result. Where an evaluation is too large, lower --evaluation.batch-size"
        ) from error
    except RuntimeError as error:  # what a collective raises when a process is gone
        raise watch.explain(error) from error
    finally:
        runtime.close()


def _train(job: Job, runtime: Runtime, watch: Watch) -> Result:
    config, folder = job.config, job.folder
    steps = Timeline.of(config.train, len(job.dataset.train))
    finished = runtime.on_main(lambda: _finished(folder, steps, config) if folder else None)
    if finished is not None:
        if config.model.architecture == "own":
            saved_weights(config.directory(), job.model.to(runtime.dtype))  # refuses a model that is another by now
        if runtime.is_main:
            say(f"{config.directory()} was finished before, at step {finished['steps']}; nothing is trained")
        return Result(**finished, run_dir=config.directory())

    # Start, or resume.
    learner = Learner(config, job.dataset, job.model, runtime, steps)
    validation = Reader(job.dataset.val, runtime.device, runtime.dtype)
    seen: Reader | None = None  # some training images, read later: the first step need not wait for a slow disk
    state = _resume(learner, folder, job.start_from)
    display = Display(runtime.is_main, state.step, steps.total_steps)
    for line in (*notes(config), *_headline(job, learner, state)):
        display.say(line)
    stops, pauses = Agreement(runtime, job.signals, config.train.save_minutes), Agreement(runtime, job.signals)
    components = None
    if config.model.start == "pca" and state.step == 0 and config.init_from is None:
        components = pca.of_model(learner.raw_model, learner.images, runtime)
        if components is not None and runtime.is_main:
            learner.raw_model.start_from(components, config.objective)
    learner.prepare()
    for line in _processes(config, learner):
        display.say(line)
    tracking = _start_tracking(config, folder, display) if folder else None
    clock, saved, stopping = runtime.clock, state.key(), False
    job.signals.has_work = True

    profile = Profile(config.profiled(), folder.path / "profile" if folder else None)
    with display, tracking or nullcontext(), profile:
        while True:
            # Evaluate.
            if steps.evaluates(state.step) and not (state.evaluated and state.metrics):
                clock.pause("evaluation")
                _refuse_non_finite(learner, folder)
                try:
                    if state.pca_mse is None:
                        components = components or pca.of_model(learner.raw_model, learner.images, runtime, pauses.stop)
                        if components is not None:
                            model = learner.raw_model
                            state.pca_mse = pca.baseline(model, components, validation, runtime, pauses.stop)
                        components = None
                    with learner.evaluation_weights():
                        metrics = evaluate(learner.model, validation, config, runtime, pauses.stop)
                        if seen is None:
                            sample = _sample(job.dataset.train, len(job.dataset.val))
                            seen = Reader(sample, runtime.device, runtime.dtype)
                        metrics["train_mse"] = evaluate(learner.model, seen, config, runtime, pauses.stop)["mse"]
                except StopRequested:
                    stopping = True
                else:
                    _note_evaluation(learner, state, metrics, folder, tracking)
                    epochs = steps.epochs_done(state.step)
                    display.evaluated(state.step, steps.total_steps, epochs, metrics, clock.rate())
                    display.say(collapsed(metrics))
                    if _draws_pictures(state.step, steps) or _out_of_patience(state, steps, config):
                        _draw_pictures(learner, state, validation, folder, tracking)

            # Save.
            new_best = state.evaluated and state.best is not None and state.best["step"] == state.step
            ending = state.step == steps.total_steps or _out_of_patience(state, steps, config)
            if stopping or steps.saves(state.step) or new_best or ending or stops.save:
                clock.pause("saving")
                if saved != state.key():
                    _refuse_non_finite(learner, folder)
                    last = ending and not stopping
                    seconds = LAST_SAVE_SECONDS if last else STOP_SAVE_SECONDS if stopping else 0.0
                    if _save(learner, state, folder, min(seconds, config.train.timeout / 2)):
                        saved = state.key()
                stops.saved()  # or it failed: the next interval tries again
                if stopping:
                    raise Stopped(_stopped(state, saved, steps, config))

            # Report.
            if steps.evaluates(state.step) and job.report is not None:
                progress = steps.total_steps, steps.epochs_done(state.step)
                job.report(Report(state.step, *progress, _prefixed(state), config.directory()))

            # Done, or stopped?
            if ending:
                if saved[0] != state.step:
                    raise SaveError(_unsaved(state, saved, config))
                break
            if stops.stop():
                stopping = True
                continue

            # Train.
            clock.start()
            watch.step = state.step
            profile.before(state.step)
            learner.step(state.step)
            clock.images += len(steps.positions(state.step))
            state.step, state.evaluated = state.step + 1, False

            # Log: the only place where a step's figures are read back.
            if steps.logs(state.step):
                _refuse_non_finite(learner, folder)
                rate = timeline.learning_rate(state.step - 1, steps.total_steps, config.optim) * config.optim.lr
                values = {**learner.take_window(), "lr": rate, "images_per_second": clock.rate()}
                _record("train", values, state.step, steps, folder, tracking)
                display.advance(state.step, values["loss"], values["images_per_second"])

        profile.end()
        if profile.written:
            display.say(f"profile: {profile.written}")
        learner.refuse_divergence()
        try:
            _calibrate(learner, state, validation, folder, pauses.stop)
        except StopRequested:
            raise Stopped(_stopped(state, saved, steps, config)) from None
        result = runtime.on_main(lambda: _write_result(learner, state, clock, folder) if folder else None)
        display.say(_against_pca(learner.raw_model, state, config))
        display.say(_best(state, steps))
        return Result(**result, run_dir=config.directory())


# -- the parts of the loop


def _finished(folder: RunDirectory, steps: Timeline, config: Config) -> dict[str, Any] | None:
    """What ``result.json`` says of a finished run, which is one whose last step is on the disk."""
    kept = folder.read("result.json")
    wanted = {f.name for f in fields(Result)} - {"run_dir"}
    if kept is None or not wanted <= set(kept) or not isinstance(kept["steps"], int):
        return None
    ran_out = config.train.patience is not None and kept.get("patience") == config.train.patience
    if not folder.holds(kept["steps"]) or not (kept["steps"] == steps.total_steps or ran_out):
        return None
    return {name: kept[name] for name in wanted}


def _out_of_patience(state: State, steps: Timeline, config: Config) -> bool:
    """Whether ``train.patience`` evaluations in a row were no better than one before them."""
    if config.train.patience is None or state.best is None or not state.evaluated:
        return False
    return state.step - int(state.best["step"]) >= config.train.patience * steps.eval_every


def _sample(split: Split, most: int) -> Split:
    """Evenly spaced training images: at most ``TRAIN_SAMPLE``, and at most ``most``.

    Their error beside that of validation shows overfitting, at a fraction of the cost of an evaluation.
    """
    count = min(len(split), TRAIN_SAMPLE, most)
    chosen = np.linspace(0, len(split) - 1, count).astype(np.int64)
    return Split(split.images, None, chosen if split.rows is None else split.rows[chosen])


def _resume(learner: Learner, folder: RunDirectory | None, start_from: Path | None) -> State:
    """Fills the learner from the newest good checkpoint, else from ``start_from``.

    Rank 0 reads the checkpoint; ``Learner.prepare`` hands the tensors on.
    """
    live = _files(learner)

    def read() -> dict[str, Any] | None:
        assert folder is not None
        templates = {name: template_of(tensors) for name, tensors in live.items()}
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
        total = learner.timeline.total_steps
        if checkpoint.step > total:
            raise InputError(
                f"{folder.path} was already trained for {checkpoint.step} steps, more than the {total} asked for; "
                "ask for more, or choose another --run-dir"
            )
        with torch.no_grad():
            for name, tensors in checkpoint.files.items():
                for key, tensor in tensors.items():
                    live[name][key].copy_(tensor)
        folder.rewind_metrics(checkpoint.step, bool(checkpoint.state.get("evaluated")))
        return {"step": checkpoint.step, **checkpoint.state}

    kept = learner.runtime.on_main(read)
    if kept is None:
        return State()
    try:
        learner.window_images = int(kept["window_images"])
        if folder is not None:  # rank 0 goes on with the sums of all processes
            learner.window.copy_(torch.tensor(kept["window"], dtype=learner.window.dtype))
        if kept["scaler"] and learner.runtime.accelerator.scaler is not None:
            learner.runtime.accelerator.scaler.load_state_dict(kept["scaler"])
        state = State(int(kept["step"]), bool(kept["evaluated"]), kept.get("metrics") or {}, kept["best"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"checkpoint {kept['step']} of {learner.config.directory()}: its state.json lacks what a resume needs "
            f"({error!r}). Remove that checkpoint to resume from the one before it"
        ) from None
    state.pca_mse = kept.get("pca_mse")
    return state


def _save(learner: Learner, state: State, folder: RunDirectory | None, seconds: float) -> bool:
    """Writes a checkpoint and says, the same on every process, whether it is on the disk.

    Args:
        seconds: how long to go on trying while the disk takes nothing.
    """
    window = learner.runtime.sum(learner.window.clone()).tolist()

    def write() -> bool:
        assert folder is not None
        scaler = learner.runtime.accelerator.scaler
        rest = {
            "images_seen": learner.timeline.images_seen(state.step),
            "window": window,
            "window_images": learner.window_images,
            "scaler": scaler.state_dict() if scaler else None,
        }
        checkpoint = Checkpoint(state.step, _files(learner), {**asdict(state), **rest})
        best = state.best["step"] if state.best else None
        return folder.save(checkpoint, learner.config.train.keep, best, seconds)

    return bool(learner.runtime.on_main(write))


def _files(learner: Learner) -> dict[str, Tensors]:
    """The learner's live tensors by the checkpoint file that holds them."""
    return {f"{name}.safetensors": tensors for name, tensors in learner.tensors().items()}


def _refuse_non_finite(learner: Learner, folder: RunDirectory | None) -> None:
    """Reads the guard, which says the same on every process, and writes what ``dist-ae doctor --replay`` needs.

    Raises:
        NonFinite: naming the step.
    """
    config, scaler = learner.config, learner.runtime.accelerator.scaler
    if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
        raise NonFinite(
            f"fp16: gradients are not finite however small their scale ({scaler.get_scale():.1g}), and no step has "
            "changed a weight for a while. Use --precision bf16; a lower optim.lr or optim.clip_norm may help"
        )
    step = learner.guard.bad_step()
    if step is None:
        return
    if folder is not None:
        rows = learner.rows(step).tolist()
        bundle = {"step": step, "seed": config.seed, "rows": rows, "config": config.model_dump(mode="json")}
        folder.write("nonfinite.json", bundle)
        write_atomically(folder.path / "nonfinite.safetensors", safetensors.torch.save(learner.tensors()["weights"]))
    replay = f" `dist-ae doctor {shlex.quote(str(config.directory()))} --replay` repeats that step on one process."
    if config.data.name == NAME or config.model.architecture == "own":
        replay = ""  # the command has neither images nor a model from Python
    raise NonFinite(
        f"the loss or gradient of step {step} is not finite. No weight was changed by it, and the last checkpoint is "
        f"from before it.{replay} A lower optim.lr or optim.clip_norm may help"
    )


def _note_evaluation(
    learner: Learner, state: State, metrics: dict[str, float], folder: RunDirectory | None, tracking: Tracking | None
) -> None:
    """Takes an evaluation into the state and the records, once. A resumed run finds it in its checkpoint."""
    if state.pca_mse is not None:
        metrics["pca_mse"] = state.pca_mse
    state.metrics = metrics
    if state.evaluated:  # resumed from a checkpoint of an older version, which kept no metrics
        return
    state.evaluated = True
    name, sign = selection(learner.config)
    if state.best is None or sign * metrics[name] > sign * state.best["value"]:
        state.best = {"step": state.step, "metric": f"val.{name}", "value": metrics[name]}
    _record("val", metrics, state.step, learner.timeline, folder, tracking)
    if tracking is not None:
        best = {"best/step": state.best["step"], "best/" + state.best["metric"]: state.best["value"]}
        tracking.summarize({**best, "last/step": state.step, **{f"last/{k}": v for k, v in _prefixed(state).items()}})


def _record(
    split: str,
    values: dict[str, float],
    step: int,
    steps: Timeline,
    folder: RunDirectory | None,
    tracking: Tracking | None,
) -> None:
    if folder is not None:
        folder.append_metrics({"step": step, "epoch": steps.epochs_done(step), "split": split, **values})
    if tracking is not None:
        tracking.log({f"{split}/{name}": value for name, value in values.items()}, step)


def _draws_pictures(step: int, steps: Timeline) -> bool:
    """At the first evaluation, then at doubling intervals, and at the end."""
    evaluation = step // steps.eval_every
    return step == steps.total_steps or evaluation & (evaluation - 1) == 0


def _draw_pictures(
    learner: Learner, state: State, validation: Reader, folder: RunDirectory | None, tracking: Tracking | None
) -> None:
    """Draws the run's pictures on rank 0. A picture never fails a run."""
    if folder is None:
        return
    from dist_ae.figures import run_pictures  # matplotlib takes 0.5 s to import, which the first step need not wait for

    try:
        with learner.evaluation_weights():
            pictures = run_pictures(learner.raw_model, learner.config, validation, folder.path, step=state.step)
    except Exception as error:
        folder.warn(f"the pictures of step {state.step} could not be drawn ({type(error).__name__}: {error})")
        return
    for name, path in pictures.items():
        if tracking is not None:
            tracking.log_image(name, path, state.step)


def _calibrate(
    learner: Learner, state: State, validation: Reader, folder: RunDirectory | None, stop: Callable[[], bool]
) -> None:
    """Keeps in the run what thresholds of its scores need, for the last weights and for the best.

    A full disk does not fail the run: `dist-ae score` can find what is missing from the data again.

    Raises:
        StopRequested: ``stop`` said so.
    """
    assert state.best is not None
    best = int(state.best["step"])

    def keep(step: int) -> None:
        found = calibrate(learner.raw_model, learner.images, validation, learner.config, learner.runtime, stop)
        if folder is not None:
            try:
                calibration.keep(folder.path, step, found.tensors())
            except OSError as error:
                folder.warn(f"the threshold of step {step} could not be kept in {folder.path}: {error.strerror}")

    with learner.evaluation_weights():
        keep(state.step)
        if best != state.step:
            model, held = learner.raw_model, {k: v.clone() for k, v in learner.raw_model.state_dict().items()}
            if _read_weights(learner, folder, best):
                keep(best)
            model.load_state_dict(held)
    if folder is not None:
        calibration.keep_only(folder.path, (state.step, best))


def _read_weights(learner: Learner, folder: RunDirectory | None, step: int) -> bool:
    """Fills the model, on every process, with the weights of a checkpoint as they are evaluated.

    Returns False where the checkpoint is not whole.
    """
    model = learner.raw_model

    def read() -> bool:
        assert folder is not None
        try:
            model.load_state_dict(read_weights(folder.checkpoints / f"{step:08d}", model)[1])
        except Damaged:
            return False
        return True

    whole = bool(learner.runtime.on_main(read))
    if whole and learner.runtime.world > 1:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    return whole


def _write_result(learner: Learner, state: State, clock: Clock, folder: RunDirectory) -> dict[str, Any]:
    assert state.best is not None
    result = {
        "metrics": _prefixed(state),
        "steps": state.step,
        "world_size": learner.runtime.world,
        "images_per_second": clock.rate(),
        "weights_sha256": weights_sha256(learner.tensors()["ema" if learner.ema else "weights"]),
        "best_step": state.best["step"],
    }
    # Where patience ended the run, how patient it was: the same command then finds it finished.
    ended_early = state.step < learner.timeline.total_steps
    folder.write("result.json", result | ({"patience": learner.config.train.patience} if ended_early else {}))
    return result


def _prefixed(state: State) -> dict[str, float]:
    return {f"val.{name}": value for name, value in state.metrics.items()}


# -- what is said


def _headline(job: Job, learner: Learner, state: State) -> list[str]:
    config, world = job.config, learner.runtime.world
    parameters = sum(p.numel() for p in learner.parameters)
    numbers = torch.Size(learner.raw_model.code_shape).numel()
    one = cost_of(learner.raw_model, learner.runtime.lower)
    operations = f"{one.operations / 1e6:,.1f} MFLOP"
    where = f"{world} process{'es' if world > 1 else ''} on {learner.runtime.device.type}, {config.precision}"
    start = f"resuming at step {state.step}" if state.step else f"{learner.timeline.total_steps} steps"
    return [
        f"{config.name} on {job.dataset.name}: {len(job.dataset.train):,} images ({learner.images.held}), code of "
        f"{numbers:,} numbers, {parameters:,} parameters, {operations} an image, "
        f"{size_of(learner.memory(one.kept))} to train, {where}; {start} → {config.directory()}"
    ]


def _processes(config: Config, learner: Learner) -> list[str]:
    """The table of the processes that take part. A single process needs none: the headline names it."""
    runtime, batch = learner.runtime, range(config.train.batch_size)
    if runtime.world == 1:
        return []
    shares = [len(share(batch, rank, runtime.world)) for rank in range(runtime.world)]
    return processes_table(runtime.places(), shares, config.precision, learner.exchange)


def _stopped(state: State, saved: tuple[int, bool], steps: Timeline, config: Config) -> str:
    where = f"the same command resumes there ({config.directory()})"
    if saved[0] == state.step:
        return f"stopped at step {state.step} of {steps.total_steps}; {where}"
    return (
        f"stopped at step {state.step} of {steps.total_steps}, and no checkpoint of it could be written. "
        f"{_on_disk(saved)}: free some room, and {where}"
    )


def _on_disk(saved: tuple[int, bool]) -> str:
    return f"The last one on the disk is of step {saved[0]}" if saved[0] else "There is none on the disk yet"


def _unsaved(state: State, saved: tuple[int, bool], config: Config) -> str:
    return (
        f"the last checkpoint, of step {state.step}, could not be written to {config.directory()}. The run is not "
        f"finished. {_on_disk(saved)}: free some room; the same command resumes there"
    )


def _against_pca(model: Autoencoder, state: State, config: Config) -> str:
    """One line that says whether the model is better than PCA, and so worth its training."""
    mse, linear, code = state.metrics["mse"], state.pca_mse, model.linear_code()
    if state.best is not None and state.best["metric"] == "val.mse":
        mse = state.best["value"]  # of the weights that every use takes
    if linear is None or linear < EXACT or code is None:
        return ""
    numbers = torch.Size(model.code_shape).numel()
    name = "PCA" if code.patch is None else f"PCA of {code.patch} × {code.patch} patches"
    if mse <= linear:
        return f"val.mse {mse:.3g} is {1 - mse / linear:.0%} below {name} with {numbers:,} numbers ({linear:.3g})"
    if mse < 1.01 * linear:
        return f"val.mse {mse:.3g} is that of {name} with {numbers:,} numbers ({linear:.3g})"
    can_start = config.objective.likelihood != "bernoulli" and config.model.start != "pca"
    or_pca = ", or begin with --model.start pca" if can_start else ""
    return (
        f"WARNING: val.mse {mse:.3g} is {mse / linear - 1:.0%} ABOVE {name} with {numbers:,} numbers ({linear:.3g}), "
        f"the best linear code of that size. Train longer, or lower optim.lr{or_pca}"
    )


def _best(state: State, steps: Timeline) -> str:
    """Which weights are used, where they are not the last ones, and why training ended, where it ended early."""
    assert state.best is not None
    early = f"no better evaluation since step {state.best['step']}: ended at {state.step} of {steps.total_steps}. "
    better = f"the best {state.best['metric']}, {state.best['value']:.6g}, was at step {state.best['step']}"
    if state.best["step"] == state.step:
        return ""
    return f"{early if state.step < steps.total_steps else ''}{better}; every use takes those weights"


def _start_tracking(config: Config, folder: RunDirectory, display: Display) -> Tracking:
    kept = folder.read("tracking.json") or {}
    if "wandb_id" not in kept:
        kept = {"wandb_id": new_run_id()}
        folder.write("tracking.json", kept)
    tags = (config.name, Path(config.data.name).name, config.model.architecture)
    run_id, description = str(kept["wandb_id"]), describe(config)
    return Tracking(config.tracking, folder.path, config.label(), run_id, description, display.say, tags)
