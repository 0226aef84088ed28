"""Scores, thresholds, heat maps and evaluations say what is true of the model, and refuse what cannot be said."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HERE, SMALL, run, train_jobs
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import dist_ae
from dist_ae import InputError
from dist_ae.data import sources
from dist_ae.data.records import span
from dist_ae.presets import PRESETS
from dist_ae.use import commands
from dist_ae.use.doctor import examine

pytestmark = pytest.mark.slow

DIGITS = sources.load(PRESETS["ae"].data)
TRAIN, VAL = np.asarray(DIGITS.train.images), np.asarray(DIGITS.val.images)
LABELS = np.asarray(DIGITS.val.labels)
ODD = 3  # the digit that no model of these tests has seen
NORMAL = TRAIN[np.asarray(DIGITS.train.labels) != ODD], VAL[LABELS != ODD]

# A rate that rises until it spoils the model: the best weights are early ones.
SPOILT = {
    "optim.lr": 0.1, "optim.schedule": "constant", "optim.warmup_steps": 60, "train.eval_every": 5, "train.steps": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on nine digits handed over from Python, and one whose best weights are not the last."""
    root = tmp_path_factory.mktemp("runs")
    small = {**SMALL, "optim.lr": 0.01, "train.steps": 150, "train.log_every": 50}
    for name in ("ae", "vae"):
        dist_ae.train(PRESETS[name].override({**small, "run_dir": root / name}), data=NORMAL)
    result = dist_ae.train(PRESETS["ae"].override({**small, **SPOILT, "run_dir": root / "spoilt"}))
    assert result.best_step < 60
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation digits as files: ``plain/``, and as MVTec AD lays them out in ``mvtec/``."""
    root = tmp_path_factory.mktemp("folders")
    for index, (image, label) in enumerate(zip(VAL, LABELS, strict=True)):
        odd = label == ODD
        for place in (f"plain/{'anomalous' if odd else 'normal'}", f"mvtec/test/{'scratch' if odd else 'good'}"):
            (root / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(root / place / f"{index:03d}.png")
    return root


def table(path: Path) -> dict[str, list[Any]]:
    rows = list(csv.DictReader(path.open()))
    return {key: [row[key] for row in rows] for key in rows[0]}


def command(*arguments: object) -> tuple[int, str, str]:
    ((status, out, err),) = run(1, "-m", "dist_ae", *map(str, arguments))
    return status, out, err


# -- thresholds


@pytest.mark.parametrize(("name", "which"), [("ae", "last"), ("vae", "last"), ("spoilt", "last"), ("spoilt", "best")])
def test_training_keeps_the_quantiles_of_its_validation_images_for_the_last_and_the_best_weights(
    runs: Path, name: str, which: Any
) -> None:
    model = dist_ae.load(runs / name, which)
    assert model.source is not None and (runs / name / "calibration" / f"{model.source[1]:08d}.safetensors").is_file()
    held_out = VAL if name == "spoilt" else NORMAL[1]
    kinds = ("error", "mahalanobis", *(("neg_elbo",) if name == "vae" else ()))
    for score in kinds:
        scores = model.score(held_out, score=score)
        for quantile in (0.5, 0.99):
            threshold = model.threshold(quantile, score)
            above = float((scores > threshold * (1 + 1e-5)).float().mean())
            assert 1 - quantile - 1 / len(scores) <= above <= 1 - quantile + 1e-9, score
    assert model.threshold() == model.threshold(0.99, kinds[2] if name == "vae" else "error")


def test_the_kept_thresholds_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    found: dict[int, list[float]] = {}
    for world in (1, 2):
        places = [str(tmp_path / f"{name}-{world}") for name in ("vae", "spoilt")]
        jobs = [
            {"preset": "vae", "overrides": {**SMALL, "train.steps": 20, "run_dir": places[0]}},
            {"preset": "ae", "overrides": {**SMALL, **SPOILT, "run_dir": places[1]}},
        ]
        train_jobs(world, jobs, tmp_path)
        models = [dist_ae.load(places[0]), dist_ae.load(places[1]), dist_ae.load(places[1], "best")]
        assert len(list((tmp_path / f"spoilt-{world}" / "calibration").iterdir())) == 2
        found[world] = [
            model.threshold(0.9, score)
            for model in models
            for score in ("error", "mahalanobis", *(("neg_elbo",) if model is models[0] else ()))
        ]
    assert found[1] == pytest.approx(found[2], rel=1e-3)


def test_a_run_that_kept_no_threshold_finds_it_in_its_data_or_says_what_to_do(runs: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(HERE / "kept" / "first-stage-ae", tmp_path / "old"))
    scores = dist_ae.load(old).score(VAL)
    found = commands.score_run(old)
    assert found.threshold == pytest.approx(float(np.quantile(scores, 0.99, method="inverted_cdf")), rel=1e-5)
    assert len(list((old / "calibration").iterdir())) == 1 and "297 validation images" in found.basis

    bare = Path(shutil.copytree(runs / "ae", tmp_path / "bare"))
    shutil.rmtree(bare / "calibration")
    np.save(tmp_path / "val.npy", VAL)
    for score in (None, "mahalanobis"):
        with pytest.raises(InputError, match=r"no threshold was saved.*handed over from Python.*--threshold"):
            commands.score_run(bare, tmp_path / "val.npy", tmp_path / "s.csv", score=score)
    found = commands.score_run(bare, tmp_path / "val.npy", tmp_path / "s.csv", threshold=0.02)
    assert found.threshold == 0.02 and found.basis == "as given"
    model = dist_ae.load(bare)
    model.calibrate(*NORMAL)
    assert model.threshold() == pytest.approx(dist_ae.load(runs / "ae").threshold(), rel=1e-6)


def test_a_threshold_is_never_found_in_other_data_than_the_run_s(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train=TRAIN[:200], val=VAL[:100])
    settings = {**SMALL, "data.name": f"array:{tmp_path / 'a.npz'}", "train.steps": 3, "run_dir": tmp_path / "run"}
    dist_ae.train(PRESETS["ae"].override(settings))
    shutil.rmtree(tmp_path / "run" / "calibration")
    np.savez(tmp_path / "a.npz", train=TRAIN[:200], val=VAL[100:200])
    with pytest.raises(InputError, match="is not what the run was trained on"):
        dist_ae.load(tmp_path / "run").threshold()
    assert not (tmp_path / "run" / "calibration").exists()
    np.savez(tmp_path / "a.npz", train=TRAIN[:200], val=VAL[:100])
    assert dist_ae.load(tmp_path / "run").threshold() > 0


def test_a_damaged_calibration_is_found_out_again_and_the_doctor_says_so(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "spoilt", tmp_path / "copy"))
    assert all(whole for whole, _ in examine(copy))
    expected = dist_ae.load(copy).threshold()
    for path in (copy / "calibration").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert [what for whole, what in examine(copy) if not whole and "calibration" in what]
    assert dist_ae.load(copy).threshold() == pytest.approx(expected, rel=1e-5)
    assert any(whole and "calibration" in what for whole, what in examine(copy))


def test_a_disk_that_takes_no_threshold_does_not_fail_the_run(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "calibration").write_text("in the way")
    result = dist_ae.train(PRESETS["ae"].override({**SMALL, "train.steps": 3, "run_dir": tmp_path / "run"}))
    assert result.steps == 3 and "could not be kept" in capfd.readouterr().err
    assert dist_ae.load(tmp_path / "run").threshold() > 0


# -- scores


def test_mahalanobis_is_the_distance_of_the_code_by_the_training_codes_covariance(runs: Path) -> None:
    model = dist_ae.load(runs / "ae")
    train, val = (model.embed(images).double().numpy() for images in (NORMAL[0], VAL))
    difference = val - train.mean(0)
    inverse = np.linalg.inv(np.cov(train.T, bias=True))
    expected = np.sqrt(np.einsum("ni,ij,nj->n", difference, inverse, difference))
    np.testing.assert_allclose(model.score(VAL, score="mahalanobis").numpy(), expected, rtol=0.02)  # but for shrinkage


def test_mahalanobis_is_finite_where_images_are_few_and_where_the_code_says_nothing(runs: Path) -> None:
    model = dist_ae.load(runs / "ae")
    model.calibrate(TRAIN[:3], VAL[:3])  # 3 images, 8 numbers
    assert bool(torch.isfinite(model.score(VAL, score="mahalanobis")).all())
    blank = np.repeat(TRAIN[:1], 50, 0)
    model.calibrate(blank, VAL)
    scores = model.score(VAL, score="mahalanobis")
    assert bool(torch.isfinite(scores).all()) and float(model.score(blank[:1], score="mahalanobis")) < scores.min()


@pytest.mark.slow
def test_score_writes_paths_scores_and_flags_and_a_picture(runs: Path, folders: Path, tmp_path: Path) -> None:
    model, normal = dist_ae.load(runs / "vae"), folders / "plain" / "normal"
    status, out, err = command("score", runs / "vae", "--images", f"folder:{normal}", "--out", tmp_path / "s.csv")
    assert status == 0, err
    found, scores = table(tmp_path / "s.csv"), model.score(normal)
    assert list(found) == ["path", "score", "flagged"] and found["path"] == sorted(p.name for p in normal.iterdir())
    assert [float(value) for value in found["score"]] == pytest.approx(scores.tolist(), rel=1e-6)
    flagged = (scores > model.threshold()).tolist()
    assert [value == "True" for value in found["flagged"]] == flagged
    assert f"flagged {sum(flagged)} of {len(scores)}: neg_elbo above" in out and "auroc" not in out
    assert (tmp_path / "s-extremes.png").stat().st_size > 5000 and not (tmp_path / "s-roc.png").exists()
    parquet = pytest.importorskip("pyarrow.parquet")
    commands.score_run(runs / "vae", normal, tmp_path / "s.parquet", score="error", quantile=0.5)
    half = parquet.read_table(tmp_path / "s.parquet").to_pydict()
    assert set(half["flagged"]) == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "mvtec/test"])
def test_folders_with_the_truth_give_auroc_and_average_precision_beside_pca(
    runs: Path, folders: Path, tmp_path: Path, layout: str
) -> None:
    spoilt = runs / "spoilt"  # its data can be loaded again, so PCA can stand beside
    found = commands.score_run(spoilt, folders / layout, tmp_path / "s.csv", which="best")
    written = table(tmp_path / "s.csv")
    truth = [int(value) for value in written["anomalous"]]
    scores = [float(value) for value in written["score"]]
    assert truth == [int("anomalous" in path or "scratch" in path) for path in written["path"]] and sum(truth) > 10
    assert found.figures["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert found.figures["average_precision"] == pytest.approx(average_precision_score(truth, scores))

    from sklearn.decomposition import PCA

    train, images = (part.reshape(len(part), -1) / 255 for part in (TRAIN, VAL))
    pca = PCA(8).fit(train)
    linear = np.square(pca.inverse_transform(pca.transform(images)) - images).mean(1)
    assert found.figures["pca.auroc"] == pytest.approx(roc_auc_score(LABELS == ODD, linear), abs=1e-3)
    assert (tmp_path / "s-roc.png").stat().st_size > 5000 and not found.remarks
    # A run whose data is not there says that PCA is missing, and why.
    memory = commands.score_run(runs / "ae", folders / layout, tmp_path / "m.csv")
    assert "pca.auroc" not in memory.figures and memory.figures["auroc"] > 0.7
    assert "no comparison with PCA" in memory.remarks[0]


@pytest.mark.parametrize("kind", ["error", "ssim"])
def test_heat_maps_are_on_one_scale_and_show_where_an_image_differs(
    runs: Path, folders: Path, tmp_path: Path, kind: Any
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        image = NORMAL[1][index, 0].copy()
        if index == 5:
            image[5:, 5:] = 255 - image[5:, 5:]
        Image.fromarray(image).save(folder / f"{index}.png")
    commands.score_run(runs / "ae", folder, tmp_path / "s.csv", maps=tmp_path / "maps", map=kind)
    pictures = [np.asarray(Image.open(tmp_path / "maps" / f"{index}.png")).astype(int) for index in range(6)]
    bars = [picture[:214, 600:] for picture in pictures]  # colour bar and its numbers, right of three panels
    assert all(np.array_equal(bar, bars[0]) for bar in bars) and bars[0].std() > 10
    maps = np.stack([picture[22:214, 400:592].sum(-1) for picture in pictures])  # brighter is more
    assert maps[5].max() == maps.max() and maps[5, 96:, 96:].max() > maps[:5].max()
    assert maps[5].argmax() // 192 > 96 and maps[5].argmax() % 192 > 96


@pytest.mark.slow
def test_what_cannot_be_scored_is_refused_in_one_sentence(runs: Path, folders: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(folders / "plain" / "normal", tmp_path / "half" / "normal")
    shutil.copytree(folders / "plain" / "normal", tmp_path / "bottle" / "test" / "good")
    shutil.copytree(folders / "plain" / "normal", tmp_path / "bottle" / "ground_truth" / "scratch")
    np.save(tmp_path / "shape.npy", np.zeros((3, 9, 9), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    for images, more, expected in (
        (tmp_path / "missing", {}, "missing"),
        (f"folder:{tmp_path / 'empty'}", {}, "empty"),
        (tmp_path / "shape.npy", {}, r"\[N, 1, 8, 8\]"),
        (None, {"score": "neg_elbo"}, "needs a variational model"),
        (None, {"quantile": 99}, "between 0 and 1"),
        (None, {"maps": tmp_path / "shape.npy"}, "--maps .*is a file: name a folder"),
        (tmp_path / "half", {"maps": tmp_path / "half"}, "--maps .*would replace"),
        (tmp_path / "half", {}, "no anomalous ones"),
        (tmp_path / "bottle", {}, r"ground_truth.*test/"),
        (tmp_path / "half", {"score": "wrong"}, "expected error, neg_elbo, mahalanobis, got 'wrong'"),
        (tmp_path / "half", {"threshold": float("nan")}, "--threshold"),
    ):
        with pytest.raises(InputError, match=expected):
            commands.score_run(runs / "spoilt", images, tmp_path / "s.csv", **more)
    status, out, err = command("score", runs / "spoilt", "--images", tmp_path / "half", "--out", tmp_path / "s.csv")
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and not out, err
    assert sorted(tmp_path.rglob("*")) == before


# -- evaluation


@pytest.mark.slow
def test_evaluate_gives_the_same_on_any_number_of_processes_and_any_batch_size(tmp_path: Path) -> None:
    settings = {**SMALL, "train.steps": 40, "run_dir": tmp_path / "run"}
    dist_ae.train(PRESETS["vae"].override(settings))
    found = []
    for world, batch in ((1, 1000), (2, 47)):
        out = tmp_path / f"{world}.json"
        arguments = ("evaluate", tmp_path / "run", "--batch-size", batch, "--out", out, "--subset", 60, "--samples", 7)
        outputs = run(world, "-m", "dist_ae", *map(str, arguments))
        assert all(status == 0 for status, _, _ in outputs), outputs
        found.append(json.loads(out.read_text()))
        assert out.with_suffix(".png").stat().st_size > 10_000 and (world == 1 or "val.mse" not in outputs[1][1])
    names = {"ssim", "pca_ssim", "probe_accuracy", "pca_probe_accuracy", "neg_iw_bound", "aggregate.mean", "rate"}
    assert {f"val.{name}" for name in names} <= set(found[0]["metrics"])
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-5)
    for level, values in found[0]["denoising"].items():
        assert found[1]["denoising"][level] == pytest.approx(values, rel=1e-5)
    assert set(found[0]["denoising"]) == {"0.1", "0.3", "0.5"}
    for name, values in found[0]["code"].items():
        assert found[1]["code"][name] == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert sum(found[0]["code"]["rate"]) == pytest.approx(found[0]["metrics"]["val.rate"], rel=1e-5)


def test_evaluate_says_what_a_direct_computation_says(runs: Path, tmp_path: Path) -> None:
    from scipy.ndimage import median_filter
    from skimage.restoration import denoise_nl_means
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from dist_ae.evaluate import fixed_noise
    from dist_ae.quality import structural_similarity

    found = commands.evaluate_run(runs / "spoilt", which="best", out=tmp_path / "e.json", noise_levels=(0.3,))
    model = dist_ae.load(runs / "spoilt", "best")
    clean = torch.from_numpy(VAL).float() / 255
    restored = model.model(clean).reconstruction
    assert found.metrics["val.ssim"] == pytest.approx(float(structural_similarity(clean, restored)[0].mean()), rel=1e-5)
    codes = [model.embed(images).double().numpy() for images in (TRAIN, VAL)]
    probe = make_pipeline(StandardScaler(), RidgeClassifier()).fit(codes[0], DIGITS.train.labels)
    assert found.metrics["val.probe_accuracy"] == pytest.approx(probe.score(codes[1], LABELS), abs=0.01)

    rows = torch.arange(200) * 297 // 200
    clean = clean[rows]
    config = model.config.override({"evaluation.noise_std": 0.3})
    noisy = clean + fixed_noise(config.evaluation.noise_std, range(200), (1, 8, 8), torch.device("cpu"))

    def psnr(images: Any) -> float:
        return float(-10 * np.log10(np.square(np.asarray(images) - clean.numpy()).mean()))

    settings: dict[str, Any] = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "sigma": 0.3}
    means = [[denoise_nl_means(x[0], h=h * 0.3, **settings) for x in noisy.numpy()] for h in (0.6, 0.8, 1.0)]
    expected = {
        "noisy": psnr(noisy),
        "model": psnr(model.model(noisy).reconstruction),
        "median": max(psnr(median_filter(noisy.numpy(), (1, 1, side, side))) for side in (3, 5)),
        "non-local means": max(psnr(np.stack(each)[:, None]) for each in means),
    }
    assert found.denoising[0.3] == pytest.approx(expected, rel=1e-4)
    assert expected["non-local means"] > expected["noisy"] + 1


def test_ssim_is_scikit_image_s(tmp_path: Path) -> None:
    from skimage.metrics import structural_similarity as other

    from dist_ae.quality import structural_similarity

    images = torch.from_numpy(span(sources.load(PRESETS["conv"].data).val, range(3))).float() / 255
    worse = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    ours = structural_similarity(images, worse)[1]
    for index in range(3):
        _, theirs = other(
            images[index].numpy(), worse[index].numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True,
            sigma=1.5, use_sample_covariance=False, full=True,
        )  # fmt: skip
        np.testing.assert_allclose(ours[index, :, 6:-6, 6:-6].numpy(), theirs[:, 6:-6, 6:-6], atol=2e-3)


def test_the_importance_weighted_bound_is_exact_where_the_posterior_is(tmp_path: Path) -> None:
    # Probabilistic PCA: the start of a variational model without hidden layers. Its posterior is exact, so every bound
    # is the likelihood itself: x ~ N(mean, W Wᵀ + σ² I).
    from scipy.stats import multivariate_normal

    linear = {"objective.likelihood": "gaussian", "objective.sigma": "learned", "model.start": "pca"}
    settings = {**SMALL, **linear, "model.hidden_dims": (), "model.latent_dim": 5, "train.steps": 1, "optim.lr": 1e-9}
    dist_ae.train(PRESETS["vae"].override({**settings, "run_dir": tmp_path / "run"}))
    found = commands.evaluate_run(tmp_path / "run", subset=1000, samples=3, noise_levels=(0.3,)).metrics
    model: Any = dist_ae.load(tmp_path / "run").model
    weight, bias = model.to_pixels.weight.double(), model.to_pixels.bias.double()  # on [-1, 1]
    sigma = 2 * float(model.log_sigma.exp())
    covariance = (weight @ weight.T).detach().numpy() + sigma**2 * np.eye(64)
    exact = multivariate_normal(bias.detach().numpy(), covariance).logpdf(VAL.reshape(-1, 64) / 127.5 - 1)
    expected = -float(exact.mean()) - 64 * np.log(2)  # nats on [0, 1]
    assert found["val.neg_iw_bound"] == pytest.approx(expected, abs=0.05)
    assert found["val.subset_neg_elbo"] == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
def test_more_samples_tighten_the_bound_and_collapse_is_named(runs: Path, tmp_path: Path) -> None:
    collapsed = {"objective.beta": 1000.0, "train.steps": 60, "run_dir": tmp_path / "run"}
    dist_ae.train(PRESETS["vae"].override({**SMALL, **collapsed}))
    found = commands.evaluate_run(tmp_path / "run", samples=2)
    assert any("posterior collapse" in remark for remark in found.remarks)
    assert found.metrics["val.neg_iw_bound"] == pytest.approx(found.metrics["val.subset_neg_elbo"], rel=0.01)

    settings = {**SMALL, "train.steps": 150, "optim.lr": 0.01, "objective.likelihood": "discretized"}
    settings |= {"objective.sigma": "learned", "run_dir": tmp_path / "bits"}
    dist_ae.train(PRESETS["vae"].override(settings))
    bounds = [commands.evaluate_run(tmp_path / "bits", samples=samples).metrics for samples in (1, 50)]
    assert bounds[0]["val.neg_iw_bound"] == pytest.approx(bounds[0]["val.subset_neg_elbo"])
    assert bounds[1]["val.neg_iw_bound"] < bounds[1]["val.subset_neg_elbo"] - 0.1
    bits = bounds[1]["val.neg_iw_bound"] / 64 / np.log(2)
    assert bounds[1]["val.neg_iw_bound.bits_per_dim"] == pytest.approx(bits)
    assert bounds[1]["val.bits_per_dim"] == pytest.approx(bounds[1]["val.neg_elbo"] / 64 / np.log(2))


class Network(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(1).flatten(1)[:, 9:54:9] / 255


def test_fid_is_that_of_the_given_network_s_features(runs: Path, tmp_path: Path) -> None:
    from scipy.linalg import sqrtm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and what the files of such networks are written with
        torch.jit.trace(Network(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(tmp_path / "network.pt")
    model = dist_ae.load(runs / "spoilt", "best")
    found = commands.evaluate_run(
        runs / "spoilt", which="best", out=tmp_path / "e.json", features=tmp_path / "network.pt"
    ).metrics
    restored = (model.reconstruct(VAL) * 255).round() / 255
    features = [x.flatten(1)[:, 9:54:9].double().numpy() for x in (torch.from_numpy(VAL) / 255, restored)]
    means, covariances = [x.mean(0) for x in features], [np.cov(x.T) for x in features]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found["val.fid"] == pytest.approx(expected, rel=1e-3) and np.isfinite(found["val.kid"])
    assert "val.sample_fid" not in found
    (tmp_path / "text.pt").write_text("no network")
    for path, expected_words in (
        (tmp_path / "none.pt", "no such file"),
        (tmp_path / "text.pt", "not a program of torch"),
    ):
        with pytest.raises(InputError, match=expected_words):
            commands.evaluate_run(runs / "spoilt", features=path)


def test_evaluate_says_plainly_what_is_missing_and_refuses_what_is_wrong(runs: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", train=np.zeros((40, 1, 9), np.uint8) + 7, val=np.zeros((40, 1, 9), np.uint8))
    settings = {"data.name": f"array:{tmp_path / 'wide.npz'}", "train.batch_size": 8, "train.steps": 3}
    dist_ae.train(PRESETS["ae"].override({**SMALL, **settings, "model.start": "random", "run_dir": tmp_path / "wide"}))
    found = commands.evaluate_run(tmp_path / "wide")
    said = " ".join(found.remarks)
    assert "no linear probe" in said and "no FID" in said and "val.ssim" not in found.metrics  # one pixel high
    for more, expected in (
        ({"subset": 0}, "--subset"), ({"samples": 0}, "--samples"), ({"noise_levels": (2.0,)}, "--noise-levels"),
        ({"out": tmp_path / "e.txt"}, "ends in .json"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=expected):
            commands.evaluate_run(runs / "spoilt", **more)
    with pytest.raises(InputError, match="handed over from Python"):
        commands.evaluate_run(runs / "ae")
