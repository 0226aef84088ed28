"""What a sweep found, as objects. In a notebook, it shows itself as a table and pictures."""

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
