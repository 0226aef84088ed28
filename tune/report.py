"""The answer of a sweep: trials.csv, best.json, and report.html, one page without outside parts."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_ae.config import PRESETS

from .plan import Sweep
from .results import Row, Selection, front, results, select, spread, write_best, write_table

SHOWN = 30  # rows of the ranking on the page; trials.csv has all
COLORS = {
    "ae": "#1f6fb4",
    "denoising": "#2f8f5b",
    "dropout": "#8a5bb5",
    "vae": "#d1602c",
}  # by the part of a preset's name before "-"
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
    (sweep.path / "report.html").write_text(page(sweep, rows, winner, selection, pca_errors(sweep, rows)))
    if winner is None:
        return False
    values = ", ".join(f"{key} {_number(value)}" for key, value in winner.trial.values.items())
    print(
        f"{selection}: trial {winner.trial.id}, {winner.trial.preset}, {values}: {sweep.metric} {_number(winner.value)}"
    )
    again = spread(sweep, winner.trial)
    if again is not None:
        print(
            f"{len(again[0])} further seeds: {sweep.metric} {_number(again[1])} ± {_number(again[2])} (mean ± standard deviation)"
        )
    print(
        f"{sweep.path}/report.html, trials.csv, best.json (dist-ae train --config {sweep.path}/best.json trains it again)",
        flush=True,
    )
    return True


# --------------------------------------------------------------------------------------------------------------- PCA


def errors(sweep: Sweep, rows: Sequence[Row]) -> dict[str, float]:
    """Each finished trial's squared error per pixel, smaller is better: of the denoised images if the sweep is about those, else of the clean ones."""
    found = {}
    for row in rows:
        value = row.outcome.metric("val.denoised_psnr" if _about_noise(sweep) else "val.mse")
        if row.outcome.status == "finished" and value is not None and math.isfinite(value):
            found[row.trial.id] = 10 ** (-value / 10) if _about_noise(sweep) else value
    return found


def _about_noise(sweep: Sweep) -> bool:
    return sweep.metric == "val.denoised_psnr"


def pca_errors(sweep: Sweep, rows: Sequence[Row]) -> dict[int, float]:
    """The same error of PCA, the best linear code, at every code size of the sweep; fitted on the training images."""
    import torch

    from dist_ae import data
    from dist_ae.data import Reader
    from dist_ae.evaluate import fixed_noise

    sizes = sorted({row.latent_dim for row in rows})
    if not sizes:
        return {}
    config = PRESETS[next(iter(sweep.space.parts))].override(sweep.overrides)
    dataset, cpu = data.load(config.data), torch.device("cpu")
    train, val = Reader(dataset.train, cpu, torch.float64), Reader(dataset.val, cpu, torch.float64)
    pixels = math.prod(dataset.image_shape)
    # Sums over chunks: a memory-mapped dataset need not fit.
    total, outer, count = (
        torch.zeros(pixels, dtype=torch.float64),
        torch.zeros(pixels, pixels, dtype=torch.float64),
        len(dataset.train),
    )
    for start in range(0, count, 4096):
        x = train.span(range(start, min(start + 4096, count))).flatten(1)
        total += x.sum(0)
        outer += x.T @ x
    mean = total / count
    axes = torch.linalg.eigh(outer / count - mean.outer(mean)).eigenvectors.flip(1)  # largest variance first
    squared = dict.fromkeys(sizes, 0.0)
    for start in range(0, len(dataset.val), 4096):
        rows_here = range(start, min(start + 4096, len(dataset.val)))
        images = val.span(rows_here)
        seen = (
            images + fixed_noise(config, rows_here, tuple(images.shape[1:]), cpu).double()
            if _about_noise(sweep)
            else images
        )
        codes = (seen.flatten(1) - mean) @ axes
        for size in sizes:
            squared[size] += float((codes[:, :size] @ axes[:, :size].T + mean - images.flatten(1)).square().sum())
    return {size: value / (len(dataset.val) * pixels) for size, value in squared.items()}


# -------------------------------------------------------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light; --line: #e5e7eb; --soft: #6b7280 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1360px; padding: 20px 16px 48px; color: #111827; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 0 0 4px }
p { margin: 0 0 10px; max-width: 75ch } .soft { color: var(--soft); font-size: .9rem }
.answer { border: 1px solid var(--line); border-left: 4px solid #111827; border-radius: 6px; padding: 12px 16px; margin: 16px 0 24px }
.answer dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 640px) { .answer dl { display: block } .answer dd { margin: 0 0 6px } }
.charts { display: grid; grid-template-columns: 1fr; gap: 28px } @media (min-width: 900px) { .charts { grid-template-columns: 1fr 1fr; gap: 32px 40px } }
section { min-width: 0 } svg { display: block; width: 100%; height: auto } img { display: block; max-width: 100%; height: auto; image-rendering: auto }
.table { overflow-x: auto; margin-top: 8px } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; width: 100% }
th, td { padding: 5px 12px 5px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) } th { color: var(--soft); font-weight: 500 }
th.l, td.l { text-align: left } tr.winner td { font-weight: 650 } td.error { white-space: normal; min-width: 16em; text-align: left }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .9rem; margin: 4px 0 }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px }
.full { margin-top: 32px }
"""


def page(sweep: Sweep, rows: list[Row], winner: Row | None, selection: Selection, pca: dict[int, float]) -> str:
    """The whole report as HTML."""
    counts = ", ".join(
        f"{sum(r.outcome.status == s for r in rows)} {s}" for s in dict.fromkeys(r.outcome.status for r in rows)
    )
    settings = sweep.settings
    steps = sum(r.outcome.reports[-1]["step"] for r in rows if r.outcome.reports)
    about = f"{len(rows)} trials ({counts}); search {settings.search}, scheduler {settings.scheduler}; {steps:,} training steps in all. "
    about += f"Judged by {_metric(sweep.metric)}."
    sections = [
        _front_section(sweep, rows, winner, pca),
        _curves_section(sweep, rows, winner),
        _parallel_section(sweep, rows, winner),
    ]
    pictures = _pictures_section(sweep, winner)
    return "\n".join([
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Sweep {html.escape(sweep.name)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>Sweep {html.escape(sweep.name)}</h1><p class="soft">{html.escape(about)}</p>',
        _answer(sweep, winner, selection, pca),
        f'<div class="charts">{"".join(sections)}{pictures}</div>',
        _ranking(sweep, rows, winner),
        "</body></html>\n",
    ])  # fmt: skip


def _answer(sweep: Sweep, winner: Row | None, selection: Selection, pca: dict[int, float]) -> str:
    if winner is None:
        return '<div class="answer"><h2>No trial finished</h2><p>The reasons stand in the ranking below.</p></div>'
    facts = {"trial": winner.trial.id, "preset": winner.trial.preset}
    facts |= {key: _number(value) for key, value in winner.trial.values.items()}
    facts[sweep.metric] = _number(winner.value)
    error = errors(sweep, [winner]).get(winner.trial.id)
    if error is not None and winner.latent_dim in pca:
        linear = pca[winner.latent_dim]
        facts[f"squared error beside PCA, code of {winner.latent_dim}"] = (
            f"{_number(error)} beside {_number(linear)} ({100 * (error / linear - 1):+.0f} %)"
        )
    again = spread(sweep, winner.trial)
    if again is not None:
        facts[f"{len(again[0])} further seeds"] = (
            f"{_number(again[1])} ± {_number(again[2])} (mean ± standard deviation)"
        )
    if winner.trial.donors:
        facts["trained by"] = (
            f"{len(winner.trial.donors)} clonings; best.json holds the last values, the weights are in trials/{winner.trial.id}"
        )
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f'<div class="answer"><h2>The answer: {html.escape(str(selection))}</h2><dl>{listed}</dl></div>'


def _front_section(sweep: Sweep, rows: list[Row], winner: Row | None, pca: dict[int, float]) -> str:
    error = errors(sweep, rows)
    if not error:
        return ""
    what = "denoised images" if _about_noise(sweep) else "reconstructions"
    # PCA with as many components as pixels is exact; on a logarithmic axis that point would press all others flat.
    pca = {size: value for size, value in pca.items() if value > min(error.values()) / 10}
    shown = [row for row in rows if row.trial.id in error]
    plot = Plot(
        [r.latent_dim for r in shown] + list(pca),
        [*error.values(), *pca.values()],
        "code size",
        "squared error per pixel",
        log_x=True,
        log_y=True,
    )
    plot.ticks_x(sorted({row.latent_dim for row in shown}))
    plot.line([(size, pca[size]) for size in sorted(pca)], PCA, dash="5 4", title="PCA")
    for size in sorted(pca):
        plot.square(size, pca[size], PCA, f"PCA, code of {size}: {_number(pca[size])}")
    best = front(rows, error)
    plot.line([(r.latent_dim, error[r.trial.id]) for r in best], ACCENT, title="Pareto front")
    for row in shown:
        on_front = row in best
        title = f"{row.trial.id} {row.trial.preset}, code of {row.latent_dim}: {_number(error[row.trial.id])}"
        plot.dot(
            row.latent_dim,
            error[row.trial.id],
            _color(row),
            title,
            radius=5.5 if on_front else 4,
            faint=not on_front,
            ring=row is winner,
        )
    below = [row.latent_dim for row in best if row.latent_dim in pca and error[row.trial.id] < pca[row.latent_dim]]
    compared = [row for row in best if row.latent_dim in pca]
    words = f"Better than PCA at {len(below)} of {len(compared)} code sizes on the front." if compared else ""
    legend = _legend(shown, {"Pareto front": ACCENT, "PCA": PCA})
    note = f"Error of the {what}, [0, 1]. A larger code reconstructs better, all else equal; what counts is the error at a size. The ring is the answer. "
    note += (
        "Trials that were stopped early are not shown." if any(row.outcome.status == "stopped" for row in rows) else ""
    )
    return f'<section><h2>Code size against error</h2><p class="soft">{note} {words}</p>{legend}{plot.svg()}</section>'


def _curves_section(sweep: Sweep, rows: list[Row], winner: Row | None) -> str:
    curves = [
        (
            row,
            [(r["step"], r[sweep.metric]) for r in row.outcome.reports if math.isfinite(r.get(sweep.metric, math.nan))],
        )
        for row in rows
    ]
    curves = [(row, points) for row, points in curves if points]
    if not curves:
        return ""
    values = [y for _, points in curves for _, y in points]
    log = sweep.sign < 0 and min(values) > 0
    if sweep.sign < 0:  # one diverging trial would press all others flat
        ceiling = 20 * sorted(points[-1][1] for _, points in curves)[len(curves) // 2] if log else max(values)
        values = [v for v in values if v <= ceiling]
        curves = [(row, [(x, y) for x, y in points if y <= ceiling]) for row, points in curves]
    plot = Plot([x for _, points in curves for x, _ in points] + [0], values, "step", sweep.metric, log_y=log)
    for row, points in reversed(curves):
        mine = row is winner
        plot.line(
            points,
            ACCENT if mine else _color(row),
            width=2.6 if mine else 1.3,
            faint=not mine,
            title=f"{row.trial.id} {row.outcome.status}",
        )
        if points:
            (x, y), color = points[-1], ACCENT if mine else _color(row)
            plot.dot(x, y, color, f"{row.trial.id} {row.outcome.status}: {_number(y)}", radius=3, faint=not mine)
    legend = _legend([row for row, _ in curves], {"the answer": ACCENT})
    return f'<section><h2>Learning curves</h2><p class="soft">{html.escape(_metric(sweep.metric))} at each evaluation.</p>{legend}{plot.svg()}</section>'


def _parallel_section(sweep: Sweep, rows: list[Row], winner: Row | None) -> str:
    good = [row for row in rows if math.isfinite(row.value)]
    keys = [key for key in sweep.space.searched() if len({str(row.trial.values.get(key)) for row in good}) > 1]
    if len(good) < 2 or not keys:
        return ""
    axes = [
        _Axis(key, [row.trial.values[key] for row in good if key in row.trial.values], _is_log(sweep, key))
        for key in keys
    ]
    axes.append(_Axis(sweep.metric, [row.value for row in good], sweep.sign < 0 and min(row.value for row in good) > 0))
    width, height, top, bottom = 520.0, 350.0, 50.0, 332.0
    xs = [46 + i * (width - 92) / (len(axes) - 1) for i in range(len(axes))]
    parts = []
    for row in reversed(good):
        points = [
            (x, bottom - axis.place(value) * (bottom - top))
            for x, axis in zip(xs, axes, strict=True)
            for value in [row.value if axis is axes[-1] else row.trial.values.get(axis.name)]
            if value is not None
        ]
        mine = row is winner
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = f'stroke="{ACCENT if mine else _color(row)}" stroke-width="{2.8 if mine else 1.2}" opacity="{1 if mine else 0.45}"'
        parts.append(
            f'<polyline points="{path}" fill="none" {style}><title>{html.escape(row.trial.id)}: {_number(row.value)}</title></polyline>'
        )
    for i, (x, axis) in enumerate(zip(xs, axes, strict=True)):
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#9ca3af"/>')
        anchor = "start" if i == 0 else "end" if i == len(axes) - 1 else "middle"
        at = x - 40 if i == 0 else x + 40 if i == len(axes) - 1 else x
        # Neighbouring names would run into each other on one line.
        name, style = html.escape(axis.name.rpartition(".")[2]), f'font-size="15" text-anchor="{anchor}" fill="#111827"'
        parts.append(f'<text x="{at:.1f}" y="{16 if i % 2 == 0 else 34}" {style}>{name}</text>')
        for share, label in axis.labels():
            parts.append(
                f'<text x="{x + 5:.1f}" y="{bottom - share * (bottom - top) + 4:.1f}" font-size="14" fill="#374151" class="halo">{html.escape(label)}</text>'
            )
    halo = "<style>.halo { paint-order: stroke; stroke: #fff; stroke-width: 3px }</style>"
    svg = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" font-family="inherit">{halo}{"".join(parts)}</svg>'
    note = "Each line is a trial; its height on an axis is its value there."
    return f'<section><h2>Parameters and result</h2><p class="soft">{note}</p>{_legend(good, {"the answer": ACCENT})}{svg}</section>'


def _pictures_section(sweep: Sweep, winner: Row | None) -> str:
    if winner is None:
        return ""
    found = []
    for name, words in (
        ("reconstructions", "Validation images and what the answer makes of them."),
        ("samples", "New images, decoded from z ~ N(0, I)."),
    ):
        path = sweep.run_dir(winner.trial) / "figures" / f"{name}.png"
        if path.is_file():
            found.append(
                f'<p class="soft">{words}</p><img alt="{name} of trial {winner.trial.id}" src="{_data_uri(path)}">'
            )
    return f"<section><h2>Reconstructions of the best</h2>{''.join(found)}</section>" if found else ""


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _ranking(sweep: Sweep, rows: list[Row], winner: Row | None) -> str:
    keys = sweep.space.searched()
    names = [
        n
        for n in ("val.mse", "val.denoised_psnr", "val.neg_elbo", "val.rate", "val.probe_accuracy")
        if any(r.outcome.metric(n) is not None for r in rows)
    ]
    names = [sweep.metric, *(n for n in names if n != sweep.metric)] if rows else []
    head = [
        ("#", ""),
        ("trial", "l"),
        ("status", "l"),
        ("preset", "l"),
        *((k, "") for k in keys),
        *((n, "") for n in names),
        ("steps", ""),
        ("seconds", ""),
    ]
    failed = any(row.outcome.error for row in rows)
    if failed:
        head.append(("error", "l"))
    lines = []
    for rank, row in enumerate(rows[:SHOWN], 1):
        last: dict[str, Any] = row.outcome.reports[-1] if row.outcome.reports else {}
        cells = [(str(rank), ""), (row.trial.id, "l"), (row.outcome.status, "l"), (row.trial.preset, "l")]
        cells += [(_number(row.trial.values.get(key)), "") for key in keys]
        cells += [(_number(row.outcome.metric(name)), "") for name in names]
        cells += [(f"{last.get('step', 0):,}", ""), (f"{last.get('seconds', 0):.1f}", "")]
        if failed:
            cells.append((row.outcome.error or "", "error"))
        inner = "".join(f'<td class="{kind}">{html.escape(text)}</td>' for text, kind in cells)
        lines.append(f'<tr class="{"winner" if row is winner else ""}">{inner}</tr>')
    header = "".join(f'<th class="{kind}">{html.escape(text)}</th>' for text, kind in head)
    more = f"The first {SHOWN} of {len(rows)}; trials.csv has all. " if len(rows) > SHOWN else ""
    note = f"{more}Finished trials first; those stopped early follow with their last value, at fewer steps."
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<section class="full"><h2>Ranking</h2><p class="soft">{note}</p><div class="table">{table}</div></section>'


def _legend(rows: Sequence[Row], more: dict[str, str]) -> str:
    kinds = {row.trial.preset: _color(row) for row in rows} | more
    return (
        '<div class="legend">'
        + "".join(
            f'<span><i style="background:{color}"></i>{html.escape(name)}</span>' for name, color in kinds.items()
        )
        + "</div>"
    )


def _color(row: Row) -> str:
    return COLORS[row.trial.preset.partition("-")[0]]


def _metric(name: str) -> str:
    words = {
        "val.mse": "squared error per pixel on [0, 1] of clean validation images",
        "val.denoised_psnr": "PSNR in dB of denoised validation images, with the same noise for every trial",
        "val.neg_elbo": "negative ELBO at β = 1, nats per image",
        "val.probe_accuracy": "accuracy of a linear probe on the code",
    }
    return f"{name} ({words[name]})"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_log(sweep: Sweep, key: str) -> bool:
    d = next(part[key] for part in sweep.space.parts.values() if key in part)
    if "log" in d.kind:
        return True
    numbers = [v for v in d.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return (
        d.kind == "choice"
        and len(numbers) == len(d.values) > 2
        and min(numbers) > 0
        and max(numbers) / min(numbers) >= 8
    )


# ------------------------------------------------------------------------------------------------------------- drawing


class _Axis:
    """A vertical axis of the parallel coordinates: numbers by size, anything else at equal distances."""

    def __init__(self, name: str, values: Sequence[Any], log: bool) -> None:
        self.name, self._log = name, log
        self._numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        self._names = sorted({str(v) for v in values})
        if self._numeric:
            self._low, self._high = min(values), max(values)

    def place(self, value: Any) -> float:
        """0 at the bottom, 1 at the top."""
        if not self._numeric:
            return self._names.index(str(value)) / max(1, len(self._names) - 1)
        if self._high == self._low:
            return 0.5
        if self._log:
            return math.log(value / self._low) / math.log(self._high / self._low)
        return float((value - self._low) / (self._high - self._low))

    def labels(self) -> list[tuple[float, str]]:
        if not self._numeric:
            return [(self.place(name), name) for name in self._names]
        middle = math.sqrt(self._low * self._high) if self._log else (self._low + self._high) / 2
        ends = (
            [self._low, self._high]
            if isinstance(self._low, int) or self._low == self._high
            else [self._low, float(middle), self._high]
        )
        return [(self.place(v), _number(float(f"{v:.3g}") if isinstance(v, float) else v)) for v in ends]


class Plot:
    """A small line and dot chart as SVG."""

    WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520.0, 370.0, 72.0, 14.0, 10.0, 52.0

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_label: str,
        y_label: str,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self._log_x, self._log_y = log_x, log_y
        self._x, self._y = self._range(xs, log_x), self._range(ys, log_y)
        self._parts: list[str] = []
        self._ticks: list[float] | None = None
        self._labels = (x_label, y_label)

    @staticmethod
    def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
        low, high = (math.log(min(values)), math.log(max(values))) if log else (min(values), max(values))
        margin = (high - low) * 0.05 or 0.5
        return low - margin, high + margin

    def _at(self, x: float, y: float) -> tuple[float, float]:
        u = ((math.log(x) if self._log_x else x) - self._x[0]) / (self._x[1] - self._x[0])
        v = ((math.log(y) if self._log_y else y) - self._y[0]) / (self._y[1] - self._y[0])
        return self.LEFT + u * (self.WIDTH - self.LEFT - self.RIGHT), self.HEIGHT - self.BOTTOM - v * (
            self.HEIGHT - self.TOP - self.BOTTOM
        )

    def ticks_x(self, values: list[float]) -> None:
        """Places the ticks of the horizontal axis by hand."""
        self._ticks = values

    def line(
        self,
        points: Sequence[tuple[float, float]],
        color: str,
        width: float = 2,
        dash: str = "",
        faint: bool = False,
        title: str = "",
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self._at(*p) for p in points))
        style = f'stroke="{color}" stroke-width="{width}" opacity="{0.5 if faint else 1}" stroke-dasharray="{dash}" stroke-linejoin="round"'
        self._parts.append(
            f'<polyline points="{path}" fill="none" {style}><title>{html.escape(title)}</title></polyline>'
        )

    def dot(
        self, x: float, y: float, color: str, title: str, radius: float = 4, faint: bool = False, ring: bool = False
    ) -> None:
        u, v = self._at(x, y)
        if ring:
            self._parts.append(
                f'<circle cx="{u:.1f}" cy="{v:.1f}" r="{radius + 4.5}" fill="none" stroke="{ACCENT}" stroke-width="2"/>'
            )
        self._parts.append(
            f'<circle cx="{u:.1f}" cy="{v:.1f}" r="{radius}" fill="{color}" opacity="{0.45 if faint else 1}"><title>{html.escape(title)}</title></circle>'
        )

    def square(self, x: float, y: float, color: str, title: str) -> None:
        u, v = self._at(x, y)
        self._parts.append(
            f'<rect x="{u - 3.5:.1f}" y="{v - 3.5:.1f}" width="7" height="7" fill="{color}"><title>{html.escape(title)}</title></rect>'
        )

    def svg(self) -> str:
        """The chart, with its axes behind it."""
        back = []
        for value in self._ticks or _ticks(*self._x, self._log_x):
            u, _ = self._at(value, math.exp(self._y[0]) if self._log_y else self._y[0])
            back.append(
                f'<text x="{u:.1f}" y="{self.HEIGHT - 31}" text-anchor="middle" font-size="15" fill="#374151">{_tick(value)}</text>'
            )
        for value in _ticks(*self._y, self._log_y):
            _, v = self._at(math.exp(self._x[0]) if self._log_x else self._x[0], value)
            back.append(
                f'<line x1="{self.LEFT}" x2="{self.WIDTH - self.RIGHT}" y1="{v:.1f}" y2="{v:.1f}" stroke="#e5e7eb"/>'
            )
            back.append(
                f'<text x="{self.LEFT - 7}" y="{v + 4:.1f}" text-anchor="end" font-size="15" fill="#374151">{_tick(value)}</text>'
            )
        middle, x_label, y_label = (self.HEIGHT - self.BOTTOM + self.TOP) / 2, *map(html.escape, self._labels)
        style = 'text-anchor="middle" font-size="15" fill="#6b7280"'
        back.append(f'<text x="{(self.LEFT + self.WIDTH) / 2}" y="{self.HEIGHT - 7}" {style}>{x_label}</text>')
        back.append(f'<text transform="translate(15 {middle}) rotate(-90)" {style}>{y_label}</text>')
        return f'<svg viewBox="0 0 {self.WIDTH:g} {self.HEIGHT:g}" role="img" font-family="inherit">{"".join(back)}{"".join(self._parts)}</svg>'


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values within a range (of logarithms, if log)."""
    if log:
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            values = [
                m * 10.0**e
                for e in range(math.floor(low / math.log(10)) - 1, math.ceil(high / math.log(10)) + 1)
                for m in steps
            ]
            inside = [v for v in values if low <= math.log(v) <= high]
            if len(inside) >= 3:
                return inside
        low, high = math.exp(low), math.exp(high)
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(m for m in (5, 2, 1) if (high - low) / (step * m) >= 3)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick(value: float) -> str:
    if value and (abs(value) >= 10_000 or abs(value) < 0.001):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}" if abs(value) < 1000 else f"{value:,.0f}"
