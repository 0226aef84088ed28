"""A stranger's pictures are looked at before they are trained on: what is odd in them is counted and said."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli, environment
from pictures import cut, make_folder
from PIL import Image

import dist_ae
from dist_ae.config import DataConfig, InputError
from dist_ae.data.facts import remarks
from dist_ae.data.form import decode_all, facts_of_all
from dist_ae.data.look import look
from dist_ae.data.packed import packed_names, packed_sets, read_manifest
from dist_ae.data.pictures import form_of, open_source
from dist_ae.data.sources import load


def sides(config: DataConfig) -> dict[str, bool]:
    """Whether each picture of a folder is held out, by its name."""
    dataset = load(config)
    (folder,) = packed_sets(f"{config.cache}/packed/*")
    names = packed_names(folder, read_manifest(folder))
    assert dataset.train.rows is not None and dataset.val.rows is not None
    return {names[row]: held for held, rows in ((False, dataset.train.rows), (True, dataset.val.rows)) for row in rows}


@pytest.mark.slow
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
    with_group = config.model_copy(update={"group": "clip[0-9]+", "cache": tmp_path / "grouped"})
    assert "--data.group" in remarks(looked)[0] and "--data.group" not in remarks(load(with_group).looked)[0]
    grouped = sides(with_group)
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


def test_what_looking_says_of_pictures_is_what_packing_says_of_each_alone(tmp_path: Path) -> None:
    contents: list[Any] = []
    for number in range(60):
        width, height = ((28, 28), (64, 64), (90, 41), (7, 130), (300, 220))[number % 5]
        picture = cut(number, 20 + number, 30).resize((width, height))
        seen = picture.convert("LA" if number % 2 else "RGBA")
        seen.putalpha(picture.convert("L").rotate(180) if number % 3 else Image.new("L", picture.size, 255))
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
            (picture, "PNG", {}),
            (picture.convert("L"), "PNG", {}),
            (picture.convert("L"), "PNG", {"transparency": picture.convert("L").getpixel((0, 0))}),
            (picture.convert("1"), "PNG", {}),
            (picture.quantize(32), "PNG", {"transparency": 3} if number % 2 else {}),
            (seen, "PNG", {}),
            (picture, "JPEG", {"exif": exif}),
            (picture.convert("L"), "JPEG", {"exif": exif}),
            (picture.convert("CMYK"), "TIFF", {"exif": exif}),
        ]
        for image, kind, options in kinds:
            file = io.BytesIO()
            image.save(file, kind, **options)
            contents.append(file.getvalue())
        contents.append(np.asarray(picture))
        contents.append(contents[-2][: 50 + number])  # cannot be read
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 16
        file = io.BytesIO()
        Image.fromarray(grey).save(file, "PNG")
        contents.append(file.getvalue())
    for background, size in (("white", 1), ("white", 7), ("#a0b0c0", 32)):
        form = form_of(DataConfig(background=background), "rgb", (64, 64))
        alone = [read.facts for content in contents for read in decode_all([content], form)]
        chunks = [contents[start : start + size] for start in range(0, len(contents), size)]
        assert [read.facts for chunk in chunks for read in facts_of_all(chunk, form)] == alone
        assert sum(facts is None for facts in alone) == 60


@pytest.mark.parametrize("command", ["look", "pack"])
def test_looking_and_packing_start_without_torch_and_decode_without_pydantic(tmp_path: Path, command: str) -> None:
    root = make_folder(tmp_path / "p", 8, sizes=False)
    program = """
import sys, dist_ae.data.decode
assert not {"torch", "pydantic", "dist_ae.config"} & set(sys.modules), sorted(sys.modules)
import dist_ae.__main__ as program
try:
    program.main()
finally:
    assert "torch" not in sys.modules and "pydantic" in sys.modules
"""
    out = ["--out", str(tmp_path / "page.html")] if command == "look" else [str(tmp_path / "packed")]
    done = subprocess.run(
        [sys.executable, "-c", program, command, str(root), *out], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr


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


def look_at(source: str, tmp_path: Path) -> tuple[dict[str, Any], str, str]:
    """The figures, what was said, and the page."""
    done = cli("look", source, "--out", str(tmp_path / "new" / "page.html"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "new" / "page.json").read_text())
    return figures, done.stdout, (tmp_path / "new" / "page.html").read_text()


def test_look_counts_what_is_odd_in_a_folder_and_writes_a_page_a_table_and_json(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "p", 30)
    for number in range(4):
        first = root / "flower" / f"{2 * number:05d}.{'jpg' if 2 * number % 3 else 'png'}"
        shutil.copy(first, root / f"twin{number}.png")
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.array([[0, 255 - number]] * 2, np.uint8)).resize((40, 40)).save(
            root / "masks" / f"{number}.png"
        )
    Image.new("L", (50, 40), 3).save(root / "<img src=x onerror=alert(1)>.png")
    deep = np.random.default_rng(0).integers(7, 4096, (60, 60)).astype(np.uint16)
    Image.fromarray(deep).save(root / "deep.png")
    (root / "bad.png").write_text("no picture")
    for name in ("notes.txt", "a.xyz", "b.xyz", ".hidden"):
        (root / name).write_text("x")
    before = sorted(root.rglob("*"))
    figures, said, page = look_at(str(root), tmp_path)
    assert sorted(root.rglob("*")) == before
    assert (figures["pictures"], figures["unreadable"], figures["copies"]) == (40, 1, 8)
    assert figures["flat"] == 1 and figures["ignored_suffixes"] == {".xyz": 2, ".txt": 1}
    assert figures["ignored"] == {"not pictures": 3, "hidden": 1}
    assert figures["deep"] == {"pictures": 1, "range": [float(deep.min()), float(deep.max())]}
    assert figures["classes"] == {"flower": 15, "temple": 15, "masks": 4} and figures["modes"]["PNG I;16"] == 1
    sizes = [Image.open(path).size for path in root.rglob("*.*g") if path.name not in ("bad.png",)]
    assert figures["smallest"] == [min(width for width, _ in sizes), min(height for _, height in sizes)]
    for sentence in ("4 of 41 pictures look like masks", "8 of 40 pictures have a twin", "1 picture cannot be read"):
        assert any(sentence in remark for remark in figures["remarks"]) and sentence in said and sentence in page
    assert "--data.image-size 32" in figures["training"]["command"] and "pictures" in said
    assert "<img src=x" not in page and page.count("data:image/webp") >= 4 and "http" not in page
    refused = cli("look", str(root), "--out", str(root / "page.html"))
    assert refused.returncode == 2 and "lies in" in refused.stderr


def test_look_finds_leaks_across_a_given_split_and_what_is_mostly_ignored(tmp_path: Path) -> None:
    make_folder(tmp_path / "p" / "train", 10, sizes=False)
    make_folder(tmp_path / "p" / "val", 4, sizes=False)
    for number in range(40):
        (tmp_path / "p" / f"{number}.raw").write_text("x")
    figures, said, _ = look_at(f"folder:{tmp_path / 'p'}", tmp_path)
    assert figures["leaks"] == 4 and figures["splits"] == {"train": 10, "val": 4}
    assert "4 of the pictures held out by the source are copies" in said
    assert "more is ignored than taken: 40 files against 14 pictures (40 .raw)" in said


def test_frames_on_both_sides_of_a_given_split_and_pages_of_tiffs_are_said(tmp_path: Path) -> None:
    for clip in (7, 9, 11, 21, 23, 29):  # pieces of some contrast: of flat ones frames count less readily as alike
        picture = np.asarray(cut(10 * clip + 3, 60, 60)).astype(int)
        for frame, side in enumerate(("train", "train", "val")):
            (tmp_path / "p" / side).mkdir(parents=True, exist_ok=True)
            noisy = picture + np.random.default_rng(9 * clip + frame).integers(-1, 2, picture.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(tmp_path / "p" / side / f"{clip}_{frame}.png")
    cut(7, 60, 60).save(tmp_path / "p" / "val" / "alone.png")
    shutil.copy(tmp_path / "p" / "train" / "7_0.png", tmp_path / "p" / "val" / "copy.png")
    pages = [cut(100 + number, 60, 60) for number in range(4)]
    for number in range(2):
        pages[number].save(tmp_path / "p" / "train" / f"{number}.tif", save_all=True, append_images=pages[2:])
    figures, said, _ = look_at(f"folder:{tmp_path / 'p'}", tmp_path)
    assert figures["given_split"] and (figures["leaks"], figures["near_leaks"]) == (1, 6)
    assert "6 of the pictures held out by the source look nearly like a training picture" in said
    assert (figures["paged_files"], figures["pages"]) == (2, 6)
    assert "2 files hold 6 pages, and the first of each is used; --data.pages each makes" in said
    packed = load(DataConfig(name=f"folder:{tmp_path}/p", cache=tmp_path / "cache")).looked
    assert packed["near_leaks"] == 6


def test_crops_are_proposed_for_photographs_of_many_sizes_alone(tmp_path: Path) -> None:
    for name, least in (("large", 130), ("small", 60)):
        (tmp_path / name).mkdir()
        for number in range(3):
            cut(number, least + number, least + 9).save(tmp_path / name / f"{number}.png")
        figures, said, page = look_at(str(tmp_path / name), tmp_path)
        for text in (figures["training"].get("crops", ""), said, page):
            assert ("--data.crop 64" in text) == (name == "large")


def test_the_command_keeps_transparency_where_half_of_the_pictures_have_it_and_runs(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(16):
        picture = cut(number, 16, 16).resize((16, 16)).convert("RGBA")
        picture.putalpha(Image.new("L", picture.size, 100 if number % 2 else 255))
        picture.save(tmp_path / "p" / f"{number}.png")
    figures, said, page = look_at(f"folder:{tmp_path / 'p'}", tmp_path)
    command = figures["training"]["command"]
    assert figures["transparent"] == 8 and "8 of 16 pictures are partly transparent" in said
    assert "--data.channels rgba" in command and "--data.channels rgba" in page
    assert figures["training"]["bytes"] == 16 * 4 * 16 * 16
    done = cli(*shlex.split(command)[1:], "--train.steps", "1", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert dist_ae.load(tmp_path / "run").model.image_shape == (4, 16, 16)
    for number in range(1, 5, 2):
        (tmp_path / "p" / f"{number}.png").unlink()
    command = look_at(f"folder:{tmp_path / 'p'}", tmp_path)[0]["training"]["command"]
    assert "rgba" not in command  # of fewer it is an oddity, which the note names


def test_a_folder_that_has_the_name_of_a_data_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="comes with the program; the folder here is folder:photos"):
        look("photos", DataConfig())


def test_look_asks_the_same_of_arrays_and_tables(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 4))
    values[7] = values[3]
    values[:, 2] = 5
    values[9, 0] = np.nan
    np.save(tmp_path / "x.npy", values)
    figures, said, _ = look_at(str(tmp_path / "x.npy"), tmp_path)
    assert (figures["records"], figures["copies"], figures["missing"], figures["constant_channels"]) == (50, 2, 1, 1)
    assert "--data.missing mask" in said and figures["range"][1] == 5
    lines = [",".join(["a", "b", "c", "d", "name"])]
    lines += [
        ",".join(["" if np.isnan(v) else repr(float(v)) for v in row] + [f"n{i}"]) for i, row in enumerate(values)
    ]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    figures, said, page = look_at(str(tmp_path / "x.csv"), tmp_path)
    assert (figures["records"], figures["copies"], figures["missing"], figures["constant_channels"]) == (50, 2, 1, 1)
    assert figures["columns"]["c"] == {"low": 5.0, "high": 5.0, "missing": 0, "constant": True}
    assert list(figures["no_numbers"]) == ["name"] and "--data.exclude name --data.missing mask" in said
    assert "constant" in page


def test_every_suffix_that_pillow_reads_is_a_picture_and_others_name_their_converter(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    kinds = {"pgm": "L", "ppm": "RGB", "jfif": "RGB", "jp2": "RGB", "tga": "RGB", "avif": "RGB", "qoi": "RGB"}
    made = []
    for suffix, mode in kinds.items():
        with contextlib.suppress(OSError, KeyError, ValueError):  # of Pillow built without that codec
            cut(1, 24, 24).convert(mode).save(tmp_path / "p" / f"a.{suffix}", "JPEG" if suffix == "jfif" else None)
            made.append(suffix)
    for path in (tmp_path / "p").iterdir():  # what a codec that is missing began
        if path.suffix[1:] not in made:
            path.unlink()
    assert {"pgm", "ppm", "jfif"} <= set(made)
    dataset = load(DataConfig(name=f"folder:{tmp_path}/p", cache=tmp_path / "cache"))
    assert len(dataset.train) + len(dataset.val) == len(made)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "x.dcm").write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.dcm: pydicom reads it"):
        load(DataConfig(name=f"folder:{tmp_path}/scans"))


def test_links_into_a_cache_are_followed_on_request_and_what_is_met_twice_counts_once(tmp_path: Path) -> None:
    store = make_folder(tmp_path / "store", 8, sizes=False, classes=())
    (tmp_path / "p" / "real").mkdir(parents=True)
    for number, path in enumerate(sorted(store.iterdir())):
        (tmp_path / "p" / f"link{number}{path.suffix}").symlink_to(path)
    config = DataConfig(name=f"folder:{tmp_path}/p", cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"--data\.links follow"):
        load(config)
    follow = config.model_copy(update={"links": "follow"})
    dataset = load(follow)
    assert len(dataset.train) + len(dataset.val) == 8 and dataset.looked["copies"] == 0
    (tmp_path / "p" / "again").symlink_to(store, target_is_directory=True)  # what the links lead to, once more
    (tmp_path / "p" / "real" / "loop").symlink_to(tmp_path / "p", target_is_directory=True)
    cut(30, 24, 24).save(tmp_path / "p" / "real" / "own.png")
    (tmp_path / "p" / "twice.png").symlink_to(tmp_path / "p" / "real" / "own.png")
    dataset = load(follow)
    assert len(dataset.train) + len(dataset.val) == 9


def test_a_link_and_the_picture_that_it_leads_to_count_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "p", 6, sizes=False)
    first = root / "flower" / "00000.png"
    (root / "again").mkdir()
    (root / "again" / "one.png").symlink_to(first)
    (root / "again" / "two.png").symlink_to(root / "again" / "one.png")
    (root / ".store").mkdir()  # what is hidden has no name of its own among the pictures
    cut(40, 24, 24).save(root / ".store" / "x.png")
    for name in ("three.png", "four.png"):
        (root / "again" / name).symlink_to(root / ".store" / "x.png")
    source = open_source(f"folder:{root}")
    names = [picture.name for picture in source.pictures()]
    assert source.count == len(names) == 7 and "again/four.png" in names and "flower/00000.png" in names
    assert source.ignored["links to pictures that are taken themselves"] == 3
    # A split that is made of links into a folder beside it stays a split.
    for number, path in enumerate(sorted((root / "temple").iterdir())):
        side = tmp_path / "q" / ("val" if number else "train")
        side.mkdir(parents=True, exist_ok=True)
        (tmp_path / "q" / "all").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "q" / "all" / path.name)
        (side / path.name).symlink_to(tmp_path / "q" / "all" / path.name)
    assert [picture.split for picture in open_source(f"folder:{tmp_path}/q").pictures()] == ["train", "val", "val"]


def test_two_labels_under_one_stem_of_a_tar_are_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("22.05", "22.06"):
            content = io.BytesIO()
            cut(len(name), 24, 24).save(content, "png")
            for suffix, data in (("png", content.getvalue()), ("cls", b"3")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    with pytest.raises(InputError, match=r"22\.05\.cls and 22\.06\.cls label one sample.*first dot \(22\)"):
        load(DataConfig(name=f"tar:{tmp_path}/x.tar", cache=tmp_path / "cache"))
