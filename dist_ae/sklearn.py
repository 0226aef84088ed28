"""Estimators for scikit-learn: a dimension reduction that starts as PCA, and a detector of outliers.

They take arrays and data frames, work in pipelines and searches, and keep no files unless asked. A fit starts as PCA,
evaluates held-out rows, and keeps the best weights: on those rows it is never worse than PCA of the same size.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from dist_ae.config import Config, InputError
from dist_ae.data.decode import cores
from dist_ae.data.records import Array
from dist_ae.files import Damaged, read_json, to_json
from dist_ae.objectives import present, squared_error
from dist_ae.presets import PRESETS
from dist_ae.trainer import train
from dist_ae.use.export import write_folder
from dist_ae.use.trained import load

PARAMETERS = "estimator.json"
MANY_ROWS = 4096  # training rows from which on the default batch is larger
ROWS_AT_ONCE = 4096


class _Fitted(BaseEstimator):  # type: ignore[misc]
    """The base of both estimators: parameters, fitting, saving."""

    def __init__(
        self,
        n_components: int = 2,
        *,
        hidden: tuple[int, ...] = (256, 128),
        variational: bool = False,
        noise: float = 0.0,
        dropout: float = 0.0,
        learning_rate: float | None = None,
        weight_decay: float = 0.05,
        batch_size: int | None = None,
        max_steps: int | None = None,
        patience: int | None = 8,
        validation_fraction: float = 0.1,
        missing: str = "refuse",
        random_state: Any = None,
        n_jobs: int | None = None,
        device: str = "cpu",
        run_dir: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_components, self.hidden, self.variational = n_components, hidden, variational
        self.noise, self.dropout = noise, dropout
        self.learning_rate, self.weight_decay, self.batch_size = learning_rate, weight_decay, batch_size
        self.max_steps, self.patience, self.validation_fraction = max_steps, patience, validation_fraction
        self.missing, self.random_state, self.n_jobs, self.device = missing, random_state, n_jobs, device
        self.run_dir, self.verbose = run_dir, verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing == "mask"
        return tags

    # -- fitting

    def _config(self, rows: int, columns: int, seed: int, run_dir: Path) -> Config:
        held_out = max(1, round(rows * self.validation_fraction))
        # With many rows, large batches at a higher rate are as good in half of the time.
        defaults = (600, 256, 3e-3) if self.batch_size is None and rows - held_out >= MANY_ROWS else (2000, 64, 1e-3)
        asked = self.max_steps, self.batch_size, self.learning_rate
        steps, batch, rate = (b if a is None else a for a, b in zip(asked, defaults, strict=True))
        steps_per_epoch = -(-(rows - held_out) // max(1, int(batch)))
        return PRESETS["table"].override(
            {
                "name": "table",
                "model.latent_dim": min(int(self.n_components), columns),
                "model.hidden_dims": tuple(self.hidden),
                "model.variational": bool(self.variational),
                "model.dropout": float(self.dropout),
                "objective.noise_std": float(self.noise),
                "optim.lr": float(rate),
                "optim.weight_decay": float(self.weight_decay),
                "data.scale": "standard",
                "data.missing": self.missing,
                "data.val_fraction": float(self.validation_fraction),
                "train.batch_size": max(1, min(int(batch), rows - held_out)),
                "train.steps": int(steps),
                "train.eval_every": max(50, min(steps_per_epoch, int(steps))),
                "train.patience": self.patience,
                "train.log_every": max(50, int(steps) // 10),
                "tracking.wandb": "off",
                "tracking.pictures": self.run_dir is not None,
                "seed": seed,
                "run_dir": run_dir,
            }
        )

    def _fit(self, X: Any) -> Array:
        X = validate_data(
            self,
            X,
            dtype=[np.float64, np.float32],
            ensure_min_samples=2,
            ensure_all_finite="allow-nan" if self.missing == "mask" else True,
        )
        if self.n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {self.n_components}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        seed = int(check_random_state(self.random_state).randint(2**31))
        own_dir = None if self.run_dir is None else Path(self.run_dir)
        scratch = Path(tempfile.mkdtemp(prefix="dist-ae-")) if own_dir is None else None
        try:
            run_dir = own_dir if own_dir is not None else (scratch or Path()) / "run"
            with _errors(), _quiet(self.verbose):
                config = self._config(X.shape[0], X.shape[1], seed, run_dir)
                metrics, best = self._train(config, X)
                metrics |= _metrics_at(run_dir, best)
                self._model = load(run_dir, device=self.device)
            self._model.source = None if own_dir is None else self._model.source
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        self.n_components_ = config.model.latent_dim
        self._n_features_out = self.n_components_
        self.r2_, self.mse_ = metrics["val.r2"], metrics["val.mse"]
        self.pca_mse_ = metrics.get("val.pca_mse")
        self.n_steps_ = best
        return np.asarray(X)

    def _train(self, config: Config, X: Array) -> tuple[dict[str, float], int]:
        """The metrics of the last evaluation, and the step of the best one, whose weights are used."""
        wanted = self.n_jobs or 1
        jobs = wanted if wanted > 0 else max(1, cores() + 1 + wanted)  # as joblib counts
        if jobs == 1:
            result = train(config, data=X)
            return result.metrics, result.best_step
        # Processes of one group, started as on the command line, from files: nothing is pickled.
        with tempfile.TemporaryDirectory(prefix="dist-ae-") as folder:
            np.save(Path(folder) / "data.npy", X, allow_pickle=False)
            config = config.override({"data.name": f"array:{folder}/data.npy", "data.layout": "table"})
            (Path(folder) / "config.json").write_bytes(to_json({"config": config.model_dump(mode="json")}))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={jobs}"]
            command += ["-m", "dist_ae", "train", "--config", f"{folder}/config.json"]
            environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **os.environ}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise InputError(errors[0].removeprefix("error: ") if errors else done.stderr[-500:])
        result_json = read_json(config.directory() / "result.json")
        return result_json["metrics"], result_json["best_step"]

    # -- using

    def _validated(self, X: Any) -> Array:
        check_is_fitted(self, "_model")
        nan = "allow-nan" if self.missing == "mask" else True
        rows: Array = validate_data(self, X, dtype=[np.float64, np.float32], reset=False, ensure_all_finite=nan)
        return rows

    @torch.no_grad()
    def _coded(self, X: Array) -> tuple[Array, Array]:
        """Codes [N, n_components] and the mean squared error [N] of rows, in standard deviations.

        In float64, in which the result for a row does not depend on the other rows.
        """
        model = copy.deepcopy(self._model.model).to("cpu", torch.float64)
        codes, errors = [], []
        for rows in torch.from_numpy(np.asarray(X, np.float64)).split(ROWS_AT_ONCE):  # type: ignore[no-untyped-call]
            unit = model.to_units(rows[:, :, None, None])
            code = model.encode(unit)[0]
            squared = squared_error(unit, model.decode(code), model.missing)
            codes.append(code.flatten(1))
            errors.append(squared / torch.as_tensor(present(unit, model.missing)).clamp(min=1))
        return torch.cat(codes).numpy(), torch.cat(errors).numpy()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the fitted estimator to a folder: safetensors and JSON, no pickle. ``load`` reads it."""
        check_is_fitted(self, "_model")
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        write_folder(self._model, out, out)
        fitted: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name.endswith("_") and isinstance(value, (int, float))
        }
        if hasattr(self, "feature_names_in_"):
            fitted["feature_names_in_"] = [str(name) for name in self.feature_names_in_]
        parameters = {name: value for name, value in self.get_params().items() if not callable(value)}
        parameters["run_dir"] = None if self.run_dir is None else str(self.run_dir)
        if not isinstance(self.random_state, int):
            parameters["random_state"] = None
        (out / PARAMETERS).write_bytes(to_json({"parameters": parameters, "fitted": fitted}))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Any:
        """The estimator that ``save`` wrote to a folder.

        Raises:
            InputError: there is none, or it is damaged.
        """
        try:
            stored = read_json(Path(folder) / PARAMETERS)
            parameters = {**stored["parameters"], "hidden": tuple(stored["parameters"]["hidden"])}
            estimator = cls(**parameters)
            for name, value in stored["fitted"].items():
                setattr(estimator, name, np.array(value, object) if name == "feature_names_in_" else value)
            estimator._n_features_out = estimator.n_components_
        except (Damaged, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}: no estimator that save() wrote ({error})") from None
        estimator._model = load(Path(folder), device=estimator.device)
        return estimator


class Autoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Fitted):  # type: ignore[misc]
    """An autoencoder as a dimension reduction: it starts as PCA and trains as long as held-out rows improve.

    Args:
        n_components: numbers of the code.
        hidden: widths of the hidden layers of the encoder; the decoder mirrors them.
        variational: a variational autoencoder; ``transform`` returns the means of its codes.
        noise: standard deviation, relative to that of each column, of noise on the input that it learns to remove.
        dropout: probability that a hidden unit is dropped.
        learning_rate, batch_size, max_steps: peak rate, rows of a step, and most steps. None: 2,000 steps of 64 rows at
            1e-3, or with 4,096 training rows or more, 600 steps of 256 rows at 3e-3.
        patience: number of evaluations without improvement after which training ends.
        validation_fraction: share of the rows that are held out to choose the best weights.
        missing: "refuse" NaN, or "mask": the mean replaces NaN at the input, NaN does not count, and is filled in.
        n_jobs: processes that train together, with the same result up to rounding; -1 means one per core.
        device: where the fitted model computes.
        run_dir: folder for the run with its checkpoints and metrics; None keeps nothing.
        verbose: print the messages of the run.

    Attributes:
        n_components_: numbers of the code.
        mse_, r2_: on held-out rows: the share of variance that the weights in use leave unexplained, and r2.
        pca_mse_: the same share for PCA with a code of the same size.
        n_steps_: the step of the weights that are used; 0 means that training did not improve on PCA.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Any, y: Any = None) -> Autoencoder:
        """Trains on rows [N, D] of numbers."""
        self._fit(X)
        return self

    def transform(self, X: Any) -> Array:
        """Rows [N, D] → codes [N, n_components], in the type of X."""
        rows = self._validated(X)
        return self._coded(rows)[0].astype(rows.dtype)

    def inverse_transform(self, X: Any) -> Array:
        """Codes [N, n_components] → rows [N, D], in the units of the training data."""
        check_is_fitted(self, "_model")
        codes = np.asarray(X)
        if codes.ndim != 2 or codes.shape[1] != self.n_components_:
            raise ValueError(f"expected codes [N, {self.n_components_}], got {list(codes.shape)}")
        decoded = self._model.decode(torch.from_numpy(codes.astype(np.float32))).flatten(1).numpy()
        return decoded.astype(codes.dtype if codes.dtype.kind == "f" else np.float64)

    def score(self, X: Any, y: Any = None) -> float:
        """r2 of the reconstruction, over all columns: larger is better, 0 is no better than the training mean."""
        rows = self._validated(X)
        unit = self._model.model.to_units(torch.from_numpy(np.asarray(rows, np.float64))[:, :, None, None])
        squares = float(unit.nan_to_num(0.0).square().sum())
        entries = np.isfinite(rows).sum(1)
        return 1 - float((self._coded(rows)[1] * entries).sum()) / squares if squares else 0.0

    def score_samples(self, X: Any) -> Array:
        """How well each row is reconstructed, [N]: minus its mean squared error, in standard deviations."""
        return -self._coded(self._validated(X))[1]


class AutoencoderDetector(OutlierMixin, _Fitted):  # type: ignore[misc]
    """An outlier detector: rows that the autoencoder reconstructs badly.

    Args:
        contamination: share of the training rows that count as outliers, which sets the threshold.

    The other arguments are those of ``Autoencoder``.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        contamination: float = 0.1,
        hidden: tuple[int, ...] = (256, 128),
        variational: bool = False,
        noise: float = 0.0,
        dropout: float = 0.0,
        learning_rate: float | None = None,
        weight_decay: float = 0.05,
        batch_size: int | None = None,
        max_steps: int | None = None,
        patience: int | None = 8,
        validation_fraction: float = 0.1,
        missing: str = "refuse",
        random_state: Any = None,
        n_jobs: int | None = None,
        device: str = "cpu",
        run_dir: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            n_components,
            hidden=hidden,
            variational=variational,
            noise=noise,
            dropout=dropout,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            max_steps=max_steps,
            patience=patience,
            validation_fraction=validation_fraction,
            missing=missing,
            random_state=random_state,
            n_jobs=n_jobs,
            device=device,
            run_dir=run_dir,
            verbose=verbose,
        )
        self.contamination = contamination

    def fit(self, X: Any, y: Any = None) -> AutoencoderDetector:
        """Trains on rows [N, D] of numbers, most of them normal."""
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination must be in (0, 0.5], got {self.contamination}")
        X = self._fit(X)
        self.offset_ = float(np.percentile(-self._coded(X)[1], 100 * self.contamination))
        return self

    def score_samples(self, X: Any) -> Array:
        """How normal each row is, [N]: minus its mean squared error, in standard deviations."""
        return -self._coded(self._validated(X))[1]

    def decision_function(self, X: Any) -> Array:
        """``score_samples`` minus the threshold: below 0 is an outlier."""
        scores: Array = self.score_samples(X) - self.offset_
        return scores

    def predict(self, X: Any) -> Array:
        """1 for each inlier, -1 for each outlier."""
        return np.where(self.decision_function(X) < 0, -1, 1)


def _metrics_at(run_dir: Path, step: int) -> dict[str, float]:
    """The validation metrics of a run's weights after ``step`` steps."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    matching = [line for line in lines if line["split"] == "val" and line["step"] == step]
    return {f"val.{name}": value for name, value in matching[-1].items()} if matching else {}


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turns InputError into ValueError, as scikit-learn's users expect."""
    try:
        yield
    except InputError as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    if verbose:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
