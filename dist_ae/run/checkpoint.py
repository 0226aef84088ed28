"""The run directory: one writer, checkpoints that survive any crash, and a reader that trusts nothing it finds.

Everything is safetensors or JSON; no pickle is written or read. Nothing in it depends on a rank or on the number of processes.
Only rank 0 needs to see the directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dist_ae import files

write_atomically, _write_new, _sync_folder = files.write_atomically, files.write_new, files.sync_folder

FORMAT = 1
WEIGHTS, OPTIMIZER, EMA, STATE, MANIFEST = (
    "weights.safetensors",
    "optimizer.safetensors",
    "ema.safetensors",
    "state.json",
    "manifest.json",
)
MAX_JSON = 1 << 20  # bytes; ours are a few KB. A larger one was not written here and is not parsed
MAX_HEADER = 8 << 20  # bytes of a safetensors header

Tensors = dict[str, Tensor]
Template = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # the tensors a file must hold: name → shape, type


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says which file and what is wrong with it."""


@dataclass
class Checkpoint:
    """What a run needs to go on: step, tensors by file, and the JSON state."""

    step: int
    files: dict[str, Tensors]
    state: dict[str, Any] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------- durable files


def _remove_folder(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in os.listdir(path):
        _remove_folder(path / name)
    os.rmdir(path)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=True) + "\n").encode()


# ------------------------------------------------------------------------------------------------ reading with suspicion


def _read(folder: Path, name: str, limit: int) -> bytes:
    try:
        # Neither a link out of the folder nor a pipe that blocks the open is followed.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Damaged(
            f"{folder.name}/{name}: {'a symbolic link' if error.errno == errno.ELOOP else error.strerror}"
        ) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Damaged(f"{folder.name}/{name}: not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise Damaged(f"{folder.name}/{name}: {status.st_size} bytes, more than the {limit} it can have")
        return file.read()


def _parse(data: bytes, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise Damaged(f"{name}: a key stands in it twice")
        return keys

    try:
        value = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: not JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{name}: not a JSON object")
    return value


def parse_tensors(data: bytes, name: str, template: Template | None = None) -> Tensors:
    """Tensors of a safetensors file, each finite; with a template, exactly those.

    Raises:
        Damaged: naming the file and what is wrong with it.
    """
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header > min(MAX_HEADER, len(data) - 8):
        raise Damaged(f"{name}: not a safetensors file (header of {header} bytes in {len(data)})")
    names = set(_parse(data[8 : 8 + header], name)) - {"__metadata__"}
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


def read_checkpoint(folder: Path, templates: Mapping[str, Template] | None = None) -> Checkpoint:
    """Reads and verifies a checkpoint folder: manifest, sizes, SHA-256, then names, shapes, types and finiteness.

    Args:
        templates: the tensors each file must hold. Without, any model's are accepted (``doctor`` knows no model).

    Raises:
        Damaged: naming the file and what is wrong. Nothing of a damaged checkpoint is executed or kept; memory stays within
            twice what the template needs.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder.name}: not a folder")
    manifest = _parse(_read(folder, MANIFEST, MAX_JSON), f"{folder.name}/{MANIFEST}")
    entries = manifest.get("files")
    allowed = {WEIGHTS, OPTIMIZER, EMA, STATE}
    if (
        manifest.get("format") != FORMAT
        or not isinstance(entries, dict)
        or not {WEIGHTS, STATE} <= set(entries) <= allowed
    ):
        raise Damaged(f"{folder.name}/{MANIFEST}: not a manifest of format {FORMAT}")
    if templates is not None and set(entries) - {STATE} != set(templates):
        raise Damaged(
            f"{folder.name}: holds {', '.join(sorted(entries))}; expected {', '.join(sorted([*templates, STATE]))}"
        )
    files: dict[str, Tensors] = {}
    state: dict[str, Any] = {}
    for name, entry in entries.items():
        where = f"{folder.name}/{name}"
        limit = MAX_JSON if name == STATE else (2**63 if templates is None else _bytes_of(templates[name]))
        data = _read(folder, name, limit)
        if not isinstance(entry, dict) or entry.get("bytes") != len(data):
            raise Damaged(f"{where}: {len(data)} bytes, not what the manifest says")
        if entry.get("sha256") != hashlib.sha256(data).hexdigest():
            raise Damaged(f"{where}: its SHA-256 is not what the manifest says")
        if name == STATE:
            state = _parse(data, where)
        else:
            files[name] = parse_tensors(data, where, None if templates is None else templates[name])
    if state.get("step") != _step_of(folder) or isinstance(state.get("step"), bool):
        raise Damaged(f"{folder.name}/{STATE}: of step {state.get('step')!r}")
    return Checkpoint(int(state["step"]), files, state)


def _step_of(folder: Path) -> int | None:
    return int(folder.name) if re.fullmatch(r"[0-9]{1,18}", folder.name) else None


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
