"""Cross-validation: the same training once for each fold of the data, each tested on records that it never saw."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dist_ae import pca
from dist_ae.config import Config, InputError
from dist_ae.data.memory import Handed, memory_dataset
from dist_ae.data.reader import Reader
from dist_ae.evaluate import evaluate
from dist_ae.files import to_json, write_atomically
from dist_ae.models import Builder
from dist_ae.outcome import Result
from dist_ae.processes.runtime import Alone
from dist_ae.terminal import rank, say
from dist_ae.trainer import train
from dist_ae.use.trained import load

FILE = "folds.json"


@dataclass(frozen=True)
class Fold:
    """What one fold gave. ``test_mse`` is of its own records, which took no part in training, by the best weights."""

    fold: int
    records: int  # that were tested on
    test_mse: float
    test_r2: float | None  # of standardized records
    pca_mse: float | None  # of the same records, by PCA of the training part with as many numbers
    best_step: int
    run_dir: str


@dataclass(frozen=True)
class Folds:
    """All folds, and the folder of their runs. ``folds.json`` holds it, too."""

    folds: list[Fold]
    run_dir: Path

    def summary(self) -> str:
        """Mean and standard deviation over the folds, beside PCA's, in one line."""
        own, linear = [each.test_mse for each in self.folds], [each.pca_mse for each in self.folds]
        line = f"test mse over {len(own)} folds: {_spread(own)}"
        known = [value for value in linear if value is not None]
        if len(known) < len(linear) or not min(known):
            return line
        ratios = [mse / value for mse, value in zip(own, known, strict=True)]
        better, mean = sum(ratio < 1 for ratio in ratios), statistics.mean(ratios)
        verdict = f"{1 - mean:.0%} below" if mean < 1 else f"{mean - 1:.0%} above"
        found = f"{line}; PCA {_spread(known)}; {verdict} PCA on average, below it in {better} of {len(own)}"
        return found if mean < 0.99 else f"{found}: PCA is all there is to have"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def train_folds(config: Config, *, data: Handed | None = None, model: Builder | None = None) -> Folds:
    """Trains ``data.folds`` runs, each without the records of one fold, and tests it on them.

    The runs lie in ``fold-1`` and so on of the run directory. The same call again goes on where it was stopped. On
    ranks other than 0 there are no figures, so no folds.

    Args and errors are those of ``train``.
    """
    count = config.data.folds
    if count is None:
        raise InputError("train_folds: the configuration says no number of folds; set data.folds, such as 5")
    home = config.directory()
    if (home / "checkpoints").exists():
        raise InputError(f"{home} holds a run, and folds are runs of their own: choose another --run-dir")
    tracking = {} if config.tracking.group else {"tracking.group": config.label()}
    found = []
    for number in range(1, count + 1):
        own = {"data.fold": number, "run_dir": home / f"fold-{number}", **tracking}
        result = train(config.override(own), data=data, model=model)
        if rank() == 0:
            found.append(_tested(number, result, data, model))
            each = found[-1]
            linear = "" if each.pca_mse is None else f", PCA {each.pca_mse:.4g}"
            say(f"fold {number} of {count}: test mse {each.test_mse:.4g}{linear} on {each.records:,} records")
    folds = Folds(found, home)
    if rank() == 0:
        content = {"folds": [asdict(each) for each in found], "summary": folds.summary()}
        write_atomically(home / FILE, to_json(content))
    return folds


def _tested(number: int, result: Result, data: Handed | None, model: Builder | None) -> Fold:
    """The best weights of a run, and PCA of what it was trained on, on the records of its fold."""
    trained, alone = load(result.run_dir, model=model), Alone(torch.device("cpu"))
    dataset = trained.dataset() if data is None else memory_dataset(data, trained.config.data)
    assert dataset.test is not None
    train_part, test = (Reader(split, alone.device) for split in (dataset.train, dataset.test))
    config = trained.config
    metrics = evaluate(trained.model, test, config.objective, config.evaluation, alone)
    components = pca.of_model(trained.model, train_part, alone)
    linear = None if components is None else pca.baseline(trained.model, components, test, alone)
    where = str(result.run_dir)
    return Fold(number, len(dataset.test), metrics["mse"], metrics.get("r2"), linear, result.best_step, where)
