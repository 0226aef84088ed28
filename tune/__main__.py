"""The command line of a sweep. Nothing here imports torch or ray before the request is checked."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dist_ae.config import InputError

EXIT_FAULT, EXIT_INPUT, EXIT_STOPPED = 1, 2, 75  # 75 is EX_TEMPFAIL: --resume goes on


def tune(
    which: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")] = None,
    space: Path | None = None,
    num_trials: int | None = None,
    scheduler: Literal["none", "asha", "median", "pbt"] = "none",
    search: Literal["random", "grid", "optuna"] = "random",
    metric: Literal["val.mse", "val.denoised_psnr", "val.neg_elbo", "val.probe_accuracy"] | None = None,
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
) -> None:
    """Searches over latent size, learning rate, noise and dropout with Ray Tune, and answers: trials.csv, best.json, report.html.

    Args:
        which: space to search: ae, denoising, dropout, vae, or all, which chooses among the four.
        space: your own space, a JSON or TOML file (docs/sweeps.md shows one).
        num_trials: trials to run; left out, 16, or all points of a grid.
        scheduler: asha and median stop weak trials early; pbt clones strong ones and changes lr, noise and dropout on the way.
        search: where the next configuration comes from.
        metric: what trials are judged by; left out, the space's own.
        select: the answer: best, smallest-within-PCT (the smallest code within PCT percent of the best), best-under-SIZE (of codes up to SIZE).
        name: the sweep's folder under the storage, and its group in W&B; left out, the space and the time.
        resume: name of an interrupted sweep to go on with.
        retrain: train the winner with this many further seeds and report mean and standard deviation.
        storage: folder of sweeps; on a cluster, one that all nodes share.
        workers_per_trial: processes that train one trial together.
        cpus_per_worker: CPUs of each.
        gpus_per_worker: GPUs of each; with one worker, a share such as 0.25 lets trials share a GPU.
        max_concurrent: most trials at once; left out, as many as fit.
        address: local (the default), auto for the running cluster of this machine, or HOST:PORT.
        set: fixes a configuration key in every trial, such as train.epochs=5; repeatable. A searched key is then no longer searched.
        seed: of the search.
    """
    from tune.plan import Settings
    from tune.results import parse_selection
    from tune.spaces import load_space, parse_overrides
    from tune.sweep import checked

    selection = parse_selection(select)
    if retrain < 0:
        raise InputError(f"--retrain {retrain}: 0 or more seeds")
    if resume is not None:
        if which is not None or space is not None:
            raise InputError("--resume takes the space from the sweep; leave the space out")
        from tune.sweep import resume as go_on

        sweep = go_on(storage.resolve() / resume, address, max_concurrent, selection, retrain)
    else:
        from tune.sweep import start

        chosen = load_space(which, space)
        settings = Settings(
            scheduler=scheduler, search=search, workers_per_trial=workers_per_trial, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker,
            max_concurrent=max_concurrent, address=address or "local", seed=seed,
        )  # fmt: skip
        name = name or f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        sweep = checked(chosen, parse_overrides(set), metric, settings, num_trials, name, storage)
        print(f"sweep {name} of {sweep.settings.num_trials} trials → {sweep.path}", flush=True)
        start(sweep, selection, retrain)

    from tune.report import write_report

    if not write_report(sweep, selection):
        print("error: no trial finished; the reasons stand in trials.csv and in trials/*/error.txt", file=sys.stderr)
        sys.exit(EXIT_FAULT)


def main() -> None:
    """Entry point of ``python -m tune``."""
    try:
        tyro.cli(tune, prog="python -m tune")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
    except Exception as error:
        if type(error).__name__ == "Interrupted":
            print(error, file=sys.stderr, flush=True)
            sys.exit(EXIT_STOPPED)
        raise


if __name__ == "__main__":
    main()
