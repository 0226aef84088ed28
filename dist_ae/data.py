"""Named sources → images in memory or memory-mapped, and the order in which training takes them."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from dist_ae.config import DataConfig, InputError
from dist_ae.draws import keyed_seed

Array = np.ndarray[Any, np.dtype[Any]]
IN_MEMORY_BYTES = 4 * 2**30  # an array file larger than this stays on disk, memory-mapped
CHUNK = 4096  # images looked at together when values are checked
NOISY_RANGE = (-2.0, 3.0)  # noise takes images on [0, 1] no further; what is outside was not scaled


class Split(NamedTuple):
    """One split: images uint8 or float32 on [0, 1], [N, C, H, W]; labels [N] int64 where the source has them.

    ``rows`` picks images of a memory-mapped array without copying it; None means all of them, in order.
    """

    images: Array
    labels: Array | None = None
    rows: Array | None = None

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)


@dataclass(frozen=True)
class Dataset:
    """Training and validation images of one source. ``fingerprint`` identifies their content."""

    name: str
    train: Split
    val: Split
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


# ------------------------------------------------------------------------------------------------ the order of training


def epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    """The permutation [num_images] of an epoch: a pure function, so resuming anywhere is arithmetic."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(keyed_seed(seed, "order", epoch)))


def share(rows: range, rank: int, world: int) -> range:
    """The contiguous part of ``rows`` that is this process's. The first parts are full, so a short batch leaves the last ones short or empty."""
    size = -(-len(rows) // world)
    start = min(rows.start + rank * size, rows.stop)
    return range(start, min(start + size, rows.stop))


class Reader:
    """Images of a split on a device, as floats on [0, 1].

    A split that fits lives on the device in its stored type and is indexed there; a larger one is read from the memory map
    batch by batch, through pinned memory, which costs a host copy per image.
    """

    def __init__(self, split: Split, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.split, self.device, self.dtype = split, device, dtype
        self.resident: Tensor | None = None
        if not isinstance(split.images, np.memmap) and split.images.nbytes <= _free_bytes(device) // 2:
            self.resident = torch.from_numpy(split.images).to(device)

    def take(self, rows: Tensor) -> Tensor:
        """rows [B], int64, on the host or the device → images [B, C, H, W] on [0, 1]."""
        if self.resident is not None:
            images = self.resident.index_select(0, rows.to(self.device, non_blocking=True))
        else:
            index = rows.cpu().numpy()
            index = index if self.split.rows is None else self.split.rows[index]
            images = torch.from_numpy(self.split.images[index])
            if self.device.type == "cuda":
                images = images.pin_memory()
            images = images.to(self.device, non_blocking=True)
        floats = images.to(self.dtype)
        return floats.div_(255) if images.dtype == torch.uint8 else floats

    def span(self, rows: range) -> Tensor:
        """Images ``rows`` of the split, in order."""
        return self.take(torch.arange(rows.start, rows.stop))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**62


# ------------------------------------------------------------------------------------------------------- named sources


def load(config: DataConfig) -> Dataset:
    """The dataset a configuration names.

    Raises:
        InputError: an unknown name; no source found (every place tried, each way out); a file that is not what it should be.
    """
    if config.name.startswith("array:"):
        return _array(Path(config.name.removeprefix("array:")).expanduser(), config.val_fraction)
    sources: dict[str, Callable[[DataConfig], tuple[Split, Split]]] = {"digits": _digits, "cifar10": _cifar10, **dict.fromkeys(_IDX, _idx_dataset)}
    if config.name not in sources:
        raise InputError(f"unknown dataset {config.name!r}: expected {', '.join(sources)} or array:PATH")
    if config.root is not None and not config.root.is_dir():
        raise InputError(f"data root {config.root} does not exist or is not a folder")
    train, val = sources[config.name](config)
    return Dataset(config.name, train, val, _fingerprint(train, val))


def _digits(config: DataConfig) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits  # 1,797 real 8×8 digits (UCI optdigits), shipped inside scikit-learn

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    labels = bunch.target.astype(np.int64)
    train, val = order[:1500], order[1500:]
    return Split(images[train], labels[train]), Split(images[val], labels[val])


_IDX = {  # torchvision's class and folder; where Debian's package puts the files
    "fashion_mnist": ("FashionMNIST", Path("/usr/share/datasets/fashion-mnist")),
    "mnist": ("MNIST", None),
    "kmnist": ("KMNIST", None),
}
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_ae"


def _idx_dataset(config: DataConfig) -> tuple[Split, Split]:
    class_name, system = _IDX[config.name]
    root = config.root or _cache()
    places = [root, root / class_name / "raw"] if config.root else [*([system] if system else []), root / class_name / "raw"]

    def download() -> None:
        import torchvision  # 2.6 s to import: only where something is missing

        getattr(torchvision.datasets, class_name)(root, download=True)

    names: list[tuple[str, ...]] = [(name, f"{name}.gz") for name in _IDX_FILES]
    paths = _find(config, places, names, download, [f"apt-get install dataset-{config.name.replace('_', '-')}"] if system else [])
    train, train_labels, val, val_labels = (read_idx(path, dims=3 if "idx3" in path.name else 1) for path in paths)
    return _labelled(train, train_labels, paths[1]), _labelled(val, val_labels, paths[3])


def _labelled(images: Array, labels: Array, path: Path) -> Split:
    if len(images) != len(labels):
        raise InputError(f"{path}: {len(labels)} labels for {len(images)} images")
    return Split(images[:, None], labels.astype(np.int64))


_CIFAR_URL, _CIFAR_MD5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_CIFAR_IMAGES = 10_000  # per file; each image is one label byte and 3 · 32 · 32 pixel bytes


def _cifar10(config: DataConfig) -> tuple[Split, Split]:
    # The binary version: torchvision's CIFAR10 unpickles its files, and nothing here reads a pickle.
    root = config.root or _cache()

    def download() -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(_CIFAR_URL, str(root), md5=_CIFAR_MD5)

    paths = _find(config, [root, root / "cifar-10-batches-bin"], [(name,) for name in _CIFAR_FILES], download, [])
    records = []
    for path in paths:
        data = path.read_bytes()
        if len(data) != _CIFAR_IMAGES * 3073:
            raise InputError(f"{path}: expected {_CIFAR_IMAGES * 3073} bytes ({_CIFAR_IMAGES} images of 3073 bytes), got {len(data)}")
        records.append(np.frombuffer(data, np.uint8).reshape(-1, 3073))
    train, val = np.concatenate(records[:5]), records[5]
    return tuple(Split(np.ascontiguousarray(part[:, 1:]).reshape(-1, 3, 32, 32), part[:, 0].astype(np.int64)) for part in (train, val))  # type: ignore[return-value]


def _find(config: DataConfig, places: list[Path], names: list[tuple[str, ...]], download: Callable[[], None], ways_out: list[str]) -> list[Path]:
    """The wanted files from the first place that has them all, after one download for all processes of this machine."""

    def look() -> list[Path] | None:
        for place in places:
            found = [next((place / name for name in wanted if (place / name).is_file()), None) for wanted in names]
            if all(found):
                return [path for path in found if path is not None]
        return None

    if (paths := look()) is not None:
        return paths
    root = config.root or _cache()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{config.name}.lock"):
            if (paths := look()) is None:
                download()
                paths = look()
    except Exception as error:  # whatever a download can raise: no network, no space, a wrong checksum
        reason = f"the download failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
    else:
        reason = "the download did not bring them"
    if paths is not None:
        return paths
    options = [*ways_out, "--data.root DIR, a folder that holds " + ", ".join(" or ".join(wanted) for wanted in names), "--data.name digits (embedded)"]
    raise InputError(f"no files of {config.name} found: looked in {', '.join(map(str, places))}; {reason}. Ways out: {'; or '.join(options)}")


def read_idx(path: Path, dims: int) -> Array:
    """A strict IDX file of unsigned bytes, gzip'd or not, with ``dims`` dimensions → uint8 array.

    Raises:
        InputError: naming the file and what was expected: magic, dimensions, exact length, gzip checksum.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"
        data = bytearray()  # grown in place: one copy in memory, and an array over it can be written to
        with gzip.open(path) if packed else path.open("rb") as file:
            while block := file.read(2**20):
                data += block
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file ({error})") from None
    header = 4 + 4 * dims
    magic = 0x0800 | dims
    if len(data) < header:
        raise InputError(f"{path}: expected an IDX header of {header} bytes, got {len(data)} bytes")
    found, *shape = struct.unpack(f">{dims + 1}I", data[:header])
    if found != magic:
        raise InputError(f"{path}: expected IDX magic {magic:#010x} (unsigned bytes, {dims} dimensions), got {found:#010x}")
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected or 0 in shape:
        raise InputError(f"{path}: the header says {' × '.join(map(str, shape))}, so {expected} bytes with at least one image, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# ------------------------------------------------------------------------------------------------------ the user's own


def read_images(path: Path) -> Array:
    """A user's images for a trained model: those of a .npy; of a .npz its ``images``, else its ``val``, else its only array.

    Layouts and types as for ``array:PATH``, but floats may leave [0, 1] as far as noise takes them. Returns [N, C, H, W], uint8 or float32.

    Raises:
        InputError: naming the file: not there or not readable, several arrays, another layout or type, the first value out of range.
    """
    path = path.expanduser()
    arrays = _arrays(path)
    key = next((name for name in ("images", "val") if name in arrays), next(iter(arrays), None))
    if key is None or (len(arrays) > 1 and key not in ("images", "val")):
        raise InputError(f"{path}: expected one array, or 'images', or 'val'; found {', '.join(arrays) or 'nothing'}")
    return _check(arrays[key], str(path), *NOISY_RANGE)


def _arrays(path: Path) -> dict[str, Array]:
    """The named arrays of a .npz, or that of a .npy as ``images``."""
    if not os.path.isfile(path):  # unlike Path.is_file it raises nothing, whatever the path
        raise InputError(f"{path}: no such file; expected a .npy or .npz of images [N, H, W], [N, C, H, W] or [N, H, W, C]")
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" and path.stat().st_size > IN_MEMORY_BYTES else None, allow_pickle=False)
        return dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else {"images": loaded}
    except (OSError, ValueError, EOFError, zlib.error, KeyError) as error:
        if "Object arrays" in str(error):
            raise InputError(f"{path}: holds objects, not one array of numbers; images of differing shapes? Bring them to one shape first") from None
        # What is neither format numpy takes for a pickle, and its advice is to load it unsafely.
        reason = "it is in neither format" if "pickle" in str(error) else error
        raise InputError(f"{path}: not a readable .npy or .npz file ({reason})") from None
    except Exception as error:  # zipfile.BadZipFile and what else a damaged archive raises
        raise InputError(f"{path}: not a readable .npy or .npz file ({error})") from None


def _array(path: Path, val_fraction: float) -> Dataset:
    arrays = _arrays(path)
    name = f"array:{path.name}"
    if "train" in arrays and "val" in arrays:
        train, val = (Split(_check(arrays[key], f"{path}[{key}]")) for key in ("train", "val"))
        if train.images.shape[1:] != val.images.shape[1:]:
            raise InputError(f"{path}: train images {train.images.shape[1:]} and val images {val.images.shape[1:]} have differing shapes")
        return Dataset(name, train, val, _fingerprint(train, val))
    key = "images" if "images" in arrays else next(iter(arrays), None)
    if key is None or (len(arrays) > 1 and key != "images"):
        raise InputError(f"{path}: expected one array, or 'images', or 'train' and 'val'; found {', '.join(arrays) or 'nothing'}")
    images = _check(arrays[key], str(path))
    labels = arrays.get("labels")
    if labels is not None and labels.shape != (len(images),):
        raise InputError(f"{path}[labels]: expected one label per image, shape ({len(images)},), got {labels.shape}")
    num_val = min(max(1, round(len(images) * val_fraction)), len(images) - 1)
    if num_val < 1:
        raise InputError(f"{path}: {len(images)} image cannot be split into training and validation; at least 2 are needed")
    # The split is the same whatever the seed of the run: figures of different runs are about the same images.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    train, val = (_pick(images, labels, np.sort(rows)) for rows in (order[num_val:], order[:num_val]))
    return Dataset(name, train, val, _fingerprint(train, val))


def _pick(images: Array, labels: Array | None, rows: Array) -> Split:
    labels = None if labels is None else labels[rows].astype(np.int64)
    return Split(images, labels, rows) if isinstance(images, np.memmap) else Split(images[rows], labels)


def _check(images: Array, where: str, low: float = 0.0, high: float = 1.0) -> Array:
    """Images as [N, C, H, W], uint8 or float32 on [0, 1], every value looked at: a float outside [low, high] is refused."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{where}: expected images [N, H, W], [N, C, H, W] or [N, H, W, C] with at least one, got shape {images.shape}")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{where}: expected uint8, or floats on [0, 1], got {images.dtype}")
    if images.dtype != np.uint8:
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            bad = ~((part >= low) & (part <= high))  # a NaN fails both comparisons
            if bad.any():
                first = tuple(int(i) for i in np.argwhere(bad)[0])
                raise InputError(f"{where}: value {part[first]} at image {start + first[0]}, index {first[1:]}; expected floats on [0, 1] (divide by 255?)")
        if not isinstance(images, np.memmap):
            images = images.astype(np.float32)
    return images if isinstance(images, np.memmap) else np.ascontiguousarray(images)


def _fingerprint(*splits: Split) -> str:
    """SHA-256 of the content; of a memory-mapped array its shape and 1,024 evenly spaced images, since reading all would cost an epoch."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"{split.images.dtype}{split.images.shape[1:]}{len(split)}".encode())
        if isinstance(split.images, np.memmap):
            rows = np.linspace(0, len(split) - 1, min(1024, len(split))).astype(np.int64)
            digest.update(np.ascontiguousarray(split.images[rows if split.rows is None else split.rows[rows]]).tobytes())
        else:
            digest.update(split.images.data if split.images.flags.c_contiguous else split.images.tobytes())
    return digest.hexdigest()
