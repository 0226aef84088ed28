"""The functions that sweeps need besides the library's public names. Imports torch only once it is needed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_ae.config import Config, Fault
from dist_ae.errors import install
from dist_ae.files import Damaged, read_bounded, to_json, unique_keys, write_atomically
from dist_ae.terminal import EXIT_STOPPED, first_line, say
from dist_ae.timeline import selection

if TYPE_CHECKING:
    from torch import Tensor

    from dist_ae.data.reader import Reader
    from dist_ae.use.trained import TrainedModel

__all__ = [
    "EXIT_STOPPED",
    "Damaged",
    "Fault",
    "Images",
    "Linear",
    "absolute",
    "can_retry",
    "check",
    "code_size",
    "first_line",
    "images_of",
    "install",
    "probe_accuracy",
    "read_bounded",
    "say",
    "selection",
    "tell_resources",
    "to_json",
    "track_sweep",
    "unique_keys",
    "wandb_mode",
    "write_atomically",
]

CHUNK = 4096  # images at once
PICTURED = 8  # images in the picture that compares the answer with PCA


class Images(NamedTuple):
    """Facts about a data set that a sweep checks."""

    shape: tuple[int, ...]  # of one image
    num_train: int
    labelled: bool  # training and validation images


def images_of(config: Config) -> Images:
    """Loads the data of a configuration once, to find what is missing before any trial starts.

    Raises:
        InputError: the data, or the run that ``init_from`` names, is missing or damaged.
    """
    from dist_ae.data import sources
    from dist_ae.saved import run_config

    dataset = sources.load(config.data)
    if config.init_from is not None:
        run_config(config.init_from)
    labelled = dataset.train.labels is not None and dataset.val.labels is not None
    return Images(dataset.image_shape, len(dataset.train), labelled)


def check(config: Config, image_shape: tuple[int, ...]) -> None:
    """Refuses a configuration that this machine, or images of this shape, do not allow, as ``train`` would.

    Raises:
        InputError: with the reason and what to use instead.
    """
    from dist_ae import pca
    from dist_ae.models import blank
    from dist_ae.processes.runtime import check_device

    check_device(config)
    pca.check(config, blank(config, image_shape))


def absolute(name: str) -> str:
    """A ``data.name`` with an absolute path, valid in any working folder."""
    from dist_ae.data import names

    return names.absolute(name)


def wandb_mode(config: Config) -> str:
    """Whether W&B is online, offline or off on this machine."""
    from dist_ae.run.tracking import wandb_mode

    return wandb_mode(config.tracking)[0]


def track_sweep(
    config: Config,
    folder: Path,
    name: str,
    run_id: str,
    summary: Mapping[str, float | str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    again: str,
) -> None:
    """Logs the answer of a sweep to a W&B run in the group of its trials, and prints its link or ``wandb sync`` line.

    Args:
        config: the answer; its ``tracking`` names the project, and whether W&B is online.
        folder: the sweep's folder, with report.html.
        run_id: the same whenever the sweep is reported again.
        tables: rows of cells by column.
        again: the command that reports the sweep again.
    """
    from dist_ae.run.tracking import Tracking

    tracking = config.tracking.model_copy(update={"group": name, "tensorboard": False})
    parts = [f"{part}wandb/offline-run-*" for part in ("trials/*/", "trials/*/generation-*/", "confirm/trials/*/")]
    description, tags = {"config": config.model_dump(mode="json")}, ("sweep", "summary")
    lost = f"report.html and trials.csv are complete, and this sends them again: {again}"
    with Tracking(tracking, folder, f"{name}-summary", run_id, description, say, tags, parts, lost) as trackers:
        trackers.summarize(summary)
        trackers.log_page("report", folder / "report.html", tables)


def tell_resources(cpus: float, gpus: float) -> None:
    """Limits this process to its resources: whole CPUs as threads, and a share of a GPU's memory."""
    import torch

    from dist_ae.devices import SHARED_BY

    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # not every version of Ray hides the GPUs from an actor without any
    else:
        os.environ[SHARED_BY] = str(min(1.0, gpus))  # trials that share a GPU share its memory
    torch.set_num_threads(max(1, int(cpus)))


def code_size(config: Config, image_shape: tuple[int, ...] | None) -> int:
    """The numbers of a code. Without the shape of the images, ``latent_dim`` is returned for a grid code."""
    from dist_ae.models import blank

    if config.model.architecture == "mlp" or config.model.code == "vector" or image_shape is None:
        return config.model.latent_dim
    return math.prod(blank(config, image_shape).code_shape)


class Linear:
    """The best linear codes of some data, as a baseline for models: PCA, or PCA of patches for a grid code."""

    def __init__(self, base: Config, configs: Iterable[Config]) -> None:
        """Args:
        base: the configuration of the data, and of the noise in evaluations.
        configs: the models whose linear counterparts to compute.
        """
        import torch

        from dist_ae import pca
        from dist_ae.data import sources
        from dist_ae.data.reader import Reader
        from dist_ae.models import blank
        from dist_ae.models.interface import Components
        from dist_ae.processes.runtime import Alone

        cpu = torch.device("cpu")
        self._base, self._dataset = base, sources.load(base.data)
        train, self._val = Reader(self._dataset.train, cpu), Reader(self._dataset.val, cpu)
        self._values: dict[
            pca.Size | None, dict[int, int]
        ] = {}  # values per patch, by patch size and by the size of the whole code
        for config in configs:
            code = blank(config, self._dataset.image_shape).linear_code()
            if code is not None:
                self._values.setdefault(code.patch, {})[code_size(config, self._dataset.image_shape)] = code.values
        self._components: dict[pca.Size | None, Components] = {}
        for patch, codes in self._values.items():
            most = min(max(codes.values()), pca.vector_size(self._dataset.image_shape, patch))
            self._components[patch] = pca.principal_components(train, most, patch, Alone(cpu))

    def _coded(self, patch: tuple[int, int] | None, values: int, images: Tensor) -> Tensor:
        from dist_ae import pca

        components = self._components[patch]
        return pca.coded(components._replace(basis=components.basis[:values]), patch, images)[1]

    def errors(self, noisy: bool) -> dict[int, float]:
        """Squared error per value of validation images, by code size.

        Args:
            noisy: measure denoised images; else clean ones.
        """
        errors: dict[int, float] = {}
        for patch, codes in self._values.items():
            squared, entries = dict.fromkeys(codes, 0.0), 0
            for start in range(0, len(self._val.split), CHUNK):
                images, inputs = self._images(range(start, min(start + CHUNK, len(self._val.split))), noisy)
                entries += int((~images.isnan()).sum())  # missing entries do not count
                for size, values in codes.items():
                    squared[size] += float((self._coded(patch, values, inputs) - images).double().square().nansum())
            errors |= {size: min(value / entries, errors.get(size, math.inf)) for size, value in squared.items()}
        return errors

    def _images(self, span: range, noisy: bool) -> tuple[Tensor, Tensor]:
        """Validation images, and the input of a model for them."""
        from dist_ae.evaluate import fixed_noise

        images = self._val.span(span)
        if not noisy:
            return images, images
        return images, images + fixed_noise(self._base.evaluation.noise_std, span, images.shape[1:], images.device)

    def picture(self, run_dir: Path, noisy: bool, path: Path) -> bool:
        """Draws validation images, their reconstructions by a run, and by PCA with a code of the same size.

        For records that are no images, draws r2 by column. Returns False if there is no such run, or no PCA.
        """
        import torch

        from dist_ae import figures
        from dist_ae.config import InputError
        from dist_ae.processes.runtime import Alone
        from dist_ae.quality import by_channel
        from dist_ae.use.trained import load

        try:
            model = load(run_dir).model
        except (InputError, Damaged, OSError):
            return False
        code = model.linear_code()
        if code is None or code.patch not in self._components:
            return False
        if model.record_shape is not None:
            if not model.standardized:
                return False
            leading = self._components[code.patch]
            leading = leading._replace(basis=leading.basis[: code.values])
            scores = by_channel(model, leading, self._val, CHUNK, Alone(torch.device("cpu")))
            names = self._dataset.columns or [f"channel {number}" for number in range(model.image_shape[0])]
            figures.columns_beside({name: (scores["r2"][i], scores["pca_r2"][i]) for i, name in enumerate(names)}, path)
            return True
        images, inputs = self._images(range(min(PICTURED, len(self._val.split))), noisy)
        with torch.no_grad():
            reconstruction = model(inputs, None).reconstruction
        linear, name = self._coded(code.patch, code.values, inputs), "PCA" if code.patch is None else "patch PCA"
        rows = {"original": images} | ({"noisy": inputs} if noisy else {})
        rows |= {"the answer": reconstruction, name: linear}
        shown = {label: model.visible(values) for label, values in rows.items()}
        figures.image_rows(shown, path)
        return True


def probe_accuracy(run_dir: Path) -> float:
    """The ``probe_accuracy`` of ``dist-ae evaluate``; NaN if the data has too few labels for one."""
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
    """Training and validation images, cached for the next report, since loading them hashes all of them."""
    import torch

    from dist_ae.data.reader import Reader

    data = trained.config.data.model_dump_json()
    if data not in _READERS:
        _READERS.clear()  # holds one data set at a time
        dataset, cpu = trained.dataset(), torch.device("cpu")
        _READERS[data] = Reader(dataset.train, cpu), Reader(dataset.val, cpu)
    return _READERS[data]


def can_retry(error: Exception) -> bool:
    """Whether a retry could succeed: the process ran out of memory or storage, or lost a peer."""
    import torch

    from dist_ae.outcome import OutOfMemory
    from dist_ae.processes.watch import LostProcess

    kinds = (MemoryError, OSError, LostProcess, OutOfMemory, torch.distributed.DistError)
    lost_peer = re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|out of memory", str(error))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and lost_peer is not None)
