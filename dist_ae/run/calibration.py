"""The calibration of a run's scores, which a threshold needs beside the weights: one file for each checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from dist_ae.files import Damaged, read_bounded, write_atomically
from dist_ae.run.checkpoint import Tensors, parse_tensors

MAX_BYTES = 64 << 20  # the largest code with a full covariance takes 16 MiB, and the scores take some KB


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "calibration" / f"{step:08d}.safetensors"


def keep(run_dir: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes the calibration of the checkpoint of that step.

    Raises:
        OSError: the disk does not take it.
    """
    path = path_of(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def keep_only(run_dir: Path, steps: Iterable[int]) -> None:
    """Removes the calibrations of all other checkpoints, which a run that was trained further has."""
    wanted = {path_of(run_dir, step) for step in steps}
    for path in path_of(run_dir, 0).parent.glob("*.safetensors"):
        if path not in wanted:
            path.unlink(missing_ok=True)


def kept(run_dir: Path, step: int) -> Tensors | None:
    """The calibration of the checkpoint of that step; None where there is none or it is not whole."""
    path = path_of(run_dir, step)
    if not os.path.lexists(path):
        return None
    try:
        return parse_tensors(read_bounded(path, MAX_BYTES), path.name)
    except Damaged:
        return None
