"""The first losses of every preset, to nine digits: a change that means to keep behaviour keeps these.

A change that means to alter them rewrites the file and says so in its commit: ``python tests/test_golden.py``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "golden" / "losses.json"
STEPS = 10

# One thread: how many of them add up a sum changes its last digits.
os.environ.update({"WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})

import dist_ae  # noqa: E402
from dist_ae.presets import PRESETS  # noqa: E402


def losses(preset: str, folder: Path) -> list[float]:
    """The training loss of each of the first steps, in nats per image, in float64 on the embedded digits."""
    config = PRESETS[preset].override(
        {
            "data.name": "digits",
            "precision": "fp64",
            # A PCA start is a stationary point, where some gradients are rounding. Adam would scale these up to steps
            # of full size, and the losses would be those of one kind of processor.
            "optim.eps": 1e-3,
            "train.steps": STEPS,
            "train.log_every": 1,
            "tracking.wandb": "off",
            "run_dir": str(folder / preset),
        }
    )
    run_dir = dist_ae.train(config).run_dir
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_losses_of_a_preset_are_the_golden_ones(preset: str, tmp_path: Path) -> None:
    assert losses(preset, tmp_path) == pytest.approx(json.loads(FILE.read_text())[preset], rel=1e-9)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden = {preset: losses(preset, Path(folder)) for preset in PRESETS}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
    sys.exit(0)
