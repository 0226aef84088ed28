"""`dist-ae doctor`: checks a run for damage, repeats a step that was not finite, and rebuilds a W&B run."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from dist_ae import devices, timeline
from dist_ae.config import InputError, parse
from dist_ae.data import sources
from dist_ae.data.crops import drawn_from, placed
from dist_ae.data.reader import Reader
from dist_ae.draws import Step, draw
from dist_ae.files import MAX_JSON, MAX_LINES, Damaged, files_inside, open_plainly, parse_json, read_bounded, read_json
from dist_ae.models import blank
from dist_ae.objectives import terms
from dist_ae.run import calibration
from dist_ae.run.checkpoint import MAX_HEADER, parse_tensors, step_of, template_of, verify_checkpoint
from dist_ae.run.directory import RunDirectory
from dist_ae.run.tracking import by_step, wandb_options
from dist_ae.saved import image_shape, is_exported, run_config

MAX_BUNDLE = 64 << 20  # bytes of nonfinite.json, which names every image of a batch


def examine(run_dir: Path) -> Iterator[tuple[bool, str]]:
    """(whole, description) of each part of a run directory. Only reads, and never holds a large file in memory.

    Raises:
        InputError: it is not a run directory.
    """
    if not os.path.lexists(run_dir / "config.json"):
        raise InputError(f"{run_dir} is not a run directory: it has no config.json")
    try:
        run_config(run_dir)
        whole = is_exported(run_dir) or isinstance(read_json(run_dir / "config.json").get("trajectory"), dict)
        yield whole, "config.json" + ("" if whole else ": its trajectory is missing, so the run cannot be resumed")
    except InputError as error:
        yield False, str(error)
    except Damaged as error:
        yield False, str(error)
    if is_exported(run_dir):
        yield True, "an exported model, which can be used as it is; --init-from it to train on"
        return
    yield from _examine_checkpoints(run_dir / "checkpoints")
    for path in files_inside(run_dir, calibration.FOLDER, calibration.NAMES):
        whole = calibration.read(run_dir, int(path.stem)) is not None
        damage = "" if whole else ": damaged; remove it, and score computes it again"
        yield whole, f"calibration/{path.name}{damage}"
    yield from _examine_metrics(run_dir / "metrics.jsonl")
    if (run_dir / "nonfinite.json").exists():
        yield False, "nonfinite.json: a step was not finite; --replay repeats it"
    yield _examine_result(run_dir)


def _examine_checkpoints(folder: Path) -> Iterator[tuple[bool, str]]:
    if folder.is_symlink():
        yield False, "checkpoints: a symbolic link; a run has its checkpoints in its own folder"
        return
    for path in sorted(folder.iterdir(), key=lambda p: p.name) if folder.is_dir() else []:
        if step_of(path) is not None:
            try:
                step, size = verify_checkpoint(path)
                yield True, f"checkpoints/{path.name}: step {step}, {size:,} bytes"
            except Damaged as error:
                yield False, f"checkpoints/{error}"
        elif ".corrupt" in path.name:
            yield False, f"checkpoints/{path.name}: set aside as damaged; remove it when you know why"
        elif path.name.startswith("."):
            yield True, f"checkpoints/{path.name}: left by a run that was killed; the next start removes it"
        else:
            yield False, f"checkpoints/{path.name}: not written by a run"


def _examine_metrics(path: Path) -> Iterator[tuple[bool, str]]:
    if not os.path.lexists(path):
        yield True, "metrics.jsonl: empty"
        return
    steps: dict[str, int] = {}
    try:
        with os.fdopen(open_plainly(path), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_LINES:
                yield False, f"metrics.jsonl: more than the {MAX_LINES:,} bytes it can have"
                return
            for number, raw in enumerate(iter(lambda: file.readline(MAX_JSON), b""), 1):
                try:
                    line = json.loads(raw)
                    step, split = int(line["step"]), str(line["split"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    yield (
                        False,
                        f"metrics.jsonl: line {number} is cut off; resuming drops all lines after the checkpoint",
                    )
                    continue
                if step <= steps.get(split, -1):
                    yield False, f"metrics.jsonl: line {number} repeats {split} step {step}"
                steps[split] = step
    except (Damaged, OSError) as error:
        yield False, str(error)
        return
    yield True, f"metrics.jsonl: {', '.join(f'{split} to step {step}' for split, step in steps.items()) or 'empty'}"


def _examine_result(run_dir: Path) -> tuple[bool, str]:
    """Whether the run is finished, that is, whether the checkpoint of its last step is on the disk."""
    if not os.path.lexists(run_dir / "result.json"):
        return True, "the run is not finished; the same command resumes it"
    try:
        step = int(read_json(run_dir / "result.json")["steps"])
    except (Damaged, KeyError, TypeError, ValueError) as error:
        return False, f"result.json cannot be read ({error}); the same command writes it again"
    if not (run_dir / "checkpoints" / f"{step:08d}").is_dir():
        problem = f"result.json is of step {step}, which has no checkpoint"
        return False, f"{problem}; the same command resumes the run"
    return True, "the run is finished"


def replay(run_dir: Path) -> list[str]:
    """Repeats, on one process, the step whose loss or gradient was not finite.

    Returns a line for each value that is not finite, in the order of computation.

    Raises:
        InputError: no such step is recorded, or its weights are damaged.
    """
    if not os.path.lexists(run_dir / "nonfinite.json"):
        raise InputError(f"{run_dir} holds no step to replay: all steps were finite")
    try:
        bundle = parse_json(read_bounded(run_dir / "nonfinite.json", MAX_BUNDLE), "nonfinite.json")
        config = parse(bundle["config"], "nonfinite.json")
        if config.model.architecture == "own":
            raise InputError(f"{run_dir}: its model was made in Python, so --replay cannot make it again")
        dtype = devices.weight_type(config.precision)
        model = blank(config, image_shape(config, run_dir)).to(dtype)
        template = template_of(model.state_dict())
        size = 8 * sum(math.prod(shape) for shape, _ in template.values()) + MAX_HEADER
        path = run_dir / "nonfinite.safetensors"
        weights = parse_tensors(read_bounded(path, size), path.name, template)
        step, rows = int(bundle["step"]), torch.tensor(bundle["rows"], dtype=torch.int64)
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError, Damaged) as error:
        raise InputError(f"{run_dir}/nonfinite.json cannot be read: {error}") from None
    dataset = sources.load(config.data)
    if rows.ndim != 1 or not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(dataset.train):
        raise InputError(f"{run_dir}/nonfinite.json names images that {dataset.name} does not have")
    model.load_state_dict(weights, assign=True)
    reader_rows = torch.from_numpy(placed(dataset.train, rows.numpy(), config.seed, step, config.data.flip))
    images = Reader(drawn_from(dataset.train), torch.device("cpu"), dtype).take(reader_rows)
    draws = draw(
        model.draw_shapes(), Step(step), range(len(rows)), torch.device("cpu"), dtype,
        seed=config.seed, std=config.objective.noise_std, keep=1 - config.model.dropout,
    )  # fmt: skip
    reduced = config.precision in ("bf16", "fp16")
    with torch.autocast("cpu", torch.bfloat16) if reduced else contextlib.nullcontext():
        output = model(images, draws)
    losses = terms(output, images, config.objective, timeline.beta(step, config.objective))
    losses.loss.mean().backward()  # type: ignore[no-untyped-call]
    named = {**output._asdict(), **losses._asdict()}
    bad = [
        f"{name} of image {_first(values, rows)}"
        for name, values in named.items()
        if isinstance(values, torch.Tensor) and not values.isfinite().all()
    ]
    bad += [
        f"gradient of {name}"
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return [f"step {step}: {what} is not finite" for what in bad]


def _first(values: torch.Tensor, rows: torch.Tensor) -> int:
    """The first image whose values are not all finite."""
    bad = ~values.detach().isfinite().reshape(len(values), -1).all(1) if values.ndim else values.new_ones(0).bool()
    return int(rows[int(bad.nonzero()[0])]) if len(bad) == len(rows) else -1


def rebuild_wandb(run_dir: Path) -> Path:
    """Writes an offline W&B run from metrics.jsonl, under the run's own id, and returns its folder.

    `wandb sync` uploads it.

    Raises:
        InputError: there is nothing to rebuild from, or the run directory is in use or cannot be written.
    """
    import wandb

    config = run_config(run_dir)
    for whole, what in _examine_metrics(run_dir / "metrics.jsonl"):
        if not whole:
            raise InputError(f"{run_dir}: {what}")
    folder = RunDirectory(run_dir)
    tracking, metrics = folder.read("tracking.json") or {}, folder.metrics()
    folder.close()
    if not metrics:
        raise InputError(f"{run_dir} has no metrics.jsonl to rebuild a run from")
    name = str(read_json(run_dir / "config.json").get("label") or config.label())
    options = wandb_options(config.tracking, run_dir, name, tracking.get("wandb_id"), "offline")
    run = wandb.init(project=config.tracking.project, config={"config": config.model_dump(mode="json")}, **options)
    for step, values in by_step(metrics):
        run.log(values, step=step)
    for picture in files_inside(run_dir, "figures", r".*\.png"):
        run.log({picture.stem: wandb.Image(str(picture))})
    path = Path(run.dir).parent
    run.finish()
    wandb.teardown()  # finish returns before the last records are in the file; this ends other runs of the process, too
    return path
