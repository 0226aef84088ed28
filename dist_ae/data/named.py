"""Named datasets: the embedded digits, Fashion-MNIST and its kin, CIFAR-10."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from dist_ae.config import DataConfig, InputError
from dist_ae.data.records import Array, Split, Whole, shuffled
from dist_ae.terminal import first_line


def digits(config: DataConfig) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits  # 1,797 real 8×8 digits (UCI optdigits), shipped inside scikit-learn

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    order = shuffled(len(images))
    labels = bunch.target.astype(np.int64)
    train, val = order[:1500], order[1500:]
    return Split(images[train], labels[train]), Split(images[val], labels[val])


PHOTO_SIZE, LARGEST_PHOTO = 64, 256


def photos(config: DataConfig) -> tuple[Split, Split]:
    """Square crops of scikit-learn's two photographs, a temple and a flower of 427×640 pixels in colour.

    Training sees crops of the left part, validation those of the right part. No pixel is in both.
    """
    from sklearn.datasets import load_sample_images

    from dist_ae.data.crops import Crops  # which needs torch

    height, width = config.size or (PHOTO_SIZE, PHOTO_SIZE)
    if height != width:
        raise InputError(f"data.image_size: photos has square crops, got {config.image_size}")
    size = config.crop or height
    if size > LARGEST_PHOTO:
        key = "crop" if config.crop else "image_size"
        raise InputError(f"data.{key}: photos has crops of at most {LARGEST_PHOTO} pixels, got {size}")
    pictures = [picture.transpose(2, 0, 1) for picture in load_sample_images().images]  # [3, 427, 640]
    if config.channels == "grey":
        weights = np.array([299, 587, 114], np.int64)[:, None, None]  # ITU-R 601, as Pillow
        pictures = [((picture * weights).sum(0, keepdims=True) // 1000).astype(np.uint8) for picture in pictures]
    border = 640 - max(128, size)

    def part(left: int, right: int, stride: int) -> Split:
        crops = Crops(Whole.of([picture[:, :, left:right] for picture in pictures]), size)
        rows = np.concatenate([crops.tiles(number, stride) for number in range(len(pictures))])
        # A fixed random order makes the first dozen, which a run's pictures show, varied.
        return Split(crops, None, rows[shuffled(len(rows))])

    return part(0, border, max(1, size // 8)), part(border, 640, max(1, size // 4))


IDX = {  # torchvision's class and folder; where Debian's package puts the files
    "fashion_mnist": ("FashionMNIST", Path("/usr/share/datasets/fashion-mnist")),
    "mnist": ("MNIST", None),
    "kmnist": ("KMNIST", None),
}
CLASSES = {  # names of the labels, by their authors
    "fashion_mnist": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def cache_folder() -> Path:
    """The folder that keeps what is downloaded or packed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_ae"


def idx_dataset(config: DataConfig) -> tuple[Split, Split]:
    class_name, system = IDX[config.name]
    root = config.root or cache_folder()
    first = root if config.root else system
    places = [*([first] if first else []), root / class_name / "raw"]

    def download() -> None:
        import torchvision  # 2.6 s to import: only where something is missing

        getattr(torchvision.datasets, class_name)(root, download=True)

    names: list[tuple[str, ...]] = [(name, f"{name}.gz") for name in _IDX_FILES]
    ways_out = [f"apt-get install dataset-{config.name.replace('_', '-')}"] if system else []
    paths = _find(config, places, names, download, ways_out)
    train, train_labels, val, val_labels = (read_idx(path, dims=3 if "idx3" in path.name else 1) for path in paths)
    return _labelled(train, train_labels, paths[1]), _labelled(val, val_labels, paths[3])


def _labelled(images: Array, labels: Array, path: Path) -> Split:
    if len(images) != len(labels):
        raise InputError(f"{path}: {len(labels)} labels for {len(images)} images")
    return Split(images[:, None], labels.astype(np.int64))


_CIFAR_URL, _CIFAR_MD5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_CIFAR_IMAGES = 10_000  # per file; each image is one label byte and 3 · 32 · 32 pixel bytes


def cifar10(config: DataConfig) -> tuple[Split, Split]:
    # The binary version: torchvision's CIFAR10 unpickles its files, and nothing here reads a pickle.
    root = config.root or cache_folder()

    def download() -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(_CIFAR_URL, str(root), md5=_CIFAR_MD5)

    paths = _find(config, [root, root / "cifar-10-batches-bin"], [(name,) for name in _CIFAR_FILES], download, [])
    records = []
    for path in paths:
        data = path.read_bytes()
        if len(data) != _CIFAR_IMAGES * 3073:
            raise InputError(
                f"{path}: expected {_CIFAR_IMAGES * 3073} bytes ({_CIFAR_IMAGES} images of 3073 bytes), got {len(data)}"
            )
        records.append(np.frombuffer(data, np.uint8).reshape(-1, 3073))
    train, val = np.concatenate(records[:5]), records[5]
    return tuple(
        Split(np.ascontiguousarray(part[:, 1:]).reshape(-1, 3, 32, 32), part[:, 0].astype(np.int64))
        for part in (train, val)
    )  # type: ignore[return-value]


def _find(
    config: DataConfig,
    places: list[Path],
    names: list[tuple[str, ...]],
    download: Callable[[], None],
    ways_out: list[str],
) -> list[Path]:
    """The wanted files from the first place that has them all.

    Where none has, they are downloaded once for all processes of this machine.
    """

    def look() -> list[Path] | None:
        for place in places:
            found = [next((place / name for name in wanted if (place / name).is_file()), None) for wanted in names]
            if all(found):
                return [path for path in found if path is not None]
        return None

    if (paths := look()) is not None:
        return paths
    root = config.root or cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{config.name}.lock"):
            if (paths := look()) is None:
                download()
                paths = look()
    except Exception as error:  # whatever a download can raise: no network, no space, a wrong checksum
        reason = f"the download failed ({type(error).__name__}: {first_line(error)})"
    else:
        reason = "the download finished, but the files are not in it"
    if paths is not None:
        return paths
    options = [
        *ways_out,
        "--data.root DIR, a folder that holds " + ", ".join(" or ".join(wanted) for wanted in names),
        "--data.name digits (embedded)",
    ]
    raise InputError(
        f"no files of {config.name} found: looked in {', '.join(map(str, places))}; {reason}. "
        f"Ways out: {'; or '.join(options)}"
    )


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
        raise InputError(
            f"{path}: expected IDX magic {magic:#010x} (unsigned bytes, {dims} dimensions), got {found:#010x}"
        )
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected or 0 in shape:
        raise InputError(
            f"{path}: the header says {' × '.join(map(str, shape))}, "
            f"so {expected} bytes with at least one image, got {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
