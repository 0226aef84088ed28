"""TIFFs of several pages: the first and a sentence, a picture of each, or a volume of all."""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli

import dist_ae
from dist_ae import PRESETS, InputError
from dist_ae.config import DataConfig
from dist_ae.data.packed import packed_names, read_manifest
from dist_ae.data.sources import load
from dist_ae.use import commands

tifffile = pytest.importorskip("tifffile")
Array = np.ndarray[Any, np.dtype[Any]]
SMALL: dict[str, Any] = {
    "model.hidden_dims": (32, 16),
    "model.latent_dim": 4,
    "train.batch_size": 8,
    "train.steps": 20,
    "train.log_every": 20,
    "tracking.wandb": "off",
    "precision": "fp32",
}


def stacks(count: int, pages: int = 4, most: int = 255) -> Array:
    """Stacks of smooth pictures [N, D, H, W], each page a little further."""
    draw, axis = np.random.default_rng(0), np.linspace(0, 3, 9)
    phase = draw.uniform(0, 6, (count, 1, 1, 1)) + np.arange(pages)[:, None, None] / 4
    return np.rint((np.sin(axis[:, None] + phase) * np.sin(axis[:8] + phase) + 1) / 2 * most).astype(
        np.uint8 if most == 255 else np.uint16
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stacks").mkdir()
    for number, stack in enumerate(stacks(20)):
        tifffile.imwrite(tmp_path / "stacks" / f"{number:02}.tif", stack, photometric="minisblack")
    return tmp_path / "stacks"


@pytest.mark.slow
def test_the_first_pages_are_used_and_the_others_are_said(folder: Path, tmp_path: Path) -> None:
    tifffile.imwrite(folder / "one.tif", stacks(1)[0, 0])  # a single page is no news
    command = f"train ae --data.name folder:{folder} --data.cache {tmp_path}/cache --run-dir {tmp_path}/run"
    done = cli(*command.split(), "--train.steps", "1", "--tracking.wandb", "off")
    assert done.returncode == 0, done.stderr
    assert "20 files hold 80 pages, and the first of each is used; --data.pages each makes" in done.stderr
    again = cli(*command.split(), "--train.steps", "1", "--tracking.wandb", "off")  # packed before
    assert "20 files hold 80 pages" in again.stderr
    dataset = load(DataConfig(name=f"folder:{folder}", cache=tmp_path / "cache"))
    np.testing.assert_array_equal(dataset.train.images[:20][:, 0], stacks(20)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_each_page_is_a_picture_with_its_name_and_pages_of_a_file_stay_together(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    name = f"folder:{folder}"
    if kind == "tar":
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
        name = f"tar:{tmp_path}/all.tar"
    config = DataConfig(name=name, cache=tmp_path / "cache", pages="each")
    dataset = load(config)
    whole = dataset.train.images
    np.testing.assert_array_equal(whole[:][:, 0], stacks(20).reshape(-1, 9, 8))
    (packed,) = (path.parent for path in (tmp_path / "cache" / "packed").glob("*/manifest.json"))
    names = packed_names(packed, read_manifest(packed))
    assert names[:5] == [
        f"{'all.tar/' * (kind == 'tar')}{n}" for n in ("00.tif#1", "00.tif#2", "00.tif#3", "00.tif#4", "01.tif#1")
    ]
    assert dataset.val.rows is not None
    held_out = set(dataset.val.rows // 4)
    assert held_out and len(dataset.val) == 4 * len(held_out)  # else a page would be judged by its neighbours


@pytest.mark.slow
def test_pages_go_through_every_use(folder: Path, tmp_path: Path) -> None:
    own = {"data.name": f"folder:{folder}", "data.cache": tmp_path / "cache", "data.pages": "each"}
    dist_ae.train(PRESETS["ae"].override({**SMALL, **own, "run_dir": tmp_path / "run"}))
    commands.embed_run(tmp_path / "run", str(folder), tmp_path / "codes.csv")
    with (tmp_path / "codes.csv").open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert len(paths) == 80 and paths[6] == "01.tif#3"
    one = commands.reconstruct_run(tmp_path / "run", str(folder / "01.tif"), tmp_path / "one")
    assert sorted(path.name for path in one.iterdir()) == [f"01-{n}.png" for n in (1, 2, 3, 4)]
    assert "01.tif#3" in commands.explore_run(tmp_path / "run", str(folder), tmp_path / "page.html").read_text()
    model = dist_ae.load(tmp_path / "run")
    np.testing.assert_allclose(model.embed(str(folder / "01.tif")), model.embed(stacks(20)[1]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("most", [255, 60_000])
def test_volumes_are_records_of_all_pages_for_the_mlp(most: int, tmp_path: Path) -> None:
    whole = stacks(30, 5, most)
    (tmp_path / "stacks").mkdir()
    for number, stack in enumerate(whole):
        tifffile.imwrite(tmp_path / "stacks" / f"{number:02}.tif", stack, photometric="minisblack")
    own = {"data.name": f"folder:{tmp_path}/stacks", "data.cache": tmp_path / "cache", "data.pages": "volume"}
    dist_ae.train(PRESETS["ae"].override({**SMALL, **own, "run_dir": tmp_path / "run"}))
    model = dist_ae.load(tmp_path / "run")
    assert model.config.model.record_shape == (1, 5, 9, 8)
    seen = model.reconstruct(f"{tmp_path}/stacks")
    assert seen.shape == (30, 1, 5, 9, 8)
    np.testing.assert_allclose(seen, model.reconstruct(whole[:, None]), atol=1e-6)
    np.testing.assert_allclose(model.embed(f"{tmp_path}/stacks/03.tif"), model.embed(whole[3][None]), atol=1e-5)
    written = commands.reconstruct_run(tmp_path / "run", None, tmp_path / "out.npy")
    assert np.load(written).shape[1:] == (1, 5, 9, 8)
    assert commands.explore_run(tmp_path / "run", f"{tmp_path}/stacks", tmp_path / "page.html").stat().st_size > 9000
    assert cli("pack", f"{tmp_path}/stacks", f"{tmp_path}/out", "--pages", "volume").stdout.startswith(
        "30 pictures of 1×5×9×8"
    )
    assert load(DataConfig(name=f"packed:{tmp_path}/out")).shape == (1, 5, 9, 8)
    with pytest.raises(InputError, match=r"volumes of 1 × 5 × 9 × 8.*mlp"):
        dist_ae.train(PRESETS["conv"].override({**own, "run_dir": tmp_path / "conv"}))
    tifffile.imwrite(tmp_path / "short.tif", whole[0, :3], photometric="minisblack")
    with pytest.raises(
        InputError, match=r"short.tif: the run's model takes volumes of 1 × 5 × 9 × 8.*got \[1, 3, 9, 8\]"
    ):
        model.embed(f"{tmp_path}/short.tif")


@pytest.mark.slow
def test_what_cannot_be_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    tifffile.imwrite(folder / "20.tif", stacks(1, 3)[0], photometric="minisblack")
    done = cli("pack", str(folder), str(tmp_path / "out"), "--pages", "volume")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "20.tif is 8×9 of 3 pages, and pictures before it are 8×9 of 4 pages; give them one depth" in done.stderr
    with tifffile.TiffWriter(folder / "20.tif") as file:
        file.write(np.zeros((9, 8), np.uint8))
        file.write(np.zeros((5, 5), np.uint8))
    done = cli("pack", str(folder), str(tmp_path / "out"), "--pages", "volume")
    assert done.returncode == 2 and "20.tif: page 2 is 5 x 5, and those before it are 8 x 9" in done.stderr
    done = cli("pack", str(folder), str(tmp_path / "out"), "--pages", "each")
    assert done.returncode == 2 and "20.tif#2 is 5×5, and pictures before it are 8×9" in done.stderr
    (folder / "20.tif").write_bytes((folder / "00.tif").read_bytes()[:300])
    done = cli("pack", str(folder), str(tmp_path / "out"), "--pages", "each")
    assert done.returncode == 2 and "20.tif" in done.stderr and "Traceback" not in done.stderr
    done = cli("train", "ae", "--data.name", "digits", "--data.pages", "each")
    assert done.returncode == 2 and "data.pages is for pictures" in done.stderr
    (folder / "20.tif").unlink()
    assert cli("pack", str(folder), str(tmp_path / "out")).stdout.count("20 files hold 80 pages") == 1
    done = cli("train", "ae", "--data.name", f"packed:{tmp_path}/out", "--data.pages", "each")
    assert done.returncode == 2 and "was packed with pages first, not each" in done.stderr
