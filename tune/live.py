"""The sweep on the terminal while it runs: a line for each trial that ends, and below them the sweep's progress."""

from __future__ import annotations

import math
import time
from typing import Any

import rich.progress
from ray.tune import Callback

from .budget import Budget, time_left
from .plan import Sweep
from .results import number

QUIET_SECONDS = 45.0  # without a line, after which a trial's report shows the progress of the sweep


class Progress(Callback):  # type: ignore[misc]
    """Shows each ended trial, the best so far, and an estimate of the time left."""

    def __init__(
        self, sweep: Sweep, total: int, before: dict[str, dict[str, Any]], slots: int, budget: Budget | None
    ) -> None:
        """Args:
        before: the last reports of trials that an earlier driver ran.
        slots: trials that run at once.
        """
        self._sweep, self._total, self._slots, self._budget = sweep, total, slots, budget
        self._running: dict[str, float] = {}  # when each began
        self._costs: list[float] = []  # seconds of those that ended
        self._last: dict[str, dict[str, Any]] = dict(before)
        self.bar = rich.progress.Progress(disable=not rich.get_console().is_terminal, refresh_per_second=2)
        self._task = self.bar.add_task(sweep.name, total=100 * total or None, completed=round(self._reached()))
        self._last_line = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles the whole experiment, and nothing here reads that pickle

    # -- Ray's hooks

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running[trial.config["id"]] = time.monotonic()
        if self._budget is not None:
            self._budget.started(trial.config["id"])
        self._update()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        if self._sweep.metric in result:
            self._last[trial.config["id"]] = result
            if self._budget is not None:
                self._budget.reported(trial.config["id"], result.get("progress", 0.0))
            self._update()
            if not self.bar.console.is_terminal and time.monotonic() - self._last_line > QUIET_SECONDS:
                self._say(self._summary())

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"trial {trial.config['id']} lost its process; it continues from its last checkpoint")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        planned = self._sweep.trial(trial.config["id"])
        outcome = self._sweep.outcome(planned)
        if planned.id in self._running:
            self._costs.append(time.monotonic() - self._running.pop(planned.id))
        self._last.setdefault(planned.id, {})
        self._update()
        values = "  ".join(f"{key}={number(v)}" for key, v in planned.values.items())
        figure = f"{self._sweep.metric} {number(outcome.metric(self._sweep.metric))}"
        figure = str(outcome.error) if outcome.status == "failed" else figure
        self._say(f"{planned.id} {outcome.status:<9} {planned.preset}  {values}  {figure}  ({self._summary()})")

    on_trial_error = on_trial_complete

    # -- what the user sees

    def _reached(self) -> float:
        """The sum over trials of their progress in percent. A trial that ended counts 100."""
        return sum(r.get("progress", 0.0) if i in self._running else 100.0 for i, r in self._last.items())

    def _update(self) -> None:
        self.bar.update(self._task, completed=self._reached(), description=self._summary())

    def _summary(self) -> str:
        values = [r.get(self._sweep.metric, math.nan) for r in self._last.values()]
        best = max(filter(math.isfinite, values), key=lambda value: self._sweep.sign * value, default=None)
        done = len(self._last.keys() - self._running)
        rest = f", {self._budget}"
        of = ""
        if self._budget is None:
            now, of = time.monotonic(), f" of {self._total}"
            waiting = max(0, self._total - len(self._last.keys() | self._running.keys()))
            rest = time_left(self._costs, [now - began for began in self._running.values()], waiting, self._slots)
        return f"{done}{of} trials, {len(self._running)} running, best {number(best)}{rest}"

    def _say(self, line: str) -> None:
        self._last_line = time.monotonic()
        self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
