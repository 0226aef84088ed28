"""What packing pictures costs, when it has paid, and what a memory map costs in training.

    python -m benchmarks.data [--pictures 20000] [--rounds 3] [--only WORD]

Everything is on two processes or workers, because that is what the rivals get too; ratios are taken within a round.

- packing: `dist-ae pack` against Pillow alone, the same decoding in a pool of two processes that throw the result away
- looking: `dist-ae look` against Pillow alone, which opens and decodes the same pictures in a pool of two processes
- training: ImageFolder and a DataLoader with two workers, as people write it, against ours after packing; same
pictures, same MLP
- mapped: training from a warm memory map against the same images held in memory, MLP on 32×32×3, batches of 128 and
1024
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIZE = 64  # of the packed images
CHUNK = 32


def make_pictures(root: Path, count: int) -> Path:
    """JPEG and PNG files of 64 to 512 pixels a side in two classes, cut from scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    rng = np.random.default_rng(0)
    for index in range(count):
        height, width = (int(x) for x in rng.integers(64, 427, 2))
        y, x = int(rng.integers(0, 427 - height + 1)), int(rng.integers(0, 640 - width + 1))
        cut = pictures[index % 2].crop((x, y, x + width, y + height))
        scale = float(rng.uniform(1, 512 / max(height, width)))
        cut = cut.resize((round(width * scale), round(height * scale)))
        place = root / ("flower" if index % 2 else "temple") / f"{index:06d}.{'jpg' if index % 2 == 0 else 'png'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        cut.save(place, quality=90) if place.suffix == ".jpg" else cut.save(place, compress_level=4)
    return root


def pillow(paths: list[str]) -> int:
    """The rival: what Pillow's own documentation advises for small copies of pictures, and nothing else."""
    total = 0
    for path in paths:
        with Image.open(path) as image:
            image.draft("RGB", (2 * SIZE, 2 * SIZE))
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box, reducing_gap=2.0)
            total += np.asarray(small).nbytes
    return total


def pillow_seconds(folder: Path) -> float:
    start = time.perf_counter()
    paths = [str(path) for path in sorted(folder.rglob("*.*"))]
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        total = sum(pool.imap(pillow, chunks))
    assert total == len(paths) * SIZE * SIZE * 3
    return time.perf_counter() - start


def decode(paths: list[str]) -> int:
    """The rival of looking: every picture is opened and decoded, JPEGs at the least size that a small copy needs."""
    for path in paths:
        with Image.open(path) as image:
            image.draft("RGB", (2 * SIZE, 2 * SIZE))
            image.load()
    return len(paths)


def decode_seconds(folder: Path) -> Seconds:
    start, before = time.perf_counter(), _processor_seconds()
    paths = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert sum(pool.imap(decode, chunks)) == len(paths)
        pool.close()
        pool.join()
    return Seconds(time.perf_counter() - start, _processor_seconds() - before)


def look_seconds(folder: Path, out: Path) -> Seconds:
    start, before = time.perf_counter(), _processor_seconds()
    command = [sys.executable, "-m", "dist_ae", "look", f"folder:{folder}", "--out", str(out / "page.html")]
    subprocess.run(command, check=True, capture_output=True, env=_environment())
    return Seconds(time.perf_counter() - start, _processor_seconds() - before)


class Seconds(NamedTuple):
    wall: float
    processor: float  # of all processes together, which a busy machine changes less


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def pack_seconds(folder: Path, out: Path) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "dist_ae", "pack", f"folder:{folder}", str(out), "--image-size", str(SIZE)]
    subprocess.run(command, check=True, capture_output=True, env=_environment())
    return time.perf_counter() - start


def _environment() -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"}


def image_folder_rate(folder: Path, batch: int, images: int) -> float:
    """Images per second of the usual script: ImageFolder, transforms, a DataLoader with two workers, Adam."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()])
    loader = DataLoader(datasets.ImageFolder(str(folder), transform), batch, shuffle=True, num_workers=2)
    sizes = (SIZE * SIZE * 3, 512, 256, 32, 256, 512, SIZE * SIZE * 3)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters())
    seen, start = 0, 0.0
    for pictures, _ in loader:
        if not seen:
            start = time.perf_counter()
        x = pictures.flatten(1)
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(x)
        if seen >= images:
            break
    return (seen - batch) / (time.perf_counter() - start)


def our_rate(data: str, batch: int, steps: int, mapped: bool = False) -> float:
    """Images per second of the trainer, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"""
import json, sys
import dist_ae
from dist_ae.data import reader
if {mapped}:
    reader.SHARE_OF_MEMORY = 0
config = dist_ae.PRESETS["ae"].override({{
    "data.name": {data!r}, "model.start": "random", "train.batch_size": {batch}, "train.steps": {steps},
    "train.eval_every": {steps},
    "train.log_every": 50, "tracking.wandb": "off", "run_dir": {folder + "/run"!r}}})
print("RATE", dist_ae.train(config).images_per_second)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=_environment()
        )
        return float(done.stdout.rpartition("RATE")[2])


def packing(work: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Ours is `dist-ae pack` from the command to its end, start of Python included."""
    ours, rival = [], []
    for number in range(rounds):
        rival.append(pillow_seconds(folder))
        ours.append(pack_seconds(folder, work / f"packed-{number}"))
    return {
        "Pillow alone, s": rival,
        "dist-ae pack, s": ours,
        "ratio (target <= 1.15)": [a / b for a, b in zip(ours, rival, strict=True)],
    }


def looking(work: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Ours from the command to its end, start of Python and page included."""
    found: dict[str, Any] = {}
    for what, pictures in (("64 to 512 pixels", folder), ("64 pixels", make_small(work / "small", folder))):
        ours, rival = [], []
        for _ in range(rounds):
            rival.append(decode_seconds(pictures))
            ours.append(look_seconds(pictures, work))
        found[f"{what}: Pillow alone, s"] = [each.wall for each in rival]
        found[f"{what}: dist-ae look, s"] = [each.wall for each in ours]
        found[f"{what}: ratio (target <= 1.3)"] = [a.wall / b.wall for a, b in zip(ours, rival, strict=True)]
        found[f"{what}: ratio of processor time"] = [
            a.processor / b.processor for a, b in zip(ours, rival, strict=True)
        ]
    return found


def make_small(root: Path, folder: Path) -> Path:
    """The same pictures as PNGs of 64 pixels."""
    root.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        with Image.open(path) as image:
            image.draft("RGB", (2 * SIZE, 2 * SIZE))
            image.convert("RGB").resize((SIZE, SIZE), reducing_gap=2.0).save(root / f"{number:06d}.png")
    return root


def training(work: Path, folder: Path, rounds: int, count: int) -> dict[str, Any]:
    packed = work / "packed-training"
    seconds = pack_seconds(folder, packed)
    ours, rival = [], []
    for _ in range(rounds):
        rival.append(image_folder_rate(folder, 128, min(count // 2, 6000)))
        ours.append(our_rate(f"packed:{packed}", 128, 200))
    saved = 1 / statistics.median(rival) - 1 / statistics.median(ours)  # seconds an image
    return {
        "ImageFolder, images/s": rival,
        "ours after packing, images/s": ours,
        "ratio (target >= 5)": [a / b for a, b in zip(ours, rival, strict=True)],
        "packing has paid after, epochs": [seconds / (count * saved)],
    }


def mapped(work: Path, rounds: int, images: int = 100_000) -> dict[str, Any]:
    path = work / "images.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (images, 3, 32, 32))
    rng = np.random.default_rng(0)
    for start in range(0, images, 10_000):
        array[start : start + 10_000] = rng.integers(0, 256, (min(10_000, images - start), 3, 32, 32), dtype=np.uint8)
    del array
    os.sync()  # what is still on its way to the disk would be measured too
    found: dict[str, Any] = {}
    for batch, steps in ((128, 600), (1024, 120)):
        held: list[float] = []
        ratios: list[float] = []
        for _ in range(rounds):
            held.append(our_rate(f"array:{path}", batch, steps))
            ratios.append(our_rate(f"array:{path}", batch, steps, mapped=True) / held[-1])
        found[f"held in memory, batch {batch}, images/s"] = held
        found[f"mapped : held, batch {batch} (target >= 0.95)"] = ratios
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("packing", "looking", "training", "mapped"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work, results = Path(name), {}
        folder = work / "pictures"
        if given.only != "mapped":
            make_pictures(folder, given.pictures)
        if given.only in (None, "packing"):
            results["packing"] = packing(work, folder, given.rounds)
        if given.only in (None, "looking"):
            results["looking"] = looking(work, folder, given.rounds)
        if given.only in (None, "training"):
            results["training"] = training(work, folder, given.rounds, given.pictures)
        if given.only in (None, "mapped"):
            results["mapped"] = mapped(work, given.rounds)
    for part, rows in results.items():
        print(f"\n{part}")
        for what, values in rows.items():
            print(f"  {what:50} {statistics.median(values):10.3f}   {min(values):10.3f} to {max(values):.3f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
