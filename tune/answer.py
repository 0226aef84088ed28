"""The results of sweeps as objects, which a notebook shows as tables and pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_ae import Config

from .insight import Importance

SHOWN = 10  # trials in a notebook


@dataclass(frozen=True)
class Answer:
    """The answer of a sweep: best configuration, trials, front and importance."""

    path: Path  # the sweep's folder, with report.html, trials.csv, best.json and trials/
    best: Config  # the winner's configuration, to be trained or changed
    run_dir: Path  # the winner's run, for `dist_ae.load`
    sentences: list[str]  # the answer compared with PCA, the result of fresh seeds, and warnings
    trials: list[dict[str, Any]]  # the rows of trials.csv, best first, for `pandas.DataFrame(answer.trials)`
    front: list[dict[str, Any]]  # those rows that form the Pareto front of code size against error
    importance: list[Importance]  # of each setting, largest first; empty if it would mean nothing
    ranking: Sequence[Mapping[str, str]] = field(repr=False)
    pictures: Sequence[tuple[str, str]] = field(repr=False)  # (caption, data URI)

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    def _repr_html_(self) -> str:
        """The ranking and the pictures, for a notebook."""
        paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in self.sentences)
        rows = self.ranking[:SHOWN]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0]) if rows else ""
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in cells.values())}</tr>" for cells in rows
        )
        shares = "".join(f"<li>{html.escape(str(share))}</li>" for share in self.importance)
        images = "".join(
            f'<figure><img style="max-width: 560px; width: 100%" alt="{html.escape(caption)}" src="{image}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, image in self.pictures
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"{paragraphs}{table}{f'<ul>{shares}</ul>' if shares else ''}{images}"


# -- a comparison of sweeps


@dataclass(frozen=True)
class Best:
    """A sweep's best trial at a size of the code, and its value, over fresh seeds if it has some."""

    trial: str
    size: int
    value: float
    losses: tuple[float, ...] = field(repr=False)  # with fresh seeds, else only that of the search; smaller is better

    @property
    def seeds(self) -> int:
        """Number of fresh seeds; 0 if there is only the seed of the search, by which the trial was chosen."""
        return len(self.losses) if len(self.losses) > 1 else 0


@dataclass(frozen=True)
class Level:
    """Sweeps compared by their best trials with a code of ``numbers`` numbers, best first."""

    numbers: int
    at_most: bool  # or with fewer, since the sweeps have no size in common
    best: dict[str, Best]  # by the sweep's name
    behind: dict[str, tuple[float, float] | None]  # 95 % interval of how much worse each other is; None: too few seeds

    @property
    def leader(self) -> str:
        return next(iter(self.best))

    @property
    def verdict(self) -> dict[str, str]:
        """The verdict on each other sweep: worse, alike (not distinguishable from the leader), or one seed."""
        verdicts = {}
        for name, interval in self.behind.items():
            verdicts[name] = "one seed" if interval is None else "worse" if interval[0] > 0 else "alike"
        return verdicts


@dataclass(frozen=True)
class Comparison:
    """A comparison of sweeps, which a notebook shows as sentences, tables and the fronts."""

    path: Path  # of the page; a JSON file with the same content lies next to it
    sentences: list[str]
    levels: list[Level]
    differs: dict[str, dict[str, str]]  # differing spaces and settings, by key and by the sweep's name
    sizes: Sequence[dict[str, str]] = field(repr=False)
    picture: str = field(repr=False)  # the fronts, a data URI

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    def _repr_html_(self) -> str:
        paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in self.sentences)
        tables = _as_html(self.sizes) + _as_html(setting_rows(self.differs))
        return f'{paragraphs}{tables}<img alt="fronts" style="max-width: 560px; width: 100%" src="{self.picture}">'


def _as_html(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    return f"<table>{''.join('<tr>' + ''.join(f'<td>{html.escape(c)}</td>' for c in line) + '</tr>' for line in lines)}"


def setting_rows(differs: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """The table of what differs."""
    return [{"setting": key, **values} for key, values in differs.items()]
