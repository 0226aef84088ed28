"""What a trained run is good for: load it, reconstruct, embed, sample, interpolate, score, export, evaluate."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dist_ae import data as datasets
from dist_ae.checkpoint import EMA, WEIGHTS, Damaged, read_checkpoint
from dist_ae.config import Config, InputError, load_config
from dist_ae.data import NOISY_RANGE, Array, Reader
from dist_ae.draws import Draws, keyed
from dist_ae.evaluate import EVALUATION_SEED, evaluate
from dist_ae.models import Autoencoder
from dist_ae.objectives import terms
from dist_ae.runtime import Runtime, check_device, launched_world

Images = Tensor | np.ndarray[Any, Any]
Which = Literal["last", "best"]

SHOWN = 12  # images in a picture of reconstructions, as in the run's own
TILES = 100  # rows or columns of a picture at most: beyond it images are too many to look at, and megabytes
SAMPLE_COLUMNS = 8


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
        if num < 1:
            raise InputError(f"the number of samples must be at least 1, got {num}")
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"the seed must be a 64-bit integer, got {seed}")
        code = keyed("normal", (seed, "sample", 0), range(num), (self.config.model.latent_dim,), self.device)
        return self.decode(code)

    def interpolate(self, first: Images, second: Images, steps: int) -> Tensor:
        """Decoded codes on the straight line from each first image's code to its second's, [N, steps, C, H, W] on [0, 1].

        The lines begin and end in the reconstructions of the two images.

        Raises:
            InputError: fewer than 2 steps, or other numbers of first and second images.
        """
        if steps < 2:
            raise InputError(f"a line has a beginning and an end: steps must be at least 2, got {steps}")
        if len(first) != len(second):
            raise InputError(f"expected as many first images as second ones, got {len(first)} and {len(second)}")
        start, end = (self.embed(images)[:, None] for images in (first, second))  # [N, 1, latent_dim]
        codes = torch.lerp(start, end, torch.linspace(0, 1, steps)[:, None])  # [N, steps, latent_dim]
        return self.decode(codes.flatten(0, 1)).view(-1, steps, *self.model.image_shape)

    def export(self) -> torch.export.ExportedProgram:
        """The deterministic model as one program for any number of images: floats [N, C, H, W] on [0, 1] → reconstruction, clamped to [0, 1], and
        (mean) code [N, latent_dim]."""
        example = torch.zeros(2, *self.model.image_shape, device=self.device)
        program = torch.export.export(_Deterministic(self.model), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        program.example_inputs = None  # torch.export.save would pickle them
        return program

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
        # A copy of what cannot be written to, as a memory-mapped file: torch has no read-only tensors, and warns.
        images = torch.from_numpy(np.require(images, requirements=["C", "W"])) if isinstance(images, np.ndarray) else images
        if images.shape[1:] != self.model.image_shape or not len(images):
            raise InputError(f"expected images of shape [N, {', '.join(map(str, self.model.image_shape))}], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise InputError(f"expected images as uint8 or floats on [0, 1], got {images.dtype}")
        if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).flatten(1).all(1).all()):
            # Noisy images may leave the range a little; what is far outside was not scaled.
            low, high = float(images.min()), float(images.max())
            if not (math.isfinite(low) and math.isfinite(high) and low >= NOISY_RANGE[0] and high <= NOISY_RANGE[1]):
                raise InputError(f"expected floats on [0, 1] (noise may leave it a little), got values from {low} to {high}; divide by 255?")
        return images


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
    run_dir: Path, split: Literal["val", "train"] = "val", which: Which = "last", noise_std: float | None = None,
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


# ----------------------------------------------------------------------------------------------- what is written to files
# Each loads a run, applies its model to the user's images or else to the run's validation images, writes one file and returns its path.
# All raise InputError: no such run; images that are not there, not readable or not the model's; a file that cannot be written.


def reconstruct_run(run_dir: Path, images: Path | None = None, out: Path | None = None, which: Which = "last", data_root: Path | None = None) -> Path:
    """Writes reconstructions: .npy, float32 [N, C, H, W] on [0, 1], or .png, the first 12 originals over their reconstructions."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "reconstructions.npy", (".npy", ".png"), images)
    given = _given(trained, images, data_root)
    if out.suffix == ".npy":
        return _write_array(out, trained.reconstruct(given))
    shown = _floats(given[:SHOWN])

    def draw(path: Path) -> None:
        from dist_ae.figures import image_rows  # matplotlib takes a second to import

        image_rows({"original": shown, "reconstruction": trained.reconstruct(shown)}, path)

    return _write(out, draw)


def sample_run(run_dir: Path, num: int = 64, seed: int = 0, out: Path | None = None, which: Which = "last") -> Path:
    """Writes ``num`` new images of a variational run: .png, eight in a row, or .npy, float32 [num, C, H, W] on [0, 1]."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "samples.png", (".png", ".npy"))
    if out.suffix == ".png" and num > TILES * SAMPLE_COLUMNS:
        raise InputError(f"a picture holds at most {TILES * SAMPLE_COLUMNS} samples, not {num}; --out {out.with_suffix('.npy')} takes any number")
    return _write_images(out, trained.sample(num, seed), SAMPLE_COLUMNS)


def interpolate_run(
    run_dir: Path, pairs: int = 8, steps: int = 10, images: Path | None = None, out: Path | None = None, which: Which = "last", data_root: Path | None = None
) -> Path:  # fmt: skip
    """Writes the lines between images 0 and 1, 2 and 3, …: .png, a row a pair, or .npy, float32 [pairs, steps, C, H, W] on [0, 1]."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "interpolation.png", (".png", ".npy"), images)
    given = _given(trained, images, data_root)
    if not 1 <= pairs <= len(given) // 2:
        where = images or "the run's validation images"
        way_out = f"ask for 1 to {len(given) // 2}" if len(given) > 1 else "at least two images are needed"
        raise InputError(f"{where}: number of images {len(given)}, which make {len(given) // 2} pairs, but --pairs asks for {pairs}; {way_out}")
    if out.suffix == ".png" and max(pairs, steps) > TILES:
        raise InputError(f"a picture holds at most {TILES} pairs of {TILES} steps, not {pairs} of {steps}; --out {out.with_suffix('.npy')} takes any number")
    return _write_images(out, trained.interpolate(given[: 2 * pairs : 2], given[1 : 2 * pairs : 2], steps), steps)


def embed_run(run_dir: Path, images: Path | None = None, out: Path | None = None, which: Which = "last", data_root: Path | None = None) -> Path:
    """Writes codes: .npy, float32 [N, latent_dim]; of a variational model, their means."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "codes.npy", (".npy",), images)
    return _write_array(out, trained.embed(_given(trained, images, data_root)))


def score_run(
    run_dir: Path, images: Path | None = None, out: Path | None = None, which: Which = "last", data_root: Path | None = None
) -> tuple[Path, Tensor, Literal["neg_elbo", "mse"]]:  # fmt: skip
    """Writes scores, high where the model expects an image little: .npy, float32 [N]. Returns them too, and which figure they are."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "scores.npy", (".npy",), images)
    scores = trained.score(_given(trained, images, data_root))
    return _write_array(out, scores), scores, "neg_elbo" if trained.config.model.variational else "mse"


def export_run(run_dir: Path, out: Path | None = None, which: Which = "last") -> Path:
    """Writes the deterministic model (see ``TrainedModel.export``) for ``torch.export.load``: a .pt2 that needs torch and nothing of this package."""
    trained = load(run_dir, which)
    out = _destination(run_dir, out, "model.pt2", (".pt2",))
    program = io.BytesIO()
    torch.export.save(trained.export(), program)
    return _write(out, lambda path: path.write_bytes(program.getbuffer()))


def _given(trained: TrainedModel, images: Path | None, data_root: Path | None) -> Array:
    """The user's images, or else the run's validation images, as [N, C, H, W] of the model's shape."""
    if images is not None:
        given, where = datasets.read_images(images), str(images)
    else:
        config = trained.config if data_root is None else trained.config.override({"data.root": data_root})
        validation = datasets.load(config.data).val
        given = validation.images if validation.rows is None else validation.images[validation.rows]
        where = f"validation images of {config.data.name}"
    if given.shape[1:] != trained.model.image_shape:
        raise InputError(f"{where}: the run's model takes images of shape [N, {', '.join(map(str, trained.model.image_shape))}], got {list(given.shape)}")
    return given


def _floats(images: Array) -> Tensor:
    return torch.tensor(images).float().div(255 if images.dtype == np.uint8 else 1)


def _destination(run_dir: Path, out: Path | None, name: str, suffixes: tuple[str, ...], images: Path | None = None) -> Path:
    """Where to write: ``out``, else ``name`` in the run. Found wrong before anything is computed."""
    if out is None:
        return run_dir / name
    out = out.expanduser()
    if out.suffix not in suffixes:
        raise InputError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    if not os.path.isdir(out.parent):
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if os.path.isdir(out):
        raise InputError(f"--out {out} is a folder: name a file in it")
    if images is not None and out.resolve() == images.expanduser().resolve():
        raise InputError(f"--out {out} would replace the images it is made of: give it another name")
    return out


def _write_images(out: Path, images: Tensor, columns: int) -> Path:
    """Images [..., C, H, W] as they are to .npy, or as a grid to .png."""
    if out.suffix == ".npy":
        return _write_array(out, images)

    def draw(path: Path) -> None:
        from dist_ae.figures import image_grid

        image_grid(images.reshape(-1, *images.shape[-3:]), path, columns)

    return _write(out, draw)


def _write_array(out: Path, values: Tensor) -> Path:
    return _write(out, lambda path: np.save(path, values.numpy(), allow_pickle=False))


def _write(out: Path, write: Callable[[Path], object]) -> Path:
    """Writes under another name beside ``out`` and renames, so that a reader, or a fault, never meets half a file."""
    temporary = out.with_name(f".{os.getpid()}-{out.name}")
    try:
        write(temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror or error}); choose another place with --out") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return out
