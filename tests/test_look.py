"""A stranger's pictures are looked at before they are trained on: what is odd in them is counted and said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import cut, make_folder
from PIL import Image

import dist_ae
from dist_ae.config import DataConfig, InputError
from dist_ae.data.packed import packed_names, packed_sets, read_manifest
from dist_ae.data.sources import load


def sides(config: DataConfig) -> dict[str, bool]:
    """Whether each picture of a folder is held out, by its name."""
    dataset = load(config)
    (folder,) = packed_sets(f"{config.cache}/packed/*")
    names = packed_names(folder, read_manifest(folder))
    assert dataset.train.rows is not None and dataset.val.rows is not None
    return {names[row]: held for held, rows in ((False, dataset.train.rows), (True, dataset.val.rows)) for row in rows}


def test_three_copies_of_each_picture_are_on_one_side_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "p", 40, sizes=False, classes=("a",))
    single = sides(DataConfig(name=f"folder:{tmp_path}/p", cache=tmp_path / "single", val_fraction=0.3))
    for path in list((tmp_path / "p" / "a").iterdir()):
        for copy in ("b", "c"):
            (tmp_path / "p" / copy).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "p" / copy / f"copy-{path.name}")
    config = DataConfig(name=f"folder:{tmp_path}/p", cache=tmp_path / "cache", val_fraction=0.3)
    found = sides(config)
    assert len(found) == 120 and 0 < sum(found.values()) < 120
    for name, held in single.items():  # the first keeps its place, and its copies lie there
        own = name.removeprefix("a/")
        assert {found[name], found[f"b/copy-{own}"], found[f"c/copy-{own}"]} == {held}
    looked = load(config).looked
    assert (looked["pictures"], looked["copies"], looked["extra_copies"], looked["leaks"]) == (120, 120, 80, 0)
    usual = dist_ae.PRESETS["ae"].model_copy(update={"data": config})
    run = usual.override({"run_dir": tmp_path / "run", "train.steps": 2})
    capsys.readouterr()
    dist_ae.train(run.override({"tracking.wandb": "off", "tracking.pictures": False}))
    assert "120 of 120 pictures have a twin of the same bytes; twins are kept on one side" in capsys.readouterr().out
    assert '"copies": 120' in (tmp_path / "run" / "result.json").read_text()


def test_frames_of_one_clip_look_alike_and_a_group_keeps_them_together(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for clip in range(12):
        picture = np.asarray(cut(10 * clip + 3, 60, 60)).astype(int)
        for frame in range(5):
            noisy = picture + np.random.default_rng(60 * clip + frame).integers(-3, 4, picture.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "p" / f"clip{clip}_{frame}.png")
    config = DataConfig(name=f"folder:{tmp_path}/p", cache=tmp_path / "cache", val_fraction=0.3)
    looked = load(config).looked
    assert looked["copies"] == 0 and looked["near_duplicates"] >= 50
    grouped = sides(config.model_copy(update={"group": "clip[0-9]+", "cache": tmp_path / "grouped"}))
    for clip in range(12):
        assert len({held for name, held in grouped.items() if name.startswith(f"clip{clip}_")}) == 1
    assert 0 < sum(grouped.values()) < 60
    ungrouped = sides(config)
    assert any(
        len({held for name, held in ungrouped.items() if name.startswith(f"clip{clip}_")}) == 2 for clip in range(12)
    )
    with pytest.raises(InputError, match="no regular expression"):
        load(config.model_copy(update={"group": "clip["}))
    with pytest.raises(InputError, match="leave it out"):
        load(DataConfig(name="digits", group="x"))


def test_different_pictures_of_one_kind_are_no_look_alikes(tmp_path: Path) -> None:
    make_folder(tmp_path / "p", 60)
    looked = load(DataConfig(name=f"folder:{tmp_path}/p", image_size=24, cache=tmp_path / "cache")).looked
    assert looked["copies"] == 0 and looked["near_duplicates"] <= 2
    assert looked["sizes"]["different"] > 20 and looked["largest"][0] < 100


def test_copies_across_a_split_that_is_given_are_said(tmp_path: Path) -> None:
    make_folder(tmp_path / "p" / "train", 10, sizes=False)
    make_folder(tmp_path / "p" / "val", 4, sizes=False)  # the same pictures
    looked = load(DataConfig(name=f"folder:{tmp_path}/p", cache=tmp_path / "cache")).looked
    assert looked["leaks"] == 4 and looked["given_split"]
