"""ASHA against full random search on the same configurations: the best value of each and the training steps each took.

    python -m benchmarks.sweep_asha [--trials 27] [--epochs 9] [--seed 0]

Prints one JSON line. The figure to reach: within 3 % of the best, with at most a third of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from tune.plan import Settings, Sweep
from tune.results import Selection, results, select
from tune.spaces import load_space
from tune.sweep import checked, resume, start


def steps(sweep: Sweep) -> int:
    """Training steps of all trials."""
    return sum(int(row.outcome.reports[-1]["step"]) for row in results(sweep) if row.outcome.reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="ae")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--evaluations", type=int, default=27, help="per trial; ASHA decides at them")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--train-images", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--storage", type=Path, default=Path("runs/benchmarks"), help="sweeps that are there already are gone on with"
    )
    arguments = parser.parse_args()
    every = math.ceil(
        arguments.epochs * math.ceil(arguments.train_images / arguments.batch_size) / arguments.evaluations
    )
    overrides = {
        "data.name": arguments.data,
        "train.epochs": arguments.epochs,
        "train.batch_size": arguments.batch_size,
        "train.eval_every": every,
    }
    found = {}
    for scheduler in ("none", "asha"):
        name = f"{arguments.space}-{scheduler}-{arguments.trials}-{arguments.epochs}-{arguments.seed}"
        settings = Settings(scheduler=scheduler, seed=arguments.seed, num_trials=arguments.trials)
        sweep = checked(
            load_space(arguments.space, None),
            {**overrides, "tracking.wandb": "off"},
            None,
            settings,
            name,
            arguments.storage,
        )
        if (sweep.path / "sweep.json").exists():
            sweep = resume(sweep.path, Settings(), Selection("best"), 0)
        else:
            start(sweep, Selection("best"), 0)
        best = select(results(sweep), Selection("best"), sweep)
        assert best is not None, "no trial finished"
        found[scheduler] = {"best": best.value, "values": best.trial.values, "steps": steps(sweep)}
    full, early = found["none"], found["asha"]
    worse = (early["best"] - full["best"]) / abs(full["best"]) * -sweep.sign
    print(
        json.dumps(
            {
                "random": full,
                "asha": early,
                "worse_percent": round(100 * worse, 2),
                "share_of_steps": round(early["steps"] / full["steps"], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
