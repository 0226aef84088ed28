"""A trained model: load it, reconstruct, embed, sample, interpolate, score, export."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_ae.config import Config, InputError, load_config
from dist_ae.data.given import Given, floats, given
from dist_ae.draws import Draws, keyed
from dist_ae.evaluate import EVALUATION_SEED
from dist_ae.models import Autoencoder
from dist_ae.objectives import terms
from dist_ae.run.checkpoint import EMA, WEIGHTS, Damaged, read_checkpoint

Images = Any  # what `dist_ae.data.given.given` takes
Which = Literal["last", "best"]


class TrainedModel:
    """A trained autoencoder.

    Images go in as a path (a picture, a folder, an array file, a packed set), a PIL image, a list of paths or of PIL
    images, or an
    array or tensor of uint8 or of floats on [0, 1]: [N, C, H, W], [N, H, W, C], [N, H, W] for grey, or one image.
    Pictures get the
    model's size by the run's own data settings; arrays must have it. Results are float32 tensors on the CPU, a row an
    image.
    """

    def __init__(self, model: Autoencoder, config: Config, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.model = model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = torch.device(device)

    def reconstruct(self, images: Images, batch_size: int = 1000) -> Tensor:
        """Reconstructions from the mean code, [N, C, H, W] on [0, 1]: of noisy images, the denoised ones."""
        return self._map(lambda x, rows: self.model(x, None).reconstruction.clamp(0, 1), images, batch_size)

    def embed(self, images: Images, batch_size: int = 1000) -> Tensor:
        """Codes [N, latent_dim]; of a variational model, their means."""
        return self._map(lambda x, rows: self.model.encode(x)[0], images, batch_size)

    def score(self, images: Images, batch_size: int = 1000) -> Tensor:
        """How little the model expects each image, [N]: the negative ELBO in nats of a variational model (one ε keyed
        by the image's
        place in the call), else the squared error per pixel on [0, 1]."""

        def score(x: Tensor, rows: range) -> Tensor:
            if not self.config.model.variational:
                error: Tensor = (self.model(x, None).reconstruction - x).square().flatten(1).mean(1)
                return error
            epsilon = keyed(
                "normal", (EVALUATION_SEED, "evaluation.epsilon", 0), rows, (self.config.model.latent_dim,), self.device
            )
            return terms(self.model(x, Draws(epsilon=epsilon)), x, self.config.objective, beta=1.0).loss

        return self._map(score, images, batch_size)

    def sample(self, num: int, seed: int = 0) -> Tensor:
        """New images [num, C, H, W] on [0, 1], decoded from z ~ N(0, I). The same seed gives the same images.

        Raises:
            InputError: the model is not variational, so its codes have no distribution to draw from.
        """
        if not self.config.model.variational:
            raise InputError("only a variational model can sample: train the vae preset, or --model.variational")
        if num < 1:
            raise InputError(f"the number of samples must be at least 1, got {num}")
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"the seed must be a 64-bit integer, got {seed}")
        code = keyed("normal", (seed, "sample", 0), range(num), (self.config.model.latent_dim,), self.device)
        return self.decode(code)

    def interpolate(self, first: Images, second: Images, steps: int) -> Tensor:
        """Decoded codes on the straight line from each first image's code to its second's, [N, steps, C, H, W] on [0,
        1].

        The lines begin and end in the reconstructions of the two images.

        Raises:
            InputError: fewer than 2 steps, or other numbers of first and second images.
        """
        if steps < 2:
            raise InputError(f"a line has a beginning and an end: steps must be at least 2, got {steps}")
        first, second = self.given(first), self.given(second)
        if len(first.split) != len(second.split):
            raise InputError(
                f"expected as many first images as second ones, got {len(first.split)} and {len(second.split)}"
            )
        start, end = (self.embed(images)[:, None] for images in (first, second))  # [N, 1, latent_dim]
        codes = torch.lerp(start, end, torch.linspace(0, 1, steps)[:, None])  # [N, steps, latent_dim]
        return self.decode(codes.flatten(0, 1)).view(-1, steps, *self.model.image_shape)

    def given(self, images: Images) -> Given:
        """Images as the model takes them, and their names where they have some.

        Raises:
            InputError: images that are not there, not readable, or not of the model's shape.
        """
        channels, height, width = self.model.image_shape
        return given(images, self.config.data, (channels, height, width))

    def export(self) -> torch.export.ExportedProgram:
        """The deterministic model as one program for any number of images: floats [N, C, H, W] on [0, 1] →
        reconstruction, clamped to [0, 1], and
        (mean) code [N, latent_dim]."""
        example = torch.zeros(2, *self.model.image_shape, device=self.device)
        program = torch.export.export(
            _Deterministic(self.model), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        program.example_inputs = None  # torch.export.save would pickle them
        return program

    @torch.no_grad()
    def decode(self, code: Tensor) -> Tensor:
        """Images [N, C, H, W] on [0, 1] of codes [N, latent_dim]."""
        images: Tensor = self.model.decode(code.to(self.device, torch.float32)).clamp(0, 1).cpu()
        return images

    @torch.no_grad()
    def _map(self, function: Callable[[Tensor, range], Tensor], images: Images, batch_size: int) -> Tensor:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        found = self.given(images)
        parts = []
        for start in range(0, len(found.split), batch_size):
            rows = range(start, min(start + batch_size, len(found.split)))
            parts.append(function(floats(found, rows).to(self.device), rows).float().cpu())
        return torch.cat(parts)


class _Deterministic(nn.Module):
    """What is exported: torch.export takes a module, and the model's own forward gives more than its users need."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(images, None)
        return output.reconstruction.clamp(0, 1), output.mean


def load(run_dir: Path | str, which: Which = "last", device: torch.device | str = "cpu") -> TrainedModel:
    """The trained model of a run directory, from its newest checkpoint or the best by validation.

    Raises:
        InputError: no such run, or no checkpoint in it that is whole.
    """
    run_dir = Path(run_dir)
    if which not in typing.get_args(Which):
        raise InputError(f"which: expected 'last' or 'best', got {which!r}")
    config = run_config(run_dir)
    assert config.model.image_shape is not None
    model = Autoencoder(config, config.model.image_shape)
    model.to_empty(device="cpu").to(torch.float64 if config.precision == "fp64" else torch.float32)
    template = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    reasons = []
    folders = sorted(
        (p for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name), reverse=True
    )
    for folder in folders:
        try:
            checkpoint = read_checkpoint(folder)
            best = checkpoint.state.get("best")
            if which == "best" and isinstance(best, dict) and best.get("step") != checkpoint.step:
                checkpoint = read_checkpoint(run_dir / "checkpoints" / f"{int(best['step']):08d}")
            weights = checkpoint.files.get(EMA) or checkpoint.files[WEIGHTS]
            if {name: (tuple(t.shape), t.dtype) for name, t in weights.items()} != template:
                raise Damaged(f"{folder.name}: other weights than the configuration's")
        except Damaged as error:
            reasons.append(str(error))
            continue
        model.load_state_dict(weights)
        return TrainedModel(model, config, device)
    raise InputError(f"{run_dir} has no whole checkpoint{': ' + '; '.join(reasons) if reasons else ''}")


def run_config(run_dir: Path) -> Config:
    if not (run_dir / "config.json").is_file():
        raise InputError(f"{run_dir} is not a run directory: it has no config.json")
    return load_config(run_dir / "config.json")
