"""The CUDA path without a GPU, on the device of tests/pydevice.py: whole runs, bit for bit those of the CPU."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import SMALL, Forked, digits_file, environment, forked

from dist_ae import capture, devices, pca, step
from dist_ae.config import Fault, InputError
from dist_ae.data import reader, sources
from dist_ae.data.records import Split
from dist_ae.evaluate import batches
from dist_ae.models import build
from dist_ae.models.conv import normalized
from dist_ae.presets import PRESETS
from dist_ae.processes.environment import check_environment, explained_rendezvous, pinned_torch
from dist_ae.processes.runtime import Alone, Runtime, check_device
from dist_ae.scores import in_batches
from dist_ae.step import Learner
from dist_ae.timeline import Timeline

CONV = {"model.widths": (4, 8), "model.latent_dim": 2, "evaluation.batch_size": 64}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"optim.name": "muon"},
    {"optim.name": "sgd", "optim.lr": 1e-4, "train.max_per_process": 32},
    {"optim.clip_norm": 1.0, "train.ema_decay": 0.9},
    {"objective.likelihood": "discretized", "model.start": "random"},
]


def experiment(preset: str, folder: Path, data: str, more: dict[str, Any]) -> dict[str, Any]:
    settings = {**SMALL, **(CONV if preset.startswith("conv") else {}), **more, "data.name": data}
    settings |= {"train.steps": 8, "train.eval_every": 4, "train.log_every": 3, "optim.schedule": "constant"}
    return settings | {"train.batch_size": 48, "train.cuda_graph": "off", "run_dir": str(folder)}


def whole_life(preset: str, folder: Path, data: str, more: dict[str, Any]) -> None:
    """Trains, is cut, resumes, calibrates and is used, on the device and on the CPU."""
    import pydevice

    import dist_ae

    pictures = np.load(data.removeprefix("array:"))[:20]
    take: Any = Learner.step
    blocked: list[str] = []

    def step(self: Learner, number: int) -> None:
        before = len(pydevice.reads), len(pydevice.copies)
        take(self, number)
        found = pydevice.reads[before[0] :] + pydevice.copies[before[1] :]
        orders = [each for each in found if "order.to(" in each]  # once an epoch, and where a run begins
        assert len(orders) <= 1
        blocked.extend(f"step {number}: {each}" for each in found if each not in orders)

    def use(run_dir: Path, device: str) -> dict[str, Any]:
        trained = dist_ae.load(run_dir, device=device)
        found = {
            "score": trained.score(pictures),
            "code": trained.embed(pictures),
            "images": trained.reconstruct(pictures),
        }
        found["threshold"] = torch.tensor(trained.threshold(0.9))
        if trained.config.model.variational:
            found["sample"] = trained.sample(3)
        if preset in ("ae", "conv") and not more:
            trained.export()
        return found

    def life(where: str) -> dict[str, Any]:
        config = PRESETS[preset].override(experiment(preset, folder / where, data, more))
        dist_ae.train(config.override({"train.steps": 4}))
        result = dist_ae.train(config)
        lines = [json.loads(line) for line in (folder / where / "metrics.jsonl").read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if not k.startswith(("time_", "images_per"))} for line in lines]
        return {"weights": result.weights_sha256, "metrics": result.metrics, "lines": lines}

    Learner.step = step  # type: ignore[method-assign, assignment]
    with pydevice.computing():
        on_device, used = life("gpu"), use(folder / "gpu", "gpu:0")
    assert not blocked, "\n".join(blocked[:5])
    on_cpu, usual = life("cpu"), use(folder / "cpu", "cpu")
    assert on_device == on_cpu
    assert used.keys() == usual.keys() and all(torch.equal(used[k], usual[k]) for k in used)


def in_one_process(cases: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    data = digits_file(tmp_path, 120)

    def work(rank: int) -> None:
        for number, (preset, more) in enumerate(cases):
            try:
                whole_life(preset, tmp_path / str(number), data, more)
            except BaseException as error:
                raise AssertionError(f"{preset} {more}") from error

    group = Forked(1, work, tmp_path / "log")
    assert group.wait(240) == [0], group.output()[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["ae", "denoising", "dropout", "vae", "conv", "conv-denoising", "conv-dropout", "conv-vae"]
)
def test_a_whole_run_on_a_device_is_the_cpus_and_no_step_makes_the_host_wait(preset: str, tmp_path: Path) -> None:
    settings = SETTINGS if preset == "ae" else SETTINGS[:1]
    if preset == "denoising":
        settings = [*settings, {"objective.noise_std": (0.05, 0.3)}]
    in_one_process([(preset, more) for more in settings], tmp_path)


# -- what a kernel, a graph or a driver does to a run, as logic


@pytest.mark.slow
def test_without_a_compiler_draws_are_made_on_the_host_with_one_warning(tmp_path: Path) -> None:
    # Triton calls a C compiler at the first launch of a kernel; this is its own error where there is none.
    data = digits_file(tmp_path, 120)

    def work(rank: int) -> None:
        import pydevice
        from triton.runtime import build

        import dist_ae
        from dist_ae.draws import philox_triton

        config = PRESETS["denoising"].override(experiment("denoising", tmp_path / "gpu", data, {}))
        with pydevice.computing(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", "/nonexistent")
            patch.delenv("CC", raising=False)
            find = getattr(build, "_find_compiler", None)  # newer versions look for it once
            if find is not None:
                find.cache_clear()
            missing = (lambda: find("c")) if find else lambda: build._build("x", "", str(tmp_path), [], [], [], [])
            patch.setattr(philox_triton, "draw_on_device", lambda *_: missing())
            found = dist_ae.train(config).weights_sha256
        usual = dist_ae.train(config.override({"run_dir": str(tmp_path / "cpu")}))
        assert found == usual.weights_sha256

    group = Forked(1, work, tmp_path / "log")
    assert group.wait(120) == [0], group.output()[-4000:]
    assert group.output().count("Failed to find C compiler") == 1
    assert "drawn on the host" in group.output() and "gcc" in group.output()


class Recorded:
    """In the place of a CUDA graph: it computes the step where a graph replays it, or fails where a capture can."""

    fault = ""

    def __init__(self, work: Any, recorded: Any, device: Any, warm_ups: int) -> None:
        self.work, self.replays = work, 0
        for _ in range(warm_ups):
            work()
        recorded()
        if self.fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self) -> None:
        self.replays += 1
        self.work()
        if self.fault == "difference":
            self.state[0].add_(1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["", "capture", "difference"])
@pytest.mark.parametrize("more", [{}, {"optim.name": "muon"}, {"train.ema_decay": 0.9}], ids=str)
def test_whatever_becomes_of_a_capture_the_next_steps_are_those_of_an_eager_run(
    fault: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = learner({**more, "train.cuda_graph": "off"})
    monkeypatch.setattr(devices, "captures", lambda device: True)
    monkeypatch.setattr(Recorded, "fault", fault)
    monkeypatch.setattr(capture, "Graph", Recorded)
    seen: list[bool] = []
    monkeypatch.setattr(Learner, "_changed_by_a_step", noting(Learner._changed_by_a_step, Recorded))
    monkeypatch.setattr(step, "capturable", noting_capturable(step.capturable, seen))
    graphed = learner(more)
    assert (graphed.graph is None) == bool(fault) and seen == [True]
    assert ("runs without one" in capsys.readouterr().err) == bool(fault)
    assert not any(p.grad is not None for p in graphed.parameters) or not fault
    assert not any(group.get("capturable") for optimizer in graphed.optimizers for group in optimizer.param_groups)
    for number in range(4):
        eager.step(number)
        graphed.step(number)
    assert eager.take_window()["loss"] == graphed.take_window()["loss"]
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters, graphed.parameters, strict=True))
    if fault:
        with pytest.raises(InputError, match="could not be captured"):
            learner({**more, "train.cuda_graph": "on"})


def noting(real: Any, graph: type[Recorded]) -> Any:
    def changed(self: Learner) -> Any:
        graph.state = real(self)  # type: ignore[attr-defined]
        return graph.state  # type: ignore[attr-defined]

    return changed


def noting_capturable(real: Any, seen: list[bool]) -> Any:
    @contextlib.contextmanager
    def told(optimizers: Any) -> Any:
        with real(optimizers):
            seen.append(all(g.get("capturable", True) for o in optimizers for g in o.param_groups))
            yield

    return told


def learner(more: dict[str, Any]) -> Learner:
    config = PRESETS["vae"].override({**SMALL, **more})
    dataset = sources.load(config.data)
    steps = Timeline.of(config.train, len(dataset.train))
    made = Learner(config, dataset, build(config, dataset.image_shape), Runtime(config), steps)
    made.prepare()
    return made


@pytest.mark.slow
def test_gradients_of_two_processes_travel_in_one_piece_in_the_graph_if_asked(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        import dist_ae

        torch.distributed.init_process_group("gloo")  # one for all runs
        config = PRESETS["ae"].override({**SMALL, "train.steps": 20, "train.timeout": 60})
        devices.captures = lambda device: True
        capture.Graph = Recorded  # type: ignore[assignment, misc]
        hashes = set()
        for graph, able in (("off", True), ("auto", True), ("on", False), ("on", True)):
            devices.adds_up_in_graphs = lambda device, able=able: able  # type: ignore[misc]
            asked = config.override({"train.cuda_graph": graph, "run_dir": str(tmp_path / f"{graph}-{able}")})
            if able:
                hashes.add(dist_ae.train(asked).weights_sha256)
            else:
                with pytest.raises(InputError, match=r"NCCL 2\.9\.6"):
                    dist_ae.train(asked)
        assert len(hashes) == 1  # two numbers have one sum, in whatever order

    group = Forked(2, work, tmp_path / "log")
    assert group.wait(200) == [0, 0], group.output()[-4000:]
    assert group.output().count("in one piece") == 1


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("mask", [True, False])
def test_the_kernel_compiles_for_every_gpu_and_stores_whole_lines(capability: int, mask: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_ae.draws import philox_triton

    pointers = {"out": "*fp32", "table": "*fp32", "key": "*i64", "step": "*i64", "first": "i64", "num_blocks": "i64"}
    signature = pointers | {"width": "i32", "per_row": "i32", "limit": "i32", "scale": "fp32"}
    signature |= {"MASK": "constexpr", "BLOCKS": "constexpr"}
    constants = {"MASK": mask, "BLOCKS": philox_triton.BLOCKS}
    # As at a launch: pointers are multiples of 16, and so is a width such as 784.
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 6)}
    source = ASTSource(fn=philox_triton._fill, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    ptx = made.asm["ptx"]
    assert "mul.hi.u64" in ptx and "mul.hi.s64" not in ptx  # the generator's products are of unsigned words
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert stores and all(".v4." in line for line in stores), stores
    assert all(re.search(r"\[ ?%rd", line) for line in stores)  # 64-bit addresses: a table may have more than 2 GiB


def on_cuda(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_more_processes_than_gpus_are_refused_before_nccl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match=r"8 processes were started on host .*, which has 2 GPUs.*--num_processes"):
        check_device(PRESETS["ae"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_device(PRESETS["ae"].override({"precision": "fp32"}))


def test_a_device_that_fails_at_the_start_is_not_taken_for_a_missing_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    for error in (
        torch.AcceleratorError("CUDA error: device busy\nmore"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        with (
            pytest.raises(Fault, match=r"the device of rank 0 on host .* could not be used: CUDA") as found,
            explained_rendezvous(5),
        ):
            raise error
        assert "did not meet" not in str(found.value)


def test_cudnn_takes_the_same_algorithms_in_every_run_and_gets_the_callers_settings_back() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.benchmark = True
        with pinned_torch("fp32"):
            assert cudnn.deterministic and not cudnn.benchmark
        assert cudnn.benchmark and not cudnn.deterministic
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def test_kernels_and_graphs_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_ae.draws import philox_triton

    made: list[Any] = []

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **constants: made.append("launch")

    @contextlib.contextmanager
    def current(device: torch.device) -> Any:
        made.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(philox_triton, "_fill", Launched())
    second, empty = torch.device("cuda:1"), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))
    for name in ("_table", "_key"):
        monkeypatch.setattr(philox_triton, name, lambda *_: None)
    philox_triton.draw_on_device(1, 2, torch.tensor(0), range(4), 20, second, 1.0, 1.0)
    assert made == [second, "launch"]
    graph = object.__new__(capture.Graph)
    graph._device, graph._graph = second, mock.Mock(replay=lambda: made.append("replay"))
    graph.replay()
    assert made[2:] == [second, "replay"]


def test_all_readers_of_a_process_share_half_of_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, size = torch.device("meta"), 1000
    total, taken = 10 * size, 0
    monkeypatch.setattr(reader, "_held", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - taken, total))

    def readers(share: str) -> int:
        nonlocal taken
        monkeypatch.setenv(devices.SHARED_BY, share)
        monkeypatch.setattr(reader.devices, "free_bytes", lambda device, held: real(torch.device("cuda"), held))
        kept: list[reader.Reader] = []
        for _ in range(8):
            images = np.zeros((size, 1, 1, 1), np.uint8)
            made = reader.Reader(Split(images, None), gpu)
            if made.resident is None:
                break
            taken += size
            kept.append(made)
        taken = 0
        return len(kept)

    real = devices.free_bytes
    assert readers("1") == 5  # half of ten, and not half of what the readers before it left, again and again
    assert reader._held[gpu] == 0  # those are gone
    assert readers("0.5") == 2
    with pytest.raises(InputError, match=devices.SHARED_BY):
        readers("four")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_of_a_gpu_is_the_cpus_and_keeps_the_order_of_channels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "keeps_channels_last", lambda device: False)
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(1, 6).to(torch.float64 if dtype == torch.float64 else torch.float32)
    torch.nn.init.uniform_(norm.weight, generator=generator)
    torch.nn.init.uniform_(norm.bias, generator=generator)
    x = torch.randn(3, 6, 8, 10, generator=generator).add(2).to(dtype).contiguous(memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = normalized(ours, norm), norm(theirs.to(norm.weight.dtype))
    assert found.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(found.shape, generator=generator).to(found)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(found, expected, atol=exact)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=exact if dtype != torch.bfloat16 else 0.02)


def test_bytes_are_divided_and_not_multiplied_by_a_rounded_reciprocal() -> None:
    # CUDA's kernel for a division by a number of the host multiplies with 1 / 255, which is other in the last bit.
    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    levels = reader.Reader(Split(images, None), torch.device("cpu")).take(torch.arange(256)).flatten()
    assert torch.equal(levels, torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255)))
    assert not torch.equal(levels, torch.arange(256).float() * (1 / 255))
    from torch.utils._python_dispatch import TorchDispatchMode

    divisors: list[Any] = []

    class Divisors(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.div_.Tensor:
                divisors.append(args[1])
            return function(*args, **(kwargs or {}))

    with Divisors():
        reader.Reader(Split(images, None), torch.device("cpu")).take(torch.arange(4))
    assert [type(each) for each in divisors] == [torch.Tensor]


def test_every_pass_over_images_that_do_not_fit_reads_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reader, "SHARE_OF_MEMORY", 0)
    gathered: list[str] = []
    collect = reader._collect

    def noted(*arguments: Any) -> Any:
        gathered.append(threading.current_thread().name)
        return collect(*arguments)

    monkeypatch.setattr(reader, "_collect", noted)
    path = digits_file(tmp_path, 400).removeprefix("array:")
    mapped = np.load(path, mmap_mode="r")
    split = Split(mapped[:, None], None)
    made = reader.Reader(split, torch.device("cpu"))
    if made.resident is not None:
        pytest.fail("the images are held")
    for images in made.each([torch.arange(at, at + 100) for at in range(0, 400, 100)]):
        assert images.shape == (100, 1, 8, 8)
    assert sum(name.startswith("images") for name in gathered) == 3  # all but the first
    gathered.clear()
    pca.principal_components(made, 4, None, Alone(torch.device("cpu")))
    list(in_batches(made, torch.arange(400), 100, Alone(torch.device("cpu"))))
    list(batches(made, 100, Alone(torch.device("cpu")), lambda: False))
    assert sum(name.startswith("images") for name in gathered) == 6


def test_nvidias_own_variable_for_tf32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(InputError, match="NVIDIA_TF32_OVERRIDE"):
        check_environment()


@pytest.mark.slow
def test_processes_wait_for_one_that_works_for_all_longer_than_for_one_that_is_silent(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        runtime = Runtime(PRESETS["ae"].override({**SMALL, "train.timeout": 2}))
        assert runtime.on_main(lambda: time.sleep(4) or "written") == "written"
        runtime.close()

    assert forked(2, work, tmp_path / "log") == [0, 0], (tmp_path / "log-1.log").read_text()[-2000:]


@pytest.mark.parametrize("obstacle", [{"precision": "fp16"}, {"train.compile": True}])
def test_fp16_and_compiled_models_are_no_obstacles_to_a_graph(
    obstacle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = learner({"train.cuda_graph": "off"})
    monkeypatch.setattr(devices, "captures", lambda device: True)
    made.config = made.config.override({**obstacle, "train.cuda_graph": "on"})
    if "precision" in obstacle:
        made.runtime.accelerator.scaler = torch.amp.GradScaler("cpu")
        made.runtime.accelerator.scaler.scale(torch.ones(1))  # as the dry run does
        scales = made._changed_by_a_step()[-5:-3]
        assert [float(each) for each in scales] == [65536.0, 0.0]
    assert made._wants_graph()
