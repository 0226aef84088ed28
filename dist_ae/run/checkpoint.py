"""A checkpoint: a folder of safetensors and JSON files, which its reader does not trust.

No pickle is written or read. Nothing in a checkpoint depends on a rank or on the number of processes. Its files:

- ``weights.safetensors`` and, if the run has one, the moving average ``ema.safetensors``: what a trained model needs.
- ``optimizer.safetensors``: the moments of the optimizer, for Adam twice as large as the weights. Only a resume,
  ``--extend`` and population-based training need them. A checkpoint that is kept only for use has no such file.
- ``state.json``: step, best evaluation and last metrics, always needed.
- ``manifest.json``: sizes and hashes of the others; written last.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dist_ae.files import MAX_JSON, Damaged, parse_json, read_bounded, read_json, sync, to_json, verify_file, write_new

FORMAT = 1
WEIGHTS, OPTIMIZER, EMA = "weights.safetensors", "optimizer.safetensors", "ema.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
MAX_HEADER = 8 << 20  # bytes of a safetensors header

Tensors = dict[str, Tensor]
Template = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # the tensors a file must hold: name → shape, type


@dataclass
class Checkpoint:
    """What a run needs to resume: step, tensors by file, and the JSON state."""

    step: int
    files: dict[str, Tensors]
    state: dict[str, Any] = field(default_factory=dict)


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder, by its name; None for any other name."""
    return int(folder.name) if re.fullmatch(r"[0-9]{1,18}", folder.name) else None


def template_of(tensors: Mapping[str, Tensor]) -> Template:
    """The template of a file that holds these tensors."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes and syncs a new checkpoint folder."""
    os.mkdir(folder)
    contents = {name: safetensors.torch.save(tensors) for name, tensors in checkpoint.files.items()}
    contents[STATE] = to_json({"step": checkpoint.step, **checkpoint.state})
    entries = {}
    for name, data in contents.items():
        write_new(folder / name, data)
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_new(folder / MANIFEST, to_json({"format": FORMAT, "files": entries}))
    sync(folder)


def is_for_use(folder: Path) -> bool:
    """Whether a checkpoint is kept only for use, without optimizer state."""
    try:
        return OPTIMIZER not in _entries(folder)
    except Damaged:
        return False


def copy_for_use(folder: Path, target: Path) -> None:
    """Copies a checkpoint without its optimizer state into a new folder, verifies and syncs it.

    Raises:
        Damaged: the checkpoint is not whole.
    """
    entries = {name: entry for name, entry in _entries(folder).items() if name != OPTIMIZER}
    os.mkdir(target)
    for name, entry in entries.items():
        write_new(target / name, _content(folder, name, entry, int(entry.get("bytes") or 0)))
    write_new(target / MANIFEST, to_json({"format": FORMAT, "files": entries}))
    sync(target)


# -- reading without trust


def parse_tensors(data: bytes, name: str, template: Template | None = None) -> Tensors:
    """The tensors of a safetensors file, all of them finite; with a template, exactly the tensors that it names.

    Raises:
        Damaged: naming the file and what is wrong with it.
    """
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header > min(MAX_HEADER, len(data) - 8):
        raise Damaged(f"{name}: not a safetensors file (header of {header} bytes in {len(data)})")
    names = set(parse_json(data[8 : 8 + header], name)) - {"__metadata__"}
    if template is not None and names != set(template):
        unexpected = sorted(names ^ set(template))[:3]
        raise Damaged(f"{name}: other tensors than this model's ({', '.join(unexpected)} …)")
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise Damaged(f"{name}: not a safetensors file ({error})") from None
    for key, tensor in tensors.items():
        if template is not None and (tuple(tensor.shape), tensor.dtype) != template[key]:
            raise Damaged(
                f"{name}: {key} is {tuple(tensor.shape)} {tensor.dtype}, expected {template[key][0]} {template[key][1]}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Damaged(f"{name}: {key} holds values that are not finite")
    return tensors


def _bytes_of(template: Template) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in template.values()) + MAX_HEADER


def _entries(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint as its manifest names them."""
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder.name}: not a folder")
    manifest = read_json(folder / MANIFEST)
    entries = manifest.get("files")
    if (
        manifest.get("format") != FORMAT
        or not isinstance(entries, dict)
        or not {WEIGHTS, STATE} <= set(entries) <= {WEIGHTS, OPTIMIZER, EMA, STATE}
        or not all(isinstance(entry, dict) for entry in entries.values())
    ):
        raise Damaged(f"{folder.name}/{MANIFEST}: not a manifest of format {FORMAT}")
    return entries


def _content(folder: Path, name: str, entry: Mapping[str, Any], limit: int) -> bytes:
    data = read_bounded(folder / name, limit)
    if entry.get("bytes") != len(data):
        raise Damaged(f"{folder.name}/{name}: {len(data)} bytes, which differs from the manifest")
    if entry.get("sha256") != hashlib.sha256(data).hexdigest():
        raise Damaged(f"{folder.name}/{name}: its SHA-256 differs from the manifest")
    return data


def _state(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    state = parse_json(_content(folder, STATE, entries[STATE], MAX_JSON), f"{folder.name}/{STATE}")
    if state.get("step") != step_of(folder) or isinstance(state.get("step"), bool):
        raise Damaged(f"{folder.name}/{STATE}: of step {state.get('step')!r}")
    return state


def read_checkpoint(folder: Path, templates: Mapping[str, Template], part: bool = False) -> Checkpoint:
    """Reads and verifies a checkpoint folder: manifest, sizes, SHA-256, then names, shapes, types and finiteness.

    Args:
        templates: the tensors that each file must hold. They also bound how much is read.
        part: ignore files without a template, and allow files to be missing.

    Raises:
        Damaged: naming the file and what is wrong. Nothing of a damaged checkpoint is executed or kept, and memory
            stays within twice the size of the templates.
    """
    entries = _entries(folder)
    if not part and set(entries) - {STATE} != set(templates):
        expected = ", ".join(sorted([*templates, STATE]))
        raise Damaged(f"{folder.name}: holds {', '.join(sorted(entries))}; expected {expected}")
    files = {}
    for name, template in templates.items():
        if name in entries:
            data = _content(folder, name, entries[name], _bytes_of(template))
            files[name] = parse_tensors(data, f"{folder.name}/{name}", template)
    state = _state(folder, entries)
    return Checkpoint(int(state["step"]), files, state)


def verify_checkpoint(folder: Path) -> tuple[int, int]:
    """(step, bytes) of a checkpoint whose files match its manifest. Never holds a whole file in memory.

    Raises:
        Damaged: naming the file and what is wrong.
    """
    entries, total = _entries(folder), 0
    for name, entry in entries.items():
        total += verify_file(folder / name, entry.get("bytes"), entry.get("sha256"))
    return int(_state(folder, entries)["step"]), total
