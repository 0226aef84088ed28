"""Time: an estimate of the time left, and a budget of minutes for a sweep. Pure functions but for a given clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

RECENT = 8  # ended trials that an estimate uses: a machine's speed changes
RUNGS = (100.0, 100 / 3, 100 / 9, 100 / 27)  # percent of a trial at which ASHA may first stop it; the gentlest first
ENOUGH = 16  # trials to make room for, if the user asks for no number
SHARE, LEAST, MOST = 0.04, 20.0, 40.0  # time to end and report: share of the budget, and its bounds in seconds
BETWEEN = 15.0  # seconds from the end of a search to the first run with a fresh seed


def time_left(costs: Sequence[float], running: Sequence[float], waiting: int, slots: int) -> str:
    """A range for the time left, from the second ended trial on; "" before that, and if it is below 10 s.

    Args:
        costs: seconds of each trial that ended, the oldest first.
        running: seconds for which each running trial has run.
        waiting: trials that have not begun.
        slots: trials that run at once.
    """
    low, high = bounds(costs, running, waiting, slots)
    if not 10 < high < math.inf:
        return ""
    unit, name = (1, "s") if high < 100 else (60, "min") if high < 6000 else (3600, "h")
    digits = 1 if name == "h" else 0
    first, last = f"{low / unit:.{digits}f}", f"{high / unit:.{digits}f}"
    return f", {first} to {last} {name} left" if first != last else f", about {last} {name} left"


def bounds(costs: Sequence[float], running: Sequence[float], waiting: int, slots: int) -> tuple[float, float]:
    """(least, most) seconds left, by mean and spread of the recent costs; (0, inf) with fewer than two costs."""
    if len(costs) < 2:
        return 0.0, math.inf
    recent = costs[-RECENT:]
    mean, spread = statistics.mean(recent), statistics.stdev(recent)
    rest = [max(mean - spent, 0.1 * mean) for spent in running]
    at_once = max(1, min(slots, waiting + len(running)))
    # The last trials do not fill all slots: on average, half a trial more than the work divided by the slots.
    middle = max((waiting * mean + sum(rest)) / at_once + (0.5 * mean if waiting else 0), max(rest, default=0.0))
    count = waiting + len(running)
    half = 2 * spread * math.sqrt(count + count**2 / len(recent)) / at_once + 0.5 * mean * bool(count)
    return max(0.0, middle - half), middle + half


@dataclass
class Budget:
    """Minutes in which a sweep ends with an answer, including its start and its report.

    Trials begin as long as they can reach ASHA's first rung. That rung is as late as possible while the wanted number
    of trials still fits, at the pace of the latest ones. Trials that still run at the end are cut off, and can be
    resumed.
    """

    minutes: float
    begun: float
    slots: int = 1
    wanted: int = 0  # trials; 0: as many as there is time for
    held: int = 0  # whole runs after the trials, for which up to half of the time is reserved
    clock: Callable[[], float] = time.monotonic
    _started: dict[str, float] = field(default_factory=dict)
    _first: dict[str, tuple[float, float]] = field(default_factory=dict)  # time and percent of the first report
    _took: dict[str, float] = field(default_factory=dict)  # seconds of a whole trial, estimated by its last report

    @property
    def deadline(self) -> float:
        """When training must stop."""
        seconds = 60 * self.minutes
        reserved = (self.pace() or 0.0) * math.ceil(self.held / self.slots) + (BETWEEN if self.held else 0.0)
        return self.begun + seconds - min(MOST, max(LEAST, SHARE * seconds)) - min(reserved, seconds / 2)

    def started(self, trial: str) -> None:
        """A trial began."""
        self._started[trial] = self.clock()
        self._first.pop(trial, None)  # for a trial that continues after losing its process

    def reported(self, trial: str, progress: float) -> None:
        """A trial has reached ``progress`` percent of its steps."""
        if progress > 0 and trial in self._started:
            # The time to the first report includes the trial's start, which does not belong to the pace.
            now, begun = self.clock(), self._started[trial]
            at, done = self._first.setdefault(trial, (now, progress))
            if progress == done < 100 and self._took:
                return  # the pace of other trials is a better estimate
            self._took.pop(trial, None)  # keeps the latest at the end
            rate = (now - at) / (progress - done) if progress > done else (now - begun) / progress
            self._took[trial] = at - begun + (100 - done) * rate

    def pace(self) -> float | None:
        """Seconds that a whole trial takes at present; None before the first report."""
        latest = list(self._took.values())[-max(2, self.slots) :]
        return statistics.mean(latest) if latest else None

    def rung(self) -> float:
        """Percent of a trial before which ASHA stops no trial."""
        pace = self.pace()
        if pace is None:
            return RUNGS[0]
        whole = self.slots * (self.deadline - self.begun) / pace  # trials that would fit if none were stopped
        for index, rung in enumerate(RUNGS):
            # A third of the trials goes on from each rung to the next, three times as far. That costs 2/3 of the first
            # rung for each further rung.
            if whole >= (self.wanted or ENOUGH) * rung / 100 * (1 + 2 / 3 * index):
                return rung
        return RUNGS[-1]

    def may_begin(self) -> bool:
        """Whether another trial can come far enough to be compared."""
        return self.clock() + (self.pace() or 0.0) * min(self.rung(), RUNGS[1]) / 100 < self.deadline

    def is_over(self) -> bool:
        """Whether training must stop now."""
        return self.clock() >= self.deadline

    def fits(self, runs: int) -> bool:
        """Whether this many more whole runs end in time."""
        return self.clock() + (self.pace() or 0.0) * math.ceil(runs / self.slots) < self.deadline

    def __str__(self) -> str:
        return f"{(self.clock() - self.begun) / 60:.1f} of {self.minutes:g} min"
