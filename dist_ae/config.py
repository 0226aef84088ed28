"""The configuration of an experiment: frozen, checked values.

Imports no torch, so that help and errors are instant.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import reprlib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dist_ae.errors import Fault, InputError
from dist_ae.files import Damaged, plain_name, read_json

__all__ = [
    "Config", "DataConfig", "EvaluationConfig", "Fault", "InputError", "ModelConfig", "ObjectiveConfig", "OptimConfig",
    "Section", "TrackingConfig", "TrainConfig", "load_config", "parse",
]  # fmt: skip


def trajectory(default: Any, description: str, **bounds: Any) -> Any:
    """A field that determines what is computed: a run cannot be resumed with another value."""
    return Field(default, description=description, json_schema_extra={"on_resume": "trajectory"}, **bounds)


def free(default: Any, description: str, **bounds: Any) -> Any:
    """A field that determines where or how often, never what: it may change when a run is resumed."""
    return Field(default, description=description, json_schema_extra={"on_resume": "free"}, **bounds)


def home(path: Path | None) -> Path | None:
    """A path with ``~`` expanded. Shells do not expand it in ``--run-dir=~/runs``."""
    return None if path is None else Path(os.path.expanduser(path))


# Bounds of values, wide enough for every experiment and narrow enough for float32 and for any clock. Beyond them,
# arithmetic would overflow before training begins.
LARGEST, SMALLEST = 1e6, 1e-6
LONGEST = 10**12  # steps, epochs or images
WIDEST = 2**20  # units of a layer
LARGEST_IMAGE = 2**28  # values of one image
LARGEST_SIDE = 4096  # pixels to which a picture is resized
Side = typing.Annotated[int, Field(gt=0, le=2**20)]  # of an image


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        # Raises InputError, naming every wrong key, in place of pydantic's report. No docstring: help would show it.
        try:
            super().__init__(**values)
        except ValidationError as error:
            section = type(self).__name__.removesuffix("Config").lower()
            raise InputError(_explain(error, f"{section}." if section else "")) from None


class DataConfig(Section):
    """The images."""

    name: str = trajectory(
        "digits",
        "digits and photos (embedded), fashion_mnist, mnist, kmnist, cifar10; pictures in folder:PATH, tar:PATTERN or "
        "hf:NAME; table:PATH to CSV or Parquet; packed:PATH; array:PATH to a .npy or .npz; or the path of a folder, "
        "array file, table or packed set",
    )
    root: Path | None = free(
        None, "folder that holds the files of a named dataset; missing ones are downloaded into it"
    )
    val_fraction: float = trajectory(
        0.1,
        "share held out for validation if the data has no split of its own; of pictures, by a hash of their names",
        gt=0,
        lt=1,
    )
    group: str | None = trajectory(
        None,
        "regular expression on the names of pictures: those with the same match (or the same first group of it), such "
        "as one patient, clip or sheet, stay on the same side of the split",
    )
    image_size: int | str | None = trajectory(
        None,
        "size of the pictures in pixels: one number for height and width, or HEIGHTxWIDTH such as 32x128; left out, "
        "all pictures must have the same size",
    )
    fit: Literal["crop", "pad", "stretch", "whole"] | None = trajectory(
        None,
        "how a picture gets its proportions: crop its middle (the default), pad it, or stretch it; whole, the default "
        "with data.crop, keeps its shape, and image_size is its shorter side",
    )
    crop: int | None = trajectory(
        None,
        "side of a square that each step cuts out of each picture at a new place; validation uses fixed places",
        gt=0,
        le=4096,
    )
    flip: bool = trajectory(False, "mirror half of the crops, left to right")
    crops: int | None = trajectory(
        None,
        "crops of each picture in an epoch; left out, as many as fit side by side, at most 64",
        gt=0,
        le=LONGEST,
    )
    budget: float | None = trajectory(
        None,
        "with data.crop, GB of pixels beyond which a set is packed as the bytes of its files, which are decoded when "
        "they are read; left out, it is packed as pixels",
        gt=0,
        le=1e9,
    )
    channels: Literal["auto", "grey", "rgb", "rgba"] | None = trajectory(
        None,
        "colour of pictures; auto, the default: grey if all of them are, else rgb; rgba: transparency is a fourth "
        "channel, and wholly transparent pixels get the background's colour",
    )
    background: str | None = trajectory(
        None, "colour behind transparent and padded pictures, by name or #rrggbb; left out, white"
    )
    bits: Literal["auto", "8", "16"] = trajectory(
        "auto", "bits of a pixel's values; auto: 16 if a picture of the set has more than 8, else 8"
    )
    folds: int | None = trajectory(
        None, "number of runs of a cross-validation, each tested on another part of the data; reports mean and spread",
        ge=2, le=1000,
    )  # fmt: skip
    fold: int | None = trajectory(None, "the fold to hold out, from 1; left out, each in turn", ge=1, le=1000)
    pages: Literal["first", "each", "volume"] = trajectory(
        "first", "pages of a TIFF: only the first, each as a picture, or all as the depth of a volume"
    )
    window: int | None = trajectory(
        None,
        "shuffle within groups of this many shards of a packed set, for disks that read single pictures slowly; "
        "left out, shuffle over all shards",
        gt=0,
        le=LONGEST,
    )
    layout: Literal["auto", "table", "signals", "images", "images-last", "volumes"] = trajectory(
        "auto",
        "axes of an array: table [N, D], signals [N, L] or [N, C, L], images [N, H, W] or [N, C, H, W], images-last "
        "[N, H, W, C], volumes [N, D, H, W] or [N, C, D, H, W]; auto: a table of two, images of three or four axes, "
        "volumes of five",
    )
    scale: Literal["auto", "none", "standard", "range"] = trajectory(
        "auto",
        "standard: mean 0 and deviation 1 of each column or channel over the training part; range: its range becomes "
        "[0, 1]; none: values are on [0, 1]; auto: none for bytes, 16 bits and floats that cover at least a quarter of "
        "[0, 1], else standard",
    )
    missing: Literal["refuse", "mask"] = trajectory(
        "refuse", "what to do about NaN: mask feeds the mean in its place and leaves the entry out of the loss"
    )
    columns: tuple[str, ...] | None = trajectory(None, "columns of a table to use; left out, all numeric ones")
    exclude: tuple[str, ...] = trajectory(
        (), "columns of a table to leave out, or patterns of the names of a folder's pictures, such as 'masks/*'"
    )
    include: tuple[str, ...] = trajectory(
        (), "use only a folder's pictures whose names match one of these patterns, such as 'images/*'; left out, all"
    )
    links: Literal["inside", "follow"] = trajectory(
        "inside",
        "follow also uses pictures that a folder's links lead to, wherever they lie, as in caches of data tools",
    )
    label: str | None = trajectory(None, "column of a table that holds the classes of its rows; it is no input")
    corrupt: Literal["refuse", "skip"] = free("refuse", "what to do about pictures that cannot be read")
    cache: Path | None = free(None, "folder for packed pictures; left out, ~/.cache/dist_ae")

    _home = field_validator("root", "cache")(home)

    @field_validator("image_size", mode="before")
    @classmethod
    def _normalized_size(cls, size: Any) -> int | str | None:
        """A square size as one number, however it is written, so that it has one name in a cache and in a run."""
        if size is None:
            return None
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*[xX×]\s*([0-9]{1,9}))?\s*", str(size))
        sides = [int(side) for side in match.groups() if side is not None] if match else []
        if not sides or not all(0 < side <= LARGEST_SIDE for side in sides):
            raise ValueError(f"expected 1 to {LARGEST_SIDE:,} pixels, or height and width such as 32x128")
        return sides[0] if len(set(sides)) == 1 else f"{sides[0]}x{sides[1]}"

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the pictures."""
        height, _, width = str(self.image_size or "").partition("x")
        return (int(height), int(width or height)) if height else None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if isinstance(self.image_size, str) and (self.crop is not None or self.fit == "whole"):
            reason = "fit whole" if self.crop is None else "crop"
            raise ValueError(
                f"image_size {self.image_size}: with {reason} pictures keep their shape, and image_size is one number, "
                "the shorter side"
            )
        if self.channels == "rgba" and self.bits == "16":
            raise ValueError("channels rgba has 8 bits; leave bits 16 out, or use channels rgb")
        if self.budget is not None and (self.pages != "first" or (self.fit or (self.crop and "whole")) != "whole"):
            raise ValueError("budget keeps whole files: it goes with crop (or fit whole), and with pages first")
        if self.fold is not None and (self.folds is None or self.fold > self.folds):
            raise ValueError(f"fold {self.fold} does not exist: there are {self.folds or 'no'} folds")
        return self


class ModelConfig(Section):
    """The network and its code."""

    architecture: Literal["mlp", "conv", "own"] = trajectory(
        "mlp", "mlp, or conv; own is set by train(config, model=...) from Python"
    )
    latent_dim: int = trajectory(32, "size of the code; for a grid code, its channels", gt=0, le=WIDEST)
    hidden_dims: tuple[typing.Annotated[int, Field(gt=0, le=WIDEST)], ...] = trajectory(
        (512, 256), "hidden layers of the encoder of an mlp; the decoder mirrors them", max_length=100
    )
    widths: tuple[typing.Annotated[int, Field(gt=0, le=WIDEST)], ...] = trajectory(
        (32, 64, 128),
        "channels of a conv at each resolution, finest first; each halves height and width, or a signal's length",
        min_length=1,
        max_length=10,
    )
    blocks: int = trajectory(1, "residual blocks of a conv at each resolution", gt=0, le=100)
    norm: Literal["image", "position"] = trajectory(
        "image",
        "what a conv normalizes over: a whole image, or the channels of each position, so that a code does not depend "
        "on the size of the picture",
    )
    code: Literal["grid", "vector"] = trajectory(
        "grid",
        "code of a conv: one vector, or a grid that is smaller than the image in height and width (a signal in length) "
        "by a factor of 2^len(widths)",
    )
    activation: Literal["relu", "gelu", "silu"] = trajectory("relu", "non-linearity between the layers")
    dropout: float = trajectory(0.0, "probability that a hidden unit of encoder or decoder is dropped", ge=0, lt=1)
    variational: bool = trajectory(
        False, "predict mean and log-variance of a Gaussian over the code, and pay for its rate"
    )
    start: Literal["random", "pca"] = trajectory(
        "random", "initial weights; pca: the best linear code, which training then improves"
    )
    image_shape: tuple[Side, Side, Side] | None = trajectory(None, "channels, height, width; left out, the data's own")
    record_shape: tuple[Side, ...] | None = trajectory(
        None, "shape of a record that is no image: columns, channels and length, or a volume; filled in from the data"
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.image_shape is not None and math.prod(self.image_shape) > LARGEST_IMAGE:
            raise ValueError(f"image_shape {self.image_shape} has more than {LARGEST_IMAGE:,} values")
        if self.record_shape is not None and (
            self.image_shape is None or math.prod(self.record_shape) != math.prod(self.image_shape)
        ):
            raise ValueError(f"record_shape {self.record_shape} does not fit image_shape {self.image_shape}")
        return self


class ObjectiveConfig(Section):
    """The loss, and the noise that is added to the input."""

    likelihood: Literal["gaussian", "laplace", "charbonnier", "bernoulli", "discretized"] = trajectory(
        "gaussian",
        "distribution of a pixel given the code: gaussian is the squared error, laplace the absolute error, "
        "charbonnier an absolute error that is smooth at 0, discretized a logistic over the 256 values of a byte",
    )
    # 8**-0.5 is the tutorial's scale: the distortion is then the squared error, summed over pixels on [-1, 1], up to an
    # additive constant.
    sigma: float | Literal["learned"] = trajectory(
        8**-0.5,
        "standard deviation of a pixel on [0, 1], or 'learned': one parameter, which never falls below the rounding "
        "error of a byte (for other data, 0.0005)",
    )
    noise_std: float | tuple[float, float] = trajectory(
        0.0,
        "standard deviation, on [0, 1] pixels, of the Gaussian noise added to the input; given two numbers, each image "
        "draws its own between them, for noise of unknown strength",
    )
    beta: float = trajectory(1.0, "weight of the rate (KL); 1 is the ELBO", ge=0, le=LARGEST)
    beta_warmup_steps: int = trajectory(
        0, "steps over which the weight of the rate rises linearly to beta", ge=0, le=LONGEST
    )
    ms_ssim: float = trajectory(
        0.0,
        "weight of 1 - MS-SSIM, added to the likelihood, in nats per image; weights of some hundred have an effect",
        ge=0,
        le=LARGEST,
    )
    perceptual: Path | None = free(
        None,
        "a feature network (.pt2 of torch.export, or TorchScript) whose distance, as in LPIPS, is added to the "
        "likelihood: images [N, 3, H, W] on [0, 1] in, features [N, F, h, w] of one or several layers out. It is a "
        "program: use one that you trust",
    )
    perceptual_weight: float = trajectory(1.0, "weight of the perceptual distance, in nats per image", ge=0, le=LARGEST)
    perceptual_sha256: str | None = trajectory(None, "SHA-256 of the feature network; filled in")

    _home = field_validator("perceptual")(home)

    @field_validator("noise_std")
    @classmethod
    def _levels(cls, noise: float | tuple[float, float]) -> float | tuple[float, float]:
        least, most = noise if isinstance(noise, tuple) else (0.0, noise)
        if not 0 <= least <= most <= 100 or (isinstance(noise, tuple) and least == most):
            raise ValueError("expected a standard deviation from 0 to 100, or two of them, the smaller first")
        return noise

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if isinstance(self.sigma, float) and not SMALLEST <= self.sigma <= LARGEST:
            raise ValueError(
                f"sigma must be greater than 0, from {SMALLEST:g} to {LARGEST:g}, or 'learned', got {self.sigma:g}"
            )
        if self.likelihood == "bernoulli" and self.sigma == "learned":
            raise ValueError("sigma='learned' is for gaussian, laplace and discretized; a Bernoulli pixel has no sigma")
        if self.likelihood == "charbonnier" and self.sigma == "learned":
            raise ValueError(
                "sigma='learned' is not for charbonnier; use laplace, which differs from charbonnier only near 0"
            )
        return self


class OptimConfig(Section):
    """How the weights are updated."""

    name: Literal["adam", "adamw", "muon", "sgd"] = trajectory(
        "adam", "muon: Muon on the matrices, Adam with lr_adam on everything else"
    )
    lr: float = trajectory(1e-3, "peak learning rate", ge=1e-30, le=LARGEST)
    lr_adam: float = trajectory(1e-3, "peak learning rate of the Adam part of muon", ge=1e-30, le=LARGEST)
    betas: tuple[float, float] = trajectory((0.9, 0.99), "decay rates of Adam's moments")
    eps: float = trajectory(1e-8, "added to the root of Adam's second moment", ge=1e-30, le=LARGEST)
    momentum: float = trajectory(0.95, "momentum of muon and sgd", ge=0, lt=1)
    weight_decay: float = trajectory(0.0, "weight decay; with muon, of its matrices", ge=0, le=LARGEST)
    schedule: Literal["constant", "linear", "cosine"] = trajectory(
        "constant", "learning rate after the warm-up; linear and cosine end at 0"
    )
    warmup_steps: int = trajectory(0, "steps over which the learning rate rises linearly", ge=0, le=LONGEST)
    clip_norm: float | None = trajectory(
        None, "largest norm of the gradient; larger ones are scaled down", ge=1e-30, le=1e30
    )

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        return self


class TrainConfig(Section):
    """Length of the run, batches, and how often to log, evaluate and save."""

    batch_size: int = trajectory(128, "images of an optimizer step, over all processes", gt=0, le=LONGEST)
    epochs: int = free(20, "passes over the training images", gt=0, le=LONGEST)
    steps: int | None = free(None, "optimizer steps; overrides epochs", gt=0, le=LONGEST)
    ema_decay: float | None = trajectory(
        None,
        "keep an exponential moving average of the weights and evaluate it; its decay begins low and rises to this",
        gt=0,
        lt=1,
    )
    gradient_type: Literal["exact", "bf16"] = trajectory(
        "exact", "how processes exchange gradients; bf16 halves the bytes and rounds the values"
    )
    compile: bool = trajectory(
        False, "compile the model with torch.compile (10 to 30 s at the start); slower on a CPU, not measured on a GPU"
    )
    cuda_graph: Literal["auto", "on", "off"] = free(
        "auto", "run a step as one CUDA graph, equal to the bit; auto: if a trial at the start succeeds"
    )
    max_per_process: int | None = free(
        None, "most images that a process computes at once; a larger share is accumulated", gt=0, le=LONGEST
    )
    log_every: int = free(50, "steps between two lines of training metrics", gt=0, le=LONGEST)
    eval_every: int | None = free(None, "steps between two evaluations; left out, once an epoch", gt=0, le=LONGEST)
    save_every: int | None = free(
        None, "steps between two checkpoints; left out, at every evaluation", gt=0, le=LONGEST
    )
    patience: int | None = free(
        None,
        "number of evaluations without improvement after which training ends; left out, it never ends early",
        gt=0,
        le=LONGEST,
    )
    save_minutes: float | None = free(
        None,
        "minutes between two checkpoints, in addition to those by steps: for machines that can be taken away",
        gt=0,
        le=LARGEST,
    )
    keep: int = free(2, "newest checkpoints to keep, in addition to the best", ge=2, le=LONGEST)
    timeout: float = free(120.0, "seconds without an answer after which a process counts as lost", gt=0, le=LARGEST)


class EvaluationConfig(Section):
    """How the validation images are evaluated."""

    batch_size: int = free(
        1000, "images evaluated at once, over all processes; does not change the results", gt=0, le=LONGEST
    )
    noise_std: float = free(
        0.3, "noise, on [0, 1] pixels, of the fixed noisy copy of the validation images", ge=0, le=100
    )


class TrackingConfig(Section):
    """Weights & Biases and TensorBoard."""

    wandb: Literal["auto", "online", "offline", "off"] = free(
        "auto", "auto: online if a key is configured, else offline"
    )
    project: str = free("dist-ae", "Weights & Biases project")
    group: str | None = free(None, "Weights & Biases group")
    pictures: bool = free(True, "draw the run's pictures")
    tensorboard: bool = free(False, "also write TensorBoard event files into the run directory")


class Config(Section):
    """One experiment. The launcher decides on the hardware; nothing here depends on it."""

    name: str = free("ae", "label of the run; part of the default run directory")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"] = trajectory(
        "auto",
        "arithmetic of the model; auto: bf16 if the machine multiplies it natively, else fp32; a resumed run keeps the "
        "precision it began with; fp64 exists to verify exactness",
    )
    seed: int = trajectory(0, "determines initial weights, data order and every random draw", ge=0, lt=2**63)
    init_from: Path | None = trajectory(
        None,
        "run or exported folder whose weights are the initial weights, in place of model.start; "
        "optimizer and steps begin anew",
    )
    extend: bool = free(
        False,
        "resume a run with a decaying learning rate for more epochs or steps than it began with; --run-dir names it",
    )
    run_dir: Path | None = free(
        None, "folder of the run; left out, runs/<name>-<data>-<fingerprint>. The same command again resumes it"
    )
    profile: str | None = free(
        None, "FROM:TO, steps to profile with torch's profiler, as a Chrome trace and a table in the run directory"
    )

    _home = field_validator("init_from", "run_dir")(home)

    def profiled(self) -> range | None:
        """The steps of ``profile``."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        return range(int(first), int(last))

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.profile is not None and (not re.fullmatch(r"\d{1,12}:\d{1,12}", self.profile) or not self.profiled()):
            raise ValueError(f"profile must be FROM:TO, two step numbers such as 100:110, got {self.profile!r}")
        if self.precision == "fp16" and self.optim.name == "muon":
            raise ValueError(
                "precision fp16 scales the gradient for one optimizer and muon has two; use bf16, or optim.name adam"
            )
        if self.precision == "fp64" and self.train.gradient_type == "bf16":
            raise ValueError(
                "precision fp64 exists to verify exactness, and train.gradient_type bf16 rounds; use one of the two"
            )
        return self

    def override(self, values: Mapping[str, Any]) -> Config:
        """This configuration with dotted keys replaced, e.g. ``{"model.latent_dim": 20}``.

        Raises:
            InputError: an unknown key (with the nearest known ones) or a value out of range, naming the key.
        """
        known = dict(self.flat())
        tree = self.model_dump()
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else f"; the keys are {', '.join(known)}"
                raise InputError(f"unknown configuration key {key!r}{hint}")
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return parse(tree)

    def flat(self) -> Iterator[tuple[str, Any]]:
        """Every field as (dotted key, value)."""
        return ((key, value) for key, value, _ in _walk(self, ""))

    def trajectory_values(self) -> dict[str, Any]:
        """The fields that determine what is computed, JSON-ready. A resumed run must have the same ones."""
        keys = {key for key, _, on_resume in _walk(self, "") if on_resume == "trajectory"}
        tree = self.model_dump(mode="json")
        return {key: _at(tree, key) for key in sorted(keys)}

    def has_draws(self) -> bool:
        """Whether training draws anything at random besides the data order and the initial weights."""
        return bool(self.objective.noise_std or self.model.dropout or self.model.variational)

    def label(self) -> str:
        """Preset, data and a fingerprint of what differs from the defaults: the same name for the same command."""
        # Only what differs, so that a field that is added later leaves the name as it is. The length of the run is part
        # of the name, though not of the trajectory: training longer starts a new run by default.
        defaults = Config().trajectory_values()
        differs = {key: value for key, value in self.trajectory_values().items() if value != defaults[key]}
        if self.precision == "fp32":  # the default before there was `auto`: those runs keep their names
            del differs["precision"]
        for key in ("model.image_shape", "model.record_shape"):  # filled in from the data when training begins
            differs.pop(key, None)
        identity = json.dumps([differs, self.train.epochs, self.train.steps], sort_keys=True)
        data = Path(self.data.name).stem if self.data.name.startswith("array:") else self.data.name
        if not re.fullmatch(r"[\w.-]+", data):  # a path or a pattern
            data = plain_name(data) or "data"
        return f"{self.name}-{data}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def directory(self) -> Path:
        """The run directory: ``run_dir`` if it is set, else ``runs/`` and the run's label."""
        return Path("runs") / self.label() if self.run_dir is None else self.run_dir


def _walk(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str | None]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra
            on_resume = str(extra["on_resume"]) if isinstance(extra, dict) and "on_resume" in extra else None
            yield f"{prefix}{name}", value, on_resume


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def parse(tree: Mapping[str, Any], source: str | None = None) -> Config:
    """A configuration from plain values.

    Raises:
        InputError: naming every wrong key and, with ``source``, the file it came from.
    """
    try:
        return Config.model_validate(tree)
    except InputError as error:
        raise InputError(f"{source}: {error}" if source else str(error)) from None
    except ValidationError as error:
        raise InputError(_explain(error, f"{source}: " if source else "")) from None


def _explain(error: ValidationError, prefix: str) -> str:
    lines = []
    for e in error.errors():
        if str(e["loc"][-1:]).startswith("('tuple["):  # a field of one number or two: pydantic complains twice
            continue
        key = ".".join(str(part) for part in e["loc"] if part not in ("float", "int", "literal['learned']"))
        got = "" if isinstance(e["input"], dict) else f", got {reprlib.repr(e['input'])}"
        where = f"{prefix}{key}".rstrip(": .")  # a check of several keys together has no key of its own
        lines.append(f"{where}: {e['msg'].removeprefix('Value error, ')}{got}".removeprefix(": "))
    return "\n".join(lines)


def load_config(path: Path, follow: bool = True, of_run: bool = False) -> Config:
    """A configuration from a JSON file: a run's ``config.json`` or a sweep's ``best.json``.

    Args:
        follow: follow a link to the file. Only for files that the user named.
        of_run: fill in what older versions did not write: their pictures had 8 bits.
    """
    try:
        tree = read_json(Path(os.path.realpath(path)) if follow else path)
    except Damaged as error:
        raise InputError(f"{path}: not a readable JSON file of a configuration ({error})") from None
    if isinstance(tree.get("config"), dict):
        tree = tree["config"]  # a run's config.json also holds the versions and the number of processes
    if of_run and isinstance(tree.get("data"), dict):
        tree["data"].setdefault("bits", "8")
    return parse(tree, str(path))
