"""What the four systems reach on Fashion-MNIST, at three sizes of the code, as MLP and as convolution; and in colour.

    python -m benchmarks.table                     # every row that is missing, then docs/table.md, .csv and .png
    python -m benchmarks.table conv-vae-32         # the rows whose names begin so, and the page
    python -m benchmarks.table --page              # the page alone
    python -m benchmarks.table photos-             # the rows in colour, about 25 minutes on one thread
    python -m benchmarks.table --seconds           # how long the steps of each system take on two threads, and the page

A row is one run, ``benchmarks/table/SYSTEM-NUMBERS-SEED.json``, with ``photos-`` before it in colour; what stands there
is not trained again, so a table that was interrupted goes on. The protocol stands on the page. Everything runs on one
thread, at two rows at once if started twice.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy

import torch

import dist_ae
from dist_ae.begin import prepare
from dist_ae.files import write_atomically
from dist_ae.processes.runtime import Runtime
from dist_ae.step import Learner
from dist_ae.use.commands import evaluate_run

HERE = Path(__file__).parent
ROWS, DOCS = HERE / "table", HERE.parent / "docs"
SECONDS = ROWS / "seconds.json"
LIMITS = {"as this processor is": {}, "limited to AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}
NUMBERS = (8, 32, 128)
SEEDS = (0, 1, 2)
COMMON: dict[str, Any] = {
    "tracking.wandb": "off", "tracking.pictures": False, "objective.noise_std": 0.0,
    "evaluation.noise_std": 0.3,
}  # fmt: skip
MLP = {"train.epochs": 5, "precision": "fp32"}
CONV = {
    "model.widths": (32, 64), "model.code": "vector", "optim.lr": 5e-3, "train.batch_size": 64, "train.epochs": 2,
}  # fmt: skip
SYSTEMS: dict[str, dict[str, Any]] = {
    "ae": MLP,
    "denoising": {**MLP, "objective.noise_std": 0.3},
    "dropout": MLP,
    "vae": MLP,
    "conv": CONV,
    "conv-denoising": {**CONV, "objective.noise_std": 0.3},
    "conv-dropout": CONV,
    "conv-vae": CONV,
}
COLUMNS = {  # of the page: what it is called, the figure and its format
    "MSE": ("mse", ".5f"),
    "in training": ("train_mse", ".5f"),
    "PCA's": ("pca_mse", ".5f"),
    "PSNR, dB": ("psnr", ".2f"),
    "SSIM": ("ssim", ".3f"),
    "PCA's ": ("pca_ssim", ".3f"),
    "probe": ("probe_accuracy", ".3f"),
    "PCA's  ": ("pca_probe_accuracy", ".3f"),
    "noisy → denoised, dB": ("denoised_psnr", ".2f"),
    "−ELBO, nats": ("neg_elbo", ".1f"),
    "IW bound, nats": ("neg_iw_bound", ".1f"),
    "active": ("active_units", ".0f"),
}


DATA: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"data.name": "fashion_mnist"},
    "photos": {"data.name": "photos", "data.image_size": 32},
}
MARKS = {name: f"<!-- {name}, written by benchmarks/table.py -->" for name in DATA}
SECONDS_MARK = "<!-- seconds, written by benchmarks/table.py -->"


class Row(NamedTuple):
    data: str
    system: str
    numbers: int
    seed: int

    @property
    def name(self) -> str:
        return f"{'photos-' if self.data == 'photos' else ''}{self.system}-{self.numbers}-{self.seed}"

    @property
    def path(self) -> Path:
        return ROWS / f"{self.name}.json"

    def config(self) -> dist_ae.Config:
        own = {"model.latent_dim": self.numbers, "seed": self.seed, "run_dir": Path("runs/table") / self.name}
        return dist_ae.PRESETS[self.system].override({**COMMON, **DATA[self.data], **SYSTEMS[self.system], **own})


def rows() -> Iterator[Row]:
    """The first seed of everything comes first; in colour, convolutions with one seed."""
    for seed in SEEDS:
        for system in SYSTEMS:
            for numbers in NUMBERS:
                yield Row("fashion_mnist", system, numbers, seed)
    for system in SYSTEMS:
        if system.startswith("conv"):
            for numbers in NUMBERS:
                yield Row("photos", system, numbers, 0)


def kept() -> dict[str, list[dict[str, Any]]]:
    """What the rows that are there hold, by their data."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in DATA}
    for row in rows():
        if row.path.exists():
            found[row.data].append(json.loads(row.path.read_text()))
    return found


def processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def measured(row: Row) -> dict[str, Any]:
    """Trains a row and evaluates its last weights: the best ones would have been chosen on these very images."""
    result = dist_ae.train(row.config())
    found = evaluate_run(result.run_dir, which="last", noise_levels=(0.3,))
    return {
        "system": row.system, "numbers": row.numbers, "seed": row.seed,
        "command": f"python -m benchmarks.table {row.name}", "steps": result.steps,
        "precision": dist_ae.load_config(result.run_dir / "config.json").precision, "processor": processor(),
        "python": platform.python_version(), "torch": torch.__version__, "date": str(datetime.date.today()),
        "figures": {name.removeprefix("val."): value for name, value in found.metrics.items()}
        | {"train_mse": result.metrics["val.train_mse"]},
    }  # fmt: skip


def step_seconds(row: Row, steps: int = 40) -> float:
    """Median seconds of a step, after as many that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        config, dataset, model, timeline, _ = prepare(row.config().override({"run_dir": Path(folder)}))
        learner = Learner(config, dataset, model, Runtime(config), timeline)
        learner.prepare()
        seconds = []
        for step in range(2 * steps):
            since = time.perf_counter()
            learner.step(step)
            seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[steps:])


def time_steps() -> None:
    """Seconds of a whole run by the median step on two threads, in turns: three of each size, by each instruction set.

    Sizes of the code hardly matter to it, so a system's nine figures are one sample.
    """
    seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    first = [row for row in rows() if row.data == "fashion_mnist" and not row.seed]
    for system in SYSTEMS:
        if system in seconds:
            continue
        sizes = [row for row in first if row.system == system]
        steps = json.loads(sizes[0].path.read_text())["steps"]
        found: dict[str, list[float]] = {name: [] for name in LIMITS}
        for row, name in [(row, name) for _ in range(3) for row in sizes for name in LIMITS]:
            environment = os.environ | {"OMP_NUM_THREADS": "2"} | LIMITS[name]
            command = [sys.executable, "-m", "benchmarks.table", "--step", row.name]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found[name].append(steps * float(done.stdout))
        print(system, {name: f"{statistics.median(values):.0f} s" for name, values in found.items()}, flush=True)
        stamp = {"steps": steps, "processor": processor(), "torch": torch.__version__}
        seconds[system] = {**found, **stamp, "date": str(datetime.date.today())}
        write_atomically(SECONDS, json.dumps(seconds, indent=1).encode())


def seconds_table() -> list[str]:
    """The lines about seconds: median and range."""
    seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    lines = ["| system | steps | " + " | ".join(LIMITS) + " |", "|---" * (2 + len(LIMITS)) + "|"]
    for system, found in seconds.items():
        each = [found[name] for name in LIMITS]
        cells = [f"{statistics.median(values):.0f} ({min(values):.0f} – {max(values):.0f})" for values in each]
        lines.append(f"| `{system}` | {found['steps']:,} | " + " | ".join(cells) + " |")
    return lines


def table(done: list[dict[str, Any]]) -> list[str]:
    """The page's lines: the mean over the seeds, and how far apart they lie where there are several."""
    columns = {name: each for name, each in COLUMNS.items() if any(each[0] in row["figures"] for row in done)}
    lines = ["| system | numbers | seeds | " + " | ".join(name.strip() for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for system in SYSTEMS:
        for numbers in NUMBERS:
            same = [row["figures"] for row in done if (row["system"], row["numbers"]) == (system, numbers)]
            if not same:
                continue
            cells = []
            for figure, form in columns.values():
                values = [figures[figure] for figures in same if figure in figures]
                spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):{form}}{spread}" if values else "")
            worse = statistics.mean(figures["mse"] - figures["pca_mse"] for figures in same) > 0
            name = f"`{system}`" + (" (worse than PCA)" if worse else "")
            lines.append(f"| {name} | {numbers} | {len(same)} | " + " | ".join(cells) + " |")
    return lines


def draw(done: list[dict[str, Any]], path: Path) -> None:
    """Error against the numbers of the code, the median over seeds, for every system and PCA, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for system in SYSTEMS:
        points = [
            (numbers, statistics.median(row["figures"]["mse"] for row in same))
            for numbers in NUMBERS
            if (same := [row for row in done if (row["system"], row["numbers"]) == (system, numbers)])
        ]
        if points:
            style = "-" if system.startswith("conv") else "--"
            colour = f"C{list(SYSTEMS).index(system) % 4}"
            axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=system)
    linear = {row["numbers"]: row["figures"]["pca_mse"] for row in done}
    axes.plot(*zip(*sorted(linear.items()), strict=True), ":", marker="s", color="black", label="PCA")
    axes.set(xscale="log", yscale="log", xlabel="numbers of the code", ylabel="squared error per pixel")
    axes.set_xticks(NUMBERS, [str(numbers) for numbers in NUMBERS])
    axes.minorticks_off()
    ticks = (0.003, 0.005, 0.01, 0.02, 0.03)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)


def write_page() -> None:
    """Rewrites what stands between the marks of docs/table.md, the CSV with every row, and the picture."""
    found = kept()
    page = DOCS / "table.md"
    text = page.read_text()
    for mark, lines in [(mark, table(found[name])) for name, mark in MARKS.items()] + [(SECONDS_MARK, seconds_table())]:
        before, rest = text.split(mark)
        text = before + "\n".join([mark, *lines, "<!-- end -->"]) + rest.partition("<!-- end -->")[2]
    write_atomically(page, text.encode())
    names = sorted({name for done in found.values() for row in done for name in row["figures"]})
    with open(DOCS / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        heads = ["system", "numbers", "seed", "steps", "precision", "processor", "python", "torch", "date"]
        writer.writerow(["data", *heads, *names])
        for data, done in found.items():
            for row in done:
                writer.writerow([data, *(row[head] for head in heads), *(row["figures"].get(name) for name in names)])
    draw(found["fashion_mnist"], DOCS / "table.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("begin", nargs="*", default=[""], help="what the names of the rows begin with")
    parser.add_argument("--page", action="store_true", help="train nothing")
    parser.add_argument(
        "--seconds", action="store_true", help="time steps; train nothing (a quiet machine, 15 minutes)"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(step_seconds(next(row for row in rows() if row.name == arguments.step)))
        return
    ROWS.mkdir(exist_ok=True)
    if arguments.seconds:
        time_steps()
    for row in rows():
        if arguments.page or arguments.seconds or row.path.exists() or not row.name.startswith(tuple(arguments.begin)):
            continue
        print(f"== {row.name}", flush=True)
        write_atomically(row.path, json.dumps(measured(row), indent=1).encode())
    write_page()


if __name__ == "__main__":
    main()
