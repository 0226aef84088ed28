"""Checks the input and locks the run directory, before any process group starts."""

from __future__ import annotations

import contextlib
import glob
import platform
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.filesize import decimal

from dist_ae import devices, likeness, pca
from dist_ae.config import Config, InputError
from dist_ae.data import sources
from dist_ae.data.layout import named
from dist_ae.data.memory import NAME, Handed, memory_dataset
from dist_ae.data.names import absolute
from dist_ae.data.pictures import PREFIXES, open_source
from dist_ae.data.reader import free_memory
from dist_ae.data.reads import Reads
from dist_ae.data.records import Dataset, at_once
from dist_ae.draws import VERSION as DRAWS
from dist_ae.files import Damaged, read_json
from dist_ae.models import Autoencoder, Builder, blank, build
from dist_ae.presets import PRESETS
from dist_ae.processes.environment import check_environment, launched_world
from dist_ae.processes.runtime import check_device, usual_precision
from dist_ae.run.directory import RunDirectory
from dist_ae.saved import image_shape, is_exported, run_config, saved_weights
from dist_ae.terminal import say
from dist_ae.timeline import Timeline, learning_rate

MOST_NEIGHBOURS = 100  # most runs beside a new one that are read


class Prepared(NamedTuple):
    """A run whose input has been checked."""

    config: Config  # complete: with the shape of the images and the run directory
    dataset: Dataset
    model: Autoencoder
    timeline: Timeline
    description: dict[str, Any]  # for config.json and the trackers


def prepare(config: Config, data: Handed | None = None, own: Builder | None = None) -> Prepared:
    """Checks the input before any process group starts, and fills in what follows from the data.

    Raises:
        InputError: naming what is wrong and the way out.
    """
    launched_world()
    check_environment()
    check_device(config)
    if config.data.folds is not None and config.data.fold is None:
        raise InputError(
            f"data.folds {config.data.folds} means {config.data.folds} runs; `dist-ae train` and dist_ae.train_folds "
            "train them one after the other, and --data.fold 1 picks one of them"
        )
    # With a full path, a run finds its data from any working folder.
    config = config.override({"data.name": NAME if data is not None else absolute(config.data.name)})
    if own is not None:
        config = config.override({"model.architecture": "own"})
    if (network := config.objective.perceptual) is not None:
        file = {"objective.perceptual": network.resolve(), "objective.perceptual_sha256": likeness.sha256(network)}
        config = config.override(file)
    if data is None and launched_world()[0] == 0:
        # A run directory among the training pictures would add its own pictures to them.
        Reads(config.data.name).refuse(config.directory().resolve(), "--run-dir", folder=True)
        _refuse_early(config)
    dataset = sources.load(config.data) if data is None else memory_dataset(data, config.data)
    if config.model.image_shape not in (None, dataset.image_shape):
        raise InputError(
            f"model.image_shape is {config.model.image_shape}, but the images of {dataset.name} are "
            f"{dataset.image_shape}; with --model.image-shape None it is taken from the data"
        )
    if config.model.architecture == "conv" and dataset.shape is not None and len(dataset.shape) != 2:
        raise InputError(
            f"{dataset.name}: {named(dataset.shape)}, and a convolution takes images and signals; "
            "use --model.architecture mlp, as the preset table does"
        )
    pictures = config.data.name.startswith((*PREFIXES, "packed:"))
    for key, usual in (("bits", "auto"), ("pages", "first")):
        if getattr(config.data, key) != usual and not pictures:
            what = f"data.{key} is for pictures (folder:, tar:, hf:)"
            raise InputError(f"{what}, and {dataset.name} is no source of pictures; leave it out")
    if dataset.scale == "standard" and config.objective.likelihood not in ("gaussian", "laplace"):
        raise InputError(
            f"objective.likelihood {config.objective.likelihood} needs pixels on [0, 1], and the records of "
            f"{dataset.name} are standardized; use gaussian or laplace, or data.scale range"
        )
    likeness.check(config.objective, dataset.image_shape, dataset.shape is None and dataset.scale != "standard")
    config = _with_precision(config)
    label = config.label()
    # The folder is named after the batch that was asked for.
    config = _with_smaller_batch(config.override({"run_dir": config.directory()}), dataset)
    if config.train.batch_size > len(dataset.train):
        raise InputError(
            f"train.batch_size {config.train.batch_size} is larger than the dataset: {dataset.name} has "
            f"{len(dataset.train)} training images; use --train.batch-size {len(dataset.train)} or less"
        )
    evaluated = at_once(config.evaluation.batch_size, dataset.image_shape, launched_world()[1])
    from_data = {
        "model.image_shape": dataset.image_shape,
        "model.record_shape": dataset.shape,
        "data.scale": dataset.scale,
        "data.columns": dataset.columns or None,
        "data.channels": "rgba" if dataset.rgba else config.data.channels,
        "data.pages": "volume" if pictures and dataset.shape is not None else config.data.pages,
        "data.bits": {"uint8": "8", "uint16": "16"}.get(str(dataset.train.images.dtype), "auto")
        if pictures
        else "auto",
        "evaluation.batch_size": evaluated,
    }
    config = config.override(from_data)
    if config.model.architecture != "own":
        _check_memory(config, dataset.image_shape)
    model = build(config, dataset.image_shape, own)
    if dataset.train.scaling is not None:
        assert model.units_offset is not None and model.units_scale is not None
        model.units_offset.copy_(torch.from_numpy(dataset.train.scaling.offset))
        model.units_scale.copy_(torch.from_numpy(dataset.train.scaling.scale))
    if config.extend and launched_world()[0] == 0 and not _has_checkpoint(config.directory()):
        raise InputError(
            f"extend: {config.directory()} holds no run to resume. Name it with --run-dir; "
            "the folder's usual name has the number of epochs in it"
        )
    if config.init_from is None:
        pca.check(config, model)
    elif launched_world()[0] == 0 and not _has_checkpoint(config.directory()):
        _init_from(model, config.init_from)
    # A trained start (PCA, or another run's weights) is evaluated, and stays the best if training does worse.
    trained_start = config.model.start == "pca" or config.init_from is not None
    timeline = Timeline.of(config.train, len(dataset.train), eval_start=trained_start)
    return Prepared(config, dataset, model, timeline, _description(config, label))


def _refuse_early(config: Config) -> None:
    """Checks everything but the data before hours are spent on packing it.

    Raises:
        InputError: as ``prepare`` would raise it with the data at hand.
    """
    begins = launched_world()[0] == 0 and not _has_checkpoint(_with_precision(config).directory())
    if config.init_from is not None and begins:  # a run that is resumed no longer needs the other one
        run_config(config.init_from)
    if config.data.name.startswith("packed:") and (config.data.include or config.data.exclude):
        raise InputError(
            f"{config.data.name} is used as it is packed: leave data.include and data.exclude out, or pack again with "
            "`dist-ae pack --include` or `--exclude`"
        )
    if not config.data.name.startswith(PREFIXES):
        return
    preset, batch = PRESETS.get(config.name), config.train.batch_size
    typed = preset is None or batch != preset.train.batch_size
    is_folder = config.data.name.startswith("folder:")
    count = open_source(config.data.name, config.data).count if is_folder else None
    if count is not None and count < 2:
        raise InputError(
            f"{config.data.name}: {count} picture cannot be split into training and validation; at least 2 are needed"
        )
    if count is not None and typed and batch > count and config.data.crop is None:
        raise InputError(
            f"train.batch_size {batch} is larger than the dataset: {config.data.name} has {count} pictures; use a "
            "smaller --train.batch-size"
        )
    if config.data.image_size is not None and config.model.architecture != "own":
        size = config.data.size if config.data.crop is None else (config.data.crop, config.data.crop)
        assert size is not None
        _check_memory(config, ({"rgb": 3, "rgba": 4}.get(config.data.channels or "", 1), *size))


def _check_memory(config: Config, image_shape: tuple[int, int, int]) -> None:
    """Refuses a model whose weights alone do not fit into memory, before they are allocated."""
    needed = 4 * sum(parameter.numel() for parameter in blank(config, image_shape).parameters())
    if needed > (free := free_memory()):
        raise InputError(
            f"the weights of this model take {decimal(needed)}, and {decimal(free)} of memory are free; lower "
            "model.latent_dim, model.hidden_dims or model.widths"
        )


def _with_precision(config: Config) -> Config:
    """Replaces the precision ``auto`` by the one that the run began with; a new run gets this machine's.

    Looks for the run under its name with either precision. Only rank 0 sees the directory; ``Runtime`` hands its choice
    to the other ranks.
    """
    if config.precision != "auto":
        return config
    usual = usual_precision()
    choices = [config.override({"precision": p}) for p in (usual, "fp32" if usual == "bf16" else "bf16")]
    if launched_world()[0] == 0:
        for choice in choices:
            with contextlib.suppress(Damaged):
                stored = _stored_trajectory(read_json(choice.directory() / "config.json"))
                if stored.get("precision") == choice.precision:
                    return choice
    return choices[0]


def _with_smaller_batch(config: Config, dataset: Dataset) -> Config:
    """Lowers a preset's batch that is larger than the data set to a tenth of the set. A typed batch is kept."""
    preset = PRESETS.get(config.name)
    batch = config.train.batch_size
    if preset is None or batch <= len(dataset.train) or batch != preset.train.batch_size:
        return config
    fewer = max(1, len(dataset.train) // 10)
    if launched_world()[0] == 0:
        say(
            f"note: {dataset.name} has {len(dataset.train)} training images, so a step sees {fewer} in place of the "
            f"preset's {batch}; --train.batch-size sets another number"
        )
    return config.override({"train.batch_size": fewer})


def _has_checkpoint(run_dir: Path) -> bool:
    """Whether a run directory has a checkpoint to resume from."""
    return any((run_dir / "checkpoints").glob("[0-9]*"))


def _init_from(model: Autoencoder, source: Path) -> None:
    """Fills a new model with the weights of a trained one.

    Raises:
        InputError: there is no such run, or its tensors have other names or shapes; a learned σ may come or go.
    """
    other = run_config(source)
    shape = image_shape(other, source)
    twin = model if other.model.architecture == "own" else blank(other, shape)
    twin = twin.to(devices.weight_type(other.precision))
    weights = saved_weights(source, twin).weights
    own = model.state_dict()
    differing = [
        f"{name} is {list(own[name].shape) if name in own else 'missing'} here, "
        f"{list(weights[name].shape) if name in weights else 'missing'} there"
        for name in sorted((own.keys() | weights.keys()) - {"log_sigma"})
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if differing:
        others = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"init_from {source}: its weights do not fit this model: {'; '.join(differing[:3])}{others}. "
            "Architecture, widths, size of the code and shape of the images must be the same"
        )
    model.load_state_dict({**own, **{name: weights[name] for name in own.keys() & weights.keys()}})


@contextlib.contextmanager
def claimed(prepared: Prepared) -> Iterator[RunDirectory | None]:
    """The locked run directory on rank 0, None on the others.

    Raises:
        InputError: it is in use, cannot be written, or holds another experiment.
    """
    config = prepared.config
    if launched_world()[0] != 0:
        yield None
        return
    if is_exported(config.directory()):
        raise InputError(f"{config.directory()} is an exported model: --init-from it, and train in another --run-dir")
    folder = RunDirectory(config.directory())
    try:
        _claim(folder, prepared)
        yield folder
    finally:
        folder.close()


def _claim(folder: RunDirectory, prepared: Prepared) -> None:
    """Makes the folder this experiment's, or checks that it is.

    Raises:
        InputError: it holds another experiment, or one that this version cannot go on with.
    """
    config, fingerprint = prepared.config, prepared.dataset.fingerprint
    stored = folder.read("config.json")
    if stored is not None and config.has_draws() and stored.get("draws", 1) != DRAWS:
        raise InputError(
            f"run directory {folder.path} was begun with version {stored.get('draws', 1)} of the random draws, and "
            f"this is version {DRAWS}: its noise, masks or ε would change in the middle. It can be evaluated and used "
            "as it is; to train, choose another --run-dir"
        )
    trajectory = {**config.trajectory_values(), "data.fingerprint": fingerprint}
    may_change: list[str] = []
    if _stored_trajectory(stored).get("data.fingerprint") == fingerprint:
        may_change.append("data.name")  # the same images in another place
    if config.optim.schedule != "constant":
        # The schedule ends at the last step, so another length means other learning rates from the start.
        trajectory["total_steps"] = prepared.timeline.total_steps
        if config.extend:
            _say_extension(folder, config, stored, trajectory["total_steps"])
            may_change.append("total_steps")
    if stored is None and config.init_from is None:
        _say_another_length(folder, config, trajectory)
    # A field that an older version did not know has its default, which means "as it was". All data was on [0, 1]
    # then, and the fingerprint tells how many bits it had.
    unknown = {**Config().trajectory_values(), "data.scale": "none", "data.bits": config.data.bits}
    folder.claim(trajectory, prepared.description, unknown=unknown, may_change=may_change)


def _say_another_length(folder: RunDirectory, config: Config, trajectory: Mapping[str, Any]) -> None:
    """Says so if a folder beside this one holds the same experiment with another number of steps: it can go on."""
    length = ("total_steps",)
    wanted = {key: value for key, value in trajectory.items() if key not in length}
    for path in sorted(folder.path.parent.glob(f"{glob.escape(config.name)}-*/config.json"))[:MOST_NEIGHBOURS]:
        other: dict[str, Any] = {}
        with contextlib.suppress(Damaged):
            other = _stored_trajectory(read_json(path))
        steps = max(
            map(int, (each.name for each in path.parent.glob("checkpoints/[0-9]*") if each.name.isdigit())), default=0
        )
        same = {key: value for key, value in other.items() if key not in length} == wanted
        if same and steps > 0 and path.parent != folder.path:
            extend = "" if config.optim.schedule == "constant" else " --extend"
            say(
                f"note: a new run begins. {path.parent} holds the same experiment at step {steps}; this command with "
                f"--run-dir {shlex.quote(str(path.parent))}{extend} trains that one on"
            )
            return


def _stored_trajectory(stored: dict[str, Any] | None) -> dict[str, Any]:
    """The trajectory in a run's config.json; empty if there is none, or if it is damaged."""
    trajectory = (stored or {}).get("trajectory")
    return trajectory if isinstance(trajectory, dict) else {}


def _say_extension(folder: RunDirectory, config: Config, stored: dict[str, Any] | None, total: int) -> None:
    """Says how the learning rate of an extended run changes.

    Raises:
        InputError: the run was longer.
    """
    before, step = _stored_trajectory(stored).get("total_steps"), folder.newest_step()
    if not isinstance(before, int) or step is None:  # `claim` says what is wrong with it
        return
    if before > total:
        raise InputError(f"extend: the run in {folder.path} has {before} steps, more than the {total} asked for")
    if before < total:
        was, becomes = (learning_rate(step, steps, config.optim) for steps in (before, total))
        say(
            f"extended from {before} to {total} steps: at step {step} the learning rate goes from {was:.0%} to "
            f"{becomes:.0%} of its peak. The result is not that of a run of {total} steps from the start"
        )


def _description(config: Config, label: str) -> dict[str, Any]:
    """The resolved configuration, the versions and the number of processes, for config.json and the trackers.

    Args:
        label: the run's name, from what was asked for and not from what the data turned out to be.
    """
    import accelerate

    versions = {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}
    # ``extend`` holds for this start only; --config with this file begins a run of its own.
    tree, world = config.override({"extend": False}).model_dump(mode="json"), launched_world()[1]
    return {"config": tree, "label": label, "draws": DRAWS, "versions": versions, "world_size": world}
