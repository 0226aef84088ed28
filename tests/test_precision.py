"""`precision auto`: bf16 where the machine multiplies it natively, else fp32, and what a run began with for good."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import SMALL, cli, forked

import dist_ae
from dist_ae import devices
from dist_ae.presets import PRESETS
from dist_ae.processes.runtime import check_device

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = {**SMALL, "precision": "auto", "train.steps": 4}


def on_a_machine(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(devices, "multiplies_bf16", lambda device: native)


def begun_with(run_dir: Path) -> str:
    return str(json.loads((run_dir / "config.json").read_text())["config"]["precision"])


@pytest.mark.parametrize(
    ("flags", "limit", "native"),
    [
        ({"avx512_f", "avx512_bf16"}, None, True),
        ({"avx512_f", "amx_bf16"}, "DEFAULT", True),
        ({"neon", "bf16"}, None, True),  # Arm
        ({"avx2", "fma3"}, None, False),
        ({"avx512_f", "avx512_vnni"}, None, False),
        ({"amx_bf16", "avx512_bf16"}, "AVX2", False),
        ({"amx_bf16", "avx512_bf16"}, "avx512_core_vnni", False),
        ({"amx_bf16", "avx512_bf16"}, "AVX512_CORE_BF16", True),
    ],
)
def test_a_processor_multiplies_bf16_if_it_has_instructions_for_it_and_onednn_may_use_them(
    flags: set[str], limit: str | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert devices.multiplies_bf16(CPU) is native


def test_torch_and_linux_say_the_same_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"amx_bf16", "avx512_bf16", "avx2"}
    asked = devices._cpu_flags.__wrapped__() & known
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices._cpu_flags.__wrapped__() & known == asked


@pytest.mark.parametrize(("capability", "native"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((10, 0), True)])
def test_a_gpu_that_emulates_bf16_does_not_count_and_is_obeyed_if_asked(
    capability: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert devices.multiplies_bf16(GPU) is native
    check_device(PRESETS["ae"].override({"precision": "bf16"}))


def test_every_preset_leaves_the_precision_to_the_machine_and_kept_runs_keep_their_names() -> None:
    # Rows of tables are small: bf16 saves no time there, and its error would be the floor of a good fit.
    assert {preset.precision for name, preset in PRESETS.items() if "table" not in name} == {"auto"}
    # As they were named when `ae` said fp32 and `ae-fast` said bf16.
    assert PRESETS["ae"].override({"precision": "fp32"}).label() == "ae-digits-930f3a0d"
    assert PRESETS["ae-fast"].override({"precision": "bf16"}).label() == "ae-fast-fashion_mnist-ecd912d2"
    assert PRESETS["ae"].label() == "ae-digits-930f3a0d"  # before it is known


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_auto_is_resolved_before_the_directory_is_named_and_a_resume_keeps_it_on_any_machine(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    on_a_machine(monkeypatch, native)
    config = PRESETS["ae"].override({**AUTO, "optim.schedule": "constant"})
    expected = "bf16" if native else "fp32"
    for settings in ({}, {"run_dir": "here"}):
        first = dist_ae.train(config.override(settings))
        assert begun_with(first.run_dir) == expected
        assert first.run_dir == config.override({"precision": expected, **settings}).directory()
        named = dist_ae.train(config.override({"precision": expected, "run_dir": f"named-{len(settings)}"}))
        assert named.weights_sha256 == first.weights_sha256
    on_a_machine(monkeypatch, not native)
    for settings in ({}, {"run_dir": "here"}):
        again = dist_ae.train(config.override(settings))
        assert again.run_dir == config.override({"precision": expected, **settings}).directory()
        assert again.weights_sha256 == first.weights_sha256  # it was finished, and is not begun again
    longer = dist_ae.train(config.override({"run_dir": "here", "train.steps": 8}))
    assert longer.steps == 8 and begun_with(longer.run_dir) == expected
    assert begun_with(dist_ae.train(config.override({"run_dir": "new"})).run_dir) != expected


@pytest.mark.slow
def test_the_word_of_the_first_process_counts_for_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        devices.multiplies_bf16 = lambda device: rank == 0
        config = PRESETS["ae"].override({**AUTO, "run_dir": None})
        os.chdir(tmp_path)
        (tmp_path / f"{rank}").write_text(str(dist_ae.train(config).run_dir))

    log = tmp_path / "log"
    assert forked(2, work, log) == [0, 0], (tmp_path / "log-0.log").read_text()
    directories = {(tmp_path / str(rank)).read_text() for rank in range(2)}
    assert len(directories) == 1 and begun_with(tmp_path / directories.pop()) == "bf16"
    said = (tmp_path / "log-0.log").read_text() + (tmp_path / "log-1.log").read_text()
    assert said.count("note: bf16 is emulated") == 1  # by the other process, for which the first one waits


@pytest.mark.slow
def test_bf16_is_obeyed_where_it_is_emulated_with_one_line_that_says_what_it_costs(tmp_path: Path) -> None:
    quick = ("train", "ae", "--model.hidden-dims", "16", "--tracking.wandb", "off", "--train.steps", "2")
    old = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = cli(*quick, "--precision", "bf16", "--run-dir", str(tmp_path / "bf16"), **old)
    assert done.returncode == 0 and begun_with(tmp_path / "bf16") == "bf16", done.stderr
    (said,) = (line for line in done.stdout.splitlines() if "emulated" in line)
    assert "8 to 12 times as long" in said and "--precision fp32" in said
    done = cli(*quick, "--run-dir", str(tmp_path / "auto"), **old)
    assert done.returncode == 0 and begun_with(tmp_path / "auto") == "fp32" and "emulated" not in done.stdout
