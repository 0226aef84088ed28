"""The answer of a sweep: trials.csv, best.json and report.html, which is one self-contained page."""

from __future__ import annotations

import base64
import io
import math
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dist_ae import PRESETS, Config
from dist_ae.sweeping import Linear, say, write_atomically

from .answer import Answer
from .confirm import Standing, choose_answer
from .insight import LEAST, ends, importance
from .plan import Sweep
from .results import Row, Selection, front, number, results, select, table, write_best, write_table
from .spaces import METRICS

SHOWN = 30  # rows of the ranking on the page; trials.csv has all
EXACT = 1e-12  # a squared error per pixel up to which only rounding is left
COLORS = {  # by a preset's first word
    "ae": "#1f6fb4", "denoising": "#2f8f5b", "dropout": "#8a5bb5", "vae": "#d1602c", "conv": "#b08900",
    "table": "#1f6fb4",
}  # fmt: skip
ACCENT, PCA = "#111827", "#6b7280"
LOOK: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 11,
    "axes.labelcolor": "#4b5563",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "lines.markeredgewidth": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.1,
    "legend.columnspacing": 1,
    "legend.borderaxespad": 0.2,
    "savefig.dpi": 180,
}


def write_report(sweep: Sweep, selection: Selection) -> Answer | None:
    """Writes the three files, prints their paths, and returns their content; None if no trial finished."""
    rows = results(sweep)
    winner, confirmed = choose_answer(sweep, rows, selection)
    standings = confirmed.standings if confirmed else {}
    if confirmed:
        order = list(standings)
        rows = sorted(rows, key=lambda row: order.index(row.trial.id) if row.trial.id in standings else len(order))
    linear = linear_codes(sweep, rows)
    cells, pca = table(sweep, rows, standings), linear.errors(denoises(sweep)) if linear else {}
    write_table(sweep, cells)
    if winner is None and any(row.outcome.status == "finished" for row in rows):
        say(f"--select {selection}: no finished trial has a code that small; the best of all is the answer")
        winner = select(rows, Selection("best"), sweep)
    cut_off = (
        "" if winner else "WARNING: no trial finished in time. The answer is the best of the trials that were cut off; "
    )
    if winner is None and sweep.settings.budget is not None:
        winner = next((row for row in rows if math.isfinite(row.value) and row.outcome.status != "failed"), None)
        cut_off += f"dist-ae sweep --resume {sweep.name} --storage {sweep.path.parent} continues it"
    statuses = [row.outcome.status for row in rows]
    importances = importance(sweep, rows)
    sentences, answer = [], {}
    if winner is not None:
        first = headline(sweep, selection, winner, pca)
        sentences = [line for line in (cut_off, first, confirmed.sentence if confirmed else "") if line]
        sentences += map(str, ends(sweep, winner, importances))
        answer = _answer(sweep, winner, standings.get(winner.trial.id))
    with matplotlib.rc_context(LOOK):
        drawn = [(heading, note, as_uri(figure)) for heading, note, figure in charts(sweep, rows, winner, pca)]
    pictures, ranking = pictures_of(sweep, winner, linear) if winner else [], _ranking(sweep, cells)
    write_page(
        sweep.path / "report.html",
        "report.html.jinja",
        sweep=sweep,
        judged_by=METRICS[sweep.metric][1],
        counts=", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)),
        steps=sum(row["steps"] for row in cells),
        seconds=sum(row["seconds"] for row in cells),
        said=sentences,
        answer=answer,
        charts=drawn,
        pictures=pictures,
        importance=importances,
        no_importance=no_importance(rows),
        ranking=ranking,
        num_trials=len(rows),
    )
    if winner is None:
        return None
    write_best(sweep, winner)
    for line in sentences:
        say(line)
    say(", ".join(f"{name} {value}" for name, value in answer.items()))
    shares = "; ".join(map(str, importances))
    say(f"importance for the ranking, 95 % intervals: {shares}" if importances else no_importance(rows))
    command = f"dist-ae train --config {shlex.quote(str(sweep.path / 'best.json'))} trains it again"
    say(f"{sweep.path}/report.html, trials.csv, best.json ({command})")
    on_front = {row.trial.id for row in front(rows, errors(sweep, rows))}
    return Answer(
        path=sweep.path,
        best=sweep.answer(winner.trial),
        run_dir=sweep.run_dir(winner.trial),
        sentences=sentences,
        trials=cells,
        front=sorted((row for row in cells if row["trial"] in on_front), key=lambda row: int(row["model.latent_dim"])),
        importance=importances,
        ranking=ranking,
        pictures=[*((note, image) for _, note, image in drawn[:1]), *pictures],
    )


def write_page(path: Path, template: str, **parts: Any) -> None:
    """Writes a self-contained HTML page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_atomically(path, environment.get_template(template).render(**parts).encode())


def no_importance(rows: Sequence[Row]) -> str:
    """Why no importance is given."""
    count = sum(row.outcome.status == "finished" for row in rows)
    if count >= LEAST:
        return "Importance: all finished trials have the same settings or the same result."
    return (
        f"Importance: {count} finished trials are too few to tell settings that matter from chance ({LEAST} at least)."
    )


# -- PCA


def errors(sweep: Sweep, rows: Sequence[Row], status: str = "finished") -> dict[str, float]:
    """Each finished trial's squared error per pixel, by trial id.

    It is the error of denoised images if the sweep is about denoising, else of clean images.
    """
    by_trial = {}
    for row in rows:
        value = row.outcome.metric("val.denoised_psnr" if denoises(sweep) else "val.mse")
        if row.outcome.status == status and value is not None and math.isfinite(value):
            by_trial[row.trial.id] = 10 ** (-value / 10) if denoises(sweep) else value
    return by_trial


def denoises(sweep: Sweep) -> bool:
    """Whether a sweep is about denoised images."""
    return sweep.metric == "val.denoised_psnr"


def linear_codes(sweep: Sweep, rows: Sequence[Row]) -> Linear | None:
    """The linear codes of the searched sizes."""
    base = PRESETS[next(iter(sweep.space.parts))].override(sweep.overrides)
    configs = [sweep.answer(row.trial) for row in rows if row.outcome.reports]
    return Linear(base, configs) if configs else None


def linear_name(config: Config) -> str:
    """The name of the linear codes that a model is compared with."""
    return "PCA" if config.model.architecture == "mlp" or config.model.code == "vector" else "PCA of patches"


def headline(sweep: Sweep, selection: Selection, winner: Row, pca: dict[int, float], prefix: str = "") -> str:
    """Compares the answer with PCA of the same code size, in one line; a WARNING if it is worse."""
    config = sweep.answer(winner.trial)
    figure = f"{sweep.metric} {number(winner.value)}"
    text = f"{prefix}{selection}: {winner.trial.preset} with a code of {winner.size}, {figure}"
    error, linear = errors(sweep, [winner], winner.outcome.status).get(winner.trial.id), pca.get(winner.size)
    if error is None or linear is None:
        return text
    name = linear_name(config)
    what = "squared error" if winner.outcome.metric("val.r2") is None else "unexplained share of variance"
    if linear <= EXACT:
        return f"{text}. {name} with as many numbers is exact: a code of this size saves nothing"
    both = f"{what} {number(error)} beside {number(linear)}"
    change = error / linear - 1
    if change > 0.005:
        ways_out = "train longer (--train.epochs), widen the search, or use PCA"
        return f"WARNING: {text}. It is {change:.0%} WORSE than {name} with as many numbers: {both}; {ways_out}"
    better = "no better than" if change > -0.005 else f"{-change:.0%} better than"
    return f"{text}. It is {better} {name} with as many numbers: {both}"


# -- page


def _answer(sweep: Sweep, winner: Row, standing: Standing | None) -> dict[str, str]:
    facts = {"trial": winner.trial.id, "preset": winner.trial.preset}
    facts |= {key: number(value) for key, value in winner.trial.values.items()}
    facts[sweep.metric] = number(winner.value)
    if standing is not None:
        bounds = f"{number(standing.low)} to {number(standing.high)}"
        facts[f"{standing.seeds} fresh seeds"] = f"mean {number(standing.mean)}, 95 % interval {bounds}"
    if winner.trial.donors:
        where = f"best.json has the last values, the weights are in trials/{winner.trial.id}"
        facts["trained by"] = f"{len(winner.trial.donors)} clonings; {where}"
    return facts


def pictures_of(sweep: Sweep, winner: Row, linear: Linear | None) -> list[tuple[str, str]]:
    """(caption, data URI): the answer compared with PCA, and samples of a variational model."""
    run_dir = sweep.run_dir(winner.trial)
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "beside.png"
        images = winner.outcome.metric("val.r2") is None
        caption = "Validation images, their reconstructions by the answer, and by PCA with a code of the same size."
        caption = caption if images else "r2 of each column: of the answer, and of PCA with a code of the same size."
        pictures = []
        if linear is not None and linear.picture(run_dir, denoises(sweep), beside):
            pictures.append((caption, _uri(beside.read_bytes())))
    samples = run_dir / "figures" / "samples.png"
    if samples.is_file():
        pictures.append(("New images, decoded from z ~ N(0, I).", _uri(samples.read_bytes())))
    return pictures


def _ranking(sweep: Sweep, cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The first rows of the table, with the most important columns, in readable form."""
    cells = [dict(row) for row in cells[:SHOWN]]
    filled = {name for row in cells for name, value in row.items() if value not in (None, "")}
    metrics = [name for name in dict.fromkeys([sweep.metric, *METRICS, "val.rate"]) if name in filled]
    names = ["rank", "trial", "status", "preset", *sweep.space.searched(), *metrics, "steps", "seconds"]
    if "confirm.seeds" in filled:
        for row in cells:
            row["seeds"] = row["confirm.seeds"]
            row["mean, 95 %"] = _interval(row, "confirm")
            row["behind, 95 %"] = _interval(row, "behind")
        names[4:4] = ["seeds", "mean, 95 %", "behind, 95 %"]
    names += ["error"] if "error" in filled else []
    return [{name: number(row[name])[:300] for name in names} for row in cells]


def _interval(row: dict[str, Any], name: str) -> str | None:
    low, high = row[f"{name}.low"], row[f"{name}.high"]
    return None if low is None else f"{number(low)} to {number(high)}"


# -- charts

Chart = tuple[str, str, Figure]  # heading, what the chart shows


def charts(sweep: Sweep, rows: list[Row], winner: Row | None, pca: dict[int, float]) -> list[Chart]:
    """The charts that have something to show."""
    drawn = (_front(sweep, rows, winner, pca), _curves(sweep, rows, winner), _effects(sweep, rows, winner))
    return [chart for chart in drawn if chart is not None]


def as_uri(figure: Figure) -> str:
    """A figure as a data URI with a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", pil_kwargs={"optimize": True})
    return _uri(content.getvalue())


def _front(sweep: Sweep, rows: list[Row], winner: Row | None, pca: dict[int, float]) -> Chart | None:
    error = errors(sweep, rows)
    shown = [row for row in rows if row.trial.id in error]
    if not shown:
        return None
    best = front(rows, error)
    figure, axes, pca = size_axes({"PCA": pca}, min(error.values()))
    axes.plot(*line_of(best, error), color=ACCENT, linewidth=1.8, label="Pareto front")
    for row in shown:
        size, alpha = (7, 1) if row in best else (5, 0.45)
        look = {**_look(row, None), "markersize": size, "alpha": alpha}
        axes.plot(row.size, error[row.trial.id], "o", **look)
        if row is winner:
            ring: Any = {"color": ACCENT, "markersize": 13, "fillstyle": "none", "markeredgewidth": 1}
            axes.plot(row.size, error[row.trial.id], "o", **ring)
    finish_sizes(figure)
    compared = [row for row in best if row.size in pca]
    below = [row for row in compared if error[row.trial.id] < pca[row.size]]
    note = f"{size_note(sweep)} compare trials of one size. The ring is the answer. "
    if any(row.outcome.status == "stopped" for row in rows):
        note += "Trials that were stopped early are not shown. "
    note += f"Better than PCA at {len(below)} of {len(compared)} code sizes on the front." if compared else ""
    return "Code size against error", note, figure


def size_axes(linear: dict[str, dict[int, float]], lowest: float) -> tuple[Figure, Axes, dict[int, float]]:
    """Axes of code size against error with the linear codes (by name and size), and the linear codes drawn."""
    figure, (axes,) = _axes()
    drawn: dict[int, float] = {}
    for name, by_size in linear.items():
        # PCA with as many components as pixels is exact. On a logarithmic axis, that point would flatten all others.
        shown = {size: value for size, value in sorted(by_size.items()) if value > lowest / 10}
        style: Any = {"markersize": 3.5, "linewidth": 1.2, "label": name}
        axes.plot(list(shown), list(shown.values()), "s--" if name == "PCA" else "D:", color=PCA, **style)
        drawn |= shown
    return figure, axes, drawn


def line_of(best: Sequence[Row], error: dict[str, float]) -> tuple[list[int], list[float]]:
    """Sizes and errors of a front, for a plot."""
    return [row.size for row in best], [error[row.trial.id] for row in best]


def finish_sizes(figure: Figure) -> None:
    """Labels and scales the axes of code size against error, after everything is drawn."""
    (axes,) = figure.axes
    axes.set(xlabel="code size", ylabel="squared error per pixel")
    _log(axes, "x")
    _log(axes, "y")
    _legend(figure)


def size_note(sweep: Sweep) -> str:
    """The first words of a caption of code size against error."""
    what = "denoised images" if denoises(sweep) else "reconstructions"
    return f"Error of the {what}, pixels on [0, 1]. A larger code reconstructs better, all else equal:"


def _curves(sweep: Sweep, rows: list[Row], winner: Row | None) -> Chart | None:
    curves: list[tuple[Row, list[int], list[float]]] = []
    for row in rows:
        reports = [r for r in row.outcome.reports if math.isfinite(r.get(sweep.metric, math.nan))]
        if reports:
            curves.append((row, [r["step"] for r in reports], [r[sweep.metric] for r in reports]))
    if not curves:
        return None
    figure, (axes,) = _axes()
    for row, steps, values in reversed(curves):  # the best are drawn last
        look = _look(row, winner, len(curves))
        axes.plot(steps, values, "o-", markevery=[-1], markersize=4, linewidth=2.4 if row is winner else 1.2, **look)
    axes.set(xlabel="step", ylabel=sweep.metric, xlim=(0, None))
    lowest, highest = min(min(values) for *_, values in curves), max(max(values) for *_, values in curves)
    if sweep.sign < 0 and lowest > 0:
        # One diverging trial would flatten all others.
        ceiling = 20 * sorted(values[-1] for _, _, values in curves)[len(curves) // 2]
        axes.set(ylim=(lowest * 0.95, min(ceiling, highest) * 1.05))
        _log(axes, "y")
    _legend(figure)
    return "Learning curves", f"{sweep.metric} at each evaluation: {METRICS[sweep.metric][1]}.", figure


def _effects(sweep: Sweep, rows: list[Row], winner: Row | None) -> Chart | None:
    good = [row for row in rows if math.isfinite(row.value)]
    keys = [key for key in sweep.space.searched() if len({str(row.trial.values.get(key)) for row in good}) > 1]
    if len(good) < 2 or not keys:
        return None
    columns = min(2, len(keys))
    figure, all_axes = _axes(math.ceil(len(keys) / columns), columns)
    for axes, key in zip(all_axes, keys, strict=False):
        points = [(row, row.trial.values[key]) for row in good if key in row.trial.values]
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for _, value in points)
        for row, value in reversed(points):  # the best are drawn last
            look = _look(row, winner, len(good)) | {"markersize": 9 if row is winner else 5}
            axes.plot(value if numeric else number(value), row.value, "o", **look)
        axes.set_xlabel(key.rpartition(".")[2])
        if numeric and _is_log(sweep, key, [value for _, value in points]):
            _log(axes, "x")
        if sweep.sign < 0 and min(row.value for row in good) > 0:
            _log(axes, "y")
    for axes in all_axes[len(keys) :]:
        axes.set_axis_off()
    all_axes[0].set_ylabel(sweep.metric)
    _legend(figure)
    return "Parameters and result", f"Each point is a trial: its {sweep.metric} against one of its values.", figure


def _is_log(sweep: Sweep, key: str, values: list[float]) -> bool:
    """Whether a key gets a logarithmic axis, as log ranges and choices over nearly a decade do."""
    kinds = {part[key].kind for part in sweep.space.parts.values() if key in part}
    return not kinds & {"uniform", "randint"} and min(values) > 0 and max(values) / min(values) >= 8


def _axes(rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.8, max(4.1, 2.2 * rows)), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()


def _log(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers at round values."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    round_values = LogLocator(subs=(1,) if high / low > 1000 else (1, 2, 5) if high / low < 60 else (1, 3))
    axis.set_major_locator(round_values if high / low > 6 else MaxNLocator(4))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _legend(figure: Figure) -> None:
    lines = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for line in figure.legend(lines.values(), lines, loc="outside upper left", ncols=6).get_lines():
        line.set_alpha(1)


def _look(row: Row, winner: Row | None, among: int = 1) -> dict[str, Any]:
    """The style of a trial. The answer is black; the more others there are, the fainter, so that dense regions show."""
    if row is winner:
        return {"label": "the answer", "color": ACCENT}
    color = COLORS[row.trial.preset.partition("-")[0]]
    return {"label": row.trial.preset, "color": color, "alpha": min(0.55, max(0.15, 30 / among))}


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
