"""The abilities of devices. All questions about the kind of a device are answered here.

Callers use the module (``devices.captures(device)``), so that a test can replace an answer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from functools import cache
from pathlib import Path

import torch

from dist_ae.errors import InputError

SHARED_BY = "DIST_AE_GPU_SHARE"
# Limits of oneDNN's instruction set with which it multiplies bfloat16 only by conversion to float32.
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16. Emulation does not count.

    On a CPU they are AMX-BF16, AVX512-BF16 or Arm's BF16, if ``ONEDNN_MAX_CPU_ISA`` allows them. NVIDIA's GPUs have
    them from compute capability 8.0 on.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return limit not in _WITHOUT_BF16 and not _cpu_flags().isdisjoint(("amx_bf16", "avx512_bf16", "bf16"))


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels may run on the device. Their callers try whether they do."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def captures(device: torch.device) -> bool:
    """Whether a step can be captured as a graph."""
    return device.type == "cuda"


def adds_up_in_graphs(device: torch.device) -> bool:
    """Whether a graph can hold the sum of gradients over processes: NCCL's can since 2.9.6."""
    return device.type == "cuda" and torch.cuda.nccl.version() >= (2, 9, 6)  # type: ignore[no-untyped-call]


def pins(device: torch.device) -> bool:
    """Whether copies from page-locked memory are asynchronous."""
    return device.type == "cuda"


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64, as exact sums need."""
    return device.type != "mps"


def exact_type(device: torch.device) -> torch.dtype:
    """The type of sums over many images."""
    return torch.float64 if has_float64(device) else torch.float32


def weight_type(precision: str) -> torch.dtype:
    """The type of weights and images; lower precisions use autocast."""
    return torch.float64 if precision == "fp64" else torch.float32


def rate_type(device: torch.device, weights: torch.dtype) -> torch.dtype | None:
    """The type of a learning rate that the optimizer's kernels read on the device. None: it stays on the host.

    torch's CUDA kernels read a tensor as float32, which would round the rate of float64 weights.
    """
    if device.type == "cpu":
        return torch.float64
    return torch.float32 if device.type == "cuda" and weights != torch.float64 else None


def keeps_channels_last(device: torch.device) -> bool:
    """Whether torch's GroupNorm keeps channels-last order, which CUDA's does not."""
    return device.type != "cuda"


def free_bytes(device: torch.device, held: int = 0) -> int | None:
    """Bytes that this process can still allocate on the device; None for a device that uses the host's memory.

    If several processes share a GPU, as a sweep's trials do, ``DIST_AE_GPU_SHARE`` is the share of each.

    Args:
        held: bytes that this process already holds and that count towards its share.

    Raises:
        InputError: that variable is not a share.
    """
    if device.type != "cuda":
        return None
    try:
        share = float(os.environ.get(SHARED_BY, "1"))
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(
            f"the environment variable {SHARED_BY} is {os.environ[SHARED_BY]!r}; expected a share, such as 0.25"
        )
    free, total = torch.cuda.mem_get_info(device)
    return int(min(free, share * total - held))


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its outstanding work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a device the current one, on which kernels and graphs are launched whatever tensors they work on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@cache
def _cpu_flags() -> frozenset[str]:
    """The flags of the processor, as Linux names them."""
    if hasattr(torch.cpu, "get_capabilities"):  # the oldest supported torch lacks it
        return frozenset(name for name, present in torch.cpu.get_capabilities().items() if present)
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return frozenset(
            word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()
        )
    return frozenset()
