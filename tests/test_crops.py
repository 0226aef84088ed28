"""Crops of pictures: at places that are a function of seed, step and row, and at fixed ones for what is measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import forked, metrics, relative_difference, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dist_ae
from dist_ae import PRESETS, Config
from dist_ae.config import DataConfig, InputError
from dist_ae.data.crops import Crops, placed
from dist_ae.data.encoded import Encoded
from dist_ae.data.pack import pack_source
from dist_ae.data.packed import examine_packed
from dist_ae.data.records import Split, Whole, span
from dist_ae.data.sources import load

RANDOM = np.random.default_rng(0)
# Photographs are smooth; these are sums of waves, so that a net has something to learn from them.
WAVES = np.stack(
    [
        np.sin(np.add.outer(np.arange(40) * a, np.arange(56) * b)[None] + np.arange(3)[:, None, None])
        for a, b in RANDOM.uniform(0.05, 0.6, (24, 2))
    ]
)
PICTURES = (127.5 * (1 + WAVES)).astype(np.uint8)


def experiment(run_dir: Path, **overrides: Any) -> Config:
    small = {
        "data.crop": 16, "data.flip": True, "model.widths": (8, 16), "model.latent_dim": 4, "train.batch_size": 24,
        "train.steps": 12, "train.eval_every": 6, "train.save_every": 4, "train.log_every": 1, "precision": "fp64",
        "objective.noise_std": (0.02, 0.2), "tracking.wandb": "off", "tracking.pictures": False, "run_dir": run_dir,
        **overrides,
    }  # fmt: skip
    return PRESETS["conv"].override(small)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(5, 40), st.integers(5, 40)), min_size=1, max_size=4),
    stride=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**12),
)
def test_a_crop_is_the_pixels_at_its_place_and_fixed_ones_reach_every_edge(
    sizes: list[tuple[int, int]], stride: int, seed: int, step: int
) -> None:
    size, rng = 5, np.random.default_rng(seed % 2**32)
    pictures = [rng.integers(0, 256, (2, *each)).astype(np.uint8) for each in sizes]
    crops = Crops(Whole.of(pictures), size)
    for number, picture in enumerate(pictures):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (size, size), axis=(1, 2)).transpose(1, 2, 0, 3, 4)
        fixed = crops.take(crops.tiles(number, stride))
        # Evenly spread places from the first pixel to the last, by another way than the numbers of crops.
        down, across = (
            [i * (side - size) // max(1, (side - size) // stride) for i in range((side - size) // stride + 1)]
            for side in picture.shape[1:]
        )
        assert np.array_equal(fixed, windows[down][:, across].reshape(-1, 2, size, size))
        rows = placed(Split(crops, None, np.full(20, number << 33)), np.arange(20), seed, step, flip=True)
        for crop, mirrored in zip(crops.take(rows), rows >> 32 & 1, strict=True):
            here = crop[..., ::-1] if mirrored else crop
            assert (windows == here).all((2, 3, 4)).any()


def test_places_and_sides_are_drawn_evenly_and_anew_in_every_step() -> None:
    crops = Crops(np.zeros((1, 1, 12, 20), np.uint8), 8)
    split = Split(crops, None, np.zeros(4096, np.int64))
    rows = placed(split, np.arange(4096), 7, 3, flip=True)
    y, x, mirrored = (rows >> 16 & 0xFFFF) * 5 >> 16, (rows & 0xFFFF) * 13 >> 16, rows >> 32 & 1
    for values, count in ((y, 5), (x, 13), (mirrored, 2)):
        found = np.bincount(values, minlength=count)
        assert len(found) == count and np.abs(found - 4096 / count).max() < 5 * (4096 / count) ** 0.5
    assert not np.array_equal(rows, placed(split, np.arange(4096), 7, 4, flip=True))
    assert np.array_equal(rows[:100], placed(split, np.arange(100), 7, 3, flip=True))
    assert not (placed(split, np.arange(4096), 7, 3, flip=False) >> 32).any()


@pytest.mark.slow
def test_crops_flips_and_unknown_noise_are_the_same_on_any_number_of_processes_and_after_a_kill(tmp_path: Path) -> None:
    def train(rank: int, name: str, steps: int) -> None:
        dist_ae.train(experiment(tmp_path / name, **{"train.steps": steps}), data=PICTURES)

    for world in (1, 2, 3):
        assert forked(world, partial(train, name=str(world), steps=12), tmp_path / f"log-{world}") == [0] * world
    one = [line["loss"] for line in metrics(tmp_path / "1")]
    assert len(set(one)) == 12
    for name in ("2", "3"):
        assert relative_difference(weights(tmp_path / name), weights(tmp_path / "1")) < 1e-8
        assert [line["loss"] for line in metrics(tmp_path / name)] == pytest.approx(one, rel=1e-10)
        assert metrics(tmp_path / name, "val")[-1]["denoised_psnr"] == pytest.approx(
            metrics(tmp_path / "1", "val")[-1]["denoised_psnr"], rel=1e-9
        )


@pytest.mark.slow
def test_a_run_on_crops_that_is_stopped_and_resumed_is_the_undisturbed_one(tmp_path: Path) -> None:
    usual = {"precision": "fp32", "optim.schedule": "constant"}
    whole = dist_ae.train(experiment(tmp_path / "whole", **usual), data=PICTURES)
    dist_ae.train(experiment(tmp_path / "half", **usual, **{"train.steps": 5}), data=PICTURES)
    resumed = dist_ae.train(experiment(tmp_path / "half", **usual), data=PICTURES)
    still = dist_ae.train(experiment(tmp_path / "still", **usual, **{"data.flip": False}), data=PICTURES)
    assert resumed.weights_sha256 == whole.weights_sha256 != still.weights_sha256


def test_what_has_no_crops_is_refused_with_the_reason(tmp_path: Path) -> None:
    for settings_, message in (
        ({"data.crop": 41}, "are smaller"),
        ({"data.crop": None}, "data.flip is for crops"),
        ({"data.crop": None, "data.flip": False, "data.crops": 3}, "data.crops is for crops"),
        ({"data.window": 2}, "data.window"),
    ):
        with pytest.raises(InputError, match=message):
            dist_ae.train(experiment(tmp_path / "run", **settings_), data=PICTURES)
    with pytest.raises(InputError, match="cuts squares out of pictures"):
        dist_ae.train(experiment(tmp_path / "run"), data=RANDOM.random((40, 6)))


def test_an_epoch_takes_as_many_crops_of_a_picture_as_it_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "pictures.npy", PICTURES)
    name = f"array:{tmp_path / 'pictures.npy'}"
    usual, told = (load(DataConfig(name=name, crop=16, crops=crops)) for crops in (None, 10))
    pictures = len(PICTURES) - 2
    assert len(usual.train) == pictures * 2 * 3 and len(told.train) == pictures * 10 and len(told.val) == len(usual.val)
    assert span(usual.val, range(len(usual.val))).shape == (2 * 6, 3, 16, 16)


def test_whole_pictures_of_any_sizes_are_packed_once_and_crops_are_cut_where_they_are_read(tmp_path: Path) -> None:
    folder, sizes = tmp_path / "pictures", [(40, 61), (33, 20), (90, 35), (15, 80), (64, 64), (50, 41)]
    folder.mkdir()
    pictures = [RANDOM.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")
    packed = DataConfig(name=f"folder:{folder}", crop=16, cache=tmp_path / "cache", val_fraction=0.3)
    dataset = load(packed)
    found = [dataset.train.images, dataset.val.images]
    assert all(isinstance(each, Crops) for each in found) and dataset.image_shape == (3, 16, 16)
    crops = found[0]
    assert isinstance(crops, Crops) and isinstance(crops.pictures, Whole)
    for number, picture in enumerate(pictures):
        assert np.array_equal(crops.pictures.picture(number), picture.transpose(2, 0, 1))
    # The one that is too low for a crop is left out; each other is on one side.
    sides = [set((side.rows >> 33).tolist()) for side in (dataset.train, dataset.val) if side.rows is not None]
    assert sides[0] | sides[1] == {0, 1, 2, 4, 5} and not sides[0] & sides[1]
    # Several shards, `image_size` as the shorter side, and 16 bits.
    out = tmp_path / "out"
    Image.fromarray(pictures[0][..., 0].astype(np.uint16) * 257 + 5).save(folder / "deep.png")
    pack_source(f"folder:{folder}", out, DataConfig(name="digits", fit="whole", image_size=30), shard_bytes=12_000)
    assert len(list(out.glob("images-*.npy"))) > 3 and all(whole for whole, _ in examine_packed(out))
    again = load(DataConfig(name=f"packed:{out}", crop=16))
    assert isinstance(again.train.images, Crops) and again.train.images.dtype == np.uint16
    assert again.train.images.sizes.min(1).tolist() == [30] * 7
    assert sorted(again.train.images.sizes.max(1).tolist()) == [30, 37, 46, 46, 50, 77, 160]
    with pytest.raises(InputError, match=r"--data\.crop 64"):
        load(DataConfig(name=f"packed:{out}"))
    # Damage is found before anything is read.
    (out / "sizes-00000.npy").write_bytes((out / "sizes-00000.npy").read_bytes()[:-8] + b"\xff" * 8)
    with pytest.raises(InputError, match=r"sizes-00000\.npy"):
        load(DataConfig(name=f"packed:{out}", crop=16))


@pytest.mark.slow
def test_a_set_beyond_its_budget_keeps_its_files_and_gives_the_same_crops_and_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    for number, picture in enumerate(PICTURES):
        image = Image.fromarray(picture.transpose(1, 2, 0)[: 30 + number])
        kind = ("jpg", "png", "webp", "tif")[number % 4]
        image.save(folder / f"{number:02}.{kind}", exif=exif if number % 3 == 0 else Image.Exif())
    name, cache = f"folder:{folder}", tmp_path / "cache"
    data = {"data.name": name, "data.cache": cache, "data.val_fraction": 0.3, "precision": "fp32"}
    results, sets = [], []
    for budget in (None, 1e-6):
        config = experiment(tmp_path / str(budget), **data, **{"data.budget": budget})
        results.append(dist_ae.train(config).weights_sha256)
        sets.append(load(config.data))
    assert results[0] == results[1]
    two = experiment(tmp_path / "two", **data, **{"data.budget": 1e-6})

    def train(rank: int) -> None:
        dist_ae.train(two)

    assert forked(2, train, tmp_path / "log") == [0, 0]
    assert relative_difference(weights(tmp_path / "two"), weights(tmp_path / "None")) < 1e-3  # float32's
    pixels, encoded = (each.train.images for each in sets)
    assert isinstance(pixels, Crops) and isinstance(encoded, Crops)
    assert isinstance(pixels.pictures, Whole) and isinstance(encoded.pictures, Encoded)
    assert encoded.pictures.nbytes == sum(path.stat().st_size for path in folder.iterdir())
    rows = (np.repeat(np.arange(len(PICTURES)), 5) << 33) + RANDOM.integers(0, 2**33, 5 * len(PICTURES))
    assert np.array_equal(pixels.take(rows), encoded.take(rows))
    # By hand, in several shards, of 16 bits, to a common shorter side.
    deep = Image.fromarray(PICTURES[0, 0].astype(np.uint16) * 257 + 5)
    deep.save(folder / "deep.png")
    for budget in (None, 1e-6):
        out = tmp_path / f"out-{budget}"
        packed = DataConfig(name=name, fit="whole", image_size=24, budget=budget)
        manifest = pack_source(name, out, packed, shard_bytes=20_000)
        assert len(manifest.shards) > 2 and all(whole for whole, _ in examine_packed(out))
        sets.append(load(DataConfig(name=f"packed:{out}", crop=16)))
    pixels, encoded = (each.train.images for each in sets[2:])
    assert isinstance(pixels, Crops) and isinstance(encoded, Crops) and encoded.dtype == np.uint16
    assert np.array_equal(pixels.take(rows), encoded.take(rows))


def test_a_set_that_keeps_its_files_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(PICTURES[:6]):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{number}.png")
    config = DataConfig(name=f"folder:{folder}", crop=16, budget=1e-6, cache=tmp_path / "cache", val_fraction=0.3)
    crops = load(config).train.images
    assert isinstance(crops, Crops) and isinstance(crops.pictures, Encoded)
    place = crops.pictures.parts[0]
    broken = np.array(place)
    broken[len(broken) // 12 : len(broken) // 6] = 0
    crops.pictures.parts = [broken]
    with pytest.raises(InputError, match="picture 0 of the packed set cannot be decoded"):
        crops.take(np.zeros(1, np.int64))
    (packed,) = (tmp_path / "cache" / "packed").iterdir()
    np.save(packed / "ends-00000.npy", np.arange(6)[::-1].copy())
    with pytest.raises(InputError, match=r"ends-00000\.npy: damaged"):
        load(config)
    with pytest.raises(InputError, match="budget keeps whole files"):
        DataConfig(name=f"folder:{folder}", budget=1.0)
