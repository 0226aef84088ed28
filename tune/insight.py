"""What a sweep tells besides its winner: how much each setting matters, and whether its range was wide enough."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dist_ae import Config, InputError

from .plan import Sweep, read_object
from .results import Row, number
from .spaces import IMAGE_SHAPES, Distribution, check_sizes

LEAST = 10  # finished trials below which no importance is estimated
MOST = 500  # most trials that importance uses: more cost time and change nothing
RESAMPLES, TREES, REPEATS = 30, 25, 4
NEAR = 0.1  # share of a range that counts as its end
STEPS = (0.5, 0.25, 0.1, 0.05)  # how far the next range may go beyond the value, as shares of the old range


# -- importance


@dataclass(frozen=True)
class Importance:
    """The share of the trials' ranking that a setting decides, and its 95 % interval; all between 0 and 1."""

    key: str
    share: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether the share can be told from chance."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.key} {self.figures}"

    @property
    def figures(self) -> str:
        """Share and interval."""
        return f"{self.share:.2f} ({self.low:.2f} to {self.high:.2f}){'' if self.tells else ', which may be chance'}"


def importance(sweep: Sweep, rows: Sequence[Row], seed: int = 0) -> list[Importance]:
    """How much each searched setting matters, largest first; empty with fewer than ``LEAST`` finished trials.

    scikit-learn's random forest learns the ranks of finished trials from their settings. The permutation importance of
    a setting is the growth of the forest's squared error on unseen trials when the setting gets the value of another
    trial, as a share of twice the variance of the ranks: 1 if the setting alone decides, 0 if it does not matter. It is
    averaged over forests on ``RESAMPLES`` samples of the trials; the interval is Student's over the trials. Both are
    clipped to [0, 1], since an estimate from few trials can lie outside.

    It uses ranks, because with values a single diverged trial would decide alone. Optuna's evaluators are never
    negative and sum to one, even over settings without any effect, so they cannot show that nothing matters.
    """
    good = [row for row in rows if row.outcome.status == "finished" and math.isfinite(row.value)]
    if len(good) < LEAST:
        return []
    import numpy as np
    from scipy.stats import rankdata, t
    from sklearn.ensemble import RandomForestRegressor

    good = good if len(good) <= MOST else random.Random(seed).sample(good, MOST)
    names = (["preset"] if len(sweep.space.parts) > 1 else []) + sweep.space.searched()
    table = np.array([[_as_number(sweep, row, name) for name in names] for row in good])
    # A setting that a trial's preset does not have gets its median, which says nothing about the preset.
    table = np.where(np.isnan(table), np.nanmedian(table, 0), table)
    varies = table.min(0) < table.max(0)
    names, table = [name for name, used in zip(names, varies, strict=True) if used], table[:, varies]
    ranks = rankdata([row.value for row in good])
    if not names or ranks.var() == 0:
        return []
    rng, count = np.random.default_rng(seed), len(good)
    growth, times = np.zeros((count, len(names))), np.zeros(count)
    for resample in range(RESAMPLES):
        drawn = rng.integers(0, count, count)
        unseen = np.setdiff1d(np.arange(count), drawn)
        if not len(unseen):
            continue
        forest = RandomForestRegressor(TREES, random_state=resample, min_samples_leaf=2).fit(table[drawn], ranks[drawn])
        changed = np.tile(table[unseen], (len(names), REPEATS, 1, 1))
        for column in range(len(names)):
            changed[column, ..., column] = table[rng.integers(0, count, (REPEATS, len(unseen))), column]
        guesses = forest.predict(changed.reshape(-1, len(names))).reshape(len(names), REPEATS, -1)
        plain = (forest.predict(table[unseen]) - ranks[unseen]) ** 2
        growth[unseen] += (((guesses - ranks[unseen]) ** 2).mean(1) - plain).T
        times[unseen] += 1
    by_trial = growth[times > 0] / times[times > 0, None] / (2 * ranks.var())
    means = by_trial.mean(0)
    half = t.ppf(0.975, len(by_trial) - 1) * by_trial.std(0, ddof=1) / math.sqrt(len(by_trial))
    columns = (values.clip(0, 1).tolist() for values in (means, means - half, means + half))
    importances = [Importance(*row) for row in zip(names, *columns, strict=True)]
    return sorted(importances, key=lambda setting: -setting.share)


def _as_number(sweep: Sweep, row: Row, name: str) -> float:
    """A setting of a trial as a number; NaN if its preset lacks it. Choices that are no numbers count by position."""
    if name == "preset":
        return float(list(sweep.space.parts).index(row.trial.preset))
    value = row.trial.values.get(name, math.nan)
    if isinstance(value, (int, float)):
        return float(value)
    choice = sweep.space.parts[row.trial.preset][name].values
    return float(choice.index(list(value) if isinstance(value, tuple) else value))


# -- the ends of ranges


@dataclass(frozen=True)
class End:
    """A value of the answer that lies at an end of its searched range."""

    key: str
    value: Any
    side: str  # lower or upper
    searched: Distribution
    next: dict[str, list[Any]]  # what to search next, as in a space file
    expected: bool = False  # a larger code always reconstructs better
    unclear: bool = False  # the setting's importance cannot be told from chance

    def __str__(self) -> str:
        ((kind, values),) = self.next.items()
        shown = ", ".join(f"[{number(value)}]" if isinstance(value, list) else number(value) for value in values)
        finding = f"{self.key} {number(self.value)} of the answer lies at the {self.side} end of its searched range"
        advice = f'try "{self.key}" = {{{kind} = [{shown}]}} next'
        if self.expected:
            return (
                f"{finding}, as a code size mostly does: a larger code reconstructs better. Choose on the front, or "
                f"with --select smallest-within-3; for still larger codes, {advice}"
            )
        chance = ". Its importance cannot be told from chance" if self.unclear else ""
        return f"WARNING: {finding}: a better value may lie beyond. So {advice}{chance}"


def ends(sweep: Sweep, winner: Row, importances: Sequence[Importance] = ()) -> list[End]:
    """The settings of the answer that lie at an end of their range, or of an ordered choice of three or more values.

    An end beyond which no value is legal (a dropout of 0, a code as large as the image) does not count.
    """
    config = sweep.answer(winner.trial)
    complete = (read_object(sweep.run_dir(winner.trial) / "config.json") or {}).get("config", {})
    shape = complete.get("model", {}).get("image_shape") or IMAGE_SHAPES.get(config.data.name)
    clear = {setting.key for setting in importances if setting.tells}
    at_ends = []
    for key, d in sweep.space.parts[winner.trial.preset].items():
        beyond = _beyond(d, winner.trial.values[key], partial(_is_legal, config, shape, key))
        if beyond is not None:
            side, following = beyond
            code = key == "model.latent_dim" and side == "upper" and sweep.metric in ("val.mse", "val.denoised_psnr")
            unclear = bool(importances) and key not in clear
            at_ends.append(End(key, winner.trial.values[key], side, d, following, code, unclear))
    return at_ends


def _is_legal(config: Config, shape: tuple[int, ...] | None, key: str, value: Any) -> bool:
    try:
        check_sizes(config.override({key: value}), shape, 1, "")
    except InputError:
        return False
    return True


def _beyond(d: Distribution, value: Any, is_legal: Callable[[Any], bool]) -> tuple[str, dict[str, list[Any]]] | None:
    """(side, what to search next) of a value at an end; None if it lies inside, or if no value beyond is legal."""
    if d.kind == "choice":
        return _beyond_choice(d.values, value, is_legal)
    share = d.share(value)
    if NEAR < share < 1 - NEAR:
        return None
    upper, whole = share > 0.5, "int" in d.kind
    for step in STEPS:
        far = d.at(share + step if upper else share - step)
        near = d.clip(d.at(share - 0.5 if upper else share + 0.5))
        far, near = (far, near) if whole else (float(f"{far:.2g}"), float(f"{near:.2g}"))
        if (far > d.values[1] if upper else far < d.values[0]) and is_legal(far):
            return ("upper", {d.kind: [near, far]}) if upper else ("lower", {d.kind: [far, near]})
    return None


def _beyond_choice(
    values: list[Any], value: Any, is_legal: Callable[[Any], bool]
) -> tuple[str, dict[str, list[Any]]] | None:
    ordered = _ordered(values)
    value = list(value) if isinstance(value, tuple) else value
    if len(ordered) < 3 or value not in (ordered[0], ordered[-1]):
        return None
    upper = value == ordered[-1]
    before = ordered[-2] if upper else ordered[1]
    following, last = [], value
    for _ in range(2):
        before, last = last, _next(before, last)
        if last == before or not is_legal(last):
            break
        following.append(last)
    if not following:
        return None
    return ("upper", {"choice": [value, *following]}) if upper else ("lower", {"choice": [*following[::-1], value]})


def _ordered(values: list[Any]) -> list[Any]:
    """The distinct values of a choice in order: numbers, or lists of numbers that grow in every entry; else none."""
    as_lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) for each in as_lists for n in each)
    if not numbers or len({len(each) for each in as_lists}) != 1:
        return []
    ordered = sorted({tuple(each) for each in as_lists})
    if any(low > high for a, b in itertools.pairwise(ordered) for low, high in zip(a, b, strict=True)):
        return []
    return [list(each) if isinstance(values[0], (list, tuple)) else each[0] for each in ordered]


def _next(before: Any, last: Any) -> Any:
    """Continues a sequence of two values: by their ratio if both are positive, else by their difference."""
    if isinstance(last, list):
        return [_next(*pair) for pair in zip(before, last, strict=True)]
    value = last * last / before if before > 0 and last > 0 else 2 * last - before
    return round(value) if isinstance(before, int) and isinstance(last, int) else float(f"{value:.3g}")
