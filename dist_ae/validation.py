"""What a run measures besides its training: errors on held-out images, the linear baseline, pictures, thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_ae import pca
from dist_ae.config import Config
from dist_ae.data.reader import Reader
from dist_ae.data.records import Dataset, Split
from dist_ae.evaluate import Stop, evaluate, mean_image_error, mean_squared_error
from dist_ae.models import Components
from dist_ae.processes.runtime import Runtime
from dist_ae.scores import Calibration, calibrate
from dist_ae.step import Learner

TRAIN_SAMPLE = 2000  # most training images that are evaluated in addition to the validation images
CROPS = 10_000  # most training crops that PCA and thresholds use


class Validation:
    """The held-out images, some of the training images, and PCA of the training images."""

    def __init__(self, dataset: Dataset, config: Config, runtime: Runtime) -> None:
        self._dataset, self._config, self._runtime = dataset, config, runtime
        self._val = Reader(dataset.val, runtime.device, runtime.dtype)
        self._fixed_crops: Reader | None = None  # of the training pictures; steps read crops at other places
        self._train_sample: Reader | None = None  # read later: the first step need not wait for a slow disk
        self._components: Components | None = None  # from a PCA start, kept until the baseline is known

    def start(self, learner: Learner) -> None:
        """Sets the weights of a new run to PCA, if the model has such a start. Every process takes part."""
        self._components = pca.of_model(learner.raw_model, self._train(learner), self._runtime)
        if self._components is not None and self._runtime.is_main:
            learner.start_from(self._components)

    def variances(self, learner: Learner) -> list[float]:
        """The variances along the principal directions of whole records, on the model's scale; none for patches.

        Every process takes part. The components are kept until the baseline is known.
        """
        code = learner.raw_model.linear_code()
        if code is None or code.patch is not None:
            return []
        if self._components is None:
            self._components = pca.of_model(learner.raw_model, self._train(learner), self._runtime)
        return [] if self._components is None else self._components.variances.tolist()

    def metrics(self, learner: Learner, pca_mse: float | None, stop: Stop) -> dict[str, float]:
        """The metrics of ``evaluate`` on the held-out images, and two to compare them with.

        - ``pca_mse``: the error of PCA with a code of the same size, if the model has a linear counterpart.
        - ``train_mse``: the error on some training images. Its distance from the validation error shows overfitting.

        Args:
            pca_mse: the value of an earlier evaluation; if None, it is computed.

        Raises:
            StopRequested: ``stop`` answered yes.
        """
        evaluation, runtime = self._config.evaluation, self._runtime
        if pca_mse is None:
            pca_mse = self._baseline(learner, stop)
        with learner.evaluation_weights():
            metrics = evaluate(learner.model, self._val, self._config.objective, evaluation, runtime, stop)
            if self._train_sample is None:
                sample = _sample(self._dataset.train, min(TRAIN_SAMPLE, len(self._dataset.val)))
                self._train_sample = Reader(sample, runtime.device, runtime.dtype)
            size = evaluation.batch_size
            metrics["train_mse"] = mean_squared_error(learner.model, self._train_sample, size, runtime, stop)
        return metrics if pca_mse is None else {**metrics, "pca_mse": pca_mse}

    def _baseline(self, learner: Learner, stop: Stop) -> float | None:
        model, runtime = learner.raw_model, self._runtime
        components = self._components or pca.of_model(model, self._train(learner), runtime, stop)
        self._components = None
        return None if components is None else pca.baseline(model, components, self._val, runtime, stop)

    def mean_image_error(self) -> float | None:
        """The error of always predicting the mean of the held-out images. Every process takes part."""
        return mean_image_error(self._val, self._config.evaluation.batch_size, self._runtime)

    def pictures(self, learner: Learner, folder: Path, step: int) -> dict[str, Path]:
        """Draws the run's pictures into its folder and returns their paths by name."""
        from dist_ae.figures import run_pictures  # matplotlib takes 0.5 s, which the first step need not wait for

        with learner.evaluation_weights():
            return run_pictures(learner.raw_model, self._config, self._val, folder, step=step)

    def calibration(self, learner: Learner, stop: Stop) -> Calibration:
        """The calibration of the scores, for the present weights of the model. Every process takes part.

        Raises:
            StopRequested: ``stop`` answered yes.
        """
        return calibrate(learner.raw_model, self._train(learner), self._val, self._config, self._runtime, stop)

    def _train(self, learner: Learner) -> Reader:
        """The training images as they are measured: those that steps read, or a sample of fixed crops."""
        if learner.images.split is self._dataset.train:
            return learner.images
        if self._fixed_crops is None:
            crops = _sample(self._dataset.train, CROPS)
            self._fixed_crops = Reader(crops, learner.images.device, learner.images.dtype)
        return self._fixed_crops


def _sample(split: Split, most: int) -> Split:
    """Evenly spaced training images, at most ``most``."""
    count = min(len(split), most)
    chosen = np.linspace(0, len(split) - 1, count).astype(np.int64)
    return Split(split.images, None, chosen if split.rows is None else split.rows[chosen], split.scaling)
