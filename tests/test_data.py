"""Named sources are read strictly, and every mistake names the file and the way out."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from dist_ae.config import DataConfig, InputError
from dist_ae.data import arrays, named, reader
from dist_ae.data.named import read_idx
from dist_ae.data.order import epoch_order, share
from dist_ae.data.reader import Reader
from dist_ae.data.sources import load


def idx(images: np.ndarray) -> bytes:
    return struct.pack(f">{images.ndim + 1}I", 0x0800 | images.ndim, *images.shape) + images.tobytes()


def test_digits_are_real_and_the_split_is_fixed() -> None:
    dataset: Any = load(DataConfig())
    assert (len(dataset.train), len(dataset.val), dataset.image_shape) == (1500, 297, (1, 8, 8))
    assert dataset.train.images.dtype == np.uint8 and dataset.train.images.max() == 255
    assert dataset.fingerprint == load(DataConfig()).fingerprint
    assert dataset.train.labels is not None and set(dataset.train.labels) == set(range(10))


def test_fashion_mnist_is_read_whole(fashion_mnist: Path) -> None:
    dataset: Any = load(DataConfig(name="fashion_mnist"))
    assert (dataset.train.images.shape, dataset.val.images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert float(dataset.train.images.mean()) / 255 == pytest.approx(0.2860, abs=1e-4)  # the dataset's published mean
    assert dataset.train.labels is not None and np.bincount(dataset.train.labels).tolist() == [6000] * 10


def test_an_idx_file_is_read_gzipped_or_not(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    (tmp_path / "plain").write_bytes(idx(images))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(images)))
    assert np.array_equal(read_idx(tmp_path / "plain", 3), images) and np.array_equal(
        read_idx(tmp_path / "packed.gz", 3), images
    )


WHOLE = idx(np.ones((3, 4, 5), np.uint8))
BAD_IDX = {
    "empty": (b"", "header of 16 bytes"),
    "wrong magic": (b"\0\0\x0d\x03" + WHOLE[4:], "0x00000803"),
    "labels in place of images": (idx(np.ones(3, np.uint8)) + b"\0" * 20, "0x00000803"),
    "truncated": (WHOLE[:-1], "3 × 4 × 5"),
    "too long": (WHOLE + b"\0", "3 × 4 × 5"),
    "no images": (idx(np.ones((0, 4, 5), np.uint8)), "at least one image"),
    "truncated gzip": (gzip.compress(WHOLE)[:-6], "gzip"),
    "flipped bit in gzip": (bytes(b ^ (i == 20) for i, b in enumerate(gzip.compress(WHOLE, mtime=0))), "gzip"),
}


@pytest.mark.parametrize("kind", BAD_IDX)
def test_a_bad_idx_file_is_refused_naming_file_and_expectation(tmp_path: Path, kind: str) -> None:
    content, expected = BAD_IDX[kind]
    path = tmp_path / f"train-images{'.gz' if 'gzip' in kind else ''}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value)


def test_mnist_from_a_root_and_a_missing_source_names_every_place_and_way_out(tmp_path: Path) -> None:
    for name, array in {
        "train-images-idx3-ubyte": np.ones((6, 4, 5), np.uint8),
        "train-labels-idx1-ubyte": np.ones(6, np.uint8),
        "t10k-images-idx3-ubyte": np.ones((2, 4, 5), np.uint8),
        "t10k-labels-idx1-ubyte": np.ones(2, np.uint8),
    }.items():
        (tmp_path / name).write_bytes(idx(array))
    assert load(DataConfig(name="mnist", root=tmp_path)).image_shape == (1, 4, 5)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.ones(3, np.uint8)))
    with pytest.raises(InputError, match="3 labels for 2 images"):
        load(DataConfig(name="mnist", root=tmp_path))


def test_no_source_found_names_every_place_and_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    import torchvision

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    with pytest.raises(InputError) as error:
        load(DataConfig(name="fashion_mnist", root=tmp_path))
    for part in (
        str(tmp_path),
        "no network",
        "apt-get install dataset-fashion-mnist",
        "--data.root",
        "--data.name digits",
    ):
        assert part in str(error.value)
    with pytest.raises(InputError, match="does not exist"):
        load(DataConfig(name="mnist", root=tmp_path / "nowhere"))
    with pytest.raises(InputError, match="expected digits"):
        load(DataConfig(name="digit"))


def test_cifar10_is_read_from_its_binary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "_CIFAR_IMAGES", 4)
    records = np.random.default_rng(0).integers(0, 10, (6, 4, 3073), dtype=np.uint8)
    for name, record in zip(named._CIFAR_FILES, records, strict=True):
        (tmp_path / name).write_bytes(record.tobytes())
    dataset = load(DataConfig(name="cifar10", root=tmp_path))
    assert dataset.train.images.shape == (20, 3, 32, 32) and len(dataset.val) == 4
    assert np.array_equal(dataset.train.images[5].reshape(-1), records[1, 1, 1:])
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(InputError, match=r"test_batch\.bin: expected 12292 bytes"):
        load(DataConfig(name="cifar10", root=tmp_path))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((20, 6, 5), (1, 6, 5)), ((20, 3, 6, 5), (3, 6, 5)), ((20, 6, 5, 3), (3, 6, 5)), ((20, 1, 6, 5), (1, 6, 5))],
)
def test_own_arrays_in_any_usual_layout(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    np.save(tmp_path / "own.npy", np.zeros(shape, np.uint8))
    dataset = load(DataConfig(name=f"array:{tmp_path / 'own.npy'}"))
    assert dataset.image_shape == expected and (len(dataset.train), len(dataset.val)) == (18, 2)


def test_own_npz_with_a_split_or_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train=np.zeros((5, 4, 4), np.float64), val=np.ones((3, 4, 4), np.float32))
    dataset: Any = load(DataConfig(name=f"array:{tmp_path / 'a.npz'}"))
    assert (len(dataset.train), len(dataset.val), dataset.train.images.dtype) == (5, 3, np.float32)
    np.savez(tmp_path / "b.npz", images=np.zeros((10, 4, 4), np.uint8), labels=np.arange(10))
    labelled = load(DataConfig(name=f"array:{tmp_path / 'b.npz'}"))
    assert labelled.val.labels is not None and len(labelled.val.labels) == 1


@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f4", "f2", ">f8", "g"])
@pytest.mark.parametrize("shape", [(50, 3, 4, 4), (50, 4, 4, 3), (50, 4, 4)])
def test_a_memory_mapped_array_gives_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "own.npy"
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(path, images if dtype == "u1" else (images / 255).astype(dtype))
    whole = load(DataConfig(name=f"array:{path}"))
    monkeypatch.setattr(arrays, "READ_BYTES", 10)
    monkeypatch.setattr(reader, "SHARE_OF_MEMORY", 0)
    mapped = load(DataConfig(name=f"array:{path}"))
    assert isinstance(mapped.train.images, np.memmap) and len(mapped.train) == 45
    assert mapped.fingerprint == whole.fingerprint
    cpu = torch.device("cpu")
    for split in ("train", "val"):
        rows = torch.tensor([3, 0, 44] if split == "train" else [3, 0, 4])
        readers = [Reader(getattr(dataset, split), cpu) for dataset in (whole, mapped)]
        assert readers[0].resident is not None and readers[1].resident is None
        taken = [each.take(rows, rows) for each in readers]
        assert torch.equal(*taken) and taken[1].is_contiguous() and taken[1].dtype == torch.float32


def _floats(value: float, at: tuple[int, ...]) -> np.ndarray:
    images = np.full((10, 2, 2), 0.5)
    images[at] = value
    return images


BAD_ARRAYS = {
    "NaN": (_floats(float("nan"), (3, 1, 0)), r"value nan at image 3, index \(0, 1, 0\)"),
    "infinite": (_floats(float("inf"), (2, 0, 1)), r"value inf at image 2, index \(0, 0, 1\)"),
    "integers": (np.zeros((5, 2, 2), np.int64), "expected uint8"),
    "one image": (np.zeros((1, 2, 2), np.uint8), "at least 2"),
    "one axis": (np.zeros(5, np.uint8), r"got shape \[5\]; reshape one column to \[N, 1\]"),
    "two ways": (np.zeros((5, 32, 32, 5), np.float32), "choose one: data.layout images or images-last"),
    "complex": (np.zeros((5, 4), complex), "expected uint8, uint16 or floats, got complex128"),
    "empty": (np.zeros((0, 4, 4), np.uint8), "at least one"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_a_bad_array_is_refused_naming_the_first_bad_value(tmp_path: Path, kind: str) -> None:
    array, expected = BAD_ARRAYS[kind]
    np.save(tmp_path / "own.npy", array)
    with pytest.raises(InputError, match=expected) as error:
        load(DataConfig(name=f"array:{tmp_path / 'own.npy'}"))
    assert "own.npy" in str(error.value)


def test_bad_array_files_are_refused(tmp_path: Path) -> None:
    ragged = np.empty(2, object)
    ragged[:] = [np.zeros((2, 2)), np.zeros((3, 3))]
    np.save(tmp_path / "ragged.npy", ragged, allow_pickle=True)
    np.savez(tmp_path / "shapes.npz", train=np.zeros((5, 4, 4), np.uint8), val=np.zeros((5, 4, 5), np.uint8))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for name, expected in {
        "ragged.npy": "different shapes",
        "shapes.npz": "differ in shape",
        "torn.npy": "not a readable",
        "empty.npy": "not a readable",
        "torn.npz": "not a readable",
        "missing.npy": "no such file",
    }.items():
        with pytest.raises(InputError, match=expected):
            load(DataConfig(name=f"array:{tmp_path / name}"))


LABELS = {
    "strings": (np.array(["a", "b"] * 5), "whole numbers, got <U1"),
    "void": (np.zeros(10, "V4"), "whole numbers, got"),
    "NaN": (np.array([0.0, np.nan] * 5), "got nan at image 1"),
    "infinite": (np.full(10, np.inf), "got inf at image 0"),
    "halves": (np.arange(10) / 2, "got 0.5 at image 1"),
    "complex": (np.zeros(10, complex), "complex128"),
    "dates": (np.zeros(10, "datetime64[s]"), "datetime64"),
    "too large": (np.array([2**64 - 1] * 10, np.uint64), "18446744073709551615"),
    "one too few": (np.arange(9), "one label per image"),
    "two axes": (np.zeros((10, 1)), "one label per image"),
    "one number": (np.array(3), "one label per image"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, kind: str) -> None:
    labels, expected = LABELS[kind]
    np.savez(tmp_path / "own.npz", images=np.zeros((10, 4, 4), np.uint8), labels=labels)
    with pytest.raises(InputError, match=expected) as error:
        load(DataConfig(name=f"array:{tmp_path / 'own.npz'}"))
    assert "own.npz[labels]" in str(error.value) and "\n" not in str(error.value)


def test_labels_of_every_type_of_whole_number_are_taken(tmp_path: Path) -> None:
    for dtype in ("i1", ">i4", "u8", "?", "f4", ">f8", "g"):
        labels = (np.arange(10) % 2).astype(dtype)
        np.savez(tmp_path / "own.npz", images=np.zeros((10, 4, 4), np.uint8), labels=labels)
        train = load(DataConfig(name=f"array:{tmp_path / 'own.npz'}")).train
        assert train.labels is not None and train.labels.dtype == np.int64 and set(train.labels) == {0, 1}


def test_what_is_no_file_of_arrays_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "text.npy").write_text("text")
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 8, 8)})
    (tmp_path / "huge.npy").write_bytes(huge.getvalue())
    for name, expected in {
        f"array:{tmp_path}/text.npz": "no array",
        f"array:{tmp_path}/pipe.npy": "not a file",
        f"array:{tmp_path}/folder.npy": "not a file",
        "array:~nobody-of-that-name/x.npy": "give the path in full",
        f"array:{tmp_path}/huge.npy": "not a readable",
        f"{tmp_path}/text.npy": "neither format",
        "array:": "names no images",
        "array:a\0b": "cannot hold a NUL",
        "a\0b": "cannot hold a NUL",
        "fashionmnist": "did you mean fashion_mnist",
    }.items():
        with pytest.raises(InputError, match=expected) as error:
            load(DataConfig(name=name))
        assert "\n" not in str(error.value) and "pickle" not in str(error.value)


def test_training_and_test_files_of_differing_sizes_are_refused(tmp_path: Path) -> None:
    for name, array in {
        "train-images-idx3-ubyte": np.ones((6, 4, 5), np.uint8),
        "train-labels-idx1-ubyte": np.ones(6, np.uint8),
        "t10k-images-idx3-ubyte": np.ones((2, 5, 4), np.uint8),
        "t10k-labels-idx1-ubyte": np.ones(2, np.uint8),
    }.items():
        (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(InputError, match="different shapes"):
        load(DataConfig(name="mnist", root=tmp_path))


DTYPES = [
    "u1",
    "i1",
    "<u2",
    ">i4",
    "i8",
    "f2",
    ">f4",
    "f8",
    "g",
    "c8",
    "?",
    "S3",
    "U2",
    "V5",
    "M8[s]",
    "m8[D]",
    "O",
    "u1,f4",
]


@hypothesis.settings(max_examples=250, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9) | st.sampled_from([28, 2**31, 2**62]), max_size=6),
    fortran=st.booleans(),
    size=st.integers(0, 5000) | st.none(),
    flip=st.none() | st.tuples(st.integers(0, 127), st.integers(0, 255)),
    mapped=st.booleans(),
)
def test_any_array_file_gives_images_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    shape: list[int],
    fortran: bool,
    size: int | None,
    flip: tuple[int, int] | None,
    mapped: bool,
) -> None:
    head = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": fortran, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(head, header)
    whole = math.prod(shape) * np.dtype(dtype).itemsize
    content = bytearray(head.getvalue() + bytes(min(whole if size is None else size, 10**6)))
    if flip is not None:
        content[flip[0]] = flip[1]
    path = tmp_path_factory.getbasetemp() / "any.npy"
    path.write_bytes(content)
    with mock.patch.object(arrays, "READ_BYTES", 0 if mapped else 2**20), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = None
        try:
            dataset = load(DataConfig(name=f"array:{path}"))
            images = Reader(dataset.train, torch.device("cpu")).take(torch.arange(len(dataset.train)))
            assert images.shape == (len(dataset.train), *dataset.image_shape) and images.dtype == torch.float32
        except InputError as error:
            message = str(error)
    assert message is None or (str(path) in message and "\n" not in message and "pickle" not in message)


def test_an_epoch_takes_every_image_once_and_shares_cut_it_without_rest() -> None:
    order = epoch_order(0, 3, 1003)
    assert sorted(order.tolist()) == list(range(1003))
    assert not torch.equal(order, epoch_order(0, 4, 1003)) and not torch.equal(order, epoch_order(1, 3, 1003))
    for size in (0, 1, 2, 3, 7, 8, 9, 43, 96):
        for world in (1, 2, 3, 4):
            parts = [list(share(range(size), rank, world)) for rank in range(world)]
            assert [row for part in parts for row in part] == list(range(size))
            assert max(map(len, parts)) - min(map(len, parts)) <= max(1, -(-size // world))


def test_a_preset_trains_on_few_records_with_a_smaller_batch_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dist_ae

    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8)).astype(np.uint8)
    settings = {"train.steps": 3, "tracking.wandb": "off", "run_dir": tmp_path / "run"}
    dist_ae.train(dist_ae.PRESETS["ae"].override(settings), data=images)
    assert "has 27 training images, so a step sees 2 in place of the preset's 128" in capsys.readouterr().out
    again = dist_ae.train(dist_ae.PRESETS["ae"].override(settings), data=images)  # the same command finds it finished
    assert again.steps == 3
    with pytest.raises(InputError, match=r"use --train\.batch-size 27 or less"):  # one that was typed is kept
        dist_ae.train(dist_ae.PRESETS["ae"].override({**settings, "train.batch_size": 64}), data=images)
