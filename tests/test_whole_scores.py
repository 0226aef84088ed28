"""Scores, thresholds and heat maps of whole pictures, of a run that was trained on crops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, cli
from PIL import Image

import dist_ae
from dist_ae import PRESETS
from dist_ae.config import DataConfig, InputError
from dist_ae.data import deep
from dist_ae.data.crops import Crops
from dist_ae.data.form import decode
from dist_ae.data.pictures import form_of
from dist_ae.use import commands

DRAW = np.random.default_rng(0)


def texture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 16
    waves = 120 + 50 * np.sin(2 * x + DRAW.uniform(0, 6)) + 30 * np.cos(3 * y + DRAW.uniform(0, 6))
    return (waves + DRAW.normal(0, 3, (height, width))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Plates of several sizes whose defects lie in a corner, where the middle square does not reach, and a run."""
    root = tmp_path_factory.mktemp("plates")
    for number in range(70):
        side = "train/good" if number < 60 else "test/good"
        (root / side).mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture(48 + number % 3 * 8, 96)).save(root / side / f"{number:03}.png")
    for folder in ("test/broken", "ground_truth/broken"):
        (root / folder).mkdir(parents=True)
    for number in range(10):
        pixels, mask = texture(56, 90 + number), np.zeros((56, 90 + number), np.uint8)
        pixels[3:12, 80:87], mask[3:12, 80:87] = 255 * DRAW.integers(0, 2, (9, 7)), 255
        Image.fromarray(pixels).save(root / f"test/broken/{number:03}.png")
        Image.fromarray(mask).save(root / f"ground_truth/broken/{number:03}_mask.png")
    config = PRESETS["conv"].override({
        **SMALL, "data.name": f"folder:{root}", "data.crop": 16, "data.cache": root.parent / "cache",
        "model.widths": (4, 8), "model.latent_dim": 3, "train.epochs": 1, "train.batch_size": 32,
        "tracking.pictures": False, "run_dir": root.parent / "run",
    })  # fmt: skip
    return dist_ae.train(config).run_dir, root


@pytest.mark.slow
def test_a_defect_outside_the_middle_is_found_flagged_and_located(plates: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = plates
    done = cli(
        *("score", str(run), "--images", str(root / "test"), "--out", str(tmp_path / "s.csv")),
        *("--maps", str(tmp_path / "maps")),
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads((tmp_path / "s-verdict.json").read_text())
    figures = verdict["figures"]
    assert figures["auroc"] == figures["recall"] == 1 and figures["pixel_auroc"] > 0.95 and figures["aupro"] > 0.8
    assert "held-out pictures" in verdict["basis"] and "10 regions in 10 masks" in done.stdout
    middle = commands.score_run(run, root / "test", tmp_path / "m.csv", size="model")
    assert middle.figures["auroc"] < 0.9  # the reason for all of this
    assert {path.name for path in (tmp_path / "maps" / "broken").iterdir()} == {f"{n:03}.png" for n in range(10)}
    with Image.open(tmp_path / "maps/broken/007.png") as wide, Image.open(tmp_path / "maps/good/060.png") as other:
        assert wide.size != other.size  # 97 × 56 and 96 × 48


@pytest.mark.slow
def test_the_score_is_that_of_the_oddest_square_and_so_is_what_the_threshold_comes_from(
    plates: tuple[Path, Path], tmp_path: Path
) -> None:
    run, root = plates
    trained = dist_ae.load(run)
    for score in ("error", "mahalanobis"):
        found = commands.score_run(run, root / "test" / "good", tmp_path / "s.csv", score=score, quantile=0.5)

        def largest(pixels: np.ndarray, score: str = score) -> float:
            tops, lefts = (
                [(side - 16) * k // max(1, side // 16 - 1) for k in range(side // 16)] for side in pixels.shape
            )
            squares = np.stack([pixels[top : top + 16, left : left + 16] for top in tops for left in lefts])
            return float(trained.score(squares, score=score).max())

        wanted = [largest(np.asarray(Image.open(path))) for path in sorted((root / "test/good").iterdir())]
        assert found.scores.tolist() == pytest.approx(wanted, rel=1e-5)
        held_out = trained.dataset().val
        assert isinstance(held_out.images, Crops) and held_out.rows is not None
        numbers = np.unique(held_out.rows >> 33)
        normal = sorted(largest(held_out.images.picture(number)[0]) for number in numbers)
        assert found.threshold == pytest.approx(normal[(len(normal) + 1) // 2 - 1], rel=1e-5)


@pytest.mark.slow
def test_a_run_on_whole_images_refuses_their_own_size(tmp_path: Path) -> None:
    config = PRESETS["ae"].override({**SMALL, "train.steps": 2, "run_dir": tmp_path / "run"})
    dist_ae.train(config)
    with pytest.raises(InputError, match="--size own: scores of whole pictures need a run that was trained on crops"):
        commands.score_run(tmp_path / "run", tmp_path / "none", size="own")


@pytest.mark.slow
def test_pictures_on_a_scale_of_their_own_keep_it_at_their_own_size(tmp_path: Path) -> None:
    folder = tmp_path / "twelve bits"
    folder.mkdir()
    for number in range(12):
        pixels = texture(40, 56).astype(np.uint16)[None] * 16 + 5  # 12 of 16 bits
        (folder / f"{number}.png").write_bytes(deep.png(pixels))
    config = PRESETS["conv"].override({
        **SMALL, "data.name": f"folder:{folder}", "data.crop": 16, "data.scale": "range", "data.cache": tmp_path / "c",
        "model.widths": (4, 8), "model.latent_dim": 6, "train.steps": 40, "train.batch_size": 16,
        "tracking.pictures": False, "run_dir": tmp_path / "run",
    })  # fmt: skip
    run = dist_ae.train(config).run_dir
    out = commands.reconstruct_run(run, folder / "3.png", out=tmp_path / "out.png")
    before, after = (decode(str(path), form_of(DataConfig(), "grey")).astype(float) for path in (folder / "3.png", out))
    # As good as on the model's own squares, in the pictures' own units.
    trained = dist_ae.load(run)
    square = torch.from_numpy(before[None, :, 8:24, 8:24])
    error = float((trained.reconstruct(square) - square).square().mean())
    assert np.square(after - before).mean() < 4 * error + 1
    found = commands.score_run(run, folder, tmp_path / "s.csv")
    assert float(found.scores.max()) < 0.05
