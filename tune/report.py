"""The answer of a sweep: trials.csv, best.json, and report.html, one page without outside parts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dist_ae.presets import PRESETS

from .plan import Sweep
from .results import Row, Selection, front, number, results, select, spread, write_best, write_table
from .spaces import METRICS

SHOWN = 30  # rows of the ranking on the page; trials.csv has all
CHUNK = 4096  # images at once
EXACT = 1e-12  # a squared error per pixel that is nothing but rounding
COLORS = {"ae": "#1f6fb4", "denoising": "#2f8f5b", "dropout": "#8a5bb5", "vae": "#d1602c"}  # by a preset's first word
ACCENT, PCA = "#111827", "#6b7280"


def write_report(sweep: Sweep, selection: Selection) -> bool:
    """Writes the three files and says where they are. False where no trial finished."""
    rows = results(sweep)
    write_table(sweep, rows)
    winner = select(rows, selection, sweep)
    if winner is None and any(row.outcome.status == "finished" for row in rows):
        print(f"--select {selection}: no finished trial has a code that small; the best of all is taken")
        winner = select(rows, Selection("best"), sweep)
    if winner is not None:
        write_best(sweep, winner)
    (sweep.path / "report.html").write_text(_page(sweep, rows, winner, selection), encoding="utf-8")
    if winner is None:
        return False
    facts = {**winner.trial.values, sweep.metric: winner.value}
    values = ", ".join(f"{key} {number(value)}" for key, value in facts.items())
    print(f"{selection}: trial {winner.trial.id}, {winner.trial.preset}, {values}")
    again = spread(sweep, winner.trial)
    if again is not None:
        print(f"{len(again[0])} further seeds: {sweep.metric} {_mean(again)}")
    best = sweep.path / "best.json"
    print(
        f"{sweep.path}/report.html, trials.csv, best.json (dist-ae train --config {best} trains it again)", flush=True
    )
    return True


def _mean(found: tuple[list[float], float, float]) -> str:
    return f"{number(found[1])} ± {number(found[2])} (mean ± standard deviation)"


# -- PCA


def errors(sweep: Sweep, rows: Sequence[Row]) -> dict[str, float]:
    """Each finished trial's squared error per pixel, by trial id.

    It is the error of denoised images where the sweep is about those, and else of clean ones.
    """
    found = {}
    for row in rows:
        value = row.outcome.metric("val.denoised_psnr" if _about_noise(sweep) else "val.mse")
        if row.outcome.status == "finished" and value is not None and math.isfinite(value):
            found[row.trial.id] = 10 ** (-value / 10) if _about_noise(sweep) else value
    return found


def _about_noise(sweep: Sweep) -> bool:
    return sweep.metric == "val.denoised_psnr"


def pca_errors(sweep: Sweep, rows: Sequence[Row]) -> dict[int, float]:
    """The same error of the best linear code, by code size: PCA, or of a grid code PCA of its patches."""
    import torch

    from dist_ae import pca
    from dist_ae.data import sources
    from dist_ae.data.reader import Reader
    from dist_ae.evaluate import fixed_noise
    from dist_ae.models import blank
    from dist_ae.processes.runtime import Alone

    if not rows:
        return {}
    config = PRESETS[next(iter(sweep.space.parts))].override(sweep.overrides)
    dataset, cpu = sources.load(config.data), torch.device("cpu")
    train, val = Reader(dataset.train, cpu), Reader(dataset.val, cpu)
    pixels, found = math.prod(dataset.image_shape), dict[int, float]()
    sides: dict[int | None, dict[int, int]] = {}  # numbers of a code by its size, by the side of its patches
    for row in (row for row in rows if row.outcome.reports):
        code = blank(sweep.answer(row.trial), dataset.image_shape).linear_code()
        if code is not None:
            sides.setdefault(code.patch, {})[row.size] = code.values
    for side, sizes in sides.items():
        most = pixels if side is None else dataset.image_shape[0] * side**2
        components = pca.principal_components(train, min(max(sizes.values()), most), side, Alone(cpu))
        squared = dict.fromkeys(sizes, 0.0)
        for start in range(0, len(val.split), CHUNK):
            span = range(start, min(start + CHUNK, len(val.split)))
            images = val.span(span)
            noise = fixed_noise(config, span, tuple(images.shape[1:]), cpu) if _about_noise(sweep) else 0
            for size, values in sizes.items():
                leading = components._replace(basis=components.basis[:values])
                decoded = pca.coded(leading, side, images + noise)[1]
                squared[size] += float((decoded - images).double().square().sum())
        for size, value in squared.items():
            found[size] = min(value / (len(val.split) * pixels), found.get(size, math.inf))
    return found


# -- page


def _page(sweep: Sweep, rows: list[Row], winner: Row | None, selection: Selection) -> str:
    """The whole report as HTML."""
    pca = pca_errors(sweep, rows)
    statuses = [row.outcome.status for row in rows]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        sweep=sweep,
        judged_by=METRICS[sweep.metric][1],
        counts=", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)),
        steps=sum(row.outcome.reports[-1]["step"] for row in rows if row.outcome.reports),
        selection=selection,
        answer=_answer(sweep, winner, pca) if winner else None,
        charts=[chart for draw in (_front, _curves, _effects) if (chart := draw(sweep, rows, winner, pca))],
        pictures=_pictures(sweep, winner) if winner else [],
        ranking=_ranking(sweep, rows, winner),
        num_trials=len(rows),
    )


def _answer(sweep: Sweep, winner: Row, pca: dict[int, float]) -> dict[str, str]:
    facts = {"trial": winner.trial.id, "preset": winner.trial.preset}
    facts |= {key: number(value) for key, value in winner.trial.values.items()}
    facts[sweep.metric] = number(winner.value)
    error, linear = errors(sweep, [winner]).get(winner.trial.id), pca.get(winner.size)
    if error is not None and linear:
        change = f"{100 * (error / linear - 1):+.0f} %" if linear > EXACT else "PCA has a component for each pixel"
        facts[f"squared error beside PCA, code of {winner.size}"] = (
            f"{number(error)} beside {number(linear)} ({change})"
        )
    again = spread(sweep, winner.trial)
    if again is not None:
        facts[f"{len(again[0])} further seeds"] = _mean(again)
    if winner.trial.donors:
        where = f"best.json holds the last values, the weights are in trials/{winner.trial.id}"
        facts["trained by"] = f"{len(winner.trial.donors)} clonings; {where}"
    return facts


def _pictures(sweep: Sweep, winner: Row) -> list[tuple[str, str]]:
    """(caption, data URI) of the pictures that the winner's run drew."""
    words = {
        "reconstructions": "Validation images and what the answer makes of them.",
        "samples": "New images, decoded from z ~ N(0, I).",
    }
    paths = {sweep.run_dir(winner.trial) / "figures" / f"{name}.png": caption for name, caption in words.items()}
    return [(caption, _uri(path.read_bytes())) for path, caption in paths.items() if path.is_file()]


def _ranking(sweep: Sweep, rows: list[Row], winner: Row | None) -> list[tuple[bool, dict[str, str]]]:
    """(is it the answer, cells by column) of the first trials."""
    others = ("val.mse", "val.denoised_psnr", "val.neg_elbo", "val.rate", "val.probe_accuracy")
    there = [n for n in others if any(row.outcome.metric(n) is not None for row in rows)]
    names = dict.fromkeys([sweep.metric, *there])
    failed, table = any(row.outcome.error for row in rows), []
    for rank, row in enumerate(rows[:SHOWN], 1):
        last: dict[str, Any] = row.outcome.reports[-1] if row.outcome.reports else {}
        cells = {"#": str(rank), "trial": row.trial.id, "status": row.outcome.status, "preset": row.trial.preset}
        cells |= {key: number(row.trial.values.get(key)) for key in sweep.space.searched()}
        cells |= {name: number(row.outcome.metric(name)) for name in names}
        cells |= {"steps": f"{last.get('step', 0):,}", "seconds": f"{last.get('seconds', 0):.1f}"}
        cells |= {"error": (row.outcome.error or "")[:300]} if failed else {}
        table.append((row is winner, cells))
    return table


# -- charts

Chart = tuple[str, str, str]  # heading, what is to be seen, data URI


def _front(sweep: Sweep, rows: list[Row], winner: Row | None, pca: dict[int, float]) -> Chart | None:
    error = errors(sweep, rows)
    shown = [row for row in rows if row.trial.id in error]
    if not shown:
        return None
    # PCA with as many components as pixels is exact; on a logarithmic axis that point would press all others flat.
    pca = {size: value for size, value in sorted(pca.items()) if value > min(error.values()) / 10}
    best = front(rows, error)
    figure, (axes,) = _axes()
    axes.plot(list(pca), list(pca.values()), "s--", color=PCA, markersize=3.5, linewidth=1.2)
    axes.plot([r.size for r in best], [error[r.trial.id] for r in best], color=ACCENT, linewidth=1.8)
    for row in shown:
        size, alpha = (7, 1) if row in best else (5, 0.45)
        point = ([row.size], [error[row.trial.id]])
        axes.plot(*point, "o", color=_color(row), markersize=size, alpha=alpha, markeredgewidth=0)
        if row is winner:
            axes.plot(*point, "o", markersize=13, markerfacecolor="none", markeredgecolor=ACCENT)
    axes.set(xlabel="code size", ylabel="squared error per pixel", xscale="log")
    ticks: list[int] = []
    for size in sorted({row.size for row in shown}):
        ticks += [size] if not ticks or size >= 1.25 * ticks[-1] else []
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    _round_ticks(axes.yaxis)
    lines = {"Pareto front": Line2D([], [], color=ACCENT), "PCA": Line2D([], [], color=PCA, linestyle="--")}
    _legend(figure, shown, lines)
    compared = [row for row in best if row.size in pca]
    below = [row for row in compared if error[row.trial.id] < pca[row.size]]
    note = f"Error of the {'denoised images' if _about_noise(sweep) else 'reconstructions'}, pixels on [0, 1]. "
    note += "A larger code reconstructs better, all else equal: compare trials of one size. The ring is the answer. "
    if any(row.outcome.status == "stopped" for row in rows):
        note += "Trials that were stopped early are not shown. "
    note += f"Better than PCA at {len(below)} of {len(compared)} code sizes on the front." if compared else ""
    return "Code size against error", note, _png(figure)


def _curves(sweep: Sweep, rows: list[Row], winner: Row | None, pca: dict[int, float]) -> Chart | None:
    curves: list[tuple[Row, list[int], list[float]]] = []
    for row in rows:
        there = [r for r in row.outcome.reports if math.isfinite(r.get(sweep.metric, math.nan))]
        if there:
            curves.append((row, [r["step"] for r in there], [r[sweep.metric] for r in there]))
    if not curves:
        return None
    figure, (axes,) = _axes()
    for row, steps, values in reversed(curves):  # the best are drawn last
        color, width, alpha = (ACCENT, 2.4, 1) if row is winner else (_color(row), 1.2, _faint(curves))
        axes.plot(steps, values, color=color, linewidth=width, alpha=alpha)
        axes.plot(steps[-1:], values[-1:], "o", color=color, markersize=4, alpha=alpha, markeredgewidth=0)
    axes.set(xlabel="step", ylabel=sweep.metric, xlim=(0, None))
    lowest, highest = min(min(values) for *_, values in curves), max(max(values) for *_, values in curves)
    if sweep.sign < 0 and lowest > 0:
        # One diverging trial would press all others flat.
        ceiling = 20 * sorted(values[-1] for _, _, values in curves)[len(curves) // 2]
        axes.set(ylim=(lowest * 0.95, min(ceiling, highest) * 1.05), yscale="log")
        _round_ticks(axes.yaxis)
    _legend(figure, [row for row, *_ in curves], {"the answer": Line2D([], [], color=ACCENT)} if winner else {})
    return "Learning curves", f"{sweep.metric} at each evaluation: {METRICS[sweep.metric][1]}.", _png(figure)


def _effects(sweep: Sweep, rows: list[Row], winner: Row | None, pca: dict[int, float]) -> Chart | None:
    good = [row for row in rows if math.isfinite(row.value)]
    keys = [key for key in sweep.space.searched() if len({str(row.trial.values.get(key)) for row in good}) > 1]
    if len(good) < 2 or not keys:
        return None
    columns = min(2, len(keys))
    figure, every = _axes(math.ceil(len(keys) / columns), columns)
    for axes, key in zip(every, keys, strict=False):
        known = [(row, row.trial.values[key]) for row in good if key in row.trial.values]
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for _, value in known)
        for row, value in reversed(known):  # the best are drawn last
            color, size, alpha = (ACCENT, 9, 1.0) if row is winner else (_color(row), 5, max(0.3, _faint(good)))
            place = [value if numeric else number(value)]
            axes.plot(place, [row.value], "o", color=color, markersize=size, alpha=alpha, markeredgewidth=0)
        axes.set_xlabel(key.rpartition(".")[2])
        if numeric and _is_log(sweep, key):
            axes.set_xscale("log")
            _round_ticks(axes.xaxis)
        if sweep.sign < 0 and min(row.value for row in good) > 0:
            axes.set_yscale("log")
            _round_ticks(axes.yaxis)
    for axes in every[len(keys) :]:
        axes.set_axis_off()
    every[0].set_ylabel(sweep.metric)
    _legend(figure, good, {"the answer": Line2D([], [], color=ACCENT, marker="o", linestyle="")} if winner else {})
    return (
        "Parameters and result",
        f"Each point is a trial: its {sweep.metric} against one of its values.",
        _png(figure),
    )


def _is_log(sweep: Sweep, key: str) -> bool:
    """Whether a searched key is looked at on a logarithmic axis: a log range, or a choice over nearly a decade."""
    d = next(part[key] for part in sweep.space.parts.values() if key in part)
    numbers = [v for v in d.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    wide = len(numbers) == len(d.values) > 2 and min(numbers) > 0 and max(numbers) / min(numbers) >= 8
    return "log" in d.kind or (d.kind == "choice" and wide)


def _axes(rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.8, max(4.1, 2.2 * rows)), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=11 if len(every) == 1 else 10, color="#9ca3af")
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(fontsize=11, color="#4b5563")
    return figure, every


def _round_ticks(axis: Axis) -> None:
    """Plain numbers at round values of a logarithmic axis."""
    low, high = axis.get_view_interval()
    round_values = LogLocator(subs=(1,) if high / low > 1000 else (1, 2, 5) if high / low < 60 else (1, 3))
    axis.set_major_locator(round_values if high / low > 6 else MaxNLocator(4))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _legend(figure: Figure, rows: Sequence[Row], more: dict[str, Line2D]) -> None:
    kinds = {row.trial.preset: Line2D([], [], color=_color(row), marker="o", linestyle="") for row in rows} | more
    look: dict[str, Any] = {"ncols": 6, "frameon": False, "fontsize": 10, "handlelength": 1.1, "columnspacing": 1}
    figure.legend(kinds.values(), kinds, loc="outside upper left", borderaxespad=0.2, **look)


def _faint(lines: Sequence[object]) -> float:
    """How opaque each of many lines is, so that where most of them run can still be seen."""
    return min(0.55, max(0.08, 30 / len(lines)))


def _color(row: Row) -> str:
    return COLORS[row.trial.preset.partition("-")[0]]


def _png(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=180, pil_kwargs={"optimize": True})
    return _uri(content.getvalue())


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
