"""Thresholds that one may trust, and how well heat maps find what masks mark."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, cli
from pictures import cut
from PIL import Image
from scipy.ndimage import label

import dist_ae
from dist_ae import PRESETS, InputError
from dist_ae.scores import Calibration, CodeMoments
from dist_ae.use import commands
from dist_ae.use.anomalies import best_threshold, flagging
from dist_ae.use.pixels import Localization

Array = np.ndarray[Any, np.dtype[Any]]


# -- intervals


def calibration(values: Array) -> Calibration:
    nothing = CodeMoments(torch.zeros(1), torch.zeros(1))
    return Calibration(nothing, {"error": torch.from_numpy(np.sort(values.astype(np.float32)))})


@pytest.mark.parametrize(("count", "quantile"), [(300, 0.9), (1000, 0.99), (40, 0.5)])
def test_the_interval_of_a_quantile_holds_the_true_one_in_95_of_100_sets(count: int, quantile: float) -> None:
    draw, held, rounds = np.random.default_rng(0), 0, 1000
    for _ in range(rounds):
        values = draw.exponential(size=count)  # its quantile is -log(1 - p)
        low, high = calibration(values).interval("error", quantile)
        threshold = calibration(values).threshold("error", quantile)
        assert low <= threshold <= high
        held += low <= -math.log1p(-quantile) <= high
    # At least 95 %, since order statistics are discrete, and not much more. Four deviations of the binomial.
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / rounds) <= held / rounds <= 0.995


def test_few_images_bound_a_high_quantile_from_below_alone() -> None:
    values = np.arange(1.0, 21)
    low, high = calibration(values).interval("error", 0.99)
    assert high == math.inf and 1 <= low <= 20
    assert calibration(values).interval("error", 0.01)[0] == -math.inf


# -- labels


def test_the_threshold_from_labels_has_the_best_f1_of_all() -> None:
    for seed in range(60):
        draw = np.random.default_rng(seed)
        count = int(draw.integers(3, 40))
        truth = np.append([0, 1], draw.integers(-1, 2, count))
        values = np.round(truth * draw.uniform(0, 2) + draw.normal(size=len(truth)), int(draw.integers(0, 4)))
        scores = torch.from_numpy(values.astype(np.float32))
        known = truth >= 0
        f1s = []
        for place in [float(scores.min()) - 1, *scores.tolist()]:
            flags = (scores > place).numpy()[known]
            right = int((flags & (truth[known] == 1)).sum())
            f1s.append(2 * right / (int(flags.sum()) + int((truth == 1).sum())))
        best = best_threshold(truth, scores)
        assert flagging(truth, scores, best)["f1"] == pytest.approx(max(f1s)), (seed, best)


def test_neighbouring_floats_are_told_apart() -> None:
    low = np.float32(0.1)
    high = np.nextafter(low, np.float32(1))
    scores = torch.tensor([low, high])
    assert flagging(np.array([0, 1]), scores, best_threshold(np.array([0, 1]), scores))["f1"] == 1


# -- pixels


def by_counting(maps: list[Array], masks: list[Array], limit: float = 0.3) -> tuple[float, float]:
    """Pixel AUROC by comparing all pairs, and AUPRO by going through all thresholds and regions."""
    values, marked = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    odd, normal = values[marked][:, None], values[~marked][None]
    auroc = float((odd > normal).mean() + (odd == normal).mean() / 2)
    regions = []
    for each, mask in zip(maps, masks, strict=True):
        numbers, count = label(mask, np.ones((3, 3)))
        regions += [each[numbers == number + 1] for number in range(count)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(values.tolist()), reverse=True):
        overlap = np.mean([(region >= threshold).mean() for region in regions])
        points.append((float((normal >= threshold).mean()), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        end = min(x1, limit)
        reached = y0 + (y1 - y0) * (end - x0) / (x1 - x0) if x1 > x0 else y1
        area += (end - x0) * (y0 + reached) / 2
    return auroc, area / limit


@pytest.mark.parametrize("levels", [4, 64, 2**20])
def test_pixel_auroc_and_aupro_are_those_of_a_count_over_all_thresholds_and_regions(levels: int) -> None:
    for seed in range(8):
        draw = np.random.default_rng(seed)
        masks, maps = [], []
        for _ in range(3):
            mask = np.zeros((12, 17), bool)
            for _ in range(int(draw.integers(0, 4))):
                y, x, height, width = draw.integers(0, 11), draw.integers(0, 15), *draw.integers(1, 6, 2)
                mask[y : y + height, x : x + width] = True
            masks.append(mask)
            maps.append(draw.integers(0, levels, mask.shape) / levels + mask * draw.uniform(0, 0.5))
            maps[-1] = np.floor(maps[-1] * levels) / levels
        masks[0][3, 3] = masks[0][4, 4] = True  # one region, by the corner
        sums = Localization()
        for values, mask in zip(maps, masks, strict=True):
            sums.add(values, mask)
        found = sums.figures()
        auroc, aupro = by_counting(maps, masks)
        # Values of few digits are kept as they are; of others the last ones are dropped.
        tolerance = 1e-12 if levels < 2**11 else 2e-3
        assert found["pixel_auroc"] == pytest.approx(auroc, abs=tolerance)
        assert found["aupro"] == pytest.approx(aupro, abs=tolerance)


def test_nothing_marked_gives_no_figures() -> None:
    sums = Localization()
    sums.add(np.zeros((3, 3)), np.zeros((3, 3), bool))
    assert sums.figures() == {}


# -- the command, on MVTec's layout


@pytest.fixture(scope="module")
def bottle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An object as MVTec AD lays it out, and a run on its good pictures."""
    root = tmp_path_factory.mktemp("mvtec")
    draw = np.random.default_rng(0)

    def picture(number: int, defect: tuple[int, int, int, int] | None) -> tuple[Image.Image, Image.Image]:
        y, x = np.mgrid[:48, :48] / 48
        pixels = 120 + 60 * np.sin(6 * x + draw.uniform(0, 0.5)) * np.cos(5 * y) + draw.normal(0, 4, (48, 48))
        mask = np.zeros((48, 48), np.uint8)
        if defect is not None:
            top, left, height, width = defect
            pixels[top : top + height, left : left + width] = 250 if number % 2 else 5
            mask[top : top + height, left : left + width] = 255
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)

    def place(name: str, image: Image.Image) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)

    for number in range(60):
        place(f"bottle/train/good/{number:03}.png", picture(number, None)[0])
    for number in range(12):
        place(f"bottle/test/good/{number:03}.png", picture(number, None)[0])
        image, mask = picture(number, (4 + 2 * number, 6, 9, 12 + number))
        place(f"bottle/test/broken/{number:03}.png", image)
        place(f"bottle/ground_truth/broken/{number:03}_mask.png", mask)
    config = PRESETS["ae"].override({
        **SMALL, "data.name": f"folder:{root / 'bottle'}", "data.image_size": 24, "data.cache": root / "cache",
        "train.steps": 60, "train.batch_size": 16, "tracking.pictures": False, "run_dir": root / "run",
    })  # fmt: skip
    return dist_ae.train(config).run_dir, root / "bottle"


@pytest.mark.slow
def test_defects_are_flagged_located_and_the_verdict_is_kept_in_json(bottle: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = bottle
    done = cli("score", str(run), "--images", str(root / "test"), "--out", str(tmp_path / "s.csv"))
    assert done.returncode == 0, done.stderr
    verdict = json.loads((tmp_path / "s-verdict.json").read_text())
    figures = verdict["figures"]
    assert figures["auroc"] > 0.95 and figures["pixel_auroc"] > 0.9 and figures["aupro"] > 0.6
    assert verdict["flagged"] >= 12 and verdict["interval"]["high"] is None and verdict["images"] == 24
    assert "12 regions in 12 masks, at the model's size" in done.stdout and "pixel_auroc" in done.stdout
    assert "too few for a quantile" in done.stdout and "of normal images may lie above it" in done.stdout
    assert verdict["threshold"] == pytest.approx(dist_ae.load(run).threshold(), rel=1e-6)
    assert "95 % interval" in verdict["basis"] and verdict["basis"] in done.stdout


@pytest.mark.slow
def test_from_labels_takes_the_best_f1_and_says_the_quantile_beside_it(bottle: tuple[Path, Path]) -> None:
    run, root = bottle
    found = commands.score_run(run, root / "test", root.parent / "l.csv", threshold="from-labels")
    assert found.figures["f1"] == found.figures["best_f1"] > 0.9
    assert found.threshold == found.figures["best_f1_threshold"] and found.interval is None
    assert found.basis == "the best F1 on 12 anomalous and 12 normal images"
    assert any("flatters" in each for each in found.remarks)
    (beside,) = [each for each in found.remarks if each.startswith("for comparison, the 99 % quantile")]
    assert f"{dist_ae.load(run).threshold():.6g}, with precision" in beside
    usual = commands.score_run(run, root / "test", root.parent / "q.csv")
    assert usual.figures["best_f1"] == found.figures["f1"] and usual.figures["f1"] <= found.figures["f1"]


@pytest.mark.slow
def test_masks_are_taken_from_where_they_are_named_and_what_is_missing_is_said(
    bottle: tuple[Path, Path], tmp_path: Path
) -> None:
    run, root = bottle
    here = commands.score_run(run, root / "test", tmp_path / "s.csv")
    (tmp_path / "pictures").symlink_to(root / "test")
    masks = tmp_path / "masks" / "broken"
    masks.mkdir(parents=True)
    for path in sorted((root / "ground_truth" / "broken").iterdir())[:9]:  # under the pictures' own names
        Image.open(path).save(masks / path.name.replace("_mask", ""))
    found = commands.score_run(run, root / "test", tmp_path / "n.csv", masks=tmp_path / "masks")
    assert any("3 anomalous pictures have no mask" in each for each in found.remarks)
    assert found.figures["pixel_auroc"] > 0.9 and here.figures["pixel_auroc"] > 0.9
    tiny = np.zeros((48, 48), np.uint8)
    tiny[0, 0] = 255
    Image.fromarray(tiny).save(masks / "000.png")
    again = commands.score_run(run, root / "test", tmp_path / "t.csv", masks=tmp_path / "masks")
    assert any("1 masks are empty at the model's size" in each for each in again.remarks)
    (masks / "001.png").write_text("none")
    for more, expected in (
        ({"masks": tmp_path / "masks"}, r"001\.png: cannot be read as a mask"),
        ({"masks": tmp_path / "nowhere"}, "no such folder"),
        ({"images": None, "masks": tmp_path / "masks"}, "--masks: masks are found by the names"),
        ({"images": root / "test" / "good", "threshold": "from-labels"}, "--threshold from-labels: no folder of"),
        ({"masks": tmp_path / "masks", "maps": tmp_path / "masks"}, "which this command reads|would replace"),
    ):
        given: dict[str, Any] = {"images": root / "test", "out": tmp_path / "x.csv", **more}
        with pytest.raises(InputError, match=expected):
            commands.score_run(run, **given)
    cut(1, 48, 48).save(tmp_path / "one.png")
    assert commands.score_run(run, tmp_path / "one.png", tmp_path / "o.csv").figures == {}
