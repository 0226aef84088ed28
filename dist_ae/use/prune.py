"""`dist-ae prune`: removes what a finished run no longer needs."""

from __future__ import annotations

from pathlib import Path

from dist_ae.config import InputError
from dist_ae.files import Damaged, read_json
from dist_ae.run.directory import RunDirectory, sizes
from dist_ae.saved import is_exported, run_config


def prune(run_dir: Path, weights_only: bool = False) -> tuple[int, int]:
    """Keeps the last checkpoint and the weights of the best one. Returns the bytes of the run before and after.

    Args:
        weights_only: also remove the optimizer state of the last checkpoint, so that the run cannot be extended.

    Raises:
        InputError: the run is not finished, so that a resume needs its files; or it is damaged, in use, or no run.
    """
    run_config(run_dir)
    if is_exported(run_dir):
        raise InputError(f"{run_dir} is an exported model, which holds only weights: there is nothing to remove")
    folder = RunDirectory(run_dir)
    try:
        last = _finished(folder)
        before = sizes(run_dir)[0]
        folder.finish(last, resumable=not weights_only)
    except (OSError, Damaged) as error:
        raise InputError(
            f"{run_dir}: {getattr(error, 'strerror', None) or error}; the files in use were not touched"
        ) from None
    finally:
        folder.close()
    return before, sizes(run_dir)[0]


def _finished(folder: RunDirectory) -> int:
    """The last step of a run that is finished, that is, whose newest checkpoint belongs to its result."""
    newest = folder.newest_step()
    try:
        result = read_json(folder.path / "result.json")
    except Damaged:
        result = {}
    if newest is None or result.get("steps") != newest or not folder.holds(newest):
        raise InputError(f"{folder.path} is not finished, and a resume needs its files: nothing was removed")
    return newest
