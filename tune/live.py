"""The sweep on the terminal while it runs: a live table there, a line for each trial elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from tune.plan import Sweep
from tune.trial import free_workers

ROWS = 12  # trials shown at once: the best, and those that run


class Progress(Callback):  # type: ignore[misc]
    """Shows trials, the best so far, and an estimate of the time left."""

    def __init__(self, sweep: Sweep, total: int, before: dict[str, dict[str, Any]]) -> None:
        """``before``: the last reports of trials that an earlier driver ran."""
        self._sweep, self._total, self._console = sweep, total, Console()
        self._last: dict[str, dict[str, Any]] = dict(before)
        self._state = dict.fromkeys(before, "done")
        self._began, self._at_begin = time.monotonic(), sum(r["progress"] for r in before.values())
        self._live = (
            Live(console=self._console, refresh_per_second=2, transient=True, get_renderable=self._table)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray keeps a pickle of the whole experiment, which nothing here reads

    # -- what Ray calls

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._state[self._id(trial)] = "running"

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._sweep.metric in result:
            self._last[self._id(trial)] = result

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        free_workers(self._sweep.trial_dir(self._id(trial)))
        self._console.print(
            f"trial {self._id(trial)} lost its process; it goes on from its last checkpoint", highlight=False
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._finished(self._id(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._finished(self._id(trial))

    # -- what a person sees

    def _id(self, trial: Any) -> str:
        return str(trial.config["id"])

    def _finished(self, trial_id: str) -> None:
        free_workers(self._sweep.trial_dir(trial_id))
        planned = self._sweep.trial(trial_id)
        outcome = self._sweep.outcome(planned)
        self._state[trial_id] = outcome.status
        if self._live is None:
            value = outcome.metric(self._sweep.metric)
            values = "  ".join(f"{key}={short(v)}" for key, v in planned.values.items())
            figure = f"{self._sweep.metric} {short(value)}" if outcome.status != "failed" else f"{outcome.error}"
            self._console.print(
                f"{trial_id} {outcome.status:<9} {planned.preset}  {values}  {figure}  ({self._summary()})",
                highlight=False,
                soft_wrap=True,
            )

    def _summary(self) -> str:
        done = sum(state not in ("running",) for state in self._state.values())
        finite = [
            r[self._sweep.metric] for r in self._last.values() if math.isfinite(r.get(self._sweep.metric, math.nan))
        ]
        best = max(finite, key=lambda v: self._sweep.sign * v) if finite else None
        gained = sum(r.get("progress", 0) for r in self._last.values()) - self._at_begin
        # A stopped trial owes nothing more, so this is an upper estimate under a stopping scheduler.
        owed = 100 * self._total - sum(
            100 if self._state.get(i) != "running" else r.get("progress", 0) for i, r in self._last.items()
        )
        left = (
            f", about {_clock(owed / gained * (time.monotonic() - self._began))} left"
            if gained > 0 and owed > 0
            else ""
        )
        return f"{done} of {self._total} trials, best {short(best)}{left}"

    def _table(self) -> Table:
        table = Table(title=f"{self._sweep.name}: {self._summary()}", title_justify="left", box=None)
        keys = self._sweep.space.searched()
        for name in ("trial", "state", "preset", *keys, "done", self._sweep.metric):
            table.add_column(name, justify="left" if name in ("trial", "state", "preset") else "right")
        ranked = sorted(
            self._state,
            key=lambda i: (
                self._state[i] != "running",
                -self._sweep.sign * _or_worst(self._last.get(i, {}).get(self._sweep.metric), self._sweep.sign),
            ),
        )
        for trial_id in ranked[:ROWS]:
            planned, last = self._sweep.trial(trial_id), self._last.get(trial_id, {})
            values = (short(planned.values.get(key)) for key in keys)
            table.add_row(
                trial_id,
                self._state[trial_id],
                planned.preset,
                *values,
                f"{last.get('progress', 0):.0f} %",
                short(last.get(self._sweep.metric)),
            )
        return table


def _or_worst(value: float | None, sign: int) -> float:
    return value if value is not None and math.isfinite(value) else -sign * math.inf


def short(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
