"""The command line of a sweep. Nothing here imports torch or ray before the request is checked."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dist_ae.config import Config, Fault, InputError
from dist_ae.terminal import EXIT_STOPPED

from .plan import Scheduler, Search, Settings
from .spaces import OWN, Metric, load_space, parse_overrides


def sweep(
    which: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")] = None,
    space: Path | None = None,
    num_trials: int | None = None,
    scheduler: Scheduler = "none",
    search: Search = "random",
    metric: Metric | None = None,
    select: str = "best",
    name: str | None = None,
    resume: str | None = None,
    retrain: int = 0,
    storage: Path = Path("runs/sweeps"),
    workers_per_trial: int = 1,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    max_concurrent: int | None = None,
    address: str | None = None,
    set: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="KEY=VALUE")] = [],  # noqa: B006
    seed: int = 0,
) -> Path:
    """Trains many configurations of a preset, ranks them, and writes report.html, best.json and trials.csv.

    Options of dist-ae train, such as --train.epochs 5 or --data.root DIR, hold for every trial; a key
    given one value is not searched.

    Args:
        which: space to search: ae, denoising, dropout, vae, conv, or all, which chooses among the first four.
        space: your own space, a JSON or TOML file (docs/sweeps.md shows one).
        num_trials: trials to run; left out, 16, or all points of a grid.
        scheduler: asha and median stop weak trials early; pbt clones strong ones and changes lr, noise and dropout.
        search: where the next configuration comes from.
        metric: what trials are judged by; left out, the space's own.
        select: the answer: best, smallest-within-PCT (the smallest code within PCT percent of the best),
            best-under-SIZE (the best of codes up to SIZE).
        name: the sweep's folder under the storage, and its group in W&B; left out, the space and the time.
        resume: name of an interrupted sweep to go on with.
        retrain: train the winner with this many further seeds and report mean and standard deviation.
        storage: folder of sweeps; on a cluster, one that all nodes share.
        workers_per_trial: processes that train one trial together.
        cpus_per_worker: CPUs of each.
        gpus_per_worker: GPUs of each; with one worker, a share such as 0.25 lets trials share a GPU.
        max_concurrent: most trials at once; left out, as many as fit.
        address: local (the default), auto for the running cluster of this machine, or HOST:PORT.
        set: the same as --KEY VALUE, also for keys whose option means something else here, such as seed.
        seed: of the search.
    """
    from .results import parse_selection
    from .sweep import checked

    for needed in ("ray", "optuna", "jinja2"):
        if importlib.util.find_spec(needed) is None:
            raise InputError(f'a sweep needs {needed}, which is not installed; pip install "dist-ae[tune]"')
    selection = parse_selection(select)
    if not 0 <= retrain <= 1000:
        raise InputError(f"--retrain {retrain}: 0 to 1000 seeds")
    if resume is not None:
        if which is not None or space is not None or set:
            raise InputError("--resume takes the space and what is fixed from the sweep; leave them out")
        from .sweep import resume as go_on

        found = go_on(storage.resolve() / resume, address, max_concurrent, selection, retrain)
    else:
        from .sweep import start

        chosen = load_space(which, space)
        settings = Settings(
            scheduler=scheduler,
            search=search,
            workers_per_trial=workers_per_trial,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            max_concurrent=max_concurrent,
            address=address or "local",
            seed=seed,
        )
        name = f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else name
        found = checked(chosen, parse_overrides(set), metric, settings, num_trials, name, storage)
        start(found, selection, retrain)

    from .report import write_report

    if not write_report(found, selection):
        raise Fault("no trial finished; the reasons stand in trials.csv and in trials/*/error.txt")
    return found.path


def spelled_as_set(arguments: Sequence[str]) -> list[str]:
    """``--train.epochs 5``, as ``dist-ae train`` spells it, becomes ``--set train.epochs=5``.

    Raises:
        InputError: no value follows.
    """
    fields, made, rest = dict(Config().flat()), [], list(arguments)
    while rest:
        argument = rest.pop(0)
        option, given, value = argument.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        section, dot, leaf = key.partition(".")
        if (
            not option.startswith("--")
            or key in OWN
            or (key not in fields and not (dot and section in Config.model_fields))
        ):
            made.append(argument)
            continue
        if not given and isinstance(fields.get(f"{section}.{leaf.removeprefix('no_')}"), bool):
            value, key = str(not leaf.startswith("no_")).lower(), f"{section}.{leaf.removeprefix('no_')}"
        elif not given:
            values: list[str] = []
            while rest and not rest[0].startswith("--") and (not values or isinstance(fields.get(key), tuple)):
                values.append(rest.pop(0))
            if not values:
                raise InputError(f"{option}: expected a value")
            value = ",".join(values)
        made += ["--set", f"{key}={'null' if value == 'None' else value}"]
    return made


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tune") -> None:
    """Entry point of ``python -m tune`` and ``dist-ae sweep``."""
    try:
        tyro.cli(sweep, prog=prog, args=spelled_as_set(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
    except Exception as error:
        status = getattr(error, "exit_status", None)  # the errors that have one were written to be read by a person
        if status is None:
            raise
        print(f"{'' if status == EXIT_STOPPED else 'error: '}{error}", file=sys.stderr, flush=True)
        sys.exit(status)


if __name__ == "__main__":
    main()
