"""`dist-ae doctor`: says whether a run directory is whole, repeats a step that was not finite, rebuilds a W&B run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dist_ae.config import InputError, load_config, parse
from dist_ae.data import sources
from dist_ae.data.reader import Reader
from dist_ae.draws import draw
from dist_ae.models import Autoencoder
from dist_ae.objectives import beta_at, objective
from dist_ae.run.checkpoint import Damaged, parse_tensors, read_checkpoint
from dist_ae.run.directory import RunDirectory


def examine(run_dir: Path) -> Iterator[tuple[bool, str]]:
    """(whole, what) for each thing a run directory holds. Reads only.

    Raises:
        InputError: not a run directory.
    """
    if not (run_dir / "config.json").exists():
        raise InputError(f"{run_dir} is not a run directory: it has no config.json")
    try:
        load_config(run_dir / "config.json")
        yield True, "config.json"
    except InputError as error:
        yield False, str(error)
    folder = run_dir / "checkpoints"
    paths = sorted(folder.iterdir(), key=lambda p: p.name) if folder.is_dir() else []
    for path in paths:
        if path.name.isdigit():
            try:
                checkpoint = read_checkpoint(path)
                size = sum(file.stat().st_size for file in path.iterdir())
                yield True, f"checkpoints/{path.name}: step {checkpoint.step}, {size:,} bytes"
            except Damaged as error:
                yield False, f"checkpoints/{error}"
        elif ".corrupt" in path.name:
            yield False, f"checkpoints/{path.name}: set aside as damaged; remove it when you know why"
        else:
            yield True, f"checkpoints/{path.name}: left by a run that was killed; the next one clears it"
    steps: dict[str, int] = {}
    for number, raw in enumerate(
        (run_dir / "metrics.jsonl").read_bytes().splitlines() if (run_dir / "metrics.jsonl").exists() else [], 1
    ):
        try:
            line = json.loads(raw)
            step, split = int(line["step"]), str(line["split"])
        except (ValueError, KeyError, TypeError):
            yield False, f"metrics.jsonl: line {number} is torn; resuming drops what is after the checkpoint"
            continue
        if step <= steps.get(split, -1):
            yield False, f"metrics.jsonl: line {number} repeats {split} step {step}"
        steps[split] = step
    yield True, f"metrics.jsonl: {', '.join(f'{split} to step {step}' for split, step in steps.items()) or 'empty'}"
    if (run_dir / "nonfinite.json").exists():
        yield False, "nonfinite.json: a step was not finite; --replay repeats it"
    state = "finished" if (run_dir / "result.json").exists() else "not finished; the same command goes on"
    yield True, f"the run is {state}"


def replay(run_dir: Path) -> list[str]:
    """Repeats, on one process, the step whose loss or gradient was not finite: what is not finite in it, in the order it came about.

    Raises:
        InputError: no such step is on record, or its weights are damaged.
    """
    try:
        bundle = json.loads((run_dir / "nonfinite.json").read_text())
        weights = parse_tensors((run_dir / "nonfinite.safetensors").read_bytes(), "nonfinite.safetensors")
        config = parse(bundle["config"], "nonfinite.json")
        step, rows = int(bundle["step"]), torch.tensor(bundle["rows"], dtype=torch.int64)
    except FileNotFoundError:
        raise InputError(f"{run_dir} holds no step to replay: none was not finite") from None
    except (ValueError, KeyError, TypeError, Damaged) as error:
        raise InputError(f"{run_dir}/nonfinite.json cannot be read: {error}") from None
    assert config.model.image_shape is not None
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    model = Autoencoder(config, config.model.image_shape).to_empty(device="cpu").to(dtype)
    model.load_state_dict(weights)
    dataset = sources.load(config.data)
    images = Reader(dataset.train, torch.device("cpu"), dtype).take(rows)
    draws = draw(config, config.model.image_shape, step, range(len(rows)), torch.device("cpu"), dtype)
    autocast = (
        torch.autocast("cpu", torch.bfloat16) if config.precision in ("bf16", "fp16") else contextlib.nullcontext()
    )
    found = []
    bad_weights = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    found += [f"weight {name}" for name in bad_weights]
    with autocast:
        output = model(images, draws)
    for name, tensor in output._asdict().items():
        if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            found.append(f"{name} of image {_first(tensor, rows)}")
    terms = objective(lambda *_: output, images, draws, config, beta_at(step, config.objective))
    for name, values in terms._asdict().items():
        if not values.isfinite().all():
            found.append(f"{name} of image {_first(values, rows)}")
    terms.loss.mean().backward()  # type: ignore[no-untyped-call]
    found += [
        f"gradient of {name}"
        for name, p in model.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    return [f"step {step}: {what} is not finite" for what in found]


def _first(values: torch.Tensor, rows: torch.Tensor) -> int:
    bad = ~values.detach().isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.detach().isfinite().reshape(-1)
    return int(rows[int(bad.nonzero()[0])]) if len(bad) == len(rows) else -1


def rebuild_wandb(run_dir: Path) -> Path:
    """Writes an offline W&B run from metrics.jsonl, under the run's own id: `wandb sync` uploads it. Returns its folder.

    Raises:
        InputError: there is nothing to rebuild from, or wandb cannot write it.
    """
    import wandb

    config = load_config(run_dir / "config.json")
    try:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir}/metrics.jsonl cannot be read: {error}") from None
    folder = RunDirectory(run_dir)
    kept = folder.read("tracking.json") or {}
    folder.close()
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(
        project=config.tracking.project, group=config.tracking.group, name=config.name, id=kept.get("wandb_id"), dir=run_dir, mode="offline",
        settings=settings, config={"config": config.model_dump(mode="json")},
    )  # fmt: skip
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        by_step.setdefault(line["step"], {}).update(
            {f"{line['split']}/{key}": value for key, value in line.items() if key not in ("step", "epoch", "split")}
        )
    for step, values in sorted(by_step.items()):
        run.log(values, step=step)
    for picture in sorted((run_dir / "figures").glob("*.png")):
        run.log({picture.stem: wandb.Image(str(picture))})
    path = Path(run.dir).parent
    run.finish()
    return path
