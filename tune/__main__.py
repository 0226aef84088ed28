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
from .sweep import resume as resume_sweep

DEFAULT = Settings()


def training_options(section: type[BaseModel], but: Collection[str] = ()) -> Any:
    """The options of ``dist-ae train`` as a TypedDict of optional keys."""
    kinds = typing.get_type_hints(section)
    options: Any = {}
    for key, field in section.model_fields.items():
        kind = kinds[key]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            options[key] = training_options(kind)
        elif key not in but:
            options[key] = Annotated[kind, tyro.conf.arg(help=field.description)]
    make: Any = typing.TypedDict  # mypy accepts only literal keys
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

    Options of dist-ae train, such as --train.epochs 5 or --data.root DIR, apply to every trial. A key with a given
    value is not searched.

    Args:
        which: space to search: ae, denoising, dropout, vae, conv, or all, which chooses among the first four.
        space: your own space, a JSON or TOML file (docs/sweeps.md shows one).
        settings: how the sweep is run; --resume accepts only --address, --max-concurrent and --budget of these.
        metric: the metric that trials are judged by; left out, the space's own.
        select: the answer: best, smallest-within-PCT (the smallest code within PCT percent of the best),
            best-under-SIZE (the best of codes up to SIZE).
        name: the sweep's folder under the storage, and its group in W&B; left out, the space and the time.
        resume: name of an interrupted sweep to continue.
        compare: sweeps to compare on one page, by name or folder; nothing is trained.
        confirm: train the leading trials with up to this many fresh seeds each, until the leader stands alone.
        storage: folder of sweeps; on a cluster, one that all nodes share.
        set: the same as --KEY VALUE, also for keys whose option means something else here, such as seed.
        training: options of dist-ae train that apply to every trial.
    """
    overridden = flat(training)
    if compare:
        changed = settings.model_dump(exclude_defaults=True) | overridden
        refuse(_given(which, space, metric, None, set, changed) | {"--resume": resume, "--confirm": confirm}, COMPARING)
        return compared(compare, select, storage, name)
    require(("ray", "optuna", "jinja2"))
    selection = parse_selection(select)
    if confirm != 0 and not 2 <= confirm <= MOST_SEEDS:
        raise InputError(f"--confirm {confirm}: 2 to {MOST_SEEDS} seeds, since one alone says nothing about spread")
    overrides = overridden | parse_overrides(set)
    if resume is not None:
        changed = settings.model_dump(exclude={"address", "max_concurrent", "budget"}, exclude_defaults=True)
        refuse(_given(which, space, metric, name, set, changed | overridden), RESUMING)
        this_sweep = resume_sweep(storage.resolve() / resume, settings, selection, confirm)
    else:
        loaded = load_space(which, space)
        name = f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else name
        this_sweep = checked(loaded, overrides, metric, settings, name, storage)
        start(this_sweep, selection, confirm)

    from .report import write_report

    answer = write_report(this_sweep, selection)
    if answer is None:
        raise Fault("no trial gave a result; see trials.csv and trials/*/error.txt for the reasons")
    track(this_sweep, answer, resuming(this_sweep, selection, 0))
    return answer


def compared(
    sweeps: Sequence[str | Path],
    select: str = "best",
    storage: Path = Path("runs/sweeps"),
    name: str | None = None,
    page: str | Path | None = None,
) -> Comparison:
    """Compares sweeps, each given by its name under the storage or by the path of its folder."""
    require(("jinja2",))
    selection = parse_selection(select)
    paths = [under if (under := storage / sweep).is_dir() else Path(sweep) for sweep in map(str, sweeps)]
    for path, sweep in zip(paths, sweeps, strict=True):
        read_sweep(path if path.is_dir() else storage / sweep)
    from .beside import compare

    name = name or "-".join(path.resolve().name for path in paths)[:100]
    check_name(name)
    return compare(
        [path.resolve() for path in paths], selection, Path(page or paths[0].resolve().parent / f"{name}.html")
    )


def require(names: Sequence[str]) -> None:
    """Raises InputError if a library is not installed."""
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(
            f"a sweep needs {' and '.join(lacking)}, not installed here; this installs it: {install('tune')}"
        )


RESUMING = (
    "--resume continues the sweep with its own settings; leave out {}. It accepts --address, --max-concurrent, "
    "--budget, --select and --confirm. For another search, begin another sweep"
)
COMPARING = "--compare trains nothing; leave out {}. It accepts --select, --storage and --name"


def _given(
    which: str | None, space: Path | None, metric: str | None, name: str | None, set: list[str], others: Values
) -> Values:
    """The values on the command line, by option."""
    named = {"SPACE": which, "--space": space, "--metric": metric, "--name": name, "--set": set}
    return named | {f"--{key.replace('_', '-')}": value or "0" for key, value in others.items()}


def refuse(options: Values, message: str) -> None:
    """Raises InputError for options that have no meaning in this use of the command."""
    wrong = [option for option, value in options.items() if value]
    if wrong:
        raise InputError(message.format(", ".join(wrong)))


def flat(nested: Mapping[str, Any], prefix: str = "") -> Values:
    """Values by dotted key, JSON-ready."""
    flattened: Values = {}
    for key, value in nested.items():
        dotted = f"{prefix}{key}"
        flattened |= flat(value, f"{dotted}.") if isinstance(value, dict) else {dotted: to_jsonable_python(value)}
    return flattened


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tune") -> None:
    """Entry point of ``python -m tune`` and ``dist-ae sweep``."""
    try:
        tyro.cli(sweep, prog=prog, args=arguments)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
    except Exception as error:
        status = getattr(error, "exit_status", None)  # an error that has one carries a message for the user
        if status is None:
            raise
        say(f"{'' if status == EXIT_STOPPED else 'error: '}{error}", sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
