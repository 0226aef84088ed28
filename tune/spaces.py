"""Search spaces as data: dotted configuration keys → distributions. Imports neither torch nor ray, so that errors are instant."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_ae.config import Config, InputError
from dist_ae.presets import PRESETS

Values = dict[str, Any]  # dotted configuration key → value

GRID_POINTS = 4  # how many values a range gives to --search grid, both ends included

# What a trial may be judged by: +1 where larger is better. None of them depends on what is searched.
METRICS = {"val.mse": -1, "val.denoised_psnr": 1, "val.neg_elbo": -1, "val.probe_accuracy": 1}

# Searching these would change the question from trial to trial (or where the answer is kept), not the answer.
FIXED = ("data.", "evaluation.", "tracking.", "name", "run_dir", "model.variational", "model.image_shape")

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

IMAGE_SHAPES = {
    "digits": (1, 8, 8),
    "fashion_mnist": (1, 28, 28),
    "mnist": (1, 28, 28),
    "kmnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}


@dataclass(frozen=True)
class Distribution:
    """``choice`` of listed values, or a range ``[low, high]``, ends included: ``uniform``, ``loguniform``, over whole numbers ``randint``, ``lograndint``."""

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
        """All values of a choice; of a range, ``GRID_POINTS`` values at equal distances (of their logarithms in a log range)."""
        if self.kind == "choice":
            return list(self.values)
        low, high = self.values
        parts = [i / (GRID_POINTS - 1) for i in range(GRID_POINTS)]
        points = [low * (high / low) ** p if "log" in self.kind else low + (high - low) * p for p in parts]
        return list(dict.fromkeys(self.clip(round(p) if "int" in self.kind else p) for p in points))

    def ends(self) -> tuple[Any, ...]:
        """The values that must be legal for all to be: the ends of a range, every value of a choice."""
        return self.values

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
        raise InputError(
            f"{where}: expected one of {', '.join(kinds)} with its values, such as {{'loguniform': [1e-4, 1e-2]}}, got {data!r}"
        )
    ((kind, values),) = data.items()
    if not isinstance(values, (list, tuple)) or not values:
        raise InputError(f"{where}: {kind} needs a list of values, got {values!r}")
    values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    if kind == "choice":
        return Distribution(kind, values)
    whole = "int" in kind
    if len(values) != 2 or not all(
        isinstance(v, int if whole else (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    ):
        raise InputError(
            f"{where}: {kind} needs [low, high] as two {'whole ' if whole else ''}numbers, got {list(values)}"
        )
    low, high = values
    if low >= high:
        raise InputError(
            f"{where}: the range {[low, high]} is empty; low must be less than high (for one value, fix it with --set)"
        )
    if "log" in kind and low <= 0:
        raise InputError(
            f"{where}: {kind} needs low > 0, got {low}; use {kind.removeprefix('log')} for a range that holds 0"
        )
    return Distribution(kind, values)


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
        """(preset, values) of random trial ``index``: a pure function, so a plan can be made again. Parts take turns."""
        preset = list(self.parts)[index % len(self.parts)]
        rng = random.Random(f"{seed} {index}")
        return preset, {key: d.sample(rng) for key, d in self.parts[preset].items()}

    def grid(self) -> Iterator[tuple[str, Values]]:
        """(preset, values) of every point of the grid."""
        for preset, part in self.parts.items():
            for values in itertools.product(*(d.grid() for d in part.values())):
                yield preset, dict(zip(part, values, strict=True))

    def pinned(self, overrides: Values) -> Space:
        """Without the keys that ``--set`` gave one value."""
        parts = {
            preset: {key: d for key, d in part.items() if key not in overrides} for preset, part in self.parts.items()
        }
        return replace(self, parts=parts)

    def to_data(self) -> dict[str, Any]:
        presets = {preset: {key: d.to_data() for key, d in part.items()} for preset, part in self.parts.items()}
        return {"name": self.name, "metric": self.metric, "presets": presets}


def parse_space(data: Any, name: str) -> Space:
    """A space from data: ``{"metric": ..., "presets": {preset: {key: distribution}}}``; the metric may be left out.

    Raises:
        InputError: naming the part that is wrong.
    """
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("presets"), dict)
        or not data["presets"]
        or set(data) - {"metric", "presets", "name"}
    ):
        raise InputError(
            f"space {name}: expected 'presets', a table of presets with the keys searched in each, and optionally 'metric'"
        )
    parts = {}
    for preset, part in data["presets"].items():
        if preset not in PRESETS:
            raise InputError(f"space {name}: unknown preset {preset!r}; expected {', '.join(PRESETS)}")
        if not isinstance(part, dict):
            raise InputError(
                f"space {name}, preset {preset}: expected a table of configuration keys and distributions, got {part!r}"
            )
        parts[preset] = {key: distribution(d, f"space {name}, preset {preset}, {key}") for key, d in part.items()}
    metric = data.get("metric") or _usual_metric(list(parts))
    check_metric(metric, parts, f"space {name}: ")
    return Space(name, metric, parts)


def check_metric(metric: Any, presets: Mapping[str, Any], where: str = "") -> None:
    """Raises InputError unless every preset has this metric."""
    if metric not in METRICS:
        raise InputError(f"{where}unknown metric {metric!r}; expected {', '.join(METRICS)}")
    plain = [preset for preset in presets if not PRESETS[preset].model.variational]
    if metric == "val.neg_elbo" and plain:
        raise InputError(
            f"{where}metric val.neg_elbo needs variational models, and {plain[0]} is not; use val.mse, or a space of vae presets"
        )


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
SPACES: dict[str, dict[str, Any]] = {name: {"presets": {name: part}} for name, part in _PARTS.items()} | {
    "all": {"presets": _PARTS}
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
            raise InputError(
                f"unknown space {name!r}{f'; did you mean {near[0]}?' if near else ''} There are {', '.join(SPACES)}; --space FILE takes your own"
            )
        return parse_space(SPACES[name], name)
    try:
        text = file.read_text()
        data = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise InputError(f"--space {file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(
            f"--space {file}: not a readable {'TOML' if file.suffix == '.toml' else 'JSON'} file ({error})"
        ) from None
    return parse_space(data, file.stem)


def parse_overrides(pairs: list[str]) -> Values:
    """``KEY=VALUE`` pairs of ``--set``; values are JSON, a list may be written 512,256.

    Raises:
        InputError: not a pair, or an unknown key.
    """
    fields = dict(Config().flat())
    values: Values = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise InputError(f"--set {pair}: expected KEY=VALUE, such as --set train.epochs=5")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(fields.get(key), tuple) and isinstance(value, (str, int)):
            value = [part for part in text.split(",") if part]
        values[key] = value
    return values


def check(space: Space, overrides: Values, workers: int) -> None:
    """Looks at every part of a space against the configuration.

    Raises:
        InputError: an unknown key, an illegal value, a key whose search would make trials incomparable, a code larger than the image,
            a batch that does not divide over the workers.
    """
    for preset, part in space.parts.items():
        where = f"space {space.name}, preset {preset}: "
        config = PRESETS[preset].override(overrides)
        if not part:
            raise InputError(
                f"{where}nothing is left to search; take a --set away, or train it: dist-ae train {preset}"
            )
        shape = image_shape(config)
        for key, d in part.items():
            if key.startswith(FIXED):
                raise InputError(
                    f"{where}{key} cannot be searched: trials would no longer answer the same question; fix it with --set {key}=..."
                )
            if key == "objective.likelihood" and space.metric == "val.neg_elbo":
                raise InputError(
                    f"{where}objective.likelihood cannot be searched by val.neg_elbo: densities and probabilities do not compare; use val.mse"
                )
            for value in d.ends():
                try:
                    changed = config.override({key: value})
                except InputError as error:
                    raise InputError(f"{where}{error}") from None
                _check_sizes(changed, shape, workers, where)
        _check_sizes(config, shape, workers, where)


def _check_sizes(config: Config, shape: tuple[int, ...] | None, workers: int, where: str) -> None:
    if shape is not None and config.model.latent_dim > math.prod(shape):
        size = " × ".join(map(str, shape))
        raise InputError(
            f"{where}model.latent_dim {config.model.latent_dim} is larger than the image: {config.data.name} has {size} = {math.prod(shape)} values"
        )
    if config.train.batch_size % workers:
        raise InputError(
            f"{where}train.batch_size {config.train.batch_size} does not divide over {workers} workers; use a multiple of {workers}"
        )


def image_shape(config: Config) -> tuple[int, ...] | None:
    """The image shape of a configuration's data without loading it; None where only loading tells."""
    name = config.data.name
    if name.startswith("array:") and name.endswith(".npy"):
        import numpy as np

        try:
            shape = np.load(Path(name.removeprefix("array:")).expanduser(), mmap_mode="r", allow_pickle=False).shape
        except (OSError, ValueError, EOFError):
            return None  # loading it will say what is wrong
        return tuple(shape[1:])
    return IMAGE_SHAPES.get(name)


def check_mutable(space: Space) -> None:
    """Raises InputError where population-based training cannot change a searched key in the middle of a trial."""
    if len(space.parts) > 1:
        raise InputError(
            f"--scheduler pbt: the presets of space {space.name} are different models, whose weights cannot be cloned into each other; use one preset"
        )
    for key in space.searched():
        if key not in MUTABLE:
            raise InputError(
                f"--scheduler pbt: {key} cannot change in the middle of training, the weights of a better trial would not fit; "
                f"fix it with --set {key}=..., or use --scheduler asha. What can change: {', '.join(MUTABLE)}"
            )
