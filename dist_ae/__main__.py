"""The command line: tyro over the library's functions. Nothing here imports torch before it has something to do."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from dist_ae.config import Config, InputError, load_config
from dist_ae.presets import DESCRIPTIONS, PRESETS
from dist_ae.terminal import EXIT_STOPPED, prepare_streams, rank, say, silence

EXIT_INTERRUPTED = 130  # by Ctrl-C, as a shell says it

PICTURES = "pictures (a file, a folder, tar:PATTERN or hf:NAME), a .npy or .npz, or packed:PATH; left out, the run's "
TRUTH = (
    "Where they lie in normal/ and anomalous/, or in MVTec's folders, "
    "AUROC, average precision and the ROC are found, too, beside PCA's."
)
RunDir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="the run.")]
Images = Annotated[str | None, tyro.conf.arg(help=f"{PICTURES}validation images.")]
Which = Annotated[
    Literal["best", "last"],
    tyro.conf.arg(help="the best weights by validation, or those of the newest checkpoint."),
]
Root = Annotated[
    Path | None,
    tyro.conf.arg(
        name="data.root",  # as `train` spells it
        help="where the run's data lies here, if elsewhere than where it was trained.",
    ),
]


def _config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file of ``--config FILE`` or ``--config=FILE``, wherever it stands, and the other arguments.

    Raises:
        InputError: no file follows, or a preset stands beside it.
    """
    at = next((i for i, word in enumerate(arguments) if word == "--config" or word.startswith("--config=")), None)
    if at is None:
        return None, arguments
    _, given, file = arguments[at].partition("=")
    file = file if given else "".join(arguments[at + 1 : at + 2])
    rest = arguments[:at] + arguments[at + (1 if given else 2) :]
    if not file:
        raise InputError("--config: expected a file, such as a run's config.json")
    if rest[:1] and rest[0] in PRESETS:
        raise InputError(f"--config {file} holds a whole experiment; leave out the preset {rest[0]}")
    return file, rest


def train(arguments: list[str]) -> None:
    """Trains a preset (ae, denoising, dropout, vae, conv, …), or --config FILE; the same command again resumes."""
    file, rest = _config_file(arguments)
    if file is not None:
        config = tyro.cli(Config, default=load_config(Path(file)), args=rest, prog=f"dist-ae train --config {file}")
    else:
        presets = {name: (DESCRIPTIONS[name], preset) for name, preset in PRESETS.items()}
        text = (
            "Trains a preset, with the settings given. --config FILE takes a run's config.json or a sweep's best.json."
        )
        config = tyro.extras.overridable_config_cli(presets, args=rest, prog="dist-ae train", description=text)

    if rank() == 0:
        say(f"{config.name} on {config.data.name}: loading …")
    from dist_ae.processes.stop import Signals
    from dist_ae.trainer import train

    Signals.ends_process = True
    result = train(config)
    if rank() == 0:
        speed = round(result.images_per_second)
        figures = {**result.metrics, "steps": result.steps, "processes": result.world_size, "images/s": speed}
        show(figures, result.run_dir)


def sweep(arguments: list[str]) -> None:
    """Trains many configurations of a preset, ranks them, and writes report.html, best.json and trials.csv."""
    # Sweeps are a package of their own, on which this one does not depend: dist_ae_tune where it is installed, tune in
    # a bare checkout. The one that belongs to this dist_ae is taken, since PyPI has another tune.
    for name in ("dist_ae_tune", "tune"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).parents[1] == Path(__file__).parents[1]:
            importlib.import_module(f"{name}.__main__").main(arguments, prog="dist-ae sweep")
            return
    raise InputError('dist-ae sweep: the sweeps are not installed; pip install "dist-ae[tune]"')


def evaluate(
    run_dir: RunDir,
    split: Literal["val", "train"] = "val",
    which: Which = "best",
    noise_std: float | None = None,
    batch_size: int | None = None,
    data_root: Root = None,
    out: Path | None = None,
    subset: int = 200,
    samples: int = 50,
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5),
    features: Path | None = None,
) -> None:
    """Says how good a trained run is, beside PCA and classical filters: a table, JSON and one picture.

    It runs on any number of processes.

    Args:
        split: the images to evaluate on.
        noise_std: noise of the fixed noisy copy; left out, the run's own setting.
        batch_size: images at once over all processes; changes no figure.
        out: .json, with the picture beside it; left out, RUN_DIR/evaluation.json.
        subset: evenly spaced images for what is slow: denoising, and a variational run's importance-weighted bound.
        samples: draws K of that bound.
        noise_levels: noise, on [0, 1] pixels, at which the model denoises beside a median filter and non-local means.
        features: a TorchScript file of a feature network (uint8 RGB in, features out), for FID and KID. It is a
            program: use one that you trust.
    """
    from dist_ae.use.evaluation import evaluate_run

    found = evaluate_run(
        run_dir, split, which, noise_std, batch_size, data_root,
        out=out, subset=subset, samples=samples, noise_levels=noise_levels, features=features,
    )  # fmt: skip
    if rank() != 0:
        return
    show(dict(found.metrics))
    methods = list(next(iter(found.denoising.values()), {}))
    if methods:
        say("denoising, dB".ljust(16) + "".join(name.rjust(18) for name in methods))
    for level, values in found.denoising.items():
        say(f"  noise {level:g}".ljust(16) + "".join(f"{values[name]:.2f}".rjust(18) for name in methods))
    if found.columns:
        worst = sorted(found.columns, key=lambda name: found.columns[name]["r2"])[:10]
        say("columns with the lowest r2".ljust(34) + "model".rjust(10) + "PCA".rjust(10))
        for name in worst:
            say(
                f"  {name[:30]}".ljust(34) + "".join(f"{value:.4f}".rjust(10) for value in found.columns[name].values())
            )
    for remark in found.remarks:
        say(remark)
    for path in found.written:
        _written(path)


def reconstruct(
    run_dir: RunDir, images: Images = None, out: Path | None = None, which: Which = "best", data_root: Root = None
) -> None:
    """Writes what the model makes of images; noisy images come out denoised.

    Args:
        out: .npy, float32 [N, C, H, W] on [0, 1]; .png, the first 12 originals over their reconstructions; or a folder,
            a .png for each image; left out, RUN_DIR/reconstructions.npy.
    """
    from dist_ae.use import commands

    _written(commands.reconstruct_run(run_dir, images, out, which, data_root))


def denoise(
    run_dir: RunDir,
    images: Annotated[str | None, tyro.conf.arg(help=f"noisy {PICTURES}validation images with noise added.")] = None,
    out: Path | None = None,
    noise_std: float | None = None,
    which: Which = "best",
    data_root: Root = None,
) -> None:
    """Writes noisy images without their noise: what `reconstruct` makes of them.

    Args:
        out: .npy, float32 [N, C, H, W] on [0, 1]; .png, the first 12 over what becomes of them; or a folder, a .png for
            each image; left out, RUN_DIR/denoised.npy.
        noise_std: add noise of this standard deviation on [0, 1] first; left out, none to images, and to validation
            images the run's evaluation.noise_std.
    """
    from dist_ae.use import commands

    _written(commands.denoise_run(run_dir, images, out, which, data_root, noise_std))


def sample(run_dir: RunDir, num: int = 64, seed: int = 0, out: Path | None = None, which: Which = "best") -> None:
    """Writes new images from a variational run, decoded from z ~ N(0, I).

    Args:
        num: how many.
        seed: the same seed gives the same images.
        out: .png, or .npy, float32 [num, C, H, W] on [0, 1]; left out, RUN_DIR/samples.png.
    """
    from dist_ae.use import commands

    _written(commands.sample_run(run_dir, num, seed, out, which))


def interpolate(
    run_dir: RunDir,
    pairs: int = 8,
    steps: int = 10,
    images: Images = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Root = None,
) -> None:
    """Writes what lies between images: straight lines between the codes of images 0 and 1, 2 and 3, …, decoded.

    Args:
        pairs: how many pairs of images.
        steps: images from one reconstruction to the other, both included.
        out: .png, a row for each pair, or .npy, float32 [pairs, steps, C, H, W] on [0, 1]; left out,
            RUN_DIR/interpolation.png.
    """
    from dist_ae.use import commands

    _written(commands.interpolate_run(run_dir, pairs, steps, images, out, which, data_root))


def embed(
    run_dir: RunDir, images: Images = None, out: Path | None = None, which: Which = "best", data_root: Root = None
) -> None:
    """Writes the codes of images; of a variational run, their means.

    Args:
        out: .npy, float32 [N, *code shape]; or .csv or .parquet, with the path and label of each image, and x and y,
            the first two principal components of the codes; left out, RUN_DIR/codes.npy.
    """
    from dist_ae.use import commands

    _written(commands.embed_run(run_dir, images, out, which, data_root))


def score(
    run_dir: RunDir,
    images: Annotated[str | None, tyro.conf.arg(help=f"{PICTURES}validation images. {TRUTH}")] = None,
    out: Path | None = None,
    which: Which = "best",
    data_root: Root = None,
    score: Literal["error", "neg_elbo", "mahalanobis"] | None = None,
    quantile: float = 0.99,
    threshold: float | None = None,
    maps: Path | None = None,
    map: Literal["error", "ssim"] = "error",
) -> None:
    """Writes how little the model expects each image, and flags what it expects less than its validation images.

    Args:
        out: .csv or .parquet with path, score and flagged; .npy, float32 [N]; left out, RUN_DIR/scores.csv.
        score: error: squared error per pixel; neg_elbo: nats, of a variational run; mahalanobis: distance of the code
            from those of training images; left out, neg_elbo of a variational run, else error.
        quantile: flag above this quantile of the validation images' scores.
        threshold: flag above this score instead.
        maps: a folder for heat maps, a .png for each image, all on one scale.
        map: what they show: the squared error, smoothed, or 1 - SSIM.
    """
    import numpy as np

    from dist_ae.use.anomalies import score_run

    found = score_run(
        run_dir, images, out, which, data_root,
        score=score, quantile=quantile, threshold=threshold, maps=maps, map_of=map,
    )  # fmt: skip
    values = found.scores
    spread = {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}
    show({**{f"{name}.{found.score}": value for name, value in spread.items()}, **found.figures})
    flagged = int(found.flagged.sum())
    say(f"flagged {flagged:,} of {len(values):,}: {found.score} above {found.threshold:.6g}, {found.basis}")
    highest = values.argsort(descending=True, stable=True)[:10].tolist()
    if found.names is None:
        say(f"highest at images {', '.join(str(image) for image in highest)} (counted from 0)")
    else:
        say("highest at\n  " + "\n  ".join(found.names[image] for image in highest))
    for remark in found.remarks:
        say(remark)
    for picture in found.pictures:
        say(f"picture{'s' if picture.is_dir() else ''}: {picture}")
    _written(found.path)


def export(
    run_dir: RunDir,
    out: Path | None = None,
    which: Which = "best",
    format: Literal["torch", "onnx", "safetensors"] = "torch",
    part: Literal["whole", "encoder", "decoder"] = "whole",
    license: str = "other",
    push_to_hub: str | None = None,
) -> None:
    """Writes the deterministic model for other programs: images on [0, 1] to reconstruction and code.

    Args:
        out: where to write; left out, model.pt2, model.onnx or the folder export/ in RUN_DIR.
        format: torch, a .pt2 that needs torch and nothing else; onnx, compared with torch by onnxruntime first;
            safetensors, a folder with a model card that dist_ae.load takes.
        part: the whole model, or one half of it.
        license: licence in the model card, by the Hugging Face Hub's identifiers.
        push_to_hub: OWNER/NAME to upload the safetensors folder to; dist_ae.load("hf:OWNER/NAME") brings it back.
    """
    from dist_ae.saved import run_config
    from dist_ae.use import commands

    path, address = commands.export_run(run_dir, out, which, format, part, license, push_to_hub)
    _written(path)
    shape = run_config(run_dir).model.record_shape
    given, entry = ("images", "pictures") if shape is None else ("records", "records")
    results = {"whole": "reconstruction, code", "encoder": "code", "decoder": given}[part]
    own = "[N, C, H, W] on [0, 1]" if shape is None else f"[N, {', '.join(map(str, shape))}] in their own units"
    what = "float32 codes" if part == "decoder" else f"float32 {own}"
    given, entry = ("code", "code") if part == "decoder" else (given, entry)
    name = str(path)
    how = {
        "torch": f"{results} = torch.export.load({name!r}).module()({given})  # {what}, any N",
        "onnx": f"onnxruntime.InferenceSession({name!r}).run(None, {{{entry!r}: {given}}})  # {what}, any N",
        "safetensors": f"model = dist_ae.load({name!r})",
    }[format]
    say(f"load it: {how}")
    if address is not None:
        say(f"uploaded: {address}")


def explore(
    run_dir: RunDir,
    images: Images = None,
    out: Path | None = None,
    num: int = 10_000,
    runtime: Path | None = None,
    which: Which = "best",
    data_root: Root = None,
) -> None:
    """Writes one page about a run, which needs no network.

    It shows a map of images by their codes, neighbours, best and worst reconstructions, directions of the code, and
    lines between images.

    Args:
        out: .html; left out, RUN_DIR/explore.html.
        num: most images on the map.
        runtime: the folder node_modules/onnxruntime-web that `npm install onnxruntime-web` makes: puts the decoder of
            a convolutional model, or of your own, into the page (4 MB). The decoder of an mlp needs none.
    """
    from dist_ae.use import commands

    _written(commands.explore_run(run_dir, images, out, num, runtime, which, data_root))


def _written(path: Path) -> None:
    say(f"written: {path}")


def pack(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    image_size: int | None = None,
    fit: Literal["crop", "pad", "stretch"] = "crop",
    channels: Literal["auto", "grey", "rgb"] = "auto",
    background: str = "white",
    corrupt: Literal["refuse", "skip"] = "refuse",
    label: str | None = None,
    exclude: tuple[str, ...] = (),
    each: Literal["record", "records"] | None = None,
) -> None:
    """Packs pictures, a table or arrays into a folder that `train --data.name packed:OUT` reads, here or elsewhere.

    The same command resumes, for pictures.

    Args:
        source: folder:PATH, tar:PATTERN, hf:NAME, table:PATH, array:PATH, or the path of a folder, table or .npy.
        out: the folder to make.
        image_size: height and width that pictures get; left out, they must all have one size.
        fit: how a picture becomes square: crop its middle, pad its shorter side, or stretch it.
        channels: colour; auto: grey where all pictures are, else rgb.
        background: colour behind transparent and padded pictures, by name or #rrggbb.
        corrupt: what to do about pictures that cannot be read.
        label: column of a table that is no input: the classes of its rows.
        exclude: columns of a table to leave out.
        each: what each .npy of a folder is: one record, or an array of records.
    """
    from dist_ae.config import DataConfig
    from dist_ae.data.array_files import pack_numbers
    from dist_ae.data.pack import pack_source

    numbers = pack_numbers(source, out, DataConfig(label=label, exclude=exclude), each)
    if numbers is not None:
        of = "×".join(map(str, numbers["shape"]))
        say(f"{numbers['rows']:,} records of {of}, {sum(numbers['missing']):,} entries missing")
        say(f"train from it: dist-ae train table --data.name {shlex.quote(f'packed:{out}')}")
        return
    config = DataConfig(image_size=image_size, fit=fit, channels=channels, background=background, corrupt=corrupt)
    manifest = pack_source(source, out, config)
    sizes = [record.bytes for shard in manifest.shards for record in shard.files.values()]
    skipped = f", {manifest.unreadable:,} skipped that cannot be read" if manifest.unreadable else ""
    ignored = "".join(f", {count:,} ignored: {what}" for what, count in manifest.ignored.items())
    shape = "×".join(map(str, manifest.image_shape or ()))
    say(f"{manifest.images:,} pictures of {shape}, {sum(sizes):,} bytes{skipped}{ignored}")
    say(f"train from it: dist-ae train ae --data.name {shlex.quote(f'packed:{out}')}")


def doctor(
    run_dir: Annotated[Path | None, tyro.conf.Positional] = None,
    replay: bool = False,
    replay_wandb: bool = False,
    storage: Path | None = None,
) -> None:
    """Verifies a run directory or a packed set and says what is wrong with it. Exit status 1 where something is.

    Args:
        run_dir: the run, or the packed set.
        replay: repeat, on one process, the step whose loss or gradient was not finite.
        replay_wandb: rebuild an offline Weights & Biases run from metrics.jsonl.
        storage: a folder; try out whether its file system does what run directories and sweeps need.
    """
    if storage is not None:
        from dist_ae.use.storage import examine_storage

        _examined(examine_storage(storage), "FAILS  ")
    if run_dir is None:
        raise InputError("dist-ae doctor: name a run directory or a packed set, or --storage DIR")
    from dist_ae.data.packed import examine_packed, is_packed

    if is_packed(run_dir):
        _examined(examine_packed(run_dir))
    from dist_ae.data.tables import examine_packed_table, is_packed_table

    if is_packed_table(run_dir):
        _examined(examine_packed_table(run_dir))
    from dist_ae.use import doctor

    if replay:
        found = doctor.replay(run_dir)
        say("\n".join(found) or "that step is finite here")
        sys.exit(0 if found else 1)
    if replay_wandb:
        say(f"offline run written; upload it with: wandb sync {doctor.rebuild_wandb(run_dir)}")
        return
    _examined(doctor.examine(run_dir))


def _examined(found: Iterator[tuple[bool, str]], bad: str = "DAMAGED") -> NoReturn:
    whole = True
    for good, what in found:
        whole &= good
        say(f"{'ok     ' if good else bad} {what}")
    sys.exit(0 if whole else 1)


def show(values: dict[str, float], run_dir: Path | None = None) -> None:
    """A short table of results, and the pictures of a run."""
    from rich.console import Console
    from rich.table import Table

    per = "share of variance" if any(name.endswith(".r2") for name in values) else "per pixel, [0, 1]"
    units = dict.fromkeys(("mse", "train_mse", "pca_mse", "noisy_mse", "denoised_mse"), per)
    units |= {"psnr": "dB", "noisy_psnr": "dB", "denoised_psnr": "dB"}
    units |= dict.fromkeys(("neg_elbo", "rate", "distortion", "neg_iw_bound", "subset_neg_elbo"), "nats per image")
    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, value in values.items():
        unit = units.get(name.rpartition(".")[2], "")
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.6g}", f"[dim]{unit}")
    console = Console()
    with console.capture() as text:
        console.print(table)
    say(text.get().rstrip("\n"))
    for path in sorted((run_dir / "figures").glob("*.png")) if run_dir is not None else []:
        say(f"picture: {path}")


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate, "reconstruct": reconstruct, "denoise": denoise, "sample": sample, "interpolate": interpolate,
    "embed": embed, "score": score, "export": export, "explore": explore, "pack": pack, "doctor": doctor,
}  # fmt: skip


def main() -> None:
    """Entry point of ``dist-ae`` and ``python -m dist_ae``."""
    prepare_streams()
    arguments = sys.argv[1:]
    try:
        _refuse_lost_folder()
        if arguments[:1] == ["train"]:
            train(arguments[1:])
        elif arguments[:1] == ["sweep"]:
            sweep(arguments[1:])
        elif arguments and arguments[0] in COMMANDS:
            if rank() != 0 and arguments[0] != "evaluate":
                return  # a launcher started several, and one is enough
            tyro.cli(COMMANDS[arguments[0]], args=arguments[1:], prog=f"dist-ae {arguments[0]}")
        elif arguments == ["--version"]:
            from dist_ae import __version__

            say(__version__)
        else:
            tyro.extras.subcommand_cli_from_dict(
                {"train": _train_help, "sweep": _sweep_help, **COMMANDS},
                args=arguments,
                prog="dist-ae",
                description="Trains and uses autoencoders.",
            )
    except BrokenPipeError:  # as in `--help | head -1`: the reader has what it wanted
        silence(sys.stdout)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        status = getattr(error, "exit_status", None)  # the errors that have one were written to be read by a person
        if status is None:
            raise
        _fail(str(error), status)
    _flush()


def _refuse_lost_folder() -> None:
    """Raises InputError where the working folder is gone: libraries would end the process in words of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the folder that this is run in was deleted; change to one that is there") from None


def _train_help() -> None: ...


def _sweep_help() -> None: ...


_train_help.__doc__, _sweep_help.__doc__ = train.__doc__, sweep.__doc__


def _flush() -> None:
    """Writes now what is still to be written: at its end, Python would complain of a reader that is gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence(sys.stdout)


def _fail(message: str, status: int) -> None:
    """Prints one message for all processes and ends this one."""
    _flush()
    if rank() != 0 and status == EXIT_STOPPED:
        sys.exit(status)
    if rank() != 0:
        # Rank 0 most likely has the same to say, and the launcher ends this process in the meantime.
        time.sleep(3)
        message = f"rank {rank()}: {message}"
    say(f"{'' if status == EXIT_STOPPED else 'error: '}{message}", sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
