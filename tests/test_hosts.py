"""Several hosts: network namespaces with a cable between them, each with its own name, processes and shared memory.

What is run is what a person types on two machines. All of it stays inside the namespaces, which end with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, environment, metrics, relative_difference, weights

pytestmark = pytest.mark.slow

# An address that no other machine is asked for: it exists in the namespaces alone.
NETWORK = "10.77.0"
# Its root mounts are private to it, it has its own /proc, and all of it is killed with the first process.
APART = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
]


def _why_not() -> str:
    """Why this machine cannot play several hosts; empty where it can."""
    try:
        tried = subprocess.run([*APART, "ip", "link", "add", "type", "veth"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"needs Linux with util-linux and iproute2: {error}"
    return "" if tried.returncode == 0 else f"this machine forbids network namespaces: {tried.stderr.strip()}"


WHY_NOT = _why_not()
needs_hosts = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


class Host:
    """One machine: network, name, processes, /dev/shm and /tmp/ray of its own. The rest of the files is shared."""

    def __init__(self, index: int, folder: Path, names: str) -> None:
        self.name, self.address = f"host{index}", f"{NETWORK}.{index + 1}"
        self.log = folder / f"{self.name}.log"
        names_file = folder / f"{self.name}.hosts"
        names_file.write_text(names.format(name=self.name))
        script = (
            f"hostname {self.name} && mount -t tmpfs none /dev/shm && mount --bind {names_file} /etc/hosts && mkdir -p "
            "/tmp/ray && mount -t tmpfs none /tmp/ray && ip link set lo up && echo ready && exec sleep infinity"
        )
        self.outer = subprocess.Popen([*APART, "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self.outer.stdout is not None and self.outer.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()
        self.first = int(children[0])

    def command(self, *words: str) -> list[str]:
        return [
            "nsenter",
            "--target",
            str(self.first),
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--",
            "env",
            f"--chdir={REPOSITORY}",
            *words,
        ]

    def ip(self, *words: str) -> None:
        inside = ["nsenter", "--target", str(self.first), "--net", "--", "ip", *words]
        subprocess.run(inside, check=True, capture_output=True, text=True)

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """Starts a command here; what it prints goes to ``log``."""
        with self.log.open("a") as log:
            return subprocess.Popen(self.command(*words), stdout=log, stderr=log, text=True, env=environment(**more))

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def processes(self) -> list[int]:
        """Every process of this host but the first."""
        own = os.readlink(f"/proc/{self.first}/ns/pid") if self.alive() else ""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if os.readlink(path / "ns" / "pid") == own and int(path.name) != self.first and state != "Z":
                    found.append(int(path.name))
        return found

    def alive(self) -> bool:
        return Path(f"/proc/{self.first}").exists()

    def signal_all(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        self.outer.kill()
        self.outer.wait()


class Hosts(list[Host]):
    """Two machines on one cable."""

    def __init__(self, folder: Path, names: str) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        self.running: list[subprocess.Popen[str]] = []
        try:
            for index in range(2):
                self.append(Host(index, folder, names))
            self[0].ip(*f"link add eth0 type veth peer name eth0 netns {self[1].first}".split())
            for host in self:
                host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
                host.ip("link", "set", "eth0", "up")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        for host in self:
            host.end()
        for process in self.running:
            process.kill()  # `nsenter` stops itself with what it runs, and of the latter's end hears nothing then
            process.wait()


# As Debian installs it: a host's own name is an address that no other host reaches.
DEBIAN = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
# The same, and host1 knows where host0 is.
BY_NAME = f"127.0.0.1 localhost\n127.0.1.1 {{name}}\n{NETWORK}.1 host0\n{NETWORK}.2 host1\n"


def experiment(run_dir: Path, steps: int, *more: str) -> list[str]:
    words = "--model.latent-dim 8 --model.hidden-dims 32 16 --train.batch-size 96 --train.log-every 1 --precision fp64"
    often = "--train.eval-every 1000000 --train.save-every 25 --tracking.wandb off --optim.schedule constant"
    return [
        *("-m", "dist_ae", "train", "vae", *words.split(), *often.split()),
        *("--train.steps", str(steps), "--run-dir", str(run_dir), *more),
    ]


def launch(
    hosts: Hosts, main: str, *command: str, only: int | None = None, patience: int = 10
) -> list[subprocess.Popen[str]]:
    """What launch/README.md says for several hosts, with two processes on each; on all hosts or on one of them."""
    started = [
        host.start(
            *(sys.executable, "launch/interruptible.py", "accelerate", "launch"),
            *("--config_file", "launch/accelerate/cpu_processes.yaml", "--num_machines", "2", "--num_processes", "4"),
            *("--machine_rank", str(rank), "--main_process_ip", main, "--main_process_port", "29500"),
            *("--rdzv_conf", f"timeout={patience}", *command),
        )
        for rank, host in enumerate(hosts)
        if only in (None, rank)
    ]
    hosts.running += started
    return started


def until(condition: Callable[[], object], hosts: Hosts, seconds: float = 90) -> None:
    """Waits, and fails with what the hosts said where it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "\n".join(host.said() for host in hosts)
        time.sleep(0.1)


def sentences(host: Host) -> list[str]:
    return [line for line in host.said().splitlines() if line.startswith("error: ")]


def alone(run_dir: Path, steps: int) -> dict[str, torch.Tensor]:
    """The weights that one process on one machine comes to."""
    command = [sys.executable, *experiment(run_dir, steps)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return weights(run_dir)


@needs_hosts
def test_two_hosts_give_the_run_of_one_process_with_debians_names(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Hosts(tmp_path / "hosts", DEBIAN) as hosts:
        launched = launch(hosts, f"{NETWORK}.1", *experiment(run_dir, 30))
        until(lambda: all(p.poll() is not None for p in launched), hosts)
        assert [p.returncode for p in launched] == [0, 0], "\n".join(host.said() for host in hosts)
        assert [host.processes() for host in hosts] == [[], []]
        assert "val.psnr" in hosts[0].said() and "val.psnr" not in hosts[1].said()
    assert relative_difference(weights(run_dir), alone(tmp_path / "alone", 30)) < 1e-10
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 31))  # once each
    assert json.loads((run_dir / "result.json").read_text())["world_size"] == 4


@needs_hosts
def test_a_main_process_named_by_its_loopback_ends_every_host_with_one_sentence(tmp_path: Path) -> None:
    with Hosts(tmp_path / "hosts", BY_NAME) as hosts:
        launched = launch(hosts, "host0", *experiment(tmp_path / "run", 30, "--train.timeout", "10"))
        until(lambda: all(p.poll() is not None for p in launched), hosts, 60)
        assert all(p.returncode for p in launched)
        assert "'host0' is this host's loopback (127.0.1.1)" in sentences(hosts[0])[0], hosts[0].said()
        assert "host1 did not meet all 4 processes at host0:29500" in sentences(hosts[1])[0], hosts[1].said()
        assert not any("dist_ae/trainer.py" in host.said() for host in hosts)  # no traceback of ours
        assert [host.processes() for host in hosts] == [[], []]


def waits_at(host: Host, port: int) -> bool:
    """Whether a process of this host listens at a port."""
    lines = Path(f"/proc/{host.first}/net/tcp").read_text() + Path(f"/proc/{host.first}/net/tcp6").read_text()
    return re.search(rf":{port:04X} [0-9A-F]+:0000 0A", lines) is not None


@needs_hosts
@pytest.mark.long
def test_a_host_that_never_comes_ends_the_other_within_the_launchers_time_out(tmp_path: Path) -> None:
    with Hosts(tmp_path / "hosts", DEBIAN) as hosts:
        (waiting,) = launch(hosts, f"{NETWORK}.1", *experiment(tmp_path / "run", 30), only=0)
        until(lambda: waiting.poll() is not None, hosts, 60)
        assert waiting.returncode and hosts[0].processes() == []
        assert "1/2 clients joined" in hosts[0].said()


@needs_hosts
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_ctrl_c_ends_a_launcher_that_waits_for_another_host(launcher: str, tmp_path: Path) -> None:
    with Hosts(tmp_path / "hosts", DEBIAN) as hosts:
        if launcher == "accelerate":
            launch(hosts, f"{NETWORK}.1", *experiment(tmp_path / "run", 30), only=0, patience=600)
            until(lambda: waits_at(hosts[0], 29500), hosts)
        else:
            hosts.running.append(elastic(hosts[0], 2, *experiment(tmp_path / "run", 30)[3:], HOSTS="2"))
            until(lambda: waits_at(hosts[0], 29400), hosts)
        hosts[0].signal_all(signal.SIGINT)
        until(lambda: hosts.running[0].poll() is not None, hosts, 10)
        assert hosts[0].processes() == [] and not (tmp_path / "run").exists()


def cut(hosts: Hosts) -> None:
    hosts[0].ip("link", "set", "eth0", "down")


def kill(hosts: Hosts) -> None:
    hosts[1].signal_all(signal.SIGKILL)


def freeze(hosts: Hosts) -> None:
    hosts[1].signal_all(signal.SIGSTOP)


def freeze_the_first(hosts: Hosts) -> None:
    hosts[0].signal_all(signal.SIGSTOP)


@needs_hosts
@pytest.mark.long
@pytest.mark.parametrize("strike", [cut, kill, freeze, freeze_the_first])
def test_a_lost_host_is_named_by_the_others_which_end_and_the_run_resumes(
    strike: Callable[[Hosts], None], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    survivors = {"cut": (0, 1), "freeze_the_first": (1,)}.get(strike.__name__, (0,))
    with Hosts(tmp_path / "hosts", DEBIAN) as hosts:
        launched = launch(hosts, f"{NETWORK}.1", *experiment(run_dir, 1_000_000, "--train.timeout", "6"))
        until(lambda: (run_dir / "checkpoints").is_dir() and any((run_dir / "checkpoints").iterdir()), hosts)
        strike(hosts)
        until(lambda: all(launched[i].poll() is not None for i in survivors), hosts, 40)
        for survivor in survivors:
            assert launched[survivor].returncode
            lost = 1 - survivor
            for said in sentences(hosts[survivor]):
                assert f"on host host{lost}" in said and f"on host host{survivor}" not in said
            if lost == 1:
                assert "rank 2 (" in said and "rank 3 (" in said  # all of the lost host's
            assert hosts[survivor].processes() == []
        for host in hosts:  # a host that thaws finds the others gone, and ends
            host.signal_all(signal.SIGCONT)
        until(lambda: not any(host.processes() for host in hosts), hosts, 40)
    last = max(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert relative_difference(alone(run_dir, last + 10), alone(tmp_path / "alone", last + 10)) < 1e-10
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, last + 11))


def elastic(host: Host, processes: int, *command: str, **more: str) -> subprocess.Popen[str]:
    """What launch/README.md says for hosts that come and go; the first of them keeps the list."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"MAIN": f"{NETWORK}.1", "HOSTS": "1:2", "PROCESSES": str(processes), "LAST_CALL": "3", "PATH": path}
    return host.start("launch/torchrun/elastic.sh", *command, **given | more)


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    found = (run_dir / "checkpoints").glob("[0-9]*") if run_dir.exists() else ()
    return max((int(p.name) for p in found if p.name.isdigit()), default=0)


@needs_hosts
@pytest.mark.long
def test_a_lost_host_leaves_three_of_four_processes_which_go_on_and_it_joins_them_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def command(steps: int) -> list[str]:
        return experiment(run_dir, steps, "--train.timeout", "10")[3:]

    def began(processes: int) -> int:
        return hosts[0].said().count(f"{processes} processes on cpu")

    with Hosts(tmp_path / "hosts", DEBIAN) as hosts:
        stays = elastic(hosts[0], 3, *command(1_000_000))
        goes = elastic(hosts[1], 1, *command(1_000_000))
        hosts.running += [stays, goes]
        until(lambda: began(4) == 1 and newest(run_dir) > 0, hosts)
        hosts[1].signal_all(signal.SIGKILL)
        until(lambda: began(3) == 1, hosts)
        lost = sentences(hosts[0])
        assert lost and all("lost rank 3 (" in said and "on host host0" not in said for said in lost), lost
        resumed = newest(run_dir)
        until(lambda: newest(run_dir) > resumed, hosts)
        assert stays.poll() is None

        hosts.running.append(elastic(hosts[1], 1, *command(1_000_000)))
        until(lambda: began(4) == 2, hosts)
        rejoined = newest(run_dir)
        until(lambda: newest(run_dir) > rejoined, hosts)
        for host in hosts:
            host.signal_all(signal.SIGTERM)
        until(lambda: not any(host.processes() for host in hosts), hosts)

        last = newest(run_dir) + 10
        ending = [elastic(host, 2, *command(last)) for host in hosts]
        hosts.running += ending
        until(lambda: all(p.poll() is not None for p in ending), hosts)
        assert [p.returncode for p in ending] == [0, 0], "\n".join(host.said() for host in hosts)
    assert relative_difference(weights(run_dir), alone(tmp_path / "alone", last)) < 1e-9
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, last + 1))  # once each
