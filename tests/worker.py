"""Training jobs for the tests, and errors put into the trainer on purpose.

A job is {"preset", "overrides", "mutation"}; a mutation is an error put into the trainer on purpose, to see the tests
notice it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import torch

import dist_ae
from dist_ae import draws, step
from dist_ae.data import order
from dist_ae.draws import Draws
from dist_ae.processes import host_memory


def mutated(name: str) -> Any:
    """The trainer with one error in it."""
    draw, share, compute = draws.draw, order.share, step.Learner.compute

    def draw_globally(*arguments: Any, **settings: Any) -> Draws:
        torch.rand(1)
        return draw(*arguments, **settings)

    def draw_alike(shapes: Any, at: Any, rows: range, *rest: Any, **settings: Any) -> Draws:
        return draw(shapes, at, range(len(rows)), *rest, **settings)

    def average_per_process(self: Any, batch_size: int, update: bool = True) -> None:
        compute(self, max(1, len(self._mine) * self.runtime.world), update)

    def drop(rows: range, rank: int, world: int) -> range:
        return share(range(rows.start, rows.start + len(rows) // world * world), rank, world)

    return {
        "none": contextlib.nullcontext(),
        "same noise on every process": mock.patch.object(step, "draw", draw_alike),
        "averages per process": mock.patch.object(step.Learner, "compute", average_per_process),
        "draws from torch's global generator": mock.patch.object(step, "draw", draw_globally),
        "no shared memory": mock.patch.object(
            host_memory, "FOLDER", "/nonexistent"
        ),  # no error: what a machine without it does
        "drops what does not divide": mock.patch.object(step, "share", drop),
    }[name]


def run(jobs: list[dict[str, Any]]) -> None:
    """The jobs, one after the other, in this process's group: one for all of them, as Ray Train makes it, which the
    trainer joins.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo")
    for job in jobs:
        config = dist_ae.PRESETS[job["preset"]].override(job["overrides"])
        before = torch.get_rng_state()
        with mutated(job.get("mutation", "none")):
            result = dist_ae.train(config)
        if not torch.equal(before, torch.get_rng_state()):
            (result.run_dir / "global_generator_touched").touch()
