"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dist_ae import sentences
from dist_ae.begin import claimed, prepare
from dist_ae.config import Config, InputError
from dist_ae.data.memory import Handed
from dist_ae.evaluate import better, collapsed, not_finite
from dist_ae.models import Builder
from dist_ae.models.weights import weights_sha256
from dist_ae.outcome import NonFinite, OutOfMemory, Report, Reporter, Result, Stopped
from dist_ae.processes.arrival import Arrival, arriving
from dist_ae.processes.environment import explained_rendezvous, pinned_torch
from dist_ae.processes.runtime import Runtime, largest_piece
from dist_ae.processes.stop import Agreement, Signals, StopRequested
from dist_ae.processes.watch import Watch
from dist_ae.run.directory import sizes
from dist_ae.run.profile import Profile
from dist_ae.running import (
    Run,
    begin,
    finished_before,
    prune_finished,
    refuse_non_finite,
    save,
    save_calibrations,
    write_result,
)
from dist_ae.terminal import Waiting
from dist_ae.timeline import Asked, Best, due, selection

__all__ = ["NonFinite", "OutOfMemory", "Report", "Result", "Stopped", "train"]


def train(
    config: Config,
    report: Reporter | None = None,
    start_from: Path | None = None,
    *,
    data: Handed | None = None,
    model: Builder | None = None,
) -> Result:
    """Trains one autoencoder on as many processes as the launcher started, and resumes from its run directory.

    Args:
        config: the experiment. Neither the hardware nor the number of processes is in it.
        report: called after each evaluation, on every process. Sweeps use it.
        start_from: a checkpoint folder of another run of the same model. A run directory without a checkpoint starts
            from its weights, optimizer state and step. Population-based training clones a trial this way.
        data: images to use in place of ``config.data``: an array or tensor, uint8 or floats on [0, 1], [N, H, W],
            [N, C, H, W] or [N, H, W, C]; a torch ``Dataset`` of them; or a pair of these, for training and validation.
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
    with (
        Signals().listening() as signals,
        pinned_torch(config.precision),
        arriving(config.train.timeout) as arrival,
    ):
        prepared = prepare(config, data, model)
        with claimed(prepared) as folder, _together(prepared.config, arrival) as (runtime, watch):
            prepared = prepared._replace(config=runtime.config)
            finished = finished_before(prepared, folder, runtime)
            return finished or _loop(begin(prepared, folder, start_from, runtime), report, signals, watch)


@contextmanager
def _together(config: Config, arrival: Arrival) -> Iterator[tuple[Runtime, Watch]]:
    """Joins the other processes once all are ready. If a process is lost, the error names it."""
    runtime = Runtime(config, arrival.meet())
    arrival.close()
    with explained_rendezvous(config.train.timeout):
        watch = Watch(runtime, config.train.timeout)
    try:
        yield runtime, watch
        watch.close()
    except torch.OutOfMemoryError as error:
        images = largest_piece(config.train.batch_size, runtime.world, config.train.max_per_process)
        first = str(error).partition(". ")[0]
        raise OutOfMemory(sentences.out_of_memory(str(runtime.device), first, images)) from error
    except RuntimeError as error:  # what a collective raises when a process is gone
        raise watch.explain(error) from error
    finally:
        runtime.close()


def _loop(run: Run, report: Reporter | None, signals: Signals, watch: Watch) -> Result:
    timeline, state, learner, train = run.timeline, run.state, run.learner, run.config.train
    between_steps, in_evaluations = (Agreement(learner.runtime, signals, train.save_minutes) for _ in range(2))
    profile = Profile(run.config.profiled(), run.folder.path / "profile" if run.folder else None)
    asked, signals.has_work = Asked(), True
    with run.records, profile:
        while True:
            # Evaluate.
            if due(timeline, state, train.patience, asked).evaluate:
                asked = Asked(stop=not _evaluate(run, in_evaluations))
            now = due(timeline, state, train.patience, asked)

            # Save.
            if now.save:
                save(run, last=now.end, stopping=asked.stop)
                between_steps.saved()  # or it failed: the next interval tries again

            # Report.
            if now.report and report is not None:
                epoch = timeline.epochs_done(state.step)
                report(Report(state.step, timeline.total_steps, epoch, run.metrics, run.path))

            # End, or stop.
            if now.end:
                break
            asked = between_steps.asked()
            if asked.stop:
                continue

            # Train.
            watch.step = state.step
            profile.before(state.step)
            learner.step(state.step)
            state.step, state.evaluated = state.step + 1, False
            run.records.stepped(state.step)
            if timeline.logs(state.step):
                _log(run)

        profile.end()
        if profile.written:
            run.records.say(f"profile: {profile.written}")
        return _end(run, in_evaluations)


def _log(run: Run) -> None:
    """Records the training metrics since the last call. Only here are a step's figures read from the device."""
    refuse_non_finite(run)
    learner, step = run.learner, run.state.step
    rate = learner.learning_rate(step - 1) * run.config.optim.lr
    values = {**learner.take_window(), "lr": rate, "images_per_second": learner.runtime.clock.rate()}
    run.records.train(step, values)


def _evaluate(run: Run, agreement: Agreement) -> bool:
    """Evaluates, and puts the metrics into state and records. Returns False if a signal interrupted it."""
    learner, state, timeline = run.learner, run.state, run.timeline
    learner.runtime.clock.pause("evaluation")
    refuse_non_finite(run)
    waiting = Waiting("evaluating", None, "batches")
    try:
        state.metrics = run.validation.metrics(learner, state.pca_mse, lambda: waiting() or agreement.stop())
    except StopRequested:
        return False
    if names := not_finite(state.metrics):
        raise NonFinite(sentences.bad_evaluation(state.step, names))
    state.pca_mse = state.metrics.get("pca_mse")
    if not state.evaluated:  # else the run resumed from a checkpoint of an older version, which kept no metrics
        state.evaluated = True
        config = run.config
        standardized = config.data.scale == "standard"
        metric, sign = selection(config.model.variational, config.objective.noise_std, standardized)
        if state.best is None or better(state.metrics[metric], state.best.value, sign):
            state.best = Best(state.step, f"val.{metric}", state.metrics[metric], config.evaluation.noise_std)
        run.records.validation(state.step, state.metrics, state.best, learner.runtime.clock.rate())
        run.records.say(collapsed(state.metrics))
    if timeline.draws_pictures(state.step) or due(timeline, state, run.config.train.patience, Asked()).end:
        _draw_pictures(run)
    return True


def _draw_pictures(run: Run) -> None:
    """Draws the run's pictures on rank 0. A picture never fails a run."""
    if run.folder is None or not run.config.tracking.pictures:
        return
    step = run.state.step
    try:
        pictures = run.validation.pictures(run.learner, run.folder.path, step)
    except Exception as error:
        run.records.warn(f"the pictures of step {step} could not be drawn ({type(error).__name__}: {error})")
        return
    for name, path in pictures.items():
        run.records.picture(name, path, step)


def _end(run: Run, agreement: Agreement) -> Result:
    """Saves the scores' calibration, writes ``result.json``, and says how good the model is."""
    config, state, learner = run.config, run.state, run.learner
    assert state.best is not None
    learner.refuse_divergence()
    try:
        save_calibrations(run, agreement.stop)
    except StopRequested:
        raise Stopped(sentences.stopped(state.step, run.saved[0], run.timeline.total_steps, run.path)) from None
    world, speed = learner.runtime.world, learner.runtime.clock.rate()
    weights = weights_sha256(learner.used_weights())
    result = write_result(run, Result(run.metrics, run.path, state.step, world, speed, weights, state.best.step))
    if run.folder is not None:
        prune_finished(run.folder, config, state.step)
    model, numbers = learner.raw_model, torch.Size(learner.raw_model.code_shape).numel()
    can_start = config.objective.likelihood != "bernoulli" and config.model.start != "pca"
    run.records.say(sentences.against_mean(state, run.validation.mean_image_error()))
    run.records.say(sentences.against_pca(state, model.linear_code(), numbers, can_start))
    run.records.say(sentences.exact_pictures(learner.least_sigma_reached()))
    run.records.say(sentences.used_weights(state.step, state.best, run.timeline.total_steps))
    if run.folder is not None:
        run.records.say(sentences.size_on_disk(run.folder.path, *sizes(run.folder.path)))
    return result
