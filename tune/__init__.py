"""Hyperparameter sweeps on Ray Tune over dist_ae: ``dist-ae sweep SPACE``, or ``python -m tune SPACE`` in a checkout.

From Python, use ``search``, and ``compare`` to compare sweeps. The wheel holds this package as ``dist_ae_tune``.
dist_ae does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .answer import Answer, Comparison


def search(space: str | Path, settings: Mapping[str, Any] = {}, **options: Any) -> Answer:
    """Runs a sweep as ``dist-ae sweep`` does, and returns its answer, which a notebook shows as a table and pictures.

    Args:
        space: ae, denoising, dropout, vae, conv or all; or the path of a space of your own (docs/sweeps.md).
        settings: settings of all trials, by dotted key, such as ``{"train.epochs": 5}``.
        options: the command's options, such as ``num_trials=16, scheduler="asha", name="first"``.

    Raises:
        InputError: the sweep cannot be run; says why and what to do.
        Fault: no trial finished.
    """
    from .__main__ import sweep
    from .plan import Settings
    from .spaces import SPACES

    is_file = isinstance(space, Path) or (space not in SPACES and Path(space).is_file())
    named = {"space": Path(space)} if is_file else {"which": space}
    run_options = {key: options.pop(key) for key in Settings.model_fields if key in options}
    run = Settings(**{key: value for key, value in run_options.items() if value is not None})
    # `sweep` returns a Comparison only for --compare, which takes no space.
    return cast("Answer", sweep(**named, settings=run, training=settings, **options))


def compare(*sweeps: str | Path | Answer, select: str = "best", page: str | Path | None = None) -> Comparison:
    """Compares sweeps of the same question, as ``dist-ae sweep --compare A B`` does.

    Args:
        sweeps: results of ``search``, or folders of sweeps.
        select: which trial is a sweep's answer.
        page: path of the page; left out, in the folder of the first sweep.

    Raises:
        InputError: the sweeps do not answer the same question (says what differs), or one has no answer yet.
    """
    from .__main__ import compared

    return compared([sweep if isinstance(sweep, (str, Path)) else sweep.path for sweep in sweeps], select, page=page)
