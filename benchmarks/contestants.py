"""Training loops that never end, each timed from outside (benchmarks/speed.py): ours, and what people would write.

    python benchmarks/contestants.py METER CALL        CALL such as bare(128) or ours(128, "--precision", "bf16")

Each writes the time of every step into METER, a file that speed.py maps. Rivals are written as their documentation
says. The network is D → 512 → 256 → 128 and back, on Fashion-MNIST.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, LATENT = (512, 256), 128
SLOTS = 1 << 20  # steps that a meter remembers
FLOPS_PER_IMAGE = (
    12 * sum(a * b for a, b in zip((784, *HIDDEN), (*HIDDEN, LATENT), strict=True)) - 2 * 784 * HIDDEN[0]
)  # no gradient for the images


class Meter:
    """A ring of times in a file: [0] counts the steps, [1] holds the images of one, the rest the steps' ends."""

    def __init__(self, path: str) -> None:
        self.times = np.memmap(path, np.float64, "r+", shape=(SLOTS + 2,))

    def tick(self, images: float) -> None:
        count = int(self.times[0])
        self.times[2 + count % SLOTS] = time.perf_counter()
        self.times[1], self.times[0] = images, count + 1


def net():  # type: ignore[no-untyped-def]
    from torch import nn

    sizes = (784, *HIDDEN, LATENT, *reversed(HIDDEN), 784)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([] if i in (len(HIDDEN), len(sizes) - 2) else [nn.ReLU()])
    return nn.Sequential(*layers)


def pictures():  # type: ignore[no-untyped-def]
    """Fashion-MNIST's training images, uint8 [60000, 1, 28, 28]."""
    import torch

    from dist_ae.config import DataConfig
    from dist_ae.data import sources

    return torch.from_numpy(sources.load(DataConfig(name="fashion_mnist")).train.images)


def bare(batch: int, bf16: bool = False) -> None:
    """What a careful person writes by hand for one machine."""
    import torch

    images = pictures().flatten(1)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    while True:
        order = torch.randperm(len(images))
        for at in range(0, len(images) - batch, batch):
            x = images[order[at : at + batch]].float().div_(127.5).sub_(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = model(x)
            loss = (y.float() - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            METER.tick(batch)


def loader(batch: int, workers: int, accelerate: bool) -> None:
    """The tutorial's script with its shapes fixed; with ``accelerate``, a prepared DataLoader over tensors that are
    decoded already."""
    import torch
    from torch.utils.data import DataLoader, Dataset, TensorDataset
    from torchvision import transforms

    images = pictures()
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
    while True:
        for item in batches:
            x = (item[0] if accelerate else item).flatten(1)
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            loss.item()
            METER.tick(len(x))


def lightning(batch: int) -> None:
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, item: list[torch.Tensor], index: int) -> torch.Tensor:
            x = item[0].flatten(1)
            return (self.net(x) - x).square().mean()

        def on_train_batch_end(self, *arguments: object) -> None:
            METER.tick(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    images = pictures().float().div(127.5).sub(1)
    settings = {"max_epochs": -1, "accelerator": "cpu"}
    settings |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    batches = DataLoader(TensorDataset(images), batch_size=batch, shuffle=True)
    L.Trainer(**settings).fit(Module(), batches)  # type: ignore[arg-type]


def pythae(batch: int) -> None:
    """pythae's own trainer, and its AE with the default MLP widened to the same layers."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import AE, AEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

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

    class Metered(BaseTrainer):
        def _optimizers_step(self, model_output: ModelOutput) -> None:
            super()._optimizers_step(model_output)
            METER.tick(batch)

    images = pictures().float().div(255)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = BaseTrainerConfig(
            output_dir=folder, num_epochs=10**6, learning_rate=1e-3, per_device_train_batch_size=batch, no_cuda=True
        )
        model = AE(AEConfig(input_dim=(1, 28, 28), latent_dim=LATENT), encoder=Encoder(), decoder=Decoder())
        trainer = Metered(
            model=model, train_dataset=BaseDataset(images, torch.zeros(len(images))), training_config=settings
        )
        trainer.prepare_training()
        while True:
            trainer.train_step(epoch=1)


def limit(bf16: bool) -> None:
    """Images per second if a step were nothing but large matrix products."""
    import torch

    a = torch.randn(1024, 1024, dtype=torch.bfloat16 if bf16 else torch.float32)
    while True:
        a @ a
        METER.tick(2 * 1024**3 / FLOPS_PER_IMAGE)


def conv():  # type: ignore[no-untyped-def]
    """The network of the preset `conv-fast`."""
    import dist_ae
    from dist_ae.models import build

    return build(dist_ae.PRESETS["conv-fast"], (1, 28, 28))


def lower():  # type: ignore[no-untyped-def]
    """bf16 where this machine multiplies it natively, else fp32, as `precision auto` has it."""
    import torch

    from dist_ae.devices import multiplies_bf16

    return torch.bfloat16 if multiplies_bf16(torch.device("cpu")) else torch.float32


def bare_conv(batch: int) -> None:
    """The same network in the loop of ``bare``, in bf16 where the machine has it."""
    import torch

    images = pictures()
    model = conv()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    while True:
        order = torch.randperm(len(images))
        for at in range(0, len(images) - batch, batch):
            x = images[order[at : at + batch]].float().div_(255)
            with torch.autocast("cpu", torch.bfloat16, enabled=lower() == torch.bfloat16):
                y = model(x).raw
            loss = (y.float() - x.mul(2).sub_(1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            METER.tick(batch)


def conv_limit(batch: int) -> None:
    """That network's own convolutions and their gradients, as ``bare_conv`` computes them, and nothing else."""
    import torch
    from torch.nn import functional as F

    from dist_ae.models.conv import Convolution

    model, calls = conv(), []

    def note(layer: Convolution, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        calls.append((layer, inputs[0].requires_grad, inputs[0].shape, output.shape))

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, Convolution)]
    model(torch.zeros(batch, 1, 28, 28))
    for hook in hooks:
        hook.remove()

    def filled(shape: torch.Size, gradient: bool = False) -> torch.Tensor:
        made = torch.randn(shape, dtype=lower()).contiguous(memory_format=torch.channels_last)
        return made.requires_grad_(gradient)

    work = [
        (layer, filled(taken, gradient), filled(torch.Size(layer.kernel), True), filled(given))
        for layer, gradient, taken, given in calls
    ]
    while True:
        for layer, x, kernel, upstream in work:
            y = F.conv2d(x, kernel, None, layer.stride, layer.padding)
            torch.autograd.grad(y, [kernel, x] if x.requires_grad else [kernel], upstream)
        METER.tick(batch)


def ours(batch: int, *more: str, preset: str = "ae") -> None:
    """`dist-ae train` with Accelerate, metrics every 50 steps and W&B offline; evaluation and checkpoints, whose time
    is no training's, are timed apart."""
    from dist_ae import __main__, step
    from dist_ae.terminal import rank

    real = step.Learner.step

    def metered(self: object, number: int) -> None:
        real(self, number)  # type: ignore[arg-type]
        if rank() == 0:
            METER.tick(batch)

    step.Learner.step = metered  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.name": "fashion_mnist", "model.latent-dim": LATENT, "train.batch-size": batch, "train.steps": 10**8,
            "train.eval-every": 10**7, "train.log-every": 50, "train.timeout": 3600, "tracking.wandb": "offline",
            "optim.name": "adam", "optim.betas": "0.9 0.999", "optim.schedule": "constant", "model.start": "random",
            "model.activation": "relu",
            "precision": "fp32", "run-dir": Path(folder) / "run",
        }  # fmt: skip
        given = [part for key, value in settings.items() for part in (f"--{key}", *str(value).split())]
        sys.argv[1:] = ["train", preset, *given, *more]
        __main__.main()


def ours_conv(batch: int, *more: str) -> None:
    """The same with that network, in bf16 where the machine has it; its widths are the preset's."""
    back = ("--model.latent-dim", "3", "--model.activation", "gelu", "--precision", "auto")
    ours(batch, *back, *more, preset="conv-fast")


METER: Meter

if __name__ == "__main__":
    METER = Meter(sys.argv[1])
    eval(sys.argv[2])
