"""How much a busy machine slows training: two trainings at once, and one beside a busy program of one thread.

    python -m benchmarks.busy [--spins 1000 300000 10000 0] [--rounds 5]                    under four minutes

Each setting of GOMP_SPINCOUNT (how often an idle thread of libgomp looks for work before it sleeps; the trainer takes
1000 where the machine is busy at its start, else 10000) has two trainings of its own, stopped but for their turns.
Prints how many times longer a step takes than alone, and the speed alone beside that of libgomp's own default, on a
machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.contestants import SLOTS
from benchmarks.speed import HERE, Contestant, machine

SECONDS, SETTLE = 2.0, 0.3
DEFAULT = "300000"  # libgomp's own


def rates(trainings: list[Contestant]) -> list[float]:
    """Steps per second of each, while all of them run."""
    begin = time.perf_counter()
    for training in trainings:
        training.signal(signal.SIGCONT)
    time.sleep(SECONDS)
    for training in trainings:
        training.signal(signal.SIGSTOP)
    end = time.perf_counter()
    found = []
    for training in trainings:
        count = int(training.times[0])
        ends = np.array([training.times[2 + step % SLOTS] for step in range(max(0, count - 20_000), count)])
        found.append(float(((ends > begin + SETTLE) & (ends <= end)).sum()) / (end - begin - SETTLE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", nargs="+", default=["1000", DEFAULT, "10000", "0"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    table: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs: dict[str, list[Contestant]] = {}
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        os.kill(busy.pid, signal.SIGSTOP)
        try:
            for spins in options.spins:
                variables = {"GOMP_SPINCOUNT": spins}
                call = f"ours({options.batch}, '--tracking.wandb', 'off')"
                pairs[spins] = [Contestant(call, 1, Path(folder), HERE.parent, **variables) for _ in range(2)]
                if not all(training.started() for training in pairs[spins]):
                    sys.exit(1)
                table[spins] = {"alone": [], "two": [], "beside": []}
            for _ in range(options.rounds):
                for spins, (one, other) in pairs.items():
                    table[spins]["alone"] += rates([one])
                    table[spins]["two"].append(statistics.mean(rates([one, other])))
                    os.kill(busy.pid, signal.SIGCONT)
                    table[spins]["beside"] += rates([one])
                    os.kill(busy.pid, signal.SIGSTOP)
        finally:
            busy.kill()
            for pair in pairs.values():
                for training in pair:
                    training.end()
    print(f"{machine()}; batch {options.batch}, {options.rounds} rounds of {SECONDS:g} s\n")
    usual = statistics.median(table[DEFAULT]["alone"]) if DEFAULT in table else None
    print("| spins | two at once, each : alone (≤ 2.5) | beside a busy program : alone (≤ 2.2) | alone : default |")
    print("|---|---|---|---|")
    for spins, found in table.items():
        alone = statistics.median(found["alone"])
        times = [alone / max(statistics.median(found[name]), 1e-9) for name in ("two", "beside")]
        beside = "" if usual is None else f"{alone / usual:.3f}"
        print(f"| {spins} | {times[0]:.2f} | {times[1]:.2f} | {beside} ({alone:.0f} steps/s) |", flush=True)


if __name__ == "__main__":
    main()
