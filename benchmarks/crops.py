"""What random crops and flips cost a step: beside the same images cut once, in one process, in turns.

    python -m benchmarks.crops [--turns 15] [--data folder:~/Pictures] [--encoded]

Both learners are `conv` on 64 × 64 pixels in colour; one takes crops of whole pictures, mirrored or not, the other a
.npy file of such crops. With `--encoded` the first decodes the files in every step, and the other finds their pixels
packed. A turn is ten steps; the ratio is of neighbouring turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import dist_ae
from dist_ae.begin import prepare
from dist_ae.data import sources
from dist_ae.processes.runtime import Runtime
from dist_ae.step import Learner

STEPS = 10  # of a turn


def learner(overrides: dict[str, Any], folder: Path) -> Learner:
    config = {"run_dir": folder, "train.steps": 10**6, "tracking.wandb": "off", "optim.schedule": "constant"}
    prepared = prepare(dist_ae.PRESETS["conv"].override({**config, **overrides}))
    made = Learner(prepared.config, prepared.dataset, prepared.model, Runtime(prepared.config), prepared.timeline)
    made.prepare()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--encoded", action="store_true", help="of a folder: files that stay encoded, beside pixels")
    arguments = parser.parse_args()
    crops: dict[str, Any] = {"data.name": arguments.data, "data.crop": 64, "data.flip": True}
    with tempfile.TemporaryDirectory() as folder:
        split = sources.load(dist_ae.PRESETS["conv"].override(crops).data).val
        assert split.rows is not None  # the crops
        np.save(f"{folder}/cut.npy", split.images.take(split.rows))
        cut = {"data.name": f"array:{folder}/cut.npy"}
        pair = (("encoded", {**crops, "data.budget": 1e-9}), ("crops", crops)) if arguments.encoded else None
        both = [learner(each, Path(folder) / name) for name, each in pair or (("crops", crops), ("cut", cut))]
        ratios, step = [], 0
        for turn in range(arguments.turns + 1):
            spent = []
            for one in both:
                since = time.perf_counter()
                for number in range(step, step + STEPS):
                    one.step(number)
                spent.append(time.perf_counter() - since)
            step += STEPS
            if turn:  # the first one warms up
                ratios.append(spent[0] / spent[1])
    least, most = min(ratios), max(ratios)
    what = "crops of encoded files : of pixels" if arguments.encoded else "random crops : on images that are cut"
    print(f"a step on {what}: {statistics.median(ratios):.3f} ({least:.3f} - {most:.3f})")


if __name__ == "__main__":
    main()
