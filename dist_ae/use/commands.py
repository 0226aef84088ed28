"""The commands on a trained run: each writes one file, or prints figures."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dist_ae import pca
from dist_ae.config import InputError
from dist_ae.data import sources
from dist_ae.data.arrays import read_images
from dist_ae.data.reader import Reader
from dist_ae.data.records import Array
from dist_ae.evaluate import evaluate
from dist_ae.processes.environment import pinned_torch
from dist_ae.processes.runtime import Runtime, check_device
from dist_ae.use.trained import TrainedModel, Which, load, run_config

SHOWN = 12  # images in a picture of reconstructions, as in the run's own
TILES = 100  # rows or columns of a picture at most: beyond it images are too many to look at, and megabytes
SAMPLE_COLUMNS = 8


def evaluate_run(
    run_dir: Path, split: Literal["val", "train"] = "val", which: Which = "last", noise_std: float | None = None,
    batch_size: int | None = None, data_root: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Exact metrics of a trained run on as many processes as the launcher started; each image counts once.

    Raises:
        InputError: no such run, or its data is not there.
    """
    config = run_config(run_dir)
    changes = {"evaluation.noise_std": noise_std, "evaluation.batch_size": batch_size, "data.root": data_root}
    # The run's batch plan and precision are about training; every figure is of the float32 (or float64) model.
    precision = {"precision": "fp64" if config.precision == "fp64" else "fp32"}
    config = config.override({**{key: value for key, value in changes.items() if value is not None}, **precision})
    check_device(config)
    trained = load(run_dir, which)
    dataset = sources.load(config.data)
    with pinned_torch(config.precision):
        runtime = Runtime(config)
        try:
            raw = trained.model.to(runtime.device, runtime.dtype)
            model = runtime.accelerator.prepare_model(raw, evaluation_mode=True)
            train, val = (Reader(part, runtime.device, runtime.dtype) for part in (dataset.train, dataset.val))
            reader = train if split == "train" else val
            metrics = evaluate(model, reader, config, runtime)
            if (components := pca.of_model(raw, train, runtime)) is not None:
                metrics["pca_mse"] = pca.baseline(raw, components, reader, runtime)
            return {f"{split}.{name}": value for name, value in metrics.items()}
        finally:
            runtime.close()


# -- what is written to files
# Each loads a run, applies its model to the user's images or else to the run's validation images, writes one file and returns its path.
# All raise InputError: no such run; images that are not there, not readable or not the model's; a file that cannot be written.


def reconstruct_run(
    run_dir: Path,
    images: Path | None = None,
    out: Path | None = None,
    which: Which = "last",
    data_root: Path | None = None,
) -> Path:
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
        raise InputError(
            f"a picture holds at most {TILES * SAMPLE_COLUMNS} samples, not {num}; --out {out.with_suffix('.npy')} takes any number"
        )
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
        raise InputError(
            f"{where}: number of images {len(given)}, which make {len(given) // 2} pairs, but --pairs asks for {pairs}; {way_out}"
        )
    if out.suffix == ".png" and max(pairs, steps) > TILES:
        raise InputError(
            f"a picture holds at most {TILES} pairs of {TILES} steps, not {pairs} of {steps}; --out {out.with_suffix('.npy')} takes any number"
        )
    return _write_images(out, trained.interpolate(given[: 2 * pairs : 2], given[1 : 2 * pairs : 2], steps), steps)


def embed_run(
    run_dir: Path,
    images: Path | None = None,
    out: Path | None = None,
    which: Which = "last",
    data_root: Path | None = None,
) -> Path:
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
        given, where = read_images(images), str(images)
    else:
        config = trained.config if data_root is None else trained.config.override({"data.root": data_root})
        validation = sources.load(config.data).val
        given = validation.images if validation.rows is None else validation.images[validation.rows]
        where = f"validation images of {config.data.name}"
    if given.shape[1:] != trained.model.image_shape:
        raise InputError(
            f"{where}: the run's model takes images of shape [N, {', '.join(map(str, trained.model.image_shape))}], got {list(given.shape)}"
        )
    return given


def _floats(images: Array) -> Tensor:
    return torch.tensor(images).float().div(255 if images.dtype == np.uint8 else 1)


def _destination(
    run_dir: Path, out: Path | None, name: str, suffixes: tuple[str, ...], images: Path | None = None
) -> Path:
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
        raise InputError(
            f"{out} cannot be written ({error.strerror or error}); choose another place with --out"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return out
