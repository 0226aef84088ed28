"""Images per second on one GPU: ours eager and as a graph, and a bare hand-written loop, at several batch sizes.

    python -m benchmarks.gpu --out gpu.json

Contestants take turns in one process; the figures are medians over the turns. Not run where this was written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_ae.data import sources
from dist_ae.models import build
from dist_ae.presets import PRESETS
from dist_ae.processes.environment import pinned_torch
from dist_ae.processes.runtime import Runtime
from dist_ae.step import Learner
from dist_ae.timeline import Timeline

TURNS, SECONDS = 15, 0.3


def ours(preset: str, batch: int, graph: str, precision: str) -> Callable[[int], None]:
    """A step of ours; the argument is its number."""
    config = PRESETS[preset].override(
        {
            "data.name": "fashion_mnist",
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


def bare(batch: int, precision: str) -> Callable[[int], None]:
    """What a person would write: the plain autoencoder over a resident uint8 tensor, with torch's fused Adam."""
    images = torch.from_numpy(sources.load(PRESETS["ae-fast"].data).train.images).flatten(1).cuda()
    layers = [784, 512, 256, 128, 256, 512, 784]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    with pinned_torch(options.precision):
        for batch in options.batches:
            contestants = {"bare loop": bare(batch, options.precision)}
            for preset in ("ae", "denoising", "dropout", "vae", "conv"):
                for graph in ("off", "on"):
                    name = f"{preset}, {'graph' if graph == 'on' else 'eager'}"
                    contestants[name] = ours(preset, batch, graph, options.precision)
            for name, values in rates(contestants, batch).items():
                row = {"batch": batch, "what": name, "images_per_second": statistics.median(values)}
                row |= {"low": min(values), "high": max(values)}
                report["rows"].append(row)
                print(f"batch {batch:5}  {name:18} {row['images_per_second']:12,.0f} images/s", flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
