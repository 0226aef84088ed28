"""Fresh seeds for the leading trials: which runs are still needed, and what can then be told apart.

A trial that leads a search led with one seed, and was chosen for it. So the leaders are trained again, all with the
same fresh seeds, one seed after the other, and only those that are still in question. Two trials are told apart by
Student's 95 % interval of their paired differences; it is not corrected for looking after every seed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .plan import Sweep
from .results import Row, Selection, number, results, select

LEADING = 5  # most trials that are trained again
PLACES = 1000  # trial N with fresh seed S is trial N · PLACES + S of the confirmation
MOST_SEEDS = 100
Losses = Mapping[str, Sequence[float]]  # trial id → values with fresh seeds 1, 2, …; smaller is better, inf: it failed


# -- which runs are needed: pure functions


def next_runs(searched: Sequence[tuple[str, float]], found: Losses, most: int) -> list[tuple[str, int]]:
    """(trial id, fresh seed) of what is to be trained next; none once the leader stands alone or has ``most`` seeds.

    Args:
        searched: (trial id, loss in the search), best first.
    """
    leaders = leading(searched, found)
    first = [(name, seed) for name in leaders for seed in range(len(found.get(name, ())) + 1, 3)]
    if first:
        return first
    still = undecided({name: found[name] for name in leaders})
    seeds = [len(found[name]) for name in still]
    if len(still) < 2 or min(seeds) >= most:
        return []
    upto = max(seeds) if min(seeds) < max(seeds) else max(seeds) + 1
    return [(name, seed) for name in still for seed in range(len(found[name]) + 1, upto + 1)]


def leading(searched: Sequence[tuple[str, float]], found: Losses) -> list[str]:
    """The trials in question: the first two, and those that seeds alone could have put behind the first.

    The spread over seeds is that of the trials trained again so far; two standard deviations of a difference count.
    """
    lines = [found[name] for name, _ in searched if len(found.get(name, ())) > 1]
    finite = [line for line in lines if all(map(math.isfinite, line))]
    margin = 2 * math.sqrt(2 * statistics.mean(map(statistics.variance, finite))) if finite else 0.0
    near = [name for name, loss in searched[:LEADING] if loss <= searched[0][1] + margin]
    wanted = {*near, *(name for name, _ in searched[:2]), *found}
    return [name for name, _ in searched if name in wanted]


def undecided(found: Losses) -> list[str]:
    """The leader by its mean, and those that cannot be told from it; best mean first."""
    order = sorted(found, key=lambda name: statistics.mean(found[name]))
    if not math.isfinite(statistics.mean(found[order[0]])):
        return order
    return [name for name in order if name == order[0] or behind(found[name], found[order[0]])[0] <= 0]


def choose(found: Losses, sizes: Mapping[str, int]) -> str:
    """The smallest code of those that cannot be told from the leader; of one size, the best mean."""
    still = undecided(found)
    return min(still, key=lambda name: (sizes[name], still.index(name)))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean; of values that are not all finite, it is infinitely far."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.inf
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def behind(losses: Sequence[float], leader: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of by how much a trial is worse than the leader, over the seeds that both have."""
    return interval([own - its for own, its in zip(losses, leader, strict=False)])


# -- of a sweep


def confirmation(sweep: Sweep) -> Sweep:
    """The sweep in which leading trials are trained again, with a folder of its own and no scheduler."""
    fixed = {"scheduler": "none", "search": "random", "num_trials": 0, "budget": None}  # it searches nothing
    settings = sweep.settings.model_copy(update=fixed)
    path, name = sweep.path / "confirm", f"{sweep.name}-confirm"
    return dataclasses.replace(sweep, path=path, name=name, settings=settings, key=f"{sweep.key}c")


def contenders(rows: list[Row], selection: Selection, sweep: Sweep) -> list[Row]:
    """The finished trials that a selection chooses from, the one that it chose first."""
    winner = select(rows, selection, sweep)
    if winner is None:
        return []
    good = [row for row in rows if row.outcome.status == "finished" and math.isfinite(row.value)]
    if selection.kind == "best-under":
        good = [row for row in good if row.size <= selection.number]
    elif selection.kind == "smallest-within":
        good = [row for row in good if row.size == winner.size]
    return good


def again(sweep: Sweep) -> dict[str, list[float]]:
    """The losses with fresh seeds of trials that were trained again, by the trials' ids."""
    made = confirmation(sweep)
    found: dict[str, dict[int, float]] = {}
    for row in results(made):
        if row.outcome.status in ("finished", "failed"):
            trial, seed = divmod(row.trial.number, PLACES)
            good = row.outcome.status == "finished" and math.isfinite(row.value)
            found.setdefault(f"{sweep.key}-{trial:04d}", {})[seed] = -sweep.sign * row.value if good else math.inf
    # Only an unbroken line of seeds counts: a run that is still to be done would shift the pairs.
    lines = {name: [seeds[s] for s in range(1, len(seeds) + 1) if s in seeds] for name, seeds in found.items()}
    return {name: line for name, line in lines.items() if len(line) == len(found[name])}


def plan_runs(sweep: Sweep, rows: list[Row], most: int) -> Sweep | None:
    """Plans the next runs with fresh seeds for contenders, best first; None where no more are needed."""
    found = again(sweep)
    searched = [(row.trial.id, -sweep.sign * row.value) for row in rows]
    known = {row.trial.id for row in rows}
    todo = next_runs(searched, {name: each for name, each in found.items() if name in known}, most) if rows else []
    made, trials = confirmation(sweep), {row.trial.id: row.trial for row in rows}
    for name, seed in todo:
        trial, place = trials[name], trials[name].number * PLACES + seed
        if not (made.trial_dir(f"{made.key}-{place:04d}") / "trial.json").exists():
            fresh = (sweep.answer(trial).seed + seed) % 2**63
            made.new_trial(place, trial.preset, {**trial.values, "seed": fresh})
    if not todo:
        return None
    made.write()
    return made


@dataclass(frozen=True)
class Standing:
    """A trial over its fresh seeds, in the metric's own unit."""

    seeds: int
    mean: float
    low: float  # the 95 % interval of the mean
    high: float
    behind: tuple[float, float] | None  # the 95 % interval of by how much it is worse than the leader; the leader: None

    def cells(self) -> dict[str, float | int | None]:
        """Its columns in trials.csv."""
        low, high = self.behind or (None, None)
        interval = {"confirm.mean": self.mean, "confirm.low": self.low, "confirm.high": self.high}
        return {"confirm.seeds": self.seeds, **interval, "behind.low": low, "behind.high": high}


@dataclass(frozen=True)
class Verdict:
    """What fresh seeds say: the trial to choose, a sentence, and the standing of each trial that was trained again."""

    row: Row
    sentence: str
    standings: dict[str, Standing]


def verdict(sweep: Sweep, rows: list[Row]) -> Verdict | None:
    """What the fresh seeds of contenders say; None where the one that leads the search has none yet."""
    found, by_id = again(sweep), {row.trial.id: row for row in rows}
    found = {name: each for name, each in found.items() if name in by_id and len(each) > 1}
    if not rows or rows[0].trial.id not in found:
        return None
    still, sign = undecided(found), -sweep.sign
    leader, order = still[0], sorted(found, key=lambda name: (statistics.mean(found[name]), name != still[0]))
    standings = {}
    for name in order:
        low, high = sorted(sign * bound for bound in interval(found[name]))
        gap = None if name == leader else behind(found[name], found[leader])
        standings[name] = Standing(len(found[name]), sign * statistics.mean(found[name]), low, high, gap)
    if len(order) == 1:
        said = f"{leader} is the only one to choose from; {len(found[leader])} fresh seeds say how it varies"
        return Verdict(by_id[leader], said, standings)
    if len(still) == 1:
        low, high = behind(found[order[1]], found[leader])
        common = min(len(found[leader]), len(found[order[1]]))
        said = f"{order[1]} is worse by {number(low)} to {number(high)}" if math.isfinite(low) else f"{order[1]} failed"
        return Verdict(by_id[leader], f"{leader} leads with {common} fresh seeds, too: {said}", standings)
    chosen = choose(found, {name: by_id[name].size for name in found})
    others = " and ".join(still[1:]) if len(still) < 4 else f"{', '.join(still[1:-1])} and {still[-1]}"
    sizes = {by_id[name].size for name in still}
    way = f"the smaller code is chosen, {chosen} with {by_id[chosen].size} numbers"
    way = way if len(sizes) > 1 else "their codes are of one size, and the better mean is chosen"
    common = min(len(found[name]) for name in still)
    said = f"{leader} is not distinguishable from {others} with {common} fresh seeds; {way}"
    return Verdict(by_id[chosen], said, standings)


def chosen(sweep: Sweep, rows: list[Row], selection: Selection) -> tuple[Row | None, Verdict | None]:
    """The answer of a sweep, and what fresh seeds say of it, where there are any."""
    found = verdict(sweep, contenders(rows, selection, sweep))
    return (found.row, found) if found else (select(rows, selection, sweep), None)
