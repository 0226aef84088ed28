"""A trained model for other programs: torch.export, ONNX, and a folder of safetensors with a model card for the Hub."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from dist_ae.config import Config
from dist_ae.data.pictures import expand, shown
from dist_ae.files import MAX_LINES, Damaged, inside, parse_json, read_bounded, read_json, to_json
from dist_ae.models.weights import weights_sha256
from dist_ae.presets import PRESETS
from dist_ae.saved import CONFIG, EXPORTED_WEIGHTS
from dist_ae.use.trained import TrainedModel

CARD, PICTURE = "README.md", "reconstructions.png"
MAX_PICTURE = 64 << 20  # bytes
PUBLISHED = (EXPORTED_WEIGHTS, CONFIG, CARD, PICTURE)  # all files of an exported folder


def write_folder(trained: TrainedModel, run_dir: Path, folder: Path, license: str = "other") -> None:
    """Writes ``model.safetensors``, ``config.json`` and a model card, for ``dist_ae.load`` and the Hub.

    Args:
        run_dir: the run, for its figures and pictures.
        folder: an empty folder.
        license: an identifier of the Hub, such as apache-2.0 or cc-by-4.0.
    """
    weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    # Not save_file: on a full disk, its errors are no OSError.
    (folder / EXPORTED_WEIGHTS).write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
    config = _without_paths(trained.config)
    if config.precision == "fp64":  # a trained model is used and written in float32
        config = config.override({"precision": "fp32"})
    (folder / CONFIG).write_bytes(to_json({"config": config.model_dump(mode="json")}))
    picture = _picture(run_dir)
    if picture is not None:
        (folder / PICTURE).write_bytes(picture)
    try:
        result = read_json(run_dir / "result.json")
    except Damaged:  # a run that is not finished
        result = {}
    step = None if trained.source is None else trained.source[1]
    rows = [
        ("steps", f"{result['steps']:,}" if isinstance(result.get("steps"), int) else "unfinished"),
        *([("weights", f"of step {step:,}")] if step is not None else []),
        *((f"`val.{name}`", f"{value:.6g}") for name, value in _figures(run_dir, step).items()),
    ]
    (folder / CARD).write_text(_card(trained, rows, license, PICTURE if picture is not None else None), "utf-8")


def _without_paths(config: Config) -> Config:
    """A configuration that reveals nothing about its machine: of each path, only the last name."""
    prefix, colon, path = config.data.name.partition(":")
    hub = prefix == "hf" and not expand(path).is_absolute() and not expand(path).exists()  # OWNER/NAME is no path
    name = f"{prefix}{colon}{Path(path).name}" if colon and not hub else config.data.name
    paths = dict.fromkeys(("run_dir", "data.root", "data.cache", "init_from"))
    return config.override({"data.name": name, **paths})


def _picture(run_dir: Path) -> bytes | None:
    """The run's picture of reconstructions, for the Hub; None unless it is a PNG in the run."""
    try:
        content = read_bounded(inside(run_dir, "figures", PICTURE), MAX_PICTURE)
    except Damaged:
        return None
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") else None


def _figures(run_dir: Path, step: int | None) -> dict[str, float]:
    """The metrics of the evaluation at a step, which belong to these weights even if they are not the last."""
    try:
        lines = read_bounded(run_dir / "metrics.jsonl", MAX_LINES).splitlines()
    except Damaged:
        return {}
    for raw in reversed(lines):
        try:
            line = parse_json(raw, "metrics.jsonl")
        except Damaged:
            continue
        if line.get("split") == "val" and line.get("step") == step:
            return {name: value for name, value in line.items() if isinstance(value, float) and name != "epoch"}
    return {}


def _card(trained: TrainedModel, figures: Sequence[tuple[str, str]], license: str, picture: str | None) -> str:
    """A model card: data, metrics, the command that trained it, and how to load it."""
    config, model = _without_paths(trained.config), trained.model
    kind = f"{'A variational' if config.model.variational else 'An'} autoencoder, {config.model.architecture}"
    numbers = torch.Size(model.code_shape).numel()
    units = "on [0, 1]" if model.units_scale is None else "in their own units"
    rows = [
        ("data", _plain(config.data.name)),
        *([("begun with", "the weights of another run")] if trained.config.init_from is not None else []),
        ("images", f"{' × '.join(map(str, model.image_shape))} (channels, height, width), floats {units}"),
        ("code", f"{numbers:,} numbers, shape {list(model.code_shape)}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        *figures,
        ("SHA-256 of the weights", f"`{weights_sha256(model.state_dict())}`"),
    ]
    command = shown(command_of(config))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return "\n".join(
        [
            "---",
            f"license: {license}",
            "library_name: dist_ae",
            "pipeline_tag: image-feature-extraction",
            f"tags: [autoencoder, dist-ae, {config.model.architecture}]",
            "---",
            "",
            f"# {_plain(config.name)} on {_plain(config.data.name)}",
            "",
            f"{kind}, trained by dist-ae. Figures are of the validation images: `mse` per pixel on [0, 1], `psnr` in",
            "dB, `neg_elbo` and its parts in nats an image; `pca_mse` is the best linear code of the same size.",
            "",
            *([f"![originals and reconstructions]({picture})", ""] if picture else []),
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "## Use",
            "",
            "```python",
            "import dist_ae",
            "",
            'model = dist_ae.load("hf:OWNER/NAME")  # or the folder that holds this file',
            'model.reconstruct("one.png"), model.embed(images), model.score(images)',
            "```",
            "",
            "## Train",
            "",
            f"{fence}sh",
            command,
            fence,
            "",
        ]
    )


def _plain(text: str) -> str:
    """Escapes a name that a person chose for Markdown: no markup, no HTML, one line."""
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", html.escape(shown(text), quote=False))


def command_of(config: Config) -> str:
    """The command that trains this configuration: its preset and all settings that differ from it."""
    preset = config.name if config.name in PRESETS else "ae"
    defaults = dict(PRESETS[preset].flat())
    skipped = ("name", "run_dir", "data.root", "data.cache", "model.image_shape", "model.record_shape")
    parts = [f"dist-ae train {preset}"]
    for key, value in config.flat():
        if key in skipped or value == defaults[key]:
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            section, _, leaf = flag.rpartition(".")
            parts.append(f"--{flag}" if value else f"--{section}.no-{leaf}")
        else:
            words = value if isinstance(value, tuple) else (value,)
            parts.append(f"--{flag} {shlex.join(map(str, words))}")
    return " ".join(parts)
