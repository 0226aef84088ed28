"""Training speed on Fashion-MNIST (D→512→256→128) beside what people would write, and what the trainer costs beside
training.

    python -m benchmarks.speed [--rounds 5] [--only WORD]        (make bench; Lightning and pythae: pip install -e
    ".[bench]")

Each contestant runs in a process of its own, in turn, several rounds; ratios are taken round by round. Medians, ranges
and ratios go to benchmarks/speed.json and into benchmarks/README.md. Rivals are written as their documentation says;
the upper marks are a bare loop over a uint8 tensor and the machine's own limit in matrix products, measured in the same
rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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
FLOPS_PER_IMAGE = (
    12 * sum(a * b for a, b in zip((784, *HIDDEN), (*HIDDEN, LATENT), strict=True)) - 2 * 784 * HIDDEN[0]
)  # no gradient for the images


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

    from dist_ae.config import DataConfig
    from dist_ae.data import sources

    images = torch.from_numpy(sources.load(DataConfig(name="fashion_mnist")).train.images).flatten(1)
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
    """The tutorial's script with its shapes fixed; with ``accelerate``, a prepared DataLoader over tensors that are
    decoded already.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset, TensorDataset
    from torchvision import transforms

    from dist_ae.config import DataConfig
    from dist_ae.data import sources

    images = torch.from_numpy(sources.load(DataConfig(name="fashion_mnist")).train.images)
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

    from dist_ae.config import DataConfig
    from dist_ae.data import sources

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

    images = torch.from_numpy(sources.load(DataConfig(name="fashion_mnist")).train.images).float().div(127.5).sub(1)
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


def pythae(batch: int) -> float:
    """pythae's own trainer and AE with its default MLP widened to the same layers; a whole epoch, since it has no
    steps.
    """
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import AE, AEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    from dist_ae.config import DataConfig
    from dist_ae.data import sources

    layers = net()
    middle = 2 * len(HIDDEN) + 1

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers[:middle]

        def forward(self, x: torch.Tensor) -> ModelOutput:
            return ModelOutput(embedding=self.layers(x.flatten(1)))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers[middle:]

        def forward(self, z: torch.Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).view(-1, 1, 28, 28))

    images = torch.from_numpy(sources.load(DataConfig(name="fashion_mnist")).train.images).float().div(255)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = BaseTrainerConfig(
            output_dir=folder, num_epochs=1, learning_rate=1e-3, per_device_train_batch_size=batch, no_cuda=True
        )
        model = AE(AEConfig(input_dim=(1, 28, 28), latent_dim=LATENT), encoder=Encoder(), decoder=Decoder())
        trainer = BaseTrainer(
            model=model, train_dataset=BaseDataset(images, torch.zeros(len(images))), training_config=settings
        )
        trainer.prepare_training()
        start = time.perf_counter()
        trainer.train_step(epoch=1)
        return len(images) / (time.perf_counter() - start)


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
    """`dist-ae train` with everything on: Accelerate, metrics, W&B offline, evaluation, checkpoints. The second half of
    a run: the
    rivals, too, are timed after their start."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 * max(STEPS * 128 // batch, 40)
        command = [
            "-m",
            "dist_ae",
            "train",
            "ae",
            "--data.name",
            "fashion_mnist",
            "--model.latent-dim",
            str(LATENT),
            "--train.batch-size",
            str(batch),
        ]
        command += [
            "--model.start",
            "random",
            "--optim.name",
            "adam",
            "--precision",
            "fp32",
            "--model.activation",
            "relu",
        ]
        command += [
            "--train.steps",
            str(steps),
            "--train.log-every",
            str(min(50, steps // 2)),
            "--train.save-every",
            "200",
            "--tracking.wandb",
            "offline",
            "--run-dir",
            f"{folder}/run",
            *more,
        ]
        launcher = (
            []
            if world == 1
            else [
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                str(world),
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
            ]
        )
        subprocess.run(
            [sys.executable, *launcher, *command],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": str(2 // world)},
        )
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
        # A line's rate is of all images since the start: so many seconds.
        times = {
            line["step"]: line["step"] * batch / line["images_per_second"] for line in lines if line["split"] == "train"
        }
        half = min(times, key=lambda step: abs(step - steps // 2))
        return (steps - half) * batch / (times[steps] - times[half])


# -- what training costs beside


def evaluation() -> float:
    """Seconds to evaluate the 10,000 validation images of the plain `ae`: clean and noisy, once more after a first
    time.
    """
    import dist_ae
    from dist_ae.data import sources
    from dist_ae.data.reader import Reader
    from dist_ae.evaluate import evaluate
    from dist_ae.models import Autoencoder, initialize
    from dist_ae.processes.runtime import Runtime

    config = dist_ae.PRESETS["ae-reference"]
    dataset, runtime = sources.load(config.data), Runtime(config)
    model, reader = initialize(Autoencoder(config, dataset.image_shape), 0), Reader(dataset.val, runtime.device)
    evaluate(model, reader, config, runtime)
    start = time.perf_counter()
    evaluate(model, reader, config, runtime)
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
        command = [
            "train",
            "ae",
            "--data.name",
            "fashion_mnist",
            "--model.latent-dim",
            "128",
            "--run-dir",
            f"{folder}/run",
        ]
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
            f"{folder}/run",
        ]
        above = peak(*command) - peak("-c", "import torch")
    weights = 4 * sum(a * b + b for a, b in itertools.pairwise((784, *HIDDEN, LATENT, *reversed(HIDDEN), 784)))
    return (above - 70_000 * 784 - 4 * weights) / 1e6


CONTESTANTS = {  # images per second
    "ours, batch 128": "ours(128)",
    "ours, batch 128, W&B off": "ours(128, '--tracking.wandb', 'off')",
    "bare loop, fused Adam, batch 128": "bare(128)",
    "Accelerate, prepared DataLoader, batch 128": "loader(128, 0, True)",
    "tutorial's DataLoader script, 2 workers, batch 128": "loader(128, 2, False)",
    "Lightning, batch 128": "lightning(128)",
    "pythae, batch 128": "pythae(128)",
    "ours, batch 1024": "ours(1024)",
    "bare loop, batch 1024": "bare(1024)",
    "ours, bf16, batch 1024": "ours(1024, '--precision', 'bf16')",
    "bare loop, bf16, batch 1024": "bare(1024, True)",
    "ours, batch 8192": "ours(8192)",
    "ours, 2 processes, batch 128": "ours(128, world=2)",
    "ours, 2 processes, batch 1024": "ours(1024, world=2)",
    "ours, 2 processes, bf16 gradients, batch 1024": "ours(1024, '--train.gradient-type', 'bf16', world=2)",
    "ours, 2 processes, batch 8192": "ours(8192, world=2)",
    "limit of matrix products, fp32": "limit(False)",
    "limit of matrix products, bf16": "limit(True)",
}
COSTS = {
    "evaluation of 10,000 images, s": ("evaluation()", "≤ 0.25"),
    "checkpoints every 200 steps, and metrics, % of the time": ("saving()", "≤ 2"),
    "command to first step on Fashion-MNIST, s": ("first_step()", "≤ 5"),
    "`dist-ae --help`, s": ("help_seconds()", "≤ 0.5"),
    "peak memory above torch, images and 4 × weights, MB": ("memory()", "≤ 100"),
}
RATIOS = (  # what, of which, target
    ("ours, batch 128", "bare loop, fused Adam, batch 128", 0.97),
    ("ours, batch 128", "tutorial's DataLoader script, 2 workers, batch 128", 4),
    ("ours, batch 128", "pythae, batch 128", 1.6),
    ("ours, batch 128", "Lightning, batch 128", 2),
    ("ours, batch 128", "Accelerate, prepared DataLoader, batch 128", 1.25),
    ("ours, batch 128", "ours, batch 128, W&B off", 0.95),
    ("ours, batch 128", "limit of matrix products, fp32", 0.60),
    ("ours, batch 1024", "limit of matrix products, fp32", 0.88),
    ("ours, batch 1024", "bare loop, batch 1024", None),
    ("ours, bf16, batch 1024", "ours, batch 1024", 1.5),
    ("ours, bf16, batch 1024", "bare loop, bf16, batch 1024", None),
    ("ours, 2 processes, batch 128", "ours, batch 128", 0.65),
    ("ours, 2 processes, batch 1024", "ours, batch 1024", 0.82),
    ("ours, 2 processes, batch 8192", "ours, batch 8192", 1.0),
    ("ours, 2 processes, bf16 gradients, batch 1024", "ours, batch 1024", 0.90),
)
HERE = Path(__file__).parent
BEGIN, END = "<!-- written by benchmarks/speed.py -->", "<!-- end -->"


def spread(values: list[float]) -> str:
    """Median and range, with as many digits as make sense."""
    form = "{:,.0f}" if min(values) >= 100 else "{:.2f}"
    return f"{form.format(statistics.median(values))} | {form.format(min(values))} – {form.format(max(values))}"


def tables(found: dict[str, list[float]], machine: str, rounds: int) -> str:
    """The Markdown of one measurement."""
    lines = [
        f"{machine}; {rounds} rounds; {time.strftime('%Y-%m-%d')}",
        "",
        "| ratio, round by round | median | range | target |",
        "|---|---|---|---|",
    ]
    for what, of, target in RATIOS:
        pairs = [a / b for a, b in zip(found.get(what, []), found.get(of, []), strict=False)]
        if pairs:
            lines.append(f"| {what} : {of} | {spread(pairs)} | {'' if target is None else f'≥ {target}'} |")
    lines += ["", "| beside training | median | range | target |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {spread(found[name])} | {target} |" for name, (_, target) in COSTS.items() if found.get(name)
    ]
    lines += ["", "| images per second in training | median | range |", "|---|---|---|"]
    lines += [f"| {name} | {spread(found[name])} |" for name in CONTESTANTS if found.get(name)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contestants whose name holds this; nothing is written then")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(eval(arguments.run))
        return
    calls = {**CONTESTANTS, **{name: call for name, (call, _) in COSTS.items()}}
    calls = {name: call for name, call in calls.items() if arguments.only in name}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(arguments.rounds):
        for name, call in calls.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.speed", "--run", call], capture_output=True, text=True
            )
            if done.returncode == 0:
                found[name].append(float(done.stdout.split()[-1]))
            elif round_number == 0:
                print(f"left out: {name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    machine = f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}"
    text = tables(found, machine, arguments.rounds)
    print(text)
    if not arguments.only:
        (HERE / "speed.json").write_text(
            json.dumps({"machine": machine, "rounds": arguments.rounds, "found": found}, indent=2) + "\n"
        )
        readme = (HERE / "README.md").read_text()
        before, _, rest = readme.partition(BEGIN)
        (HERE / "README.md").write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
