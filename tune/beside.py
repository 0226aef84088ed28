"""Compares sweeps of the same question: which is better at which size of the code, and whether that is certain."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

from dist_ae import PRESETS, Config, InputError
from dist_ae.sweeping import say

from .answer import Best, Comparison, Level, setting_rows
from .confirm import choose_answer, fresh_losses
from .plan import Settings, Sweep, read_object, read_sweep, write_json
from .report import (
    COLORS,
    LOOK,
    as_uri,
    denoises,
    errors,
    finish_sizes,
    headline,
    line_of,
    linear_codes,
    linear_name,
    pictures_of,
    size_axes,
    size_note,
    write_page,
)
from .results import Row, Selection, front, number, results
from .spaces import METRICS
from .sweep import resuming

MOST = 8  # sweeps on one page
TRAINING_ONLY = ("data.flip", "data.crops", "data.window")  # settings that change no validation image
WITHOUT_EFFECT = ("address", "max_concurrent")  # settings that do not change an answer


@dataclass(frozen=True)
class _Side:
    """One of the sweeps."""

    name: str
    sweep: Sweep
    rows: list[Row]
    winner: Row


def compare(paths: Sequence[Path], selection: Selection, page: Path) -> Comparison:
    """Writes a page and a JSON file that compare two or more sweeps, and returns their content.

    Args:
        paths: folders of sweeps, which may still be running.
        page: path of the page; the JSON file has the same name.

    Raises:
        InputError: the sweeps do not answer the same question (says what differs), or one has no answer yet.
    """
    if not 2 <= len(paths) <= MOST or len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"--compare takes 2 to {MOST} different sweeps")
    sweeps = [read_sweep(path) for path in paths]
    folder_names = [sweep.name for sweep in sweeps]
    names = folder_names if len(set(folder_names)) == len(folder_names) else [str(path) for path in paths]
    _check_question(dict(zip(names, sweeps, strict=True)))
    sides = []
    for name, sweep in zip(names, sweeps, strict=True):
        rows = results(sweep)
        winner, _ = choose_answer(sweep, rows, selection)
        if winner is None:
            raise InputError(f"--compare {name}: --select {selection} finds no finished trial to choose")
        sides.append(_Side(name, sweep, rows, winner))
    levels, differs = [*_levels(sides)], _differences(sides)
    linear = {side.name: linear_codes(side.sweep, side.rows) for side in sides}
    pca = {name: codes.errors(denoises(sweeps[0])) if codes else {} for name, codes in linear.items()}
    sentences = _sentences(levels, sides, selection)
    sentences += [headline(side.sweep, selection, side.winner, pca[side.name], f"{side.name}, ") for side in sides]
    sizes = [_size_row(level, sides) for level in levels]
    picture = _fronts(sides, pca)
    pictures = [
        (side.name, caption, image)
        for side in sides
        for caption, image in pictures_of(side.sweep, side.winner, linear[side.name])
    ]
    answers = {
        side.name: {"path": str(side.sweep.path), "trial": side.winner.trial.id, "size": side.winner.size}
        | {"value": side.winner.value, "pca": pca[side.name].get(side.winner.size), "front": _front(side)}
        for side in sides
    }
    content: dict[str, Any] = {
        "metric": sweeps[0].metric,
        "select": str(selection),
        "said": sentences,
        "sweeps": answers,
    }
    content["levels"] = [{**asdict(level), "verdict": level.verdict} for level in levels]
    try:
        write_page(
            page,
            "beside.html.jinja",
            names=names,
            metric=sweeps[0].metric,
            judged_by=METRICS[sweeps[0].metric][1],
            said=sentences,
            note=f"{size_note(sweeps[0])} compare at one size. The rings are the answers.",
            fronts=picture,
            pictures=pictures,
            sizes=sizes,
            differs=setting_rows(differs),
        )
        write_json(page.with_suffix(".json"), {**content, "differs": differs})
    except OSError as error:
        way_out = "from Python, dist_ae_tune.compare(..., page=PATH) writes elsewhere"
        raise InputError(f"{page} cannot be written: {error.strerror}; {way_out}") from None
    for line in sentences:
        say(line)
    say(f"{page}, {page.with_suffix('.json').name}")
    return Comparison(page, sentences, levels, differs, sizes, picture)


# -- one question


def _configs(sweep: Sweep) -> Iterator[Config]:
    return (PRESETS[preset].override(sweep.overrides) for preset in sweep.space.parts)


def _check_question(sweeps: dict[str, Sweep]) -> None:
    """Raises InputError unless all sweeps are judged by the same metric of the same validation images."""
    contents = {name: _fingerprints(sweep) for name, sweep in sweeps.items()}
    questions = {name: _question(sweep) for name, sweep in sweeps.items()}
    if all(contents.values()):  # the same images may lie in another place
        questions = {
            name: {**question, "data.name": None, "the content of the data": " and ".join(contents[name])}
            for name, question in questions.items()
        }
    (first_name, first), *others = questions.items()
    for name, other in others:
        for key in first | other:
            if first.get(key) != other.get(key):
                both = f"{number(first.get(key))} in {first_name} and {number(other.get(key))} in {name}"
                raise InputError(f"--compare: {key} is {both}, so they do not answer the same question")


def _question(sweep: Sweep) -> dict[str, Any]:
    """The settings that define which metric of which images a sweep is judged by."""
    question: dict[str, Any] = {"metric": sweep.metric}
    for config in _configs(sweep):
        values = config.trajectory_values()
        question |= {
            key: value for key, value in values.items() if key.startswith("data.") and key not in TRAINING_ONLY
        }
        if denoises(sweep):
            question["evaluation.noise_std"] = config.evaluation.noise_std
        if sweep.metric == "val.neg_elbo":
            question["objective.likelihood"] = config.objective.likelihood
    return question


def _fingerprints(sweep: Sweep) -> list[str]:
    """Identifies the content of the data that a sweep's trials were trained on."""
    stored = (read_object(sweep.run_dir(trial) / "config.json") or {} for trial in sweep.trials())
    return sorted({str(tree["trajectory"]["data.fingerprint"])[:12] for tree in stored if tree.get("trajectory")})


# -- which is better


def _levels(sides: Sequence[_Side]) -> Iterator[Level]:
    """The sizes at which two or more sweeps have finished trials.

    If there is no such size, as with an MLP's codes and a convolution's grids, the sizes at which some sweep's best
    with at most that many numbers changes.
    """
    fresh = {side.name: fresh_losses(side.sweep) for side in sides}
    good = {side.name: [row for row in side.rows if _is_good(row)] for side in sides}
    sweeps_by_size = Counter(size for rows in good.values() for size in {row.size for row in rows})
    common = sorted(size for size, count in sweeps_by_size.items() if count > 1)
    before: dict[str, Best] = {}
    for numbers in common or sorted(sweeps_by_size):
        best = {}
        for side in sides:
            rows = [row for row in good[side.name] if row.size == numbers or (not common and row.size < numbers)]
            row, _ = choose_answer(side.sweep, rows, Selection("best"))
            if row is not None:
                losses = tuple(fresh[side.name].get(row.trial.id, ()))
                losses = losses if len(losses) > 1 else (-side.sweep.sign * row.value,)
                value = -side.sweep.sign * statistics.mean(losses)
                best[side.name] = Best(row.trial.id, row.size, value, losses)
        if len(best) > 1 and best != before:
            order = sorted(best, key=lambda name: statistics.mean(best[name].losses))
            behind = {name: _behind(best[name], best[order[0]]) for name in order[1:]}
            yield Level(numbers, not common, {name: best[name] for name in order}, behind)
            before = best


def _is_good(row: Row) -> bool:
    return row.outcome.status == "finished" and math.isfinite(row.value)


def _behind(other: Best, leader: Best) -> tuple[float, float] | None:
    """Welch's 95 % interval of how much worse ``other`` is, over fresh seeds of both; None without such seeds."""
    if not other.seeds or not leader.seeds:
        return None
    if not all(map(math.isfinite, (*other.losses, *leader.losses))):
        return (math.inf, math.inf) if math.isfinite(sum(leader.losses)) else (-math.inf, math.inf)
    from scipy.stats import ttest_ind

    interval = ttest_ind(other.losses, leader.losses, equal_var=False).confidence_interval()
    gap = statistics.mean(other.losses) - statistics.mean(leader.losses)
    varies = math.isfinite(interval.low)  # else both have the same loss with every seed
    return (float(interval.low), float(interval.high)) if varies else (gap, gap)


def _sentences(levels: Sequence[Level], sides: Sequence[_Side], selection: Selection) -> list[str]:
    """One sentence for each group of consecutive sizes with the same verdict."""
    groups: list[list[Level]] = []
    for level in levels:
        same = groups and (groups[-1][0].leader, groups[-1][0].verdict) == (level.leader, level.verdict)
        groups[-1].append(level) if same else groups.append([level])
    sentences = []
    for group in groups:
        *others, last = [str(level.numbers) for level in group]
        sizes = f"{', '.join(others)} and {last}" if others else last
        at_most = "at most " if group[0].at_most else ""
        parts = [_verdict(name, kind, group, sides[0].sweep) for name, kind in group[0].verdict.items()]
        sentences.append(f"With {at_most}{sizes} numbers, {'; '.join(parts)}")
    lacking = {name for level in levels for name, best in level.best.items() if not best.seeds}
    if any("one seed" in level.verdict.values() for level in levels):
        commands = [resuming(side.sweep, selection, 3) for side in sides if side.name in lacking]
        way = f"fresh seeds of the answers can: {'; '.join(commands)}"
        sentences.append(f"One seed cannot tell luck from a difference; {way}")
    return sentences


def _verdict(name: str, kind: str, group: Sequence[Level], sweep: Sweep) -> str:
    """Compares the leader and another sweep over a group of sizes, in words."""
    leader, gaps = group[0].leader, []
    for level in group:
        best, other = level.best[leader].value, level.best[name].value
        gaps.append(abs(other - best) / (abs(other) or 1) if sweep.metric == "val.mse" else abs(other - best))
    shown = [f"{gap:.1%}" if sweep.metric == "val.mse" else number(gap) for gap in (min(gaps), max(gaps))]
    by = shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"
    unit = {"val.denoised_psnr": " dB", "val.neg_elbo": " nats"}.get(sweep.metric, "")
    if kind == "alike":
        seeds = min(level.best[side].seeds for level in group for side in (leader, name))
        return f"{leader} and {name} cannot be told apart with {seeds} fresh seeds"
    if kind == "worse":
        return f"{leader} is better than {name} by {by}{unit}, which fresh seeds confirm"
    if max(gaps) == 0:
        return f"{leader} and {name} are equal, with one seed"
    return f"{leader} is ahead of {name} by {by}{unit}, with one seed"


def _size_row(level: Level, sides: Sequence[_Side]) -> dict[str, str]:
    """A line of the table of sizes."""
    cells = {"at most" if level.at_most else "numbers": str(level.numbers)}
    for side in sides:
        best = level.best.get(side.name)
        if best is None:
            cells[side.name] = "–"
            continue
        notes = [f"{best.size} numbers"] if level.at_most else []
        notes += [f"{best.seeds} fresh seeds"] if best.seeds else []
        cells[side.name] = number(best.value) + (f" ({', '.join(notes)})" if notes else "")
    words = {"worse": "worse", "alike": "not distinguishable", "one seed": "behind, one seed"}
    rest = "; ".join(f"{name} {words[kind]}" for name, kind in level.verdict.items())
    return {**cells, "verdict": f"{level.leader} leads; {rest}"}


# -- what differs


def _differences(sides: Sequence[_Side]) -> dict[str, dict[str, str]]:
    """Searched ranges, fixed settings and search settings that differ between the sweeps; and the cost of each."""
    keys = [key for key, _ in Config().flat() if key not in ("name", "run_dir") and not key.startswith("tracking.")]
    differences = {"presets": {side.name: ", ".join(side.sweep.space.parts) for side in sides}}
    differences |= {key: {side.name: _setting(side.sweep, key) for side in sides} for key in keys}
    for key in Settings.model_fields:
        if key not in WITHOUT_EFFECT:
            values = {side.name: number(getattr(side.sweep.settings, key)) for side in sides}
            differences[f"--{key.replace('_', '-')}"] = values
    differences = {key: values for key, values in differences.items() if len(set(values.values())) > 1}
    for what in ("finished trials", "training steps", "seconds of trials"):
        differences[what] = {side.name: f"{_cost(side, what):,.0f}" for side in sides}
    return differences


def _setting(sweep: Sweep, key: str) -> str:
    """How a sweep treats a setting: the searched range, or the fixed value."""
    texts = {}
    for (preset, part), config in zip(sweep.space.parts.items(), _configs(sweep), strict=True):
        values = f"{part[key].kind} {number(part[key].values)}" if key in part else number(dict(config.flat())[key])
        texts[preset] = values
    same = len(set(texts.values())) == 1
    return next(iter(texts.values())) if same else "; ".join(f"{preset}: {text}" for preset, text in texts.items())


def _cost(side: _Side, what: str) -> float:
    if what == "finished trials":
        return sum(row.outcome.status == "finished" for row in side.rows)
    name = "step" if what == "training steps" else "seconds"
    return float(sum(row.outcome.reports[-1].get(name, 0) for row in side.rows if row.outcome.reports))


# -- the picture


def _front(side: _Side) -> list[dict[str, Any]]:
    """The Pareto front of a sweep: code size against squared error."""
    error = errors(side.sweep, side.rows)
    return [{"trial": row.trial.id, "size": row.size, "error": error[row.trial.id]} for row in front(side.rows, error)]


def _fronts(sides: Sequence[_Side], pca: dict[str, dict[int, float]]) -> str:
    """Draws the fronts into one chart, with the linear codes."""
    linear: dict[str, dict[int, float]] = {}
    for side in sides:
        for config in map(side.sweep.answer, (row.trial for row in side.rows)):
            linear.setdefault(linear_name(config), {}).update(pca[side.name])
    error = {side.name: errors(side.sweep, side.rows) for side in sides}
    with matplotlib.rc_context(LOOK):
        figure, axes, _ = size_axes(linear, min(min(values.values(), default=math.inf) for values in error.values()))
        for side, color in zip(sides, [*dict.fromkeys(COLORS.values()), "#0f766e", "#be185d", "#111827"], strict=False):
            by_trial = error[side.name]
            for row in side.rows:
                if row.trial.id in by_trial:
                    axes.plot(row.size, by_trial[row.trial.id], "o", color=color, markersize=5, alpha=0.35)
            axes.plot(*line_of(front(side.rows, by_trial), by_trial), "o-", color=color, linewidth=1.8, label=side.name)
            if side.winner.trial.id in by_trial:
                ring: Any = {"color": color, "markersize": 13, "fillstyle": "none", "markeredgewidth": 1}
                axes.plot(side.winner.size, by_trial[side.winner.trial.id], "o", **ring)
        finish_sizes(figure)
        return as_uri(figure)
