"""Training throughput on Fashion-MNIST (D→512→256→128) beside what people would write: `python benchmarks/throughput.py [--rounds 5]`.

Each contestant runs in a process of its own, in turn, several rounds; medians and the ratio to ours, round by round, go to
benchmarks/throughput.json and as a table to standard output. Rivals: the tutorial's DataLoader script with its shapes fixed,
Accelerate with a prepared DataLoader, Lightning (where installed), and as upper marks a bare loop over a uint8 tensor and the
machine's own limit in matrix products, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, HIDDEN, LATENT = 800, (512, 256), 128
FLOPS_PER_IMAGE = 12 * sum(a * b for a, b in zip((784, *HIDDEN), (*HIDDEN, LATENT), strict=True)) - 2 * 784 * HIDDEN[0]  # no gradient for the images


def net():  # type: ignore[no-untyped-def]
    from torch import nn

    sizes = (784, *HIDDEN, LATENT, *reversed(HIDDEN), 784)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([] if i in (len(HIDDEN), len(sizes) - 2) else [nn.ReLU()])
    return nn.Sequential(*layers)


def bare(batch: int, bf16: bool = False) -> float:
    """What a careful person writes by hand for one machine."""
    import torch

    from dist_ae import data
    from dist_ae.config import DataConfig

    images = torch.from_numpy(data.load(DataConfig(name="fashion_mnist")).train.images).flatten(1)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def steps(count: int) -> None:
        order = torch.randperm(len(images))
        for step in range(count):
            at = step * batch % (len(images) - batch)
            x = images[order[at : at + batch]].float().div_(127.5).sub_(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = model(x)
            loss = (y.float() - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(30)
    start = time.perf_counter()
    steps(STEPS * 128 // batch)
    return STEPS * 128 // batch * batch / (time.perf_counter() - start)


def loader(batch: int, workers: int, accelerate: bool) -> float:
    """The tutorial's script with its shapes fixed; with ``accelerate``, a prepared DataLoader over tensors that are decoded already."""
    import torch
    from torch.utils.data import DataLoader, Dataset, TensorDataset
    from torchvision import transforms

    from dist_ae import data
    from dist_ae.config import DataConfig

    images = torch.from_numpy(data.load(DataConfig(name="fashion_mnist")).train.images)
    convert = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])

    class Images(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> torch.Tensor:
            return convert(images[i])

    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.999))
    dataset = TensorDataset(images.float().div(127.5).sub(1)) if accelerate else Images()
    batches = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers)  # type: ignore[var-annotated]
    backward = torch.Tensor.backward
    if accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        backward = accelerator.backward
    start, seen = 0.0, 0
    for step, item in enumerate(batches):
        if step == 20:
            start = time.perf_counter()
        x = (item[0] if accelerate else item).flatten(1)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        loss.item()
        seen += len(x) if step >= 20 else 0
        if step == (300 if accelerate else 150):
            break
    return seen / (time.perf_counter() - start)


def lightning(batch: int) -> float:
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from dist_ae import data
    from dist_ae.config import DataConfig

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, item: list[torch.Tensor], index: int) -> torch.Tensor:
            if index == 20:
                self.start = time.perf_counter()
            x = item[0].flatten(1)
            return (self.net(x) - x).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    images = torch.from_numpy(data.load(DataConfig(name="fashion_mnist")).train.images).float().div(127.5).sub(1)
    module = Module()
    settings = {
        "max_steps": 320,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    L.Trainer(**settings).fit(module, DataLoader(TensorDataset(images), batch_size=batch, shuffle=True))  # type: ignore[arg-type]
    return 300 * batch / (time.perf_counter() - module.start)


def limit(bf16: bool) -> float:
    """Images per second if a step were nothing but large matrix products."""
    import torch

    a = torch.randn(2048, 2048, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(3):
        a @ a
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    return 20 * 2 * 2048**3 / (time.perf_counter() - start) / FLOPS_PER_IMAGE


def ours(batch: int, *more: str, world: int = 1) -> float:
    """`dist-ae train` with everything on: Accelerate, metrics, W&B offline, evaluation, checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        steps = max(STEPS * 128 // batch, 40)
        command = ["-m", "dist_ae", "train", "ae", "--data.name", "fashion_mnist", "--model.latent-dim", str(LATENT), "--train.batch-size", str(batch)]
        command += ["--model.start", "random", "--optim.name", "adam", "--precision", "fp32", "--model.activation", "relu"]
        command += ["--train.steps", str(steps), "--train.save-every", "200", "--tracking.wandb", "offline", "--run-dir", f"{folder}/run", *more]
        launcher = [] if world == 1 else ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(world), "--num_machines", "1",
                                          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
        subprocess.run([sys.executable, *launcher, *command], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(2 // world)})
        return float(json.loads(Path(f"{folder}/run/result.json").read_text())["images_per_second"])


CONTESTANTS = {
    "ours, batch 128": "ours(128)",
    "bare loop, fused Adam, batch 128": "bare(128)",
    "Accelerate, prepared DataLoader, batch 128": "loader(128, 0, True)",
    "tutorial's DataLoader script, 2 workers, batch 128": "loader(128, 2, False)",
    "Lightning, batch 128": "lightning(128)",
    "ours, batch 1024": "ours(1024)",
    "bare loop, batch 1024": "bare(1024)",
    "ours, bf16, batch 1024": "ours(1024, '--precision', 'bf16')",
    "ours, 2 processes, batch 128": "ours(128, world=2)",
    "ours, 2 processes, batch 1024": "ours(1024, world=2)",
    "ours, 2 processes, batch 8192": "ours(8192, world=2)",
    "ours, batch 8192": "ours(8192)",
    "limit of matrix products, fp32": "limit(False)",
    "limit of matrix products, bf16": "limit(True)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(eval(arguments.run))
        return
    found: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for round_number in range(arguments.rounds):
        for name, call in CONTESTANTS.items():
            done = subprocess.run([sys.executable, __file__, "--run", call], capture_output=True, text=True)
            if done.returncode == 0:
                found[name].append(float(done.stdout.split()[-1]))
            elif round_number == 0:
                print(f"left out: {name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    rows = {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in found.items() if v}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine, "rounds": arguments.rounds, "images_per_second": rows, "raw": found}, indent=2)
    )
    print(f"{machine}; {arguments.rounds} rounds, images per second\n\n| what | median | min – max |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['median']:,.0f} | {row['min']:,.0f} – {row['max']:,.0f} |")


if __name__ == "__main__":
    main()
