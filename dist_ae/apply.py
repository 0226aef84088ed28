"""What a trained run is good for: load it, reconstruct, embed, sample, score, evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dist_ae import data as datasets
from dist_ae.checkpoint import EMA, WEIGHTS, Damaged, read_checkpoint
from dist_ae.config import Config, InputError, load_config
from dist_ae.data import Reader
from dist_ae.draws import Draws, keyed
from dist_ae.evaluate import EVALUATION_SEED, evaluate
from dist_ae.models import Autoencoder
from dist_ae.objectives import terms
from dist_ae.runtime import Runtime, check_device, launched_world

Images = Tensor | np.ndarray[Any, Any]


class TrainedModel:
    """A trained autoencoder. Images go in as uint8 or floats on [0, 1], [N, C, H, W]; results are float32 tensors on the CPU."""

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
        """How little the model expects each image, [N]: the negative ELBO in nats of a variational model (one ε keyed by the image's
        place in the call), else the squared error per pixel on [0, 1]."""

        def score(x: Tensor, rows: range) -> Tensor:
            if not self.config.model.variational:
                error: Tensor = (self.model(x, None).reconstruction - x).square().flatten(1).mean(1)
                return error
            epsilon = keyed("normal", (EVALUATION_SEED, "evaluation.epsilon", 0), rows, (self.config.model.latent_dim,), self.device)
            return terms(self.model(x, Draws(epsilon=epsilon)), x, self.config.objective, beta=1.0).loss

        return self._map(score, images, batch_size)

    def sample(self, num: int, seed: int = 0) -> Tensor:
        """New images [num, C, H, W] on [0, 1], decoded from z ~ N(0, I). The same seed gives the same images.

        Raises:
            InputError: the model is not variational, so its codes have no distribution to draw from.
        """
        if not self.config.model.variational:
            raise InputError("only a variational model can sample: train the vae preset, or --model.variational")
        code = keyed("normal", (seed, "sample", 0), range(num), (self.config.model.latent_dim,), self.device)
        return self.decode(code)

    @torch.no_grad()
    def decode(self, code: Tensor) -> Tensor:
        """Images [N, C, H, W] on [0, 1] of codes [N, latent_dim]."""
        images: Tensor = self.model.decode(code.to(self.device, torch.float32)).clamp(0, 1).cpu()
        return images

    @torch.no_grad()
    def _map(self, function: Callable[[Tensor, range], Tensor], images: Images, batch_size: int) -> Tensor:
        images = self._checked(images)
        parts = []
        for start in range(0, len(images), batch_size):
            rows = range(start, min(start + batch_size, len(images)))
            part = images[rows.start : rows.stop].to(self.device)
            part = part.float().div_(255) if part.dtype == torch.uint8 else part.float()
            parts.append(function(part, rows).float().cpu())
        return torch.cat(parts)

    def _checked(self, images: Images) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
        if images.shape[1:] != self.model.image_shape or not len(images):
            raise InputError(f"expected images of shape [N, {', '.join(map(str, self.model.image_shape))}], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise InputError(f"expected images as uint8 or floats on [0, 1], got {images.dtype}")
        if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).flatten(1).all(1).all()):
            # Noisy images may leave the range a little; what is far outside was not scaled.
            low, high = float(images.min()), float(images.max())
            if not (math.isfinite(low) and math.isfinite(high) and low >= -2 and high <= 3):
                raise InputError(f"expected floats on [0, 1] (noise may leave it a little), got values from {low} to {high}; divide by 255?")
        return images


def load(run_dir: Path | str, which: Literal["last", "best"] = "last", device: torch.device | str = "cpu") -> TrainedModel:
    """The trained model of a run directory, from its newest checkpoint or the best by validation.

    Raises:
        InputError: no such run, or no checkpoint in it that is whole.
    """
    run_dir = Path(run_dir)
    config = _run_config(run_dir)
    assert config.model.image_shape is not None
    model = Autoencoder(config, config.model.image_shape)
    model.to_empty(device="cpu").to(torch.float64 if config.precision == "fp64" else torch.float32)
    template = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    reasons = []
    folders = sorted((p for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)
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


def _run_config(run_dir: Path) -> Config:
    if not (run_dir / "config.json").is_file():
        raise InputError(f"{run_dir} is not a run directory: it has no config.json")
    return load_config(run_dir / "config.json")


def evaluate_run(
    run_dir: Path, split: Literal["val", "train"] = "val", which: Literal["last", "best"] = "last", noise_std: float | None = None,
    batch_size: int | None = None, data_root: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Exact metrics of a trained run on as many processes as the launcher started; each image counts once.

    Raises:
        InputError: no such run, or its data is not there.
    """
    config = _run_config(run_dir)
    changes = {"evaluation.noise_std": noise_std, "evaluation.batch_size": batch_size, "data.root": data_root}
    # The run's batch plan and precision are about training; every figure is of the float32 (or float64) model.
    precision = {"precision": "fp64" if config.precision == "fp64" else "fp32", "train.batch_size": launched_world()[1], "train.max_per_process": None}
    config = config.override({**{key: value for key, value in changes.items() if value is not None}, **precision})
    check_device(config)
    trained = load(run_dir, which)
    dataset = datasets.load(config.data)
    runtime = Runtime(config)
    try:
        model = runtime.accelerator.prepare_model(trained.model.to(runtime.device, runtime.dtype), evaluation_mode=True)
        reader = Reader(dataset.train if split == "train" else dataset.val, runtime.device, runtime.dtype)
        return {f"{split}.{name}": value for name, value in evaluate(model, reader, config, runtime).items()}
    finally:
        runtime.close()
