"""Overhead of a sweep: wall time beyond Ray's start over the trials' own training time divided by the concurrency.

    python -m benchmarks.sweep_overhead [--trials 16] [--concurrency 2] [--epochs 1]

Prints one JSON line. The figure to reach is at most 1.10.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tune.plan import Settings, read_sweep
from tune.spaces import load_space
from tune.sweep import check_data, checked, cluster, plan_trials, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "data.name": arguments.data,
            "train.epochs": arguments.epochs,
            "train.eval_every": 100,
            "tracking.wandb": "off",
        }
        settings = Settings(max_concurrent=arguments.concurrency, num_trials=arguments.trials)
        sweep = checked(load_space("ae", None), overrides, None, settings, "overhead", Path(folder))
        check_data(sweep)
        before = time.monotonic()
        with cluster(sweep):
            started = time.monotonic()
            plan_trials(sweep)
            run(sweep, "")
            wall = time.monotonic() - started
        sweep = read_sweep(sweep.path)
        seconds = [sweep.outcome(trial).reports[-1]["seconds"] for trial in sweep.trials()]
    ideal = sum(seconds) / arguments.concurrency
    print(
        json.dumps(
            {
                "trials": len(seconds),
                "concurrency": arguments.concurrency,
                "ray_start_s": round(started - before, 2),
                "wall_s": round(wall, 2),
                "training_s": round(sum(seconds), 2),
                "overhead": round(wall / ideal, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
