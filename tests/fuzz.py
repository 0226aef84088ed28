"""Random experiments, process counts, kills and resumes, checked against the straight run: ``python tests/fuzz.py
--cases 500``.

Each case is drawn from its seed alone, which is printed, so a failure can be repeated: ``python tests/fuzz.py --seed
17``, one case unless more are asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from conftest import SMALL, digits_file, forked, metrics, relative_difference, weights  # noqa: E402

import dist_ae  # noqa: E402
from dist_ae import step  # noqa: E402
from dist_ae.run import checkpoint  # noqa: E402

KILLED = -signal.SIGKILL


def experiment(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A preset and settings that go together. The start is random: from PCA rounding grows, which the guarantees
    say.
    """
    preset = rng.choice(["ae", "denoising", "dropout", "vae"])
    values: dict[str, Any] = {
        "precision": "fp64",
        "model.start": "random",
        "model.latent_dim": rng.choice([1, 3, 8]),
        "model.hidden_dims": rng.choice([(), (16,), (32, 16)]),
        "model.activation": rng.choice(["relu", "gelu", "silu"]),
        "objective.noise_std": rng.choice([0.0, 0.0, 0.2]),
        "model.dropout": rng.choice([0.0, 0.0, 0.25]),
        "optim.name": rng.choice(["adam", "adamw", "sgd", "muon"]),
        "optim.schedule": rng.choice(["constant", "linear", "cosine"]),
        "optim.warmup_steps": rng.choice([0, 3]),
        "optim.weight_decay": rng.choice([0.0, 0.01]),
        "optim.clip_norm": rng.choice([None, 1.0]),
        "train.batch_size": rng.choice([40, 96, 97]),
        "train.steps": rng.randint(8, 30),
        "train.eval_every": rng.choice([None, 5]),
        "train.save_every": rng.choice([1, 3, 7]),
        "train.ema_decay": rng.choice([None, 0.9]),
        "train.max_per_process": rng.choice([None, 13]),
        "seed": rng.randint(0, 2**62),
    }
    if preset == "vae" and rng.random() < 0.5:
        values |= {"objective.likelihood": "gaussian", "objective.sigma": rng.choice([0.2, "learned"])}
    if values["optim.name"] == "sgd":
        values["optim.lr"] = 1e-5
    if values["optim.name"] == "muon" and not values["model.hidden_dims"]:
        values["optim.name"] = "adam"
    return preset, values


def work(config: Any, die_at: int | None, in_save: bool, term_at: int | None) -> Any:
    """Training that is killed before a step or within a checkpoint's files, or asked to stop."""

    def train(rank: int) -> None:
        real_step, real_write = step.Learner.step, checkpoint.write_new

        def one_step(self: step.Learner, number: int) -> None:
            if number == die_at and not in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == term_at:
                os.kill(os.getpid(), signal.SIGTERM)
            real_step(self, number)

        def write(path: Path, data: bytes) -> None:
            if in_save and die_at is not None and path.parent.name.endswith(f"{die_at:08d}"):
                os.kill(os.getpid(), signal.SIGKILL)
            real_write(path, data)

        with mock.patch.object(step.Learner, "step", one_step), mock.patch.object(checkpoint, "write_new", write):
            dist_ae.train(config)

    return train


def case(seed: int, folder: Path) -> str:
    """Runs one case; returns what it was. Raises AssertionError where the broken run is not the straight one."""
    rng = random.Random(seed)
    preset, values = experiment(rng)
    values = {**SMALL, **values, "data.name": digits_file(folder, 400)}
    plain, broken = (
        dist_ae.PRESETS[preset].override({**values, "run_dir": str(folder / name)}) for name in ("plain", "broken")
    )
    assert forked(1, work(plain, None, False, None), folder / "log-plain") == [0]
    story, total = [], values["train.steps"]
    for _ in range(rng.randint(0, 3)):
        world, at = rng.choice([1, 2, 3]), rng.randint(1, total - 1)
        end = rng.choice(["kill", "kill in a save", "term"])
        story.append(f"{world} processes, {end} at {at}")
        killed = work(broken, at if end != "term" else None, end == "kill in a save", at if end == "term" else None)
        statuses = forked(world, killed, folder / f"log-{len(story)}")
        assert set(statuses) <= {0, 1, 75, KILLED}, statuses
    world = rng.choice([1, 2, 3])
    story.append(f"{world} processes to the end")
    statuses = forked(world, work(broken, None, False, None), folder / "log-end")
    said = f"seed {seed}: {preset}, {', '.join(story)}"
    logs = "\n".join(path.read_text() for path in folder.glob("log-end*"))
    assert statuses == [0] * world, f"{said}: {statuses}\n{values}\n{logs}"
    # Muon's orthogonalization in float64, and clipping, add rounding of their own.
    difference = relative_difference(weights(folder / "broken"), weights(folder / "plain"))
    assert difference < 1e-9, f"{said}: weights differ by {difference}\n{values}"
    curves = [[(line["step"], line["loss"]) for line in metrics(folder / name)] for name in ("plain", "broken")]
    assert [at for at, _ in curves[0]] == [at for at, _ in curves[1]] == list(range(1, total + 1)), said
    assert all(abs(a - b) <= 1e-9 * max(1, abs(a)) for (_, a), (_, b) in zip(*curves, strict=True)), said
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--seed", type=int, help="of the first case; left out, from the clock")
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed
    failed = 0
    for seed in range(first, first + options.cases):
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(case(seed, Path(folder)), flush=True)
            except AssertionError as error:
                failed += 1
                print(f"FAILED {error}", flush=True)
                shutil.copytree(folder, Path(tempfile.gettempdir()) / f"fuzz-{seed}", dirs_exist_ok=True)
    print(f"{failed} of {options.cases} cases failed, from seed {first}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
