"""Images per second on one GPU: ours eager and as a graph, and a bare hand-written loop, at several batch sizes.

    python -m benchmarks.gpu --out gpu.json [--data digits]

Contestants take turns in one process; the figures are medians over the turns. Beside each row stands what it has to
beat: for the eager step 0.9 of the bare loop, for the graph what it is to gain over the eager step. The JSON is whole
after every row. It is meant to take some three minutes of an H100, and was not run where this was written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_ae.config import DataConfig
from dist_ae.data import sources
from dist_ae.files import write_atomically
from dist_ae.models import build
from dist_ae.presets import PRESETS
from dist_ae.processes.environment import pinned_torch
from dist_ae.processes.runtime import Runtime
from dist_ae.step import Learner
from dist_ae.terminal import first_line
from dist_ae.timeline import Timeline

TURNS, SECONDS = 7, 0.3
GAINS = {128: 1.7, 1024: 1.5}  # of a graph over the eager step: others saw 1.7 to 3.8 where launches decide, 1.01 else


def ours(preset: str, batch: int, graph: str, precision: str, data: str) -> Callable[[int], None]:
    """A step of ours; the argument is its number."""
    config = PRESETS[preset].override(
        {
            "data.name": data,
            "train.batch_size": batch,
            "train.cuda_graph": graph,
            "precision": precision,
            "model.start": "random",
            "train.steps": 10**9,
        }
    )
    dataset = sources.load(config.data)
    steps = Timeline.of(config.train, len(dataset.train))
    learner = Learner(config, dataset, build(config, dataset.image_shape), Runtime(config), steps)
    learner.prepare()
    return lambda step: learner.step(step % (steps.steps_per_epoch - 1))  # full batches


def bare(batch: int, precision: str, data: str) -> Callable[[int], None]:
    """What a person would write: the plain autoencoder over a resident uint8 tensor, with torch's fused Adam."""
    images = torch.from_numpy(sources.load(DataConfig(name=data)).train.images).flatten(1).cuda()
    layers = [images.shape[1], 512, 256, 128, 256, 512, images.shape[1]]
    parts: list[torch.nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(layers)):
        parts += [torch.nn.Linear(inputs, outputs), *([torch.nn.GELU()] if i not in (2, 5) else [])]
    model = torch.nn.Sequential(*parts).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    order = torch.randperm(len(images), device="cuda")

    def step(number: int) -> None:
        start = number * batch % (len(images) - batch)
        x = images[order[start : start + batch]].float().div_(255).mul_(2).sub_(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = (model(x) - x).square().flatten(1).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def rates(contestants: dict[str, Callable[[int], None]], batch: int) -> dict[str, list[float]]:
    """Images per second of each contestant in each turn; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    numbers = dict.fromkeys(contestants, 0)
    for turn in range(TURNS + 1):
        for name, step in contestants.items():
            torch.cuda.synchronize()
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < SECONDS:
                for _ in range(20):
                    step(numbers[name])
                    numbers[name] += 1
                    done += 1
                torch.cuda.synchronize()
            if turn:  # the first warms up
                found[name].append(done * batch / (time.perf_counter() - start))
    return found


def report_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row by row, the most telling first: what a graph brings where launches cost most."""
    for batch in options.batches:
        for preset in options.presets:
            contestants = {"bare loop": bare(batch, options.precision, options.data)} if preset == "ae" else {}
            problems = {}
            for graph, name in (("off", "eager"), ("on", "graph")):
                try:
                    contestants[name] = ours(preset, batch, graph, options.precision, options.data)
                except Exception as error:  # the other rows are wanted all the same
                    problems[name] = f"{type(error).__name__}: {first_line(error)}"
            found = {name: statistics.median(values) for name, values in rates(contestants, batch).items()}
            for name in ("bare loop", "eager", "graph"):
                row: dict[str, Any] = {"preset": preset, "batch": batch, "what": name}
                if name in found:
                    row["images_per_second"] = found[name]
                    if name == "eager" and "bare loop" in found:
                        row |= {"to_beat": 0.9 * found["bare loop"], "which_is": "0.9 × the bare loop"}
                    if name == "graph" and "eager" in found:
                        gain = GAINS.get(batch, 1.0)
                        row |= {"to_beat": gain * found["eager"], "which_is": f"{gain} × eager"}
                    yield row
                elif name in problems:
                    yield row | {"problem": problems[name]}
            del contestants
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--presets", nargs="+", default=["ae", "vae", "denoising", "dropout", "conv"])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--data", default="fashion_mnist", help="digits needs no files")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here (torch.cuda.is_available() is False)")
    rows: list[dict[str, Any]] = []
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    with pinned_torch(options.precision):
        for row in report_of(options):
            rows.append(row)
            write_atomically(options.out, (json.dumps(report, indent=1) + "\n").encode())
            what = f"batch {row['batch']:5}  {row['preset']:10} {row['what']:10}"
            if "problem" in row:
                print(f"{what} {row['problem']}", flush=True)
                continue
            rate, least = row["images_per_second"], row.get("to_beat")
            verdict = (
                "" if least is None else f"{'ok ' if rate >= least else 'LOW'} to beat: {least:,.0f}, {row['which_is']}"
            )
            print(f"{what} {rate:12,.0f} images/s  {verdict}", flush=True)


if __name__ == "__main__":
    main()
