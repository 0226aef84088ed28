"""Packed sets: pictures as fixed-size bytes in shards that training maps into memory, and a manifest of them.

A packed set is a folder of ``manifest.json`` and, for each shard:

- ``images-00000.npy``: uint8 or uint16 [n, C, H, W]; of whole pictures one [H, W, C] after the other, flat.
- ``sizes-00000.npy``: of whole pictures alone, int64 [n, 2], their heights and widths.
- ``ends-00000.npy``: of whole pictures that stay encoded, int64 [n]: their images are the bytes of their files, uint8,
  flat, and end there.
- ``labels-00000.npy``: int64 [n], -1 where there is none.
- ``keys-00000.npy``: uint64 [n], where a picture lies on [0, 2^64). Keys below the validation fraction are held out.
- ``names-00000.json``: the relative names of the pictures.
- ``facts-00000.npy``: what they were before they got their size (``facts.py``). Sets of an older version have none.

``pack.py`` writes packed sets. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from dist_ae.config import DataConfig, InputError
from dist_ae.data.deep import MOST
from dist_ae.data.encoded import Encoded
from dist_ae.data.facts import RECORD
from dist_ae.data.form import Form
from dist_ae.data.pictures import expand, fit_of, form_of, shown
from dist_ae.data.records import Array, Dataset, Shards, Split, Whole, folded
from dist_ae.files import Damaged, open_plainly, read_bounded

FORMAT = 1
MANIFEST = "manifest.json"
WAY_OUT = "; restore it from a copy, or pack again"
KINDS = {
    "images": "npy",
    "labels": "npy",
    "keys": "npy",
    "names": "json",
    "facts": "npy",
    "sizes": "npy",
    "ends": "npy",
}
OPTIONAL = {"facts", "sizes", "ends"}
COLOURS = {1: "grey", 3: "rgb", 4: "rgba"}  # of pictures, by their channels
MAX_MANIFEST = 64 << 20  # bytes: more than 100,000 shards
MOST_PIXELS = 2**24  # of a side of a whole picture
MAX_NAME = 16 << 10  # bytes of a picture's name in JSON
WHOLE = 256 << 20  # bytes of a packed set that are compared with its manifest whenever it is opened
VAL_KEY, TRAIN_KEY = 0, 2**64 - 1  # the keys of pictures whose source says on which side they are


class FileRecord(BaseModel):
    bytes: int = Field(ge=0)
    sha256: str


class ShardRecord(BaseModel):
    images: int = Field(gt=0, le=2**40)
    files: dict[str, FileRecord]


class Manifest(BaseModel):
    """What a packed set holds, and the settings that gave its pictures their form."""

    format: int
    identity: str
    settings: dict[str, Any]
    shard_bytes: int
    image_shape: tuple[int, int, int] | None = None  # channels, 0 and 0 of whole pictures
    record_shape: tuple[int, int, int, int] | None = None  # of a volume: channels, depth, height, width
    pages: int = 0  # of the files that have several
    paged_files: int = 0
    dtype: Literal["uint8", "uint16"] = "uint8"  # of pixels
    encoded: bool = False  # whole pictures are the bytes of their files
    pixels: int = 0  # bytes of the pixels of whole pictures
    low: int = MOST  # the smallest and the largest value of pictures of 16 bits
    high: int = 0
    shallow: int = 0  # pictures of 8 bits among those of 16
    classes: list[str] = []
    ignored: dict[str, int] = {}
    read: int = 0  # pictures of the source that are dealt with, readable or not
    unreadable: int = 0
    reasons: list[tuple[str, str]] = []  # the first unreadable ones
    shards: list[ShardRecord] = []
    looked: dict[str, Any] = {}  # what is said of the pictures, by ``facts.summary``; of an older version nothing

    @property
    def whole(self) -> bool:
        """Whether pictures have sizes of their own."""
        return self.settings.get("fit") == "whole"

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)


def file_name(kind: str, shard: int) -> str:
    """The file of a shard that holds its images, labels, keys or names."""
    return f"{kind}-{shard:05d}.{KINDS[kind]}"


def settings_of(config: DataConfig) -> dict[str, Any]:
    """What decides how pictures come out, with every default filled in.

    Sets of before there were 16 bits say nothing of bits, and have 8.
    """
    return {
        "image_size": config.image_size,
        "fit": fit_of(config),
        "channels": config.channels or "auto",
        "background": config.background or "white",
        **({} if config.group is None else {"group": config.group}),
        **({} if config.bits == "8" else {"bits": config.bits}),
        **({} if config.pages == "first" else {"pages": config.pages}),
        **({} if config.budget is None else {"budget": config.budget}),
    }


def of_pages(files: int, pages: int) -> str:
    """What is left out of files of several pages, in one line; "" where there are none."""
    if not files:
        return ""
    one = files == 1
    hold = "file holds" if one else "files hold"
    return (
        f"{files:,} {hold} {pages:,} pages, and the first of {'them' if one else 'each'} is "
        "used; --data.pages each makes a picture of every page, volume one record of all"
    )


def left_pages(manifest: Manifest) -> str:
    """What a packed set leaves out of files of several pages, in one line; "" where nothing is."""
    return "" if "pages" in manifest.settings else of_pages(manifest.paged_files, manifest.pages)


def of_16_bits(manifest: Manifest, scale: str = "auto") -> str:
    """What a set of 16 bits holds, in one line; "" for one of 8. ``scale``: that of the run, which may be told."""
    if manifest.dtype == "uint8":
        return ""
    mixed = f"; {manifest.shallow:,} of {manifest.images:,} pictures have 8 bits, widened" if manifest.shallow else ""
    part = (manifest.high - manifest.low) / MOST
    way_out = ""
    if part < 0.5 and scale in ("auto", "none"):
        way_out = f", {part:.1%} of the range; --data.scale range makes [0, 1] of it"
    return f"16 bits, values from {manifest.low:,} to {manifest.high:,} of {MOST:,}{way_out}{mixed}"


def sha256_of(file: BinaryIO) -> Any:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest


def is_packed(folder: Path) -> bool:
    """Whether a folder says that it is a packed set; a run directory has a ``config.json``."""
    return (folder / MANIFEST).is_file() and not (folder / "config.json").exists()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed set.

    Raises:
        InputError: none there, or none that was written here.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise InputError(f"{shown(folder)} is no packed set: it has no {MANIFEST}")
    try:
        manifest = Manifest.model_validate_json(read_bounded(path, MAX_MANIFEST))
    except (ValidationError, Damaged, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(f"{shown(path)} is damaged ({reason}); pack again") from None
    if manifest.format != FORMAT:
        raise InputError(f"{shown(path)}: format {manifest.format}; this version reads format {FORMAT}")
    shape = manifest.image_shape
    if shape is None or not manifest.shards or any(n < 1 for n in (shape[:1] if manifest.whole else shape)):
        raise InputError(f"{shown(path)} is damaged (no images); pack again")
    if manifest.encoded and not (manifest.whole and shape[0] in COLOURS):
        raise InputError(f"{shown(path)} is damaged (encoded, and no pictures); pack again")
    if any(not set(KINDS) - OPTIONAL <= set(shard.files) <= set(KINDS) for shard in manifest.shards):
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
    deep = of_16_bits(manifest)
    kind = "whole pictures, encoded" if manifest.encoded else "whole pictures"
    form = kind if manifest.whole else f"images of shape {list(manifest.image_shape)}"
    yield True, f"{MANIFEST}: {manifest.images:,} {form}{deep and f', {deep}'}"
    for number, shard in enumerate(manifest.shards):
        wrong = []
        for kind, record in shard.files.items():
            name = file_name(kind, number)
            try:
                with os.fdopen(open_plainly(folder / name), "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != record.bytes:
                        wrong.append(f"{name} has {size:,} bytes, not {record.bytes:,}")
                    elif sha256_of(file).hexdigest() != record.sha256:
                        wrong.append(f"{name} is not what was written: its SHA-256 differs")
            except (OSError, Damaged) as error:
                wrong.append(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})")
        if not wrong:
            try:
                _open_shard(folder, number, manifest)
            except InputError as error:
                wrong.append(str(error))
        yield not wrong, "; ".join(wrong) or f"shard {number:05d}: {shard.images:,} images"


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
        InputError: a missing or short file, sets of differing shapes, or settings that they were not packed with.
    """
    parts: list[Array] = []
    labels: list[Array] = []
    keys: list[Array] = []
    sizes: list[Array] = []
    ends: list[Array] = []
    classes: dict[str, int] = {}
    digest = hashlib.sha256()
    before: tuple[tuple[int, ...], str, str] | None = None
    volume: tuple[int, ...] | None = None
    for folder in folders:
        manifest = read_manifest(folder)
        assert manifest.image_shape is not None
        volume = manifest.record_shape
        if volume is not None and (volume[0], volume[1] * volume[2], volume[3]) != manifest.image_shape:
            raise InputError(f"{shown(folder / MANIFEST)} is damaged (volumes of another shape); pack again")
        form = volume or manifest.image_shape, manifest.dtype, "encoded" if manifest.encoded else "as pixels"
        if before is not None and form != before:
            raise InputError(
                f"{shown(folder)}: images of shape {list(form[0])}, {', '.join(form[1:])}, and sets before it "
                f"{list(before[0])}, {', '.join(before[1:])}"
            )
        before = form
        _check_settings(manifest, folder, config)
        numbers = np.array([classes.setdefault(each, len(classes)) for each in manifest.classes], np.int64)
        for number, shard in enumerate(manifest.shards):
            images, own_labels, own_keys, own_sizes, own_ends = _open_shard(folder, number, manifest)
            parts.append(images)
            sizes += [] if own_sizes is None else [own_sizes]
            ends += [] if own_ends is None else [own_ends]
            known = (own_labels >= 0) & (own_labels < len(numbers))
            if len(numbers) and known.any():
                own_labels = np.where(known, numbers[np.where(known, own_labels, 0)], own_labels)
            labels.append(own_labels)
            keys.append(own_keys)
            digest.update(f"{shard.files['images'].sha256}{shard.files['keys'].sha256}".encode())
        _check_content(folder, manifest)
    digest.update(f"{val_fraction!r}".encode())
    all_keys, all_labels = np.concatenate(keys), np.concatenate(labels)
    # Of whole pictures `cropped` makes images: until then they have no one size.
    whole: Any = Shards(parts)
    if ends:
        whole = Encoded(parts, ends, np.concatenate(sizes), _decoding(manifest), form[0][0], np.dtype(form[1]))
    elif sizes:
        whole = Whole.of_parts(parts, sizes, form[0][0])
    if sizes and config.crop is None:
        raise InputError(f"{name}: whole pictures of different sizes; --data.crop 64 trains on crops of them")
    if len(all_keys) < 2:
        raise InputError(
            f"{name}: {len(all_keys)} picture cannot be split into training and validation; at least 2 are needed"
        )
    if config.fold is not None and config.folds is not None:
        if np.isin(all_keys, np.array([VAL_KEY, TRAIN_KEY], np.uint64)).any():
            raise InputError(f"{name}: has a split of its own, and data.folds makes others; leave it out")
        # Copies and groups lie in one place, so in one fold.
        rows = folded(all_keys / 2.0**64, config.folds, config.fold, val_fraction, name)
        digest.update(f"{config.fold}/{config.folds}".encode())
    else:
        held_out = all_keys < np.uint64(int(val_fraction * 2**64))
        if not held_out.any():  # few pictures: the nearest to the border
            held_out[all_keys.argmin()] = True
        if held_out.all():
            held_out[all_keys.argmax()] = False
        rows = [np.flatnonzero(side) for side in (~held_out, held_out)]
    labelled = bool((all_labels >= 0).any())
    train, val, *test = (Split(whole, all_labels[side] if labelled else None, side) for side in rows)
    bounds = np.searchsorted(rows[0], np.cumsum([0, *(len(each) for each in keys)]))
    counts = np.diff(bounds).tolist()
    first = read_manifest(folders[0])
    looked = first.looked if len(folders) == 1 else {}
    filled = tuple(count for count in counts if count)
    return Dataset(
        name,
        train,
        val,
        digest.hexdigest(),
        filled,
        tuple(classes),
        shape=volume,
        looked=looked,
        rgba=first.settings.get("channels") == "rgba",
        test=test[0] if test else None,
    )


@functools.lru_cache(256)
def _unchanged(path: Path, stamp: tuple[int, ...], sha256: str) -> bool:
    """Whether a file has this SHA-256; asked once for each state of the file."""
    with os.fdopen(open_plainly(path), "rb") as file:
        return bool(sha256_of(file).hexdigest() == sha256)


def _check_content(folder: Path, manifest: Manifest) -> None:
    """Compares a packed set with its manifest before it is used: a small one whole, of a larger one what is newer.

    A file that was written to is newer than the manifest, which is written last. A copy that keeps no times is read
    once; it costs a second or two a GB.

    Raises:
        InputError: a file is not what was packed.
    """
    small = sum(record.bytes for shard in manifest.shards for record in shard.files.values()) <= WHOLE
    packed = (folder / MANIFEST).stat().st_mtime_ns
    for number, shard in enumerate(manifest.shards):
        for kind, record in shard.files.items():
            path = folder / file_name(kind, number)
            try:
                found = os.lstat(path)
                if found.st_size != record.bytes:
                    raise Damaged(f"{found.st_size:,} bytes in place of {record.bytes:,}")
                stamp = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
                if (small or found.st_mtime_ns > packed) and not _unchanged(path, stamp, record.sha256):
                    raise InputError(f"{shown(path)}: is not what was packed, its SHA-256 differs{WAY_OUT}")
            except (OSError, Damaged) as error:
                reason = getattr(error, "strerror", None) or error
                raise InputError(f"{shown(path)}: cannot be read ({reason}){WAY_OUT}") from None


def _check_settings(manifest: Manifest, folder: Path, config: DataConfig) -> None:
    given = {
        "image_size": config.image_size, "fit": config.fit, "channels": config.channels, "background": config.background
    }  # fmt: skip
    if config.group is not None and manifest.settings.get("group") != config.group:
        how = "with other groups" if "group" in manifest.settings else "without groups"
        raise InputError(f"{shown(folder)} was packed {how}; pack again with --group, or leave --data.group out")
    if config.bits not in ("auto", bits := manifest.dtype.removeprefix("uint")):
        raise InputError(
            f"{shown(folder)} was packed with {bits} bits, not {config.bits}; leave --data.bits out, or pack again"
        )
    if config.pages not in ("first", pages := manifest.settings.get("pages", "first")):
        raise InputError(
            f"{shown(folder)} was packed with pages {pages}, not {config.pages}; leave --data.pages out, or pack again"
        )
    for key, value in given.items():
        if value is not None and manifest.settings.get(key) not in (None, value):
            raise InputError(
                f"{shown(folder)} was packed with {key} {manifest.settings.get(key)}, not {value}; leave "
                f"--data.{key.replace('_', '-')} out, or pack again"
            )


def _decoding(manifest: Manifest) -> Form:
    """What the pictures of an encoded set are decoded to: what they were when they were packed."""
    assert manifest.image_shape is not None
    settings = {key: manifest.settings[key] for key in ("image_size", "background", "bits") if key in manifest.settings}
    config = DataConfig(**{"bits": "8", **settings}, fit="whole")
    return form_of(config, COLOURS[manifest.image_shape[0]])


class _Opened(NamedTuple):
    """A shard: images memory-mapped, flat where they are whole pictures, which have sizes [n, 2].

    Those that are encoded also have ``ends`` [n].
    """

    images: Array
    labels: Array
    keys: Array
    sizes: Array | None
    ends: Array | None


def _open_shard(folder: Path, number: int, manifest: Manifest) -> _Opened:
    """A shard of a packed set. Here only the sizes of its files are compared with the manifest.

    Raises:
        InputError: a file that is missing, or not what the manifest says.
    """
    assert manifest.image_shape is not None
    loaded: dict[str, Array] = {}
    shard, channels = manifest.shards[number], manifest.image_shape[0]
    more = [*(["sizes"] if manifest.whole else []), *(["ends"] if manifest.encoded else [])]
    for kind in ("labels", "keys", *more, "images"):
        dtype = {"images": "uint8" if manifest.encoded else manifest.dtype, "keys": "uint64"}.get(kind, "int64")
        shape: tuple[int, ...] = {"sizes": (shard.images, 2), "images": (shard.images, *manifest.image_shape)}.get(
            kind, (shard.images,)
        )
        if kind == "images" and manifest.whole:
            sides = loaded["sizes"]
            if (sides < 1).any() or (sides > MOST_PIXELS).any():
                raise InputError(f"{shown(folder / file_name('sizes', number))}: damaged{WAY_OUT}")
            shape = (channels * int(sides.prod(1).sum()),)
        if kind == "images" and manifest.encoded:
            if (np.diff(loaded["ends"], prepend=0) < 1).any():
                raise InputError(f"{shown(folder / file_name('ends', number))}: damaged{WAY_OUT}")
            shape = (int(loaded["ends"][-1]),)
        path = folder / file_name(kind, number)
        if not os.path.lexists(path):
            raise InputError(f"{shown(path)}: missing from the packed set{WAY_OUT}")
        try:
            size = shard.files[kind].bytes if kind in shard.files else 0
            loaded[kind] = _array(path, np.dtype(dtype), shape, size, mapped=kind == "images")
        except Damaged as error:
            raise InputError(f"{shown(path)}: damaged, {error}{WAY_OUT}") from None
    return _Opened(loaded["images"], loaded["labels"], loaded["keys"], loaded.get("sizes"), loaded.get("ends"))


def _array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], size: int, mapped: bool) -> Array:
    """The array of a .npy, once its size and its header are what they must be: before anything is made of it.

    Raises:
        Damaged: in words.
    """
    with os.fdopen(open_plainly(path), "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise Damaged(f"{found:,} bytes in place of {size:,}")
        try:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            header = read[np.lib.format.read_magic(file)](file)
        except Exception as error:  # numpy raises several for a damaged header
            raise Damaged(f"its header cannot be read ({error})") from None
        if header != (shape, False, dtype):
            raise Damaged(f"{header[2]} {header[0]}")
        start, whole = file.tell(), dtype.itemsize * int(np.prod(shape, dtype=object))
        if found != start + whole:
            raise Damaged(f"{found:,} bytes, and its header says {start + whole:,}")
        if mapped:
            return np.memmap(file, dtype, "r", start, shape)
        return np.frombuffer(file.read(), dtype).reshape(shape)


def packed_facts(folder: Path, manifest: Manifest) -> Array | None:
    """The facts of all pictures of a packed set; None of a set of an older version."""
    found = []
    for number, shard in enumerate(manifest.shards):
        if "facts" not in shard.files:
            return None
        path = folder / file_name("facts", number)
        try:
            found.append(_array(path, RECORD, (shard.images,), shard.files["facts"].bytes, mapped=False))
        except (Damaged, OSError) as error:
            raise InputError(f"{shown(path)}: damaged, {error}{WAY_OUT}") from None
    return np.concatenate(found)


def open_packed(folder: Path, manifest: Manifest) -> list[Array]:
    """The images of each shard of a packed set, memory-mapped."""
    found = [_open_shard(folder, number, manifest).images for number in range(len(manifest.shards))]
    _check_content(folder, manifest)
    return found


def packed_names(folder: Path, manifest: Manifest) -> list[str]:
    """The relative names of all pictures of a packed set."""
    names: list[str] = []
    for number, shard in enumerate(manifest.shards):
        path = folder / file_name("names", number)
        try:
            own = json.loads(read_bounded(path, MAX_NAME * shard.images))
        except (Damaged, ValueError, RecursionError) as error:
            raise InputError(f"{shown(path)}: cannot be read ({error})") from None
        if not (isinstance(own, list) and len(own) == shard.images and all(isinstance(name, str) for name in own)):
            raise InputError(f"{shown(path)}: damaged; `dist-ae doctor {shown(folder)}` says more")
        names += own
    return names
