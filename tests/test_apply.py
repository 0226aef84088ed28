"""A trained run can be loaded and used, from Python and from the command line."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, run

import dist_ae
from dist_ae.config import InputError
from dist_ae.data import arrays, sources
from dist_ae.presets import PRESETS
from dist_ae.use import commands

IMAGES = sources.load(PRESETS["ae"].data).val.images


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
        (IMAGES[:, 0], r"shape \[N, 1, 8, 8\]"),
        (IMAGES[:0], "shape"),
        (IMAGES.astype(np.float32), "divide by 255"),
        (IMAGES.astype(np.int64), "int64"),
        (np.full((2, 1, 8, 8), np.nan), "nan"),
    ):
        with pytest.raises(InputError, match=expected):
            model.embed(images)


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
    assert not np.allclose(codes, dist_ae.load(tmp_path / "run").embed(IMAGES))


def test_evaluate_gives_the_run_s_own_figures_on_any_number_of_processes(trained: Path) -> None:
    expected = json.loads((trained / "vae" / "result.json").read_text())["metrics"]
    for world in (1, 2):
        outputs = run(world, "-m", "dist_ae", "evaluate", str(trained / "vae"), "--batch-size", "50")
        assert all(status == 0 for status, _, _ in outputs), outputs
        table = dict(line.split()[:2] for line in outputs[0][1].splitlines() if "val." in line)
        assert {name: float(value) for name, value in table.items()} == pytest.approx(expected, rel=1e-5)
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
        (4 * 9 - 1) / (2 * 9 - 1), rel=0.1
    )  # two rows of four, 8 pixels and a gap each
    with pytest.raises(InputError, match="at least 2"):
        model.interpolate(first, second, 1)
    with pytest.raises(InputError, match="3 and 2"):
        model.interpolate(first, second[:2], 5)
    with pytest.raises(InputError, match="which make 148 pairs, but --pairs asks for 149"):
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
        "shapes.npy": r"takes images of shape \[N, 1, 8, 8\], got \[3, 1, 9, 9\]", "nan.npy": r"value nan at image 1, index \(0, 2, 3\)",
        "scale.npy": "divide by 255", "integers.npy": "int64", "flat.npy": "got shape", "two.npz": "found a, b", "text.npy": "neither format",
        "missing.npy": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=rf"{name}.*{expected}") as error:
            commands.reconstruct_run(trained / "ae", tmp_path / name, tmp_path / "out.npy")
        assert "pickle" not in str(error.value)
    status, out, err = dist_ae_command(
        "score", trained / "ae", "--images", tmp_path / "nan.npy", "--out", tmp_path / "out.npy"
    )
    assert status == 2 and "image 1" in err and "Traceback" not in err and not out
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.npy").mkdir()
    np.save(tmp_path / "own.npy", IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(dist_ae.TrainedModel, "_map", None)
        for out, expected in {
            "nowhere/x.npy": "does not exist",
            "x.jpg": "ends in .npy or .png",
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
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 10)
    assert isinstance(arrays.read_images(tmp_path / "own.npy"), np.memmap)
    codes = np.load(
        commands.embed_run(trained / "ae", tmp_path / "own.npy", tmp_path / "codes.npy"), allow_pickle=False
    )
    assert np.array_equal(codes, dist_ae.load(trained / "ae").embed(IMAGES))
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
