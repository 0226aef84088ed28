"""Reconstructions as files: arrays, pictures, folders of pictures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_ae.config import InputError
from dist_ae.data.given import Given, blocks, file_names, floats
from dist_ae.data.pictures import colour_of, shown
from dist_ae.data.reads import Reads
from dist_ae.data.records import Array
from dist_ae.evaluate import fixed_noise
from dist_ae.use.trained import TrainedModel
from dist_ae.use.write import SHOWN, write_array, write_folder, write_table, write_whole

TABLES = (".csv", ".parquet")
TIFF = (".tif", ".tiff")


def forms(trained: TrainedModel, name: str, out: Path | None) -> tuple[str, tuple[str, ...]]:
    """The default file of reconstructions, and the endings of all their possible formats.

    Raises:
        InputError: ``out`` is a folder for pictures, and the model's output is no pictures.
    """
    shape, channels = trained.config.model.record_shape, trained.model.image_shape[0]
    if shape is None:
        is_colour = colour_of(trained.config.data, channels) is not None
        reason = "" if is_colour else f"the model's images have {channels} channels"
        if not reason and trained.model.units_scale is not None and trained.config.data.bits == "auto":
            reason = "the model's images have units of their own"  # pictures have the numbers in their files
        if reason and out is not None and not out.suffix:
            raise InputError(
                f"--out {shown(out)}: {reason}, and files of pictures hold grey or colour on [0, 1]; name a .npy, "
                "which holds all of them, or a .png, which shows the first channel"
            )
        return f"{name}.npy", (".npy", ".png") if reason else (".npy", ".png", "")
    return (f"{name}.csv", (*TABLES, ".npy")) if len(shape) == 1 else (f"{name}.npy", (".npy",))


def write_reconstructions(
    trained: TrainedModel, records: Given, out: Path, reads: Reads, before: str, after: str, noise_std: float = 0.0
) -> Path:
    def inputs(rows: range) -> Tensor:
        clean = floats(records, rows)
        if not noise_std:
            return clean
        scale = 1.0 if trained.model.units_scale is None else trained.model.units_scale.cpu()
        return clean + scale * fixed_noise(noise_std, rows, clean.shape[1:], clean.device)

    def outputs(rows: range) -> Tensor:
        return trained.reconstruct(inputs(rows))

    if out.suffix == ".png":
        shown = range(min(SHOWN, len(records.split)))
        rows = {before: inputs(shown), after: outputs(shown)}
        if noise_std:
            rows["clean"] = floats(records, shown)
        rows = {name: trained.pictures(images) for name, images in rows.items()}

        def draw(path: Path) -> None:
            from dist_ae.figures import image_rows  # here, since matplotlib takes a second to import

            image_rows(rows, path)

        return write_whole(out, draw)
    parts = blocks(records)
    if out.suffix == ".npy":
        return write_array(out, torch.cat([outputs(rows) for rows in parts]))
    if out.suffix in TABLES:
        values = torch.cat([outputs(rows) for rows in parts])
        return write_table(out, records, dict(zip(trained.columns, values.unbind(1), strict=True)))
    dtype = np.uint16 if trained.config.data.bits == "16" else records.split.images.dtype
    grey = trained.model.image_shape[0] == 1
    names = file_names(records, TIFF if dtype == np.uint16 and grey else ())
    pairs = (
        (names[row], image)
        for rows in parts
        for row, image in zip(rows, stored(trained, outputs(rows), np.dtype(dtype)), strict=True)
    )
    return write_folder(out, pairs, reads)


def stored(trained: TrainedModel, images: Tensor, dtype: np.dtype[Any]) -> Array:
    """Reconstructions [B, C, H, W] as the pixels of a picture file: uint16 if ``dtype`` is, else uint8."""
    whole = np.dtype(np.uint16) if dtype == np.uint16 else np.dtype(np.uint8)
    most = np.iinfo(whole).max
    in_units = trained.model.units_scale is not None and dtype == whole  # units are the stored numbers
    values = images if in_units else trained.pictures(images) * float(most)
    return values.round().clamp(0, most).numpy().astype(whole)
