"""Pictures packed once into fixed-size bytes: shards that training maps into memory, and a manifest that says what
they are.

A packed set is a folder: ``manifest.json`` and per shard ``images-00000.npy`` (uint8 [n, C, H, W]),
``labels-00000.npy`` (int64 [n], -1 where there is none), ``keys-00000.npy`` (uint64 [n], where a picture lies on [0,
2^64): what is below the validation fraction is held out) and ``names-00000.json``. Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from dist_ae.config import DataConfig, InputError
from dist_ae.data.pictures import Decoded, Form, Picture, Source, decode_all, expand, form_of, open_source, shown
from dist_ae.data.records import Array, Dataset, Shards, Split
from dist_ae.files import sync, write_atomically
from dist_ae.terminal import EXIT_STOPPED, rank

FORMAT = 1
SHARD_BYTES = 2**28  # of images in a shard: what a kill costs at most, and what `data.window` counts in
CHUNK = 32  # pictures that a decoding process gets at once
INLINE = 64  # so few pictures are decoded before a process has started
MANIFEST, PROGRESS = "manifest.json", "progress.json"
KINDS = {"images": "npy", "labels": "npy", "keys": "npy", "names": "json"}
VAL_KEY, TRAIN_KEY = 0, 2**64 - 1  # the keys of pictures whose source says on which side they are
Check = Callable[[], None]  # raises where a signal asked to stop
NAMED = 5  # unreadable pictures that are named


class PackingStopped(Exception):
    """A signal stopped the packing; what is packed so far is kept and the same command goes on from there."""

    exit_status = EXIT_STOPPED


class FileRecord(BaseModel):
    bytes: int = Field(ge=0)
    sha256: str


class ShardRecord(BaseModel):
    images: int = Field(gt=0)
    files: dict[str, FileRecord]


class Manifest(BaseModel):
    """What a packed set holds, and by which settings its pictures got their size."""

    format: int
    identity: str
    settings: dict[str, Any]
    shard_bytes: int
    image_shape: tuple[int, int, int] | None = None
    classes: list[str] = []
    ignored: dict[str, int] = {}
    read: int = 0  # pictures of the source that are dealt with, readable or not
    unreadable: int = 0
    reasons: list[tuple[str, str]] = []  # the first unreadable ones
    shards: list[ShardRecord] = []

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)


def file_name(kind: str, shard: int) -> str:
    """The file of a shard that holds its images, labels, keys or names."""
    return f"{kind}-{shard:05d}.{KINDS[kind]}"


def settings_of(config: DataConfig) -> dict[str, Any]:
    """What decides how pictures come out, with every default filled in."""
    return {
        "image_size": config.image_size,
        "fit": config.fit or "crop",
        "channels": config.channels or "auto",
        "background": config.background or "white",
    }


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
            with tempfile.TemporaryFile(dir=out.parent):  # said at once: a lock that cannot be made is waited for
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
        )
    return InputError(
        f"{where}: cannot be written ({error.strerror or error}); give another place: --data.cache DIR, or OUT of "
        "`dist-ae pack SOURCE OUT` with --data.name packed:OUT"
    )


@contextmanager
def _obeying_signals(what: str) -> Iterator[Check]:
    """A function that raises PackingStopped once SIGINT or SIGTERM has come, whatever else listened to them before."""
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
        print(text, file=sys.stderr, flush=True)


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
        _say(f"resuming at picture {done.read:,}")
    count = f"{source.count:,} " if source.count is not None else ""
    _say(f"packing {count}pictures of {what} into {shown(out)}")
    try:
        done = _write_all(source, partial, done, wanted, config, what, check)
    except DecoderKilled:
        raise
    except InputError:  # other pictures or settings are needed, for which nothing here is of use
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
    # Unreadable pictures are refused after all are packed: the message counts them, and `skip` has nothing left to do.
    refuse_unreadable(what, done.unreadable, done.read, done.reasons, config)
    write_atomically(partial / MANIFEST, _json(done))
    (partial / PROGRESS).unlink()
    if out.is_dir():
        out.rmdir()  # an empty folder that was made for it
    os.rename(partial, out)
    sync(out.parent)


def _write_all(
    source: Source, partial: Path, done: Manifest, wanted: Manifest, config: DataConfig, what: str, check: Check
) -> Manifest:
    """Writes the shards; where all pictures seemed grey and one is not, again in colour."""
    channels = config.channels or "auto"
    if channels != "auto":
        return _write_shards(source, partial, done, form_of(config, channels), what, check)
    if done.image_shape is None:
        # Most sets are all grey or all in colour, so the first pictures tell; a wrong guess costs what was packed
        # until then.
        contents = [picture.content for picture in itertools.islice(source.pictures(), INLINE)]
        colour = any(result is None for result in decode_all(contents, form_of(config, "grey", (1, 1), True)))
    else:
        colour = done.image_shape[0] == 3
    if not colour:
        try:
            return _write_shards(source, partial, done, form_of(config, "grey", colour_is_news=True), what, check)
        except _AllAnew:
            _remove(partial)
            partial.mkdir()
            done = wanted.model_copy(deep=True)
    return _write_shards(source, partial, done, form_of(config, "rgb"), what, check)


def refuse_unreadable(
    what: str, unreadable: int, read: int, reasons: Sequence[tuple[str, str]], config: DataConfig
) -> None:
    """Raises InputError for pictures that cannot be read, unless they are to be skipped."""
    if unreadable and config.corrupt == "refuse":
        first = "; ".join(f"{name}: {why}" for name, why in reasons)
        more = ", …" if unreadable > len(reasons) else ""
        of = f"{unreadable:,} of {read:,} pictures"
        raise InputError(
            f"{what}: {of} cannot be read ({first}{more}); mend or remove them, or add --data.corrupt skip "
            "(of `dist-ae pack`: --corrupt skip)"
        )


def _progress(partial: Path, wanted: Manifest) -> Manifest | None:
    """How far a killed process came with the same pictures and settings."""
    try:
        done = Manifest.model_validate_json((partial / PROGRESS).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    same = {"format", "identity", "settings", "shard_bytes"}
    return done if done.model_dump(include=same) == wanted.model_dump(include=same) else None


class _AllAnew(Exception):
    """A picture in colour where all before it were grey."""


def _write_shards(source: Source, partial: Path, done: Manifest, form: Form, what: str, check: Check) -> Manifest:
    """Writes what is missing, shard by shard, and after each how far it came."""
    classes = {name: number for number, name in enumerate(done.classes or source.classes)}
    shard: _Shard | None = None
    pictures = itertools.islice(source.pictures(), done.read, None)

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
            for picture, result in decoded(pictures, form, source.count):
                if result is None:
                    raise _AllAnew
                check()
                done.read += 1
                advance()
                if isinstance(result, str):
                    done.unreadable += 1
                    if len(done.reasons) < NAMED:
                        done.reasons.append((shown(picture.name), result))
                    continue
                if done.image_shape is None:
                    done.image_shape = result.shape
                    _check_room(partial, source.count, result.nbytes)
                elif result.shape != done.image_shape:
                    raise InputError(
                        f"{what}: {shown(picture.name)} is {_size(result.shape)}, and pictures before it are "
                        f"{_size(done.image_shape)}; "
                        "give them one size with --data.image-size S (of `dist-ae pack`: --image-size S)"
                    )
                if shard is None:
                    shard = _Shard(partial, len(done.shards), done.image_shape, done.shard_bytes)
                label = picture.label
                if isinstance(label, str):
                    label = classes.setdefault(label, len(classes))
                shard.add(result, -1 if label is None else label, key_of(picture), picture.name)
                if shard.full:
                    publish()
            publish()
    finally:
        if shard is not None:
            shard.abandon()
    return done


def _size(shape: Sequence[int]) -> str:
    return f"{shape[2]}×{shape[1]}"


def key_of(picture: Picture) -> int:
    """Where a picture lies on [0, 2^64): a hash of its name, so that pictures that come later move none to the other
    side."""
    if picture.split is not None:
        return VAL_KEY if picture.split == "val" else TRAIN_KEY
    digest = hashlib.blake2b(picture.name.encode(errors="surrogateescape"), digest_size=8).digest()
    return min(max(int.from_bytes(digest, "little"), VAL_KEY + 1), TRAIN_KEY - 1)


def _check_room(partial: Path, count: int | None, num_bytes: int) -> None:
    """Refuses before hours of work what cannot be finished."""
    needed, free = (count or 0) * num_bytes, shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes needed, {free:,} free")


class _Shard:
    """A shard that is being written: images as they come, the rest at the end."""

    def __init__(self, folder: Path, number: int, image_shape: tuple[int, int, int], shard_bytes: int) -> None:
        self.folder, self.number, self.image_shape = folder, number, image_shape
        self.capacity = max(1, shard_bytes // int(np.prod(image_shape)))
        self.labels: list[int] = []
        self.keys: list[int] = []
        self.names: list[str] = []
        self._temporary = folder / f".{file_name('images', number)}.tmp"
        self._file = self._temporary.open("w+b")
        self._digest = hashlib.sha256()
        self._write(_header((self.capacity, *image_shape)))

    @property
    def full(self) -> bool:
        return len(self.labels) == self.capacity

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)

    def add(self, image: Array, label: int, key: int, name: str) -> None:
        self._write(image.data)
        self.labels.append(label)
        self.keys.append(key)
        self.names.append(name)

    def finish(self) -> ShardRecord:
        """Puts the shard on the disk under its names."""
        if not self.full:  # the last one: its header says how many there are, and the hash starts with the header
            self._file.seek(0)
            self._file.write(_header((len(self.labels), *self.image_shape)))
            self._file.seek(0)
            self._digest = _sha256(self._file)
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
        ):
            write_atomically(self.folder / file_name(kind, self.number), content)
            files[kind] = FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        return ShardRecord(images=len(self.labels), files=files)

    def abandon(self) -> None:
        self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk does not take what is left in the buffer
            self._file.close()


def _header(shape: tuple[int, ...]) -> bytes:
    """The head of a .npy of uint8: 128 bytes, whatever the number of images."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": shape})
    assert content.tell() == 128
    return content.getvalue()


def _npy(values: Array) -> bytes:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


def _sha256(file: BinaryIO) -> Any:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest


def _json(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(), indent=1) + "\n").encode()


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------- processes that
# decode


class DecoderKilled(InputError):
    """What is packed so far stays of use."""


def decoded(pictures: Iterator[Picture], form: Form, count: int | None) -> Iterator[tuple[Picture, Decoded]]:
    """Each picture and what became of it, in order, decoded on all cores with a bounded number of them under way."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    head = list(itertools.islice(pictures, INLINE))
    if workers == 1 or len(head) < INLINE or count == INLINE:
        for picture in itertools.chain(head, pictures):
            yield picture, decode_all([picture.content], form)[0]
        return
    chunks = _chunks(itertools.chain(head, pictures))
    executor = ProcessPoolExecutor(workers, mp_context=_Context(), initializer=_begin)
    try:
        pending: deque[tuple[list[Picture], Future[list[Decoded]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, executor.submit(decode_all, [picture.content for picture in chunk], form)))
            if len(pending) >= 3 * workers:
                yield from _delivered(*pending.popleft())
        while pending:
            yield from _delivered(*pending.popleft())
    except BrokenProcessPool:
        raise DecoderKilled(
            "a process that decodes pictures was killed, most likely for lack of memory; the same command goes on "
            "from there"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _chunks(pictures: Iterator[Picture]) -> Iterator[list[Picture]]:
    while chunk := list(itertools.islice(pictures, CHUNK)):
        yield chunk


def _delivered(chunk: list[Picture], future: Future[list[Decoded]]) -> Iterator[tuple[Picture, Decoded]]:
    return zip(chunk, future.result(), strict=True)


def _begin() -> None:
    """Starts a decoding process: Ctrl-C is its parent's to handle, and it does not outlive it, however that one
    ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


class _Process(SpawnProcess):
    def start(self) -> None:
        # A spawned process imports the main script again, which would train again where it does so without a __main__
        # guard. What decodes needs nothing of it.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process  # fork would copy locks that torch's threads hold


@contextmanager
def _progress_bar(start: int, total: int | None) -> Iterator[Any]:
    """A function to call per picture; on a terminal it moves a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or rank() != 0:
        yield lambda: None
        return
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task, counter = bar.add_task("pack", total=total, completed=start), itertools.count(1)

        def advance() -> None:
            if next(counter) % CHUNK == 0:
                bar.advance(task, CHUNK)

        yield advance


# -------------------------------------------------------------------------------------------------------- packed sets


def is_packed(folder: Path) -> bool:
    """Whether a folder says that it is a packed set; a run directory has a ``config.json``."""
    return (folder / MANIFEST).is_file() and not (folder / "config.json").exists()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed set.

    Raises:
        InputError: none there, or none that was written here.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{shown(folder)} is no packed set: it has no {MANIFEST}")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, OSError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(f"{shown(path)} is damaged ({reason}); pack again") from None
    if manifest.format != FORMAT:
        raise InputError(f"{shown(path)}: format {manifest.format}; this version reads format {FORMAT}")
    if manifest.image_shape is None or not manifest.shards or any(n < 1 for n in manifest.image_shape):
        raise InputError(f"{shown(path)} is damaged (no images); pack again")
    if any(set(shard.files) != set(KINDS) for shard in manifest.shards):
        raise InputError(f"{shown(path)} is damaged (files missing from it); pack again")
    return manifest


def examine_packed(folder: Path) -> Iterator[tuple[bool, str]]:
    """(whole, what) for each shard of a packed set: every byte is read and compared with the manifest."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        yield False, str(error)
        return
    assert manifest.image_shape is not None
    yield True, f"{MANIFEST}: {manifest.images:,} images of shape {list(manifest.image_shape)}"
    for number, shard in enumerate(manifest.shards):
        wrong = []
        for kind, record in shard.files.items():
            name = file_name(kind, number)
            try:
                with open(folder / name, "rb", opener=_regular) as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != record.bytes:
                        wrong.append(f"{name} has {size:,} bytes, not {record.bytes:,}")
                    elif _sha256(file).hexdigest() != record.sha256:
                        wrong.append(f"{name} is not what was written: its SHA-256 differs")
            except OSError as error:
                wrong.append(f"{name} cannot be read ({error.strerror})")
        if not wrong:
            try:
                _open_shard(folder, number, shard, manifest.image_shape)
            except InputError as error:
                wrong.append(str(error))
        yield not wrong, "; ".join(wrong) or f"shard {number:05d}: {shard.images:,} images"


def _regular(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in place of a file blocks nobody


def packed_sets(pattern: str) -> list[Path]:
    """The packed sets that a path or a pattern with braces and globs names, in the order of their names."""
    import glob

    from dist_ae.data.pictures import braces

    whole = expand(pattern)
    if whole.exists():
        return [whole]
    found = sorted({Path(path) for part in braces(os.fspath(whole)) for path in glob.glob(part)})
    if not found:
        raise InputError(f"packed:{shown(pattern)}: no such folder; make one with `dist-ae pack SOURCE OUT`")
    return found


def packed_dataset(name: str, folders: Sequence[Path], config: DataConfig, val_fraction: float) -> Dataset:
    """The images of packed sets, one after the other, memory-mapped.

    Raises:
        InputError: a file of a set is missing or short; sets of differing shapes; settings that the sets were not
        packed with.
    """
    parts: list[Array] = []
    labels: list[Array] = []
    keys: list[Array] = []
    classes: dict[str, int] = {}
    digest = hashlib.sha256()
    shape: tuple[int, int, int] | None = None
    for folder in folders:
        manifest = read_manifest(folder)
        assert manifest.image_shape is not None
        if shape is not None and manifest.image_shape != shape:
            raise InputError(
                f"{shown(folder)}: images of shape {list(manifest.image_shape)}, and sets before it {list(shape)}"
            )
        shape = manifest.image_shape
        _check_settings(manifest, folder, config)
        numbers = np.array([classes.setdefault(each, len(classes)) for each in manifest.classes], np.int64)
        for number, shard in enumerate(manifest.shards):
            images, own_labels, own_keys = _open_shard(folder, number, shard, shape)
            parts.append(images)
            known = (own_labels >= 0) & (own_labels < len(numbers))
            if len(numbers) and known.any():
                own_labels = np.where(known, numbers[np.where(known, own_labels, 0)], own_labels)
            labels.append(own_labels)
            keys.append(own_keys)
            digest.update(f"{shard.files['images'].sha256}{shard.files['keys'].sha256}".encode())
    digest.update(f"{val_fraction!r}".encode())
    all_keys, all_labels, whole = np.concatenate(keys), np.concatenate(labels), Shards(parts)
    if len(all_keys) < 2:
        raise InputError(
            f"{name}: {len(all_keys)} picture cannot be split into training and validation; at least 2 are needed"
        )
    held_out = all_keys < np.uint64(int(val_fraction * 2**64))
    if not held_out.any():  # few pictures: the nearest to the border
        held_out[all_keys.argmin()] = True
    if held_out.all():
        held_out[all_keys.argmax()] = False
    rows = [np.flatnonzero(side) for side in (~held_out, held_out)]
    labelled = bool((all_labels >= 0).any())
    train, val = (Split(whole, all_labels[side] if labelled else None, side) for side in rows)
    counts = [
        int((~held_out[start : start + len(part)]).sum()) for start, part in zip(whole.starts, parts, strict=True)
    ]
    return Dataset(name, train, val, digest.hexdigest(), tuple(count for count in counts if count), tuple(classes))


def _check_settings(manifest: Manifest, folder: Path, config: DataConfig) -> None:
    given = {
        "image_size": config.image_size, "fit": config.fit, "channels": config.channels, "background": config.background
    }  # fmt: skip
    for key, value in given.items():
        if value is not None and manifest.settings.get(key) not in (None, value):
            raise InputError(
                f"{shown(folder)} was packed with {key} {manifest.settings.get(key)}, not {value}; leave "
                f"--data.{key.replace('_', '-')} out, or pack again"
            )


def _open_shard(
    folder: Path, number: int, shard: ShardRecord, image_shape: tuple[int, int, int]
) -> tuple[Array, Array, Array]:
    """A shard's images, mapped, with their labels and keys. Compares sizes, not every byte: `dist-ae doctor` does
    that."""
    way_out = "; restore it from a copy, or pack again"
    loaded = {}
    for kind, dtype, shape in (
        ("images", np.uint8, (shard.images, *image_shape)),
        ("labels", np.int64, (shard.images,)),
        ("keys", np.uint64, (shard.images,)),
    ):
        path = folder / file_name(kind, number)
        if not path.is_file():
            raise InputError(f"{shown(path)}: missing from the packed set{way_out}")
        if (size := path.stat().st_size) != shard.files[kind].bytes:
            raise InputError(f"{shown(path)}: damaged, {size:,} bytes in place of {shard.files[kind].bytes:,}{way_out}")
        try:
            array = np.load(path, mmap_mode="r" if kind == "images" else None, allow_pickle=False)
        except Exception as error:  # numpy raises several for a damaged header
            raise InputError(f"{shown(path)}: damaged ({error}){way_out}") from None
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
            raise InputError(f"{shown(path)}: damaged, {array.dtype} {array.shape}{way_out}")
        loaded[kind] = array
    return loaded["images"], loaded["labels"], loaded["keys"]


def open_packed(folder: Path, manifest: Manifest) -> list[Array]:
    """The images of each shard of a packed set, memory-mapped."""
    assert manifest.image_shape is not None
    shards = enumerate(manifest.shards)
    return [_open_shard(folder, number, shard, manifest.image_shape)[0] for number, shard in shards]


def packed_names(folder: Path, manifest: Manifest) -> list[str]:
    """The relative names of all pictures of a packed set."""
    names: list[str] = []
    for number, shard in enumerate(manifest.shards):
        path = folder / file_name("names", number)
        try:
            own = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{shown(path)}: cannot be read ({error})") from None
        if not (isinstance(own, list) and len(own) == shard.images and all(isinstance(name, str) for name in own)):
            raise InputError(f"{shown(path)}: damaged; `dist-ae doctor {shown(folder)}` says more")
        names += own
    return names


# ---------------------------------------------------------------------------------------------- what the commands call


def pack_source(name: str, out: Path, config: DataConfig, shard_bytes: int | None = None) -> Manifest:
    """``dist-ae pack``: packs ``folder:``, ``tar:``, ``hf:`` or a bare path into ``out``."""
    out = Path(os.path.abspath(expand(out)))
    if not out.name:
        raise InputError(f"{out}: name a folder to make")
    return pack(open_source(name), out, config, shown(name), shard_bytes)


def cached(name: str, source: Source, config: DataConfig, cache: Path) -> Path:
    """The packed form of a source in a cache, packed now if it is not there. Other pictures or settings have another
    place."""
    key = hashlib.sha256(json.dumps([FORMAT, source.identity, settings_of(config)]).encode()).hexdigest()[:16]
    stem = (
        re.sub(r"[^\w.-]+", "-", shown(name).rstrip("/").rpartition("/")[2].rpartition(":")[2]).strip("-.")[:40]
        or "data"
    )
    out = cache / "packed" / f"{stem}-{key}"
    pack(source, out, config, shown(name))
    return out
