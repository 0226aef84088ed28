"""The result of ``dist_ae.load``: a trained model with the same uses as the commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from dist_ae import pca
from dist_ae.config import InputError
from dist_ae.data.given import Given, picked
from dist_ae.data.pictures import expand, shown
from dist_ae.data.reader import Reader
from dist_ae.data.records import Array
from dist_ae.evaluate import evaluate
from dist_ae.models import Builder
from dist_ae.processes.runtime import Alone
from dist_ae.saved import Which
from dist_ae.use import trained
from dist_ae.use.explore import explore_page
from dist_ae.use.explore_records import records_page
from dist_ae.use.program import Part, onnx_bytes, program, torch_bytes
from dist_ae.use.trained import Images, TrainedModel, images_of
from dist_ae.use.whole import reconstructed
from dist_ae.use.write import write_whole

MOST_ON_A_MAP = 10_000


class Model(TrainedModel):
    """A trained autoencoder that can also do what `dist-ae evaluate`, `explore` and `export` do."""

    def evaluate(self, images: Images = None, train: Images = None) -> dict[str, float]:
        """The metrics of a run's result: ``mse``, ``psnr``, … and ``pca_mse``.

        Args:
            images: the images to evaluate on; None: the run's validation images.
            train: the images to fit PCA on; None: the run's training images, unless ``images`` are given: then there
                is no ``pca_mse``.

        Raises:
            InputError: the images do not fit; or none are given, and the run's own are missing.
        """
        alone, dataset = Alone(self.device), self.dataset() if images is None else None
        val = self.given(images).split if dataset is None else dataset.val
        train_split = None if dataset is None else dataset.train
        if train is not None:
            train_split = self.given(train).split
        scaling = self._scaling()
        reader = Reader(val.with_scaling(scaling), self.device)
        metrics = evaluate(self.model, reader, self.config.objective, self.config.evaluation, alone)
        components = None
        if train_split is not None:
            components = pca.of_model(self.model, Reader(train_split.with_scaling(scaling), self.device), alone)
        if components is not None:
            metrics["pca_mse"] = pca.baseline(self.model, components, reader, alone)
        return metrics

    def whole_picture(self, picture: Array) -> Array:
        """The reconstruction of a picture at its own size and type, in bounded memory; it removes noise.

        As `dist-ae denoise --size own`: a convolution that normalizes positions is applied to the whole picture, any
        other model to windows of its own size that fade into each other.

        Args:
            picture: [H, W] or [H, W, C], uint8, uint16 or floats on [0, 1], as from ``np.asarray`` of Pillow's images.

        Raises:
            InputError: the model is not for pictures, or the picture has other channels or another type.
        """
        channels = self.model.image_shape[0]
        if self.model.record_shape is not None or self.model.standardized:
            raise InputError("whole_picture is for models of pictures, and this model is for other records")
        pixels = np.asarray(picture)
        shape = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
        if pixels.ndim not in (2, 3) or shape[2] != channels or 0 in shape:
            raise InputError(f"whole_picture: expected [H, W, {channels}], got {list(pixels.shape)}")
        if pixels.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
            raise InputError(f"whole_picture: expected uint8, uint16 or floats on [0, 1], got {pixels.dtype}")
        whole = reconstructed(self.model, pixels.reshape(shape).transpose(2, 0, 1))
        return whole.transpose(1, 2, 0).reshape(pixels.shape)

    def explore(self, out: Path | str, images: Images = None, num: int = MOST_ON_A_MAP) -> Path:
        """Writes the page of `dist-ae explore`.

        Args:
            out: a name that ends in .html.
            images: the images on the map; None: the run's validation images.
            num: most images on the map.
        """
        target = expand(out)
        if target.suffix != ".html":
            raise InputError(f"out: {shown(target)}: expected a name that ends in .html")
        records = images_of(self, None) if images is None else self.given(images)
        name = target.stem if self.source is None else self.source[0].resolve().name
        page = page_of(self, records, name, [], num)
        return write_whole(target, lambda path: path.write_text(page, encoding="utf-8"))

    @overload
    def export(self, out: None = None, part: Part = "whole") -> torch.export.ExportedProgram: ...

    @overload
    def export(self, out: Path | str, part: Part = "whole") -> Path: ...

    def export(self, out: Path | str | None = None, part: Part = "whole") -> torch.export.ExportedProgram | Path:
        """The deterministic model for other programs: images [N, C, H, W] on [0, 1], for any N, to results.

        Args:
            out: a .pt2 for torch, or a .onnx, which is first compared with torch by onnxruntime; None: return the
                program, which needs torch but not this package.
            part: whole, to the reconstruction, clamped to [0, 1], and the (mean) code [N, *code_shape]; or one half.

        Raises:
            InputError: another ending, a path that cannot be written, or a missing package.
        """
        if out is None:
            return program(self.model, part)
        target = expand(out)
        writers = {".pt2": torch_bytes, ".onnx": onnx_bytes}
        if target.suffix not in writers:
            raise InputError(f"out: {shown(target)}: expected a name that ends in .pt2 or .onnx")
        content = writers[target.suffix](self.model, part)
        return write_whole(target, lambda path: path.write_bytes(content))


def load(
    run_dir: Path | str, which: Which = "best", device: torch.device | str = "cpu", model: Builder | None = None
) -> Model:
    """The trained model of a run directory, or of a folder made by ``dist-ae export --format safetensors``.

    Args:
        run_dir: the run; an exported folder; or ``hf:OWNER/NAME``, an exported folder on the Hugging Face Hub.
        which: "best" by validation, or "last", the newest checkpoint.
        device: where the model computes.
        model: builds the model, for a run that trained a model of your own.

    Raises:
        InputError: there is no such run, or it has no whole checkpoint.
    """
    loaded = trained.load(run_dir, which, device, model)
    return Model(loaded.model, loaded.config, loaded.device, loaded.source)


def page_of(
    model: TrainedModel,
    records: Given,
    name: str,
    lines: Sequence[str],
    num: int,
    onnxruntime_web: Path | None = None,
) -> str:
    """The page of `dist-ae explore` as HTML.

    Args:
        name: the title.
        lines: further lines under the title.
        num: most images on the map; they are evenly spaced.

    Raises:
        InputError: too few images, or an option that does not apply to such records.
    """
    count, config = len(records.split), model.config
    if num < 3:
        raise InputError(f"--num: a map needs at least 3 images, got {num}")
    if count > num:
        records = picked(records, np.linspace(0, count - 1, num).astype(np.int64))
    numbers = torch.Size(model.model.code_shape).numel()
    facts = [f"{config.name} on {shown(config.data.name)}", f"code of {numbers:,} numbers", *lines]
    if count > num:
        facts.append(f"{num:,} of {count:,} images, evenly spaced")
    if config.model.record_shape is None:
        return explore_page(model, records, name, facts, onnxruntime_web)
    if onnxruntime_web is not None:
        raise InputError("--onnxruntime-web is for decoders of images, and the run's records are no images")
    return records_page(model, records, name, facts)
