"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ae.config import OptimConfig


class Uncompiled(Optimizer):
    """An optimizer without torch's compiler.

    On its first call, each of torch's own methods imports the compiler, only to say that it must not be compiled. That
    costs 1.2 s of a run's start and 150 MB of every process.
    """

    add_param_group, zero_grad = unwrap(Optimizer.add_param_group), unwrap(Optimizer.zero_grad)
    state_dict, load_state_dict = unwrap(Optimizer.state_dict), unwrap(Optimizer.load_state_dict)


class Adam(Uncompiled, torch.optim.Adam):
    """torch's Adam; with ``decoupled_weight_decay`` it is AdamW."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class SGD(Uncompiled, torch.optim.SGD):
    """torch's SGD."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


def build(model: nn.Module, matrices: list[nn.Parameter], config: OptimConfig) -> list[Optimizer]:
    """The optimizers of a model: one, or for muon two (Muon takes the matrices, Adam the rest).

    Learning rates are set before each step by ``set_learning_rate``. That of Adam is a tensor on the device, so that a
    step can be captured as a graph. With float64 weights on CUDA it stays a number, since torch's kernel there reads a
    tensor as float32.

    Adam is fused where torch has that kernel for the device. It takes one pass over the weights, and it is the only
    kernel that can be told on the device to skip a poisoned update.
    """
    parameters = list(model.parameters())
    adam = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay, "fused": True}
    if config.name in ("adam", "adamw"):
        exact = parameters[0].dtype == torch.float64
        on_gpu = parameters[0].device.type == "cuda" and not exact
        in_place = on_gpu or parameters[0].device.type == "cpu"
        kind = torch.float32 if on_gpu else torch.float64
        rate = torch.tensor(config.lr, dtype=kind, device=parameters[0].device) if in_place else config.lr
        adam["capturable"] = on_gpu
        return [Adam(parameters, lr=rate, decoupled_weight_decay=config.name == "adamw", **adam)]  # type: ignore[arg-type]
    if config.name == "sgd":
        return [SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return [
        Muon(matrices, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay),
        Adam(others, lr=config.lr_adam, **{**adam, "weight_decay": 0.0}),  # type: ignore[arg-type]
    ]


class Muon(Uncompiled, torch.optim.Muon):
    """torch's Muon (Jordan 2024), with updates of float64 weights orthogonalized in float64.

    torch would orthogonalize them in bfloat16. Rounding to 8 bits turns a difference in the 16th digit into one in the
    third, so a run in fp64 could not show that it is exact.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update as torch does it, in float64 where the weights are float64."""
        for group in self.param_groups:
            if group["params"][0].dtype != torch.float64:
                return unwrap(torch.optim.Muon.step)(self, closure)
            for p in group["params"]:
                momentum, lr = self.state[p]["momentum_buffer"], group["lr"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                blended = p.grad.lerp(momentum, group["momentum"])
                update = orthogonalize(blended, group["ns_coefficients"], group["ns_steps"])
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
        return None


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The nearest matrix with singular values about 1, in the type of ``matrix``.

    Newton-Schulz steps of degree five (Jordan 2024).
    """
    a, b, c = coefficients
    x: Tensor = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def materialize(optimizers: list[Optimizer]) -> None:
    """Creates every state tensor as zeros, as the first step would do.

    A checkpoint then always holds the same tensors.
    """
    for optimizer in optimizers:
        adam = isinstance(optimizer, Adam)
        for group in optimizer.param_groups:
            for p in group["params"]:
                moments = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
                optimizer.state[p] = {name: torch.zeros_like(p) for name in moments}
                if adam:
                    optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)


def state_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' live state tensors by name, ``<parameter>.<quantity>``, to be saved or copied into."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{quantity}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for quantity, tensor in state.items()
    }


def set_learning_rate(optimizers: list[Optimizer], factor: float, config: OptimConfig) -> None:
    """Sets every optimizer's learning rate to a share of its peak.

    It is done by hand, because a scheduler that Accelerate prepares steps once per process. Accelerate's wrappers share
    the groups. A rate that is a tensor keeps its place in memory, where a captured graph reads it.
    """
    for optimizer in optimizers:
        rate = factor * (config.lr if optimizer is optimizers[0] else config.lr_adam)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
