"""Whether `--confirm` gives the same answer again: trials recorded with many seeds, and sweeps replayed from them.

    python -m benchmarks.sweep_confirm [--confirm 3] [--epochs 5] [--seeds 16]

Trains the trials of `dist-ae sweep ae --num-trials 18` on digits once, the leading ones with many seeds, and keeps what
it has in a file, from which it goes on. Then it replays the search and the confirmation with other seeds ten times, and
prints one JSON line: in how many of ten the most frequent answer came, with and without confirmation.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import dist_ae
from dist_ae import PRESETS
from tune.confirm import choose, next_runs
from tune.spaces import load_space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=18)
    parser.add_argument("--leaders", type=int, default=6, help="trials that are recorded with all seeds")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--confirm", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--storage", type=Path, default=Path("runs/benchmarks/confirm"))
    arguments = parser.parse_args()
    kept = arguments.storage / f"{arguments.trials}-{arguments.epochs}.json"
    values: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    space = load_space("ae", None)
    plan = {str(i): space.sample(0, i) for i in range(arguments.trials)}

    def record(trial: str, seed: int) -> None:
        if str(seed) not in values.setdefault(trial, {}):
            preset, chosen = plan[trial]
            own = {"seed": seed, "train.epochs": arguments.epochs, "tracking.wandb": "off"}
            run_dir = arguments.storage / f"{trial}-{arguments.epochs}-{seed}"
            config = PRESETS[preset].override({**chosen, **own, "run_dir": run_dir})
            values[trial][str(seed)] = dist_ae.train(config).metrics["val.mse"]
            kept.write_text(json.dumps(values))

    arguments.storage.mkdir(parents=True, exist_ok=True)
    for trial in plan:
        record(trial, 0)
    leaders = sorted(plan, key=lambda trial: values[trial]["0"])[: arguments.leaders]
    for seed in range(1, arguments.seeds):
        for trial in leaders:
            record(trial, seed)
    sizes = {trial: int(chosen["model.latent_dim"]) for trial, (_, chosen) in plan.items()}
    firsts, answers, runs = Counter[str](), Counter[str](), 0
    for repetition in range(arguments.repetitions):
        rng = random.Random(repetition)
        seeds = rng.sample(sorted(values[leaders[0]]), arguments.confirm + 1)
        searched = sorted(((t, each.get(seeds[0], each["0"])) for t, each in values.items()), key=lambda pair: pair[1])
        found: dict[str, list[float]] = {}
        while todo := next_runs(searched, found, arguments.confirm):
            for trial, place in todo:
                found.setdefault(trial, []).append(values[trial][seeds[place]])
        firsts[searched[0][0]] += 1
        answers[choose(found, sizes)] += 1
        runs += sum(map(len, found.values()))
    figures: dict[str, object] = {
        "repetitions": arguments.repetitions,
        "confirmed": answers.most_common(),
        "search": firsts.most_common(),
    }
    print(
        json.dumps({**figures, "runs_each": runs / arguments.repetitions, "recorded": sum(map(len, values.values()))})
    )


if __name__ == "__main__":
    main()
