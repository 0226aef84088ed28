"""Pictures that are not square: `data.image_size 16x48` through packing, training and every use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from conftest import SMALL, cli
from pictures import cut, make_folder, make_tar
from PIL import Image

import dist_ae
from dist_ae import PRESETS, InputError
from dist_ae.config import DataConfig, load_config, parse
from dist_ae.data.packed import read_manifest, settings_of
from dist_ae.data.sources import load
from dist_ae.use import commands
from dist_ae.use.export import command_of

TINY = {**SMALL, "tracking.pictures": False, "train.steps": 4, "train.batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("oblong") / "in", 24)


def test_height_and_width_are_one_setting_and_a_square_keeps_its_number() -> None:
    for given, kept, size in (
        (32, 32, (32, 32)),
        ("32", 32, (32, 32)),
        ("32x32", 32, (32, 32)),
        ("32x128", "32x128", (32, 128)),
        ("128X32", "128x32", (128, 32)),
    ):
        config = DataConfig(image_size=given)
        assert (config.image_size, config.size, settings_of(config)["image_size"]) == (kept, size, kept)
    # The place of a packed set in the cache is a hash of these settings: squares packed before are found again.
    before = {"image_size": 32, "fit": "crop", "channels": "auto", "background": "white", "bits": "auto"}
    assert settings_of(DataConfig(image_size=32)) == before
    for wrong in ("x32", "0x32", "32x", "32x5000", 5000, 0, "big", True):
        with pytest.raises(InputError, match=r"data\.image_size: expected 1 to 4,096 pixels, or height and width"):
            DataConfig(image_size=wrong)
    for more in ({"crop": 8}, {"fit": "whole"}):
        with pytest.raises(InputError, match="one number, the shorter side"):
            DataConfig(image_size="32x128", **more)
    with pytest.raises(InputError, match="photos has square crops"):
        load(DataConfig(name="photos", image_size="32x64"))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pictures_fill_height_and_width_as_fit_says_also_sideways_ones(
    fit: Literal["crop", "pad", "stretch"], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    upright = Image.new("RGB", (80, 40), "red")
    upright.paste("blue", (40, 0, 80, 40))  # the right half
    sideways, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # turned back by a quarter, clockwise
    upright.save(tmp_path / "in" / "a.png")
    sideways.save(tmp_path / "in" / "b.png", exif=exif)
    dataset = load(
        DataConfig(name=f"folder:{tmp_path}/in", image_size="10x30", fit=fit, cache=tmp_path / "c", background="lime")
    )
    both = np.concatenate([dataset.train.images[:2], dataset.val.images[:2]])[:2]
    assert both.shape == (2, 3, 10, 30)
    np.testing.assert_array_equal(*both)
    red, green, blue = both[0].astype(int)
    assert red[5, 9] > 200 and blue[5, 20] > 200
    assert (green[5, 1] > 200) == (fit == "pad") and green[:, 12].max() == 0


def test_folders_tars_and_packed_sets_give_the_same_oblong_pictures(folder: Path, tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", 6)
    done = cli("pack", f"tar:{tmp_path}/x.tar", str(tmp_path / "set"), "--image-size", "8x24")
    assert done.returncode == 0 and "24" in done.stdout, done.stderr
    manifest = read_manifest(tmp_path / "set")
    assert manifest.image_shape == (3, 8, 24) and manifest.settings["image_size"] == "8x24"
    config = DataConfig(name=f"packed:{tmp_path}/set", image_size="8x24")
    dataset = load(config)
    tar = load(config.model_copy(update={"name": f"tar:{tmp_path}/x.tar", "cache": tmp_path / "cache"}))
    np.testing.assert_array_equal(dataset.train.images[:6], tar.train.images[:6])
    with pytest.raises(InputError, match="packed with image_size 8x24, not 24x8"):
        load(config.model_copy(update={"image_size": "24x8"}))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["conv-vae", "ae"])
def test_a_run_on_oblong_pictures_goes_through_every_use(preset: str, folder: Path, tmp_path: Path) -> None:
    # 20 rows are no multiple of a convolution's patch of 8: it pads by the edge, and cuts the rest off again.
    size = (20, 48)
    overrides = {} if preset == "ae" else {"model.widths": (4, 4, 8)}
    config = PRESETS[preset].override({
        **TINY, **overrides, "data.name": f"folder:{folder}", "data.image_size": "20x48", "run_dir": tmp_path / "run",
        "data.cache": tmp_path / "cache",
    })  # fmt: skip
    run = dist_ae.train(config).run_dir
    kept = load_config(run / "config.json")
    assert kept.data.image_size == "20x48" and kept.model.image_shape == (3, *size)
    assert "--data.image-size 20x48" in command_of(kept)
    assert load_config(run / "config.json").trajectory_values()["data.image_size"] == "20x48"

    commands.reconstruct_run(run, folder, tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").shape == (24, 3, *size)
    cut(3, 50, 90).save(tmp_path / "one.png")
    commands.reconstruct_run(run, tmp_path / "one.png", tmp_path / "pictures")
    assert Image.open(next((tmp_path / "pictures").rglob("*.png"))).size == (48, 20)
    scored = commands.score_run(run, folder, tmp_path / "scores.csv", maps=tmp_path / "maps")
    assert len(scored.scores) == 24 and len(list((tmp_path / "maps").rglob("*.png"))) == 24
    commands.evaluate_run(run, subset=2, samples=2, noise_levels=(0.1,))
    assert json.loads((run / "evaluation.json").read_text())["metrics"]["val.mse"] > 0
    assert commands.explore_run(run, folder, out=tmp_path / "page.html").exists()
    exported = commands.export_run(run, tmp_path / "model.onnx", format="onnx")
    assert exported.path.exists()
    assert dist_ae.train(parse(kept.model_dump(mode="json"))).steps == 4  # the run is found again, and is finished


def test_look_proposes_the_proportions_that_nearly_all_pictures_have(tmp_path: Path) -> None:
    for name, sizes, wanted in (
        ("wide", [(60 + i, 3 * (60 + i)) for i in range(6)], "--data.image-size 32x96"),
        ("tall", [(2 * (80 + i), 80 + i) for i in range(6)], "--data.image-size 128x64"),
        ("mixed", [(40, 90), (90, 40), (60, 60)], "--data.image-size 32"),
    ):
        (tmp_path / name).mkdir()
        for number, (height, width) in enumerate(sizes):
            cut(number, height, width).save(tmp_path / name / f"{number}.png")
        done = cli("look", str(tmp_path / name), "--json", "--out", str(tmp_path / "page.html"))
        assert done.returncode == 0, done.stderr
        training = json.loads(done.stdout)["training"]
        assert training["command"].endswith(wanted), training
        assert f"--data.image-size {training['image_size']}" == wanted
