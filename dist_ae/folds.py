"""Cross-validation: one run for each fold of the data, tested on the records of that fold, which it never saw."""

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
    """The result of one fold: the errors of the best weights on its own records, which took no part in training."""

    fold: int
    records: int  # in the fold
    test_mse: float
    test_r2: float | None  # of standardized records
    pca_mse: float | None  # on the same records, by PCA of the training part with a code of the same size
    best_step: int
    run_dir: str


@dataclass(frozen=True)
class Folds:
    """The results of all folds, as in ``folds.json``, and the folder of their runs."""

    folds: list[Fold]
    run_dir: Path

    def summary(self) -> str:
        """Mean and standard deviation over the folds, beside PCA's, in one line."""
        model_mse = [fold.test_mse for fold in self.folds]
        pca_mse = [fold.pca_mse for fold in self.folds if fold.pca_mse is not None]
        text = f"test mse over {len(model_mse)} folds: {_spread(model_mse)}"
        if len(pca_mse) < len(model_mse) or not min(pca_mse):
            return text
        ratios = [model / linear for model, linear in zip(model_mse, pca_mse, strict=True)]
        better, mean = sum(ratio < 1 for ratio in ratios), statistics.mean(ratios)
        verdict = f"{1 - mean:.0%} below" if mean < 1 else f"{mean - 1:.0%} above"
        text += f"; PCA {_spread(pca_mse)}; {verdict} PCA on average, below it in {better} of {len(model_mse)}"
        return text if mean < 0.99 else f"{text}: this model gains nothing over PCA"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


def train_folds(config: Config, *, data: Handed | None = None, model: Builder | None = None) -> Folds:
    """Trains ``data.folds`` runs, each without the records of one fold, and tests it on them.

    The runs lie in ``fold-1`` and so on in the run directory. The same call again continues where it was stopped. On
    ranks other than 0 the list of folds is empty.

    Args and errors are those of ``train``.
    """
    count = config.data.folds
    if count is None:
        raise InputError("train_folds: the configuration sets no number of folds; set data.folds, such as 5")
    home = config.directory()
    if (home / "checkpoints").exists():
        raise InputError(f"{home} holds a run, and each fold needs a run of its own: choose another --run-dir")
    tracking = {} if config.tracking.group else {"tracking.group": config.label()}
    folds = []
    for number in range(1, count + 1):
        values = {"data.fold": number, "run_dir": home / f"fold-{number}", **tracking}
        result = train(config.override(values), data=data, model=model)
        if rank() == 0:
            fold = _test(number, result, data, model)
            folds.append(fold)
            linear = "" if fold.pca_mse is None else f", PCA {fold.pca_mse:.4g}"
            say(f"fold {number} of {count}: test mse {fold.test_mse:.4g}{linear} on {fold.records:,} records")
    all_folds = Folds(folds, home)
    if rank() == 0:
        content = {"folds": [asdict(fold) for fold in folds], "summary": all_folds.summary()}
        write_atomically(home / FILE, to_json(content))
    return all_folds


def _test(number: int, result: Result, data: Handed | None, model: Builder | None) -> Fold:
    """Tests the best weights of a run, and PCA of its training part, on the records of its fold."""
    trained, alone = load(result.run_dir, model=model), Alone(torch.device("cpu"))
    dataset = trained.dataset() if data is None else memory_dataset(data, trained.config.data)
    assert dataset.test is not None
    train_part, test = (Reader(split, alone.device) for split in (dataset.train, dataset.test))
    config = trained.config
    metrics = evaluate(trained.model, test, config.objective, config.evaluation, alone)
    components = pca.of_model(trained.model, train_part, alone)
    pca_mse = None if components is None else pca.baseline(trained.model, components, test, alone)
    where = str(result.run_dir)
    return Fold(number, len(dataset.test), metrics["mse"], metrics.get("r2"), pca_mse, result.best_step, where)
