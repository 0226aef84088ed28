"""What sweeps found, as objects. In a notebook, they show themselves as tables and pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_ae import Config

from .insight import Importance

SHOWN = 10  # trials of the representation


@dataclass(frozen=True)
class Answer:
    """The answer of a sweep: best configuration, trials, front and importance."""

    path: Path  # the sweep's folder, with report.html, trials.csv, best.json and trials/
    best: Config  # the winner's configuration, to be trained or changed
    run_dir: Path  # the winner's run, which `dist_ae.load` takes
    sentences: list[str]  # the answer beside PCA, what fresh seeds say, and warnings
    trials: list[dict[str, Any]]  # the rows of trials.csv, best first; `pandas.DataFrame(answer.trials)` takes them
    front: list[dict[str, Any]]  # of them, the Pareto front of code size against error
    importance: list[Importance]  # of each setting, most first; empty where it would mean nothing
    ranking: Sequence[Mapping[str, str]] = field(repr=False)
    pictures: Sequence[tuple[str, str]] = field(repr=False)  # (what it shows, data URI)

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    def _repr_html_(self) -> str:
        """The ranking and the pictures, for a notebook."""
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.sentences)
        rows = self.ranking[:SHOWN]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0]) if rows else ""
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in cells.values())}</tr>" for cells in rows
        )
        shares = "".join(f"<li>{html.escape(str(each))}</li>" for each in self.importance)
        images = "".join(
            f'<figure><img style="max-width: 560px; width: 100%" alt="{html.escape(what)}" src="{image}">'
            f"<figcaption>{html.escape(what)}</figcaption></figure>"
            for what, image in self.pictures
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"{said}{table}{f'<ul>{shares}</ul>' if shares else ''}{images}"


# -- sweeps beside each other


@dataclass(frozen=True)
class Best:
    """A sweep's best at a size of the code: a trial, and its value by fresh seeds where it has some."""

    trial: str
    size: int
    value: float
    losses: tuple[float, ...] = field(repr=False)  # with fresh seeds, else that of the search alone; smaller is better

    @property
    def seeds(self) -> int:
        """Fresh seeds; 0 where there is only the search, whose seed it was chosen by."""
        return len(self.losses) if len(self.losses) > 1 else 0


@dataclass(frozen=True)
class Level:
    """Sweeps compared by their best with ``numbers`` numbers; the better first."""

    numbers: int
    at_most: bool  # or with fewer, since the sweeps have no size in common
    best: dict[str, Best]  # by the sweep's name
    behind: dict[str, tuple[float, float] | None]  # the others' 95 % interval; None: seeds are lacking

    @property
    def leader(self) -> str:
        return next(iter(self.best))

    @property
    def verdict(self) -> dict[str, str]:
        """What can be said of each other sweep: worse, alike (it cannot be told from the leader), or one seed."""
        said = {}
        for name, interval in self.behind.items():
            said[name] = "one seed" if interval is None else "worse" if interval[0] > 0 else "alike"
        return said


@dataclass(frozen=True)
class Comparison:
    """What sweeps are beside each other. In a notebook, it shows itself as sentences, tables and the fronts."""

    path: Path  # of the page; beside it stands the same as JSON
    sentences: list[str]
    levels: list[Level]
    differs: dict[str, dict[str, str]]  # what differs in spaces and settings: by key, by the sweep's name
    sizes: Sequence[dict[str, str]] = field(repr=False)
    picture: str = field(repr=False)  # the fronts, a data URI

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.sentences)
        tables = _as_html(self.sizes) + _as_html(setting_rows(self.differs))
        return f'{said}{tables}<img alt="fronts" style="max-width: 560px; width: 100%" src="{self.picture}">'


def _as_html(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    return f"<table>{''.join('<tr>' + ''.join(f'<td>{html.escape(c)}</td>' for c in line) + '</tr>' for line in lines)}"


def setting_rows(differs: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """The table of what differs."""
    return [{"setting": key, **values} for key, values in differs.items()]
