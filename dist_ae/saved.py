"""Reads the configuration and the weights of a run directory, or of a folder made by ``dist-ae export``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from dist_ae.config import Config, InputError, load_config
from dist_ae.files import Damaged, inside, read_bounded
from dist_ae.models import Autoencoder
from dist_ae.run import checkpoint as checkpoints
from dist_ae.run.checkpoint import EMA, MAX_HEADER, Checkpoint, parse_tensors, read_checkpoint, step_of, template_of

Which = Literal["best", "last"]
CONFIG, EXPORTED_WEIGHTS = "config.json", "model.safetensors"  # of an exported folder
LISTINGS = 10  # how often the checkpoints of a run that trains meanwhile are listed


def run_config(run_dir: Path) -> Config:
    """The configuration of a run directory.

    Raises:
        InputError: it is not a run directory, or its config.json cannot be read.
    """
    if not os.path.lexists(run_dir / CONFIG):
        raise InputError(f"{run_dir} is not a run directory: it has no config.json")
    return load_config(run_dir / CONFIG, follow=False, of_run=True)


def is_exported(run_dir: Path) -> bool:
    """Whether a folder is a model written by ``dist-ae export``, not a run."""
    return os.path.lexists(run_dir / EXPORTED_WEIGHTS) and not (run_dir / "checkpoints").exists()


def image_shape(config: Config, run_dir: Path) -> tuple[int, int, int]:
    """The shape of the images that a run was trained on.

    Raises:
        InputError: the configuration names no shape.
    """
    if config.model.image_shape is None:
        raise InputError(f"{run_dir}/config.json: model.image_shape is missing, so no run wrote it")
    return config.model.image_shape


class Saved(NamedTuple):
    """The weights of a run and their step, which is None for an exported folder."""

    weights: dict[str, Tensor]
    step: int | None


def saved_weights(run_dir: Path, model: Autoencoder, which: Which = "best") -> Saved:
    """The weights of a run, or their moving average if it has one.

    Args:
        run_dir: the run, or an exported folder.
        model: the model that the weights must fit. Its own tensors are not read and may be on the meta device.
        which: "best" by validation, or "last", the newest checkpoint. Damaged checkpoints are skipped.

    Raises:
        InputError: no checkpoint is whole, or the weights belong to another model.
    """
    if is_exported(run_dir):
        template, num_bytes = template_of(model.state_dict()), sum(t.nbytes for t in model.state_dict().values())
        try:
            data = read_bounded(run_dir / EXPORTED_WEIGHTS, num_bytes + MAX_HEADER)
            return Saved(parse_tensors(data, EXPORTED_WEIGHTS, template), None)
        except Damaged as error:
            raise InputError(f"{run_dir}: {error}") from None
    reasons: list[str] = []
    for _ in range(LISTINGS):
        folders, reasons = _checkpoints(run_dir), []
        for folder in folders:
            try:
                checkpoint, weights = read_weights(folder, model)
                best = checkpoint.state.get("best")
                if which == "best" and isinstance(best, dict) and best.get("step") != checkpoint.step:
                    checkpoint, weights = read_weights(run_dir / "checkpoints" / f"{int(best['step']):08d}", model)
            except (Damaged, KeyError, TypeError, ValueError, OverflowError) as error:
                reasons.append(str(error))
                continue
            return Saved(weights, checkpoint.step)
        if _checkpoints(run_dir) == folders:
            break
        # A run that trains has written and pruned checkpoints in the meantime: list them again.
    raise InputError(f"{run_dir} has no whole checkpoint{': ' + '; '.join(reasons) if reasons else ''}")


def _checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, the newest first."""
    try:
        folders = list(inside(run_dir, "checkpoints").iterdir())
    except FileNotFoundError:
        return []
    except (Damaged, NotADirectoryError) as error:
        raise InputError(f"{run_dir}: {error}") from None
    return sorted((p for p in folders if step_of(p) is not None), key=lambda p: step_of(p) or 0, reverse=True)


def read_weights(folder: Path, model: Autoencoder) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint without its optimizer, and the weights that are used: the moving average, if it has one.

    Raises:
        Damaged: the checkpoint is not whole, or belongs to another model.
    """
    template = template_of(model.state_dict())
    average = {name: template[name] for name, _ in model.named_parameters()}
    checkpoint = read_checkpoint(folder, {checkpoints.WEIGHTS: template, EMA: average}, part=True)
    return checkpoint, {**checkpoint.files[checkpoints.WEIGHTS], **checkpoint.files.get(EMA, {})}
