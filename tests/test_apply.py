"""A trained run can be loaded and used, from Python and from the command line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, run
from pictures import make_folder
from PIL import Image

import dist_ae
from dist_ae.config import DataConfig, InputError
from dist_ae.data import arrays, sources
from dist_ae.data.form import Form, decode
from dist_ae.data.given import Given, file_names
from dist_ae.data.pack import pack_source
from dist_ae.data.records import Split
from dist_ae.presets import PRESETS
from dist_ae.use import commands

IMAGES: Any = sources.load(PRESETS["ae"].data).val.images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    for preset in ("ae", "vae"):
        dist_ae.train(
            PRESETS[preset].override({**SMALL, "train.steps": 100, "optim.lr": 0.01, "run_dir": str(root / preset)})
        )
    return root


def dist_ae_command(*arguments: object) -> tuple[int, str, str]:
    """The real command line: exit status, standard output, standard error."""
    ((status, out, err),) = run(1, "-m", "dist_ae", *map(str, arguments))
    return status, out, err


def pixels(path: Path) -> np.ndarray:
    """A picture as [height, width, RGBA] on [0, 1]."""
    from matplotlib.image import imread

    assert path.read_bytes()[:4] == b"\x89PNG"
    return np.asarray(imread(path))


@pytest.mark.slow
def test_a_loaded_model_gives_the_figures_of_its_run(trained: Path) -> None:
    for preset, metric in (("ae", "val.mse"), ("vae", "val.neg_elbo")):
        model = dist_ae.load(trained / preset)
        expected = json.loads((trained / preset / "result.json").read_text())["metrics"]
        assert float(model.score(IMAGES).mean()) == pytest.approx(expected[metric], rel=1e-5)
    reconstruction = dist_ae.load(trained / "vae").reconstruct(IMAGES)
    assert reconstruction.shape == (297, 1, 8, 8) and reconstruction.min() >= 0 and reconstruction.max() <= 1


def test_bytes_floats_arrays_and_tensors_are_the_same_images(trained: Path) -> None:
    model = dist_ae.load(trained / "ae")
    expected = model.embed(IMAGES)
    assert expected.shape == (297, 8)
    for images in (IMAGES / 255, torch.from_numpy(IMAGES), torch.from_numpy(IMAGES).double() / 255):
        torch.testing.assert_close(model.embed(images), expected)
    torch.testing.assert_close(model.embed(IMAGES, batch_size=10), expected)


def test_samples_follow_from_the_seed_and_look_like_images(trained: Path) -> None:
    model = dist_ae.load(trained / "vae")
    samples = model.sample(64, seed=0)
    assert samples.shape == (64, 1, 8, 8) and samples.min() >= 0 and samples.max() <= 1
    assert torch.equal(samples[:16], model.sample(16, seed=0)) and not torch.equal(samples, model.sample(64, seed=1))
    assert float(samples.mean()) == pytest.approx(float(IMAGES.mean()) / 255, abs=0.1)
    with pytest.raises(InputError, match="only a variational model can sample"):
        dist_ae.load(trained / "ae").sample(4)


def test_wrong_images_are_refused(trained: Path) -> None:
    model = dist_ae.load(trained / "ae")
    for images, expected in (
        (IMAGES[:, 0, 0], r"shape \[N, 1, 8, 8\]"),
        (IMAGES[:0], "shape"),
        (IMAGES.astype(np.float32), "divide by 255"),
        (IMAGES.astype(np.int64), "int64"),
        (np.full((2, 1, 8, 8), np.nan), "nan"),
    ):
        with pytest.raises(InputError, match=expected):
            model.embed(images)


@pytest.mark.slow
def test_best_is_the_checkpoint_with_the_best_validation(tmp_path: Path) -> None:
    # A learning rate that spoils the model in the end: constant and far too large after a good start.
    overrides = {
        **SMALL,
        "train.steps": 60,
        "train.eval_every": 5,
        "optim.lr": 1.0,
        "run_dir": str(tmp_path / "run"),
        "optim.schedule": "constant",
    }
    result = dist_ae.train(PRESETS["ae"].override(overrides))
    best, last = (float(dist_ae.load(tmp_path / "run", which=which).score(IMAGES).mean()) for which in ("best", "last"))
    values = {
        line["step"]: line["mse"]
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "val"
    }
    assert result.best_step == min(values, key=values.__getitem__) < 60
    assert best == pytest.approx(min(values.values()), rel=1e-5) and last == pytest.approx(
        result.metrics["val.mse"], rel=1e-5
    )
    status, out, err = dist_ae_command("embed", tmp_path / "run", "--which", "best")
    assert status == 0 and "codes.npy" in out, err
    codes = np.load(tmp_path / "run" / "codes.npy", allow_pickle=False)
    torch.testing.assert_close(torch.from_numpy(codes), dist_ae.load(tmp_path / "run", which="best").embed(IMAGES))
    assert not np.allclose(codes, dist_ae.load(tmp_path / "run", which="last").embed(IMAGES))


@pytest.mark.slow
def test_evaluate_gives_the_run_s_own_figures_on_any_number_of_processes(trained: Path) -> None:
    expected = json.loads((trained / "vae" / "result.json").read_text())["metrics"]
    del expected["val.train_mse"]  # of a sample of the training images: a figure of training, not of a split
    for world in (1, 2):
        outputs = run(world, "-m", "dist_ae", "evaluate", str(trained / "vae"), "--batch-size", "50")
        assert all(status == 0 for status, _, _ in outputs), outputs
        table = dict(line.split()[:2] for line in outputs[0][1].splitlines() if "val." in line)
        assert {name: float(table[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
        assert world == 1 or "val." not in outputs[1][1]


def test_what_is_not_a_run_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        dist_ae.load(tmp_path)
    shutil.copytree(trained / "ae", tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoints/*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="no whole checkpoint"):
        dist_ae.load(tmp_path / "run")
    ((_, _, err),) = run(1, "-m", "dist_ae", "evaluate", str(tmp_path / "nowhere"))
    assert "is not a run directory" in err and "Traceback" not in err


def test_reconstruct_writes_the_model_s_reconstructions_of_the_validation_or_the_user_s_images(
    trained: Path, tmp_path: Path
) -> None:
    model = dist_ae.load(trained / "ae")
    status, out, err = dist_ae_command("reconstruct", trained / "ae")
    assert status == 0 and str(trained / "ae" / "reconstructions.npy") in out, err
    written = np.load(trained / "ae" / "reconstructions.npy", allow_pickle=False)
    assert written.dtype == np.float32 and written.min() >= 0 and written.max() <= 1
    assert np.array_equal(written, model.reconstruct(IMAGES))
    np.savez(tmp_path / "own.npz", images=IMAGES[:5, 0], labels=np.arange(5))  # [N, H, W], beside something else
    path = commands.reconstruct_run(trained / "ae", tmp_path / "own.npz", tmp_path / "own.npy")
    torch.testing.assert_close(torch.from_numpy(np.load(path, allow_pickle=False)), model.reconstruct(IMAGES[:5]))


@pytest.mark.slow
def test_noisy_images_may_leave_the_range_and_come_out_denoised(tmp_path: Path) -> None:
    overrides = {
        **SMALL,
        "train.steps": 150,
        "model.latent_dim": 16,
        "model.hidden_dims": (64,),
        "run_dir": str(tmp_path / "run"),
    }
    dist_ae.train(PRESETS["denoising"].override(overrides))
    clean = (IMAGES / 255).astype(np.float32)
    noisy = clean + np.random.default_rng(0).normal(0, 0.3, clean.shape).astype(np.float32)
    np.save(tmp_path / "noisy.npy", noisy)
    denoised = np.load(commands.reconstruct_run(tmp_path / "run", tmp_path / "noisy.npy"), allow_pickle=False)
    assert np.square(denoised - clean).mean() < 0.5 * np.square(noisy.clip(0, 1) - clean).mean()
    assert (
        pixels(commands.reconstruct_run(tmp_path / "run", tmp_path / "noisy.npy", tmp_path / "noisy.png")).std() > 0.1
    )


def test_samples_are_written_as_a_picture_or_an_array_of_any_number(trained: Path, tmp_path: Path) -> None:
    status, out, err = dist_ae_command("sample", trained / "vae", "--num", 20, "--seed", 3)
    assert status == 0 and "samples.png" in out, err
    picture = pixels(trained / "vae" / "samples.png")
    height, width = picture.shape[:2]
    assert (picture[-height // 4 :, -width // 4 :] == 1).all() and picture[
        : height // 4, : width // 4
    ].min() < 0.2  # 20 of three rows of 8
    written = np.load(commands.sample_run(trained / "vae", 20, 3, tmp_path / "samples.npy"), allow_pickle=False)
    assert np.array_equal(written, dist_ae.load(trained / "vae").sample(20, seed=3))
    for num, seed, expected in ((0, 0, "at least 1"), (801, 0, "at most 800"), (1, 2**64, "64-bit")):
        with pytest.raises(InputError, match=expected):
            commands.sample_run(trained / "vae", num, seed)


def test_an_interpolation_is_the_straight_line_between_two_codes(trained: Path, tmp_path: Path) -> None:
    model = dist_ae.load(trained / "ae")
    first, second = IMAGES[:6:2], IMAGES[1:6:2]
    lines = model.interpolate(first, second, 5)
    assert lines.shape == (3, 5, 1, 8, 8)
    torch.testing.assert_close(lines[:, 0], model.reconstruct(first))
    torch.testing.assert_close(lines[:, -1], model.reconstruct(second))
    torch.testing.assert_close(lines[:, 1], model.decode(0.75 * model.embed(first) + 0.25 * model.embed(second)))
    path = commands.interpolate_run(trained / "ae", 3, 5, out=tmp_path / "lines.npy")
    torch.testing.assert_close(torch.from_numpy(np.load(path, allow_pickle=False)), lines)
    status, out, err = dist_ae_command("interpolate", trained / "ae", "--pairs", 2, "--steps", 4)
    assert status == 0 and "interpolation.png" in out, err
    height, width = pixels(trained / "ae" / "interpolation.png").shape[:2]
    assert width / height == pytest.approx(
        (6 * 9 - 1) / (2 * 9 - 1), rel=0.1
    )  # two rows of four and an original at each end, 8 pixels and a gap each
    with pytest.raises(InputError, match="at least 2"):
        model.interpolate(first, second, 1)
    with pytest.raises(InputError, match="3 and 2"):
        model.interpolate(first, second[:2], 5)
    with pytest.raises(InputError, match="images make 148 pairs, but --pairs asks for 149"):
        commands.interpolate_run(trained / "ae", 149)


def test_codes_and_scores_are_written_and_the_least_expected_images_named(trained: Path, tmp_path: Path) -> None:
    model = dist_ae.load(trained / "vae")
    assert np.array_equal(np.load(commands.embed_run(trained / "vae"), allow_pickle=False), model.embed(IMAGES))
    odd = IMAGES[:40].copy()
    odd[17] = 255 - odd[17]
    np.save(tmp_path / "odd.npy", odd)
    status, out, err = dist_ae_command(
        "score", trained / "vae", "--images", tmp_path / "odd.npy", "--out", tmp_path / "scores.npy"
    )
    assert status == 0 and "highest at images 17, " in out and str(tmp_path / "scores.npy") in out, err
    scores = np.load(tmp_path / "scores.npy", allow_pickle=False)
    assert np.array_equal(scores, model.score(odd))
    table = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if ".neg_elbo" in line}
    assert table == pytest.approx(
        {f"{name}.neg_elbo": getattr(np, name)(scores) for name in ("min", "median", "max")}, rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ae", "vae"])
def test_an_exported_model_gives_the_model_s_results_for_any_number_of_images(
    trained: Path, tmp_path: Path, preset: str
) -> None:
    if preset == "ae":
        status, out, err = dist_ae_command("export", trained / preset, "--out", tmp_path / "model.pt2")
        assert status == 0 and f"torch.export.load('{tmp_path / 'model.pt2'}').module()(images)" in out, err
    else:
        commands.export_run(trained / preset, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    model = dist_ae.load(trained / preset)
    for num in (1, 2, 297):
        reconstruction, code = program(torch.from_numpy(IMAGES[:num]) / 255)
        torch.testing.assert_close(reconstruction, model.reconstruct(IMAGES[:num]))
        torch.testing.assert_close(code, model.embed(IMAGES[:num]))
    archive = zipfile.ZipFile(tmp_path / "model.pt2")
    # torch.export.save writes what it pickles as zip archives (PK) or pickles (\x80) of their own.
    assert not [
        name for name in archive.namelist() if archive.read(name)[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
    ]


def test_images_that_do_not_fit_are_refused_naming_the_file_and_nothing_is_written(
    trained: Path, tmp_path: Path
) -> None:
    shapes, nan, scale = np.zeros((3, 9, 9), np.uint8), np.zeros((3, 8, 8), np.float32), IMAGES.astype(np.float32)
    nan[1, 2, 3] = np.nan
    for name, array in {
        "shapes": shapes,
        "nan": nan,
        "scale": scale,
        "integers": IMAGES.astype(np.int64),
        "flat": IMAGES[:, 0, 0],
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "two.npz", a=nan, b=nan)
    (tmp_path / "text.npy").write_text("not an array")
    before = sorted(tmp_path.iterdir())
    for name, expected in {
        "shapes.npy": r"takes images of shape \[N, 1, 8, 8\], got \[3, 9, 9\]",
        "nan.npy": r"value nan at image 1, index \(0, 2, 3\)",
        "scale.npy": "divide by 255",
        "integers.npy": "int64",
        "flat.npy": r"got \[297, 8\]",
        "two.npz": "found a, b",
        "text.npy": "neither format",
        "missing.npy": "no such file",
    }.items():
        with pytest.raises(InputError, match=rf"{name}.*{expected}") as error:
            commands.reconstruct_run(trained / "ae", tmp_path / name, tmp_path / "out.npy")
        assert "pickle" not in str(error.value)
    status, out, err = dist_ae_command(
        "score", trained / "ae", "--images", tmp_path / "nan.npy", "--out", tmp_path / "out.npy"
    )
    assert status == 2 and "image 1" in err and "Traceback" not in err and not out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.npy").mkdir()
    np.save(tmp_path / "own.npy", IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(dist_ae.TrainedModel, "each", None)
        for out, expected in {
            "own.npy/new/x.npy": "own.npy is no folder",
            "x.jpg": "ends in .npy or .png, or a folder",
            "folder.npy": "is a folder",
            "own.npy": "would replace",
        }.items():
            with pytest.raises(InputError, match=expected):
                commands.reconstruct_run(trained / "ae", tmp_path / "own.npy", tmp_path / out)
    for command, name in (("embed", "codes.npy"), ("export", "model.pt2"), ("sample", "samples.png")):
        status, _, err = dist_ae_command(
            command, trained / "vae", "--out", f"/proc/nowhere-{name}"
        )  # a folder in which nobody can make files
        assert status == 2 and f"/proc/nowhere-{name} cannot be written" in err and "Traceback" not in err, err
    status, _, err = dist_ae_command("sample", trained / "ae")
    assert status == 2 and "only a variational model can sample" in err and "Traceback" not in err


def test_a_write_that_fails_leaves_the_file_that_was_there(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "codes.npy").write_bytes(b"before")

    def full(path: Path, *arguments: object, **more: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"codes\.npy cannot be written \(No space left on device\)"):
        commands.embed_run(trained / "ae", out=tmp_path / "codes.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["codes.npy"] and (
        tmp_path / "codes.npy"
    ).read_bytes() == b"before"


def test_images_too_many_for_memory_are_read_from_the_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    np.save(tmp_path / "own.npy", IMAGES)
    monkeypatch.setattr(arrays, "READ_BYTES", 10)
    assert isinstance(arrays.read_array(tmp_path / "own.npy"), np.memmap)
    codes = np.load(
        commands.embed_run(trained / "ae", tmp_path / "own.npy", tmp_path / "codes.npy"), allow_pickle=False
    )
    assert np.array_equal(codes, dist_ae.load(trained / "ae").embed(IMAGES))
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on pictures in colour, and the folder of them."""
    root = tmp_path_factory.mktemp("coloured")
    folder = make_folder(root / "pictures", 24)
    overrides = {**SMALL, "data.name": f"folder:{folder}", "data.image_size": 16, "data.cache": root / "cache"}
    overrides |= {"train.batch_size": 8, "train.steps": 20, "run_dir": root / "run"}
    dist_ae.train(PRESETS["denoising"].override(overrides))
    return root / "run", folder


@pytest.mark.slow
def test_a_run_finds_its_pictures_where_they_now_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "here" / "pictures", 24)
    overrides = {**SMALL, "data.name": "folder:pictures", "data.image_size": 16, "data.cache": tmp_path / "cache"}
    overrides |= {"train.batch_size": 8, "train.steps": 20, "run_dir": tmp_path / "run", "optim.schedule": "constant"}
    monkeypatch.chdir(tmp_path / "here")
    dist_ae.train(PRESETS["ae"].override(overrides))
    monkeypatch.chdir(tmp_path)  # a relative path was kept in full
    expected = np.load(commands.embed_run(tmp_path / "run", out=tmp_path / "codes.npy"))
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(InputError, match=r"if the images have moved, name their new folder with --data\.root"):
        commands.embed_run(tmp_path / "run", out=tmp_path / "none.npy")
    moved = tmp_path / "there" / "pictures"
    assert np.array_equal(
        np.load(commands.embed_run(tmp_path / "run", out=tmp_path / "a.npy", data_root=moved)), expected
    )
    for command in ("evaluate", "score"):
        status, _, err = dist_ae_command(command, tmp_path / "run", "--data.root", moved)
        assert status == 0, err
    (packed,) = (tmp_path / "cache" / "packed").glob("pictures-*/")  # the packed form of the same images does, too
    assert np.array_equal(
        np.load(commands.embed_run(tmp_path / "run", out=tmp_path / "p.npy", data_root=packed)), expected
    )
    # The same images continue the run; others are refused, there and in every use.
    dist_ae.train(PRESETS["ae"].override({**overrides, "data.name": f"folder:{moved}", "train.steps": 30}))
    make_folder(tmp_path / "others", 30)
    with pytest.raises(InputError, match="others is not what the run was trained on"):
        commands.embed_run(tmp_path / "run", out=tmp_path / "b.npy", data_root=tmp_path / "others")
    with pytest.raises(InputError, match=r"data\.fingerprint"):
        dist_ae.train(PRESETS["ae"].override({**overrides, "data.name": f"folder:{tmp_path / 'others'}"}))


@pytest.mark.slow
def test_pictures_of_a_tar_that_are_too_many_for_the_memory_are_refused(
    coloured: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, folder = coloured
    with tarfile.open(tmp_path / "many.tar", "w") as file:
        file.add(folder, "pictures")
    model = dist_ae.load(run_dir)
    assert model.embed(f"tar:{tmp_path / 'many.tar'}").shape[0] == 24
    monkeypatch.setattr("dist_ae.data.given.free_memory", lambda: 10 * 3 * 16 * 16)
    with pytest.raises(InputError, match="too many images for the memory"):
        model.embed(f"tar:{tmp_path / 'many.tar'}")


@pytest.mark.slow
def test_no_command_replaces_the_pictures_it_is_given_or_a_run(coloured: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(coloured[0], run_dir)
    shutil.copytree(coloured[1], folder)
    one = next(path for path in sorted(folder.rglob("*.*")) if path.suffix == ".png")
    before = {path: path.read_bytes() for path in [*folder.rglob("*.*"), *run_dir.rglob("*.*")] if path.is_file()}
    for command, option in (("reconstruct", "--out"), ("denoise", "--out"), ("score", "--maps")):
        for images, out in ((one, one.parent), (folder, folder), (f"folder:{folder}", f"{folder}/")):
            status, _, err = dist_ae_command(command, run_dir, "--images", images, option, out)
            assert status == 2 and "would replace the images it is made of" in err, err
    status, _, err = dist_ae_command("export", run_dir, "--format", "safetensors", "--out", run_dir)
    assert status == 2 and "is a run, which an exported model would replace" in err
    assert {path: path.read_bytes() for path in before} == before
    # A leftover file of an export does not hide the checkpoints of a run, and an exported folder is no run.
    (run_dir / "model.safetensors").write_bytes(b"no weights")
    assert dist_ae.load(run_dir).source is not None
    commands.export_run(coloured[0], tmp_path / "export", format="safetensors")
    status, out, _ = dist_ae_command("doctor", tmp_path / "export")
    assert status == 0 and "an exported model" in out
    with pytest.raises(InputError, match="is an exported model"):
        dist_ae.train(dist_ae.load_config(coloured[0] / "config.json").override({"run_dir": tmp_path / "export"}))


def test_the_current_folder_is_a_place_to_write(
    coloured: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, folder = coloured
    monkeypatch.chdir(tmp_path)
    commands.reconstruct_run(run_dir, folder, Path("."))
    assert len(list(tmp_path.rglob("*.png"))) == 24
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    commands.export_run(run_dir, Path("."), format="safetensors")
    assert (tmp_path / "sub" / "model.safetensors").exists()


def test_an_export_tells_nothing_of_the_folders_of_its_machine(coloured: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, folder = coloured
    commands.export_run(run_dir, tmp_path / "export", format="safetensors")
    written = [(tmp_path / "export" / name).read_text() for name in ("config.json", "README.md")]
    assert all(str(folder.parent) not in text and "folder:pictures" in text for text in written)
    status, _, err = dist_ae_command("export", run_dir, "--format", "safetensors", "--license", "a\nb: c")
    assert status == 2 and "--license" in err


def test_a_picture_that_cannot_be_read_names_a_way_out_that_there_is(
    coloured: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, folder = coloured
    shutil.copytree(folder, tmp_path / "inbox")
    (tmp_path / "inbox" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1 of 25 pictures.*--corrupt skip and give packed:OUT"):
        dist_ae.load(run_dir).embed(tmp_path / "inbox")
    trained = dist_ae.load(run_dir)
    trained.config = trained.config.override({"data.corrupt": "skip"})
    assert len(trained.embed(tmp_path / "inbox")) == 24
    assert "1 pictures cannot be read and are left out (broken.png" in capfd.readouterr().err


def test_a_name_of_nothing_is_refused(coloured: tuple[Path, Path]) -> None:
    for name in ("", "folder:", "packed:", "array:"):
        with pytest.raises(InputError, match="names no images"):
            dist_ae.load(coloured[0]).embed(name)
        with pytest.raises(InputError, match="names no images"):
            dist_ae.train(PRESETS["ae"].override({**SMALL, "data.name": name}))


@pytest.mark.parametrize("name", ["folder", "packed", "array", "tar", "hf"])
def test_a_folder_may_be_called_as_a_kind_of_source_is(
    name: str, coloured: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(coloured[1], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(dist_ae.load(coloured[0]).embed(name)) == 24


def test_a_picture_is_a_picture_in_whatever_form_it_comes(coloured: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, folder = coloured
    model = dist_ae.load(run_dir)
    paths = sorted(folder.rglob("*.*"))
    expected = model.reconstruct(folder)
    assert expected.shape == (24, 3, 16, 16)
    pixels = np.stack([decode(str(path), Form((16, 16))) for path in paths])
    opened = [Image.open(path) for path in paths]
    for form in (
        f"folder:{folder}",
        paths,
        [str(path) for path in paths],
        opened,
        pixels,
        torch.from_numpy(pixels),
        list(pixels),
        pixels.transpose(0, 2, 3, 1),
        pixels.astype(">f4") / 255,
        (pixels / 255).astype(np.longdouble),
    ):
        torch.testing.assert_close(model.reconstruct(form), expected)
    for one in (str(paths[0]), paths[0], opened[0], pixels[0], pixels[0].transpose(1, 2, 0), [pixels[0]], (paths[0],)):
        torch.testing.assert_close(model.embed(one), model.embed(pixels[:1]))
    pack_source(f"folder:{folder}", tmp_path / "set", DataConfig(image_size=16))
    torch.testing.assert_close(model.reconstruct(tmp_path / "set"), expected)
    grey = opened[0].convert("L")
    assert model.reconstruct(grey).shape == (1, 3, 16, 16)
    torch.testing.assert_close(model.interpolate(paths[0], paths[1], 3)[0, 0], expected[0])


def test_what_is_no_image_of_the_model_is_refused_in_one_sentence(
    trained: Path, coloured: tuple[Path, Path], tmp_path: Path
) -> None:
    model, colour = dist_ae.load(trained / "ae"), dist_ae.load(coloured[0])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    pack_source(f"folder:{coloured[1]}", tmp_path / "set", DataConfig(image_size=9))
    images = np.zeros((2, 1, 8, 8), np.uint8)
    for bad, expected in (
        (None, "got NoneType"),
        (7, "got int"),
        ({"a": 1}, "got dict"),
        (b"x.png", "got bytes"),
        ([], "empty list"),
        ([images[0], "x.png"], "item 1 is of type str"),
        ([images[0], images[0] / 255], "not both"),
        ([images], "item 0 has 2; concatenate"),
        (np.zeros((2, 8, 8, 3), np.uint8), "takes images of shape"),
        (np.zeros((0, 1, 8, 8), np.uint8), "takes images of shape"),
        (np.zeros((2, 8, 8), complex), "complex128"),
        (np.zeros((2, 8, 8), bool), "bool"),
        (np.array("x"), "got <U1"),
        (np.full((2, 8, 8), np.inf), "inf"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int32), "int32"),
        (torch.zeros(3), "takes images"),
        (tmp_path / "text.png", "cannot be read as a picture"),
        (tmp_path / "folder", "no pictures in it"),
        ("~nobody-here/x.png", "in full"),
        (tmp_path / "pipe.npy", "not a file"),
        (tmp_path / "none.png", "none.png: no such file; expected a picture, a folder of pictures, or an array"),
        ([tmp_path / "none.png"], "no such file"),
        (tmp_path / "set", r"takes images of shape \[N, 1, 8, 8\], got \[3, 9, 9\]"),
        ("tar:nothing-*.tar", "no such file"),
    ):
        with pytest.raises(InputError, match=expected) as error:
            model.embed(bad)
        assert "\n" not in str(error.value), bad
    with pytest.raises(InputError, match="at least 1"):
        model.embed(images, batch_size=0)
    with pytest.raises(InputError, match="'last' or 'best'"):
        dist_ae.load(trained / "ae", which="worst")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"text\.png"):
        colour.embed([tmp_path / "text.png", *sorted(coloured[1].rglob("*.*"))])


@pytest.mark.slow
def test_commands_write_a_file_for_each_picture_and_tables_with_their_paths(
    coloured: tuple[Path, Path], tmp_path: Path
) -> None:
    run_dir, folder = coloured
    model = dist_ae.load(run_dir)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    status, out, err = dist_ae_command("reconstruct", run_dir, "--images", folder, "--out", tmp_path / "out")
    assert status == 0 and str(tmp_path / "out") in out, err
    written = sorted((tmp_path / "out").rglob("*.png"))
    assert [str(path.relative_to(tmp_path / "out").with_suffix("")) for path in written] == [
        name[:-4] for name in names
    ]
    pictures = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in written])
    assert np.abs(pictures / 255 - model.reconstruct(folder).numpy()).max() <= 0.5 / 255 + 1e-6
    (tmp_path / "out" / "mine.txt").write_text("kept")
    commands.denoise_run(run_dir, folder, tmp_path / "out", noise_std=0.1)
    assert (tmp_path / "out" / "mine.txt").exists() and len(list(tmp_path.glob(".*"))) == 0
    again = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in written])
    assert not np.array_equal(again, pictures)

    status, out, err = dist_ae_command("score", run_dir, "--images", f"folder:{folder}", "--out", tmp_path / "s.csv")
    assert status == 0 and names[int(model.score(folder).argmax())] in out, err
    table = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["path"] for row in table] == names
    assert [float(row["score"]) for row in table] == pytest.approx(model.score(folder).tolist(), rel=1e-6)
    parquet = pytest.importorskip("pyarrow.parquet")
    commands.embed_run(run_dir, str(folder), tmp_path / "codes.parquet")
    codes = parquet.read_table(tmp_path / "codes.parquet").to_pydict()
    assert codes["path"] == names and np.allclose(codes["code_7"], model.embed(folder)[:, 7])
    commands.embed_run(run_dir, None, tmp_path / "val.csv")
    assert next(csv.DictReader((tmp_path / "val.csv").open()))["path"] == "0"
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(InputError, match="would replace"):
        commands.reconstruct_run(run_dir, folder, folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.slow
def test_denoise_takes_the_noise_away_from_the_validation_images(tmp_path: Path) -> None:
    overrides = {
        **SMALL,
        "train.steps": 150,
        "model.latent_dim": 16,
        "model.hidden_dims": (64,),
        "run_dir": tmp_path / "run",
    }
    result = dist_ae.train(PRESETS["denoising"].override(overrides))
    status, out, err = dist_ae_command("denoise", tmp_path / "run")
    assert status == 0 and "denoised.npy" in out, err
    denoised = np.load(tmp_path / "run" / "denoised.npy", allow_pickle=False)
    psnr = -10 * np.log10(np.square(denoised - IMAGES / 255).mean())
    exact = result.metrics["val.denoised_psnr"]  # of what is not clipped to [0, 1], which is further away
    assert exact <= psnr < exact + 0.5
    assert pixels(commands.denoise_run(tmp_path / "run", out=tmp_path / "rows.png")).std() > 0.1
    for value in (-1.0, float("nan")):
        with pytest.raises(InputError, match="standard deviation"):
            commands.denoise_run(tmp_path / "run", noise_std=value)


def test_a_name_from_elsewhere_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    names = ["../../etc/x.jpg", "/abs/y.png", "a/../../b/y.gif", "..", "a/same.jpg", "a/same.png", "\udcff.png"]
    paths = file_names(Given(Split(np.zeros((7, 1, 2, 2), np.uint8)), names))
    assert len(set(paths)) == 7 and all(path.suffix == ".png" for path in paths)
    for path in paths:
        assert (tmp_path / path).resolve().is_relative_to(tmp_path)


@pytest.mark.slow
def test_the_root_of_the_data_has_one_spelling(trained: Path, tmp_path: Path) -> None:
    for command in ("evaluate", "reconstruct", "denoise", "interpolate", "embed", "score"):
        ((status, out, err),) = run(1, "-m", "dist_ae", command, "--help")
        assert status == 0 and "--data.root" in out and "--data-root" not in out, err
    status, _, err = dist_ae_command("evaluate", trained / "ae", "--data.root", tmp_path / "none")
    assert status == 2 and "does not exist" in err


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 512), (3, 512, 1), (1, 1, 1), (2, 5, 7), (3, 64, 64)])
@pytest.mark.parametrize("preset", ["denoising", "vae"])
def test_a_run_s_pictures_are_drawn_for_every_shape_of_image(
    tmp_path: Path, shape: tuple[int, int, int], preset: str
) -> None:
    from dist_ae.data.reader import Reader
    from dist_ae.figures import run_pictures
    from dist_ae.models import build

    config = PRESETS[preset].override({"model.hidden_dims": (4,), "model.latent_dim": 2, "model.start": "random"})
    model = build(config, shape)
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    (tmp_path / "metrics.jsonl").write_text("")
    validation = Reader(Split(images), torch.device("cpu"))
    pictures = run_pictures(model, config, validation, tmp_path, step=1234)
    for path in pictures.values():
        assert path.stat().st_size > 1000 and min(pixels(path).shape[:2]) > 50
    rows = 4 if preset == "denoising" else 3
    height, width = pixels(pictures["reconstructions"]).shape[:2]
    assert rows * 0.62 / 8 * 150 < height < rows * 0.62 * 8 * 150 + 150 and width > 5 * 0.62 * 150


@pytest.mark.parametrize(("steps", "nats", "mse"), [(1, -1170.0, 0.0059), (40, -912_345.0, 7.1e-5)])
def test_the_loss_curve_shows_a_single_point_and_cuts_no_label_off(
    tmp_path: Path, steps: int, nats: float, mse: float
) -> None:
    from dist_ae.figures import loss_curve

    lines = [{"step": step, "split": "train", "loss": nats / step} for step in range(1, steps + 1)]
    lines += [{"step": step, "split": "val", "mse": mse / step} for step in range(1, steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = pixels(loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png"))[..., :3]
    border = (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:])
    assert all((edge == 1).all() for edge in border)
    objective = picture[picture.shape[0] // 4 :, : picture.shape[1] // 2]  # below the legend
    assert (objective[..., 2] - objective[..., 0] > 0.25).sum() > 10, "the training loss is not seen"


def test_differences_and_errors_are_those_of_the_reconstructions(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_ae import figures
    from dist_ae.data.reader import Reader

    model = dist_ae.load(trained / "ae")
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(figures, "image_rows", lambda *arguments: drawn.append(arguments))
    shutil.copy(trained / "ae" / "metrics.jsonl", tmp_path)
    validation = Reader(Split(IMAGES), torch.device("cpu"))
    figures.run_pictures(model.model, model.config, validation, tmp_path, step=100)
    ((rows, _, title, notes, _),) = drawn
    assert list(rows) == ["original", "reconstruction", "difference"] and title == f"{tmp_path.name}, step 100"
    torch.testing.assert_close(2 * (rows["difference"] - 0.5), rows["reconstruction"] - rows["original"])
    assert [float(note) for note in notes] == pytest.approx(model.score(IMAGES[:12]).tolist(), rel=0.05)
