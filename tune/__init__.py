"""Hyperparameter sweeps on Ray Tune over dist_ae: ``dist-ae sweep SPACE``, or ``python -m tune SPACE`` in a checkout.

From Python, it is ``search``, and ``compare`` puts sweeps beside each other. The wheel holds this package as
``dist_ae_tune``. dist_ae does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .answer import Answer, Comparison


def search(space: str | Path, settings: Mapping[str, Any] = {}, **options: Any) -> Answer:
    """Runs a sweep as ``dist-ae sweep`` does, and returns what it found; in a notebook, a table and pictures.

    Args:
        space: ae, denoising, dropout, vae, conv or all; or the path of a space of your own (docs/sweeps.md).
        settings: what holds for all trials, by dotted key, such as ``{"train.epochs": 5}``.
        options: the command's options, such as ``num_trials=16, scheduler="asha", name="first"``.

    Raises:
        InputError: what is asked for cannot be run; says why and what to do.
        Fault: no trial finished.
    """
    from .__main__ import sweep
    from .plan import Settings
    from .spaces import SPACES

    is_file = isinstance(space, Path) or (space not in SPACES and Path(space).is_file())
    named = {"space": Path(space)} if is_file else {"which": space}
    given = {key: options.pop(key) for key in Settings.model_fields if key in options}
    run = Settings(**{key: value for key, value in given.items() if value is not None})
    # Another answer is that of --compare, which takes no space.
    return cast("Answer", sweep(**named, settings=run, training=settings, **options))


def compare(*sweeps: str | Path | Answer, select: str = "best", page: str | Path | None = None) -> Comparison:
    """Puts sweeps of one question beside each other, as ``dist-ae sweep --compare A B`` does.

    Args:
        sweeps: what ``search`` returned, or the folders.
        select: which trial is a sweep's answer.
        page: where to write it; left out, beside the first sweep.

    Raises:
        InputError: they do not answer one question, or one has no answer yet; says what differs.
    """
    from .__main__ import compared

    return compared([each if isinstance(each, (str, Path)) else each.path for each in sweeps], select, page=page)
