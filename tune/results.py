"""The results of a sweep: the ranking, the answer, trials.csv and best.json. Needs neither torch nor ray."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_ae import Config, InputError
from dist_ae.sweeping import code_size, write_atomically

from .plan import Outcome, Sweep, Trial, read_object, write_json
from .spaces import shown

if TYPE_CHECKING:
    from .confirm import Standing

ORDER = ("finished", "stopped", "unfinished", "pending", "failed")


@dataclass(frozen=True)
class Row:
    """A trial and its outcome. ``value`` is its value of the sweep's metric, NaN if it has none."""

    trial: Trial
    outcome: Outcome
    value: float
    latent_dim: int
    size: int  # numbers of a code: latent_dim, or latent_dim in each cell of a grid


def results(sweep: Sweep) -> list[Row]:
    """All trials, best first: finished ones, then those stopped early, then the others; NaN last in each group."""
    rows = []
    for trial in sweep.trials():
        outcome = sweep.outcome(trial)
        value = sweep.value(trial, outcome)
        config = sweep.answer(trial)
        value = math.nan if value is None else value
        rows.append(Row(trial, outcome, value, config.model.latent_dim, _code_size(sweep, trial, config)))

    def rank(row: Row) -> tuple[int, bool, float, int]:
        good = math.isfinite(row.value)
        return ORDER.index(row.outcome.status), not good, -sweep.sign * row.value if good else 0, row.trial.number

    return sorted(rows, key=rank)


def _code_size(sweep: Sweep, trial: Trial, config: Config) -> int:
    """The size of a trial's code. Its run directory has the shape of the images, once training has begun."""
    complete = (read_object(sweep.run_dir(trial) / "config.json") or {}).get("config", {})
    return code_size(config, complete.get("model", {}).get("image_shape"))


def number(value: Any) -> str:
    """A value in readable form."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Selection:
    """How the answer is chosen from the finished trials."""

    kind: str
    number: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "best" else f"{self.kind}-{self.number:g}"


def parse_selection(text: str) -> Selection:
    """``best``, ``smallest-within-PCT`` or ``best-under-SIZE``.

    Raises:
        InputError: anything else.
    """
    if text == "best":
        return Selection("best")
    match = re.fullmatch(r"(smallest-within|best-under)-([0-9]+(?:\.[0-9]+)?)%?", text)
    if match is None:
        kinds = "best, smallest-within-PCT (such as smallest-within-3) or best-under-SIZE (such as best-under-32)"
        raise InputError(f"--select {shown(text)}: expected {kinds}")
    return Selection(match[1], float(match[2]))


def select(rows: list[Row], selection: Selection, sweep: Sweep) -> Row | None:
    """The answer among the finished trials, or None if there is none."""
    good = [row for row in rows if row.outcome.status == "finished" and math.isfinite(row.value)]
    if selection.kind == "best-under":
        good = [row for row in good if row.size <= selection.number]
    if not good:
        return None
    best = good[0]
    if selection.kind == "smallest-within":
        # The margin is relative to the size of the best value, which may be negative (densities) or in dB.
        margin = selection.number / 100 * abs(best.value)
        near = [row for row in good if sweep.sign * row.value >= sweep.sign * best.value - margin]
        return min(near, key=lambda row: (row.size, good.index(row)))
    return best


def front(rows: list[Row], error: dict[str, float]) -> list[Row]:
    """The Pareto front of code size against error: the trials that no trial of at most the same size beats.

    ``error`` is by trial id, and smaller is better.
    """
    best: list[Row] = []
    for row in sorted((r for r in rows if r.trial.id in error), key=lambda r: (r.size, error[r.trial.id])):
        if not best or error[row.trial.id] < error[best[-1].trial.id]:
            best.append(row)
    return best


def table(sweep: Sweep, rows: list[Row], standings: Mapping[str, Standing] = {}) -> list[dict[str, Any]]:
    """Cells by column for the trials in the order of the ranking: values, last metrics, steps and seconds."""
    keys = [key for key in sweep.space.searched() if key != "model.latent_dim"]
    reports = [report for row in rows for report in row.outcome.reports]
    metrics = sorted({name for report in reports for name in report if name.startswith("val.")})
    lines = []
    for rank, row in enumerate(rows, 1):
        last: dict[str, Any] = row.outcome.reports[-1] if row.outcome.reports else {}
        cells = {"rank": rank, "trial": row.trial.id, "status": row.outcome.status, "preset": row.trial.preset}
        values = {key: row.trial.values.get(key) for key in keys}
        cells |= {"model.latent_dim": row.latent_dim}
        cells |= {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        cells |= {name: last.get(name) for name in metrics}
        cells |= {"steps": last.get("step", 0), "seconds": round(last.get("seconds", 0.0), 3)}
        if standings:
            empty = dict.fromkeys(next(iter(standings.values())).cells())
            cells |= standings[row.trial.id].cells() if row.trial.id in standings else empty
        lines.append({**cells, "cloned_from": " ".join(row.trial.donors), "error": row.outcome.error})
    return lines


def write_table(sweep: Sweep, cells: list[dict[str, Any]]) -> None:
    """Writes trials.csv, one line per trial."""
    text = io.StringIO()
    writer = csv.DictWriter(text, cells[0] if cells else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    write_atomically(sweep.path / "trials.csv", text.getvalue().encode())


def write_best(sweep: Sweep, winner: Row) -> None:
    """Writes best.json, a complete configuration: ``dist-ae train --config best.json`` trains the winner again."""
    write_json(sweep.path / "best.json", sweep.answer(winner.trial).model_dump(mode="json"))
