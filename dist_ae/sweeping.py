"""What a sweep needs of the library beside its public names. Imports no torch before it has something to do."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dist_ae.config import Config, Fault
from dist_ae.files import Damaged, read_bounded, to_json, unique_keys, write_atomically
from dist_ae.terminal import EXIT_STOPPED, first_line, say, time_left
from dist_ae.timeline import selection

if TYPE_CHECKING:
    from dist_ae.data.reader import Reader
    from dist_ae.use.trained import TrainedModel

__all__ = [
    "EXIT_STOPPED",
    "Damaged",
    "Fault",
    "Images",
    "absolute",
    "can_retry",
    "check",
    "code_size",
    "first_line",
    "images_of",
    "pca_errors",
    "probe_accuracy",
    "read_bounded",
    "say",
    "selection",
    "tell_resources",
    "time_left",
    "to_json",
    "unique_keys",
    "wandb_mode",
    "write_atomically",
]

CHUNK = 4096  # images at once


class Images(NamedTuple):
    """What a sweep wants to know of a data set."""

    shape: tuple[int, ...]  # of one image
    num_train: int
    labelled: bool  # training and validation images


def images_of(config: Config) -> Images:
    """Loads the data of a configuration once, to find what is missing before any trial starts.

    Raises:
        InputError: the data, or the run that ``init_from`` names, is not there or not what it should be.
    """
    from dist_ae.data import sources
    from dist_ae.saved import run_config

    dataset = sources.load(config.data)
    if config.init_from is not None:
        run_config(config.init_from)
    labelled = dataset.train.labels is not None and dataset.val.labels is not None
    return Images(dataset.image_shape, len(dataset.train), labelled)


def check(config: Config, image_shape: tuple[int, ...]) -> None:
    """Refuses what this machine, or images of this shape, do not allow, as ``train`` would.

    Raises:
        InputError: with the reason and what to use instead.
    """
    from dist_ae import pca
    from dist_ae.models import blank
    from dist_ae.processes.runtime import check_device

    check_device(config)
    pca.check(config, blank(config, image_shape))


def absolute(name: str) -> str:
    """A ``data.name`` that means the same in any working folder."""
    from dist_ae.data import names

    return names.absolute(name)


def wandb_mode(config: Config) -> str:
    """Whether W&B is online, offline or off on this machine."""
    from dist_ae.run.tracking import wandb_mode

    return wandb_mode(config.tracking)[0]


def tell_resources(cpus: float, gpus: float) -> None:
    """Tells this process what it may use: whole CPUs as threads, and a share of a GPU's memory."""
    import torch

    from dist_ae.devices import SHARED_BY

    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # not every version of Ray hides the GPUs from an actor without any
    else:
        os.environ[SHARED_BY] = str(min(1.0, gpus))  # trials that share a GPU share its memory
    torch.set_num_threads(max(1, int(cpus)))


def code_size(config: Config, image_shape: tuple[int, ...] | None) -> int:
    """How many numbers a code has. Without the shape of the images, ``latent_dim`` stands in for a grid's."""
    from dist_ae.models import blank

    if config.model.architecture == "mlp" or config.model.code == "vector" or image_shape is None:
        return config.model.latent_dim
    return math.prod(blank(config, image_shape).code_shape)


def pca_errors(base: Config, configs: Iterable[Config], noisy: bool) -> dict[int, float]:
    """Squared error per value of the best linear codes on validation images, by the numbers of a code.

    The codes are those of PCA, or for a grid code of PCA of patches.

    Args:
        base: names the data, and the noise of an evaluation.
        configs: models whose linear counterparts are wanted.
        noisy: the error of denoised images; else that of clean ones.
    """
    import torch

    from dist_ae import pca
    from dist_ae.data import sources
    from dist_ae.data.reader import Reader
    from dist_ae.evaluate import fixed_noise
    from dist_ae.models import blank
    from dist_ae.processes.runtime import Alone

    dataset, cpu = sources.load(base.data), torch.device("cpu")
    train, val = Reader(dataset.train, cpu), Reader(dataset.val, cpu)
    sizes: dict[pca.Size | None, dict[int, int]] = {}  # numbers of a code by its size, by that of its patches
    for config in configs:
        code = blank(config, dataset.image_shape).linear_code()
        if code is not None:
            sizes.setdefault(code.patch, {})[code_size(config, dataset.image_shape)] = code.values
    errors: dict[int, float] = {}
    for patch, codes in sizes.items():
        most = pca.vector_size(dataset.image_shape, patch)
        components = pca.principal_components(train, min(max(codes.values()), most), patch, Alone(cpu))
        squared, entries = dict.fromkeys(codes, 0.0), 0
        for start in range(0, len(val.split), CHUNK):
            span = range(start, min(start + CHUNK, len(val.split)))
            images = val.span(span)
            entries += int((~images.isnan()).sum())  # what is missing counts nothing
            noise = fixed_noise(base.evaluation.noise_std, span, images.shape[1:], cpu) if noisy else 0
            for size, values in codes.items():
                leading = components._replace(basis=components.basis[:values])
                decoded = pca.coded(leading, patch, images + noise)[1]
                squared[size] += float((decoded - images).double().square().nansum())
        errors |= {size: min(value / entries, errors.get(size, math.inf)) for size, value in squared.items()}
    return errors


def probe_accuracy(run_dir: Path) -> float:
    """The ``probe_accuracy`` of ``dist-ae evaluate``; NaN where the data has too few labels for one."""
    from dist_ae.processes.runtime import Alone
    from dist_ae.quality import probe
    from dist_ae.use.trained import load

    trained = load(run_dir)
    train, val = _readers(trained)
    batch_size = trained.config.evaluation.batch_size
    figures = probe(trained.model, None, train, val, batch_size, Alone(trained.device))
    return figures.get("probe_accuracy", math.nan)


_READERS: dict[str, tuple[Reader, Reader]] = {}


def _readers(trained: TrainedModel) -> tuple[Reader, Reader]:
    """Training and validation images, kept for the next report: loading them hashes all of them."""
    import torch

    from dist_ae.data.reader import Reader

    data = trained.config.data.model_dump_json()
    if data not in _READERS:
        _READERS.clear()  # of one data set at a time
        dataset, cpu = trained.dataset(), torch.device("cpu")
        _READERS[data] = Reader(dataset.train, cpu), Reader(dataset.val, cpu)
    return _READERS[data]


def can_retry(error: Exception) -> bool:
    """Whether the same call could succeed on another try: the process ran out of memory or storage, or lost a peer."""
    import torch

    from dist_ae.outcome import OutOfMemory
    from dist_ae.processes.watch import LostProcess

    kinds = (MemoryError, OSError, LostProcess, OutOfMemory, torch.distributed.DistError)
    said = re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|out of memory", str(error))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and said is not None)
