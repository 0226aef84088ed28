"""The examples, run as a person runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, environment
from pictures import make_folder, photographs
from PIL import Image

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40


def example(name: str, work: Path, *arguments: object) -> str:
    command = [sys.executable, str(REPOSITORY / "examples" / name), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=work, env=environment(XDG_CACHE_HOME=str(work / "cache")), capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_odd_picture_of_a_folder_comes_first(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 200, classes=("temple",))
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).resize((640, 640), Image.Resampling.NEAREST).save(tmp_path / "in" / "odd.png")
    lines = example("odd_pictures.py", tmp_path, tmp_path / "in").splitlines()
    assert len([line for line in lines if line.endswith((".jpg", ".png")) and "picture:" not in line]) == 10
    assert lines[-10].endswith("odd.png")


@pytest.mark.slow
def test_photographs_come_out_cleaner_than_they_went_in(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, photograph in enumerate(photographs()):
        Image.fromarray(photograph).save(tmp_path / "in" / f"{number}.png")
    example("denoise_photographs.py", tmp_path, tmp_path / "in", tmp_path / "out")
    for number, photograph in enumerate(photographs()):
        clean = np.asarray(Image.open(tmp_path / "out" / f"{number}.png")).astype(float)
        error = ((clean - photograph[: clean.shape[0], : clean.shape[1]]) ** 2).mean()
        assert error < 25**2 / 2, "less than half the energy of the noise is left"


@pytest.mark.slow
def test_a_folder_becomes_a_map(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 40)
    example("map_of_data.py", tmp_path, tmp_path / "in", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size == (1350, 1350)


@pytest.mark.slow
def test_a_sweep_from_python_ends_in_a_better_model_than_pca(tmp_path: Path) -> None:
    assert len((REPOSITORY / "examples/sweep_from_python.py").read_text().splitlines()) < 30
    out = example("sweep_from_python.py", tmp_path)
    assert len(list((tmp_path / "runs/sweeps").glob("ae-*/report.html"))) == 1
    mse, pca = (float(part.split()[-1]) for part in out.splitlines()[-1].split(", "))
    assert mse < pca
    assert "report.html shows all trials" in out and " numbers, rate " in out and "too few trials" in out


@pytest.mark.slow
def test_a_table_is_compared_with_pca(tmp_path: Path) -> None:
    from sklearn.datasets import load_wine

    frame = load_wine(as_frame=True).frame
    frame.iloc[::9, 3] = np.nan
    frame.to_csv(tmp_path / "wine.csv", index=False)
    lines = example("table_with_pandas.py", tmp_path, tmp_path / "wine.csv", "target").splitlines()
    for line in lines[:2]:
        ours, pca = (float(word.strip(",")) for word in line.split() if word.startswith("0."))
        assert ours <= pca < 1
    assert "proline" in lines[-4] and "nan" not in "".join(lines).lower()
