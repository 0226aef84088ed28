"""Pictures in every form are read as a viewer shows them, and what is none is refused in one sentence."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli
from pictures import cut, make_folder, make_tar
from PIL import Image
from sklearn.datasets import load_sample_images

import dist_ae
from dist_ae.config import DataConfig, InputError
from dist_ae.data.crops import Crops
from dist_ae.data.form import Form, decode
from dist_ae.data.pictures import braces, open_source, scan
from dist_ae.data.records import Whole
from dist_ae.data.sources import load

RGB = Form(None)
GREY = Form(None, channels="grey")


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp", "gif", "jpeg"])
def test_every_format_gives_the_pixels_that_were_saved(kind: str) -> None:
    image = cut(3)
    pixels = decode(saved(image, kind, **({"lossless": True} if kind == "webp" else {})), RGB)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 48, 64)
    difference = np.abs(pixels.astype(int) - np.asarray(image).transpose(2, 0, 1)).mean()
    assert difference <= {"jpeg": 8, "gif": 12}.get(kind, 0)


def test_every_mode_of_pixels_becomes_eight_bits_of_grey_or_colour() -> None:
    image = cut(4)
    grey, colour = np.asarray(image.convert("L")), np.asarray(image).transpose(2, 0, 1)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for name, content, expected, tolerance in (
        ("grey", saved(image.convert("L"), "png"), grey, 0),
        ("16 bits, png", saved(deep, "png"), grey, 0),
        ("16 bits, tiff", saved(deep, "tiff"), grey, 0),
        ("floats", saved(Image.fromarray((grey / 255).astype(np.float32)), "tiff"), grey, 0),
        ("32 bits that hold 16", saved(Image.fromarray(grey.astype(np.int32) * 257), "tiff"), grey, 0),
        ("grey with alpha", saved(image.convert("LA"), "png"), grey, 1),
        ("black and white", saved(image.convert("1"), "png"), np.asarray(image.convert("1")) * 255, 0),
    ):
        pixels = decode(content, GREY)
        assert pixels.shape == (1, 48, 64) and np.abs(pixels[0].astype(int) - expected).max() <= tolerance, name
        assert np.array_equal(decode(content, RGB), np.repeat(pixels, 3, 0)), name
    palette = image.quantize(64)
    assert np.array_equal(decode(saved(palette, "png"), RGB), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    assert np.abs(decode(saved(image.convert("CMYK"), "tiff"), RGB).astype(int) - colour).max() <= 2
    assert np.abs(decode(saved(image.convert("CMYK"), "jpeg", quality=95), RGB).astype(int) - colour).mean() < 6


def test_what_is_transparent_shows_the_background() -> None:
    image = cut(5).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    alpha = np.asarray(image)[..., 3:] / 255
    for background in ((255, 255, 255), (0, 128, 30)):
        expected = np.asarray(image)[..., :3] * alpha + np.array(background) * (1 - alpha)
        pixels = decode(saved(image, "png"), Form(None, background=background))
        assert np.abs(pixels.transpose(1, 2, 0) - expected).max() <= 1.5
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert decode(saved(palette, "png", transparency=0), RGB).min() == 255
    assert decode(saved(palette, "gif", transparency=0), RGB).min() == 255


def test_a_picture_lies_as_its_exif_orientation_says() -> None:
    image = cut(6)
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright = image if turn is None else image.transpose(turn)
        assert np.array_equal(decode(saved(image, "png", exif=exif), RGB), np.asarray(upright).transpose(2, 0, 1))


def test_a_moving_picture_gives_its_first_frame() -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (10, 200)]
    assert (decode(saved(frames[0], "gif", save_all=True, append_images=frames[1:]), GREY) == 10).all()
    assert (decode(saved(frames[0], "tiff", save_all=True, append_images=frames[1:]), GREY) == 10).all()


def test_crop_pad_and_stretch_do_what_they_say() -> None:
    """A wide picture: left third red, middle green, right blue."""
    wide = np.zeros((60, 180, 3), np.uint8)
    for third in range(3):
        wide[:, 60 * third : 60 * (third + 1), third] = 255
    for kind in ("png", "jpeg"):
        content = saved(Image.fromarray(wide), kind, **({"quality": 100, "subsampling": 0} if kind == "jpeg" else {}))
        crop, pad, stretch = (
            decode(content, Form((30, 30), fit, background=(255, 255, 255))).astype(int)
            for fit in ("crop", "pad", "stretch")
        )
        assert crop.shape == pad.shape == stretch.shape == (3, 30, 30)
        assert crop[1, :, 2:-2].min() > 230 and crop[0].max() < 40  # the middle, which is green
        assert pad[:, :9].min() > 250 and pad[0, 12:18, 2:8].min() > 230 and pad[2, 12:18, 22:28].min() > 230
        assert stretch[0, :, 2:8].min() > 230 and stretch[1, :, 12:18].min() > 230 and stretch[2, :, 22:28].min() > 230
    tall = Image.fromarray(wide.transpose(1, 0, 2))
    assert decode(saved(tall, "png"), Form((30, 30)))[1, 2:-2].min() > 230
    tiny = decode(saved(Image.new("RGB", (1, 500), (9, 9, 9)), "png"), Form((30, 30), "pad"))
    assert tiny.shape == (3, 30, 30) and set(np.unique(tiny)) == {9, 255}


def test_large_jpegs_are_decoded_small_and_look_the_same() -> None:
    large = cut(0, 427, 640).resize((1920, 1281), Image.Resampling.BICUBIC)
    small = decode(saved(large, "jpeg", quality=95), Form((64, 64)))
    exact = decode(saved(large, "png"), Form((64, 64)))
    assert np.abs(small.astype(int) - exact).mean() < 2


def test_a_folder_s_first_level_names_the_classes_and_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pictures", 6)
    (root / "flower" / "deep" / "er").mkdir(parents=True)
    cut(9).save(root / "flower" / "deep" / "er" / "x.PNG")
    cut(9).save(root / "top.png")
    for name in (".hidden.png", "notes.txt", "flower/.cache"):
        (root / name).write_text("x")
    (tmp_path / "outside.png").write_bytes(b"x")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "in.png").symlink_to(root / "top.png")
    (root / "loop").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "pipe.png")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "self").symlink_to(root / "self")
    source = open_source(f"folder:{root}")
    labels = {picture.name: picture.label for picture in source.pictures()}
    assert labels.pop("top.png") is None and "in.png" not in labels
    assert labels.pop("flower/deep/er/x.PNG") == "flower"
    assert labels == {
        f"{('flower', 'temple')[i % 2]}/{i:05d}.{'jpg' if i % 3 else 'png'}": ("flower", "temple")[i % 2]
        for i in range(6)
    }
    assert dict(source.ignored) == {
        "hidden": 2,
        "not pictures": 2,
        "links that lead out of the folder": 1,
        "links to folders": 1,
        "links to pictures that are taken themselves": 1,
        "not files": 3,
    }


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_train_and_val_folders_are_honoured(tmp_path: Path, held_out: str) -> None:
    make_folder(tmp_path / "p" / "train", 6, sizes=False)
    make_folder(tmp_path / "p" / held_out, 4, sizes=False)
    dataset = load(DataConfig(name=f"folder:{tmp_path / 'p'}", cache=tmp_path / "cache", val_fraction=0.9))
    assert (len(dataset.train), len(dataset.val), dataset.classes) == (6, 4, ("flower", "temple"))
    assert dataset.val.labels is not None and dataset.val.labels.tolist() == [0, 0, 1, 1]


def test_pictures_that_come_later_move_none_to_the_other_side(tmp_path: Path) -> None:
    from dist_ae.data.packed import packed_names, packed_sets, read_manifest

    def sides(count: int) -> dict[str, bool]:
        make_folder(tmp_path / "p", count, sizes=False, classes=())
        config = DataConfig(name=f"folder:{tmp_path / 'p'}", cache=tmp_path / str(count), val_fraction=0.3)
        dataset = load(config)
        (folder,) = packed_sets(f"{tmp_path / str(count)}/packed/p-*")
        names = packed_names(folder, read_manifest(folder))
        assert dataset.train.rows is not None and dataset.val.rows is not None
        return {
            names[row]: held for held, rows in ((False, dataset.train.rows), (True, dataset.val.rows)) for row in rows
        }

    few, many = sides(40), sides(60)
    assert few.items() <= many.items() and len(many) == 60 and 10 <= sum(many.values()) <= 28


def test_a_tar_s_labels_belong_to_the_pictures_of_their_stem(tmp_path: Path) -> None:
    for number in range(3):
        make_tar(tmp_path / f"shard-{number:03d}.tar", 5)
    make_tar(tmp_path / "more.tar.gz", 4, label="json")
    assert braces("a-{008..010}.{tar,tgz}") == [f"a-{n}.{e}" for n in ("008", "009", "010") for e in ("tar", "tgz")]
    source = open_source(f"tar:{tmp_path}/shard-{{000..001}}.tar")
    pictures = list(source.pictures())
    assert [p.label for p in pictures] == [0, 1, 2, 0, 1] * 2 and len({p.name for p in pictures}) == 10
    assert [p.label for p in open_source(f"tar:{tmp_path}/more.tar.gz").pictures()] == ["a"] * 4
    dataset = load(DataConfig(name=f"tar:{tmp_path}/*.tar", cache=tmp_path / "cache"))
    assert len(dataset.train) + len(dataset.val) == 15 and dataset.image_shape == (3, 24, 24)


def test_hugging_face_data_is_read_from_a_saved_set_and_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    columns = {"image": [cut(i, 24, 24) for i in range(12)], "label": [i % 2 for i in range(12)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(tmp_path / "saved")
    config = DataConfig(name=f"hf:{tmp_path / 'saved'}", cache=tmp_path / "cache")
    dataset = load(config)
    assert (len(dataset.train), len(dataset.val), dataset.classes) == (12, 4, ("a", "b"))
    assert dataset.train.labels is not None and dataset.train.labels.tolist() == [0, 1] * 6
    assert np.array_equal(dataset.train.images[np.array([3])][0], np.asarray(cut(3, 24, 24)).transpose(2, 0, 1))
    assert load(config).fingerprint == dataset.fingerprint
    make_folder(tmp_path / "plain", 6, sizes=False)
    plain = load(DataConfig(name=f"hf:{tmp_path / 'plain'}", cache=tmp_path / "cache"))
    assert (len(plain.train) + len(plain.val), plain.classes) == (6, ("flower", "temple"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be loaded"):
        open_source("hf:nobody/nothing-of-that-name")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install .*\[hf\]"):
        open_source("hf:mnist")


def test_photos_are_in_colour_and_no_pixel_of_the_validation_is_trained_on() -> None:
    dataset = load(DataConfig(name="photos"))
    assert dataset.image_shape == (3, 64, 64) and 2000 < len(dataset.train) < 9000 and len(dataset.val) > 100
    assert load(DataConfig(name="photos")).fingerprint == dataset.fingerprint
    small = load(DataConfig(name="photos", image_size=16, channels="grey"))
    assert small.image_shape == (1, 16, 16)
    # The fixed crops of a part reach all its edges, and the parts share no column.
    photo = load_sample_images().images[0].transpose(2, 0, 1)
    for side, part in ((dataset.train, photo[:, :, :512]), (dataset.val, photo[:, :, 512:])):
        assert isinstance(side.images, Crops) and isinstance(side.images.pictures, Whole)
        assert len(side.images) == 2 and np.array_equal(side.images.pictures.picture(0), part)
    with pytest.raises(InputError, match="at most 256"):
        load(DataConfig(name="photos", image_size=300))


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


DAMAGED = {
    "empty.png": b"",
    "text.jpg": b"this is no picture",
    "cut.png": saved(Image.new("RGB", (64, 64), (1, 2, 3)), "png")[:100],
    "bomb.png": bomb(),
    "cut.jpg": saved(Image.effect_noise((64, 64), 90), "jpeg")[:400],
    "floats.tiff": saved(Image.fromarray(np.full((8, 8), 300.0, np.float32)), "tiff"),
}


def test_damaged_pictures_are_named_and_counted_or_skipped(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "p", 8, sizes=False)
    for name, content in DAMAGED.items():
        (root / name).write_bytes(content)
    config: dict[str, Any] = {"name": f"folder:{root}", "cache": tmp_path / "cache"}
    with pytest.raises(InputError, match="6 of 14 pictures cannot be read") as error:
        load(DataConfig(**config))
    assert "bomb.png: a decompression bomb" in str(error.value) and "--data.corrupt skip" in str(error.value)
    assert "\n" not in str(error.value) and str(root) in str(error.value)
    dataset = load(DataConfig(**config, corrupt="skip"))
    assert len(dataset.train) + len(dataset.val) == 8
    with pytest.raises(InputError, match="6 of 14"):  # also where they are packed already
        load(DataConfig(**config))


def bad_sources(tmp_path: Path) -> dict[str, tuple[str, dict[str, Any], str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    (tmp_path / "corrupt").mkdir()
    for name, content in DAMAGED.items():
        (tmp_path / "corrupt" / name).write_bytes(content)
    make_folder(tmp_path / "sizes", 5)
    make_folder(tmp_path / "one", 1)
    (tmp_path / "torn.tar").write_bytes(make_tar(tmp_path / "whole.tar", 9).read_bytes()[:9000])
    (tmp_path / "text.tar").write_text("no tar")
    with tarfile.open(tmp_path / "label.tar", "w") as archive:
        for name, data in {"0.png": saved(cut(1), "png"), "0.json": b"[" * 100_000}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    os.mkfifo(tmp_path / "pipe.tar")
    whole = f"folder:{make_folder(tmp_path / 'whole', 4, sizes=False)}"
    return {
        "nothing there": (f"folder:{tmp_path}/nowhere", {}, "cannot be read"),
        "empty": (f"folder:{tmp_path}/empty", {}, "no pictures in it"),
        "no pictures": (f"folder:{tmp_path}/notes", {}, "1 not pictures"),
        "a file as folder": (f"folder:{tmp_path}/text.tar", {}, "cannot be read"),
        "all corrupt": (f"folder:{tmp_path}/corrupt", {"corrupt": "skip"}, "none of its 6 pictures can be read"),
        "differing sizes": (f"folder:{tmp_path}/sizes", {}, r"--data\.image-size"),
        "one picture": (f"folder:{tmp_path}/one", {}, "at least 2"),
        "no such user": ("folder:~nobody-of-that-name/x", {}, "give the path in full"),
        "no tar": (f"tar:{tmp_path}/none-*.tar", {}, "no such file"),
        "torn tar": (f"tar:{tmp_path}/torn.tar", {}, "not a whole tar"),
        "text as tar": (f"tar:{tmp_path}/text.tar", {}, "not a whole tar"),
        "deep json": (f"tar:{tmp_path}/label.tar", {}, "not a readable label"),
        "pipe as tar": (f"tar:{tmp_path}/pipe.tar", {}, "not a tar"),
        "no colour": (whole, {"background": "no-colour"}, r"data\.background"),
        "settings of pictures for digits": ("digits", {"image_size": 9}, "leave it out"),
        "a name with a slip": ("fashionmnist", {}, "did you mean fashion_mnist"),
        "a NUL in the name": ("folder:\0", {}, "cannot hold a NUL"),
    }


def test_bad_sources_are_refused_in_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    for number, (name, (source, settings, expected)) in enumerate(bad_sources(tmp_path).items()):
        cache = tmp_path / f"cache-{number}"
        with pytest.raises(InputError, match=expected) as error:
            load(DataConfig(name=source, cache=cache, **settings))
        assert "\n" not in str(error.value), name
        left = [path.name for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
        assert not left or name == "one picture", name


def test_names_that_are_not_utf_8_are_kept_and_can_be_printed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "p", 4, sizes=False)
    odd = os.fsencode(root) + b"/temple/\xff\xfe\n.png"
    with open(odd, "wb") as file:
        cut(8, 24, 24).save(file, "png")
    dataset = load(DataConfig(name=f"folder:{root}", cache=tmp_path / "cache"))
    assert len(dataset.train) + len(dataset.val) == 5
    with open(odd, "wb") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"temple/\\xff\\xfe") as error:
        load(DataConfig(name=f"folder:{root}", cache=tmp_path / "cache"))
    assert str(error.value).isprintable()


def test_a_folder_of_many_files_is_only_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "p", 30, sizes=False)
    config = DataConfig(name=f"folder:{root}", cache=tmp_path / "cache")
    first = load(config)
    opened = Image.open
    monkeypatch.setattr(Image, "open", None)  # a second start opens no picture
    assert load(config).fingerprint == first.fingerprint
    monkeypatch.setattr(Image, "open", opened)
    cut(77, 24, 24).save(root / "new.png")
    assert load(config).fingerprint != first.fingerprint and len(scan(str(root))[0]) == 31


def layout(root: Path, names: Iterable[str]) -> Path:
    """Small pictures under these names, each of its own."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def test_defects_of_mvtecs_layout_are_left_to_score_and_good_pictures_are_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"train/good/{i:03}.png" for i in range(60)] + [f"test/good/{i:03}.png" for i in range(10)]
    names += [f"test/broken/{i:03}.png" for i in range(20)] + [
        f"ground_truth/broken/{i:03}_mask.png" for i in range(20)
    ]
    root = layout(tmp_path / "bottle", names)
    dataset = load(DataConfig(name=f"folder:{root}", cache=tmp_path / "cache"))
    assert len(dataset.train) + len(dataset.val) == 60 and dataset.classes == ("good",)
    assert "50 pictures beside the good ones of train/, left to `dist-ae score`" in capsys.readouterr().err
    for name in ("bottle", "cable"):
        layout(tmp_path / "all" / name, names)
    with pytest.raises(InputError, match=r"holds 2 objects of MVTec's layout.*folder:.*/all/bottle"):
        load(DataConfig(name=f"folder:{tmp_path / 'all'}", cache=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("masks", "pattern"),
    [
        (["masks/a.png", "masks/b.png"], "masks/*"),
        (["images/a.mask.png", "images/b.mask.png"], "*.mask.*"),
    ],
)
def test_masks_beside_pictures_are_named_and_can_be_left_out(
    masks: list[str], pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layout(tmp_path / "set", [*(f"images/{name}.png" for name in "abcd"), *masks])
    config = DataConfig(name=f"folder:{root}", cache=tmp_path / "cache")
    load(config)
    said = capsys.readouterr().err
    assert "2 of 6 pictures look like masks" in said and f"--data.exclude '{pattern}'" in said
    dataset = load(config.model_copy(update={"exclude": (pattern,)}))
    assert len(dataset.train) + len(dataset.val) == 4
    assert "look like masks" not in capsys.readouterr().err


def test_a_choice_of_pictures_is_the_same_for_training_packing_and_looking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*(f"images/a/{each}.png" for each in "abcd"), "images/a/bad.png", "other/e.png"]
    root = layout(tmp_path / "set", names)
    np.save(root / "notes.npy", np.zeros(3))  # beside pictures: no set of arrays
    (tmp_path / "away").mkdir()
    (root / "images/a/a.png").rename(tmp_path / "away/a.png")
    (root / "images/a/a.png").symlink_to(tmp_path / "away/a.png")
    chosen = {"include": ("images/*", "*/f.png"), "exclude": ("*bad*",), "links": "follow"}
    config = DataConfig.model_validate({"name": f"folder:{root}", "cache": tmp_path / "cache", **chosen})
    dataset = load(config)
    assert "left out of folder:" in (said := capsys.readouterr().err) and "2 pictures left out by data.include" in said
    assert len(dataset.train) + len(dataset.val) == 4 and dataset.classes == ("images",)
    assert load(config.model_copy(update={"exclude": ()})).fingerprint != dataset.fingerprint
    assert len(list((tmp_path / "cache/packed").iterdir())) == 2
    options = ["--include", *chosen["include"], "--exclude", *chosen["exclude"], "--links", "follow"]
    done = cli("pack", str(root), str(tmp_path / "out"), *options)
    assert done.returncode == 0 and "4 pictures" in done.stdout and "2 ignored" in done.stdout, done.stderr
    assert load(DataConfig(name=f"packed:{tmp_path}/out")).fingerprint == dataset.fingerprint
    done = cli("look", str(root), "--out", str(tmp_path / "look.html"), *options)
    assert done.returncode == 0, done.stderr
    assert "--data.include 'images/*' '*/f.png' --data.exclude '*bad*' --data.links follow" in done.stdout
    with pytest.raises(InputError, match=r"none of its 6 .* by data\.include and data\.exclude.*such as images/a"):
        load(config.model_copy(update={"include": ("a.png",)}))
    for name in ("digits", f"tar:{root}/x.tar", f"packed:{tmp_path}/out"):
        wanted = {"data.name": name, "data.include": ("a*",), "run_dir": tmp_path / "run"}
        make_tar(root / "x.tar", 3)
        with pytest.raises(InputError, match=r"data\.include"):
            dist_ae.train(dist_ae.PRESETS["ae"].override(wanted))


def test_uses_take_of_the_training_folder_what_training_took_and_of_others_all_but_what_it_left_out(
    tmp_path: Path,
) -> None:
    names = [*(f"images/{each}.png" for each in "abcdefgh"), *(f"masks/{each}.png" for each in "abc"), "images/bad.png"]
    own, other = layout(tmp_path / "own", names), layout(tmp_path / "other", ["x/1.png", "x/bad.png", "masks/2.png"])
    run = tmp_path / "run"
    config = dist_ae.PRESETS["ae"].override(
        {"data.name": f"folder:{own}", "data.include": ("images/*",), "data.exclude": ("*bad*",), "run_dir": run}
        | {"data.cache": tmp_path / "cache", "train.steps": 1, "train.batch_size": 4, "model.start": "random"}
    )
    dist_ae.train(config.override({"tracking.wandb": "off", "tracking.pictures": False}))

    def taken(command: str, folder: Path, note: str) -> set[str]:
        done = cli(command, str(run), "--images", str(folder), "--out", str(tmp_path / f"{command}-{folder.name}.csv"))
        assert done.returncode == 0 and note in done.stderr, done.stderr
        rows = (tmp_path / f"{command}-{folder.name}.csv").read_text().splitlines()[1:]
        return {row.partition(",")[0] for row in rows}

    for command in ("embed", "score"):
        note = "4 pictures left out by data.include and data.exclude, as in training"
        assert taken(command, own, note) == {f"images/{each}.png" for each in "abcdefgh"}
        assert taken(command, other, "1 pictures left out by data.exclude, as in") == {"x/1.png", "masks/2.png"}


def see_through(index: int, side: int = 24) -> Image.Image:
    """A piece of a photograph in a disc whose edge is half transparent, and nothing behind it but hidden noise."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    alpha = (255 * np.clip(side / 2 - 2 - np.hypot(y, x), 0, 1)).astype(np.uint8)
    pixels = np.asarray(cut(index, side, side)).copy()
    pixels[alpha == 0] = np.random.default_rng(index).integers(0, 256, (int((alpha == 0).sum()), 3), np.uint8)
    return Image.fromarray(np.dstack([pixels, alpha]))


@pytest.mark.slow
def test_transparency_is_a_fourth_channel_where_it_is_asked_for_and_comes_out_again(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for index in range(30):
        see_through(index).save(root / f"{index:02}.png")
    cut(77, 24, 24).save(root / "opaque.jpg")
    see_through(78).quantize(64, method=Image.Quantize.FASTOCTREE).save(root / "palette.png")
    form = Form(None, channels="rgba", background=(255, 0, 0))
    original = np.asarray(see_through(5))
    pixels = decode(str(root / "05.png"), form)
    seen = original[..., 3] > 0
    assert (pixels[3] == original[..., 3]).all() and (pixels[3] % 255 > 0).sum() > 0
    assert (pixels[:3, seen] == original[seen, :3].T).all() and (pixels[:3, ~seen].T == (255, 0, 0)).all()
    assert (decode(str(root / "opaque.jpg"), form)[3] == 255).all()
    assert (decode(str(root / "palette.png"), form)[3] == 0).any()
    tall = decode(str(root / "05.png"), form._replace(size=(48, 24), fit="pad"))
    assert (tall[3, :12] == 0).all() and (tall[:3, 0, 0] == (255, 0, 0)).all()  # beside it there is nothing

    done = cli("look", str(root), "--out", str(tmp_path / "look.html"))
    assert "31 of 32 pictures are partly transparent" in done.stdout and "--data.channels rgba" in done.stdout
    common = {"data.name": f"folder:{root}", "data.channels": "rgba", "data.cache": tmp_path / "cache"}
    common |= {"tracking.wandb": "off", "train.batch_size": 8, "optim.warmup_steps": 0, "precision": "fp32"}
    fixed = {"run_dir": tmp_path / "fixed", "model.latent_dim": 31, "train.steps": 1, "optim.lr": 1e-9}
    run = dist_ae.train(dist_ae.PRESETS["ae"].override({**common, **fixed, "model.hidden_dims": (64,)})).run_dir
    model = dist_ae.load(run)
    assert model.model.image_shape == (4, 24, 24)
    done = cli("reconstruct", str(run), "--images", str(root), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert {Image.open(path).mode for path in (tmp_path / "out").iterdir()} == {"RGBA"}
    again = np.asarray(Image.open(tmp_path / "out" / "05.png"))  # as many numbers as pictures: PCA nearly draws them
    assert np.abs(again[..., 3].astype(int) - original[..., 3]).mean() < 8
    for words in (
        ["explore", "--images", str(root)],
        ["score", "--images", str(root), "--maps", str(tmp_path / "maps")],
    ):
        done = cli(words[0], str(run), *words[1:])
        assert done.returncode == 0, done.stderr

    own = {"run_dir": tmp_path / "own", "data.crop": 16, "train.steps": 2, "model.widths": (4, 8)}
    run = dist_ae.train(dist_ae.PRESETS["conv-denoising"].override({**common, **own})).run_dir
    see_through(3, 40).save(tmp_path / "one.png")
    for out, ok in (("own.png", True), ("own.webp", True), ("own.jpg", False)):
        done = cli("denoise", str(run), "--images", str(tmp_path / "one.png"), "--out", str(tmp_path / out))
        assert (done.returncode == 0) == ok and "Traceback" not in done.stderr, done.stderr
        if ok:
            assert (Image.open(tmp_path / out).mode, Image.open(tmp_path / out).size) == ("RGBA", (40, 40))
    with pytest.raises(InputError, match="channels rgba has 8 bits"):
        DataConfig(channels="rgba", bits="16")
    done = cli("pack", str(root), str(tmp_path / "packed"), "--channels", "rgba")
    assert done.returncode == 0, done.stderr
    packed = {**common, **fixed, "data.name": str(tmp_path / "packed"), "data.channels": None}
    run = dist_ae.train(dist_ae.PRESETS["ae"].override({**packed, "run_dir": tmp_path / "of-packed"})).run_dir
    assert dist_ae.load(run).reconstruct(tmp_path / "one.png").shape == (1, 4, 24, 24)
