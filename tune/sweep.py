"""A sweep from its request to its answer: check everything, plan, run on Ray Tune, write the report."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_ae.config import Config, InputError
from dist_ae.presets import PRESETS
from tune.plan import Settings, Sweep, Trial, check_name, new_sweep, only_driver, plan_trials, read_sweep
from tune.results import Selection, results, retrained, select
from tune.spaces import Space, Values, check, check_metric, check_mutable

CONNECT_SECONDS = 2.0


class Interrupted(Exception):
    """The sweep was interrupted; the message says how to go on with it."""


# ------------------------------------------------------------------------------- what can be wrong, before Ray starts


def checked(
    space: Space,
    overrides: Values,
    metric: str | None,
    settings: Settings,
    num_trials: int | None,
    name: str,
    storage: Path,
) -> Sweep:
    """The sweep that was asked for, if it can be run. Imports neither torch nor ray.

    Raises:
        InputError: naming what is wrong and the way out.
    """
    check_name(name)
    if metric is not None:
        check_metric(metric, space.parts)
        space = dataclasses.replace(space, metric=metric)
    for bad, message in (
        (num_trials is not None and num_trials < 1, f"--num-trials {num_trials}: at least 1"),
        (settings.workers_per_trial < 1, f"--workers-per-trial {settings.workers_per_trial}: at least 1"),
        (settings.cpus_per_worker <= 0, f"--cpus-per-worker {settings.cpus_per_worker}: more than 0"),
        (settings.gpus_per_worker < 0, f"--gpus-per-worker {settings.gpus_per_worker}: 0 or more"),
        (
            settings.max_concurrent is not None and settings.max_concurrent < 1,
            f"--max-concurrent {settings.max_concurrent}: at least 1",
        ),
    ):
        if bad:
            raise InputError(message)
    if settings.workers_per_trial > 1 and settings.gpus_per_worker % 1:
        raise InputError(
            f"--gpus-per-worker {settings.gpus_per_worker}: workers of one trial cannot share a GPU (NCCL refuses it); "
            "use whole GPUs, or --workers-per-trial 1 with a share of one"
        )
    space = space.pinned(overrides)
    check(space, overrides, settings.workers_per_trial)
    if settings.scheduler == "pbt":
        if settings.workers_per_trial > 1:
            raise InputError(
                "--scheduler pbt works with --workers-per-trial 1 only: the workers of a larger trial belong to Ray Train, and Ray Tune, "
                "which owns none of their checkpoints, would skip the cloning without a word. Use --scheduler asha"
            )
        if settings.search == "optuna":
            raise InputError(
                "--scheduler pbt changes the values of running trials, which would mislead --search optuna; use --search random"
            )
        check_mutable(space)
    settings = dataclasses.replace(settings, num_trials=_count(space, settings, num_trials))
    if settings.scheduler == "pbt" and settings.num_trials < 2:
        raise InputError("--scheduler pbt needs at least two trials to clone one into the other; raise --num-trials")
    _check_local(settings)
    _check_address(settings.address)
    _check_storage(storage)
    return new_sweep((storage / name).resolve(), space, _absolute(overrides), space.metric, settings)


def _count(space: Space, settings: Settings, asked: int | None) -> int:
    if settings.search != "grid":
        return 16 if asked is None else asked
    size = sum(1 for _ in space.grid())
    if asked not in (None, size):
        raise InputError(
            f"--num-trials {asked}: the grid of space {space.name} has {size} points; leave --num-trials out, or use --search random"
        )
    return size


def _check_local(settings: Settings) -> None:
    """Refuses workers that this machine cannot hold, where Ray is to run on it alone."""
    if settings.address != "local":
        return
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _check_fits(settings, {"CPU": float(have)}, "this machine")
    if settings.gpus_per_worker:
        import torch

        _check_fits(settings, {"CPU": float(have), "GPU": float(torch.cuda.device_count())}, "this machine")


def _check_fits(settings: Settings, have: dict[str, float], where: str) -> None:
    for kind, each in (("CPU", settings.cpus_per_worker), ("GPU", settings.gpus_per_worker)):
        needed = settings.workers_per_trial * each
        if needed > have.get(kind, math.inf):
            raise InputError(
                f"a trial of {settings.workers_per_trial} workers with {each:g} {kind} each needs {needed:g} {kind}, and {where} has {have[kind]:g}; "
                f"lower --workers-per-trial or --{kind.lower()}s-per-worker"
            )


def _check_address(address: str) -> None:
    """Ray tries an address that does not answer for a long time."""
    host, separator, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not separator or not port.isdigit():
        raise InputError(f"--address {address!r}: expected auto, local or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--address {address}: nothing answers there ({error}); start a cluster with `ray start --head`, or use --address local"
        ) from None


def _check_storage(storage: Path) -> None:
    try:
        storage.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=storage):
            pass
    except OSError as error:
        raise InputError(f"--storage {storage} cannot be written: {error.strerror}; choose another folder") from None


def _absolute(overrides: Values) -> Values:
    """Paths as every process sees them, whatever folder it works in."""
    made = dict(overrides)
    if str(made.get("data.name", "")).startswith("array:"):
        made["data.name"] = "array:" + str(Path(made["data.name"].removeprefix("array:")).expanduser().resolve())
    if made.get("data.root") is not None:
        made["data.root"] = str(Path(made["data.root"]).expanduser().resolve())
    return made


def check_data(sweep: Sweep) -> None:
    """Loads the data once, here: what is missing or too small is said before any trial starts.

    Raises:
        InputError: data that is not there; a batch or code too large for it; too few evaluations for the scheduler.
    """
    from dist_ae.data import sources
    from dist_ae.processes.runtime import check_device

    for preset, part in sweep.space.parts.items():
        config = PRESETS[preset].override(sweep.overrides)
        dataset = sources.load(config.data)
        if sweep.metric == "val.probe_accuracy" and (dataset.train.labels is None or dataset.val.labels is None):
            raise InputError(
                f"--metric val.probe_accuracy needs labels, and {config.data.name} has none; use another metric"
            )
        if not sweep.settings.gpus_per_worker:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        for changed in (config.override({key: value}) for key, d in part.items() for value in d.ends()):
            check_device(changed)
            pixels = dataset.train.images[0].size
            if changed.model.latent_dim > pixels:
                raise InputError(
                    f"preset {preset}: model.latent_dim {changed.model.latent_dim} is larger than the image of {pixels} values"
                )
            if changed.train.batch_size > len(dataset.train):
                raise InputError(
                    f"preset {preset}: train.batch_size {changed.train.batch_size} is larger than the {len(dataset.train)} training images"
                )
            _check_evaluations(sweep, changed, len(dataset.train))


def _check_evaluations(sweep: Sweep, config: Config, num_images: int) -> None:
    an_epoch = -(-num_images // config.train.batch_size)
    steps = config.train.steps or config.train.epochs * an_epoch
    evaluations = steps // (config.train.eval_every or an_epoch)
    if sweep.settings.scheduler != "none" and evaluations < 4:
        raise InputError(
            f"--scheduler {sweep.settings.scheduler} compares trials while they run, and these are evaluated {evaluations} times in {steps} steps; "
            f"use --set train.eval_every={max(1, steps // 10)}, or longer trials"
        )


# ----------------------------------------------------------------------------------------------------------- the run


def start(sweep: Sweep, selection: Selection, seeds: int) -> None:
    """Plans and runs a new sweep, then trains its winner with further seeds, if any are asked for.

    Raises:
        InputError: there is one of that name, or its data or cluster is not there.
        Interrupted: by Ctrl-C or SIGTERM; ``--resume`` goes on.
    """
    with only_driver(sweep.path, new=True):
        check_data(sweep)
        sweep = dataclasses.replace(sweep, overrides={**sweep.overrides, **_tracking(sweep)})
        with cluster(sweep):
            plan_trials(sweep)
            run(sweep)
            retrain(sweep, selection, seeds)


def resume(path: Path, address: str | None, max_concurrent: int | None, selection: Selection, seeds: int) -> Sweep:
    """Goes on with a sweep: finished, stopped and failed trials stay as they are, the others continue from their checkpoints."""
    with only_driver(path, new=False):
        sweep = read_sweep(path)
        was = sweep.settings
        settings = dataclasses.replace(
            was, address=address or was.address, max_concurrent=max_concurrent or was.max_concurrent
        )
        sweep = dataclasses.replace(sweep, settings=settings)
        _check_local(sweep.settings)
        _check_address(sweep.settings.address)
        if left(sweep) or seeds:
            check_data(sweep)
            with cluster(sweep):
                run(sweep)
                retrain(sweep, selection, seeds)
        return sweep


def retrain(sweep: Sweep, selection: Selection, seeds: int) -> None:
    """Trains the winner with further seeds, as trials of a folder of their own. Its own seed was chosen for its luck and is not among them."""
    winner = select(results(sweep), selection, sweep)
    if not seeds or winner is None:
        return
    again = retrained(sweep, winner.trial)
    for number in range(1, seeds + 1):
        if not (again.trial_dir(f"{again.key}-{number:04d}") / "trial.json").exists():
            again.new_trial(
                number, winner.trial.preset, {**winner.trial.values, "seed": sweep.answer(winner.trial).seed + number}
            )
    again.write()
    run(again)


def _tracking(sweep: Sweep) -> Values:
    """Decides on W&B once, here: workers elsewhere may not know the key, and trials of one sweep belong in one place."""
    from dist_ae.run.tracking import wandb_mode

    config = PRESETS[next(iter(sweep.space.parts))].override(sweep.overrides)
    return {"tracking.wandb": wandb_mode(config.tracking)[0]}


def unfinished(sweep: Sweep) -> list[Trial]:
    """Planned trials that have no final result yet."""
    return [trial for trial in sweep.trials() if sweep.outcome(trial).status in ("pending", "unfinished")]


def left(sweep: Sweep) -> int:
    """How many trials are still to be run or finished; with an optimizer, some of them are not planned yet."""
    return len(unfinished(sweep)) + max(0, sweep.settings.num_trials - len(sweep.trials()))


@contextmanager
def cluster(sweep: Sweep) -> Iterator[None]:
    """Ray, started on this machine or joined, for the length of a sweep.

    Raises:
        InputError: no cluster there; too small; storage that some node does not see; nodes that cannot import the code.
    """
    settings = sweep.settings
    # Ray reads these when it is imported or started; Tune's own tables and files are not wanted.
    quiet = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    }
    quiet |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    import ray

    # A stopped trial may take seconds to close its trackers; its actor, with torch imported, is worth waiting for.
    variables = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "15", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = (
        "0.1"  # how often a report of several workers is fetched; each waits for it
    )
    variables |= {key: os.environ[key] for key in ("WANDB_BASE_URL", "OMP_NUM_THREADS") if key in os.environ}
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": variables},
    }
    if settings.address == "local":
        ray.init(address="local", include_dashboard=False, num_cpus=len(os.sched_getaffinity(0)), **common)
    else:
        try:
            ray.init(address=settings.address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--address {settings.address}: no Ray cluster there ({str(error).splitlines()[0]}); start one with `ray start --head`"
            ) from None
    try:
        if settings.address != "local":
            _check_fits(
                settings, {kind: float(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU")}, "the cluster"
            )
            _check_shared(sweep)
        yield
    finally:
        ray.shutdown()


def _check_shared(sweep: Sweep) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tune.trial import sees

    nodes = [node for node in ray.nodes() if node["Alive"]]
    token = sweep.path / f".seen-{uuid.uuid4().hex}"
    token.touch()
    try:
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                seen = ray.get(
                    ray.remote(sees).options(num_cpus=0, scheduling_strategy=strategy).remote(str(token)), timeout=60
                )
            except Exception as error:
                reason = str(error).strip().splitlines()
                raise InputError(
                    f"node {node['NodeManagerAddress']} cannot run this code ({reason[-1] if reason else type(error).__name__}); "
                    "install the project there, or submit the sweep with launch/ray/submit.sh, which sends it along"
                ) from None
            if not seen:
                raise InputError(
                    f"--storage {sweep.path.parent}: node {node['NodeManagerAddress']} does not see this folder, and a trial may go on on any node; "
                    "use a folder on storage that all nodes share (NFS, Lustre, a mounted bucket)"
                )
    finally:
        token.unlink(missing_ok=True)


def run(sweep: Sweep) -> None:
    """Runs what is planned and not done, on the Ray that is connected.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM.
    """
    import signal

    import ray.tune

    from tune.live import Progress
    from tune.schedule import Optimizer, Planned, scheduler
    from tune.trial import RETRIES, run_distributed_trial, run_trial

    settings, several = sweep.settings, sweep.settings.workers_per_trial > 1
    todo = unfinished(sweep)
    if not left(sweep):
        return
    optimizer = Optimizer(sweep) if settings.search == "optuna" else None
    done = {t.id: o.reports[-1] for t in sweep.trials() for o in [sweep.outcome(t)] if o.reports and t not in todo}
    each = {"cpu": settings.cpus_per_worker, "gpu": settings.gpus_per_worker}
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    pbt = settings.scheduler == "pbt"
    tuner = ray.tune.Tuner(
        # The driver of several workers computes nothing, they hold the resources. Ray wants it to hold something: a byte of memory.
        ray.tune.with_resources(run_distributed_trial, {"memory": 1})
        if several
        else ray.tune.with_resources(run_trial, each),
        param_space={"id": ray.tune.grid_search([trial.id for trial in todo]), "sweep_dir": str(sweep.path)}
        if pbt
        else {},
        tune_config=ray.tune.TuneConfig(
            metric=sweep.metric,
            mode="max" if sweep.sign > 0 else "min",
            num_samples=1 if pbt else left(sweep),
            search_alg=None if pbt else Planned(sweep, todo, optimizer),
            scheduler=scheduler(sweep),
            max_concurrent_trials=_concurrency(settings),
            reuse_actors=not several,
            trial_name_creator=lambda trial: trial.config["id"],
            trial_dirname_creator=lambda trial: trial.config["id"],
        ),
        run_config=ray.tune.RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            storage_path=str(sweep.path / "ray"),
            failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
            callbacks=[progress := Progress(sweep, len(done) + left(sweep), done)],
            verbose=0,
        ),
    )
    # What Tune does at Ctrl-C it shall do at SIGTERM: stop the trials and return.
    old = signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    try:
        with progress:
            tuner.fit()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, old)
    remaining = left(sweep)
    if not remaining:
        shutil.rmtree(
            sweep.path / "ray", ignore_errors=True
        )  # Ray's own records; with pbt they hold copies of checkpoints
    else:
        raise Interrupted(
            f"{remaining} trials are not finished; python -m tune --resume {sweep.name} --storage {sweep.path.parent} goes on with them"
        )


def _concurrency(settings: Settings) -> int | None:
    """Most trials at once. Drivers of several workers need next to nothing, so Tune must be told what their workers need."""
    if settings.workers_per_trial == 1:
        return settings.max_concurrent
    import ray

    have = ray.cluster_resources()
    fits = [
        int(have.get(kind, 0) // (settings.workers_per_trial * each))
        for kind, each in (("CPU", settings.cpus_per_worker), ("GPU", settings.gpus_per_worker))
        if each
    ]
    return max(1, min([*fits, *([settings.max_concurrent] if settings.max_concurrent else [])]))
