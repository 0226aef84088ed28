"""Seconds to a quality on Fashion-MNIST, 128 numbers: ours, Lightning, pythae and a plain Accelerate loop, in one run.

    python -m benchmarks.sooner [--limit 100] [--only ours accelerate]                       pip install -e ".[bench]"

Each peer has its own defaults (batch 128, Adam 1e-3) and the network of benchmarks/contestants.py. A peer's clock runs
from its first step and stops while it is evaluated; ours runs from the call of `train`, with loading, PCA and all
evaluations. The marks are PCA's error with 128 numbers, and the error of the tutorial's recipe after five epochs. Each
contestant is a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import contestants
from benchmarks.speed import machine

MARKS = {"the tutorial's 0.01273": 0.01273, "PCA's 0.00631": 0.00631}
EVERY = 0.5  # seconds of training between two evaluations of a peer


class Reached(Exception):
    """The last mark was reached, or the time is over."""


class Clock:
    """In the place of the meter: called after every step of a peer."""

    def __init__(self, limit: float, unit: bool) -> None:
        import torch

        from dist_ae.config import DataConfig
        from dist_ae.data import sources

        self.range = (1.0, 0.0) if unit else (2.0, 1.0)  # pixels on [0, 1], or on [-1, 1]
        self.limit, self.seconds, self.next = limit, 0.0, EVERY
        self.since = time.perf_counter()
        self.val = torch.from_numpy(sources.load(DataConfig(name="fashion_mnist")).val.images).flatten(1).float() / 255
        self.made: list[torch.nn.Module] = []
        real = contestants.net

        def noted() -> torch.nn.Module:
            self.made.append(real())
            return self.made[-1]

        contestants.net = noted  # type: ignore[assignment]

    def tick(self, images: float) -> None:
        import torch

        now = time.perf_counter()
        self.seconds += now - self.since
        if self.seconds >= self.next:
            self.next = self.seconds + EVERY
            scale, shift = self.range
            with torch.no_grad():
                found = self.made[0](self.val * scale - shift).add(shift).div(scale)
            note(self.seconds, float((found - self.val).square().mean()), self.limit)
        self.since = time.perf_counter()


def note(seconds: float, mse: float, limit: float) -> None:
    print(json.dumps([seconds, mse]), file=sys.__stdout__, flush=True)  # also where a peer is made silent
    if mse <= min(MARKS.values()) or seconds > limit:
        raise Reached


def ours(limit: float) -> None:
    """`dist-ae train ae-fast`, evaluated every 20 steps."""
    import dist_ae

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "train.eval_every": 20,
            "train.save_every": 10**6,
            "tracking.wandb": "off",
            "run_dir": f"{folder}/run",
        }
        config = dist_ae.PRESETS["ae-fast"].override(values)
        dist_ae.train(config, report=lambda r: note(time.perf_counter() - begin, r.metrics["val.mse"], limit))


def peer(name: str, limit: float) -> None:
    contestants.METER = Clock(limit, unit=name == "pythae")  # type: ignore[assignment]
    {"lightning": lambda: contestants.lightning(128), "pythae": lambda: contestants.pythae(128),
     "accelerate": lambda: contestants.loader(128, 0, True)}[name]()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=100, help="seconds of training for each")
    parser.add_argument("--only", nargs="+", default=["ours", "lightning", "pythae", "accelerate"])
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        with contextlib.suppress(Reached):
            ours(options.limit) if options.alone == "ours" else peer(options.alone, options.limit)
        return
    print(f"{machine()}; at most {options.limit:g} s each\n\n| seconds to | {' | '.join(options.only)} |")
    print(f"|---|{'---|' * len(options.only)}")
    found: dict[str, list[tuple[float, float]]] = {}
    for name in options.only:
        command = [sys.executable, "-m", "benchmarks.sooner", "--alone", name, "--limit", str(options.limit)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
        found[name] = [tuple(json.loads(line)) for line in lines]
        if not lines:
            print(f"{name}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}", file=sys.stderr)
    for label, mark in MARKS.items():
        first = [next((s for s, mse in found[name] if mse <= mark), None) for name in options.only]
        best = [min((mse for _, mse in found[name]), default=float("nan")) for name in options.only]
        cells = [f"{s:.1f}" if s is not None else f"not in time ({b:.4f})" for s, b in zip(first, best, strict=True)]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
