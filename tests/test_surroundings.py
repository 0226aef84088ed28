"""What comes from outside (environment, terminal, disk, damaged folders, signals) ends in a result or a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from conftest import REPOSITORY, SMALL, cli, environment, finish, forked, free_port, start

import dist_ae
from dist_ae import begin, running, validation
from dist_ae.config import Config, InputError
from dist_ae.data import sources
from dist_ae.data.records import at_once
from dist_ae.presets import PRESETS
from dist_ae.processes.environment import use_cpu
from dist_ae.processes.runtime import Runtime, check_device
from dist_ae.step import Learner
from dist_ae.use.doctor import examine, replay

pytestmark = pytest.mark.slow

QUICK = ("--model.hidden-dims", "16", "--tracking.wandb", "off", "--precision", "fp32")


def config(run_dir: Path, **more: Any) -> Config:
    return PRESETS["ae"].override({**SMALL, "train.steps": 8, "run_dir": str(run_dir), **more})


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# -- other systems

# Python as it is on Windows, for this package's own code: what others need of Linux they have imported before.
WINDOWS = """
import importlib.abc, os, pathlib, signal, sys, errno
import accelerate, filelock, numpy, PIL.Image, psutil, pydantic, rich.console, rich.progress, safetensors.torch
import sklearn.datasets, sklearn.linear_model, torch.distributed.tensor, tyro, multiprocessing.pool, concurrent.futures

LACKING = ("resource", "fcntl", "pwd", "grp", "termios")

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

filelock.FileLock = filelock.SoftFileLock  # which of the others is made for Linux
for name in LACKING:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refusing())
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "fork", "register_at_fork", "getuid", "geteuid",
             "killpg", "setsid", "mkfifo", "uname", "sched_getaffinity", "posix_fallocate", "getpgid"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm"):
    delattr(signal, name)
usual = os.open
def opened(path, *more, **named):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return usual(path, *more, **named)
os.open = opened

folder = pathlib.Path(sys.argv[1])
import dist_ae
from dist_ae import sklearn
small = {"model.latent_dim": 8, "model.hidden_dims": (32, 16), "train.steps": 6, "tracking.wandb": "off"}
run = dist_ae.train(dist_ae.PRESETS["ae"].override({**small, "run_dir": folder / "run"})).run_dir
images = numpy.random.default_rng(0).random((5, 1, 8, 8), numpy.float32)
model = dist_ae.load(run)
assert model.reconstruct(images).shape == (5, 1, 8, 8) and model.score(images).shape == (5,)
assert model.threshold() > 0
for index in range(70):  # enough that other processes decode them
    PIL.Image.fromarray((255 * images[index % 5, 0]).astype("uint8")).save(folder / "in" / f"{index}.png")
from dist_ae.__main__ import main
from dist_ae.files import Damaged, read_json
assert read_json(run / "config.json")
(folder / "link.json").symlink_to(run / "config.json")
try:
    read_json(folder / "link.json")
    raise AssertionError
except Damaged:
    pass
for words in (
    ["score", str(run), "--images", str(folder / "in"), "--out", str(folder / "scores.csv")],
    ["reconstruct", str(run), "--images", str(folder / "in"), "--out", str(folder / "out")],
    ["pack", str(folder / "in"), str(folder / "packed")],
    ["look", str(folder / "in"), "--out", str(folder / "look.html")],
    ["doctor", str(run)],
):
    sys.argv = ["dist-ae", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


def test_what_windows_lacks_is_missed_by_nothing_that_trains_or_uses_a_model(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scores.csv").is_file() and len(list((tmp_path / "out").iterdir())) == 70
    assert (tmp_path / "packed/manifest.json").is_file() and (tmp_path / "look.html").is_file()


def test_a_macs_gpu_is_left_alone_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    for asked, on_cpu, said in (("", True, True), ("false", False, False), ("true", True, False)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
        check_device(PRESETS["ae"])
        assert use_cpu() == on_cpu and ("ACCELERATE_USE_CPU=false" in capsys.readouterr().err) == said


# -- full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; ``resize(size)`` by remounting it."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def resize(path: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)


def test_a_sweep_says_before_it_starts_that_rays_disk_is_nearly_full(small_disk: Path) -> None:
    from tune.sweep import nearly_full

    assert nearly_full(str(small_disk / "ray")) == ""  # a folder that Ray has yet to make
    (small_disk / "other").write_bytes(bytes(299_000))
    assert re.search(rf"the disk of {small_disk}, .* is 9\d% full.*RAY_TMPDIR", nearly_full(str(small_disk / "ray")))


def test_a_run_is_not_finished_until_its_last_checkpoint_is_on_the_disk(small_disk: Path, tmp_path: Path) -> None:
    run_dir = small_disk / "run"
    full = config(run_dir, **{"model.hidden_dims": (256, 64)})  # a checkpoint of some 500 kB

    def train(rank: int) -> None:
        with mock.patch.object(running, "LAST_SAVE_SECONDS", 1.0):
            dist_ae.train(full)

    assert forked(2, train, tmp_path / "first") == [1, 1]
    said = (tmp_path / "first-0.log").read_text()
    assert "the last checkpoint, of step 8, could not be written" in said and "The run is not finished" in said
    assert not (run_dir / "result.json").exists()
    resize(small_disk, "20m")
    assert forked(2, train, tmp_path / "second") == [0, 0]
    assert json.loads((run_dir / "result.json").read_text())["steps"] == 8
    assert (run_dir / "checkpoints" / "00000008").is_dir() and all(whole for whole, _ in examine(run_dir))


def test_a_stop_on_a_full_disk_says_which_step_is_really_saved(small_disk: Path, tmp_path: Path) -> None:
    endless = config(
        small_disk / "run", **{"model.hidden_dims": (256, 64), "train.steps": 10**6, "train.save_every": 10**6}
    )
    endless = endless.override({"train.eval_every": 10**6})

    def train(rank: int) -> None:
        real, steps = Learner.step, 0

        def step(self: Learner, number: int) -> None:
            nonlocal steps
            steps += 1
            if steps == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            real(self, number)

        with mock.patch.object(Learner, "step", step), mock.patch.object(running, "STOP_SAVE_SECONDS", 0.5):
            dist_ae.train(endless)

    assert forked(1, train, tmp_path / "log") == [75]
    said = (tmp_path / "log-0.log").read_text()
    assert re.search(r"stopped at step 20 .*no checkpoint of it could be written.*There is none on the disk", said), (
        said
    )


def test_a_result_without_its_checkpoint_is_noticed_and_trained_again(tmp_path: Path) -> None:
    first = dist_ae.train(config(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000008")
    assert any(not whole and "which has no checkpoint" in what for whole, what in examine(tmp_path / "run"))
    assert dist_ae.train(config(tmp_path / "run")).weights_sha256 == first.weights_sha256
    assert all(whole for whole, _ in examine(tmp_path / "run"))


def test_a_disk_that_is_full_from_the_start_is_one_sentence(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"\0" * 299_000)
    done = cli("train", "ae", *QUICK, "--train.steps", "4", "--run-dir", str(small_disk / "run"))
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and "No space left" in done.stderr


def test_the_best_weights_are_kept_wherever_the_best_evaluation_was(tmp_path: Path) -> None:
    # A rate that grows and grows makes it worse from the first evaluation on.
    settings = {"train.steps": 42, "train.eval_every": 7, "train.save_every": 7, "train.keep": 2}
    rising = {"optim.lr": 1.0, "optim.warmup_steps": 200}
    result = dist_ae.train(config(tmp_path / "run", **settings, **rising))
    kept = [int(path.name) for path in sorted((tmp_path / "run" / "checkpoints").glob("[0-9]*"))]
    assert result.best_step == 0 and kept == [0, 42]  # the start, PCA, and the last
    images = torch.from_numpy(sources.load(PRESETS["ae"].data).val.images).float() / 255
    errors = {
        which: float((dist_ae.load(tmp_path / "run", which).reconstruct(images) - images).square().mean())
        for which in ("best", "last")
    }
    assert errors["best"] < errors["last"] / 2
    with pytest.raises(InputError, match="expected 'last' or 'best', got 'worst'"):
        dist_ae.load(tmp_path / "run", which="worst")  # type: ignore[arg-type]


def test_a_resumed_run_evaluates_nothing_again(tmp_path: Path) -> None:
    settings = {"train.eval_every": 4, "optim.schedule": "constant"}
    dist_ae.train(config(tmp_path / "run", **settings))
    with mock.patch.object(validation, "evaluate", side_effect=AssertionError("evaluated again")):
        (tmp_path / "run" / "result.json").unlink()
        dist_ae.train(config(tmp_path / "run", **settings))


@pytest.mark.parametrize("shape", [(40, 1, 512), (40, 512, 1), (40, 1, 1)])
def test_images_of_any_shape_are_drawn(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    settings = {"data.name": f"array:{tmp_path / 'wide.npy'}", "train.batch_size": 8, "model.latent_dim": 1}
    dist_ae.train(config(tmp_path / "run", **settings))
    assert (tmp_path / "run" / "figures" / "reconstructions.png").exists()


def test_a_picture_that_cannot_be_drawn_fails_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with mock.patch("dist_ae.figures.run_pictures", side_effect=ValueError("no such colour")):
        result = dist_ae.train(config(tmp_path / "run"))
    assert "could not be drawn (ValueError: no such colour)" in capfd.readouterr().err
    assert (tmp_path / "run" / "result.json").exists() and result.steps == 8


def test_a_device_without_memory_is_one_sentence_with_the_way_out(tmp_path: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")
    with mock.patch.object(Learner, "step", side_effect=full), pytest.raises(dist_ae.OutOfMemory) as raised:
        dist_ae.train(config(tmp_path / "run", **{"train.batch_size": 100}))
    said = str(raised.value)
    assert "CUDA out of memory" in said and "--train.max-per-process 50" in said and raised.value.exit_status == 1


def test_large_images_are_evaluated_fewer_at_once(tmp_path: Path) -> None:
    assert [at_once(1000, shape) for shape in ((1, 28, 28), (3, 64, 64), (3, 256, 256), (3, 4096, 4096))] == [
        1000,
        1000,
        85,
        1,
    ]
    np.save(tmp_path / "large.npy", np.zeros((8, 1024, 1024), np.uint8))
    settings = {"data.name": f"array:{tmp_path / 'large.npy'}", "train.batch_size": 2, "model.hidden_dims": (2,)}
    dist_ae.train(config(tmp_path / "run", **settings, **{"train.steps": 1, "model.latent_dim": 1}))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert kept["evaluation"]["batch_size"] == 16


def test_fp16_whose_gradients_are_never_finite_ends_the_run(tmp_path: Path) -> None:
    # Where there is no GPU, torch's own scaler is given to a run in fp32: it answers as in fp16.
    config_ = PRESETS["ae"].override({**SMALL, "train.steps": 4, "run_dir": tmp_path})
    prepared = begin.prepare(config_)
    runtime = Runtime(prepared.config)
    with begin.claimed(prepared) as folder:
        run = running.begin(prepared, folder, None, runtime)
        for scale, ends in ((65536.0, False), (1.0, False), (2.0**-15, True)):
            runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            with pytest.raises(dist_ae.NonFinite, match="--precision bf16") if ends else contextlib.nullcontext():
                running.refuse_non_finite(run)


def test_ctrl_c_before_the_first_step_is_raised_in_a_process_that_is_not_the_runs_own(tmp_path: Path) -> None:
    # A notebook's kernel must not be lost: it is raised like any other stop, and the interpreter goes on.
    def work(rank: int) -> None:
        real = begin.prepare

        def prepare(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return real(*arguments)

        with mock.patch("dist_ae.trainer.prepare", prepare), pytest.raises(dist_ae.Stopped, match="nothing to save"):
            dist_ae.train(config(tmp_path / "run"))
        dist_ae.train(config(tmp_path / "run"))  # and trains, if it is asked again

    assert forked(1, work, tmp_path / "log") == [0], (tmp_path / "log-0.log").read_text()
    assert (tmp_path / "run" / "result.json").exists()


# -- environment


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
    ],
    ids=str,
)
def test_what_a_launcher_asks_for_does_not_change_the_experiment_and_is_said(
    variables: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("train", "ae", *QUICK, "--train.steps", "4", "--run-dir")
    expected, found = cli(*arguments, str(tmp_path / "a")), cli(*arguments, str(tmp_path / "b"), **variables)
    assert expected.returncode == found.returncode == 0, found.stderr
    hashes = {json.loads((tmp_path / run / "result.json").read_text())["weights_sha256"] for run in "ab"}
    assert len(hashes) == 1 and "note: the launcher asks for" in found.stdout and "note:" not in expected.stdout


def test_a_callers_settings_of_torch_do_not_change_the_experiment(tmp_path: Path) -> None:
    expected = dist_ae.train(config(tmp_path / "plain")).weights_sha256
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        assert dist_ae.train(config(tmp_path / "dtype")).weights_sha256 == expected
        assert torch.get_default_dtype() == torch.float64 and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        assert dist_ae.train(config(tmp_path / "no_grad")).weights_sha256 == expected
    with torch.inference_mode():
        assert dist_ae.train(config(tmp_path / "inference")).weights_sha256 == expected
    for enabled in (True, False):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            pytest.raises(InputError, match=r"torch\.autocast"),
        ):
            dist_ae.train(config(tmp_path / "autocast"))


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"RANK": "abc"}, "RANK"),
        ({"RANK": "5"}, "RANK is 5"),
        ({"PMI_SIZE": "abc"}, "PMI_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "xyz"}, "PORT"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
            "PORT",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "no.such.host.", "MASTER_PORT": "1"},
            "host",
        ),
        ({"ACCELERATE_USE_CPU": "garbage"}, "ACCELERATE_USE_CPU"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"DNNL_DEFAULT_FPMATH_MODE": "BF16"}, "DNNL_DEFAULT_FPMATH_MODE"),
    ],
    ids=str,
)
def test_an_environment_that_cannot_be_is_named_in_one_sentence(
    variables: dict[str, str], word: str, tmp_path: Path
) -> None:
    done = cli("train", "ae", *QUICK, "--train.steps", "2", "--run-dir", str(tmp_path / "run"), **variables)
    refused(done, word)


def test_accelerates_own_default_file_is_answered(tmp_path: Path) -> None:
    folder = tmp_path / "accelerate"
    folder.mkdir()
    text = (REPOSITORY / "launch/accelerate/cpu_processes.yaml").read_text()
    text = text.replace('"MULTI_GPU"', '"MULTI_CPU"').replace('mixed_precision: "no"', 'mixed_precision: "bf16"')
    (folder / "default_config.yaml").write_text(text)
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "dist_ae", "train", "ae", *QUICK]
    command += ["--train.steps", "2", "--run-dir", str(tmp_path / "run")]
    variables = environment(HF_HOME=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=REPOSITORY, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "the launcher asks for mixed precision bf16; the experiment sets fp32" in done.stdout
    assert "asks for 2 processes on the CPU, and Accelerate started one" in done.stdout


def test_idle_threads_leave_the_cores_to_others_unless_the_user_says_otherwise() -> None:
    def seen(code: str, **variables: str) -> str:
        clean = {k: v for k, v in environment().items() if k != "GOMP_SPINCOUNT"} | variables
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    # libgomp itself says what it took.
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert "GOMP_SPINCOUNT = '1000'" in seen("import dist_ae, torch", OMP_DISPLAY_ENV="verbose")
    finally:
        busy.kill()
        busy.wait()
    alone = "import os, builtins, io; real = open; builtins.open = lambda path, *more, **and_more: io.StringIO("
    alone += "'0.1 0.1 0.1 1/99 7') if path == '/proc/loadavg' else real(path, *more, **and_more); "
    assert seen(alone + "import dist_ae; print(os.environ['GOMP_SPINCOUNT'])").strip() == "10000"
    code = "import os, dist_ae; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert seen(code, GOMP_SPINCOUNT="7").strip() == "7"
    assert seen(code, OMP_WAIT_POLICY="active").strip() == "None"


# -- terminal


@pytest.mark.parametrize(
    "command",
    [
        "{train} | head -1",
        "{train} >&-",
        "{train} 2>&-",
        "{train} >&- 2>&- <&-",
        "{train} > /dev/full",
        "PYTHONIOENCODING=ascii {train}",
        "LC_ALL=C PYTHONUTF8=0 {train}",
    ],
)
def test_no_terminal_ends_a_run(command: str, tmp_path: Path) -> None:
    train = f"{sys.executable} -m dist_ae train ae {' '.join(QUICK)} --train.steps 40 --run-dir {tmp_path / 'run'}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.format(train=train)],
        env=environment(), capture_output=True, text=True, timeout=60, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "result.json").exists()


def test_help_may_be_cut_off_by_its_reader() -> None:
    for what in ("--help", "train --help", "train ae --help"):
        command = f"{sys.executable} -m dist_ae {what} | head -1"
        done = subprocess.run(
            ["bash", "-c", command], env=environment(), capture_output=True, text=True, cwd=REPOSITORY
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_all_have_joined_ends_the_process_at_once(number: signal.Signals, tmp_path: Path) -> None:
    # Rank 0 of two, alone: it waits for the other inside of C++, where Python runs no handler.
    variables = environment(0, 2, free_port())
    command = [sys.executable, "-u", "-m", "dist_ae", "train", "ae", *QUICK, "--run-dir", str(tmp_path / "run")]
    waiting = subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "run" / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.5)
        waiting.send_signal(number)
        struck = time.monotonic()
        _, said = waiting.communicate(timeout=20)
        assert time.monotonic() - struck < 5
        assert waiting.returncode == 75 and "Traceback" not in said and "nothing to save" in said
    finally:
        waiting.kill()


# -- network


def test_a_run_of_two_processes_listens_on_the_loopback_alone_but_for_torchs_rendezvous(tmp_path: Path) -> None:
    command = ["-m", "dist_ae", "train", "ae", *QUICK, "--train.steps", "1000000", "--run-dir", str(tmp_path / "run")]
    processes = start(2, *command)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "run").glob("checkpoints/0*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        listening = {
            (c.laddr.ip, c.laddr.port)
            for process in processes
            for c in psutil.Process(process.pid).net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
        outside = {port for address, port in listening if address not in ("127.0.0.1", "::1")}
        # torch's store of MASTER_PORT listens everywhere and takes no address; all that is ours, and gloo, does not.
        assert len(listening) >= 2 and len(outside) == 1, listening
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [status for status, _, _ in finish(processes, 30)] == [75, 75]


# -- run directories


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dist_ae.train(config(tmp_path_factory.mktemp("trained") / "run")).run_dir


def deep(path: Path) -> None:
    path.write_text("[" * 5000 + "]" * 5000)


def edit(path: Path, **changes: Any) -> None:
    tree = json.loads(path.read_text())
    for key, value in changes.items():
        node = tree
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node[parent]
        node.pop(leaf, None) if value is KeyError else node.__setitem__(leaf, value)
    path.write_text(json.dumps(tree))


def reseal(run: Path, name: str, change: Any) -> None:
    """Changes a file of the last checkpoint and makes the manifest fit again."""
    import hashlib

    folder = run / "checkpoints" / "00000008"
    change(folder / name)
    data = (folder / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(3 << 30)


WRONG: dict[str, Any] = {
    "config.json is a pipe": lambda run: ((run / "config.json").unlink(), os.mkfifo(run / "config.json")),
    "config.json is a folder": lambda run: ((run / "config.json").unlink(), (run / "config.json").mkdir()),
    "config.json is deep": lambda run: deep(run / "config.json"),
    "config.json is binary": lambda run: (run / "config.json").write_bytes(bytes(range(256))),
    "config.json is a list": lambda run: (run / "config.json").write_text("[]"),
    "no image shape": lambda run: edit(run / "config.json", config__model__image_shape=None),
    "trajectory is a number": lambda run: edit(run / "config.json", trajectory=3),
    "metrics.jsonl is a folder": lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
    "metrics.jsonl is a pipe": lambda run: ((run / "metrics.jsonl").unlink(), os.mkfifo(run / "metrics.jsonl")),
    "a checkpoint named ²": lambda run: (run / "checkpoints" / "²").mkdir(),
    "checkpoints is a file": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
    "result.json is deep": lambda run: deep(run / "result.json"),
    "result.json has a key too many": lambda run: edit(run / "result.json", more=1),
    "result.json lacks a key": lambda run: edit(run / "result.json", metrics=KeyError),
    "result.json is text": lambda run: edit(run / "result.json", steps="eight"),
    "state.json lacks a field": lambda run: reseal(run, "state.json", lambda p: edit(p, window_images=KeyError)),
    "state.json says nonsense": lambda run: reseal(run, "state.json", lambda p: edit(p, best=3, window="no")),
    "a huge sparse weights file": lambda run: sparse(run / "checkpoints" / "00000008" / "weights.safetensors"),
    "tracking.json is a folder": lambda run: ((run / "tracking.json").unlink(), (run / "tracking.json").mkdir()),
}
USES: dict[str, Any] = {
    "train": lambda run: dist_ae.train(config(run)),
    "prolong": lambda run: dist_ae.train(config(run, **{"train.steps": 9})),
    "load": dist_ae.load,
    "examine": lambda run: list(examine(run)),
    "replay": replay,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrong", WRONG)
def test_whatever_lies_in_a_run_directory_ends_in_a_result_or_a_sentence(
    wrong: str, use: str, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    WRONG[wrong](run)
    try:
        USES[use](run)
    except Exception as error:
        # Those with an exit status were written to be read by a person.
        assert hasattr(error, "exit_status") and str(error), repr(error)


def test_a_step_on_record_that_names_images_out_of_range_is_refused(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    kept = json.loads((run / "config.json").read_text())["config"]
    shutil.copy(run / "checkpoints" / "00000008" / "weights.safetensors", run / "nonfinite.safetensors")
    for rows in ([0, 10**6], [-1], [], [[1]], ["a"], 7):
        (run / "nonfinite.json").write_text(json.dumps({"step": 1, "seed": 0, "rows": rows, "config": kept}))
        with pytest.raises(InputError, match=r"nonfinite\.json"):
            replay(run)
    (run / "nonfinite.json").write_text(json.dumps({"step": 1, "seed": 0, "rows": [1, 2], "config": kept}))
    assert replay(run) == []


def test_the_loopback_is_for_the_processes_of_one_host() -> None:
    from dist_ae.processes.environment import choose_interface, interface_to_main

    loopback = next(n for n, a in psutil.net_if_addrs().items() if any(x.address == "127.0.0.1" for x in a))
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}):
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        choose_interface()
        assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
        del os.environ["GLOO_SOCKET_IFNAME"]
        with interface_to_main(wanted=True):
            assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
        # Left behind, it would send the next group of this process, or a program that it starts, to the loopback.
        assert "GLOO_SOCKET_IFNAME" not in os.environ
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
        os.environ["LOCAL_WORLD_SIZE"] = "1"  # two hosts: the loopback of one of them is no address for the other
        del os.environ["GLOO_SOCKET_IFNAME"]
        with pytest.raises(InputError, match="loopback"):
            choose_interface()
