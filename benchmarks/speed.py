"""Training speed on Fashion-MNIST beside what people would write, and what the trainer costs beside training.

    python -m benchmarks.speed [--turns 15] [--starts 1] [--only WORD] [--beside CHECKOUT]       (make bench)

Every contestant (benchmarks/contestants.py) is a process that trains without end. All but one are stopped; the two of
a ratio take turns of a second, and neighbouring turns are compared. So their start, and that of W&B, is in no figure,
and a slow minute of a shared machine slows both. A ratio is the median over the turns, with a 95 % bootstrap interval;
"ours : ours again" says how far to trust the others. Lightning and pythae: pip install -e ".[bench]".

Two starts of one and the same program can differ by some percent for as long as they live: ``--starts 3`` spreads the
turns over so many starts of every contestant, and takes so many times the time to start them.

``--beside`` compares the step of this checkout with that of another one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from benchmarks.contestants import HIDDEN, LATENT, SLOTS

HERE = Path(__file__).parent
TURN, SETTLE = 1.0, 0.15  # seconds of a turn, and of its beginning that do not count: caches fill again
START_STEPS, START_SECONDS = 60, 90  # a contestant has started when it took so many steps
BEGIN, END = "<!-- written by benchmarks/speed.py -->", "<!-- end -->"

CONTESTANTS = {  # the call, and the number of processes
    "ours, batch 128": ("ours(128)", 1),
    "ours again, batch 128": ("ours(128)", 1),
    "ours, batch 128, W&B off": ("ours(128, '--tracking.wandb', 'off')", 1),
    "bare loop, fused Adam, batch 128": ("bare(128)", 1),
    "Accelerate, prepared DataLoader, batch 128": ("loader(128, 0, True)", 1),
    "tutorial's DataLoader script, 2 workers, batch 128": ("loader(128, 2, False)", 1),
    "Lightning, batch 128": ("lightning(128)", 1),
    "pythae, batch 128": ("pythae(128)", 1),
    "ours, batch 1024": ("ours(1024)", 1),
    "bare loop, batch 1024": ("bare(1024)", 1),
    "ours, bf16, batch 1024": ("ours(1024, '--precision', 'bf16')", 1),
    "bare loop, bf16, batch 1024": ("bare(1024, True)", 1),
    "ours, batch 8192": ("ours(8192)", 1),
    "ours, 2 processes, batch 128": ("ours(128)", 2),
    "ours, 2 processes, batch 1024": ("ours(1024)", 2),
    "ours, 2 processes, bf16 gradients, batch 1024": ("ours(1024, '--train.gradient-type', 'bf16')", 2),
    "ours, 2 processes, batch 8192": ("ours(8192)", 2),
    "ours, conv, batch 256": ("ours_conv(256)", 1),
    "ours, conv, compiled, batch 256": ("ours_conv(256, '--train.compile')", 1),
    "ours, 2 processes, conv, batch 256": ("ours_conv(256)", 2),
    "bare loop, conv, batch 256": ("bare_conv(256)", 1),
    "limit of its convolutions, batch 256": ("conv_limit(256)", 1),
    "limit of matrix products, fp32": ("limit(False)", 1),
    "limit of matrix products, bf16": ("limit(True)", 1),
}
RATIOS = (  # what, of which, target
    ("ours, batch 128", "ours again, batch 128", "1, to ± 3 %"),
    ("ours, batch 128", "bare loop, fused Adam, batch 128", "≥ 0.97"),
    ("ours, batch 128", "ours, batch 128, W&B off", "≥ 0.97"),
    ("ours, batch 128", "tutorial's DataLoader script, 2 workers, batch 128", "≥ 4"),
    ("ours, batch 128", "pythae, batch 128", "≥ 1.6"),
    ("ours, batch 128", "Lightning, batch 128", "≥ 2"),
    ("ours, batch 128", "Accelerate, prepared DataLoader, batch 128", "≥ 1.25"),
    ("ours, batch 128", "limit of matrix products, fp32", "≥ 0.60"),
    ("ours, batch 1024", "bare loop, batch 1024", "≥ 0.97"),
    ("ours, batch 1024", "limit of matrix products, fp32", "≥ 0.88"),
    ("ours, bf16, batch 1024", "ours, batch 1024", "≥ 1.5"),
    ("ours, bf16, batch 1024", "bare loop, bf16, batch 1024", ""),
    ("ours, bf16, batch 1024", "limit of matrix products, bf16", ""),
    ("ours, 2 processes, batch 128", "ours, batch 128", "≥ 0.69"),
    ("ours, 2 processes, batch 1024", "ours, batch 1024", "≥ 1.08"),
    ("ours, 2 processes, batch 8192", "ours, batch 8192", "≥ 1.04"),
    ("ours, 2 processes, bf16 gradients, batch 1024", "ours, batch 1024", "≥ 0.90"),
    ("ours, conv, batch 256", "bare loop, conv, batch 256", "≥ 0.97"),
    ("ours, conv, batch 256", "limit of its convolutions, batch 256", ""),
    ("ours, conv, compiled, batch 256", "ours, conv, batch 256", ""),
    ("ours, 2 processes, conv, batch 256", "ours, conv, batch 256", ""),
)
BESIDE = ("denoising", "dropout", "vae", "ae")  # presets whose step is compared with another checkout's


class Contestant:
    """A training loop in processes of its own, stopped but for its turns."""

    def __init__(self, call: str, world: int, folder: Path, checkout: Path, **variables: str) -> None:
        self.path = folder / f"{len(list(folder.iterdir()))}.meter"
        np.zeros(SLOTS + 2).tofile(self.path)
        self.times = np.memmap(self.path, np.float64, "r", shape=(SLOTS + 2,))
        launcher = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
        several = [*launcher.split(), "--num_processes", str(world)] if world > 1 else []
        command = [sys.executable, *several, str(HERE / "contestants.py"), str(self.path), call]
        threads = str(max(1, (os.cpu_count() or 1) // world))
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": threads, "WANDB_SILENT": "true"}
        environment |= variables
        self.log = folder / f"{self.path.stem}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        self.groups = {
            self.process.pid
        }  # its processes, also those that a launcher or W&B put into groups of their own

    def started(self) -> bool:
        """Waits until it trains, then stops it. False, with the reason said, where it does not."""
        end = time.monotonic() + START_SECONDS
        while self.times[0] < START_STEPS and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(3)  # what still starts in the background
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.groups |= {os.getpgid(child.pid) for child in family}
        self.signal(signal.SIGSTOP)
        if self.process.poll() is None and self.times[0] >= START_STEPS:
            return True
        lines = self.log.read_text(errors="replace").strip().splitlines()
        print(f"left out: {lines[-1] if lines else 'it said nothing'}", file=sys.stderr)
        return False

    def turn(self) -> float:
        """Images per second in one turn."""
        begin = time.perf_counter()
        self.signal(signal.SIGCONT)
        time.sleep(TURN)
        self.signal(signal.SIGSTOP)
        count = int(self.times[0])
        recent = np.array([self.times[2 + step % SLOTS] for step in range(max(0, count - 200_000), count)])
        ends = recent[recent > begin + SETTLE]
        if len(ends) < 3:
            raise RuntimeError(f"only {len(ends)} steps in a turn: {self.log.read_text(errors='replace')[-300:]}")
        return float(self.times[1] * (len(ends) - 1) / (ends[-1] - ends[0]))

    def signal(self, number: signal.Signals) -> None:
        for group in self.groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def contestants(calls: dict[str, tuple[str, int, Path]]) -> Iterator[dict[str, Contestant]]:
    """All of them, started one after the other and stopped; ended at the end."""
    found: dict[str, Contestant] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, (call, world, checkout) in calls.items():
                contestant = Contestant(call, world, Path(folder), checkout)
                found[name] = contestant
                if not contestant.started():
                    found.pop(name).end()
                    print(f"          {name}", file=sys.stderr)
            yield found
        finally:
            for contestant in found.values():
                contestant.end()


def turns(first: Contestant, second: Contestant, count: int) -> tuple[list[float], list[float]]:
    """Images per second of two contestants in neighbouring turns: A B, B A, A B, …"""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(count):
        pair = ((first, rates[0]), (second, rates[1]))
        for contestant, found in pair if number % 2 == 0 else reversed(pair):
            found.append(contestant.turn())
    return rates


def interval(ratios: list[float], samples: int = 4000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(samples))
    return medians[int(0.025 * samples)], medians[int(0.975 * samples)]


# -- what training costs beside


def evaluation() -> float:
    """Seconds to evaluate the 10,000 validation images of the plain `ae`: clean and noisy, once more after a first
    time."""
    import dist_ae
    from dist_ae.data import sources
    from dist_ae.data.reader import Reader
    from dist_ae.evaluate import evaluate
    from dist_ae.models import build
    from dist_ae.processes.runtime import Runtime

    config = dist_ae.PRESETS["ae-reference"]
    dataset, runtime = sources.load(config.data), Runtime(config)
    model, reader = build(config, dataset.image_shape), Reader(dataset.val, runtime.device)
    evaluate(model, reader, config.objective, config.evaluation, runtime)
    start = time.perf_counter()
    evaluate(model, reader, config.objective, config.evaluation, runtime)
    return time.perf_counter() - start


def saving() -> float:
    """Percent of a run's time that goes into checkpoints every 200 steps and into metrics."""
    import dist_ae
    from dist_ae.run.directory import RunDirectory

    spent = 0.0

    def timed(name: str) -> None:
        real = getattr(RunDirectory, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal spent
            start = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        setattr(RunDirectory, name, call)

    for name in ("save", "append_metrics"):
        timed(name)
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(io.StringIO()):
        values = {"train.steps": 1000, "train.save_every": 200, "tracking.wandb": "off", "run_dir": f"{folder}/run"}
        result = dist_ae.train(dist_ae.PRESETS["ae-reference"].override(values))
    return 100 * spent / (spent + 1000 * 128 / result.images_per_second)


def first_step() -> float:
    """Seconds from the command to the end of the first step on Fashion-MNIST, with the PCA start."""
    code = """if True:
        import sys, time
        from dist_ae import __main__, step
        real = step.Learner.step
        def first(self, number):
            real(self, number)
            print(time.time(), flush=True)
            import os; os._exit(0)
        step.Learner.step = first
        __main__.main()
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "ae", "--data.name", "fashion_mnist", "--model.latent-dim", "128", "--run-dir", folder]
        start = time.time()
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        return float(done.stdout.split()[-1]) - start


def help_seconds() -> float:
    """Seconds of `dist-ae --help`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dist_ae", "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def memory() -> float:
    """MB that `train` needs at its peak above a Python that imported torch, the images and four times the weights."""

    def peak(*command: str) -> int:
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        return usage.ru_maxrss * 1024

    with tempfile.TemporaryDirectory() as folder:
        command = [
            "-m",
            "dist_ae",
            "train",
            "ae-reference",
            "--train.steps",
            "400",
            "--tracking.wandb",
            "offline",
            "--run-dir",
        ]
        above = peak(*command, f"{folder}/run") - peak("-c", "import torch")
    weights = 4 * sum(a * b + b for a, b in itertools.pairwise((784, *HIDDEN, LATENT, *reversed(HIDDEN), 784)))
    return (above - 70_000 * 784 - 4 * weights) / 1e6


COSTS = {
    "evaluation of 10,000 images, s": (evaluation, "≤ 0.25"),
    "checkpoints every 200 steps, and metrics, % of the time": (saving, "≤ 2"),
    "command to first step on Fashion-MNIST, s": (first_step, "≤ 5"),
    "`dist-ae --help`, s": (help_seconds, "≤ 0.5"),
    "peak memory above torch, images and 4 × weights, MB": (memory, "≤ 100"),
}


def cost(name: str, times: int = 3) -> list[float]:
    """A cost measured in processes of its own."""
    code = f"from benchmarks import speed; print(speed.{COSTS[name][0].__name__}())"
    command = [sys.executable, "-c", code]
    done = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(times)]
    return [float(each.stdout.split()[-1]) for each in done]


def machine() -> str:
    """Cores, processor and Python, for the head of a table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    lower = "with bf16" if has_bf16() else "without bf16"
    return f"{os.cpu_count()} cores of {cpu}, {lower}, Python {platform.python_version()}"


def has_bf16() -> bool:
    """Whether this machine multiplies bf16 natively. Emulated, its rows would only say how slow that is."""
    import torch

    from dist_ae.devices import multiplies_bf16

    return multiplies_bf16(torch.device("cpu"))


def compared(
    ratios: list[tuple[str, str, str]], calls: dict[str, tuple[str, int, Path]], count: int, starts: int
) -> list[str]:
    """Rows of ratios, and what they were made of: ``count`` turns, over so many starts of the contestants."""
    rates: dict[tuple[str, str, str], list[tuple[float, float]]] = {ratio: [] for ratio in ratios}
    for _ in range(starts):
        with contestants(calls) as found:
            for what, of, target in ratios:
                if what not in found or of not in found:
                    continue
                try:
                    pairs = turns(found[what], found[of], -(-count // starts))
                except RuntimeError as error:  # one that died, or a machine too busy to compare anything
                    print(f"left out: {what} : {of}: {error}", file=sys.stderr)
                    continue
                rates[what, of, target].extend(zip(*pairs, strict=True))
    rows = ["| ratio of neighbouring turns | median | 95 % interval | target | images/s |", "|---|---|---|---|---|"]
    for (what, of, target), both in rates.items():
        if both:
            each = [a / b for a, b in both]
            low, high = interval(each)
            speeds = " : ".join(f"{statistics.median(side):,.0f}" for side in zip(*both, strict=True))
            rows.append(
                f"| {what} : {of} | {statistics.median(each):.3f} | {low:.3f} – {high:.3f} | {target} | {speeds} |"
            )
    return rows


def beside(checkout: Path, count: int, starts: int) -> list[str]:
    """The step of each preset with random draws, here against another checkout."""
    root = HERE.parent
    calls: dict[str, tuple[str, int, Path]] = {}
    ratios: list[tuple[str, str, str]] = []
    for preset, batch in itertools.product(BESIDE, (128, 1024)):
        call = f"ours({batch}, '--tracking.wandb', 'off', preset={preset!r})"
        here, there = (f"{preset}, batch {batch}, {place}" for place in ("here", "there"))
        calls |= {here: (call, 1, root), there: (call, 1, checkout.resolve())}
        ratios.append((here, there, "≥ 1.05" if preset == "dropout" else "≥ 1.02" if preset != "ae" else ""))
    return compared(ratios, calls, count, starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--starts", type=int, default=1, help="starts of every contestant")
    parser.add_argument("--only", default="", help="ratios in whose names this stands; nothing is written then")
    parser.add_argument("--beside", type=Path, help="another checkout; nothing is written then")
    arguments = parser.parse_args()
    plan = f"{arguments.turns} turns of {TURN:g} s over {arguments.starts} start{'s' * (arguments.starts > 1)}"
    head = f"{machine()}; {plan}; {time.strftime('%Y-%m-%d')}"
    if arguments.beside:
        print("\n".join([head, "", *beside(arguments.beside, arguments.turns, arguments.starts)]))
        return
    ratios = [ratio for ratio in RATIOS if any(arguments.only in name for name in ratio[:2])]
    if not has_bf16():
        ratios = [ratio for ratio in ratios if not any(", bf16" in n and "gradients" not in n for n in ratio[:2])]
    needed = {name for ratio in ratios for name in ratio[:2]}
    calls = {name: (call, world, HERE.parent) for name, (call, world) in CONTESTANTS.items() if name in needed}
    rows = compared(ratios, calls, arguments.turns, arguments.starts)
    if arguments.only:
        print("\n".join([head, "", *rows]))
        return
    rows += ["", "| beside training | median | range | target |", "|---|---|---|---|"]
    for name, (_, target) in COSTS.items():
        values = cost(name)
        middle, low, high = statistics.median(values), min(values), max(values)
        rows.append(f"| {name} | {middle:.2f} | {low:.2f} – {high:.2f} | {target} |")
    text = "\n".join([head, "", *rows])
    print(text)
    before, _, rest = (HERE / "README.md").read_text().partition(BEGIN)
    (HERE / "README.md").write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
