"""The sweep on the terminal while it runs: a live table there, a line for each trial elsewhere."""

from __future__ import annotations

import datetime
import math
import time
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .plan import Sweep
from .results import number

ROWS = 12  # trials shown at once: the best, and those that run


class Progress(Callback):  # type: ignore[misc]
    """Shows trials, the best so far, and an estimate of the time left."""

    def __init__(self, sweep: Sweep, total: int, before: dict[str, dict[str, Any]]) -> None:
        """``before``: the last reports of trials that an earlier driver ran."""
        self._sweep, self._total, self._console = sweep, total, Console()
        self._last: dict[str, dict[str, Any]] = dict(before)
        self._state = dict.fromkeys(before, "done")
        self._began, self._at_begin = time.monotonic(), sum(r["progress"] for r in before.values())
        self._live = Live(console=self._console, refresh_per_second=2, transient=True, get_renderable=self._table)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray keeps a pickle of the whole experiment, which nothing here reads

    # -- what Ray calls

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._state[trial.config["id"]] = "running"

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        if self._sweep.metric in result:
            self._last[trial.config["id"]] = result

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"trial {trial.config['id']} lost its process; it goes on from its last checkpoint")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        planned = self._sweep.trial(trial.config["id"])
        outcome = self._sweep.outcome(planned)
        self._state[planned.id] = outcome.status
        if not self._console.is_terminal:
            values = "  ".join(f"{key}={number(v)}" for key, v in planned.values.items())
            figure = f"{self._sweep.metric} {number(outcome.metric(self._sweep.metric))}"
            figure = str(outcome.error) if outcome.status == "failed" else figure
            self._say(f"{planned.id} {outcome.status:<9} {planned.preset}  {values}  {figure}  ({self._summary()})")

    on_trial_error = on_trial_complete

    # -- what a person sees

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _summary(self) -> str:
        finite = [v for v in map(self._value, self._last) if math.isfinite(v)]
        best = max(finite, key=lambda v: self._sweep.sign * v) if finite else None
        done = sum(state != "running" for state in self._state.values())
        reached = {i: r.get("progress", 0) for i, r in self._last.items()}
        gained = sum(reached.values()) - self._at_begin
        # A stopped trial owes nothing more, so this is an upper estimate under a stopping scheduler.
        owed = 100 * self._total - sum(p if self._state.get(i) == "running" else 100 for i, p in reached.items())
        left = ""
        if gained > 0 and owed > 0:
            seconds = round(owed / gained * (time.monotonic() - self._began))
            left = f", about {datetime.timedelta(seconds=seconds)} left"
        return f"{done} of {self._total} trials, best {number(best)}{left}"

    def _value(self, trial_id: str) -> float:
        return float(self._last.get(trial_id, {}).get(self._sweep.metric, math.nan))

    def _order(self, trial_id: str) -> tuple[bool, float]:
        value = self._sweep.sign * self._value(trial_id)
        return self._state[trial_id] != "running", -value if math.isfinite(value) else math.inf

    def _table(self) -> Table:
        table = Table(title=f"{self._sweep.name}: {self._summary()}", title_justify="left", box=None)
        keys = self._sweep.space.searched()
        for name in ("trial", "state", "preset", *keys, "done", self._sweep.metric):
            table.add_column(name, justify="left" if name in ("trial", "state", "preset") else "right")
        for trial_id in sorted(self._state, key=self._order)[:ROWS]:
            planned, last = self._sweep.trial(trial_id), self._last.get(trial_id, {})
            values = [number(planned.values.get(key)) for key in keys]
            figures = f"{last.get('progress', 0):.0f} %", number(last.get(self._sweep.metric))
            table.add_row(trial_id, self._state[trial_id], planned.preset, *values, *figures)
        return table
