"""The first hour with one's own data: what is said, what is refused early, and what can be done from Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, cli, forked
from pictures import cut, make_folder
from PIL import Image

import dist_ae
from dist_ae import terminal
from dist_ae.config import InputError
from dist_ae.run import progress
from dist_ae.timeline import Timeline
from dist_ae.use import commands

TINY = {**SMALL, "tracking.pictures": False, "train.steps": 6, "train.batch_size": 8}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures of 16 × 16 in colour."""
    folder = tmp_path_factory.mktemp("first")
    make_folder(folder / "in", 40)
    config = dist_ae.PRESETS["ae"].override(
        {**TINY, "data.name": f"folder:{folder / 'in'}", "data.image_size": 16, "data.cache": folder / "cache"}
    )
    return dist_ae.train(config.override({"run_dir": folder / "run"})).run_dir


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray[Any, Any]]:
    """A run on handed images of five channels, and the images."""
    images = np.random.default_rng(0).random((40, 5, 8, 8), np.float32)
    folder = tmp_path_factory.mktemp("five")
    config = dist_ae.PRESETS["ae"].override({**TINY, "run_dir": folder / "run"})
    return dist_ae.train(config, data=images).run_dir, images


def test_a_picture_that_was_cropped_or_shrunk_is_said_in_one_line(
    coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(1, 90, 160).resize((1920, 1280)).save(tmp_path / "large.png")
    commands.reconstruct_run(coloured, tmp_path / "large.png", tmp_path / "out.npy")
    said = capsys.readouterr().err
    assert "1 of 1 pictures were brought to the model's 16 × 16" in said and "1,920 × 1,280" in said
    assert "only the middle" in said and said.count("\n") == 1
    (tmp_path / "fit").mkdir()
    cut(1, 16, 16).save(tmp_path / "fit" / "a.png")
    commands.score_run(coloured, tmp_path / "fit", tmp_path / "new" / "deep" / "scores.csv")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "new" / "deep" / "scores.csv").is_file()  # score makes the folder of its output


@pytest.mark.slow
def test_five_channels_are_no_picture_file_and_the_way_out_is_said(
    five: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    run_dir, images = five
    np.save(tmp_path / "x.npy", images)
    with pytest.raises(InputError, match=r"have 5 channels.*\.npy"):
        commands.reconstruct_run(run_dir, tmp_path / "x.npy", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    commands.reconstruct_run(run_dir, tmp_path / "x.npy", tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").shape == images.shape
    commands.score_run(run_dir, tmp_path / "x.npy", tmp_path / "scores.csv", maps=tmp_path / "maps")
    assert len(list((tmp_path / "maps").glob("*.png"))) == 40


@pytest.mark.slow
def test_heat_maps_that_are_drawn_stay_when_the_rest_is_stopped(coloured: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 12)

    def work(rank: int) -> None:
        from dist_ae.figures import HeatMaps

        drawn, count = HeatMaps.picture, iter(range(100))

        def slowly(self: Any, *arguments: Any) -> Any:
            if next(count) == 5:
                signal.raise_signal(signal.SIGKILL)
            return drawn(self, *arguments)

        HeatMaps.picture = slowly  # type: ignore[assignment,method-assign]
        commands.score_run(coloured, f"folder:{tmp_path / 'in'}", tmp_path / "s.csv", maps=tmp_path / "maps")

    assert forked(1, work, tmp_path / "log") == [-signal.SIGKILL]
    whole = list((tmp_path / "maps").rglob("*.png"))
    assert len(whole) == 5 and all(Image.open(path).size[0] > 100 for path in whole)


@pytest.mark.slow
def test_images_of_many_channels_and_an_unclear_layout_are_named(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((20, 16, 8, 8), np.float32)
    np.save(tmp_path / "volume.npy", images)
    np.save(tmp_path / "unclear.npy", np.zeros((20, 32, 32, 5), np.uint8))
    usual = ["--train.steps", "2", "--train.batch-size", "4", "--tracking.wandb", "off"]
    done = cli("train", "ae", "--data.name", f"{tmp_path}/volume.npy", "--run-dir", f"{tmp_path}/r", *usual)
    assert done.returncode == 0 and "18 images of 16 channels, each 8 × 8" in done.stdout
    done = cli("train", "ae", "--data.name", f"{tmp_path}/unclear.npy", "--run-dir", f"{tmp_path}/u", *usual)
    assert done.returncode == 2 and "data.layout images or images-last" in done.stderr


@pytest.mark.slow
def test_floats_of_little_contrast_are_standardized_and_train_below_pca(tmp_path: Path) -> None:
    """Blobs in 12 × 12 pixels, values from 0.05 to 0.15. As they were, training lost to its start."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(3, 9, (2, 600, 1, 1))
    rows, columns = np.mgrid[:12, :12]
    images = 0.05 + 0.1 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 6)
    config = dist_ae.PRESETS["ae"].override({"model.latent_dim": 4, "tracking.wandb": "off", "precision": "fp32"})
    config = config.override({"tracking.pictures": False, "train.epochs": 10})
    found = {}
    for scale in ("auto", "none"):
        wanted = {"run_dir": tmp_path / scale, "data.scale": scale}
        found[scale] = dist_ae.train(config.override(wanted), data=images.astype(np.float32)[:, None]).metrics
    assert found["auto"]["val.mse"] < 0.9 * found["auto"]["val.pca_mse"], found
    relative = {scale: each["val.mse"] / each["val.pca_mse"] for scale, each in found.items()}
    assert relative["auto"] < relative["none"]
    assert dist_ae.load(tmp_path / "auto").reconstruct(images[:5, None].astype(np.float32)).max() < 0.2  # own units


@pytest.mark.slow
def test_another_number_of_epochs_says_which_run_can_be_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dist_ae.PRESETS["ae"].override({**TINY, "train.steps": None, "train.epochs": 1})
    first = dist_ae.train(config).run_dir
    assert "a new run begins" not in capsys.readouterr().out
    dist_ae.train(config.override({"train.epochs": 2}))
    said = capsys.readouterr().out
    assert f"{first} holds the same experiment at step 188" in said and f"--run-dir {first} --extend" in said
    dist_ae.train(config.override({"train.epochs": 2, "optim.lr": 2e-3}))
    assert "a new run begins" not in capsys.readouterr().out


def test_a_change_of_precision_says_how_to_train_on(tmp_path: Path) -> None:
    config = dist_ae.PRESETS["ae"].override({**TINY, "run_dir": tmp_path / "run"})
    dist_ae.train(config)
    with pytest.raises(InputError, match=r"--init-from .*/run --run-dir ANOTHER"):
        dist_ae.train(config.override({"precision": "fp64"}))
    dist_ae.train(config.override({"precision": "fp64", "init_from": tmp_path / "run", "run_dir": tmp_path / "on"}))


def test_what_is_wrong_beside_the_pictures_is_found_before_they_are_packed(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 9)
    make_folder(tmp_path / "one", 1)
    config = dist_ae.PRESETS["ae"].override(
        {**TINY, "data.name": f"folder:{tmp_path / 'in'}", "data.image_size": 16, "data.cache": tmp_path / "cache"}
    )
    for change, sentence in (
        ({"train.batch_size": 10}, "larger than the dataset"),
        ({"data.name": f"folder:{tmp_path / 'one'}"}, "at least 2"),
        ({"init_from": tmp_path / "nowhere"}, "not a run directory"),
        ({"model.hidden_dims": (2**20, 2**20)}, "the weights of this model take"),
    ):
        with pytest.raises(InputError, match=sentence):
            dist_ae.train(config.override({"run_dir": tmp_path / "run", **change}))
        assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists(), change


def test_long_work_says_how_far_it_is_and_how_long_it_still_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line = Timeline.of(dist_ae.PRESETS["ae"].train, 12800)
    display = progress.Display(True, 0, line.total_steps)
    for step in range(1, 61):
        now[0] += 2
        display.stepped(step)
    said = capsys.readouterr().out.splitlines()  # after 30 s, and after a minute more, since nothing else was said
    assert said == ["step 15/2000, about 66 min left", "step 45/2000, about 65 min left"]
    display.evaluated(60, line, {"mse": 0.1, "psnr": 10.0}, 64.0)
    assert capsys.readouterr().out.endswith("64 images/s, about 65 min left\n")
    waiting = terminal.Waiting("packing", 1000, "pictures")
    for _ in range(100):
        now[0] += 1
        assert waiting() is False
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "packing: 30 of 1,000 pictures, about 16 min left" and len(said) == 3


@pytest.mark.slow
def test_readme_s_commands_for_pictures_work_in_order(tmp_path: Path) -> None:
    """The block "Your own pictures", its placeholders filled in."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = readme.split("## Your own pictures")[1].split("```")[1].splitlines()[1:]
    make_folder(tmp_path / "Pictures", 40)
    make_folder(tmp_path / "inbox", 6)
    cut(3).save(tmp_path / "one.png")
    names = {"~/Pictures": f"{tmp_path}/Pictures", "RUN": f"{tmp_path}/run", "folder:inbox": f"folder:{tmp_path}/inbox"}
    names |= {"maps/": f"{tmp_path}/maps/", "one.png": f"{tmp_path}/one.png", "out/": f"{tmp_path}/out/"}
    usual = ["--train.steps", "4", "--tracking.wandb", "off", "--run-dir", names["RUN"], "--optim.warmup-steps", "1"]
    ran = []
    for text in block:
        words = text.partition("#")[0].split()[1:]
        for old, new in names.items():
            words = [new if word == old else word.replace(old, new) if old == "~/Pictures" else word for word in words]
        more = {"train": usual, "look": ["--out", str(tmp_path / "look.html")]}.get(words[0], [])
        done = cli(*words, *more, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        ran.append(words[0])
    assert {"look", "train", "evaluate", "score", "explore", "reconstruct", "export"} <= set(ran)
    assert (tmp_path / "run/explore.html").is_file() and (tmp_path / "run/model.onnx").is_file()
    shutil.rmtree(tmp_path / "run")


def test_a_run_says_its_size_and_prune_frees_what_use_does_not_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dist_ae.PRESETS["ae"].override(
        {**TINY, "run_dir": tmp_path / "run", "train.steps": 12, "train.eval_every": 3, "optim.schedule": "constant"}
    )
    dist_ae.train(config)
    said = capsys.readouterr().out
    assert f"in {tmp_path}/run, " in said and "`dist-ae prune" in said
    steps = {path.name: {each.name for each in path.iterdir()} for path in (tmp_path / "run/checkpoints").iterdir()}
    assert len(steps) <= 2 and "optimizer.safetensors" in steps["00000012"]
    images = np.random.default_rng(0).random((5, 1, 8, 8), np.float32)
    before = dist_ae.load(tmp_path / "run").reconstruct(images)
    longer = config.override({"train.steps": 15})
    shutil.copytree(tmp_path / "run", tmp_path / "extended")
    assert dist_ae.train(longer.override({"run_dir": tmp_path / "extended"})).steps == 15
    capsys.readouterr()
    old, new = commands.prune_run(tmp_path / "run", weights_only=True)
    assert new < 0.75 * old
    assert (dist_ae.load(tmp_path / "run").reconstruct(images) == before).all()
    assert dist_ae.train(config).steps == 12 and "finished before" in capsys.readouterr().out
    with pytest.raises(InputError, match="--init-from"):
        dist_ae.train(longer)


def test_prune_leaves_an_unfinished_run_as_it_is(tmp_path: Path) -> None:
    config = dist_ae.PRESETS["ae"].override({**TINY, "run_dir": tmp_path / "run", "train.steps": 12})
    config = config.override({"train.eval_every": 3, "optim.schedule": "constant"})
    dist_ae.train(config)
    (tmp_path / "run" / "result.json").unlink()  # as of a run that was killed
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    done = cli("prune", str(tmp_path / "run"))
    assert done.returncode == 2 and "is not finished" in done.stderr
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


@pytest.mark.slow
def test_a_run_on_handed_images_is_evaluated_explored_and_scored(
    five: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    run_dir, images = five
    np.save(tmp_path / "same.npy", images)
    np.save(tmp_path / "other.npy", images[::-1])
    result = json.loads((run_dir / "result.json").read_text())["metrics"]
    model = dist_ae.load(run_dir)
    with pytest.raises(InputError, match=r"--data\.root images"):
        model.evaluate()
    found = model.evaluate(images, train=images)
    assert found["mse"] > 0 and found["pca_mse"] <= found["mse"] * (1 + 1e-3)
    assert model.explore(tmp_path / "page.html", images).read_text().startswith("<!")
    done = {
        command: cli(command, str(run_dir), "--data.root", f"{tmp_path}/same.npy", "--out", f"{tmp_path}/{out}")
        for command, out in (("evaluate", "e.json"), ("explore", "e.html"), ("score", "s.csv"))
    }
    assert [each.returncode for each in done.values()] == [0, 0, 0], done
    metrics = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert metrics["val.mse"] == pytest.approx(min(result["val.mse"], metrics["val.mse"]), rel=1e-4)
    refused = cli("evaluate", str(run_dir), "--data.root", f"{tmp_path}/other.npy")
    assert refused.returncode == 2 and "not what the run was trained on" in refused.stderr


@pytest.mark.slow
def test_onnx_comes_from_python_too(five: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run_dir, images = five
    model = dist_ae.load(run_dir)
    path = model.export(tmp_path / "new" / "model.onnx")
    ((reconstruction, code)) = onnxruntime.InferenceSession(path).run(None, {"pictures": images})
    assert np.abs(reconstruction - model.reconstruct(images).numpy()).max() < 1e-4
    assert np.abs(code - model.embed(images).numpy()).max() < 1e-3
    with pytest.raises(InputError, match=r"\.pt2 or \.onnx"):
        model.export(tmp_path / "model.bin")


@pytest.mark.slow
def test_an_export_to_onnx_leaves_no_thread_that_tells_others_of_it(
    five: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    def export(rank: int) -> None:
        del os.environ["ORT_DISABLE_TELEMETRY"]
        model = dist_ae.load(five[0])
        model.export(tmp_path / "model.onnx")
        assert len(os.listdir("/proc/self/task")) == threading.active_count()  # none but Python's own

    assert forked(1, export, tmp_path / "log") == [0], (tmp_path / "log-0.log").read_text()


@pytest.mark.slow
def test_collapse_is_foretold_and_runs_on_both_sides_of_the_bound_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dist_ae.PRESETS["vae"].override({**TINY, "train.steps": 150, "train.batch_size": 96})
    config = config.override({"objective.likelihood": "gaussian", "model.latent_dim": 8})
    bound = 0.0
    for sigma, active in ((1.5, False), (None, True)):
        wanted = {"objective.sigma": sigma or 0.6 * bound, "run_dir": tmp_path / str(active)}
        found = dist_ae.train(config.override(wanted)).metrics["val.active_units"]
        said = capsys.readouterr().out
        foretold = re.search(r"expect posterior collapse.*Below objective.sigma (\S+), 5 numbers would be", said)
        assert (foretold is None) == active and (found > 0) == active, (sigma, found, said)
        bound = bound if foretold is None else float(foretold[1])


@pytest.mark.parametrize("kind", ["bytes", "floats", "standardized"])
def test_a_learned_sigma_stops_at_what_the_data_can_tell_and_says_so(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = np.repeat(np.random.default_rng(0).integers(0, 2, (1, 1, 8, 8)), 30, 0)  # equal, black and white
    columns = np.random.default_rng(0).normal(size=(30, 2)) @ np.random.default_rng(1).normal(size=(2, 12))
    kinds: dict[str, np.ndarray[Any, Any]] = {
        "bytes": (255 * pictures).astype(np.uint8),
        "floats": pictures.astype(np.float32),
        "standardized": columns.astype(np.float32),
    }
    config = dist_ae.PRESETS["vae"].override({**TINY, "objective.likelihood": "gaussian", "objective.sigma": "learned"})
    config = config.override({"model.start": "pca", "train.steps": 60, "run_dir": tmp_path / "run"})
    dist_ae.train(config, data=kinds[kind])
    said = capsys.readouterr().out
    least = {"bytes": 1 / 255 / 12**0.5, "floats": 5e-4, "standardized": 1e-3}[kind]
    sigma = float(dist_ae.load(tmp_path / "run").model.log_sigma.exp())  # type: ignore[union-attr]
    assert sigma == pytest.approx(least, rel=1e-4) or (kind == "standardized" and sigma > least)
    assert ("the learned σ ended at its least value" in said) == (sigma < 1.001 * least)
    with pytest.raises(InputError, match="gaussian, laplace and discretized; a Bernoulli"):
        config.override({"objective.likelihood": "bernoulli"})
