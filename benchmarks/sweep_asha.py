"""ASHA against full random search on the same trials: the best value of each and the training steps each took.

    python -m benchmarks.sweep_asha [--space ae] [--trials 27] [--epochs 9]
    python -m benchmarks.sweep_asha --space conv --data digits --train-images 1500 --batch-size 32 --trials 18

Trains the full search once, as a sweep that goes on where it was interrupted. Then it replays ASHA, Ray's scheduler as
`--scheduler asha` has it, on the recorded reports: two trials at a time, each as fast as it was, in ten orders. Prints
one JSON line. The figure to reach: within 3 % of the best, with at most a third of the steps.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
from pathlib import Path
from typing import NamedTuple

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from tune.plan import Settings, Sweep
from tune.results import Row, Selection, results, select
from tune.schedule import GRACE, REDUCTION, TIME
from tune.spaces import load_space
from tune.sweep import checked, resume, start


class Replayed(NamedTuple):
    """What Ray's scheduler asks of a trial."""

    trial_id: str


def asha(sweep: Sweep, rows: list[Row], slots: int) -> tuple[float, int]:
    """(best value of the trials that came to their end, steps of all) of ASHA on recorded trials in their order."""
    mode = "max" if sweep.sign > 0 else "min"
    scheduler = AsyncHyperBandScheduler(
        time_attr=TIME, metric=sweep.metric, mode=mode, max_t=100, grace_period=GRACE, reduction_factor=REDUCTION
    )
    waiting, running = list(rows), list[tuple[float, int, Row, int]]()  # when a report comes, of which trial, its place
    best, steps = -math.inf, 0

    def begin(now: float) -> None:
        row = waiting.pop(0)
        scheduler.on_trial_add(None, Replayed(row.trial.id))
        heapq.heappush(running, (now + row.outcome.reports[0]["seconds"], row.trial.number, row, 0))

    for _ in range(min(slots, len(waiting))):
        begin(0.0)
    while running:
        now, number, row, place = heapq.heappop(running)
        report, reports = row.outcome.reports[place], row.outcome.reports
        decision = scheduler.on_trial_result(None, Replayed(row.trial.id), report)
        if place + 1 < len(reports) and decision != TrialScheduler.STOP:
            later = now + reports[place + 1]["seconds"] - report["seconds"]
            heapq.heappush(running, (later, number, row, place + 1))
            continue
        steps += int(report["step"])
        if place + 1 == len(reports):
            best = max(best, sweep.sign * row.value)
        if waiting:
            begin(now)
    return sweep.sign * best, steps


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
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--storage", type=Path, default=Path("runs/benchmarks"), help="where the full search is kept")
    given = parser.parse_args()
    steps = given.epochs * math.ceil(given.train_images / given.batch_size)
    overrides = {
        "data.name": given.data, "train.epochs": given.epochs, "train.batch_size": given.batch_size,
        "train.eval_every": math.ceil(steps / given.evaluations), "tracking.wandb": "off", "tracking.pictures": False,
    }  # fmt: skip
    name = f"{given.space}-{given.data}-{given.trials}-{given.epochs}-{given.seed}"
    settings = Settings(seed=given.seed, num_trials=given.trials)
    sweep = checked(load_space(given.space, None), overrides, None, settings, name, given.storage)
    if (sweep.path / "sweep.json").exists():
        sweep = resume(sweep.path, Settings(), Selection("best"), 0)
    else:
        start(sweep, Selection("best"), 0)
    rows = [row for row in results(sweep) if row.outcome.status == "finished" and math.isfinite(row.value)]
    best = select(rows, Selection("best"), sweep)
    assert best is not None, "no trial finished"
    full = sum(int(row.outcome.reports[-1]["step"]) for row in rows)
    worse, share = [], []
    for order in range(given.orders):
        found, taken = asha(sweep, random.Random(order).sample(rows, len(rows)), slots=2)
        worse.append(-sweep.sign * (found - best.value) / abs(best.value))
        share.append(taken / full)
    figures: dict[str, object] = {"trials": len(rows), "best": best.value, "steps": full, "orders": given.orders}
    for key, values in (("worse_percent", [100 * value for value in worse]), ("share_of_steps", share)):
        figures[key] = {"median": round(statistics.median(values), 4), "most": round(max(values), 4)}
    print(json.dumps({**figures, "within_3_percent": sum(value <= 0.03 for value in worse)}))


if __name__ == "__main__":
    main()
