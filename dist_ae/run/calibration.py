"""The calibration of a run's scores, which a threshold needs in addition to the weights: one file per checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from dist_ae.files import Damaged, files_inside, folder_inside, inside, read_bounded, write_atomically
from dist_ae.run.checkpoint import Tensors, parse_tensors

MAX_BYTES = 64 << 20  # the largest code with a full covariance takes 16 MiB, and the scores take some KB


FOLDER = "calibration"
NAMES = r"\d{8,18}\.safetensors"  # of its files


def _name(step: int) -> str:
    return f"{step:08d}.safetensors"


def write(run_dir: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes the calibration of the checkpoint of that step.

    Raises:
        OSError: the disk cannot store it.
        Damaged: a link, or something other than a folder, lies where calibrations belong.
    """
    path = folder_inside(run_dir, FOLDER) / _name(step)
    write_atomically(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def keep_only(run_dir: Path, steps: Iterable[int]) -> None:
    """Removes the calibrations of all other checkpoints, which are left over if a run is trained further."""
    names = {_name(step) for step in steps}
    for path in files_inside(run_dir, FOLDER, NAMES):
        if path.name not in names:
            path.unlink(missing_ok=True)


def read(run_dir: Path, step: int) -> Tensors | None:
    """The calibration of the checkpoint of that step; None if there is none or it is not whole."""
    try:
        path = inside(run_dir, FOLDER, _name(step))
        return parse_tensors(read_bounded(path, MAX_BYTES), path.name)
    except Damaged:
        return None
