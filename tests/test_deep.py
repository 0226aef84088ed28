"""Pictures of more than 8 bits keep them, from the file through packing, training and every use to the file again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli, metrics
from PIL import Image

import dist_ae
from dist_ae import PRESETS, InputError
from dist_ae.config import DataConfig
from dist_ae.data import deep
from dist_ae.data.form import decode
from dist_ae.data.packed import read_manifest
from dist_ae.data.pictures import form_of
from dist_ae.data.sources import load
from dist_ae.use import commands

Array = np.ndarray[Any, np.dtype[Any]]
SMALL: dict[str, Any] = {
    "model.hidden_dims": (32, 16),
    "model.latent_dim": 4,
    "train.batch_size": 16,
    "train.steps": 40,
    "train.log_every": 20,
    "tracking.wandb": "off",
    "precision": "fp32",
}


def levels(count: int, most: int, channels: int = 1, side: int = 10) -> Array:
    """Smooth pictures uint16 [N, C, H, W] with values from 0 to ``most``."""
    draw, axis = np.random.default_rng(0), np.linspace(0, 3, side)
    phase = draw.uniform(0, 6, (count, channels, 2, 1, 1))
    waves = np.sin(axis[:, None] + phase[:, :, 0]) * np.sin(axis[None] + phase[:, :, 1])
    return np.rint((waves + 1) / 2 * most).astype(np.uint16)


def folder(path: Path, pictures: Array, ending: str = ".png") -> Path:
    path.mkdir()
    for number, picture in enumerate(pictures):
        content = deep.png(picture) if ending == ".png" else deep.tiff(picture)
        (path / f"{number:03}{ending}").write_bytes(content)
    return path


def packed(path: Path, cache: Path, **more: Any) -> Any:
    return load(DataConfig(name=f"folder:{path}", cache=cache, **more))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_every_value_of_a_16_bit_png_or_tiff_is_packed_as_it_is(channels: int, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pictures = np.random.default_rng(0).integers(0, 65536, (70, channels, 5, 4)).astype(np.uint16)
    for kind in ("png", "tif"):
        (tmp_path / kind).mkdir()
    for number, picture in enumerate(pictures):  # more of them than are decoded in one process
        (tmp_path / "png" / f"{number:02}.png").write_bytes(deep.png(picture))
        shown = picture.transpose(1, 2, 0) if channels == 3 else picture[0]
        kinds: list[dict[str, Any]] = [{}, {"byteorder": ">"}, {"compression": "zlib", "predictor": True}]
        kind = "rgb" if channels == 3 else "minisblack"
        tifffile.imwrite(tmp_path / "tif" / f"{number:02}.tif", shown, photometric=kind, **kinds[number % 3])
    for kind in ("png", "tif"):
        dataset = packed(tmp_path / kind, tmp_path / "cache")
        assert dataset.train.images.dtype == np.uint16
        np.testing.assert_array_equal(dataset.train.images[:], pictures)
        eight = packed(tmp_path / kind, tmp_path / "cache", bits="8").train.images
        assert eight.dtype == np.uint8 and np.abs(eight[:] - pictures / 257.0).max() < 1


def test_colour_grey_alpha_size_and_orientation_of_16_bits_are_those_of_8_to_rounding() -> None:
    """One rule for both depths: what 8 bits give is what 16 give, rounded."""
    draw = np.random.default_rng(0)
    for _ in range(12):
        wide = levels(1, 65535, 3, int(draw.integers(5, 40)))[0]
        flat = Image.fromarray(deep.narrowed(wide).transpose(1, 2, 0))
        for settings in ({}, {"image_size": 7}, {"image_size": 16, "fit": "stretch"}, {"image_size": 9, "fit": "pad"}):
            for channels in ("grey", "rgb"):
                config = DataConfig(background="#204080", **settings)
                found = decode(deep.png(wide), form_of(config, channels))
                same = decode(flat, form_of(config, channels))
                assert found.dtype == np.uint16 and found.shape == same.shape
                assert np.abs(found / 257 - same).max() <= 3  # of 8 bits, each of two steps is rounded
    (one,) = levels(1, 65535)
    turned = Image.fromarray(one[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(file := __import__("io").BytesIO(), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(file.getvalue(), form_of(DataConfig(), "grey"))[0], np.rot90(one[0], -1))


@pytest.mark.slow
def test_a_mixed_set_is_widened_exactly_and_said(tmp_path: Path) -> None:
    source = folder(tmp_path / "mixed", levels(75, 60_000))
    for number in range(3):
        Image.fromarray(np.full((10, 10), 100 + number, np.uint8)).save(source / f"{number:03}.png")
    done = cli("pack", str(source), str(tmp_path / "out"))
    assert "16 bits, values from" in done.stdout and "3 of 75 pictures have 8 bits, widened" in done.stdout
    images = load(DataConfig(name=f"packed:{tmp_path / 'out'}")).train.images
    assert (images[:3] == (np.arange(3)[:, None, None, None] + 100) * 257).all()
    for number in range(72):  # the first 72 of 8 bits: what was packed of them is packed anew
        Image.fromarray(np.full((10, 10), 100, np.uint8)).save(source / f"{number:03}.png")
    again = packed(source, tmp_path / "cache")
    assert again.train.images.dtype == np.uint16 and (again.train.images[:72] == 25_700).all()
    refused = cli("train", "ae", "--data.name", f"packed:{tmp_path / 'out'}", "--data.bits", "8")
    assert refused.returncode == 2 and "was packed with 16 bits, not 8" in refused.stderr
    refused = cli("train", "ae", "--data.name", "digits", "--data.bits", "16")
    assert refused.returncode == 2 and "data.bits is for pictures" in refused.stderr


@pytest.mark.slow
def test_12_bits_in_16_are_said_stretched_and_come_out_in_their_own_units(tmp_path: Path) -> None:
    pictures = levels(60, 4095)
    source = folder(tmp_path / "twelve", pictures)
    command = f"train ae --data.name folder:{source} --data.cache {tmp_path}/cache --tracking.wandb off"
    command += " --model.hidden-dims 32 16 --model.latent-dim 4 --train.batch-size 16 --train.steps 150"
    told = {}
    for scale in ("none", "range"):
        run = f"--data.scale {scale} --run-dir {tmp_path}/{scale}".split()
        done = cli(*command.split(), *run)
        assert done.returncode == 0, done.stderr
        told[scale] = done.stderr
        assert dist_ae.load(tmp_path / scale).config.data.bits == "16"
    # The manifest has the range, and training says what is lost without the setting.
    assert "16 bits, values from 0 to 4,095 of 65,535, 6.2% of the range; --data.scale range" in told["none"]
    (manifest,) = (tmp_path / "cache" / "packed").glob("*/manifest.json")
    assert (json.loads(manifest.read_text())["low"], json.loads(manifest.read_text())["high"]) == (0, 4095)
    model = dist_ae.load(tmp_path / "range")
    seen = model.reconstruct(pictures).numpy()
    assert 1000 < seen.max() < 6000 and np.abs(seen - pictures).mean() < 400  # in the numbers of the files
    assert metrics(tmp_path / "range", "val")[-1]["psnr"] > 15
    out = commands.reconstruct_run(tmp_path / "range", str(source), tmp_path / "out")
    written = np.stack([np.asarray(Image.open(out / f"{n:03}.png")) for n in range(60)])
    assert written.dtype == np.uint16
    np.testing.assert_array_equal(written, np.rint(seen.clip(0, 65535))[:, 0])
    plain = commands.reconstruct_run(tmp_path / "none", str(source), tmp_path / "plain")
    first = np.asarray(Image.open(plain / "000.png"))
    expected = dist_ae.load(tmp_path / "none").reconstruct(pictures[:1]).numpy()[0, 0] * 65535
    assert len(np.unique(first)) > 60 and np.abs(first - expected.clip(0)).max() <= 1  # not 17 levels of grey


@pytest.mark.slow
def test_every_use_takes_and_writes_16_bits(tmp_path: Path) -> None:
    grey = folder(tmp_path / "grey", levels(40, 50_000), ".tif")
    colour = folder(tmp_path / "colour", levels(40, 3000, 3))
    for name, source, scale in (("grey", grey, "auto"), ("colour", colour, "range"), ("standard", colour, "standard")):
        run = tmp_path / f"run-{name}"
        own = {"data.name": f"folder:{source}", "data.cache": tmp_path / "cache", "data.scale": scale, "run_dir": run}
        dist_ae.train(PRESETS["ae"].override({**SMALL, **own}))
        out = commands.reconstruct_run(run, str(source), tmp_path / f"out-{name}")
        files = sorted(out.iterdir())
        assert len(files) == 40 and {path.suffix for path in files} == {".tif" if name == "grey" else ".png"}
        back = decode(files[0].read_bytes(), form_of(DataConfig(), "grey" if name == "grey" else "rgb"))
        assert back.dtype == np.uint16
        units = 65535 if scale == "auto" else 1
        own_array = dist_ae.load(run).reconstruct(str(source))[0].numpy() * units
        assert np.abs(back - own_array.clip(0, 65535)).max() <= 1
        commands.score_run(run, str(source), tmp_path / f"{name}.csv", maps=tmp_path / f"maps-{name}")
        (panel,) = {Image.open(path).size for path in (tmp_path / f"maps-{name}").iterdir()}
        shown = np.asarray(Image.open(sorted((tmp_path / f"maps-{name}").iterdir())[0]))[30:150, : panel[0] // 4]
        assert shown.std() > 10  # the eye gets the whole range: not black, not white
        assert commands.explore_run(run, str(source), tmp_path / f"{name}.html").stat().st_size > 10_000
        found = commands.evaluate_run(run, out=tmp_path / f"{name}.json").metrics
        assert np.isfinite(found["val.mse"]) and np.isfinite(found["val.pca_mse"])
        # A packed set, an array of its numbers and the folder are the same images.
        np.save(tmp_path / "own.npy", levels(40, 50_000) if name == "grey" else levels(40, 3000, 3))
        cli("pack", str(source), str(tmp_path / f"packed-{name}"))
        model = dist_ae.load(run)
        for other in (f"packed:{tmp_path}/packed-{name}", f"array:{tmp_path}/own.npy"):
            assert np.allclose(model.score(other), model.score(str(source)), rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_a_run_of_8_bits_takes_pictures_of_16_and_the_other_way_round(tmp_path: Path) -> None:
    wide = levels(40, 65535)
    source = folder(tmp_path / "wide", wide)
    (tmp_path / "flat").mkdir()
    for number, picture in enumerate(deep.narrowed(wide)):
        Image.fromarray(picture[0]).save(tmp_path / "flat" / f"{number:03}.png")
    for name, scale in (("flat", "auto"), ("wide", "auto"), ("flat", "range"), ("wide", "range")):
        run = tmp_path / f"{name}-{scale}"
        own = {"data.name": f"folder:{tmp_path / name}", "data.cache": tmp_path / "cache", "data.scale": scale}
        dist_ae.train(PRESETS["ae"].override({**SMALL, **own, "run_dir": run}))
        model = dist_ae.load(run)
        assert model.config.data.bits == ("8" if name == "flat" else "16")
        one, other = model.score(str(source)), model.score(str(tmp_path / "flat"))
        assert np.allclose(one, other, rtol=0.05, atol=1e-4)


@pytest.mark.slow
def test_a_run_of_before_there_were_16_bits_goes_on_with_8(tmp_path: Path) -> None:
    source = folder(tmp_path / "wide", levels(40, 65535))
    own = {"data.name": f"folder:{source}", "data.cache": tmp_path / "cache", "run_dir": tmp_path / "run"}
    config = PRESETS["ae"].override({**SMALL, **own, "data.bits": "8", "optim.schedule": "constant"})
    dist_ae.train(config)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    del kept["config"]["data"]["bits"], kept["trajectory"]["data.bits"]  # as an older version wrote it
    (tmp_path / "run" / "config.json").write_text(json.dumps(kept))
    assert commands.evaluate_run(tmp_path / "run", out=tmp_path / "e.json").metrics["val.mse"] > 0
    assert dist_ae.train(config.override({"train.steps": 60})).steps == 60
    with pytest.raises(InputError, match=r"data.fingerprint"):  # 16 bits are other images
        dist_ae.train(config.override({"train.steps": 60, "data.bits": "auto"}))
    manifests = [read_manifest(path.parent) for path in (tmp_path / "cache" / "packed").glob("*/manifest.json")]
    assert {each.dtype for each in manifests} == {"uint8", "uint16"}


def test_what_pillow_cannot_read_with_16_bits_is_named_with_the_way_out(tmp_path: Path) -> None:
    import struct
    import zlib

    tifffile = pytest.importorskip("tifffile")
    source = folder(tmp_path / "wide", levels(5, 65535, 3))
    plane = levels(1, 65535, 3)[0]
    tifffile.imwrite(source / "planes.tif", plane, photometric="rgb", planarconfig="separate")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in plane[:2].transpose(1, 2, 0))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 10, 16, 4, 0, 0, 0))  # grey with alpha
    (source / "alpha.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    done = cli("pack", str(source), str(tmp_path / "out"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "alpha.png: 16-bit LA, of which Pillow reads 8 bits" in done.stderr and "--data.bits 8" in done.stderr
    assert "planes.tif: 16-bit colour in separate planes, which Pillow misreads" in done.stderr
    (source / "planes.tif").unlink()
    assert cli("pack", str(source), str(tmp_path / "out"), "--bits", "8").returncode == 0


@pytest.mark.slow
def test_crops_of_16_bits_have_16_bits(tmp_path: Path) -> None:
    source = folder(tmp_path / "wide", levels(30, 60_000, 3, 20))
    own = {"data.name": f"folder:{source}", "data.cache": tmp_path / "cache", "data.crop": 8, "data.flip": True}
    dist_ae.train(PRESETS["ae"].override({**SMALL, **own, "run_dir": tmp_path / "run"}))
    model = dist_ae.load(tmp_path / "run")
    assert model.config.data.bits == "16" and model.dataset().train.images.dtype == np.uint16
    assert metrics(tmp_path / "run", "val")[-1]["psnr"] > 10
