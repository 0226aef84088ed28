"""The command line: tyro over the library's functions. Imports torch only once a command needs it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from dist_ae.config import Config, InputError, load_config
from dist_ae.errors import install
from dist_ae.presets import DESCRIPTIONS, PRESETS
from dist_ae.terminal import EXIT_STOPPED, prepare_streams, rank, say, silence
from dist_ae.use import commands
from dist_ae.use.results import Evaluated, ExportedTo, Scored

EXIT_INTERRUPTED = 130  # after Ctrl-C, as shells have it


def _config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file of ``--config FILE`` or ``--config=FILE``, anywhere among the arguments, and the other arguments.

    Raises:
        InputError: no file follows, or a preset stands beside it.
    """
    at = next((i for i, word in enumerate(arguments) if word == "--config" or word.startswith("--config=")), None)
    if at is None:
        return None, arguments
    _, equals, file = arguments[at].partition("=")
    file = file if equals else "".join(arguments[at + 1 : at + 2])
    rest = arguments[:at] + arguments[at + (1 if equals else 2) :]
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
            "Trains a preset with the given settings. --config FILE reads a run's config.json or a sweep's best.json."
        )
        config = tyro.extras.overridable_config_cli(presets, args=rest, prog="dist-ae train", description=text)

    if rank() == 0:
        say(f"{config.name} on {config.data.name}: loading …")
    from dist_ae.processes.stop import Signals
    from dist_ae.trainer import train

    Signals.ends_process = True
    if config.data.folds is not None and config.data.fold is None:
        from dist_ae.folds import train_folds

        folds = train_folds(config)
        if rank() == 0:
            say(folds.summary())
            _show_path(folds.run_dir / "folds.json")
        return
    result = train(config)
    if rank() == 0:
        speed = round(result.images_per_second)
        figures = {**result.metrics, "steps": result.steps, "processes": result.world_size, "images/s": speed}
        show(figures, result.run_dir)


def sweep(arguments: list[str]) -> None:
    """Trains many configurations of a preset, ranks them, and writes report.html, best.json and trials.csv."""
    # Sweeps are a separate package, on which this one does not depend: dist_ae_tune if it is installed, tune in a bare
    # checkout. It must lie beside this dist_ae, since PyPI has another tune.
    for name in ("dist_ae_tune", "tune"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).parents[1] == Path(__file__).parents[1]:
            importlib.import_module(f"{name}.__main__").main(arguments, prog="dist-ae sweep")
            return
    raise InputError(f"dist-ae sweep: the sweeps are not installed; {install('tune')}")


def _show_evaluation(evaluated: Evaluated) -> None:
    if rank() != 0:
        return
    show(evaluated.metrics)
    methods = list(next(iter(evaluated.denoising.values()), {}))
    if methods:
        say("denoising, dB".ljust(16) + "".join(name.rjust(18) for name in methods))
    for level, values in evaluated.denoising.items():
        say(f"  noise {level:g}".ljust(16) + "".join(f"{values[name]:.2f}".rjust(18) for name in methods))
    if evaluated.columns:
        worst = sorted(evaluated.columns, key=lambda name: evaluated.columns[name]["r2"])[:10]
        say("columns with the lowest r2".ljust(34) + "model".rjust(10) + "PCA".rjust(10))
        for name in worst:
            figures = "".join(f"{value:.4f}".rjust(10) for value in evaluated.columns[name].values())
            say(f"  {name[:30]}".ljust(34) + figures)
    for remark in evaluated.remarks:
        say(remark)
    for path in evaluated.written:
        _show_path(path)


def _show_scores(scored: Scored) -> None:
    values = scored.scores
    spread = {"min": float(values.min()), "median": float(values.double().quantile(0.5)), "max": float(values.max())}
    show({**{f"{name}.{scored.score}": value for name, value in spread.items()}, **scored.figures})
    flagged = int(scored.flagged.sum())
    say(f"flagged {flagged:,} of {len(values):,}: {scored.score} above {scored.threshold:.6g}, {scored.basis}")
    highest = values.argsort(descending=True, stable=True)[:10].tolist()
    if scored.names is None:
        say(f"highest at images {', '.join(str(image) for image in highest)} (counted from 0)")
    else:
        say("highest at\n  " + "\n  ".join(scored.names[image] for image in highest))
    for remark in scored.remarks:
        say(remark)
    for picture in scored.pictures:
        say(f"picture{'s' if picture.is_dir() else ''}: {picture}")
    _show_path(scored.path)


def _show_export(exported: ExportedTo) -> None:
    _show_path(exported.path)
    say(f"load it: {exported.how}")
    if exported.address is not None:
        say(f"uploaded: {exported.address}")


def _show_pruned(sizes: tuple[int, int]) -> None:
    before, after = sizes
    say(f"{before:,} bytes before, {after:,} now")


def _show_path(path: Path) -> None:
    say(f"written: {path}")


def pack(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    image_size: int | str | None = None,
    fit: Literal["crop", "pad", "stretch", "whole"] = "crop",
    channels: Literal["auto", "grey", "rgb", "rgba"] = "auto",
    background: str = "white",
    bits: Literal["auto", "8", "16"] = "auto",
    pages: Literal["first", "each", "volume"] = "first",
    corrupt: Literal["refuse", "skip"] = "refuse",
    label: str | None = None,
    exclude: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
    links: Literal["inside", "follow"] = "inside",
    each: Literal["record", "records"] | None = None,
    group: str | None = None,
    budget: float | None = None,
) -> None:
    """Packs pictures, a table or arrays into a folder that `train --data.name packed:OUT` reads, here or elsewhere.

    The same command resumes, for pictures.

    Args:
        source: folder:PATH, tar:PATTERN, hf:NAME, table:PATH, array:PATH, or the path of a folder, table or .npy.
        out: the folder to make.
        image_size: size of the pictures in pixels: one number for height and width, or HEIGHTxWIDTH such as 32x128;
            left out, all pictures must have the same size.
        fit: how a picture gets its proportions: crop its middle, pad it, or stretch it; whole keeps its shape.
        channels: colour; auto: grey if all pictures are, else rgb; rgba: transparency is a fourth channel.
        background: colour behind transparent and padded pictures, by name or #rrggbb.
        bits: bits of a pixel's values; auto: 16 if a picture of the set has more than 8, else 8.
        pages: pages of a TIFF: only the first, each as a picture, or all as the depth of a volume.
        corrupt: what to do about pictures that cannot be read.
        label: column of a table that holds the classes of its rows; it is no input.
        exclude: patterns of the names of a folder's pictures, or columns of a table, to leave out.
        include: use only a folder's pictures whose names match one of these patterns, such as 'images/*'.
        links: follow also uses pictures that a folder's links lead to, wherever they lie.
        each: what each .npy of a folder is: one record, or an array of records.
        group: regular expression on the names of pictures; those with the same match stay on one side of the split.
        budget: with fit whole, GB of pixels beyond which the set keeps the bytes of the files.
    """
    from dist_ae.config import DataConfig
    from dist_ae.data.array_files import pack_numbers
    from dist_ae.data.facts import remarks
    from dist_ae.data.pack import pack_source
    from dist_ae.data.packed import left_pages, of_16_bits

    config = DataConfig(
        image_size=image_size,
        fit=fit,
        channels=channels,
        background=background,
        bits=bits,
        pages=pages,
        corrupt=corrupt,
        label=label,
        exclude=exclude,
        include=include,
        links=links,
        group=group,
        budget=budget,
    )
    numbers = pack_numbers(source, out, config, each)
    if numbers is not None:
        shape = "×".join(map(str, numbers["shape"]))
        say(f"{numbers['rows']:,} records of {shape}, {sum(numbers['missing']):,} entries missing")
        say(f"train from it: dist-ae train table --data.name {shlex.quote(f'packed:{out}')}")
        return
    manifest = pack_source(source, out, config)
    sizes = [record.bytes for shard in manifest.shards for record in shard.files.values()]
    skipped = f", {manifest.unreadable:,} skipped that cannot be read" if manifest.unreadable else ""
    ignored = "".join(f", {count:,} ignored: {what}" for what, count in manifest.ignored.items())
    shape = "×".join(map(str, manifest.record_shape or manifest.image_shape or ()))
    shape = "their own sizes" if manifest.whole else shape
    say(f"{manifest.images:,} pictures of {shape}, {sum(sizes):,} bytes{skipped}{ignored}")
    for remark in (of_16_bits(manifest), left_pages(manifest), *remarks(manifest.looked)):
        if remark:
            say(remark)
    say(f"train from it: dist-ae train ae --data.name {shlex.quote(f'packed:{out}')}")


def look(
    source: Annotated[str, tyro.conf.Positional],
    out: Path | None = None,
    json: bool = False,
    exclude: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
    links: Literal["inside", "follow"] = "inside",
    image_size: int | str | None = None,
    layout: Literal["auto", "table", "signals", "images", "images-last", "volumes"] = "auto",
) -> None:
    """Looks at pictures, an array or a table before anything is trained: one page, one table, JSON.

    It counts what is ignored and why, sizes, modes and ranges, twins and look-alikes, classes, suspected masks, leaks
    across a given split, and says what training would take.

    Args:
        source: folder:PATH, tar:PATTERN, hf:NAME, table:PATH, array:PATH, or the path of a folder, table or .npy.
        out: .html, with the figures as .json beside it; left out, look-NAME.html in the current folder.
        json: print the figures as JSON in place of the table.
        exclude: patterns of the names of a folder's pictures, or columns of a table, to leave out.
        include: use only a folder's pictures whose names match one of these patterns, such as 'images/*'.
        links: follow also uses pictures that a folder's links lead to, wherever they lie.
        image_size: the size that training is meant to use, such as 64 or 32x128; left out, one is suggested.
        layout: axes of an array, as in data.layout.
    """
    from dist_ae.config import DataConfig
    from dist_ae.use.look import look_at, rows

    config = DataConfig(exclude=exclude, include=include, links=links, image_size=image_size, layout=layout)
    facts, paths = look_at(source, config, out)
    if json:
        from dist_ae.files import to_json

        say(to_json(facts.figures).decode().rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table, console = Table(show_header=False, box=None, padding=(0, 1)), Console()
    for name, text in rows(facts.figures):
        table.add_row(Text(name), Text(text))
    with console.capture() as shown_table:
        console.print(table)
    say(shown_table.get().rstrip("\n"))
    for remark in facts.figures["remarks"]:
        say(f"note: {remark}")
    if facts.figures["training"]:
        say(f"train on it: {facts.figures['training']['command']}")
    if "crops" in facts.figures["training"]:
        say(f"or on crops of whole pictures: {facts.figures['training']['crops']}")
    for path in paths:
        _show_path(path)


def doctor(
    run_dir: Annotated[Path | None, tyro.conf.Positional] = None,
    replay: bool = False,
    replay_wandb: bool = False,
    storage: Path | None = None,
) -> None:
    """Verifies a run directory or a packed set and says what is wrong with it. Exits with status 1 if anything is.

    Args:
        run_dir: the run, or the packed set.
        replay: repeat, on one process, the step whose loss or gradient was not finite.
        replay_wandb: rebuild an offline Weights & Biases run from metrics.jsonl.
        storage: a folder; test whether its file system does what run directories and sweeps need.
    """
    if storage is not None:
        from dist_ae.use.storage import examine_storage

        _report_and_exit(examine_storage(storage), "FAILS  ")
    if run_dir is None:
        raise InputError("dist-ae doctor: name a run directory or a packed set, or --storage DIR")
    from dist_ae.data.packed import examine_packed, is_packed

    if is_packed(run_dir):
        _report_and_exit(examine_packed(run_dir))
    from dist_ae.data.tables import examine_packed_table, is_packed_table

    if is_packed_table(run_dir):
        _report_and_exit(examine_packed_table(run_dir))
    from dist_ae.use import doctor

    if replay:
        lines = doctor.replay(run_dir)
        say("\n".join(lines) or "that step is finite here")
        sys.exit(0 if lines else 1)
    if replay_wandb:
        say(f"offline run written; upload it with: wandb sync {doctor.rebuild_wandb(run_dir)}")
        return
    _report_and_exit(doctor.examine(run_dir))


def _report_and_exit(findings: Iterator[tuple[bool, str]], bad: str = "DAMAGED") -> NoReturn:
    all_good = True
    for good, what in findings:
        all_good &= good
        say(f"{'ok     ' if good else bad} {what}")
    sys.exit(0 if all_good else 1)


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


# Each command's function, and the function that prints its result.
COMMANDS: dict[str, tuple[Callable[..., Any], Callable[[Any], None]]] = {
    "evaluate": (commands.evaluate_run, _show_evaluation),
    "reconstruct": (commands.reconstruct_run, _show_path),
    "denoise": (commands.denoise_run, _show_path),
    "sample": (commands.sample_run, _show_path),
    "interpolate": (commands.interpolate_run, _show_path),
    "embed": (commands.embed_run, _show_path),
    "score": (commands.score_run, _show_scores),
    "export": (commands.export_run, _show_export),
    "explore": (commands.explore_run, _show_path),
    "prune": (commands.prune_run, _show_pruned),
    "look": (look, lambda _: None),
    "pack": (pack, lambda _: None),
    "doctor": (doctor, lambda _: None),
}


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
                return  # a launcher started several processes, and one is enough
            command, show_result = COMMANDS[arguments[0]]
            show_result(tyro.cli(command, args=arguments[1:], prog=f"dist-ae {arguments[0]}"))
        elif arguments == ["--version"]:
            from dist_ae import __version__

            say(__version__)
        else:
            tyro.extras.subcommand_cli_from_dict(
                {
                    "train": _train_help,
                    "sweep": _sweep_help,
                    **{name: command for name, (command, _) in COMMANDS.items()},
                },
                args=arguments,
                prog="dist-ae",
                description="Trains and uses autoencoders.",
            )
    except BrokenPipeError:  # as in `--help | head -1`, which reads no further
        silence(sys.stdout)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        status = getattr(error, "exit_status", None)  # an error that has one carries a message for the user
        if status is None:
            raise
        _fail(str(error), status)
    _flush()


def _refuse_lost_folder() -> None:
    """Raises InputError if the working folder is gone: libraries would end the process with less clear messages."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the working folder was deleted; change to one that exists") from None


def _train_help() -> None: ...


def _sweep_help() -> None: ...


_train_help.__doc__, _sweep_help.__doc__ = train.__doc__, sweep.__doc__


def _flush() -> None:
    """Flushes stdout now: at exit, Python would complain if the reader is gone."""
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
        # Rank 0 most likely prints the same message, and the launcher ends this process in the meantime.
        time.sleep(3)
        message = f"rank {rank()}: {message}"
    say(f"{'' if status == EXIT_STOPPED else 'error: '}{message}", sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
