"""Keeps a non-finite gradient out of the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_ae import devices


class Guard:
    """Keeps a non-finite gradient out of the weights without reading anything back to the host.

    ``poisoned`` is a scalar on the device that becomes 1 at the first non-finite gradient and stays 1. From then on
    every update is skipped, so that its readers (at logging steps and before a checkpoint) find the weights of the last
    good step. It takes one pass over the gradients, 1 % of a step.
    """

    def __init__(self, optimizers: list[Optimizer], device: torch.device) -> None:
        self.optimizers = optimizers
        self.poisoned = torch.zeros((), device=device)
        kind = devices.exact_type(device)
        self.first_bad_step = torch.full((), -1.0, device=device, dtype=kind)
        self._one = torch.ones((), device=device)

    @torch.no_grad()
    def check(self, step: Tensor) -> None:
        """Checks the gradients of step ``step`` (a scalar on the device), which are summed over the processes.

        All processes get the same result.
        """
        gradients = [p.grad for o in self.optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]
        # torch's own GradScaler also uses this function. It sets `poisoned` to 1 and never back to 0.
        for same_type in ([g for g in gradients if g.dtype == dtype] for dtype in {g.dtype for g in gradients}):
            torch._amp_foreach_non_finite_check_and_unscale_(same_type, self.poisoned, self._one)
        first = (self.poisoned > 0) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(first, step, self.first_bad_step))

    def bad_step(self) -> int | None:
        """The first step whose gradient was not finite, if any. Reads from the device."""
        step = int(self.first_bad_step.item())
        return step if step >= 0 else None

    @torch.no_grad()
    def update(self, optimizer: Optimizer) -> None:
        """``optimizer.step()`` unless poisoned."""
        if optimizer.defaults.get("fused"):
            optimizer.grad_scale, optimizer.found_inf = None, self.poisoned  # type: ignore[attr-defined]
            optimizer.step()
            return
        # Other optimizers cannot skip on the device. They step, and the old weights are restored if the update was
        # poisoned, which costs one copy of the weights.
        parameters: list[Tensor] = [p for g in optimizer.param_groups for p in g["params"]]
        before = [p.clone() for p in parameters]
        optimizer.step()
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(torch.where(self.poisoned > 0, old, parameter))
