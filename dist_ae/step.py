"""One optimizer step: rows of the dataset → images → draws → objective → gradient → weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ae.config import Config
from dist_ae.data.order import epoch_order, share
from dist_ae.data.reader import Reader
from dist_ae.data.records import Dataset
from dist_ae.draws import draw
from dist_ae.guard import Guard
from dist_ae.models import Autoencoder, initialize
from dist_ae.models.weights import weights_sha256
from dist_ae.objectives import Terms, beta_at, objective
from dist_ae.optim import build, materialize, set_learning_rate, state_tensors
from dist_ae.processes.host_memory import SharedMean, share_memory
from dist_ae.processes.runtime import Runtime, plan_batch


class Learner:
    """What a step changes: weights, optimizer state, moving average and the sums of the training metrics.

    Nothing in ``step`` reads the device, and nothing touches torch's global generators.
    """

    def __init__(self, config: Config, dataset: Dataset, runtime: Runtime, total_steps: int) -> None:
        self.config, self.runtime, self.total_steps = config, runtime, total_steps
        self.image_shape, self.num_images, self.shards = dataset.image_shape, len(dataset.train), dataset.shards
        self.steps_per_epoch = -(-self.num_images // config.train.batch_size)
        self.accumulate = plan_batch(config.train.batch_size, runtime.world, config.train.max_per_process)[1]
        self.raw_model = initialize(Autoencoder(config, dataset.image_shape), config.seed).to(
            runtime.device, runtime.dtype
        )
        self.optimizers = build(self.raw_model, config.optim)
        materialize(self.optimizers)
        self.parameters = list(self.raw_model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters] if config.train.ema_decay else []
        # Sums of loss, distortion and rate over this process's images since the last line of metrics, and the images of all processes.
        self.window, self.window_images = torch.zeros(3, dtype=runtime.exact, device=runtime.device), 0
        self.guard = Guard(self.optimizers, runtime.device)
        self.images = Reader(dataset.train, runtime.device, runtime.dtype)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def prepare(self) -> None:
        """Hands the model to Accelerate: DDP takes rank 0's weights to all; the optimizer's state follows, then one step that changes nothing."""
        accelerator = self.runtime.accelerator
        if self.config.train.compile:
            self.raw_model.compile()
        self.model, *self.prepared = accelerator.prepare(self.raw_model, *self.optimizers)
        if self.runtime.world > 1:
            self._choose_reduction()
            for tensor in [*self.tensors()["optimizer"].values(), *self.ema]:
                dist.broadcast(tensor, 0)
        # DDP lays out its buckets anew during the first backwards (with a static graph after the second), which changes the order in
        # which gradients are added up. Empty batches get that over with, so a resumed run adds as the uninterrupted one does.
        for _ in range(3 if self.runtime.world > 1 else 1):
            self._backward(range(0), torch.empty(0, dtype=torch.int64), step=0, batch_size=1)
            self._zero_grad()

    def _choose_reduction(self) -> None:
        """How DDP averages gradients where its own all-reduce is not wanted."""
        dtype = torch.bfloat16 if self.config.train.gradient_type == "bf16" else self.runtime.dtype
        num_bytes = sum(p.numel() for p in self.parameters) * dtype.itemsize
        slots = share_memory(self.runtime, num_bytes) if self.runtime.device.type == "cpu" else None
        if slots is not None:
            self.model.register_comm_hook(None, SharedMean(slots, self.runtime, dtype).hook)
        elif dtype == torch.bfloat16:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            self.model.register_comm_hook(None, bf16_compress_hook)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds: the live tensors, to be saved or copied into."""
        parts = {
            "weights": dict(self.raw_model.state_dict()),
            "optimizer": state_tensors(self.raw_model, self.optimizers),
        }
        if self.ema:
            parts["ema"] = dict(zip((name for name, _ in self.raw_model.named_parameters()), self.ema, strict=True))
        return parts

    def step(self, step: int) -> None:
        """Takes step ``step`` of the run; the same arithmetic on any number of processes."""
        batch = self._batch(step)
        self._backward(
            share(range(len(batch)), self.runtime.rank, self.runtime.world), batch, step=step, batch_size=len(batch)
        )
        set_learning_rate(self.optimizers, step, self.total_steps, self.config.optim)
        if self.runtime.accelerator.scaler is None:
            self.guard.check(step)
        if self.config.optim.clip_norm is not None:
            self.runtime.accelerator.clip_grad_norm_(self.parameters, self.config.optim.clip_norm)
        for optimizer, prepared in zip(self.optimizers, self.prepared, strict=True):
            if self.runtime.accelerator.scaler is None:
                self.guard.update(optimizer)
            else:
                prepared.step()  # fp16: the scaler skips an overflowing step and lowers its scale
        self._zero_grad()
        self.window_images += len(batch)
        if self.config.train.ema_decay is not None:
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - self.config.train.ema_decay)

    def epoch(self, step: int) -> float:
        """Epochs completed before a step."""
        return round(step / self.steps_per_epoch, 4)

    def batch_size(self, step: int) -> int:
        """Images of a step over all processes: the last batch of an epoch takes what is left."""
        return min(
            self.config.train.batch_size, self.num_images - step % self.steps_per_epoch * self.config.train.batch_size
        )

    def images_seen(self, step: int) -> int:
        """Images seen before a step, over all processes."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs * self.num_images + within * self.config.train.batch_size

    def take_window(self) -> dict[str, float]:
        """Means over the images of all processes since the last call, in nats per image. Reads the device."""
        sums, images = self.runtime.sum(self.window.clone()).tolist(), self.window_images
        self.window.zero_()
        self.window_images = 0
        return dict(zip(("loss", "distortion", "rate"), (value / images for value in sums), strict=True))

    def refuse_divergence(self) -> None:
        """Raises RuntimeError unless the weights are the same to the bit on every process."""
        digest = int(weights_sha256(self.tensors()["weights"])[:13], 16)  # 52 bits: exact in a float64
        largest, smallest = self.runtime.largest(digest, -digest)
        if largest != -smallest:
            raise RuntimeError(
                "the weights differ between processes; please report this: it cannot happen while the gradient is averaged exactly"
            )

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The moving average in place of the weights, where there is one, for the length of an evaluation."""
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

    def rows(self, step: int) -> Tensor:
        """The rows of the dataset that step ``step`` sees over all processes, [B]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.config.seed, epoch, self.num_images, self.shards, self.config.data.window)
        return order[within * self.config.train.batch_size : (within + 1) * self.config.train.batch_size]

    def _batch(self, step: int) -> Tensor:
        # As `rows`, with the epoch's permutation kept on the device: one copy an epoch instead of one a step.
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = epoch_order(self.config.seed, epoch, self.num_images, self.shards, self.config.data.window)
            self._epoch, self._order = epoch, order if self.images.resident is None else order.to(self.runtime.device)
        return self._order[within * self.config.train.batch_size : (within + 1) * self.config.train.batch_size]

    def _backward(self, mine: range, batch: Tensor, *, step: int, batch_size: int) -> None:
        """Adds up the gradient of the mean loss over the global batch; ``mine`` is this process's part of it, which may be empty."""
        accelerator, config, runtime = self.runtime.accelerator, self.config, self.runtime
        for part in range(self.accumulate):
            piece = share(mine, part, self.accumulate)
            images = self.images.take(batch[piece.start : piece.stop], self._then(mine, part, batch, step))
            draws = draw(config, self.image_shape, step, piece, runtime.device, runtime.dtype)
            last = part == self.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                terms = objective(self.model, images, draws, config, beta_at(step, config.objective))
                total = terms.loss.sum()
                # DDP averages over processes: times their number and over the global batch, every image weighs the same. A loss
                # that is not finite can have a finite gradient; times 0 it is NaN, and so becomes the gradient, on all processes.
                accelerator.backward(total * (runtime.world / batch_size + total.detach() * 0))
            self._count(terms)

    def _then(self, mine: range, part: int, batch: Tensor, step: int) -> Tensor | None:
        """The rows that are taken next, for the thread that reads ahead where images are not resident."""
        if self.images.resident is not None or not len(batch):
            return None
        if part + 1 < self.accumulate:
            piece = share(mine, part + 1, self.accumulate)
            return batch[piece.start : piece.stop]
        if step + 1 == self.total_steps:
            return None
        following = self._batch(step + 1)
        mine = share(range(len(following)), self.runtime.rank, self.runtime.world)
        piece = share(mine, 0, self.accumulate)
        return following[piece.start : piece.stop]

    @torch.no_grad()
    def _count(self, terms: Terms) -> None:
        self.window.add_(torch.stack([term.sum() for term in terms]))

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
