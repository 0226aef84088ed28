"""Fresh seeds for the leading trials: which runs are still needed, and which trials can then be told apart.

The leader of a search was chosen by its result with one seed. So the leaders are trained again, all with the same
fresh seeds, one seed after the other, as long as they are in question. Two trials are told apart by Student's 95 %
interval of their paired differences; it is not corrected for testing after every seed.
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


def next_runs(searched: Sequence[tuple[str, float]], fresh: Losses, most: int) -> list[tuple[str, int]]:
    """(trial id, fresh seed) of the next runs; none once the leader stands alone or has ``most`` seeds.

    Args:
        searched: (trial id, loss in the search), best first.
    """
    leaders = leading(searched, fresh)
    first = [(name, seed) for name in leaders for seed in range(len(fresh.get(name, ())) + 1, 3)]
    if first:
        return first
    candidates = undecided({name: fresh[name] for name in leaders})
    seeds = [len(fresh[name]) for name in candidates]
    if len(candidates) < 2 or min(seeds) >= most:
        return []
    last = max(seeds) if min(seeds) < max(seeds) else max(seeds) + 1
    return [(name, seed) for name in candidates for seed in range(len(fresh[name]) + 1, last + 1)]


def leading(searched: Sequence[tuple[str, float]], fresh: Losses) -> list[str]:
    """The trials in question: the first two, and those that may be behind the first by the choice of seeds alone.

    The spread over seeds is estimated from the trials trained again so far; the margin is two standard deviations of a
    difference.
    """
    losses = [fresh[name] for name, _ in searched if len(fresh.get(name, ())) > 1]
    finite = [values for values in losses if all(map(math.isfinite, values))]
    margin = 2 * math.sqrt(2 * statistics.mean(map(statistics.variance, finite))) if finite else 0.0
    close = [name for name, loss in searched[:LEADING] if loss <= searched[0][1] + margin]
    names = {*close, *(name for name, _ in searched[:2]), *fresh}
    return [name for name, _ in searched if name in names]


def undecided(fresh: Losses) -> list[str]:
    """The leader by mean, and the trials that cannot be told from it; best mean first."""
    order = sorted(fresh, key=lambda name: statistics.mean(fresh[name]))
    if not math.isfinite(statistics.mean(fresh[order[0]])):
        return order
    return [name for name in order if name == order[0] or behind(fresh[name], fresh[order[0]])[0] <= 0]


def choose(fresh: Losses, sizes: Mapping[str, int]) -> str:
    """The trial with the smallest code among those that cannot be told from the leader; then the best mean."""
    candidates = undecided(fresh)
    return min(candidates, key=lambda name: (sizes[name], candidates.index(name)))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean; infinite unless all values are finite."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.inf
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def behind(losses: Sequence[float], leader: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of how much worse a trial is than the leader, over the seeds that both have."""
    return interval([loss - best for loss, best in zip(losses, leader, strict=False)])


# -- confirming a sweep


def confirmation(sweep: Sweep) -> Sweep:
    """The sweep that trains leading trials again, with its own folder and no scheduler."""
    fixed = {"scheduler": "none", "search": "random", "num_trials": 0, "budget": None}  # it searches nothing
    settings = sweep.settings.model_copy(update=fixed)
    path, name = sweep.path / "confirm", f"{sweep.name}-confirm"
    return dataclasses.replace(sweep, path=path, name=name, settings=settings, key=f"{sweep.key}c")


def contenders(rows: list[Row], selection: Selection, sweep: Sweep) -> list[Row]:
    """The finished trials that a selection chooses from; the selected one comes first."""
    winner = select(rows, selection, sweep)
    if winner is None:
        return []
    good = [row for row in rows if row.outcome.status == "finished" and math.isfinite(row.value)]
    if selection.kind == "best-under":
        good = [row for row in good if row.size <= selection.number]
    elif selection.kind == "smallest-within":
        good = [row for row in good if row.size == winner.size]
    return good


def fresh_losses(sweep: Sweep) -> dict[str, list[float]]:
    """The losses with fresh seeds of trials that were trained again, by trial id."""
    by_seed: dict[str, dict[int, float]] = {}
    for row in results(confirmation(sweep)):
        if row.outcome.status in ("finished", "failed"):
            trial, seed = divmod(row.trial.number, PLACES)
            good = row.outcome.status == "finished" and math.isfinite(row.value)
            by_seed.setdefault(f"{sweep.key}-{trial:04d}", {})[seed] = -sweep.sign * row.value if good else math.inf
    # Only seeds without a gap count: a run that is still to be done would shift the pairs.
    losses = {name: [seeds[s] for s in range(1, len(seeds) + 1) if s in seeds] for name, seeds in by_seed.items()}
    return {name: values for name, values in losses.items() if len(values) == len(by_seed[name])}


def plan_runs(sweep: Sweep, rows: list[Row], most: int) -> Sweep | None:
    """Plans the next runs with fresh seeds for contenders, best first; None if no more are needed."""
    trials = {row.trial.id: row.trial for row in rows}
    fresh = {name: losses for name, losses in fresh_losses(sweep).items() if name in trials}
    searched = [(row.trial.id, -sweep.sign * row.value) for row in rows]
    todo = next_runs(searched, fresh, most) if rows else []
    rerun = confirmation(sweep)
    for name, seed in todo:
        trial, number = trials[name], trials[name].number * PLACES + seed
        if not (rerun.trial_dir(f"{rerun.key}-{number:04d}") / "trial.json").exists():
            run_seed = (sweep.answer(trial).seed + seed) % 2**63
            rerun.new_trial(number, trial.preset, {**trial.values, "seed": run_seed})
    if not todo:
        return None
    rerun.write()
    return rerun


@dataclass(frozen=True)
class Standing:
    """The results of a trial over its fresh seeds, in the unit of the metric."""

    seeds: int
    mean: float
    low: float  # the 95 % interval of the mean
    high: float
    behind: tuple[float, float] | None  # 95 % interval of how much worse it is than the leader; None for the leader

    def cells(self) -> dict[str, float | int | None]:
        """Its columns in trials.csv."""
        low, high = self.behind or (None, None)
        interval = {"confirm.mean": self.mean, "confirm.low": self.low, "confirm.high": self.high}
        return {"confirm.seeds": self.seeds, **interval, "behind.low": low, "behind.high": high}


@dataclass(frozen=True)
class Verdict:
    """The result of fresh seeds: the trial to choose, a sentence, and the standing of each trial trained again."""

    row: Row
    sentence: str
    standings: dict[str, Standing]


def verdict(sweep: Sweep, rows: list[Row]) -> Verdict | None:
    """The verdict of the contenders' fresh seeds; None if the leader of the search has none yet."""
    by_id = {row.trial.id: row for row in rows}
    fresh = {name: losses for name, losses in fresh_losses(sweep).items() if name in by_id and len(losses) > 1}
    if not rows or rows[0].trial.id not in fresh:
        return None
    candidates, sign = undecided(fresh), -sweep.sign
    leader, order = candidates[0], sorted(fresh, key=lambda name: (statistics.mean(fresh[name]), name != candidates[0]))
    standings = {}
    for name in order:
        low, high = sorted(sign * bound for bound in interval(fresh[name]))
        gap = None if name == leader else behind(fresh[name], fresh[leader])
        standings[name] = Standing(len(fresh[name]), sign * statistics.mean(fresh[name]), low, high, gap)
    if len(order) == 1:
        sentence = f"{leader} is the only one to choose from; {len(fresh[leader])} fresh seeds show its spread"
        return Verdict(by_id[leader], sentence, standings)
    if len(candidates) == 1:
        low, high = behind(fresh[order[1]], fresh[leader])
        common = min(len(fresh[leader]), len(fresh[order[1]]))
        sentence = (
            f"{order[1]} is worse by {number(low)} to {number(high)}" if math.isfinite(low) else f"{order[1]} failed"
        )
        return Verdict(by_id[leader], f"{leader} also leads with {common} fresh seeds: {sentence}", standings)
    chosen = choose(fresh, {name: by_id[name].size for name in fresh})
    others = (
        " and ".join(candidates[1:]) if len(candidates) < 4 else f"{', '.join(candidates[1:-1])} and {candidates[-1]}"
    )
    sizes = {by_id[name].size for name in candidates}
    way = f"the smaller code is chosen, {chosen} with {by_id[chosen].size} numbers"
    way = way if len(sizes) > 1 else "their codes have the same size, and the better mean is chosen"
    common = min(len(fresh[name]) for name in candidates)
    sentence = f"{leader} is not distinguishable from {others} with {common} fresh seeds; {way}"
    return Verdict(by_id[chosen], sentence, standings)


def choose_answer(sweep: Sweep, rows: list[Row], selection: Selection) -> tuple[Row | None, Verdict | None]:
    """The answer of a sweep, and the verdict of fresh seeds, if there are any."""
    confirmed = verdict(sweep, contenders(rows, selection, sweep))
    return (confirmed.row, confirmed) if confirmed else (select(rows, selection, sweep), None)
