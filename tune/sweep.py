"""Runs a sweep: checks everything, plans the trials, and runs them on Ray Tune."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_ae import PRESETS, Config, InputError, sweeping
from dist_ae.sweeping import EXIT_STOPPED, first_line, say

from .answer import Answer
from .budget import Budget
from .confirm import contenders, plan_runs
from .plan import Settings, Sweep, Trial, check_name, new_sweep, only_driver, plan_trials, read_sweep
from .results import Selection, number, results
from .spaces import MAX_TRIALS, Space, Values, check, check_sizes, check_together, override, parse_space, shown

CONNECT_SECONDS = 2.0
LONGEST_FOLDER = 40  # characters of the path of the folder for Ray's sockets
FULL = 0.95  # share of a disk in use above which Ray stores no large objects
LOST_SECONDS = 3.0  # without an answer from a Ray on this machine, after which it counts as gone
PROBED = 100  # points of an optimizer's space that are checked before it suggests its own


class Interrupted(Exception):
    """The sweep was interrupted. The message contains the command that resumes it."""

    exit_status = EXIT_STOPPED


# -- checks, before Ray starts


def checked(space: Space, overrides: Values, metric: str | None, settings: Settings, name: str, storage: Path) -> Sweep:
    """Checks a request and returns the sweep. Imports neither torch nor ray.

    Raises:
        InputError: naming what is wrong and the way out.
    """
    check_name(name)
    space = parse_space(space.to_data(), space.name, metric).pinned(overrides)
    defaults = {"num_trials": _count(space, settings), "address": settings.address or "local"}
    settings = Settings(**settings.model_dump() | defaults)
    check(space, overrides, settings.workers_per_trial)
    if settings.scheduler == "pbt":
        space.check_mutable()
    check_together(overrides, _plan(space, settings))
    _check_local(settings)
    _check_address(settings)
    return new_sweep((storage / name).resolve(), space, overrides, space.metric, settings)


def _count(space: Space, settings: Settings) -> int:
    if settings.search != "grid":
        return settings.num_trials or (16 if settings.budget is None else 0)
    size = space.grid_size()
    if settings.num_trials not in (0, size):
        ways_out = "leave --num-trials out, or use --search random"
        raise InputError(
            f"--num-trials {settings.num_trials}: the grid of space {space.name} has {size:,} points; {ways_out}"
        )
    if size > MAX_TRIALS:
        raise InputError(
            f"--search grid: the grid of space {space.name} has {size:,} points, more than {MAX_TRIALS:,}; "
            "fix a key (such as --optim.lr 1e-3), shorten a choice, or use --search random --num-trials N"
        )
    return size


def _check_local(settings: Settings) -> None:
    """Refuses workers that do not fit on this machine, if Ray is to run only on this machine."""
    if settings.address != "local":
        return
    available = {"CPU": _cores(), "GPU": 0}
    if settings.gpus_per_worker:
        import torch

        available["GPU"] = torch.cuda.device_count()
    _check_fits(settings, available, "this machine")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_fits(settings: Settings, available: Mapping[str, float], where: str) -> None:
    for kind, per_worker in (("CPU", settings.cpus_per_worker), ("GPU", settings.gpus_per_worker)):
        needed = settings.workers_per_trial * per_worker
        if needed > available[kind]:
            raise InputError(
                f"a trial of {settings.workers_per_trial} workers with {per_worker:g} {kind} each needs {needed:g} "
                f"{kind}, and {where} has {available[kind]:g}; lower --workers-per-trial or "
                f"--{kind.lower()}s-per-worker"
            )


def _check_address(settings: Settings) -> None:
    """Refuses an address where nothing answers. Ray itself would keep trying for a long time."""
    host, _, port = str(settings.address).rpartition(":")
    try:
        if settings.address not in ("auto", "local"):
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        ways_out = "expected auto, local, or HOST:PORT of a cluster started with `ray start --head`"
        raise InputError(f"--address {shown(settings.address)}: nothing answers there ({error}); {ways_out}") from None


def _absolute(overrides: Values) -> Values:
    """Overrides with absolute paths, which mean the same in every working folder."""
    values = dict(overrides)
    if "data.name" in values:
        values["data.name"] = sweeping.absolute(str(values["data.name"]))
    for key in ("data.root", "data.cache"):
        if values.get(key) is not None:
            values[key] = str(Path(values[key]).expanduser().resolve())
    return values


def check_data(sweep: Sweep) -> None:
    """Loads the data once and checks all trials against it before any of them starts.

    Raises:
        InputError: the data is missing; a batch or code is too large for it; this machine or the data does not allow a
            configuration; or there are too few evaluations for the scheduler.
    """
    settings, space = sweep.settings, sweep.space
    if not settings.gpus_per_worker:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    for preset, part in space.parts.items():
        where = f"preset {preset}: "
        config = override(PRESETS[preset], sweep.overrides, where)
        shape, count, labelled = sweeping.images_of(config)
        if sweep.metric == "val.probe_accuracy" and not labelled:
            reason = f"needs labels, and {config.data.name} has none"
            raise InputError(f"--metric val.probe_accuracy {reason}; use another metric")
        if config.model.image_shape not in (None, shape):
            raise InputError(f"{where}model.image_shape is {config.model.image_shape}, and the images are {shape}")
        points = [{key: value} for key, d in part.items() for value in d.probes()]
        points += [values for planned, values in _plan(space, settings) if planned == preset]
        for values in points:
            changed = override(config, values, where)
            check_sizes(changed, shape, settings.workers_per_trial, where)
            if changed.train.batch_size > count:
                size = changed.train.batch_size
                raise InputError(
                    f"{where}train.batch_size {size} is larger than the {count} training images; use "
                    f"--train.batch-size {count} or less"
                )
            try:
                sweeping.check(changed, shape)
            except InputError as error:
                raise InputError(f"{where}with {shown(values)}: {error}") from None
            _check_evaluations(sweep, changed, count)


def _plan(space: Space, settings: Settings) -> list[tuple[str, Values]]:
    """The trials, as far as they are known in advance. For an optimizer: points that it might suggest."""
    count = PROBED if settings.search == "optuna" or not settings.num_trials else settings.num_trials
    return space.plan(settings.search, count, settings.seed)


def _check_evaluations(sweep: Sweep, config: Config, num_images: int) -> None:
    steps_per_epoch = -(-num_images // config.train.batch_size)
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    evaluations = steps // (config.train.eval_every or steps_per_epoch)
    if sweep.settings.scheduler != "none" and sweep.settings.budget is None and evaluations < 4:
        raise InputError(
            f"--scheduler {sweep.settings.scheduler} compares trials while they run, and these are evaluated "
            f"{evaluations} times in {steps} steps; use --train.eval-every {max(1, steps // 10)}, or longer trials"
        )


# -- running


def start(sweep: Sweep, selection: Selection, seeds: int) -> None:
    """Plans and runs a new sweep, then trains its leading trials with fresh seeds, if any are asked for.

    Raises:
        InputError: there is already a sweep of that name, or its data or cluster is missing.
        Interrupted: Ctrl-C or SIGTERM came; ``--resume`` continues.
    """
    budget = _budget(sweep.settings, seeds)
    with only_driver(sweep.path, new=True):
        size = f" of {sweep.settings.num_trials} trials" if sweep.settings.num_trials else ""
        size += "" if budget is None else f" of {budget.minutes:g} minutes"
        say(f"sweep {sweep.name}{size} → {sweep.path}")
        try:
            check_data(sweep)
        except InputError:
            shutil.rmtree(sweep.path)  # nothing is planned in it yet
            raise
        sweep = dataclasses.replace(sweep, overrides=_absolute(sweep.overrides) | _tracking(sweep))
        with cluster(sweep):
            plan_trials(sweep)
            run(sweep, resuming(sweep, selection, seeds), budget)
            confirm(sweep, selection, seeds, budget)


def resume(path: Path, new: Settings, selection: Selection, seeds: int) -> Sweep:
    """Resumes a sweep with new settings for address, number of trials at once, and budget.

    Finished, stopped and failed trials stay as they are. The others continue from their checkpoints.
    """
    with only_driver(path, new=False):
        sweep = read_sweep(path)
        changes = new.model_dump(include={"address", "max_concurrent"}, exclude_none=True)
        settings = Settings(**sweep.settings.model_dump() | changes | {"budget": new.budget})
        budget = _budget(settings, seeds)
        sweep = dataclasses.replace(sweep, settings=settings)
        _check_local(settings)
        _check_address(settings)
        if left(sweep) or seeds:
            check_data(sweep)
            with cluster(sweep):
                run(sweep, resuming(sweep, selection, seeds), budget)
                confirm(sweep, selection, seeds, budget)
        return sweep


def resuming(sweep: Sweep, selection: Selection, seeds: int) -> str:
    """The command that resumes a sweep."""
    words = ["dist-ae", "sweep", "--resume", sweep.name, "--storage", str(sweep.path.parent)]
    words += ["--select", str(selection)] if selection.kind != "best" else []
    return shlex.join([*words, "--confirm", str(seeds)] if seeds else words)


def _budget(settings: Settings, seeds: int) -> Budget | None:
    """The budget, which starts now. It reserves time for two leading trials with fresh seeds."""
    if settings.budget is None:
        return None
    return Budget(settings.budget, time.monotonic(), wanted=settings.num_trials, held=2 * seeds)


def confirm(sweep: Sweep, selection: Selection, seeds: int, budget: Budget | None) -> None:
    """Trains the leading trials with up to ``seeds`` fresh seeds, until the leader stands alone or time is up."""
    rows = contenders(results(sweep), selection, sweep)
    if budget is not None:
        budget.held = 0
    while seeds and (rerun := plan_runs(sweep, rows, seeds)) is not None:
        runs = len(unfinished(rerun))
        if budget is not None and not budget.fits(runs):
            say(f"no time is left for {runs} runs with fresh seeds; later: {resuming(sweep, selection, seeds)}")
            return
        run(rerun, resuming(sweep, selection, seeds), budget)


def _tracking(sweep: Sweep) -> Values:
    """Decides once whether to use W&B. Workers elsewhere may lack the key, and all trials belong in one place."""
    config = PRESETS[next(iter(sweep.space.parts))].override(sweep.overrides)
    return {"tracking.wandb": sweeping.wandb_mode(config)}


def track(sweep: Sweep, answer: Answer, command: str) -> None:
    """Logs the answer to the sweep's group in W&B as a separate run: front, importance and report.

    Args:
        command: the command that reports the sweep again.
    """
    config = answer.best.override(_tracking(sweep))
    winner = next(row for row in answer.trials if row["trial"] in answer.run_dir.parts)
    summary = {f"answer/{key}": value for key, value in _plain(winner).items() if value is not None}
    tables = {"front": [*map(_plain, answer.front)], "importance": [asdict(setting) for setting in answer.importance]}
    summary |= {"said": str(answer)}
    sweeping.track_sweep(config, sweep.path, sweep.name, f"{sweep.key}-summary", summary, tables, command)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Cells in a form that a table of W&B accepts."""
    return {key: number(value) if isinstance(value, (list, tuple)) else value for key, value in row.items()}


def unfinished(sweep: Sweep) -> list[Trial]:
    """Planned trials that have no final result yet."""
    return [trial for trial in sweep.trials() if sweep.outcome(trial).status in ("pending", "unfinished")]


def left(sweep: Sweep) -> int:
    """How many trials are still to be run or finished. An optimizer may not have planned all of them yet."""
    return len(unfinished(sweep)) + max(0, sweep.settings.num_trials - len(sweep.trials()))


@contextmanager
def cluster(sweep: Sweep) -> Iterator[None]:
    """Starts Ray on this machine, or joins a cluster, for the length of a sweep.

    Anyone who can connect to Ray can run code on it. A Ray on this machine alone therefore listens on loopback and asks
    every client for a token that only its processes know. Ray reads both settings when it is imported, so a program
    that imported it earlier has made its own choice.

    Raises:
        InputError: there is no cluster, or it is too small; a node cannot see the storage, or cannot import the code.
    """
    settings = sweep.settings
    # Turn off Tune's own tables and files.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if settings.address == "local" and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # makes 127.0.0.1 this machine's address, also on Linux
    import ray

    # Import before joining Ray: nodes on one machine share a submitted job's code and unpack it again while it runs.
    from . import live, schedule, trial  # noqa: F401

    # A stopped trial may take seconds to close its trackers. Its actor has imported torch, so it is worth the wait.
    variables = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "15", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    # Seconds between two looks for a report of several workers, which wait for it.
    variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    variables |= {key: os.environ[key] for key in ("WANDB_BASE_URL", "OMP_NUM_THREADS") if key in os.environ}
    local_options: dict[str, Any] = (
        {"include_dashboard": False, "num_cpus": _cores()} if settings.address == "local" else {}
    )
    if local_options and (folder := short_folder()) is not None:
        local_options["_temp_dir"] = folder
    default_folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if local_options and (disk_warning := nearly_full(local_options.get("_temp_dir", default_folder))):
        say(disk_warning, sys.stderr)
    environment = {"env_vars": variables}
    try:
        ray.init(
            settings.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment, **local_options
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = (
            "Ray did not start on this machine"
            if local_options
            else "no cluster there; start one with `ray start --head`"
        )
        raise InputError(f"--address {settings.address}: {hint} ({first_line(error)})") from None
    try:
        if settings.address != "local":
            available = {kind: float(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU")}
            _check_fits(settings, available, "the cluster")
            _check_shared(sweep)
        yield
    finally:
        ray.shutdown()


def short_folder() -> str | None:
    """A folder for Ray's sockets if the path of the default folder is too long; None if it is not.

    A socket's path has at most 107 bytes, and Ray appends some 60 to the folder.

    Raises:
        InputError: there is no folder with a short path.
    """
    default_folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(os.path.join(default_folder, "ray"))) <= LONGEST_FOLDER:
        return None
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.access(folder, os.W_OK):
            return os.path.join(folder, f"ray-{os.getuid()}")
    raise InputError(
        f"{default_folder}: the path is too long for Ray's sockets, and no folder with a short path can be written; "
        f"set RAY_TMPDIR to a local folder whose path has at most {LONGEST_FOLDER - 4} characters"
    )


def nearly_full(folder: str) -> str:
    """A warning if a local Ray has little room for its files; "" if it has enough."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    usage = shutil.disk_usage(folder)
    if usage.free >= (1 - FULL) * usage.total:
        return ""
    return (
        f"warning: the disk of {folder}, where Ray keeps its files, is {1 - usage.free / usage.total:.0%} full; above "
        f"{FULL:.0%} Ray may refuse to store what trials send: make room, or set RAY_TMPDIR to another folder"
    )


def _check_shared(sweep: Sweep) -> None:
    """Checks that every node can import this code and sees the sweep's folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .trial import sees

    probe = sweep.path / f".seen-{uuid.uuid4().hex}"
    probe.touch()
    try:
        for node in (node for node in ray.nodes() if node["Alive"]):
            strategy, host = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), node["NodeManagerAddress"]
            task = ray.remote(sees).options(num_cpus=0, scheduling_strategy=strategy)
            try:
                visible = ray.get(task.remote(str(probe)), timeout=60)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise InputError(
                    f"node {host} cannot run this code ({reason}); install the project there, or submit the sweep "
                    "with launch/ray/submit.sh, which sends it along"
                ) from None
            if not visible:
                raise InputError(
                    f"--storage {sweep.path.parent}: node {host} does not see this folder, and a trial may continue on "
                    "any node; use a folder on storage that all nodes share (NFS, Lustre, a mounted bucket)"
                )
    finally:
        probe.unlink(missing_ok=True)


def run(sweep: Sweep, command: str, budget: Budget | None = None) -> None:
    """Runs the planned trials that are not done, on the connected Ray.

    Args:
        command: the command that resumes the sweep, for the message of an interruption.
        budget: the time for the sweep.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came.
    """
    import ray.tune

    from .live import Progress
    from .schedule import FreeWorkers, InTime, Optimizer, Planned, scheduler
    from .trial import RETRIES, run_distributed_trial, run_trial

    settings, todo = sweep.settings, unfinished(sweep)
    several, pbt = settings.workers_per_trial > 1, settings.scheduler == "pbt"
    open_ended = settings.budget is not None and not settings.num_trials
    if not left(sweep) and not open_ended:
        return
    if budget is not None:
        budget.slots = min(_fits(settings), left(sweep) or MAX_TRIALS)
    optimizer = Optimizer(sweep) if settings.search == "optuna" else None
    done = {t.id: o.reports[-1] for t in sweep.trials() for o in [sweep.outcome(t)] if o.reports and t not in todo}
    progress = Progress(sweep, len(done) + left(sweep), done, _fits(settings), budget)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    if several:
        # The workers hold the resources, and their driver computes nothing, but Ray wants it to hold something.
        trainable = ray.tune.with_resources(run_distributed_trial, {"memory": 1})
    else:
        resources = {"cpu": settings.cpus_per_worker, "gpu": settings.gpus_per_worker}
        trainable = ray.tune.with_resources(run_trial, resources)
    ids = {"id": ray.tune.grid_search([trial.id for trial in todo]), "sweep_dir": str(sweep.path)}
    tuner = ray.tune.Tuner(
        trainable,
        param_space=ids if pbt else {},
        tune_config=ray.tune.TuneConfig(
            metric=sweep.metric,
            mode="max" if sweep.sign > 0 else "min",
            num_samples=1 if pbt else MAX_TRIALS if open_ended else left(sweep),
            search_alg=None if pbt else Planned(sweep, todo, optimizer, budget),
            scheduler=scheduler(sweep, budget),
            max_concurrent_trials=_concurrency(settings),
            reuse_actors=not several,
            trial_name_creator=lambda trial: trial.config["id"],
            trial_dirname_creator=lambda trial: trial.config["id"],
        ),
        run_config=ray.tune.RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            storage_path=str(sweep.path / "ray"),
            failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
            callbacks=[FreeWorkers(sweep), progress],
            stop=None if budget is None else InTime(budget),
            verbose=0,
        ),
    )
    # On SIGTERM or a closed terminal, let Tune do what it does on Ctrl-C: stop the trials and return.
    signals = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # as under nohup
    old_handlers = {n: signal.signal(n, lambda number, frame: os.kill(os.getpid(), signal.SIGINT)) for n in signals}
    interrupted = False
    try:
        with progress.bar, _ending_without_ray(command, LOST_SECONDS if settings.address == "local" else 60.0):
            tuner.fit()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    remaining = left(sweep)
    if remaining and budget is not None and not interrupted:
        say(f"the budget of {budget.minutes:g} minutes is spent; {command} continues {remaining} trials")
    elif remaining:
        raise Interrupted(f"{remaining} trials are not finished; this continues them: {command}")
    shutil.rmtree(sweep.path / "ray", ignore_errors=True)  # Ray's own records; with pbt, also copies of checkpoints


@contextmanager
def _ending_without_ray(command: str, patience: float) -> Iterator[None]:
    """Ends the sweep with a clear message if Ray's central process is gone.

    A signal to all processes of a job (systemd, Slurm, ``timeout``, a closed terminal) ends Ray, too. Its client would
    wait a minute for it and then abort this process, without saying how to resume the sweep.

    Args:
        patience: seconds without an answer. On a cluster, the central process may come back within a minute.
    """
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    done = threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not done.wait(0.5):
            try:
                socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
                answered = time.monotonic()
            except OSError:
                if time.monotonic() - answered > patience and not done.is_set():
                    text = f"Ray ended while the sweep was running; this continues its trials: {command}"
                    say(text, sys.stderr)
                    os._exit(EXIT_STOPPED)

    thread = threading.Thread(target=watch, name="ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _concurrency(settings: Settings) -> int | None:
    """Most trials at once. With several workers, Tune sees only their driver, so the number is computed here."""
    return settings.max_concurrent if settings.workers_per_trial == 1 else _fits(settings)


def _fits(settings: Settings) -> int:
    """How many trials run at once."""
    import ray

    available, per_worker = ray.cluster_resources(), {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    workers = settings.workers_per_trial
    fits = [int(available.get(kind, 0) // (workers * share)) for kind, share in per_worker.items() if share]
    return max(1, min([*fits, settings.max_concurrent or MAX_TRIALS]))
