"""The schedule of a run: what is due at each step. Integers and pure functions; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dist_ae.config import ObjectiveConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Timeline:
    """The steps of a run. All fields count images or steps; step numbers begin at 0."""

    num_images: int
    batch_size: int
    total_steps: int
    eval_every: int
    save_every: int
    log_every: int
    eval_start: bool = False  # whether the start is evaluated, and so may be the best

    @classmethod
    def of(cls, train: TrainConfig, num_images: int, eval_start: bool = False) -> Timeline:
        """The timeline of a configuration on ``num_images`` training images."""
        steps_per_epoch = -(-num_images // train.batch_size)
        eval_every = train.eval_every or steps_per_epoch
        return cls(
            num_images=num_images,
            batch_size=train.batch_size,
            total_steps=train.steps or train.epochs * steps_per_epoch,
            eval_every=eval_every,
            save_every=train.save_every or eval_every,
            log_every=train.log_every,
            eval_start=eval_start,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch. The last batch takes what is left, so every image is seen once an epoch."""
        return -(-self.num_images // self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def positions(self, step: int) -> range:
        """The global batch of a step, as positions in the order of its epoch."""
        start = step % self.steps_per_epoch * self.batch_size
        return range(start, min(start + self.batch_size, self.num_images))

    def epochs_done(self, step: int) -> float:
        """Epochs completed before a step."""
        return round(step / self.steps_per_epoch, 4)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps."""
        return step == self.total_steps or (step % self.eval_every == 0 and (step > 0 or self.eval_start))

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return step == self.total_steps or (step > 0 and step % self.save_every == 0)

    def logs(self, step: int) -> bool:
        """Whether a line of training metrics is due after so many steps."""
        return step == self.total_steps or (step > 0 and step % self.log_every == 0)

    def draws_pictures(self, step: int) -> bool:
        """Whether the evaluation after so many steps is drawn: the first, then at doubling intervals, and the last."""
        evaluation = step // self.eval_every
        return step == self.total_steps or (step > 0 and evaluation & (evaluation - 1) == 0)


class Best(NamedTuple):
    """The best evaluation of a run so far."""

    step: int
    metric: str  # such as val.mse
    value: float
    noise_std: float | None = None  # of the evaluation; older runs did not store it


@dataclass
class State:
    """The progress of a run. With the configuration and the tensors, it determines how the run continues."""

    step: int = 0
    evaluated: bool = False  # whether the evaluation that is due at this step was made
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: Best | None = None
    pca_mse: float | None = None  # the error of the best linear code of the same size, once it is known

    def key(self) -> tuple[int, bool]:
        """Identifies the checkpoint of this state."""
        return self.step, self.evaluated

    def to_json(self) -> dict[str, Any]:
        """The state as a checkpoint stores it."""
        return {**asdict(self), "best": None if self.best is None else self.best._asdict()}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> State:
        """The state that a checkpoint stores. Earlier versions stored no metrics and no error of PCA.

        Raises:
            KeyError, TypeError, ValueError: ``stored`` is no state.
        """
        best, pca_mse = stored["best"], stored.get("pca_mse")
        if best is not None:
            best = Best(int(best["step"]), str(best["metric"]), float(best["value"]), best.get("noise_std"))
        metrics = {str(name): float(value) for name, value in dict(stored.get("metrics") or {}).items()}
        pca_mse = None if pca_mse is None else float(pca_mse)
        return cls(int(stored["step"]), bool(stored["evaluated"]), metrics, best, pca_mse)


class Asked(NamedTuple):
    """Requests to a run from outside, the same on every process."""

    stop: bool = False  # by a signal
    save: bool = False  # by the clock


class Due(NamedTuple):
    """What is due between two steps, in this order."""

    evaluate: bool
    save: bool  # a checkpoint of the state, unless the disk has it already
    report: bool
    end: bool


def due(timeline: Timeline, state: State, patience: int | None, asked: Asked) -> Due:
    """What is due at a state, the same on every process.

    Args:
        patience: evaluations in a row without a better one after which a run ends.
    """
    evaluates = timeline.evaluates(state.step)
    evaluated = state.evaluated and bool(state.metrics)
    since_best = state.step - state.best.step if state.evaluated and state.best is not None else None
    ran_out = patience is not None and since_best is not None and since_best >= patience * timeline.eval_every
    end = state.step == timeline.total_steps or ran_out
    save = timeline.saves(state.step) or since_best == 0 or end or asked.stop or asked.save
    report = evaluates and evaluated and state.step > 0  # the start is no result of training
    return Due(evaluates and not evaluated and not asked.stop, save, report, end)


def selection(variational: bool, noise_std: float | tuple[float, float], standardized: bool) -> tuple[str, int]:
    """What 'best' means for a run: (metric, +1 if larger is better else -1).

    The metric measures the task that the run trains for. It is never the training loss.

    Args:
        noise_std: standard deviation of the noise that the run trains to remove.
    """
    if variational:
        return "neg_elbo", -1
    if not noise_std:
        return "mse", -1
    return ("denoised_mse", -1) if standardized else ("denoised_psnr", 1)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then constant or falling to 0 at the end."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(step: int, decay: float) -> float:
    """The decay of the moving average at a step: low at first, so that the initial weights fade quickly."""
    return min(decay, (1 + step) / (10 + step))


def beta(step: int, config: ObjectiveConfig) -> float:
    """The weight of the rate at a step: it rises linearly to β."""
    if step >= config.beta_warmup_steps:
        return config.beta
    return config.beta * (step + 1) / config.beta_warmup_steps
