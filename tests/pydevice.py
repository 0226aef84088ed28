"""A device in Python, "gpu": what is on it is computed on the CPU, and what a GPU would make the host wait for is kept.

Tensors of two devices do not mix, as on a GPU. ``reads`` has every read by the host and ``copies`` every copy to the
device, each with where it was asked for. Import this in a process of its own (``conftest.forked``): the device stays.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")
GPU = torch.device("gpu:0")
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default)

reads: list[str] = []
copies: list[str] = []


def _place() -> str:
    lines = traceback.extract_stack()
    ours = [
        f"{line.filename.rpartition('/')[2]}:{line.lineno} {line.line}" for line in lines if "dist_ae" in line.filename
    ]
    return " ← ".join(reversed(ours[-4:]))


class OnGpu(torch.Tensor):
    """A tensor of the device. ``raw`` has its values, and shares its memory with the views of it."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=GPU
        )
        made.raw = raw
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        reads.append(f"tolist {_place()}")
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(function, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(function, args, kwargs or {})


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, OnGpu) else value


def _dispatch(function: Any, args: Any, kwargs: Any) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnGpu)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    to_us = bool(ours) if device is None else device.type == "gpu"
    if function in READS and ours:
        reads.append(f"{function} {_place()}")
    if function is aten._to_copy.default:
        if to_us != bool(ours):
            (copies if to_us else reads).append(f"{function} {_place()}")
        out = function(_raw(args[0]), **{k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")})
        return OnGpu(out) if to_us else out
    if function is aten.copy_.default:
        into, source = args[:2]
        if isinstance(into, OnGpu) != isinstance(source, OnGpu):
            (copies if isinstance(into, OnGpu) else reads).append(f"{function} {_place()}")
        _raw(into).copy_(_raw(source))
        return into
    elsewhere = [tuple(t.shape) for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
    if ours and elsewhere:
        raise RuntimeError(
            f"{function}: tensors on the gpu with tensors of shapes {elsewhere} on the cpu, at {_place()}"
        )
    raw_args, raw_kwargs = tree_map(_raw, args), tree_map(_raw, kwargs)
    if device is not None:
        raw_kwargs["device"] = torch.device("cpu")
        raw_kwargs.pop("pin_memory", None)
    out = function(*raw_args, **raw_kwargs)
    if not to_us:
        return out
    known = {id(t.raw): t for t in ours}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        made = known.get(id(value))  # what an in-place operation gives back is what it was given
        made = OnGpu(value) if made is None else made
        assert made.shape == value.shape, f"{function} changes a shape in place, which this device cannot follow"
        return made

    return tree_map(wrapped, out)


# What autograd's own threads ask for, which no mode reaches.
_library = torch.library.Library("aten", "IMPL")


def _empty(
    size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, **_: Any
) -> OnGpu:
    return OnGpu(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, **_: Any) -> OnGpu:
    return OnGpu(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, into: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    copies.append(f"copy_from {_place()}")
    _raw(into).copy_(_raw(source))
    return into


_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")


def _drawn(
    seed: int,
    stream: int,
    step: torch.Tensor,
    rows: range,
    width: int,
    device: torch.device,
    std: float | None,
    keep: float,
) -> torch.Tensor:
    """In the place of Triton's kernel: it reads the step number where the kernel does."""
    from dist_ae.draws import philox

    assert isinstance(step, OnGpu), "the kernel needs the step number on the device"
    words = (seed, stream, int(step.raw))
    table = philox.masks(words, rows, width, keep) if std is None else philox.numbers(words, rows, width, std)
    return OnGpu(torch.from_numpy(table))


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Training and use happen on this device, about which the product is told where it asks."""
    from dist_ae import devices
    from dist_ae.draws import keyed, philox_triton
    from dist_ae.models import cost

    find_shared = safetensors.torch._find_shared_tensors
    variables = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "gpu:0"}
    keyed._kernel_works.cache_clear()
    with (
        mock.patch.object(devices, "runs_kernels", lambda device: device.type == "gpu"),
        mock.patch.object(devices, "rate_type", return_value=torch.float64),
        mock.patch.object(philox_triton, "draw_on_device", _drawn),
        mock.patch.object(cost, "_pass", return_value=cost.Cost(0, 0)),  # it looks at addresses, which these have not
        mock.patch.object(
            safetensors.torch, "_find_shared_tensors", lambda tensors: find_shared(tree_map(_raw, tensors))
        ),
        mock.patch.dict(os.environ, variables),
        _Everywhere(),
    ):
        yield
