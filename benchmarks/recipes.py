"""Trains recipes side by side and prints one line of figures each: what `benchmarks/recipes.md` was made from.

    python -m benchmarks.recipes ae "optim.name=muon optim.lr=0.02 train.batch_size=512" "train.batch_size=256" [--seeds
    3] [--set train.epochs=20]

A recipe is a preset with `key=value` pairs over it, as in `python -m tune --set`. Runs stay in `--storage` and are not
trained twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import dist_ae
from tune.spaces import parse_overrides

METRICS = ("val.mse", "val.denoised_psnr", "val.neg_elbo")


def figures(config: dist_ae.Config) -> dict[str, float]:
    """What one run came to, with the seconds it trained (evaluation and saving not counted) and the error after its
    first epoch.
    """
    result = dist_ae.train(config)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["split"] == "val")
    images = result.steps * config.train.batch_size
    return {
        **{name: result.metrics[name] for name in METRICS if name in result.metrics},
        "first mse": first["mse"],
        "s": images / result.images_per_second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=list(dist_ae.PRESETS))
    parser.add_argument("recipe", nargs="*", default=[""])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="key=value for every recipe")
    parser.add_argument("--storage", type=Path, default=Path("runs/recipes"))
    arguments = parser.parse_args()
    common = {"data.name": "fashion_mnist", "tracking.wandb": "off", **parse_overrides(arguments.set)}
    for recipe in arguments.recipe or [""]:
        pairs = parse_overrides(recipe.split())
        found = []
        for seed in range(arguments.seeds):
            config = dist_ae.PRESETS[arguments.preset].override({**common, **pairs, "seed": seed})
            found.append(figures(config.override({"run_dir": arguments.storage / config.directory().name})))
        cells = []
        for name in found[0]:
            values = [f[name] for f in found]
            cells.append(
                f"{name} {statistics.mean(values):.5g} ({min(values):.5g} – {max(values):.5g})"
                if len(values) > 1
                else f"{name} {values[0]:.5g}"
            )
        print(f"| {arguments.preset} {recipe} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
