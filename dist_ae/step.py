"""One optimizer step: rows of the dataset → images → draws → objective → gradient → weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ae import devices, likeness
from dist_ae.capture import Graph, capture
from dist_ae.config import Config, InputError
from dist_ae.data.crops import Crops, drawn_from, placed
from dist_ae.data.order import epoch_order, share
from dist_ae.data.reader import Reader
from dist_ae.data.records import Dataset
from dist_ae.draws import Step, draw, drawn_on
from dist_ae.guard import Guard
from dist_ae.likeness import Likeness
from dist_ae.models import Autoencoder, Components
from dist_ae.models.weights import weights_sha256
from dist_ae.objectives import Terms, least_sigma, terms
from dist_ae.optim import build_optimizers, capturable, set_learning_rate, state_tensors
from dist_ae.processes.clock import PARTS, shares
from dist_ae.processes.gradients import add_up, sum_gradients
from dist_ae.processes.runtime import Runtime, accumulation_steps, largest_piece
from dist_ae.timeline import Timeline, beta, ema_decay, learning_rate

Parts = dict[str, dict[str, Tensor]]  # the parts of a checkpoint, each with its tensors by name
WEIGHTS_PART, OPTIMIZER_PART, EMA_PART = "weights", "optimizer", "ema"


class Learner:
    """What a step changes: weights, optimizer state, moving average and the sums of the training metrics.

    ``step`` never reads from the device, and nothing here touches torch's global generators.
    """

    def __init__(
        self, config: Config, dataset: Dataset, model: Autoencoder, runtime: Runtime, timeline: Timeline
    ) -> None:
        self.config, self.runtime, self.timeline = config, runtime, timeline
        self.accumulate = accumulation_steps(config.train.batch_size, runtime.world, config.train.max_per_process)
        self.raw_model = model.to(runtime.device, runtime.dtype)
        self.optimizers = build_optimizers(self.raw_model, self.raw_model.matrices(), config.optim)
        self.parameters = list(self.raw_model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters] if config.train.ema_decay else []
        # Since the last line of metrics: sums of loss, distortion and rate over this process's images, and how many
        # images all processes have seen.
        self.window, self.window_images = torch.zeros(3, dtype=runtime.exact, device=runtime.device), 0
        self._likeness = Likeness(config.objective, runtime.device) if likeness.is_used(config.objective) else None
        self.guard = Guard(self.optimizers, runtime.device)
        self.images = Reader(drawn_from(dataset.train), runtime.device, runtime.dtype)
        self._split = dataset.train
        kind = config.objective.likelihood, self.raw_model.standardized, dataset.train.images.dtype == np.uint8
        self._least_sigma = least_sigma(*kind)
        self._shapes, self._shards = self.raw_model.draw_shapes(), dataset.shards
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        # What changes from step to step, in tensors that a captured graph can read.
        self._now = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self._beta = torch.zeros((), dtype=torch.float32, device=runtime.device)
        self._ema_share = torch.zeros((), dtype=runtime.dtype, device=runtime.device)  # of the newest weights
        self._rows, self._mine, self._number = self._order, range(0), 0
        self._graph_rows = self._order
        self.graph: Graph | None = None
        self._flat = False  # whether the processes exchange gradients in one piece, within the graph
        self.exchange = ""  # how the processes exchange gradients, in words

    # -- one step, in the order in which it happens

    def step(self, step: int) -> None:
        """Takes step ``step`` of the run. The arithmetic is the same on any number of processes."""
        self.runtime.clock.start()
        self.place(step)
        batch = self.timeline.positions(step)
        if self.graph is not None and len(batch) == self.config.train.batch_size:
            self.graph.replay()
        else:  # also the short last batch of an epoch
            self.compute(len(batch))
        self.window_images += len(batch)
        self.runtime.clock.images += len(batch)

    def place(self, step: int) -> None:
        """Writes the step's inputs (rows, step number, learning rate, β) to the tensors that ``compute`` reads."""
        batch = self._reader_rows(step)
        self._mine = share(range(len(batch)), self.runtime.rank, self.runtime.world)
        rows = batch[self._mine.start : self._mine.stop]
        if self.graph is not None and len(batch) == self.config.train.batch_size:
            self._rows = self._graph_rows.copy_(rows)
        else:
            self._rows = rows
        self._number = step
        self._now.fill_(step)
        self._beta.fill_(beta(step, self.config.objective))
        if self.config.train.ema_decay is not None:
            self._ema_share.fill_(1 - ema_decay(step, self.config.train.ema_decay))
        set_learning_rate(self.optimizers, self.learning_rate(step), self.config.optim)

    def compute(self, batch_size: int, update: bool = True) -> None:
        """The arithmetic of the placed step: gradient, guard, clipping, update, moving average.

        It does not depend on the step's number, so every step of a run does the same operations on the same arguments.

        Args:
            batch_size: images of the global batch. Gradients are summed over processes, so an image weighs
                1 / batch_size.
            update: False computes the gradient and leaves the weights as they are.
        """
        accelerator, config, runtime = self.runtime.accelerator, self.config, self.runtime

        # Zero the gradient first: an interrupted step may have left a part of its own.
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

        # Gradient of the mean loss over the global batch, piece by piece of this process's share.
        now = Step(self._number, self._now if devices.runs_kernels(runtime.device) else None)
        for part in range(self.accumulate):
            piece = share(self._mine, part, self.accumulate)
            first, end = piece.start - self._mine.start, piece.stop - self._mine.start
            rows, idle = self._rows[first:end], not piece
            if idle:
                # Compute the first image and give it no weight: compiled code, or a user's own model, need not accept
                # an empty batch.
                rows, piece = rows.new_zeros(1), range(piece.start, piece.start + 1)
            since = time.perf_counter()
            images = self.images.take(rows, self._next_rows(self._rows[end:], part))
            runtime.clock.count("data", since)
            draws = draw(
                self._shapes, now, piece, runtime.device, runtime.dtype,
                seed=config.seed, std=config.objective.noise_std, keep=1 - config.model.dropout,
            )  # fmt: skip
            last = part == self.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                output = self.model(images, draws)
                losses = terms(output, images, config.objective, self._beta)
                if self._likeness is not None:
                    likeness_loss = self._likeness(images, output.reconstruction)
                    losses = losses._replace(loss=losses.loss + likeness_loss)
                if idle:
                    losses = Terms(*(term[:0] for term in losses))
                total = losses.loss.sum()
                # A loss that is not finite can have a finite gradient. The loss times 0 is then NaN, which makes the
                # gradient NaN on all processes.
                accelerator.backward(total * (1 / batch_size + total.detach() * 0))
            with torch.no_grad():
                self.window.add_(torch.stack([term.sum() for term in losses]))
        if not update:
            return

        # Guard, clip, update.
        if self._flat:
            add_up(self.parameters)
        if accelerator.scaler is None:
            self.guard.check(self._now)
        if config.optim.clip_norm is not None:
            accelerator.clip_grad_norm_(self.parameters, config.optim.clip_norm)
        for optimizer, prepared in zip(self.optimizers, self.prepared, strict=True):
            if accelerator.scaler is None:
                self.guard.update(optimizer)
            else:
                prepared.step()  # fp16: the scaler skips an overflowing step and lowers its scale

        self._bound_sigma()

        # Moving average.
        if config.train.ema_decay is not None:
            weights = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.ema, weights, [self._ema_share] * len(weights))

    def least_sigma_reached(self) -> float | None:
        """The least σ if the learned σ has reached it, else None."""
        log_sigma, least = self.raw_model.log_sigma, self._least_sigma
        return least if log_sigma is not None and least and float(log_sigma.detach().exp()) < 1.001 * least else None

    @torch.no_grad()
    def _bound_sigma(self) -> None:
        """Keeps a learned σ from falling below the resolution of the data."""
        if self.raw_model.log_sigma is not None and self._least_sigma:
            self.raw_model.log_sigma.clamp_(min=math.log(self._least_sigma))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        return learning_rate(step, self.timeline.total_steps, self.config.optim)

    def _batch(self, step: int) -> Tensor:
        """The rows of the dataset that a step sees over all processes, [B].

        The order of an epoch is kept on the device that uses it.
        """
        epoch = self.timeline.epoch(step)
        if epoch != self._epoch:
            order = self._epoch_order(epoch)
            self._epoch, self._order = epoch, order if self.images.resident is None else order.to(self.runtime.device)
        positions = self.timeline.positions(step)
        return self._order[positions.start : positions.stop]

    def _reader_rows(self, step: int) -> Tensor:
        """The rows of ``_batch`` as the reader takes them: rows of crops also hold the places that the step draws."""
        rows = self._batch(step)
        if not isinstance(self._split.images, Crops):
            return rows
        config = self.config
        return torch.from_numpy(placed(self._split, rows.numpy(), config.seed, step, config.data.flip))

    def _epoch_order(self, epoch: int) -> Tensor:
        return epoch_order(self.config.seed, epoch, self.timeline.num_images, self._shards, self.config.data.window)

    def _next_rows(self, rest: Tensor, part: int) -> Tensor | None:
        """The rows that this process needs next, for the thread that reads ahead. None if images are resident.

        Args:
            rest: the rows of this process's part of the batch that follow piece ``part``.
        """
        if self.images.resident is not None:
            return None
        if part + 1 < self.accumulate:
            piece = share(self._mine, part + 1, self.accumulate)
            return rest[: len(piece)]
        if self._number + 1 >= self.timeline.total_steps:
            return None
        following = self._reader_rows(self._number + 1)
        mine = share(range(len(following)), self.runtime.rank, self.runtime.world)
        piece = share(mine, 0, self.accumulate)
        return following[piece.start : piece.stop]

    # -- before the first step

    @torch.no_grad()
    def start_from(self, components: Components) -> None:
        """Sets the weights, and their moving average, to the linear code of these components."""
        self.raw_model.start_from(components, self.config.objective)
        self._bound_sigma()
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            average.copy_(parameter)

    def prepare(self) -> None:
        """Hands the model to Accelerate, broadcasts rank 0's weights and optimizer state, and makes a dry run."""
        accelerator = self.runtime.accelerator
        if self.config.train.compile:
            self.raw_model.compile()
        self._flat = self.runtime.world > 1 and self._wants_graph()
        if self._flat:  # no DDP, whose hooks belong to no graph
            self.model = accelerator.prepare_model(self.raw_model, evaluation_mode=True)
            self.prepared = [accelerator.prepare_optimizer(optimizer) for optimizer in self.optimizers]
            self.exchange = "in one piece, within the step's graph"
            for tensor in self.raw_model.state_dict().values():
                dist.broadcast(tensor, 0)
        else:
            self.model, *self.prepared = accelerator.prepare(self.raw_model, *self.optimizers)
        if self.runtime.world > 1 and not self._flat:
            self.exchange = sum_gradients(self.model, self.runtime, self.config.train.gradient_type == "bf16")
        if self.runtime.world > 1:
            for tensor in [*state_tensors(self.raw_model, self.optimizers).values(), *self.ema]:
                dist.broadcast(tensor, 0)
        # DDP lays out its buckets anew during the first backward passes (with a static graph, after the second), which
        # changes the order in which gradients are added up. Batches without weight get that over with, so a resumed run
        # adds up as the uninterrupted one does. Compiled code is for one size, so its batches have the size of a step.
        batch = range(self.config.train.batch_size if self.config.train.compile else 0)
        self._mine, window = share(batch, self.runtime.rank, self.runtime.world), self.window.clone()
        self._rows = torch.zeros(len(self._mine), dtype=torch.int64)
        for _ in range(3 if self.runtime.world > 1 else 1):
            self.compute(max(1, len(batch)), update=False)
        self.window.copy_(window)
        if self._wants_graph():
            size = self.config.train.batch_size
            self.place(0)
            self._rows = self._graph_rows = self._rows.clone()  # the tensor that the graph reads
            self.graph = self._captured(size)
        self.runtime.clock.take()  # the time until here belongs to no step

    def _captured(self, size: int) -> Graph | None:
        """The placed step as a graph.

        Raises:
            InputError: a graph is asked for, and the step could not be captured.
        """

        def recorded() -> None:
            with capturable(self.optimizers):
                self.compute(size)

        graph = capture(
            lambda: self.compute(size),
            self._changed_by_a_step(),
            self.runtime.device,
            recorded=recorded,
            drop=self.raw_model.zero_grad,
        )
        if self.runtime.largest(float(graph is None))[0]:
            graph = None  # on all processes: a step that only some of them replay would never end
        if graph is None and self.config.train.cuda_graph == "on":
            raise InputError("train.cuda_graph on: the step could not be captured, as said above; use auto or off")
        return graph

    def _wants_graph(self) -> bool:
        """Whether the step is to run as one CUDA graph.

        Raises:
            InputError: a graph is asked for and not possible; gives the reason.
        """
        config, device = self.config, self.runtime.device
        obstacles = {
            "it needs a CUDA device": not devices.captures(device),
            "several processes need NCCL 2.9.6 or later": self.runtime.world > 1
            and not devices.adds_up_in_graphs(device),
            "several processes need gradient_type exact": self.runtime.world > 1
            and config.train.gradient_type != "exact",
            "float64 keeps its learning rate on the host": config.precision == "fp64",
            "the images do not fit on the device": self.images.resident is None,
            "a feature network is a program of its own": config.objective.perceptual is not None,
            "its random draws need Triton": config.has_draws() and not drawn_on(device),
        }
        reason = next((reason for reason, holds in obstacles.items() if holds), None)
        if config.train.cuda_graph == "on" and reason is not None:
            raise InputError(f"train.cuda_graph on: {reason}; use auto or off")
        # Several processes use graphs only if asked to: nobody has run them so.
        wanted = config.train.cuda_graph == "on" or (config.train.cuda_graph == "auto" and self.runtime.world == 1)
        return wanted and reason is None

    def _changed_by_a_step(self) -> list[Tensor]:
        """Every tensor that ``compute`` changes and that outlives it."""
        tensors = [tensor for part in self.tensors().values() for tensor in part.values()]
        scaler = self.runtime.accelerator.scaler  # for fp16, whose kernels change its scale on the device
        scales = [] if scaler is None else [scaler._scale, scaler._growth_tracker]
        return [*tensors, *scales, self.window, self.guard.poisoned, self.guard.first_bad_step]

    # -- what a checkpoint keeps

    def tensors(self) -> Parts:
        """All live tensors that a checkpoint holds, to be saved or copied into."""
        parts = {WEIGHTS_PART: dict(self.raw_model.state_dict())}
        parts[OPTIMIZER_PART] = state_tensors(self.raw_model, self.optimizers)
        if self.ema:
            names = (name for name, _ in self.raw_model.named_parameters())
            parts[EMA_PART] = dict(zip(names, self.ema, strict=True))
        return parts

    def state(self) -> tuple[Parts, dict[str, Any]]:
        """The live tensors, and the other values that a checkpoint keeps, JSON-ready.

        Sums over the processes: each must call it.
        """
        scaler = self.runtime.accelerator.scaler
        values = {
            "window": self.runtime.sum(self.window.clone()).tolist(),
            "window_images": self.window_images,
            "scaler": scaler.state_dict() if scaler else None,
        }
        return self.tensors(), values

    @torch.no_grad()
    def load(self, parts: Parts, values: Mapping[str, Any]) -> None:
        """Restores what ``state`` returned.

        Args:
            parts: the tensors, on rank 0, and nothing on the other processes, to which ``prepare`` broadcasts them.
            values: the other values, on every process.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: ``state`` cannot have returned these values.
        """
        live = self.tensors()
        for name, tensors in parts.items():
            for key, tensor in tensors.items():
                live[name][key].copy_(tensor)
        self.window_images = int(values["window_images"])
        if self.runtime.is_main:  # rank 0 continues the sums of all processes
            self.window.copy_(torch.tensor(values["window"], dtype=self.window.dtype))
        if values["scaler"] and self.runtime.accelerator.scaler is not None:
            self.runtime.accelerator.scaler.load_state_dict(values["scaler"])

    def used_weights(self) -> dict[str, Tensor]:
        """The weights that are evaluated and used: the moving average, if there is one."""
        parts = self.tensors()
        return {**parts[WEIGHTS_PART], **parts.get(EMA_PART, {})}

    # -- queries

    def memory(self, activations: int) -> int:
        """Bytes that training takes on this process, besides the images themselves.

        They hold the weights, their gradients, the optimizer's state, the moving average, and ``activations`` bytes for
        each image in a piece of the batch.
        """
        parts = self.tensors()
        gradients = parts[WEIGHTS_PART].values()  # as large as the weights
        tensors = [*gradients, *(tensor for part in parts.values() for tensor in part.values())]
        train = self.config.train
        images = largest_piece(train.batch_size, self.runtime.world, train.max_per_process)
        return sum(tensor.nbytes for tensor in tensors) + images * activations

    def rows(self, step: int) -> Tensor:
        """The rows of the dataset that a step sees over all processes, [B], on the host."""
        return self._batch(step).cpu()

    def take_window(self) -> dict[str, float]:
        """Means over all processes' images since the last call, in nats per image, and where the time went.

        Reads from the device.
        """
        runtime, images = self.runtime, self.window_images
        # The same sum carries each process's seconds, in a row that is zero on all other processes.
        seconds = self.window.new_zeros(runtime.world, len(PARTS))
        seconds[runtime.rank] = self.window.new_tensor(runtime.clock.take())
        all_sums = runtime.sum(torch.cat([self.window, seconds.flatten()]))
        sums, seconds_by_rank = all_sums[:3].tolist(), all_sums[3:].view_as(seconds).tolist()
        self.window.zero_()
        self.window_images = 0
        means = dict(zip(("loss", "distortion", "rate"), (value / images for value in sums), strict=True))
        return {**means, **shares(seconds_by_rank)}

    def refuse_divergence(self) -> None:
        """Raises RuntimeError unless the weights are the same to the bit on every process."""
        digest = int(weights_sha256(self.tensors()[WEIGHTS_PART])[:13], 16)  # 52 bits: exact in a float64
        largest, smallest = self.runtime.largest(digest, -digest)
        if largest != -smallest:
            raise RuntimeError(
                "the weights differ between processes; please report this: "
                "it cannot happen while the gradient is averaged exactly"
            )

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Replaces the weights by their moving average, if there is one, for the length of an evaluation."""
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @contextlib.contextmanager
    def weights_from(self, read: Callable[[], dict[str, Tensor] | None]) -> Iterator[bool]:
        """Replaces the weights of all processes by those that ``read`` returns on rank 0, and restores them at the end.

        Yields whether ``read`` returned any.
        """
        model, before = self.raw_model, {name: tensor.clone() for name, tensor in self.raw_model.state_dict().items()}

        def fill() -> bool:
            weights = read()
            if weights is not None:
                model.load_state_dict(weights)
            return weights is not None

        filled = bool(self.runtime.on_main(fill))
        if filled and self.runtime.world > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        try:
            yield filled
        finally:
            model.load_state_dict(before)

    @torch.no_grad()
    def _swap_ema(self) -> None:
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)
