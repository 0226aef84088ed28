"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from inspect import unwrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ae import devices

if TYPE_CHECKING:
    from dist_ae.config import OptimConfig

# Norm of a matrix's update below which Muon no longer scales it up. After a PCA start, the gradients of all layers but
# the last are at first only rounding errors, since the residual of PCA is orthogonal to its code. Orthogonalized
# without this bound (times 5e9 with the usual 1e-7), they moved the weights at random, differently for each split of a
# batch.
NO_GRADIENT = 1e-4


class Uncompiled(Optimizer):
    """An optimizer without torch's compiler.

    On its first call, each of torch's own methods imports the compiler, only to disable compilation of itself. That
    costs 1.2 s at the start of a run and 150 MB in every process.
    """

    add_param_group, zero_grad = unwrap(Optimizer.add_param_group), unwrap(Optimizer.zero_grad)
    state_dict, load_state_dict = unwrap(Optimizer.state_dict), unwrap(Optimizer.load_state_dict)


class Adam(Uncompiled, torch.optim.Adam):
    """torch's Adam; with ``decoupled_weight_decay`` it is AdamW."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class SGD(Uncompiled, torch.optim.SGD):
    """torch's SGD."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


def build_optimizers(model: nn.Module, matrices: list[nn.Parameter], config: OptimConfig) -> list[Optimizer]:
    """The optimizers of a model: one, or for muon two (Muon takes the matrices, Adam the rest).

    Learning rates are set before each step by ``set_learning_rate``. They are tensors on the weights' device, so that a
    step can be captured as a graph. Adam and SGD are torch's fused kernels. They take one pass over the weights, and
    only they can be told on the device to skip a poisoned update.
    """
    parameters, betas, eps = list(model.parameters()), config.betas, config.eps
    lr, decay = _rate(config.lr, parameters[0]), config.weight_decay
    optimizers: list[Optimizer]
    if config.name in ("adam", "adamw"):
        decoupled = config.name == "adamw"
        optimizers = [Adam(parameters, lr, betas, eps, decay, decoupled_weight_decay=decoupled, fused=True)]
    elif config.name == "sgd":
        optimizers = [SGD(parameters, lr, config.momentum, weight_decay=decay, fused=True)]
    else:
        matrix_ids = {id(p) for p in matrices}
        others, lr_adam = [p for p in parameters if id(p) not in matrix_ids], _rate(config.lr_adam, parameters[0])
        optimizers = [
            Muon(matrices, lr, decay, config.momentum),  # type: ignore[arg-type]
            Adam(others, lr_adam, betas, eps, fused=True),
        ]
    _materialize(optimizers)
    return optimizers


def _rate(value: float, weights: Tensor) -> Tensor | float:
    """A learning rate as the optimizer's kernels read it: a tensor on their device, or a number."""
    dtype = devices.rate_type(weights.device, weights.dtype)
    return value if dtype is None else torch.full((), value, dtype=dtype, device=weights.device)


@contextlib.contextmanager
def capturable(optimizers: list[Optimizer]) -> Iterator[None]:
    """Lets a graph record the steps of Adam.

    Its fused kernel always has the number of steps on the device. torch only requires the flag, and warns if it is set
    and nothing is recorded.
    """
    groups = [g for optimizer in optimizers for g in optimizer.param_groups if "capturable" in g]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _materialize(optimizers: list[Optimizer]) -> None:
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


class Muon(Uncompiled, torch.optim.Muon):
    """Muon (Jordan 2024) as in torch, with two differences.

    The learning rate may be a tensor. torch's step would read it back to the host, so no graph could contain it.

    Updates of float64 weights are orthogonalized in float64. Rounding to the 8 bits of bfloat16 turns a difference in
    the 16th digit into one in the third, so a run in fp64 could not show that it is exact.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every matrix, with Nesterov's momentum."""
        for group in self.param_groups:
            lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            for p in group["params"]:
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(average, momentum)
                update = orthogonalize(ahead, group["ns_coefficients"], group["ns_steps"]).to(p.dtype)
                ratio = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - lr * decay).sub_(update * (lr * ratio))


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The nearest matrix with singular values about 1, by Newton-Schulz steps of degree five (Jordan 2024).

    Computes in bfloat16, or in float64 for float64 matrices.
    """
    a, b, c = coefficients
    x = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=NO_GRADIENT)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


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

    Done by hand, because a scheduler prepared by Accelerate steps once per process. Accelerate's wrappers share the
    groups. A rate that is a tensor keeps its address, where a captured graph reads it.
    """
    for optimizer in optimizers:
        rate = factor * (config.lr if optimizer is optimizers[0] else config.lr_adam)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
