"""The command line of a sweep. Nothing here imports torch or ray before the request is checked."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dist_ae.config import Config, Fault, InputError
from dist_ae.terminal import EXIT_STOPPED, say

from .plan import Settings
from .results import parse_selection
from .spaces import OWN, Metric, load_space, parse_overrides
from .sweep import checked, start
from .sweep import resume as go_on

DEFAULT = Settings()


def sweep(
    which: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")] = None,
    space: Path | None = None,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = DEFAULT,
    metric: Metric | None = None,
    select: str = "best",
    name: str | None = None,
    resume: str | None = None,
    retrain: int = 0,
    storage: Path = Path("runs/sweeps"),
    set: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="KEY=VALUE")] = [],  # noqa: B006
) -> Path:
    """Trains many configurations of a preset, ranks them, and writes report.html, best.json and trials.csv.

    Options of dist-ae train, such as --train.epochs 5 or --data.root DIR, hold for every trial. A key that is given one
    value is not searched.

    Args:
        which: space to search: ae, denoising, dropout, vae, conv, or all, which chooses among the first four.
        space: your own space, a JSON or TOML file (docs/sweeps.md shows one).
        settings: how it is run; of these, --resume takes only an address and a limit of trials at once.
        metric: what trials are judged by; left out, the space's own.
        select: the answer: best, smallest-within-PCT (the smallest code within PCT percent of the best),
            best-under-SIZE (the best of codes up to SIZE).
        name: the sweep's folder under the storage, and its group in W&B; left out, the space and the time.
        resume: name of an interrupted sweep to go on with.
        retrain: train the winner with this many further seeds and report mean and standard deviation.
        storage: folder of sweeps; on a cluster, one that all nodes share.
        set: the same as --KEY VALUE, also for keys whose option means something else here, such as seed.
    """
    for needed in ("ray", "optuna", "jinja2"):
        if importlib.util.find_spec(needed) is None:
            raise InputError(f'a sweep needs {needed}, which is not installed; pip install "dist-ae[tune]"')
    selection = parse_selection(select)
    if not 0 <= retrain <= 1000:
        raise InputError(f"--retrain {retrain}: 0 to 1000 seeds")
    if resume is not None:
        refuse_on_resume(which, space, settings, metric, name, set)
        found = go_on(storage.resolve() / resume, settings, selection, retrain)
    else:
        chosen = load_space(which, space)
        name = f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else name
        found = checked(chosen, parse_overrides(set), metric, settings, name, storage)
        start(found, selection, retrain)

    from .report import write_report

    if not write_report(found, selection):
        raise Fault("no trial finished; the reasons stand in trials.csv and in trials/*/error.txt")
    return found.path


def refuse_on_resume(
    which: str | None, space: Path | None, settings: Settings, metric: str | None, name: str | None, set: list[str]
) -> None:
    """Raises InputError for what a sweep decided when it began; only an address and a limit may change."""
    given = {"SPACE": which, "--space": space, "--metric": metric, "--name": name, "--set": set}
    changed = settings.model_dump(exclude={"address", "max_concurrent"}, exclude_defaults=True)
    given |= {f"--{key.replace('_', '-')}": value for key, value in changed.items()}
    wrong = [option for option, value in given.items() if value]
    if wrong:
        raise InputError(
            f"--resume goes on with the sweep as it was begun; leave out {', '.join(wrong)}. It takes --address, "
            "--max-concurrent, --select and --retrain. For another search, begin another sweep"
        )


def spelled_as_set(arguments: Sequence[str]) -> list[str]:
    """``--train.epochs 5``, as ``dist-ae train`` spells it, becomes ``--set train.epochs=5``.

    Raises:
        InputError: no value follows.
    """
    fields, made, rest = dict(Config().flat()), list[str](), list(arguments)
    while rest:
        argument = rest.pop(0)
        option, given, value = argument.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        known = key in fields or ("." in key and key.partition(".")[0] in Config.model_fields)
        if not option.startswith("--") or not known or key in OWN:
            made.append(argument)
            continue
        flag = key.replace(".no_", ".")
        if not given and isinstance(fields.get(flag), bool):
            key, value = flag, str(key == flag).lower()
        elif not given:
            most = len(rest) if isinstance(fields.get(key), tuple) else 1
            values = list(itertools.takewhile(lambda word: not word.startswith("--"), rest[:most]))
            if not values:
                raise InputError(f"{option}: expected a value")
            value, rest = ",".join(values), rest[len(values) :]
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
        say(f"{'' if status == EXIT_STOPPED else 'error: '}{error}", sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
