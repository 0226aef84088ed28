"""Weak and strong scaling on this machine, and what a network costs, with a model that predicts an unseen setting.

    python -m benchmarks.scaling [scaling] [network] [sizes] [--budget 420] [--steps 24]

Prints Markdown. The network is played: every process is a host of its own (a network namespace), and one thread carries
their packets, each after the time that its size takes at a bandwidth, and a latency. That is what ``tc netem`` does,
which not every kernel has. Needs root. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
NETWORK = "10.78.0"
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
PACKET = 60_000  # bytes of the largest one: few and large, since Python carries them
OWN_MEMORY = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "_"]
MODELS = {
    "MLP": ("ae", 512, ["--model.hidden-dims", "512", "256", "--model.latent-dim", "128"]),
    "conv": ("conv", 32, ["--model.widths", "16", "32", "64"]),
}  # preset, images a step for each process, settings


@dataclass(frozen=True)
class Link:
    """What a host reaches the others through."""

    latency: float = 0.0  # seconds, one way
    bandwidth: float = float("inf")  # bytes a second

    def __str__(self) -> str:
        rate = "no limit" if self.bandwidth == float("inf") else f"{self.bandwidth * 8 / 1e6:,.0f} Mbit/s"
        return f"{1000 * self.latency:g} ms, {rate}"


class Hosts:
    """Network namespaces, and the thread that carries packets between them. They end with this process."""

    def __init__(self, count: int) -> None:
        self.link = Link()
        self._tunnels: list[int] = []
        self._files: list[int] = []
        for index in range(count):
            thread = threading.Thread(target=self._join, args=(index,))
            thread.start()
            thread.join()
        if len(self._files) < count:
            raise SystemExit("network namespaces are not permitted here; run this as root")
        self._count, self._ended = count, threading.Event()
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()

    def _join(self, index: int) -> None:
        """In a thread of its own, which has a network of its own from here on."""
        if ctypes.CDLL(None).unshare(CLONE_NEWNET):
            return
        tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tunnel, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TUN | IFF_NO_PI))
        address = f"{NETWORK}.{index + 1}/24"
        script = f"ip link set lo up && ip addr add {address} dev eth0 && ip link set eth0 mtu {PACKET} up"
        subprocess.run(["sh", "-c", script], check=True)
        self._tunnels.append(tunnel)
        # The namespace lives as long as a file that names it is open.
        self._files.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    def start(self, index: int, command: list[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
        namespace = f"--net=/proc/{os.getpid()}/fd/{self._files[index]}"
        words = ["nsenter", namespace, *OWN_MEMORY, *command]
        return subprocess.Popen(words, env={**os.environ, **more}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # (when it arrives, order, to whom, packet)
        free, order = [0.0] * self._count, 0
        while not self._ended.is_set():
            now = time.perf_counter()
            while waiting and waiting[0][0] <= now:
                _, _, to, packet = heapq.heappop(waiting)
                with contextlib.suppress(OSError):  # a full queue drops it, as a network does
                    os.write(self._tunnels[to], packet)
            patience = max(0.0, waiting[0][0] - now) if waiting else 0.05
            for tunnel in select.select(self._tunnels, [], [], patience)[0]:
                source = self._tunnels.index(tunnel)
                with contextlib.suppress(BlockingIOError):
                    packet = os.read(tunnel, 65536)
                    to = packet[19] - 1  # the last byte of an IPv4 packet's destination
                    if packet[0] >> 4 != 4 or not 0 <= to < self._count:
                        continue
                    gone = max(time.perf_counter(), free[source]) + len(packet) / self.link.bandwidth
                    free[source], order = gone, order + 1
                    heapq.heappush(waiting, (gone + self.link.latency, order, to, packet))

    def end(self) -> None:
        self._ended.set()
        self._carrier.join()
        for descriptor in (*self._tunnels, *self._files):
            os.close(descriptor)


@dataclass(frozen=True)
class Measured:
    images_per_second: float  # over the second half of the steps
    step: float  # seconds
    shares: dict[str, float]  # of the time, by what it is spent on
    start: float  # seconds until the first line of metrics
    saving: float  # seconds of a checkpoint


class Bench:
    def __init__(self, folder: Path, steps: int, budget: float) -> None:
        self.folder, self.steps, self._end = folder, steps, time.monotonic() + budget
        rng = np.random.default_rng(0)
        np.save(folder / "images.npy", rng.integers(0, 256, (8192, 28, 28), dtype=np.uint8))
        self._count = 0

    def run(
        self, world: int, model: str, batch: int, hosts: Hosts | None = None, more: tuple[str, ...] = ()
    ) -> Measured:
        """Trains on so many processes: of this machine, or each on a host of its own."""
        if time.monotonic() > self._end:
            raise TimeoutError
        self._count += 1
        preset, _, settings = MODELS[model]
        run_dir, every = self.folder / f"run-{self._count}", max(1, self.steps // 4)
        command = [sys.executable, "-m", "dist_ae", "train", preset, *(more or settings), "--model.start", "random"]
        command += ["--data.name", f"array:{self.folder / 'images.npy'}", "--train.batch-size", str(batch)]
        command += ["--train.steps", str(self.steps), "--train.eval-every", "1000000", "--tracking.wandb", "off"]
        command += ["--train.log-every", str(every), "--train.save-every", str(2 * every), "--run-dir", str(run_dir)]
        launcher = {"WORLD_SIZE": str(world), "MASTER_ADDR": f"{NETWORK}.1" if hosts else "127.0.0.1"}
        launcher |= {"MASTER_PORT": str(20000 + self._count), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        launcher |= {"PYTHONPATH": str(REPOSITORY)}
        began, started = time.monotonic(), []
        for rank in range(world):
            local = {
                "RANK": str(rank),
                "LOCAL_RANK": str(0 if hosts else rank),
                "LOCAL_WORLD_SIZE": str(1 if hosts else world),
            }
            more_env = {**launcher, **local}
            if hosts:
                started.append(hosts.start(rank, command, more_env))
            else:
                nowhere, environment = subprocess.DEVNULL, {**os.environ, **more_env}
                started.append(subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere))
        path = run_dir / "metrics.jsonl"
        try:
            while not path.exists() and all(process.poll() is None for process in started):
                time.sleep(0.01)
            first = time.monotonic() - began
            if any(process.wait(timeout=120) for process in started):
                raise RuntimeError(f"{' '.join(command)} failed on {world} processes")
        finally:
            for process in started:
                process.kill()
        lines = [line for line in map(json.loads, path.read_text().splitlines()) if line["split"] == "train"]
        # `images_per_second` is over all steps so far: the second half is what came after the middle line.
        spent = [line["step"] * batch / line["images_per_second"] for line in lines]
        middle = len(lines) // 2 - 1
        steps, seconds = lines[-1]["step"] - lines[middle]["step"], spent[-1] - spent[middle]
        names = ("time_data", "time_compute", "time_communication")
        busy = [{name: line.get(name, 0.0) for name in names} for line in lines[middle + 1 :]]
        shares = {name: sum(line[name] for line in busy) / sum(sum(line.values()) for line in busy) for name in names}
        # The checkpoint in the middle is in the line after it.
        after = middle + 1
        trained = spent[after] - spent[middle]
        saving = (
            lines[after]["time_saving"]
            * trained
            / max(1e-9, 1 - lines[after]["time_saving"] - lines[after]["time_evaluation"])
        )
        return Measured(steps * batch / seconds, seconds / steps, shares, first, saving)


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def scaling(bench: Bench) -> None:
    """Weak: the same share a process. Strong: the same batch."""
    head(
        "model", "scaling", "processes", "batch", "images/s", "of ideal", "data", "compute", "communication", "start, s"
    )
    cores = os.cpu_count() or 1
    for model, (_, share, _) in MODELS.items():
        for kind in ("weak", "strong"):
            alone = None
            for world in (1, 2, 4):
                batch = share * world if kind == "weak" else share * 4
                found = bench.run(world, model, batch)
                alone = alone or found.images_per_second
                ideal = alone * min(world, cores)
                shares = [
                    f"{100 * found.shares[name]:.0f} %" for name in ("time_data", "time_compute", "time_communication")
                ]
                speed = f"{found.images_per_second:,.0f}", f"{found.images_per_second / ideal:.2f}"
                row(model, kind, world, batch, *speed, *shares, f"{found.start:.1f}")


LINKS = [Link(0, 125e6), Link(0.002, 125e6), Link(0.01, 125e6), Link(0, 25e6), Link(0.01, 25e6), Link(0.005, 50e6)]
HELD_OUT = LINKS[-1]


def network(bench: Bench) -> None:
    """Seconds of a step = step + rounds × latency + crossings × gradient / bandwidth: three constants a model."""
    hosts = Hosts(2)
    head("model", "link", "images/s", "step, ms", "communication", "predicted, ms", "off by")
    laws = []
    try:
        for model, (_, share, _) in MODELS.items():
            found = {}
            for link in LINKS:
                hosts.link = link
                found[link] = bench.run(2, model, 2 * share, hosts)
            size = gradient_bytes(bench)
            table = np.array([[1, link.latency, size / link.bandwidth] for link in LINKS])
            seconds = np.array([found[link].step for link in LINKS])
            fitted = [link != HELD_OUT for link in LINKS]
            # Relative errors count: a slow link is not worth more than a fast one.
            weights = 1 / seconds[fitted]
            constants, *_ = np.linalg.lstsq(table[fitted] * weights[:, None], seconds[fitted] * weights, rcond=None)
            for link, line, step in zip(LINKS, table, seconds, strict=True):
                predicted = float(line @ constants)
                name = f"{link}{' (held out)' if link == HELD_OUT else ''}"
                share_of = f"{100 * found[link].shares['time_communication']:.0f} %"
                off = f"{100 * (predicted / step - 1):+.0f} %"
                row(
                    model,
                    name,
                    f"{found[link].images_per_second:,.0f}",
                    f"{1000 * step:.1f}",
                    share_of,
                    f"{1000 * predicted:.1f}",
                    off,
                )
            step, rounds, crossings = constants
            parts_of_it = f"{rounds:.1f} × latency + {crossings:.2f} × {size:,} bytes / bandwidth"
            laws.append(f"{model}: {1000 * step:.1f} ms + {parts_of_it}")
        print("\n" + "\n\n".join(laws), flush=True)
    finally:
        hosts.end()


def gradient_bytes(bench: Bench) -> int:
    """Bytes of the newest run's weights, which its gradient has too."""
    newest = max(bench.folder.glob("run-*"), key=lambda path: int(path.name.partition("-")[2]))
    return next(iter(sorted(newest.glob("checkpoints/*/weights.safetensors")))).stat().st_size


def sizes(bench: Bench) -> None:
    head("hidden layers", "checkpoint, MB", "processes", "start, s", "checkpoint, ms", "MB/s")
    for widths in (("512", "256"), ("2048", "1024")):
        for world in (1, 2):
            found = bench.run(world, "MLP", 256, more=("--model.hidden-dims", *widths))
            newest = max(bench.folder.glob("run-*"), key=lambda path: int(path.name.partition("-")[2]))
            folder = next(iter(sorted(newest.glob("checkpoints/0*"))))
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            row(
                " ".join(widths),
                f"{size:.1f}",
                world,
                f"{found.start:.1f}",
                f"{1000 * found.saving:.0f}",
                f"{size / max(found.saving, 1e-9):,.0f}",
            )


PARTS = {"scaling": scaling, "network": network, "sizes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing new is measured")
    parser.add_argument("--steps", type=int, default=24, help="of each run; speed is that of the second half")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; left out, all of it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.steps, arguments.budget)
        try:
            for part in arguments.parts or PARTS:
                PARTS[part](bench)
        except TimeoutError:
            print(f"\nThe {arguments.budget:g} s are over; what is missing above was not measured.")


if __name__ == "__main__":
    main()
