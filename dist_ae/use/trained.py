"""A trained model: load it, reconstruct, embed, sample, interpolate, score."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_ae import devices
from dist_ae.config import Config, InputError
from dist_ae.data import sources
from dist_ae.data.given import Given, Shapes, Units, blocks, floats, given
from dist_ae.data.pictures import expand, shown
from dist_ae.data.reader import SHARE_OF_MEMORY, Reader, free_memory
from dist_ae.data.records import Dataset, Scaling, Split, at_once
from dist_ae.draws import Step, normal
from dist_ae.files import Damaged, read_json
from dist_ae.models import Autoencoder, Builder, blank, build
from dist_ae.processes.runtime import Alone
from dist_ae.run import calibration as calibration_files
from dist_ae.saved import CONFIG, Which, image_shape, run_config, saved_weights
from dist_ae.scores import Calibration, calibrate, check_score, score_images
from dist_ae.terminal import say
from dist_ae.use import hub

MOST_STEPS = 10_000  # of a line between two images

Images = Any  # see `dist_ae.data.given.given`


class TrainedModel:
    """A trained autoencoder.

    Images go in as a path (a picture, a folder, an array file, a packed set), a PIL image, a list of paths or of PIL
    images, or an array or tensor of uint8 or of floats on [0, 1]: [N, C, H, W], [N, H, W, C], [N, H, W] for grey, or
    one image. Pictures get the model's size by the run's own data settings; arrays must have it. A model of tables,
    signals or volumes takes those, also as data frames, in the units that it was trained on. Results are float32
    tensors on the CPU, with one row per record.
    """

    def __init__(
        self,
        model: Autoencoder,
        config: Config,
        device: torch.device | str = "cpu",
        source: tuple[Path, int] | None = None,
    ) -> None:
        """Args:
        source: the run directory and the step of the checkpoint, for the calibration of the weights.
        """
        self.config, self.source = config, source
        self._calibration: Calibration | None = None
        self.model = model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = torch.device(device)

    @property
    def shapes(self) -> Shapes:
        """The shape of a record inside and outside the model, and whether records have their own units."""
        channels, height, width = self.model.image_shape
        units = None if self.model.units_scale is None else Units(self.model.missing)
        return Shapes((channels, height, width), self.config.model.record_shape, units)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a table's columns, or numbers if they have none."""
        return self.config.data.columns or tuple(f"column_{number}" for number in range(self.model.image_shape[0]))

    def reconstruct(self, images: Images, batch_size: int = 1000) -> Tensor:
        """Reconstructions from the mean code: images [N, C, H, W] on [0, 1], other records in their units and shape.

        Noisy images come out denoised, and missing entries filled in.
        """
        return self.each(lambda x, rows: self.model.outside(self.model(x, None).reconstruction), images, batch_size)

    def pictures(self, images: Tensor) -> Tensor:
        """Images [..., C, H, W] in their own units as pictures on [0, 1], for the eye."""
        return self.model.visible(self.model.to_units(images.to(self.device))).cpu()

    def contributions(self, images: Images, batch_size: int = 1000) -> Tensor:
        """The squared error of every entry, on the scale of the model, in the shape of the original records.

        Their mean is the ``error`` score. Missing entries contribute 0.
        """

        def squared(x: Tensor, rows: range) -> Tensor:
            error = (self.model(x, None).reconstruction - x).square()
            return torch.where(x.isnan(), 0.0, error) if self.model.missing else error

        errors = self.each(squared, images, batch_size)
        shape = self.config.model.record_shape
        return errors if shape is None else errors.reshape(-1, *shape)

    def embed(self, images: Images, batch_size: int = 1000) -> Tensor:
        """Codes [N, *code_shape]; of a variational model, their means."""
        return self.each(lambda x, rows: self.model.encode(x)[0], images, batch_size)

    def score(self, images: Images, batch_size: int = 1000, score: str | None = None) -> Tensor:
        """Anomaly scores, [N]; higher is more anomalous.

        Args:
            score: ``error``, the squared error per entry of the reconstruction, on [0, 1] or standardized;
                ``neg_elbo``, the negative ELBO in nats of a variational model (one ε keyed by the record's position in
                the call); or ``mahalanobis``, the distance of the code from those of training records. None stands for
                ``neg_elbo`` if the model is variational, else for ``error``.

        Raises:
            InputError: there is no such score for this model, or ``mahalanobis`` lacks its ``calibration()``.
        """
        name = check_score(self.model, score)
        moments = self.calibration().moments if name == "mahalanobis" else None

        def scores(batch: Tensor, rows: range) -> Tensor:
            return score_images(self.model, batch, rows, self.config, (name,), moments)[name]

        return self.each(scores, images, batch_size)

    def threshold(self, quantile: float = 0.99, score: str | None = None) -> float:
        """The score that the share ``quantile`` of the run's validation images does not exceed.

        An image with a higher score is flagged.

        Raises:
            InputError: ``quantile`` is not a share, there is no such score, or no calibration.
        """
        name = check_score(self.model, score)
        return self.calibration().threshold(name, quantile)

    def calibration(self) -> Calibration:
        """The calibration of the scores, which thresholds need: from the run, else computed from its data and saved.

        Raises:
            InputError: the run has none and its data is missing. Says what to do.
        """
        if self._calibration is None and self.source is not None:
            self._calibration = Calibration.of(calibration_files.read(*self.source) or {}, self.model)
        if self._calibration is None:
            try:
                dataset = self.dataset()
            except InputError as error:
                where = "this model" if self.source is None else f"{self.source[0]}, step {self.source[1]}"
                raise InputError(
                    f"{where}: no threshold was saved, and the data to compute it from is missing ({error}). Name its "
                    "folder (--data.root), give --threshold (not enough for mahalanobis), or in Python call "
                    "calibrate(train, normal) of the loaded model"
                ) from None
            self._calibrate(dataset.train, dataset.val)
            if self.source is not None:
                with contextlib.suppress(OSError, Damaged):  # the run may be read-only, or belong to someone else
                    calibration_files.write(*self.source, self.calibration().tensors())
        assert self._calibration is not None
        return self._calibration

    def dataset(self) -> Dataset:
        """The data that the run was trained on.

        Raises:
            InputError: it is missing, or there is other data in its place.
        """
        try:
            dataset = sources.load(self.config.data)
        except InputError as error:
            moved = "; if the images have moved, name their new folder with --data.root"
            raise InputError(f"{error}{moved if ':' in self.config.data.name else ''}") from None
        fingerprint: Any = None
        if self.source is not None:
            with contextlib.suppress(Damaged, KeyError, TypeError):
                fingerprint = read_json(self.source[0] / CONFIG)["trajectory"]["data.fingerprint"]
        if fingerprint not in (None, dataset.fingerprint):
            raise InputError(
                f"{dataset.name} is not what the run was trained on: its images have changed, or are other ones. Name "
                "the folder of the run's images, or their packed form, with --data.root"
            )
        return dataset

    def calibrate(self, train: Images, normal: Images) -> None:
        """Calibrates the scores of this object on these images.

        Args:
            train: images that the model was trained on, for the distribution of their codes.
            normal: normal images that it was not trained on, for the distribution of their scores.
        """
        self._calibrate(self.given(train).split, self.given(normal).split)

    def _calibrate(self, train: Split, held_out: Split) -> None:
        shape = self.model.image_shape
        for split in (train, held_out):
            if split.images.shape[1:] != shape:
                raise InputError(f"the run's model takes images of shape {list(shape)}, got {split.images.shape[1:]}")
        scaling = self._scaling()
        readers = [Reader(split.with_scaling(scaling), self.device) for split in (train, held_out)]
        self._calibration = calibrate(self.model, readers[0], readers[1], self.config, Alone(self.device))

    def _scaling(self) -> Scaling | None:
        """The model's scale as a ``Scaling`` for readers."""
        model = self.model
        if model.units_offset is None or model.units_scale is None:
            return None
        offset, scale = (units.double().cpu().numpy() for units in (model.units_offset, model.units_scale))
        return Scaling(offset, scale, model.standardized, model.missing)

    def sample(self, num: int, seed: int = 0) -> Tensor:
        """New records in the form of ``reconstruct``, decoded from z ~ N(0, I). Equal seeds give equal records.

        Raises:
            InputError: the model is not variational, so its codes have no distribution to draw from.
        """
        if not self.config.model.variational:
            raise InputError("only a variational model can sample: train the vae preset, or --model.variational")
        if num < 1:
            raise InputError(f"the number of samples must be at least 1, got {num}")
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"the seed must be a 64-bit integer, got {seed}")
        self._refuse_too_many(num, "fewer, with several seeds")
        code = normal(seed, "sample", Step(0), range(num), self.model.code_shape, self.device)
        return self.decode(code)

    def _refuse_too_many(self, num: int, way_out: str) -> None:
        """Raises InputError for more images than fit into memory, twice with their codes, since they are joined."""
        size = 2 * math.prod(self.model.image_shape) + 2 * math.prod(self.model.code_shape)
        if 4 * num * size > SHARE_OF_MEMORY * free_memory():
            raise InputError(f"{num:,} images are too many for the memory; take {way_out}")

    def interpolate(self, first: Images, second: Images, steps: int) -> Tensor:
        """Decoded codes on straight lines from each first image's code to its second's, [N, steps, C, H, W].

        The lines begin and end in the reconstructions of the two images.

        Raises:
            InputError: there are fewer than 2 steps, or not as many first images as second ones.
        """
        if not 2 <= steps <= MOST_STEPS:
            raise InputError(
                f"a line has a beginning and an end: steps must be at least 2, and at most {MOST_STEPS:,}, got {steps}"
            )
        first, second = self.given(first), self.given(second)
        self._refuse_too_many(len(first.split) * steps, "fewer pairs or steps")
        if len(first.split) != len(second.split):
            raise InputError(
                f"expected as many first images as second ones, got {len(first.split)} and {len(second.split)}"
            )
        start, end = (self.embed(images)[:, None] for images in (first, second))  # [N, 1, *code_shape]
        weight = torch.linspace(0, 1, steps).view(-1, *(1 for _ in self.model.code_shape))
        codes = torch.lerp(start, end, weight)  # [N, steps, *code_shape]
        decoded = self.decode(codes.flatten(0, 1))
        return decoded.view(-1, steps, *decoded.shape[1:])

    def given(self, images: Images) -> Given:
        """Images in the model's form, with their names if they have any.

        Raises:
            InputError: images are missing, not readable, or not of the model's shape.
        """
        return given(images, self.config.data, self.shapes)

    @torch.no_grad()
    def decode(self, code: Tensor) -> Tensor:
        """codes [N, *code_shape] → records in the form of ``reconstruct``."""
        parts = torch.split(code, at_once(1000, self.model.image_shape))
        return torch.cat(
            [self.model.outside(self.model.decode(part.to(self.device, torch.float32))).cpu() for part in parts]
        )

    @torch.no_grad()
    def each(self, function: Callable[[Tensor, range], Tensor], images: Images, batch_size: int = 1000) -> Tensor:
        """Applies a function to batches [B, C, H, W] on the model's scale and their positions; joins the results."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        records = self.given(images)
        parts = blocks(records, batch_size)
        batches = ((self.model.to_units(floats(records, rows).to(self.device)), rows) for rows in parts)
        return torch.cat([function(batch, rows).float().cpu() for batch, rows in batches])


def load(
    run_dir: Path | str, which: Which = "best", device: torch.device | str = "cpu", model: Builder | None = None
) -> TrainedModel:
    """The same as ``dist_ae.load``, without ``evaluate``, ``explore`` and ``export``, for the commands."""
    if which not in ("last", "best"):
        raise InputError(f"which: expected 'last' or 'best', got {which!r}")
    run_dir = hub.pull(run_dir) if isinstance(run_dir, str) and run_dir.startswith(hub.PREFIX) else expand(run_dir)
    config = run_config(run_dir)
    shape, dtype = image_shape(config, run_dir), devices.weight_type(config.precision)
    if config.model.architecture == "own" or model is not None:
        built = build(config, shape, model).to(dtype)
        saved = saved_weights(run_dir, built, which)
        built.load_state_dict(saved.weights)
    else:  # allocate nothing before the file is known to hold the tensors of the configuration
        built = blank(config, shape).to(dtype)
        saved = saved_weights(run_dir, built, which)
        built.load_state_dict(saved.weights, assign=True)
    return TrainedModel(built, config, device, None if saved.step is None else (run_dir, saved.step))


def images_of(trained: TrainedModel, images: Path | str | None) -> Given:
    """The user's images, or else the run's validation images."""
    if images is not None:
        records = trained.given(images)
        if records.note:
            say(f"note: {records.note}", sys.stderr)
        return records
    dataset = trained.dataset()
    validation = dataset.val
    if validation.images.shape[1:] != trained.model.image_shape:
        raise InputError(
            f"validation images of {shown(trained.config.data.name)}: the run's model takes images of shape "
            f"{list(trained.model.image_shape)}, got {list(validation.images.shape[1:])}"
        )
    return Given(validation, classes=dataset.classes, units=trained.shapes.units)
