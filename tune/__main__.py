"""The command line of a sweep. Nothing here imports torch or ray before the request is checked."""

from __future__ import annotations

import importlib.util
import sys
import time
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from dist_ae import Config, InputError
from dist_ae.sweeping import EXIT_STOPPED, Fault, install, say

from .answer import Answer, Comparison
from .confirm import MOST_SEEDS
from .plan import Settings, check_name, read_sweep
from .results import parse_selection
from .spaces import OWN, Metric, Values, load_space, parse_overrides
from .sweep import checked, resuming, start, track
from .sweep import resume as go_on

DEFAULT = Settings()


def training_options(section: type[BaseModel], but: Collection[str] = ()) -> Any:
    """The options of ``dist-ae train`` as a type of which every key may be left out."""
    kinds = typing.get_type_hints(section)
    options: Any = {}
    for key, field in section.model_fields.items():
        kind = kinds[key]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            options[key] = training_options(kind)
        elif key not in but:
            options[key] = Annotated[kind, tyro.conf.arg(help=field.description)]
    make: Any = typing.TypedDict  # whose keys mypy wants to know
    return make(section.__name__, options, total=False)


if TYPE_CHECKING:
    Training = Mapping[str, Any]
else:
    Training = training_options(Config, but=OWN)


def sweep(
    which: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")] = None,
    space: Path | None = None,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = DEFAULT,
    metric: Metric | None = None,
    select: str = "best",
    name: str | None = None,
    resume: str | None = None,
    compare: Annotated[list[str], tyro.conf.arg(metavar="A B ...")] = [],  # noqa: B006
    confirm: int = 0,
    storage: Path = Path("runs/sweeps"),
    set: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="KEY=VALUE")] = [],  # noqa: B006
    training: Annotated[Training, tyro.conf.arg(name="")] = {},  # noqa: B006
) -> Answer | Comparison:
    """Trains many configurations of a preset, ranks them, and writes report.html, best.json and trials.csv.

    Options of dist-ae train, such as --train.epochs 5 or --data.root DIR, hold for every trial. A key that is given one
    value is not searched.

    Args:
        which: space to search: ae, denoising, dropout, vae, conv, or all, which chooses among the first four.
        space: your own space, a JSON or TOML file (docs/sweeps.md shows one).
        settings: how it is run; of these, --resume takes only an address, a limit of trials at once, and a budget.
        metric: what trials are judged by; left out, the space's own.
        select: the answer: best, smallest-within-PCT (the smallest code within PCT percent of the best),
            best-under-SIZE (the best of codes up to SIZE).
        name: the sweep's folder under the storage, and its group in W&B; left out, the space and the time.
        resume: name of an interrupted sweep to go on with.
        compare: sweeps to put beside each other, by name or folder, on one page; nothing is trained.
        confirm: train the leading trials with up to so many fresh seeds each, until the leader stands alone.
        storage: folder of sweeps; on a cluster, one that all nodes share.
        set: the same as --KEY VALUE, also for keys whose option means something else here, such as seed.
        training: options of dist-ae train that hold for every trial.
    """
    overridden = flat(training)
    if compare:
        changed = settings.model_dump(exclude_defaults=True) | overridden
        refuse(_given(which, space, metric, None, set, changed) | {"--resume": resume, "--confirm": confirm}, COMPARING)
        return compared(compare, select, storage, name)
    missing(("ray", "optuna", "jinja2"))
    selection = parse_selection(select)
    if confirm != 0 and not 2 <= confirm <= MOST_SEEDS:
        raise InputError(f"--confirm {confirm}: 2 to {MOST_SEEDS} seeds, since one alone says nothing about spread")
    overrides = overridden | parse_overrides(set)
    if resume is not None:
        changed = settings.model_dump(exclude={"address", "max_concurrent", "budget"}, exclude_defaults=True)
        refuse(_given(which, space, metric, name, set, changed | overridden), RESUMING)
        made = go_on(storage.resolve() / resume, settings, selection, confirm)
    else:
        chosen = load_space(which, space)
        name = f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else name
        made = checked(chosen, overrides, metric, settings, name, storage)
        start(made, selection, confirm)

    from .report import write_report

    answer = write_report(made, selection)
    if answer is None:
        raise Fault("no trial came to anything; the reasons stand in trials.csv and in trials/*/error.txt")
    track(made, answer, resuming(made, selection, 0))
    return answer


def compared(
    sweeps: Sequence[str | Path],
    select: str = "best",
    storage: Path = Path("runs/sweeps"),
    name: str | None = None,
    page: str | Path | None = None,
) -> Comparison:
    """Puts sweeps beside each other. A name is that of a folder under the storage, or its path."""
    missing(("jinja2",))
    selection = parse_selection(select)
    paths = [under if (under := storage / each).is_dir() else Path(each) for each in map(str, sweeps)]
    for path, given in zip(paths, sweeps, strict=True):
        read_sweep(path if path.is_dir() else storage / given)
    from .beside import compare

    name = name or "-".join(path.resolve().name for path in paths)[:100]
    check_name(name)
    return compare(
        [path.resolve() for path in paths], selection, Path(page or paths[0].resolve().parent / f"{name}.html")
    )


def missing(names: Sequence[str]) -> None:
    """Raises InputError where a library is not installed."""
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(
            f"a sweep needs {' and '.join(lacking)}, not installed here; this installs it: {install('tune')}"
        )


RESUMING = (
    "--resume goes on with the sweep as it was begun; leave out {}. It takes --address, --max-concurrent, --budget, "
    "--select and --confirm. For another search, begin another sweep"
)
COMPARING = "--compare trains nothing; leave out {}. It takes --select, --storage and --name"


def _given(
    which: str | None, space: Path | None, metric: str | None, name: str | None, set: list[str], others: Values
) -> Values:
    """What the command line gave, by option."""
    named = {"SPACE": which, "--space": space, "--metric": metric, "--name": name, "--set": set}
    return named | {f"--{key.replace('_', '-')}": value or "0" for key, value in others.items()}


def refuse(given: Values, said: str) -> None:
    """Raises InputError for options that say nothing in this use of the command."""
    wrong = [option for option, value in given.items() if value]
    if wrong:
        raise InputError(said.format(", ".join(wrong)))


def flat(nested: Mapping[str, Any], prefix: str = "") -> Values:
    """Values by dotted key, JSON-ready."""
    made: Values = {}
    for key, value in nested.items():
        dotted = f"{prefix}{key}"
        made |= flat(value, f"{dotted}.") if isinstance(value, dict) else {dotted: to_jsonable_python(value)}
    return made


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tune") -> None:
    """Entry point of ``python -m tune`` and ``dist-ae sweep``."""
    try:
        tyro.cli(sweep, prog=prog, args=arguments)
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
