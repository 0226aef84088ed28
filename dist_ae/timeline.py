"""Where a run is at each step, and what is due there. Integers and pure functions; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ae.config import ObjectiveConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Timeline:
    """The steps of a run. Every field counts images or steps; step numbers begin at 0."""

    num_images: int
    batch_size: int
    total_steps: int
    eval_every: int
    save_every: int
    log_every: int

    @classmethod
    def of(cls, train: TrainConfig, num_images: int) -> Timeline:
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
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch. The last batch takes what is left, so every image is seen once an epoch."""
        return -(-self.num_images // self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def positions(self, step: int) -> range:
        """The places in its epoch's order that a step takes: its global batch."""
        start = step % self.steps_per_epoch * self.batch_size
        return range(start, min(start + self.batch_size, self.num_images))

    def images_seen(self, step: int) -> int:
        """Images seen before a step, over all processes."""
        return self.epoch(step) * self.num_images + self.positions(step).start

    def epochs_done(self, step: int) -> float:
        """Epochs completed before a step."""
        return round(step / self.steps_per_epoch, 4)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps."""
        return step == self.total_steps or (step > 0 and step % self.eval_every == 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return step == self.total_steps or (step > 0 and step % self.save_every == 0)

    def logs(self, step: int) -> bool:
        """Whether a line of training metrics is due after so many steps."""
        return step == self.total_steps or (step > 0 and step % self.log_every == 0)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then constant or falling to 0 at the end."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def beta(step: int, config: ObjectiveConfig) -> float:
    """The weight of the rate at a step: it rises linearly to β."""
    if step >= config.beta_warmup_steps:
        return config.beta
    return config.beta * (step + 1) / config.beta_warmup_steps
