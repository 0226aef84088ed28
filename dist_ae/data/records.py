"""The one form of data that training reads: images in memory or memory-mapped, in two splits."""

from __future__ import annotations

import hashlib
import io
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dist_ae.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]

VALUES_AT_ONCE = 2**24  # of a batch in evaluations: 85 images of 256 × 256 × 3; a layer has several times as many
CHUNK_BYTES = 2**22  # checked, hashed or copied at a time: the memory for reading a whole mapped file


class Lazy(Protocol):
    """Images [N, C, H, W] that are read row by row."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    mapped: bool  # to a file

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> Array: ...
    def take(self, rows: Array) -> Array: ...
    def read_ahead(self, rows: Array) -> None: ...


class Shards:
    """Several arrays of images as one [N, C, H, W], of which only the needed rows are read."""

    mapped = True

    def __init__(self, parts: Sequence[Array]) -> None:
        self.parts = list(parts)
        lengths = [len(part) for part in self.parts]
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.shape: tuple[int, ...] = (sum(lengths), *self.parts[0].shape[1:])
        self.dtype, self.nbytes = self.parts[0].dtype, sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        return self.take(np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows))

    def picture(self, number: int) -> Array:
        """One image [C, H, W], not copied."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        image: Array = np.asarray(self.parts[shard])[number - self.starts[shard]]
        return image

    def take(self, rows: Array) -> Array:
        if len(rows) == 0:
            return np.empty((0, *self.shape[1:]), self.dtype)
        first, last = (int(shard) for shard in np.searchsorted(self.starts, [rows.min(), rows.max()], side="right") - 1)
        if first == last:
            return gather(self.parts[first], rows - self.starts[first])
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(rows, kind="stable")  # each shard is read once, from its beginning to its end
        bounds = np.searchsorted(shard[order], np.arange(len(self.parts) + 1))
        for number in np.unique(shard):
            positions = order[bounds[number] : bounds[number + 1]]
            result[positions] = self.parts[number][rows[positions] - self.starts[number]]
        return result

    def read_ahead(self, rows: Array) -> None:
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(shard):
            read_ahead(self.parts[number], rows[shard == number] - self.starts[number])


class Whole:
    """Pictures of different sizes, one after the other in flat arrays as [H, W, C]."""

    def __init__(self, parts: Sequence[Array], part: Array, start: Array, sizes: Array, channels: int) -> None:
        """``part`` and ``start`` [N] say where a picture begins; ``sizes`` [N, 2] are heights and widths."""
        self.parts, self._part, self._start = parts, part, start
        self.sizes, self.channels = sizes, channels
        self.dtype, self.nbytes = parts[0].dtype, sum(flat.nbytes for flat in parts)

    def __len__(self) -> int:
        return len(self.sizes)

    def picture(self, number: int) -> Array:
        """One picture [C, H, W], not copied."""
        height, width = (int(side) for side in self.sizes[number])
        start = int(self._start[number])
        flat = np.asarray(self.parts[int(self._part[number])])[start : start + height * width * self.channels]
        return flat.reshape(height, width, self.channels).transpose(2, 0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, C, 0, 0]: height and width are those of each picture."""
        return len(self), self.channels, 0, 0

    @classmethod
    def of_parts(cls, parts: Sequence[Array], sizes: Sequence[Array], channels: int) -> Whole:
        """Flat arrays of pictures, and the sizes [n, 2] of those in each."""
        part = np.repeat(np.arange(len(parts)), [len(part_sizes) for part_sizes in sizes])
        values = [part_sizes.prod(1) * channels for part_sizes in sizes]
        starts = [np.cumsum(counts) - counts for counts in values]
        return cls(parts, part, np.concatenate(starts), np.concatenate(sizes), channels)

    @classmethod
    def of(cls, pictures: Sequence[Array]) -> Whole:
        """Pictures [C, H, W] in memory."""
        flat = [np.ascontiguousarray(picture.transpose(1, 2, 0)).ravel() for picture in pictures]
        sizes = np.array([picture.shape[1:] for picture in pictures], np.int64)
        return cls(flat, np.arange(len(flat)), np.zeros(len(flat), np.int64), sizes, pictures[0].shape[0])


Images = Array | Lazy


class Scaling(NamedTuple):
    """Maps the numbers of a source to a model's scale: (value - offset) / scale, channel by channel."""

    offset: Array  # [C, 1, 1], float64
    scale: Array  # [C, 1, 1], float64, greater than 0
    standardized: bool  # mean 0 and deviation 1; else on [0, 1]
    missing: bool  # NaN stands for a missing entry, which is 0 at the model's input and does not count


class Split(NamedTuple):
    """One split: records [N, C, H, W]; images are uint8, uint16 or floats on [0, 1].

    ``labels`` are int64 [N] if the source has them, -1 for none. ``rows`` picks images without copying them; None means
    all of them, in order. ``scaling`` maps stored numbers to the model's scale; None: bytes and 16 bits are divided by
    their largest value, and floats stay as they are.
    """

    images: Images
    labels: Array | None = None
    rows: Array | None = None
    scaling: Scaling | None = None

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def with_scaling(self, scaling: Scaling | None) -> Split:
        return Split(self.images, self.labels, self.rows, scaling)


@dataclass(frozen=True)
class Dataset:
    """Training and validation records of one source. ``fingerprint`` identifies their content."""

    name: str
    train: Split
    val: Split
    fingerprint: str
    test: Split | None = field(default=None, kw_only=True)  # the records of `data.fold`, which take no part in training
    shards: tuple[int, ...] | None = None  # training images of each shard, in order, if the data has shards
    classes: tuple[str, ...] = ()  # names of the labels
    shape: tuple[int, ...] | None = None  # of a record outside, if it is no image: (D,), (C, L) or (C, D, H, W)
    columns: tuple[str, ...] = ()  # names of the columns of a table
    scale: Literal["auto", "none", "standard", "range"] = "none"  # never auto: already resolved
    looked: Mapping[str, Any] = field(default_factory=dict)  # facts about pictures (``facts.summary``)
    rgba: bool = False  # the fourth channel is transparency

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def with_scaling(self, scaling: Scaling | None, scale: Literal["auto", "none", "standard", "range"]) -> Dataset:
        """The same records on the scale of the training part."""
        train, val = (split.with_scaling(scaling) for split in (self.train, self.val))
        test = None if self.test is None else self.test.with_scaling(scaling)
        return replace(self, train=train, val=val, test=test, scale=scale)


def folded(places: Array, folds: int, fold: int, val_fraction: float, what: str) -> list[Array]:
    """Rows of training, validation and test, by positions of the records on [0, 1).

    Fold ``fold``, from 1, is the test part. A share of the others is held out, to choose the best weights.

    Raises:
        InputError: there are too few records.
    """
    at = places * folds
    part = np.minimum(at.astype(np.int64), folds - 1)
    test = part == fold - 1
    val = ~test & (at - part < val_fraction)
    if not val.any() and not test.all():
        val[np.where(test, np.inf, at - part).argmin()] = True
    sides = [np.flatnonzero(side) for side in (~test & ~val, val, test)]
    if not all(map(len, sides)):
        raise InputError(f"{what}: too few records for data.folds {folds}: fold {fold} leaves a side empty; use fewer")
    return sides


def is_mapped(images: Images) -> bool:
    """Whether images stay in a file until they are read."""
    return isinstance(images, np.memmap) if isinstance(images, np.ndarray) else images.mapped


def stored_order(images: Array) -> tuple[int, ...]:
    """The axes of an array in the order of its memory: (0, 2, 3, 1) for [N, H, W, C] viewed as [N, C, H, W]."""
    return tuple(sorted(range(images.ndim), key=lambda axis: (-images.strides[axis], axis)))


def gather(images: Images, rows: Array) -> Array:
    """Rows of images, [len(rows), C, H, W], with the axes in memory in the order of the stored images."""
    if not isinstance(images, np.ndarray):
        return images.take(rows)
    axes = stored_order(images)
    stored = np.asarray(images).transpose(axes)
    if axes[0] != 0 or not stored.flags.c_contiguous:  # take would copy all of it first
        return np.asarray(images)[rows]
    # take copies an image as one block; indexing a view with swapped axes would copy it value by value.
    return stored.take(rows, axis=0).transpose(np.argsort(axes))


def read_ahead(images: Images, rows: Array) -> None:
    """Asks the system to read rows of mapped images into its cache, all at once.

    A disk answers many requests together faster than one by one: for data of four times the memory, 35,000 reads a
    second instead of 160. A row that is already in the cache costs about 1 µs.
    """
    if not isinstance(images, np.ndarray):
        images.read_ahead(rows)
        return
    memory: Any = images
    while memory is not None and not isinstance(memory, mmap.mmap):
        memory = memory.base
    if memory is None or images.strides[0] <= 0 or not hasattr(mmap, "MADV_WILLNEED"):
        return
    start = len(memory) - images.strides[0] * len(images)  # images end at the end of their file
    for row in np.sort(rows).tolist():
        at = start + row * images.strides[0]
        page = at - at % mmap.PAGESIZE
        memory.madvise(mmap.MADV_WILLNEED, page, at + images.strides[0] - page)


def chunks(split: Split) -> list[range]:
    """The positions of a split in pieces of about 4 MB."""
    size = max(1, CHUNK_BYTES // max(1, split.images.nbytes // max(1, len(split.images))))
    return [range(start, min(start + size, len(split))) for start in range(0, len(split), size)]


def at_once(most: int, image_shape: Sequence[int], processes: int = 1) -> int:
    """The number of images in a batch without gradient: ``most``, or fewer if they are large."""
    return max(1, min(most, processes * (VALUES_AT_ONCE // math.prod(image_shape))))


def span(split: Split, rows: range) -> Array:
    """Images of a split at positions ``rows``."""
    if split.rows is not None:
        return gather(split.images, split.rows[rows.start : rows.stop])
    return split.images[rows.start : rows.stop]


def shuffled(count: int) -> Array:
    """The rows of a data set in an order of its own, the same in every run."""
    import torch  # seconds to load, which `dist-ae look` and `dist-ae pack` do without

    order: Array = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return order


def npy_header(shape: tuple[int, ...], dtype: Any = np.float32) -> bytes:
    """The head of a .npy: 128 bytes, whatever the number of rows."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    )
    assert content.tell() == 128
    return content.getvalue()


def fingerprint(*splits: Split, sampled: bool = False) -> str:
    """SHA-256 of the content; with ``sampled``, of its shape and 1,024 evenly spaced images.

    Reading all of a large file would cost as much as an epoch.
    """
    digest = hashlib.sha256()
    for split in splits:
        dtype: np.dtype[Any] = split.images.dtype
        if not sampled and dtype not in (np.uint8, np.uint16):
            dtype = np.dtype(np.float32)
        digest.update(f"{dtype}{split.images.shape[1:]}{len(split)}".encode())
        if sampled:
            rows = np.linspace(0, len(split) - 1, min(1024, len(split))).astype(np.int64)
            pieces = [gather(split.images, rows if split.rows is None else split.rows[rows])]
        else:
            pieces = (span(split, rows).astype(dtype, copy=False) for rows in chunks(split))  # type: ignore[assignment]
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()
