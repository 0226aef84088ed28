"""Strictly reads the environment that launcher and shell set, and keeps it from changing the experiment."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator

import psutil
import torch
import torch.distributed as dist

from dist_ae.config import Config, Fault, InputError

HOW_TO_START = "Start with `accelerate launch` or `torchrun`, as in launch/README.md"
WORLD_NAMES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
YES, NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")
# Unsupported ways to distribute a model: here every process holds all weights.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Accelerate's parallelism configuration",
}
# oneDNN reads these on its own and then computes fp32 products in bf16.
REDUCED_PRODUCTS = ("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")


def whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise InputError(
            f"the environment variable {name} is {text!r}, not a whole number. Unset it, or: {HOW_TO_START}"
        )
    return int(text)


def launched_world() -> tuple[int, int]:
    """(rank, number of processes) as the launcher put them into the environment.

    Raises:
        InputError: a value is not valid, or several processes lack what they need to find each other.
    """
    world = max(whole_number(name, 1) for name in WORLD_NAMES)
    rank = whole_number("RANK", 0)
    if rank >= world:
        raise InputError(
            f"the environment variable RANK is {rank}, but {world} process{'es are' if world > 1 else ' is'} "
            f"announced. Unset it, or: {HOW_TO_START}"
        )
    required = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in required if name not in os.environ]
    if world > 1 and not dist.is_initialized():
        if missing:
            raise InputError(
                f"the environment announces {world} processes but {', '.join(missing)} is not set. {HOW_TO_START}"
            )
        if not 0 < whole_number("MASTER_PORT", 0) < 2**16:
            raise InputError(f"the environment variable MASTER_PORT is {os.environ['MASTER_PORT']!r}, not a port")
    return rank, world


def use_cpu() -> bool:
    """Whether to train on the CPU, because the user asks for it or there is nothing else."""
    setting = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    if setting not in YES + NO:
        raise InputError(f"the environment variable ACCELERATE_USE_CPU is {setting!r}; expected true or false")
    return setting in YES or not torch.accelerator.is_available() or leaves_mps()


def leaves_mps() -> bool:
    """Whether to avoid a Mac's GPU: the user does not ask for it, and this project has never been run on one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type == "mps" and not os.environ.get("ACCELERATE_USE_CPU")


def check_environment() -> None:
    """Refuses variables that would change the experiment from outside and cannot be pinned.

    Raises:
        InputError: naming the variable.
    """
    for name, what in UNSUPPORTED.items():
        if os.environ.get(name, "").lower() in YES:
            raise InputError(
                f"the launcher asks for {what} ({name}); this trainer keeps whole weights on every process. "
                "Use a file of launch/accelerate/, or run `accelerate config` again"
            )
    for name in REDUCED_PRODUCTS:
        if os.environ.get(name, "").upper() not in ("", "STRICT"):
            raise InputError(f"the environment variable {name} rounds fp32 products; unset it, or use --precision bf16")
    # NVIDIA's libraries obey this variable whatever torch asks for: 1 rounds fp32 products, 0 forbids tf32.
    if os.environ.get("NVIDIA_TF32_OVERRIDE", "") != "":
        raise InputError(
            "the environment variable NVIDIA_TF32_OVERRIDE changes how fp32 products are rounded; unset it, and use "
            "--precision tf32 or fp32"
        )


def notes(config: Config) -> list[str]:
    """One line for each request of the launcher that is not met."""
    lines = []
    requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested not in ("no", config.precision):
        lines.append(
            f"note: the launcher asks for mixed precision {requested}; the experiment sets {config.precision}, which "
            f"is used. --precision {requested} changes the experiment"
        )
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", ""):
        lines.append(
            "note: the launcher asks for gradient accumulation, which is not used: the batch size of the experiment is "
            "global. --train.max-per-process accumulates without changing it"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""):
        lines.append("note: the launcher asks for torch.compile; here only --train.compile turns it on")
    several_hosts = whole_number("LOCAL_WORLD_SIZE", 1) < launched_world()[1]
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if several_hosts and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        lines.append(
            "note: torchrun will restart processes with the store of the earlier ones, which still holds old addresses "
            '("Connection refused"). Start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as '
            "launch/torchrun/elastic.sh does"
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and launched_world()[1] == 1:
        lines += _default_file_note()
    return lines


def _default_file_note() -> list[str]:
    """A note if the user's default file asks for MULTI_CPU, for which Accelerate silently starts one process."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    try:
        defaults = load_config_from_file(default_config_file)
        kind, processes = str(defaults.distributed_type).rpartition(".")[2], int(defaults.num_processes)
    except Exception:  # there is none, or Accelerate itself cannot read it: not ours to report
        return []
    if kind != "MULTI_CPU" or processes == 1:
        return []
    return [
        f"note: {default_config_file} asks for {processes} processes on the CPU, and Accelerate started one, as it "
        "does for MULTI_CPU. launch/accelerate/cpu_processes.yaml starts several"
    ]


@contextlib.contextmanager
def pinned_torch(precision: str) -> Iterator[None]:
    """Gives torch the experiment's settings for the length of a run, then restores the caller's settings.

    Raises:
        InputError: another default device is set, or the call is inside ``torch.autocast``, which would reuse the first
            step's rounded weights in all later steps.
    """
    nested = torch.autocast_increment_nesting() > 1
    torch.autocast_decrement_nesting()
    if nested:
        raise InputError("train is called inside torch.autocast; call it outside: the configuration sets the precision")
    if torch.get_default_device().type != "cpu":
        raise InputError(
            f"torch's default device is set to {torch.get_default_device()}; the launcher decides where a run "
            "computes. Call torch.set_default_device(None) first"
        )
    dtype, products = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    cudnn_settings = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    with torch.inference_mode(False), torch.enable_grad():
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        # Always the same algorithms for the same shapes, so that a resumed run adds up as the uninterrupted one does.
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = precision == "tf32", True, False
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(products)
            cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = cudnn_settings


@contextlib.contextmanager
def without_accelerates_variables() -> Iterator[None]:
    """Hides the variables that Accelerate falls back on when we pass nothing: accumulation, compilation, plugins."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    visible = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")
    for name in hidden:
        if name not in visible:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def choose_interface() -> None:
    """Tells gloo which network interface reaches the main process.

    gloo announces the address that the host's own name resolves to. On Debian that is 127.0.1.1, which no other host
    can reach. A connected UDP socket, which sends nothing, shows the right address; on a single machine that is the
    loopback.

    Raises:
        InputError: there are several hosts, and the main process's address is this host's loopback.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    main = os.environ["MASTER_ADDR"]
    several_hosts = whole_number("LOCAL_WORLD_SIZE", 1) < whole_number("WORLD_SIZE", 1)
    try:
        family, _, _, _, target = socket.getaddrinfo(main, whole_number("MASTER_PORT", 1), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            address = probe.getsockname()[0].partition("%")[0]
    except OSError as error:
        raise InputError(
            f"the main process's host {main!r} (MASTER_ADDR) cannot be reached from here: {error}"
        ) from None
    if several_hosts and ipaddress.ip_address(address).is_loopback:
        raise InputError(
            f"MASTER_ADDR {main!r} is this host's loopback ({target[0]}), which other hosts cannot reach; Debian's "
            "/etc/hosts gives it for a host's own name. Use the address of a network: --main_process_ip ADDRESS, or "
            "for torchrun --rdzv-endpoint ADDRESS:PORT and --local-addr ADDRESS"
        )
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


@contextlib.contextmanager
def interface_to_main(wanted: bool) -> Iterator[None]:
    """``choose_interface`` while a process group forms. Processes that start later do not see the choice."""
    preset = "GLOO_SOCKET_IFNAME" in os.environ
    if wanted:
        choose_interface()
    try:
        yield
    finally:
        if not preset:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


@contextlib.contextmanager
def explained_rendezvous(seconds: float) -> Iterator[None]:
    """Turns errors of the rendezvous into one sentence on every host.

    Raises:
        Fault: the process group could not be formed within the time-out, or another process left before that.
    """
    try:
        yield
    except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
        raise Fault(
            f"the device of rank {launched_world()[0]} on host {socket.gethostname()} could not be used: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    except RuntimeError as error:  # what torch and gloo raise, of several types
        world = launched_world()[1]
        if world == 1:
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".?")
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise Fault(
                f"{where} is in use, most likely by another launch on this machine: give this one a port of its own "
                "(accelerate launch --main_process_port PORT, torchrun --master-port PORT, or MASTER_PORT)"
            ) from error
        raise Fault(
            f"host {socket.gethostname()} did not meet all {world} processes at {where} (time-out {seconds:g} s, "
            f"train.timeout): {reason}. Another process ended first, or a host cannot be reached; "
            "see the messages of the other hosts"
        ) from error
