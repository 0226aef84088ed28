"""Search spaces as data: dotted configuration keys → distributions.

Imports neither torch nor ray, so that an error comes at once.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
import re
import reprlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_ae.config import Config, InputError
from dist_ae.presets import PRESETS

Values = dict[str, Any]  # dotted configuration key → value

GRID_POINTS = 4  # how many values a range gives to --search grid, both ends included
MAX_TRIALS = 10_000  # each trial is a folder; the folders are read again for every ranking

# What a space file may hold. Every value is checked before the sweep starts, which takes about 0.1 ms each.
MAX_BYTES, MAX_VALUES, MAX_TEXT, MAX_DEPTH = 2**20, 10_000, 1_000, 8

# What a trial may be judged by: +1 where larger is better. None of them depends on what is searched.
METRICS = {"val.mse": -1, "val.denoised_psnr": 1, "val.neg_elbo": -1, "val.probe_accuracy": 1}

# Searching these would change the question from trial to trial (or where the answer is kept), not the answer.
FIXED = ("data.", "evaluation.", "tracking.", "name", "run_dir", "model.variational", "model.image_shape")

# Keys whose option means something else in a sweep, which has a name and a seed of its own and many run directories.
OWN = ("name", "seed", "run_dir")

# What population-based training can change in the middle of a trial: nothing that a checkpoint's tensors depend on.
MUTABLE = (
    "optim.lr",
    "optim.lr_adam",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.momentum",
    "objective.noise_std",
    "objective.beta",
    "model.dropout",
)

_FIELDS = dict(Config().flat())  # every configuration key, with its default

IMAGE_SHAPES = {
    "photos": (3, 64, 64),
    "digits": (1, 8, 8),
    "fashion_mnist": (1, 28, 28),
    "mnist": (1, 28, 28),
    "kmnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}


@dataclass(frozen=True)
class Distribution:
    """``choice`` of listed values, or a range ``[low, high]``, ends included.

    Ranges are ``uniform`` and ``loguniform``, and over whole numbers ``randint`` and ``lograndint``.
    """

    kind: str
    values: tuple[Any, ...]

    def sample(self, rng: random.Random) -> Any:
        """One value."""
        if self.kind == "choice":
            return rng.choice(self.values)
        low, high = self.values
        if self.kind == "uniform":
            return rng.uniform(low, high)
        if self.kind == "randint":
            return rng.randint(low, high)
        if self.kind == "loguniform":
            return self.clip(math.exp(rng.uniform(math.log(low), math.log(high))))
        return self.clip(round(math.exp(rng.uniform(math.log(low), math.log(high)))))

    def grid(self) -> list[Any]:
        """All values of a choice; ``GRID_POINTS`` evenly spaced values of a range, or of its logarithm."""
        if self.kind == "choice":
            return list(self.values)
        low, high = self.values
        shares = [i / (GRID_POINTS - 1) for i in range(1, GRID_POINTS - 1)]
        if "log" in self.kind:
            inner = [math.exp((1 - share) * math.log(low) + share * math.log(high)) for share in shares]
        else:
            inner = [low + (high - low) * share for share in shares]
        inner = [self.clip(round(value) if "int" in self.kind else value) for value in inner]
        return list(dict.fromkeys([low, *inner, high]))

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all: every value of a choice; the ends of a range and ten values inside it.

        The ends alone are not enough: both ends of ``uniform [2, 5]`` are whole numbers, the values between are not.
        """
        rng = random.Random(0)
        return self.values if self.kind == "choice" else (*self.values, *(self.sample(rng) for _ in range(10)))

    def clip(self, value: Any) -> Any:
        """The nearest value of a range; a choice's values are left alone."""
        return value if self.kind == "choice" else min(max(value, self.values[0]), self.values[1])

    def to_data(self) -> dict[str, list[Any]]:
        return {self.kind: list(self.values)}


def distribution(data: Any, where: str) -> Distribution:
    """A distribution from data, ``{"loguniform": [1e-4, 1e-2]}``.

    Raises:
        InputError: an unknown kind or an empty range, naming where.
    """
    kinds = ("choice", "uniform", "loguniform", "randint", "lograndint")
    if not isinstance(data, dict) or len(data) != 1 or next(iter(data)) not in kinds:
        known = f"{', '.join(kinds)} with its values, such as {{'loguniform': [1e-4, 1e-2]}}"
        raise InputError(f"{where}: expected one of {known}, got {shown(data)}")
    ((kind, values),) = data.items()
    if not isinstance(values, (list, tuple)) or not values:
        raise InputError(f"{where}: {kind} needs a list of values, got {shown(values)}")
    values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    if kind == "choice":
        return Distribution(kind, values)
    whole = "int" in kind
    numbers = all(isinstance(v, int if whole else (int, float)) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not numbers or not math.isfinite(values[1] - values[0]):
        wanted = "whole numbers" if whole else "finite numbers"
        raise InputError(f"{where}: {kind} needs [low, high] as two {wanted}, got {shown(list(values))}")
    low, high = values
    if low >= high:
        raise InputError(f"{where}: the range {[low, high]} is empty; low must be less than high")
    if "log" in kind and low <= 0:
        plain = kind.removeprefix("log")
        raise InputError(f"{where}: {kind} needs low > 0, got {low}; use {plain} for a range that holds 0")
    return Distribution(kind, values)


def shown(value: Any) -> str:
    """A value in an error message, cut to a readable length."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _check_size(data: Any, where: str) -> None:
    """Raises InputError unless data is small and plain, so that every value can be printed and computed with."""
    left, todo = MAX_VALUES, [(data, 0)]
    while todo:
        value, depth = todo.pop()
        left -= 1
        if left < 0:
            raise InputError(f"{where}: more than {MAX_VALUES:,} values; use a range in place of a long choice")
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: nested more than {MAX_DEPTH} levels deep; a space needs five")
        if isinstance(value, dict):
            todo += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple)):
            todo += [(part, depth + 1) for part in value]
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise InputError(f"{where}: a whole number does not fit into 64 bits")
        elif isinstance(value, str) and len(value) > MAX_TEXT:
            raise InputError(f"{where}: a text is longer than {MAX_TEXT:,} characters ({shown(value)})")
        elif not isinstance(value, (str, int, float, type(None))):
            raise InputError(f"{where}: {shown(value)} is neither a number nor a text, a list or a table")


@dataclass(frozen=True)
class Space:
    """What a sweep searches. Each part is one preset with the keys searched in it; a trial belongs to one part."""

    name: str
    metric: str
    parts: Mapping[str, Mapping[str, Distribution]]

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
        """(preset, values) of each trial that can be planned ahead: all of a grid or a random search."""
        return list(self.grid()) if search == "grid" else [self.sample(seed, index) for index in range(num_trials)]

    def grid(self) -> Iterator[tuple[str, Values]]:
        """(preset, values) of every point of the grid."""
        for preset, part in self.parts.items():
            for values in itertools.product(*(d.grid() for d in part.values())):
                yield preset, dict(zip(part, values, strict=True))

    def pinned(self, overrides: Values) -> Space:
        """Without the keys that the command line gave one value."""
        parts = {p: {k: d for k, d in part.items() if k not in overrides} for p, part in self.parts.items()}
        return replace(self, parts=parts)

    def to_data(self) -> dict[str, Any]:
        presets = {preset: {key: d.to_data() for key, d in part.items()} for preset, part in self.parts.items()}
        return {"name": self.name, "metric": self.metric, "presets": presets}


def parse_space(data: Any, name: str) -> Space:
    """A space from data: ``{"metric": ..., "presets": {preset: {key: distribution}}}``; the metric may be left out.

    Raises:
        InputError: naming the part that is wrong.
    """
    where = f"space {name}"
    _check_size(data, where)
    known = isinstance(data, dict) and not set(data) - {"metric", "presets", "name"}
    if not known or not isinstance(data.get("presets"), dict) or not data["presets"]:
        raise InputError(f"{where}: expected 'presets', a table of presets with searched keys, and optionally 'metric'")
    parts: dict[str, dict[str, Distribution]] = {}
    for preset, part in data["presets"].items():
        if preset not in PRESETS:
            raise InputError(f"{where}: unknown preset {shown(preset)}; expected {', '.join(PRESETS)}")
        if not isinstance(part, dict):
            raise InputError(f"{where}, preset {preset}: expected a table of keys and distributions, got {shown(part)}")
        parts[preset] = {}
        for key, d in part.items():
            if key in Config.model_fields and isinstance(d, dict) and f"{key}.{next(iter(d), '')}" in _FIELDS:
                raise InputError(f'{where}, preset {preset}: write the whole key in quotes, "{key}.{next(iter(d))}"')
            parts[preset][key] = distribution(d, f"{where}, preset {preset}, {shown(key)[1:-1]}")
    metric = data.get("metric")
    if metric is None:
        metric = _usual_metric(list(parts))
    check_metric(metric, parts, f"{where}: ")
    return Space(name, metric, parts)


def check_metric(metric: Any, presets: Mapping[str, Any], where: str = "") -> None:
    """Raises InputError unless every preset has this metric."""
    if not isinstance(metric, str) or metric not in METRICS:
        raise InputError(f"{where}unknown metric {shown(metric)}; expected {', '.join(METRICS)}")
    plain = [preset for preset in presets if not PRESETS[preset].model.variational]
    if metric == "val.neg_elbo" and plain:
        way_out = "use val.mse, or a space of vae presets"
        raise InputError(f"{where}metric val.neg_elbo needs variational models, and {plain[0]} is not; {way_out}")


def _usual_metric(presets: list[str]) -> str:
    if all(PRESETS[p].model.variational for p in presets):
        return "val.neg_elbo"
    return "val.denoised_psnr" if all(PRESETS[p].objective.noise_std for p in presets) else "val.mse"


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
    "model.widths": {
        "choice": [[16, 32, 64], [32, 64, 128], [64, 128, 192]]
    },  # one patch size, so that all trials see the same patches
    "model.blocks": {"choice": [1, 2]},
    "optim.lr": {"loguniform": [3e-4, 5e-3]},
}
SPACES: dict[str, dict[str, Any]] = {name: {"presets": {name: part}} for name, part in _PARTS.items()} | {
    "all": {"presets": _PARTS},
    "conv": {"presets": {"conv": _CONV}},
}


def load_space(name: str | None, file: Path | None) -> Space:
    """A space by name, or from a JSON or TOML file.

    Raises:
        InputError: unknown, unreadable or wrong.
    """
    if (name is None) == (file is None):
        raise InputError(f"give a space ({', '.join(SPACES)}) or --space FILE, one of the two")
    if file is None:
        if name not in SPACES:
            near = difflib.get_close_matches(str(name), SPACES, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            known = f"There are {', '.join(SPACES)}; --space FILE takes your own"
            raise InputError(f"unknown space {shown(name)}{hint} {known}")
        return parse_space(SPACES[name], name)
    return parse_space(_read(file), re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-")[:60] or "sweep")


def _read(file: Path) -> Any:
    """What a JSON or TOML file holds."""
    kind = "TOML" if file.suffix == ".toml" else "JSON"
    try:
        if not file.is_file() and file.exists():
            raise InputError(f"--space {file}: not a regular file; give a JSON or TOML file")
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"--space {file}: larger than {MAX_BYTES // 2**20} MiB, which no space needs")
        text = content.decode("utf-8-sig")
        return tomllib.loads(text) if kind == "TOML" else json.loads(text, object_pairs_hook=_once)
    except OSError as error:
        raise InputError(f"--space {file}: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"--space {file}: nested too deep; a space needs five levels") from None
    except ValueError as error:
        raise InputError(f"--space {file}: not a readable {kind} file ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless a key stands in it twice: the first of the two would be lost without a word."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{shown(key)} stands twice in one table")
        made[key] = value
    return made


def parse_overrides(pairs: list[str]) -> Values:
    """``KEY=VALUE`` pairs of ``--set``. Values are JSON; a list may be written 512,256.

    Raises:
        InputError: not a pair.
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
    """How the command line fixes a key."""
    return f"--set {key}=VALUE" if key in OWN else f"--{key.replace('_', '-')} VALUE"


def override(config: Config, values: Values, where: str) -> Config:
    """A configuration with values replaced. Raises InputError as one sentence that says where the values come from."""
    try:
        return config.override(values)
    except InputError as error:
        first, *more = str(error).splitlines()
        first = first if len(first) <= 300 else f"{first[:300]} …"
        raise InputError(f"{where}{first}{f' (and {len(more)} more)' if more else ''}") from None


def check(space: Space, overrides: Values, workers: int, dataset: tuple[tuple[int, ...], int] | None = None) -> None:
    """Looks at every part of a space against the configuration.

    Args:
        dataset: image shape and number of training images, where the data is loaded.

    Raises:
        InputError: an unknown key, an illegal value, a key whose search would make trials incomparable, a code larger
            than the image, a batch larger than the data or smaller than the number of workers.
    """
    for preset, part in space.parts.items():
        where = f"space {space.name}, preset {preset}: "
        config = override(PRESETS[preset], overrides, "")
        if not part:
            raise InputError(f"{where}nothing is left to search; fix fewer keys, or train it: dist-ae train {preset}")
        shape, count = dataset or (image_shape(config), None)
        _check_sizes(config, shape, count, workers, where)
        for key, d in part.items():
            if key in _FIELDS and key.startswith(FIXED):
                reason = "trials would no longer answer the same question"
                raise InputError(f"{where}{key} cannot be searched: {reason}; fix it with {option(key)}")
            if key == "objective.likelihood" and space.metric == "val.neg_elbo":
                reason = "densities and probabilities do not compare"
                raise InputError(f"{where}{key} cannot be searched by val.neg_elbo: {reason}; use val.mse")
            for number, value in enumerate(d.probes()):
                try:
                    changed = override(config, {key: value}, where)
                except InputError as error:
                    inside = d.kind in ("uniform", "loguniform") and number >= len(d.values)  # both ends are legal
                    hint = f"; use {d.kind.replace('uniform', 'randint')} or choice" if inside else ""
                    raise InputError(f"{error}{hint}") from None
                _check_sizes(changed, shape, count, workers, where)


def check_together(overrides: Values, points: Iterable[tuple[str, Values]]) -> None:
    """Raises InputError where values are legal each by itself and not together, such as fp64 with bf16 gradients."""
    for preset, values in points:
        override(PRESETS[preset], {**overrides, **values}, f"preset {preset} with {shown(values)}: ")


def _check_sizes(config: Config, shape: tuple[int, ...] | None, count: int | None, workers: int, where: str) -> None:
    size, batch = config.model.latent_dim, config.train.batch_size
    if shape is not None and size > math.prod(shape):
        image = f"{config.data.name} has {' × '.join(map(str, shape))} = {math.prod(shape)} values"
        raise InputError(f"{where}model.latent_dim {size} is larger than the image: {image}")
    if count is not None and batch > count:
        raise InputError(f"{where}train.batch_size {batch} is larger than the {count} training images")
    if batch < workers:
        raise InputError(f"{where}train.batch_size {batch} leaves some of {workers} workers without an image")


def image_shape(config: Config) -> tuple[int, ...] | None:
    """The image shape of a configuration's data without loading it; None where only loading tells."""
    name = config.data.name
    if name.startswith("array:") and name.endswith(".npy"):
        import os

        import numpy as np

        path = os.path.expanduser(name.removeprefix("array:"))
        try:
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape if os.path.isfile(path) else ()
        except (OSError, ValueError, EOFError, OverflowError):
            shape = ()
        return tuple(shape[1:]) if len(shape) > 2 else None  # loading it will say what is wrong
    return IMAGE_SHAPES.get(name)


def check_mutable(space: Space) -> None:
    """Raises InputError where population-based training cannot change a searched key in the middle of a trial."""
    if len(space.parts) > 1:
        reason = "are different models, whose weights cannot be cloned into each other"
        raise InputError(f"--scheduler pbt: the presets of space {space.name} {reason}; use one preset")
    for key in space.searched():
        if key not in MUTABLE:
            raise InputError(
                f"--scheduler pbt: {key} cannot change in the middle of training, the weights of a better trial would "
                f"not fit; fix it with {option(key)}, or use --scheduler asha. What can change: {', '.join(MUTABLE)}"
            )
