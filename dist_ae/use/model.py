"""What ``dist_ae.load`` gives: a trained model with the uses that are commands, too."""

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
    """A trained autoencoder, with what `dist-ae evaluate`, `explore` and `export` do."""

    def evaluate(self, images: Images = None, train: Images = None) -> dict[str, float]:
        """The figures of a run's result: ``mse``, ``psnr``, … and ``pca_mse``.

        Args:
            images: what to evaluate on; None: the run's validation images.
            train: the images that PCA is fitted on. Without them, as where ``images`` are given, there is no
                ``pca_mse``.

        Raises:
            InputError: images that do not fit; or none are given, and the run's own are not there.
        """
        alone, own = Alone(self.device), self.dataset() if images is None else None
        val = self.given(images).split if own is None else own.val
        known = self.given(train).split if train is not None else None if own is None else own.train
        scaling = self._scaling()
        reader = Reader(val.with_scaling(scaling), self.device)
        found = evaluate(self.model, reader, self.config.objective, self.config.evaluation, alone)
        components = None
        if known is not None:
            components = pca.of_model(self.model, Reader(known.with_scaling(scaling), self.device), alone)
        if components is not None:
            found["pca_mse"] = pca.baseline(self.model, components, reader, alone)
        return found

    def whole_picture(self, picture: Array) -> Array:
        """What the model makes of one picture at its own size, in bounded memory: its size and type, noise taken out.

        As `dist-ae denoise --size own`: a convolution that normalizes positions gives its result for the whole picture,
        any other model windows of its own size that fade into each other.

        Args:
            picture: [H, W] or [H, W, C], uint8, uint16 or floats on [0, 1], as ``np.asarray`` makes of Pillow's.

        Raises:
            InputError: the model is of records that are no pictures, or the picture has other channels or another type.
        """
        channels = self.model.image_shape[0]
        if self.model.record_shape is not None or self.model.standardized:
            raise InputError("whole_picture is for models of pictures, and this one is of other records")
        found = np.asarray(picture)
        shape = found.shape if found.ndim == 3 else (*found.shape, 1)
        if found.ndim not in (2, 3) or shape[2] != channels or 0 in shape:
            raise InputError(f"whole_picture: expected [H, W, {channels}], got {list(found.shape)}")
        if found.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
            raise InputError(f"whole_picture: expected uint8, uint16 or floats on [0, 1], got {found.dtype}")
        whole = reconstructed(self.model, found.reshape(shape).transpose(2, 0, 1))
        return whole.transpose(1, 2, 0).reshape(found.shape)

    def explore(self, out: Path | str, images: Images = None, num: int = MOST_ON_A_MAP) -> Path:
        """Writes the page of `dist-ae explore`.

        Args:
            out: a name that ends in .html.
            images: what the map shows; None: the run's validation images.
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
            out: a .pt2 for torch, or a .onnx, which is compared with torch by onnxruntime first; None: the program
                itself, which needs torch and nothing from this package.
            part: whole, to the reconstruction, clamped to [0, 1], and the (mean) code [N, *code_shape]; or one half.

        Raises:
            InputError: another ending, a place that cannot be written, or a package that is missing.
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
    """The trained model of a run directory, or of a folder that ``dist-ae export --format safetensors`` made.

    Args:
        run_dir: the run; an exported folder; or ``hf:OWNER/NAME``, such a folder on the Hugging Face Hub.
        which: "best" by validation, or "last", the newest checkpoint.
        device: where the model computes.
        model: builds the model, for a run that trained a model of your own.

    Raises:
        InputError: there is no such run, or it has no whole checkpoint.
    """
    found = trained.load(run_dir, which, device, model)
    return Model(found.model, found.config, found.device, found.source)


def page_of(
    one: TrainedModel, records: Given, name: str, more: Sequence[str], num: int, onnxruntime_web: Path | None = None
) -> str:
    """The page of `dist-ae explore` as HTML.

    Args:
        name: its title.
        more: further lines under it.
        num: most images on the map; they are evenly spaced.

    Raises:
        InputError: too few images, or what does not belong to such records.
    """
    count, config = len(records.split), one.config
    if num < 3:
        raise InputError(f"--num: a map needs at least 3 images, got {num}")
    if count > num:
        records = picked(records, np.linspace(0, count - 1, num).astype(np.int64))
    numbers = torch.Size(one.model.code_shape).numel()
    facts = [f"{config.name} on {shown(config.data.name)}", f"code of {numbers:,} numbers", *more]
    if count > num:
        facts.append(f"{num:,} of {count:,} images, evenly spaced")
    if config.model.record_shape is None:
        return explore_page(one, records, name, facts, onnxruntime_web)
    if onnxruntime_web is not None:
        raise InputError("--onnxruntime-web is for the decoder of images, and the run's records are none")
    return records_page(one, records, name, facts)
