"""Search spaces as data: dotted configuration keys → distributions.

Imports neither torch nor ray, so that errors come at once.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import random
import re
import reprlib
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dist_ae import PRESETS, Config, InputError
from dist_ae.sweeping import Damaged, read_bounded, unique_keys

Values = dict[str, Any]  # dotted configuration key → value

GRID_POINTS = 4  # values of a range in --search grid, including both ends
MAX_TRIALS = 10_000  # each trial is a folder, and all folders are read again for every ranking
MAX_BYTES = 2**20  # of a space file
MAX_VALUES = 10_000  # each value of a space is checked before the sweep starts, at about 0.1 ms each

# The metrics that trials may be judged by. None of them depends on the searched settings.
Metric = Literal["val.mse", "val.denoised_psnr", "val.neg_elbo", "val.probe_accuracy"]
METRICS: dict[Metric, tuple[int, str]] = {  # (+1 if larger is better, else -1; description)
    "val.mse": (
        -1,
        "squared error of clean validation images, per pixel on [0, 1]; for tables a share of variance",
    ),
    "val.denoised_psnr": (1, "PSNR in dB of denoised validation images, with the same noise for every trial"),
    "val.neg_elbo": (-1, "negative ELBO at β = 1, nats per image"),
    "val.probe_accuracy": (1, "accuracy of a linear probe on the code"),
}

# Searching these would change the question (or the place of the answer) from trial to trial, not the answer.
FIXED = ("data.", "evaluation.", "tracking.", "name", "run_dir", "model.variational", "model.image_shape")

# Keys whose option means something else in a sweep, which has its own name and seed and many run directories.
OWN = ("name", "seed", "run_dir")

# Settings that population-based training can change in the middle of a trial: a checkpoint's tensors fit any value.
MUTABLE: tuple[str, ...] = ("optim.lr", "optim.lr_adam", "optim.weight_decay", "optim.clip_norm", "optim.momentum")
MUTABLE += ("objective.noise_std", "objective.beta", "model.dropout")

_FIELDS = dict(Config().flat())  # every configuration key, with its default

IMAGE_SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "photos": (3, 64, 64)}
IMAGE_SHAPES |= dict.fromkeys(("fashion_mnist", "mnist", "kmnist"), (1, 28, 28))

Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True, gt=-(2**63), lt=2**63)]


class Distribution(BaseModel):
    """A ``choice`` of listed values, or a range ``[low, high]``, ends included. Exactly one of them is set.

    Ranges are ``uniform`` and ``loguniform``, and over whole numbers ``randint`` and ``lograndint``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    choice: list[Any] = Field([], min_length=1)
    uniform: list[Real] = Field([], min_length=2, max_length=2)
    loguniform: list[Real] = Field([], min_length=2, max_length=2)
    randint: list[Whole] = Field([], min_length=2, max_length=2)
    lograndint: list[Whole] = Field([], min_length=2, max_length=2)

    @model_validator(mode="after")
    def _check(self) -> Distribution:
        kinds = Distribution.model_fields
        if len(self.model_fields_set) != 1 or self.kind not in kinds:
            hint = 'as in "optim.lr" = {loguniform = [1e-4, 1e-2]}, with the whole key in quotes'
            raise ValueError(f"expected one of {', '.join(kinds)} with its values, {hint}")
        if self.kind == "choice":
            return self
        low, high = self.values
        if low >= high:
            raise ValueError(f"the range {[low, high]} is empty; low must be less than high")
        if not math.isfinite(high - low):
            raise ValueError(f"the range {[low, high]} is wider than a finite number can be; narrow it")
        if "log" in self.kind and low <= 0:
            plain = self.kind.removeprefix("log")
            raise ValueError(f"{self.kind} needs low > 0, got {low}; use {plain} for a range that holds 0")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_fields_set), "")

    @property
    def values(self) -> list[Any]:
        """The values of a choice, or the two ends of a range."""
        values: list[Any] = getattr(self, self.kind)
        return values

    def sample(self, rng: random.Random) -> Any:
        """Draws one value."""
        if self.kind == "choice":
            return rng.choice(self.values)
        return rng.randint(*self.values) if self.kind == "randint" else self.clip(self.at(rng.random()))

    def grid(self) -> list[Any]:
        """All values of a choice; ``GRID_POINTS`` evenly spaced values of a range, or of its logarithm."""
        if self.kind == "choice":
            return self.values
        inner = (self.clip(self.at(i / (GRID_POINTS - 1))) for i in range(1, GRID_POINTS - 1))
        return list(dict.fromkeys([self.values[0], *inner, self.values[1]]))

    def at(self, share: float) -> Any:
        """The value at a share of a range, or of its logarithm. Shares below 0 and above 1 lie beyond its ends."""
        logarithmic = "log" in self.kind
        low, high = map(math.log, self.values) if logarithmic else self.values
        value = low + (high - low) * share
        value = math.exp(value) if logarithmic else value
        return round(value) if "int" in self.kind else value

    def share(self, value: float) -> float:
        """The share of a range, or of its logarithm, at which a value lies: 0 at the lower end, 1 at the upper."""
        low, high, value = map(math.log, (*self.values, value)) if "log" in self.kind else (*self.values, value)
        return float((value - low) / (high - low))

    def probes(self) -> list[Any]:
        """Values to check in place of all: every value of a choice; the ends of a range and ten values inside it.

        The ends alone are not enough: both ends of ``uniform [2, 5]`` are whole numbers, the values between are not.
        """
        rng = random.Random(0)
        return self.values if self.kind == "choice" else [*self.values, *(self.sample(rng) for _ in range(10))]

    def clip(self, value: Any) -> Any:
        """The nearest value of a range. Values of a choice stay as they are."""
        return value if self.kind == "choice" else min(max(value, self.values[0]), self.values[1])


class Space(BaseModel):
    """The search space of a sweep. Each part is a preset and its searched keys; a trial belongs to one part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parts: dict[str, dict[str, Distribution]] = Field(alias="presets")
    metric: Metric = Field(None, validate_default=True)

    @field_validator("parts")
    @classmethod
    def _check_parts(cls, parts: dict[str, dict[str, Distribution]]) -> dict[str, dict[str, Distribution]]:
        if not parts:
            raise ValueError("expected a table of presets, each with the keys to search (docs/sweeps.md)")
        for preset in parts:
            if preset not in PRESETS:
                raise ValueError(f"unknown preset {shown(preset)}; expected {', '.join(PRESETS)}")
        if sum(len(d.values) for part in parts.values() for d in part.values()) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values; use a range in place of a long choice")
        return parts

    @field_validator("metric", mode="before")
    @classmethod
    def _check_metric(cls, metric: Any, others: ValidationInfo) -> Any:
        """Fills in a metric that is left out: one that fits all presets."""
        configs = {preset: PRESETS[preset] for preset in others.data.get("parts", ())}
        plain = [preset for preset, config in configs.items() if not config.model.variational]
        if metric == "val.neg_elbo" and plain:
            ways_out = "use val.mse, or a space of vae presets"
            raise ValueError(f"val.neg_elbo needs variational models, and {plain[0]} is not; {ways_out}")
        if metric is not None:
            return metric
        if not plain:
            return "val.neg_elbo"
        return "val.denoised_psnr" if all(config.objective.noise_std for config in configs.values()) else "val.mse"

    def searched(self) -> list[str]:
        """Every searched key, over all parts."""
        return list(dict.fromkeys(key for part in self.parts.values() for key in part))

    def sample(self, seed: int, index: int) -> tuple[str, Values]:
        """(preset, values) of random trial ``index``, a pure function of seed and index. Parts take turns."""
        preset = list(self.parts)[index % len(self.parts)]
        rng = random.Random(f"{seed} {index}")
        return preset, {key: d.sample(rng) for key, d in self.parts[preset].items()}

    def grid_size(self) -> int:
        """How many points the grid has, without making them."""
        return sum(math.prod(len(d.grid()) for d in part.values()) for part in self.parts.values())

    def plan(self, search: str, num_trials: int, seed: int) -> list[tuple[str, Values]]:
        """(preset, values) of the trials that are known in advance: all of a grid or a random search."""
        return list(self.grid()) if search == "grid" else [self.sample(seed, index) for index in range(num_trials)]

    def grid(self) -> Iterator[tuple[str, Values]]:
        """(preset, values) of every point of the grid."""
        for preset, part in self.parts.items():
            for values in itertools.product(*(d.grid() for d in part.values())):
                yield preset, dict(zip(part, values, strict=True))

    def pinned(self, overrides: Values) -> Space:
        """The space without the keys that the command line fixes."""
        parts = {p: {k: d for k, d in part.items() if k not in overrides} for p, part in self.parts.items()}
        return self.model_copy(update={"parts": parts})

    def check_mutable(self) -> None:
        """Raises InputError if population-based training cannot change a key in the middle of a trial."""
        if len(self.parts) > 1:
            reason = "are different models, whose weights cannot be cloned into each other"
            raise InputError(f"--scheduler pbt: the presets of space {self.name} {reason}; use one preset")
        for key in self.searched():
            if key not in MUTABLE:
                raise InputError(
                    f"--scheduler pbt: {key} cannot change during training, since the weights of a better trial "
                    f"would not fit; fix it with {option(key)}, or use --scheduler asha. "
                    f"What can change: {', '.join(MUTABLE)}"
                )

    def to_data(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_defaults=True)


def parse_space(data: Any, name: str, metric: str | None = None) -> Space:
    """A space from ``{"metric": ..., "presets": {preset: {key: distribution}}}``. The metric may be left out.

    Raises:
        InputError: naming the part that is wrong.
    """
    values = {"presets": {}, **(data if isinstance(data, dict) else {}), "name": name}
    try:
        return Space.model_validate(values if metric is None else {**values, "metric": metric})
    except ValidationError as error:
        raise InputError(f"space {name}, {explained(error)}") from None


def explained(error: ValidationError) -> str:
    """The first of pydantic's errors, as one sentence that begins with its location."""
    first, *others = error.errors(include_url=False)
    place = ", ".join(shown(part).strip("'") for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {shown(first['input'])}"
    return f"{place}{': ' if place else ''}{message}{got}{f' (and {len(others)} more)' if others else ''}"


def shown(value: Any) -> str:
    """A value in an error message, cut to a readable length."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


_LATENT = {"choice": [2, 4, 8, 16, 32, 64]}
_LR = {"loguniform": [2e-4, 1e-2]}
_PARTS: dict[str, dict[str, Any]] = {
    "ae": {"model.latent_dim": _LATENT, "optim.lr": _LR},
    "denoising": {"model.latent_dim": _LATENT, "optim.lr": _LR, "objective.noise_std": {"uniform": [0.05, 0.6]}},
    "dropout": {"model.latent_dim": _LATENT, "optim.lr": _LR, "model.dropout": {"uniform": [0.0, 0.4]}},
    "vae": {"model.latent_dim": _LATENT, "optim.lr": _LR},
}
_CONV: dict[str, Any] = {
    "model.latent_dim": {"choice": [2, 4, 8, 12, 24]},
    # All of the same length, which means the same patch size, so that all trials see the same patches.
    "model.widths": {"choice": [[16, 32, 64], [32, 64, 128], [64, 128, 192]]},
    "model.blocks": {"choice": [1, 2]},
    "optim.lr": {"loguniform": [3e-4, 5e-3]},
}
# The capacity of a model, and what keeps it from learning few rows by heart.
_TABLE: dict[str, Any] = {
    "model.latent_dim": {"choice": [2, 3, 5, 8]},
    "model.hidden_dims": {"choice": [[64, 32], [128, 64], [256, 128], [512, 256]]},
    "model.dropout": {"uniform": [0.0, 0.3]},
    "objective.noise_std": {"choice": [0.0, 0.1, 0.3]},
    "optim.lr": {"loguniform": [2e-4, 5e-3]},
    "optim.weight_decay": {"loguniform": [1e-3, 1.0]},
}
SPACES: dict[str, dict[str, Any]] = {name: {"presets": {name: part}} for name, part in _PARTS.items()} | {
    "all": {"presets": _PARTS},
    "conv": {"presets": {"conv": _CONV}},
    "table": {"metric": "val.mse", "presets": {"table": _TABLE}},
}


def load_space(name: str | None, file: Path | None) -> Space:
    """A space by name, or from a JSON or TOML file.

    Raises:
        InputError: the space is unknown, unreadable or wrong.
    """
    if (name is None) == (file is None):
        raise InputError(f"give either a space ({', '.join(SPACES)}) or --space FILE")
    if file is None:
        if name not in SPACES:
            near = difflib.get_close_matches(str(name), SPACES, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            known = f"There are {', '.join(SPACES)}; --space FILE reads your own"
            raise InputError(f"unknown space {shown(name)}{hint} {known}")
        return parse_space(SPACES[name], name)
    return parse_space(_read(file), re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-")[:60] or "sweep")


def _read(file: Path) -> Any:
    """The content of a JSON or TOML file."""
    kind = "TOML" if file.suffix == ".toml" else "JSON"
    try:
        text = read_bounded(Path(os.path.realpath(file)), MAX_BYTES).decode("utf-8-sig")
        if kind == "TOML":  # by way of JSON: dates become text, and numbers too long to print are refused
            text = json.dumps(tomllib.loads(text), default=str)
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise InputError(f"--space {file}: nested too deep; a space needs five levels") from None
    except (Damaged, ValueError) as error:
        raise InputError(f"--space {file}: not a readable {kind} file ({error})") from None


def parse_overrides(pairs: list[str]) -> Values:
    """``KEY=VALUE`` pairs of ``--set``. Values are JSON; a list may be written 512,256.

    Raises:
        InputError: one of them is not a pair.
    """
    values: Values = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise InputError(f"--set {shown(pair)}: expected KEY=VALUE, such as --set train.epochs=5")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(_FIELDS.get(key), tuple) and isinstance(value, (str, int)):
            value = [part for part in text.split(",") if part]
        values[key] = value
    return values


def option(key: str) -> str:
    """The option that fixes a key."""
    return f"--set {key}=VALUE" if key in OWN else f"--{key.replace('_', '-')} VALUE"


def override(config: Config, values: Values, where: str) -> Config:
    """A configuration with values replaced. An InputError is one sentence that begins with ``where``."""
    try:
        return config.override(values)
    except InputError as error:
        first, *others = str(error).splitlines()
        first = first if len(first) <= 300 else f"{first[:300]} …"
        raise InputError(f"{where}{first}{f' (and {len(others)} more)' if others else ''}") from None


def check(space: Space, overrides: Values, workers: int) -> None:
    """Checks every part of a space against the configuration.

    Raises:
        InputError: an unknown key, an illegal value, a key whose search would make trials incomparable, a code larger
            than the image, a batch smaller than the number of workers.
    """
    for preset, part in space.parts.items():
        where = f"space {space.name}, preset {preset}: "
        config = override(PRESETS[preset], overrides, "")
        if not part:
            raise InputError(f"{where}nothing is left to search; fix fewer keys, or train it: dist-ae train {preset}")
        for key, d in part.items():
            if key in _FIELDS and key.startswith(FIXED):
                reason = "trials would no longer answer the same question"
                raise InputError(f"{where}{key} cannot be searched: {reason}; fix it with {option(key)}")
            if key == "objective.likelihood" and space.metric == "val.neg_elbo":
                reason = "densities and probabilities are not comparable"
                raise InputError(f"{where}{key} cannot be searched by val.neg_elbo: {reason}; use val.mse")
            for value in d.probes():
                try:
                    changed = override(config, {key: value}, where)
                except InputError as error:
                    fraction = d.kind in ("uniform", "loguniform") and "integer" in str(error)
                    hint = f"; use {d.kind.replace('uniform', 'randint')} or choice" if fraction else ""
                    raise InputError(f"{error}{hint}") from None
                check_sizes(changed, IMAGE_SHAPES.get(changed.data.name), workers, where)


def check_together(overrides: Values, points: Iterable[tuple[str, Values]]) -> None:
    """Raises InputError for values that are legal alone but not together, such as fp64 with bf16 gradients."""
    for preset, values in points:
        override(PRESETS[preset], {**overrides, **values}, f"preset {preset} with {shown(values)}: ")


def check_sizes(config: Config, shape: tuple[int, ...] | None, workers: int, where: str) -> None:
    """Raises InputError for a code larger than the image (``shape``, if known), or for too small a batch."""
    size, batch = config.model.latent_dim, config.train.batch_size
    if shape is not None and size > math.prod(shape):
        image = f"{config.data.name} has {' × '.join(map(str, shape))} = {math.prod(shape)} values"
        raise InputError(f"{where}model.latent_dim {shown(size)} is larger than the image: {image}")
    if batch < workers:
        raise InputError(f"{where}train.batch_size {batch} leaves some of {workers} workers without an image")
