"""Packs pictures once: resumed after a kill, whole or not at all, and safe when several processes begin it.

``packed.py`` says what a packed set is. Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import ValidationError

from dist_ae.config import DataConfig, InputError
from dist_ae.data.decode import CHUNK, INLINE, DecoderKilled, decoded, some
from dist_ae.data.deep import widened
from dist_ae.data.facts import Facts, look_alikes, summary, table
from dist_ae.data.form import Form, decode_all
from dist_ae.data.packed import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST,
    TRAIN_KEY,
    VAL_KEY,
    FileRecord,
    Manifest,
    ShardRecord,
    file_name,
    packed_facts,
    read_manifest,
    settings_of,
    sha256_of,
)
from dist_ae.data.pictures import Picture, Source, expand, fit_of, form_of, open_source, paged, shown
from dist_ae.data.records import Array, npy_header
from dist_ae.files import Damaged, clear_temporaries, inside, plain_name, read_bounded, sync, write_atomically
from dist_ae.terminal import EXIT_STOPPED, Waiting, rank, say

SHARD_BYTES = 2**28  # of images in a shard: the most that a kill costs, and the unit of `data.window`
PROGRESS = "progress.json"
Check = Callable[[], None]  # raises where a signal asked to stop
NAMED = 5  # unreadable pictures that a message names


class PackingStopped(Exception):
    """A signal stopped the packing; what is packed so far is kept and the same command goes on from there."""

    exit_status = EXIT_STOPPED


# ------------------------------------------------------------------------------------------------------------- packing


def pack(source: Source, out: Path, config: DataConfig, what: str, shard_bytes: int | None = None) -> Manifest:
    """Packs a source into the folder ``out``, unless this or another process has done that already.

    Killed at any time, the same call resumes after the last whole shard. Processes that want the same set wait for the
    one that packs.

    Args:
        config: image size, fit, channels, background, and what to do about pictures that cannot be read.
        what: the source in words, for messages.
        shard_bytes: most bytes of images in a shard.

    Raises:
        InputError: pictures that cannot be read or differ in size, no room, no permission, a source that changes.
    """
    source = paged(source, config.pages)
    wanted = Manifest(
        format=FORMAT,
        identity=source.identity,
        settings=settings_of(config),
        shard_bytes=shard_bytes or SHARD_BYTES,
        ignored=dict(source.ignored),
    )
    form_of(config, "rgb")  # a background that is no colour is found before anything is made
    try:
        if not (out / MANIFEST).exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out.parent):  # fails at once, where FileLock would keep waiting
                pass
            lock_path = out.with_name(f".{out.name}.lock")
            with _obeying_signals(what) as check, _only_one(lock_path, what, check):
                if not (out / MANIFEST).exists():
                    _pack(source, out, wanted, config, what, check)
            lock_path.unlink(missing_ok=True)  # whoever still waits for it finds the packed set
    except OSError as error:
        raise _no_room(error, out, config) from None
    except NotImplementedError:
        raise InputError(
            f"{shown(out.parent)}: this file system has no locks; pack on another one, and copy the packed set here"
        ) from None
    manifest = read_manifest(out)
    if (manifest.identity, manifest.settings) != (wanted.identity, wanted.settings):
        raise InputError(f"{shown(out)} holds other pictures or settings: remove it, or give another name")
    refuse_unreadable(what, manifest.unreadable, manifest.read, manifest.reasons, config)
    return manifest


def _no_room(error: OSError, out: Path, config: DataConfig) -> InputError:
    where = shown(error.filename) if error.filename else shown(out)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{shown(out)}: the disk is full; make room there and run the same command again, which resumes, "
            "or give another place: --data.cache DIR, or another OUT of `dist-ae pack`"
            + ("; --data.budget GB keeps larger sets as their files are" if fit_of(config) == "whole" else "")
        )
    return InputError(
        f"{where}: cannot be written ({error.strerror or error}); give another place: --data.cache DIR, or OUT of "
        "`dist-ae pack SOURCE OUT` with --data.name packed:OUT"
    )


@contextmanager
def _obeying_signals(what: str) -> Iterator[Check]:
    """A function that raises PackingStopped once SIGINT or SIGTERM has come, in place of the handlers before it."""
    received: list[int] = []

    def check() -> None:
        if received:
            raise PackingStopped(f"stopped while {what} was being packed; the same command goes on from there")

    if threading.current_thread() is not threading.main_thread():  # a sweep's actor: nothing to handle
        yield check
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_one(lock_path: Path, what: str, check: Check) -> Iterator[None]:
    """Holds a lock that a dead process cannot keep, and says so while another one has it."""
    lock = FileLock(lock_path)
    for attempt in itertools.count():
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            check()
            if attempt == 0:
                _say(f"waiting for another process that packs {what}")
    try:
        yield
    finally:
        lock.release()


def _say(text: str) -> None:
    if rank() == 0:
        say(text, sys.stderr)


def _pack(source: Source, out: Path, wanted: Manifest, config: DataConfig, what: str, check: Check) -> None:
    partial = out.with_name(f"{out.name}.partial")
    done = _progress(partial, wanted)
    if done is None:
        _remove(partial)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{shown(out)} exists and is no packed set: give another name")
        partial.mkdir()
        done = wanted.model_copy(deep=True)
        write_atomically(partial / PROGRESS, _json(done))
    else:
        clear_temporaries(partial)
        _say(f"resuming at picture {done.read:,}")
    count = f"{source.count:,} " if source.count is not None else ""
    _say(f"packing {count}pictures of {what} into {shown(out)}")
    try:
        done = _write_all(source, partial, done, wanted, config, what, check)
    except DecoderKilled as error:
        raise InputError(f"{error}; the same command goes on from there") from None
    except InputError:  # other pictures or settings are needed, and nothing here is of use to them
        _remove(partial)
        raise
    if source.identify() != source.identity:
        _remove(partial)
        raise InputError(f"{what} changed while it was being packed; start again when it is at rest")
    if not done.shards:
        _remove(partial)
        first = "; ".join(f"{name}: {why}" for name, why in done.reasons)
        raise InputError(
            f"{what}: none of its {done.unreadable:,} pictures can be read ({first})"
            if done.unreadable
            else f"{what}: no pictures in it"
        )
    # Unreadable pictures are refused once all are packed: the message counts them, and `skip` then has no work left.
    refuse_unreadable(what, done.unreadable, done.read, done.reasons, config)
    done = done.model_copy(update={"looked": _looked(partial, done, grouped=config.group is not None)})
    write_atomically(partial / MANIFEST, _json(done))
    (partial / PROGRESS).unlink()
    if out.is_dir():
        out.rmdir()  # an empty folder that was made for it
    os.rename(partial, out)
    sync(out.parent)


def _looked(folder: Path, manifest: Manifest, grouped: bool) -> dict[str, Any]:
    """What is said of the pictures that were packed."""
    facts = packed_facts(folder, manifest)
    if facts is None:  # a process of an older version began it
        return {}
    keys = [np.load(folder / file_name("keys", number), allow_pickle=False) for number in range(len(manifest.shards))]
    held_out = np.concatenate(keys) == VAL_KEY
    return {**summary(facts, held_out, look_alikes(facts)), "grouped": grouped}


def _write_all(
    source: Source, partial: Path, done: Manifest, wanted: Manifest, config: DataConfig, what: str, check: Check
) -> Manifest:
    """Writes the shards; where all pictures seemed grey, or of 8 bits, and one is not, writes them again."""
    guess, rgba = (config.channels or "auto") == "auto", config.channels == "rgba"
    colour = config.channels == "rgb" or (done.image_shape is not None and done.image_shape[0] == 3)
    if config.bits == "16":
        done.dtype = "uint16"
    if done.image_shape is None and not rgba and (guess or config.bits == "auto"):
        # Most sets are all grey or all in colour, so the first pictures tell. A wrong guess costs what was packed until
        # the first picture in colour, or of 16 bits.
        contents = [picture.content for picture in some(source.pictures(), INLINE)]
        first = [read.image for read in decode_all(contents, form_of(config, "grey", (1, 1), guess))]
        colour |= any(image is None for image in first)
        if any(isinstance(image, np.ndarray) and image.dtype == np.uint16 for image in first):
            done.dtype = "uint16"
    while True:
        kind = "rgba" if rgba else "rgb" if colour else "grey"
        form = form_of(config, kind, colour_is_news=guess and not colour)
        try:
            return _write_shards(source, partial, done, form, config, what, check)
        except _AllAnew as met:
            colour |= met.form == "colour"
            dtype, encoded = "uint16" if met.form == "deep" else done.dtype, done.encoded or met.form == "encoded"
            _remove(partial)
            partial.mkdir()
            done = wanted.model_copy(deep=True, update={"dtype": dtype, "encoded": encoded})


def refuse_unreadable(
    what: str,
    unreadable: int,
    read: int,
    reasons: Sequence[tuple[str, str]],
    config: DataConfig,
    or_skip: str = "add --data.corrupt skip (of `dist-ae pack`: --corrupt skip)",
) -> None:
    """Raises InputError for pictures that cannot be read, unless they are to be skipped."""
    if unreadable and config.corrupt == "refuse":
        first = "; ".join(f"{name}: {why}" for name, why in reasons)
        more = ", …" if unreadable > len(reasons) else ""
        of = f"{unreadable:,} of {read:,} pictures"
        raise InputError(f"{what}: {of} cannot be read ({first}{more}); mend or remove them, or {or_skip}")


def _progress(partial: Path, wanted: Manifest) -> Manifest | None:
    """How far a killed process got with the same pictures and settings; None where there is nothing to resume."""
    try:
        done = Manifest.model_validate_json(read_bounded(inside(partial.parent, partial.name, PROGRESS), MAX_MANIFEST))
    except (Damaged, ValidationError):
        return None
    same = {"format", "identity", "settings", "shard_bytes"}
    return done if done.model_dump(include=same) == wanted.model_dump(include=same) else None


class _AllAnew(Exception):
    """A picture in colour where all before it were grey, or of 16 bits where all had 8, or pixels beyond the budget."""

    def __init__(self, form: Literal["colour", "deep", "encoded"]) -> None:
        super().__init__()
        self.form = form


def _write_shards(
    source: Source, partial: Path, done: Manifest, form: Form, config: DataConfig, what: str, check: Check
) -> Manifest:
    """Writes the missing shards, and after each one how far the packing has got."""
    classes = {name: number for number, name in enumerate(done.classes or source.classes)}
    # Whether labels so far are numbers: a number cannot be told from the place of a name, so they are of one kind.
    before = [np.load(partial / file_name("labels", n), allow_pickle=False) for n in range(len(done.shards))]
    numbered = {not done.classes} if any((labels >= 0).any() for labels in before) else set[bool]()
    shard: _Shard | None = None
    pictures = itertools.islice(source.pictures(), done.read, None)
    sides = _Sides(config.group)
    for number, record in enumerate(done.shards):  # of a process that was killed
        if "facts" in record.files:
            sides.recall(
                *(np.load(partial / file_name(kind, number), allow_pickle=False) for kind in ("facts", "keys"))
            )

    def publish() -> None:
        nonlocal shard, done
        update: dict[str, Any] = {"classes": list(classes), "read": done.read}
        if shard is not None:
            update["shards"] = [*done.shards, shard.finish()]
            shard = None
        done = done.model_copy(update=update)
        write_atomically(partial / PROGRESS, _json(done))

    try:
        with _progress_bar(done.read, source.count) as advance:
            for picture, (result, facts) in decoded(pictures, form, source.count):
                if result is None:
                    raise _AllAnew("colour")
                check()
                done.read += 1
                advance()
                if isinstance(result, str) or facts is None:
                    done.unreadable += 1
                    if len(done.reasons) < NAMED:
                        done.reasons.append((shown(picture.name), str(result)))
                    continue
                if result.dtype == np.uint16 and done.dtype == "uint8":
                    raise _AllAnew("deep")
                if done.dtype == "uint16":
                    if result.dtype == np.uint8:
                        result, done.shallow = widened(result), done.shallow + 1
                    done.low, done.high = min(done.low, int(result.min())), max(done.high, int(result.max()))
                content = b""  # what is packed in place of the pixels
                if picture.pages > 1:
                    done.pages, done.paged_files = done.pages + picture.pages, done.paged_files + 1
                if done.whole:
                    if result.ndim == 4:
                        raise InputError(f"{what}: data.crop is of pictures, and data.pages volume makes none of them")
                    done.pixels += result.nbytes
                    expected = (source.count or 0) * result.nbytes if done.image_shape is None else 0
                    beyond = config.budget is not None and max(done.pixels, expected) > config.budget * 1e9
                    if beyond and not done.encoded:
                        _say(f"more than {config.budget:g} GB of pixels: the bytes of the files are packed")
                        raise _AllAnew("encoded")
                    content = _bytes_of(picture) if done.encoded else content
                    if done.image_shape is None:
                        done.image_shape = (len(result), 0, 0)
                        _check_room(partial, source.count, len(content) or result.nbytes)
                elif done.image_shape is None:
                    if result.ndim == 4:
                        done.record_shape = result.shape
                    done.image_shape = (result.shape[0], math.prod(result.shape[1:-1]), result.shape[-1])
                    _check_room(partial, source.count, result.nbytes)
                elif result.shape != (first := done.record_shape or done.image_shape):
                    way_out = (
                        "give them one size with --data.image-size S (of `dist-ae pack`: --image-size S), or train on "
                        "crops of whole pictures with --data.crop 64 (of `dist-ae pack`: --fit whole)"
                    )
                    if result.ndim == 4 and result.shape[1] != first[1]:
                        way_out = "give them one depth first, or take --data.pages each"
                    raise InputError(
                        f"{what}: {shown(picture.name)} is {_size(result.shape)}, and pictures before it are "
                        f"{_size(first)}; {way_out}"
                    )
                if shard is None:
                    shard = _Shard(partial, len(done.shards), done)
                label = picture.label
                if isinstance(label, str):  # printable: a manifest is JSON, which has no bytes that are no UTF-8
                    label = classes.setdefault(shown(label), len(classes))
                if label is not None:
                    numbered |= {isinstance(picture.label, int)}
                if len(numbered) > 1 and not source.classes:
                    raise InputError(
                        f"{what}: {shown(picture.name)} has the label {shown(str(picture.label))!r}, and those before "
                        "it are of the other kind; give all of them numbers, or all of them names"
                    )
                key = sides.key_of(picture, facts.digest)
                shard.add(result, content, -1 if label is None else label, key, picture.name, facts)
                if shard.full:
                    publish()
            publish()
    finally:
        if shard is not None:
            shard.abandon()
    return done


def _bytes_of(picture: Picture) -> bytes:
    """A picture as its file has it."""
    content = picture.content
    if isinstance(content, bytes):
        return content
    assert isinstance(content, str)  # `pack` takes no single pages with a budget
    return Path(content).read_bytes()


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]}×{shape[-2]}" + (f" of {shape[1]} pages" if len(shape) == 4 else "")


class _Sides:
    """Where pictures lie on [0, 2^64), which decides on which side of the split they are.

    It is a hash of the name, so pictures that are added later move no other one to the other side. Pictures of one
    group lie in one place, and copies (files of the same bytes) where the first of them lies: a copy of what was
    trained on says nothing about what was not.
    """

    def __init__(self, group: str | None) -> None:
        self._group = None if group is None else _pattern(group)
        self._seen: dict[int, int] = {}  # digest → key of the first picture that has it

    def recall(self, facts: Array, keys: Array) -> None:
        for digest, key in zip(facts["digest"].tolist(), keys.tolist(), strict=True):
            self._seen.setdefault(digest, key)

    def key_of(self, picture: Picture, digest: int) -> int:
        if picture.split is not None:
            return VAL_KEY if picture.split == "val" else TRAIN_KEY
        name = picture.file or picture.name  # pages of one file lie in one place
        if self._group is not None:
            found = self._group.search(name)
            if found:
                return _hashed((found[1] if self._group.groups else found[0]) or found[0])
            return _hashed(name)
        return self._seen.setdefault(digest, _hashed(name))


def _hashed(name: str) -> int:
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return min(max(int.from_bytes(digest, "little"), VAL_KEY + 1), TRAIN_KEY - 1)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"data.group: {text!r} is no regular expression ({error}), such as 'patient_[0-9]+'") from None


def _check_room(partial: Path, count: int | None, num_bytes: int) -> None:
    """Refuses work that has no room to finish, before hours are spent on it."""
    needed, free = (count or 0) * num_bytes, shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes needed, {free:,} free")


class _Shard:
    """A shard that is being written: images as they come, the rest at the end."""

    def __init__(self, folder: Path, number: int, manifest: Manifest) -> None:
        assert manifest.image_shape is not None
        self.folder, self.number, self.image_shape = folder, number, manifest.image_shape
        self.whole, self.encoded, self.shard_bytes = manifest.whole, manifest.encoded, manifest.shard_bytes
        self.dtype = np.dtype(np.uint8 if self.encoded else manifest.dtype)
        self.sizes: list[tuple[int, int]] = []
        self.ends: list[int] = []
        self.capacity = max(1, self.shard_bytes // max(1, self.dtype.itemsize * int(np.prod(self.image_shape))))
        self.labels: list[int] = []
        self.keys: list[int] = []
        self.names: list[str] = []
        self.facts: list[Facts] = []
        self._temporary = folder / f".{file_name('images', number)}.tmp"
        self._file = self._temporary.open("w+b")
        self._digest = hashlib.sha256()
        self._write(npy_header(self._shape(self.capacity), self.dtype))

    def _shape(self, images: int) -> tuple[int, ...]:
        """Of the array of images: flat for whole pictures, whose sizes are beside it."""
        if self.encoded:
            return (self.ends[-1] if self.ends else 0,)
        if self.whole:
            return (self.image_shape[0] * sum(height * width for height, width in self.sizes),)
        return (images, *self.image_shape)

    @property
    def full(self) -> bool:
        if self.whole:
            return self._shape(0)[0] * self.dtype.itemsize >= self.shard_bytes
        return len(self.labels) == self.capacity

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)

    def add(self, image: Array, content: bytes, label: int, key: int, name: str, facts: Facts) -> None:
        """Args:
        content: the bytes of the file, where pictures stay encoded.
        """
        if self.whole:
            self.sizes.append((image.shape[1], image.shape[2]))
            image = np.ascontiguousarray(image.transpose(1, 2, 0))
        if self.encoded:
            self.ends.append((self.ends[-1] if self.ends else 0) + len(content))
        self._write(content if self.encoded else image.data)
        self.facts.append(facts)
        self.labels.append(label)
        self.keys.append(key)
        self.names.append(name)

    def finish(self) -> ShardRecord:
        """Puts the shard on the disk under its names."""
        if self.whole or not self.full:  # its header needs the true count, and the hash starts with the header
            self._file.seek(0)
            self._file.write(npy_header(self._shape(len(self.labels)), self.dtype))
            self._file.seek(0)
            self._digest = sha256_of(self._file)
        self._file.flush()
        os.fsync(self._file.fileno())
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        os.replace(self._temporary, self.folder / file_name("images", self.number))
        files = {"images": FileRecord(bytes=size, sha256=self._digest.hexdigest())}
        for kind, content in (
            ("labels", _npy(np.array(self.labels, np.int64))),
            ("keys", _npy(np.array(self.keys, np.uint64))),
            ("names", json.dumps(self.names).encode()),
            ("facts", _npy(table(self.facts))),
            *([("sizes", _npy(np.array(self.sizes, np.int64)))] if self.whole else []),
            *([("ends", _npy(np.array(self.ends, np.int64)))] if self.encoded else []),
        ):
            write_atomically(self.folder / file_name(kind, self.number), content)
            files[kind] = FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        return ShardRecord(images=len(self.labels), files=files)

    def abandon(self) -> None:
        self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk does not take what is left in the buffer
            self._file.close()


def _npy(values: Array) -> bytes:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


def _json(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(), indent=1) + "\n").encode()


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _progress_bar(start: int, total: int | None) -> Iterator[Any]:
    """A function to call per picture; on a terminal it moves a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or rank() != 0:
        yield Waiting("packing", total, "pictures", start)
        return
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task, counter = bar.add_task("pack", total=total, completed=start), itertools.count(1)

        def advance() -> None:
            if next(counter) % CHUNK == 0:
                bar.advance(task, CHUNK)

        yield advance


# ---------------------------------------------------------------------------------------------- what the commands call


def pack_source(name: str, out: Path, config: DataConfig, shard_bytes: int | None = None) -> Manifest:
    """``dist-ae pack``: packs ``folder:``, ``tar:``, ``hf:`` or a bare path into ``out``."""
    out = Path(os.path.abspath(expand(out)))
    if not out.name:
        raise InputError(f"{out}: name a folder to make")
    from dist_ae.data.reads import Reads  # which knows all sources, this one too

    Reads(name).refuse(out, "OUT", folder=True)
    return pack(open_source(name, config), out, config, shown(name), shard_bytes)


def cached(name: str, source: Source, config: DataConfig, cache: Path) -> Path:
    """The packed form of a source in a cache, packed now if it is not there.

    Other pictures or settings get a place of their own.
    """

    def place(config: DataConfig) -> Path:
        key = hashlib.sha256(json.dumps([FORMAT, source.identity, settings_of(config)]).encode()).hexdigest()[:16]
        return cache / "packed" / f"{plain_name(shown(name))[:40] or 'data'}-{key}"

    # A run keeps the bits that its pictures were found to have. What was packed while that was open is the same.
    open_ = config.model_copy(update={"bits": "auto"})
    if (place(open_) / MANIFEST).exists() and read_manifest(place(open_)).dtype == f"uint{config.bits}":
        config = open_
    out = place(config)
    manifest = pack(source, out, config, shown(name))
    left_out = [f"{count:,} {what}" for what, count in manifest.ignored.items()]
    left_out += [f"{manifest.unreadable:,} that cannot be read"] if manifest.unreadable else []
    if left_out:
        _say(f"note: left out of {shown(name)}: {'; '.join(left_out)}")
    for note in source.notes:
        _say(f"note: {note}")
    return out
