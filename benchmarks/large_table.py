"""A Parquet larger than memory should hold: seconds to the first step, and the memory that training takes.

    python -m benchmarks.large_table [--gigabytes 5] [--folder DIR]

Writes a Parquet of random float32 columns once, then starts `dist-ae train table` on it with an empty cache and stops
it after some steps. Memory is ``RssAnon`` of the process, from /proc: what is its own, without the files it maps.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

COLUMNS, GROUP = 100, 100_000


def write(path: Path, gigabytes: float) -> None:
    """Rows of ten factors in 100 columns with noise, which do not compress."""
    import pyarrow
    import pyarrow.parquet

    draw = np.random.default_rng(0)
    mixing = draw.standard_normal((10, COLUMNS), np.float32)
    names = [f"column{index}" for index in range(COLUMNS)]
    temporary = path.with_suffix(".part")
    with pyarrow.parquet.ParquetWriter(temporary, pyarrow.schema([(n, pyarrow.float32()) for n in names])) as file:
        while temporary.stat().st_size < gigabytes * 1e9:
            rows = np.tanh(draw.standard_normal((GROUP, 10), np.float32)) @ mixing * 3 + 5
            rows += 0.3 * draw.standard_normal(rows.shape, np.float32)
            file.write_table(pyarrow.table(dict(zip(names, rows.T, strict=True))))
    temporary.rename(path)


def own_memory(pid: int) -> int:
    """Bytes of anonymous memory of a process; 0 where it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def measure(path: Path, folder: Path) -> None:
    cache, run = folder / "cache", folder / "run"
    for each in (cache, run):
        shutil.rmtree(each, ignore_errors=True)
    for what in ("packed now", "packed before"):
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, "-m", "dist_ae", "train", "table", "--data.name", f"table:{path}"]
        command += ["--data.cache", str(cache), "--run-dir", str(run), "--tracking.wandb", "off"]
        command += ["--train.log-every", "1", "--train.eval-every", "100000", "--train.steps", "100000"]
        begin, most, packed, first = time.perf_counter(), 0, 0.0, 0.0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = run / "metrics.jsonl"
        while process.poll() is None and not (first and time.perf_counter() - begin > first + 5):
            most, now = max(most, own_memory(process.pid)), time.perf_counter() - begin
            packed = packed or (now if any(cache.glob("tables/*/records.json")) else 0.0)
            first = first or (now if metrics.exists() and '"train"' in metrics.read_text() else 0.0)
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        print(
            f"{what}: {path.stat().st_size / 1e9:.2f} GB, packed after {packed:.1f} s, first step after {first:.1f} s, "
            f"at most {most / 1e6:.0f} MB of its own",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/large_table"))
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    path = chosen.folder / f"{chosen.gigabytes:g}GB.parquet"
    if not path.exists():
        write(path, chosen.gigabytes)
    print(f"{len(os.sched_getaffinity(0))} cores")
    measure(path, chosen.folder)


if __name__ == "__main__":
    main()
