"""Is an autoencoder worth it beyond PCA, for a table? Ours, PCA, a plain autoencoder and pyod's, on held-out rows.

    python -m benchmarks.tables share [--seeds 3]       unexplained variance      pip install pyod scanpy aeon
    python -m benchmarks.tables anomalies [--seeds 3]   AUROC of outliers
    python -m benchmarks.tables signals [--seeds 3]     a convolution along signals, beside the MLP and PCA
    python -m benchmarks.tables time                    seconds of a fit of 10,000 × 30 beside pyod's
    python -m benchmarks.tables tune KEY=VALUE ...      ours with another setting, on other tables than those reported

Each figure is a line of ``runs/benchmarks/tables/NAME.jsonl``; what stands there is not computed again. Then the tables
are printed in Markdown. All data ships inside packages. Everything runs on one thread.

``share``: a quarter of the rows, by the seed, is held out from everything. Each method sees the others, standardized by
their mean and deviation; ours holds out a tenth of these to choose its weights. The figure is the squared error of the
held-out rows over their squared distance from the training mean, so 0 is perfect and 1 is the mean.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy

import numpy as np
import torch
from sklearn import datasets
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from dist_ae.sklearn import Autoencoder, AutoencoderDetector

Array = np.ndarray[Any, np.dtype[Any]]
NUMBERS = (2, 5, 10)
HIDDEN = (256, 128)
OUT = Path("runs/benchmarks/tables")
SETTINGS: dict[str, Any] = {}  # of `tune`: keys of the configuration that differ from the estimator's


# ----------------------------------------------------------------------------------------------------------------- data


def single_cells() -> Array:
    """700 cells × 765 genes, as scanpy ships them: logarithms, scaled."""
    import scanpy

    return np.asarray(scanpy.datasets.pbmc68k_reduced().X, np.float64)


def ucr(name: str) -> Callable[[], Array]:
    """A set of the UCR archive that ships inside aeon: all its series [N, L], or of several channels [N, C · L]."""

    def load() -> Array:
        from aeon.datasets import load_classification

        found = load_classification(name, return_metadata=False)[0]
        return np.asarray(found, np.float64).reshape(len(found), -1)

    return load


def curved(rows: int = 3000, noise: float = 0.1) -> Array:
    """Three factors in 40 columns, bent."""
    draw = np.random.default_rng(0)
    factors = draw.standard_normal((rows, 3))
    bent = np.concatenate([factors, np.sin(2 * factors), factors[:, :1] * factors[:, 1:2]], 1)
    return bent @ draw.standard_normal((7, 40)) + noise * draw.standard_normal((rows, 40))


def groups() -> Array:
    """Eight groups in 300 columns, 600 rows, most of it noise: like measurements of single cells."""
    draw = np.random.default_rng(1)
    centres = draw.standard_normal((8, 300)) * (draw.random((8, 300)) < 0.15) * 2
    return np.exp(0.3 * (centres[draw.integers(0, 8, 600)] + draw.standard_normal((600, 300))))


REPORTED: dict[str, Callable[[], Array]] = {
    "breast cancer": lambda: np.asarray(datasets.load_breast_cancer().data),
    "wine": lambda: np.asarray(datasets.load_wine().data),
    "digits": lambda: np.asarray(datasets.load_digits().data),
    "single cells": single_cells,
    "ItalyPowerDemand": ucr("ItalyPowerDemand"),
    "GunPoint": ucr("GunPoint"),
}
TUNING: dict[str, Callable[[], Array]] = {
    "diabetes": lambda: np.asarray(datasets.load_diabetes().data),
    "curved": curved,
    "curved, 200 rows": lambda: curved(200, 0.3),
    "groups": groups,
    "ArrowHead": ucr("ArrowHead"),
    "OSULeaf": ucr("OSULeaf"),
}


# -------------------------------------------------------------------------------------------------------------- methods


class Ours(Autoencoder):  # type: ignore[misc]
    """The estimator; `tune` changes settings that it does not offer."""

    def _config(self, *arguments: Any) -> Any:
        return super()._config(*arguments).override(SETTINGS)


def ours(train: Array, test: Array, numbers: int, seed: int) -> Array:
    made = Ours(numbers, random_state=seed).fit(train)
    return np.asarray(made.inverse_transform(made.transform(test)))


def pca(train: Array, test: Array, numbers: int, seed: int) -> Array:
    made = PCA(numbers, svd_solver="full").fit(train)
    return np.asarray(made.inverse_transform(made.transform(test)))


def plain(train: Array, test: Array, numbers: int, seed: int) -> Array:
    """What tutorials write: ReLU, random weights, Adam 1e-3, batches of 32, 100 epochs, of the same widths as ours."""
    torch.manual_seed(seed)
    sizes = [train.shape[1], *HIDDEN, numbers, *reversed(HIDDEN), train.shape[1]]
    layers: list[torch.nn.Module] = []
    for index, (before, after) in enumerate(pairwise(sizes)):
        layers.append(torch.nn.Linear(before, after))
        if index not in (len(HIDDEN), len(sizes) - 2):
            layers.append(torch.nn.ReLU())
    net = torch.nn.Sequential(*layers)
    optimizer, rows = torch.optim.Adam(net.parameters(), 1e-3), torch.from_numpy(train).float()
    for _ in range(100):
        for batch in torch.randperm(len(rows)).split(32):
            optimizer.zero_grad()
            (net(rows[batch]) - rows[batch]).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        return np.asarray(net(torch.from_numpy(test).float()))


def pyod(train: Array, test: Array, numbers: int, seed: int) -> Array:
    """pyod's AutoEncoder with its defaults, and the same widths as ours."""
    made = pyod_autoencoder([*HIDDEN, numbers], seed).fit(train)
    mean, spread = made.X_mean, np.where(made.X_std > 0, made.X_std, 1.0)  # it standardizes, whatever comes in
    made.model.eval()
    with torch.no_grad():
        found = made.model(torch.from_numpy((test - mean) / spread).float())
    return np.asarray(found, np.float64) * spread + mean


def pyod_autoencoder(hidden: list[int], seed: int, **more: Any) -> Any:
    from pyod.models.auto_encoder import AutoEncoder

    return AutoEncoder(hidden_neuron_list=hidden, random_state=seed, verbose=0, **more)


METHODS = {"ours": ours, "PCA": pca, "plain": plain, "pyod": pyod}


# ------------------------------------------------------------------------------------------------------------- measures


def unexplained(method: str, rows: Array, numbers: int, seed: int) -> dict[str, float]:
    train, test = train_test_split(rows, test_size=0.25, random_state=seed)
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    begin = time.perf_counter()
    found = METHODS[method](train, test, numbers, seed)
    seconds = time.perf_counter() - begin
    return {"share": float(((found - test) ** 2).sum() / (test**2).sum()), "seconds": seconds}


class Kept:
    """Figures by their keys, one line each in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}  # type: Path, dict[tuple[Any, ...], dict[str, float]]
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text().splitlines() if path.exists() else ():
            key, value = json.loads(line)
            self.found[tuple(key)] = value

    def get(self, *key: Any, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        if key not in self.found:
            self.found[key] = make()
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.found[key]]) + "\n")
        return self.found[key]


def over_seeds(
    kept: Kept, name: str, rows: Array, numbers: int, method: str, seeds: int, label: str
) -> list[list[float]]:
    """[shares, seconds] of a method over the seeds."""
    found = [
        kept.get(name, numbers, seed, label, make=partial(unexplained, method, rows, numbers, seed))
        for seed in range(seeds)
    ]
    return [[each[key] for each in found] for key in ("share", "seconds")]


def share(seeds: int) -> None:
    kept, ratios, better = Kept(OUT / "share.jsonl"), [], 0
    print("| table | rows × columns | numbers | ours | PCA | plain | pyod | ours : PCA | ours : best other | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, load in REPORTED.items():
        rows = load()
        for numbers in NUMBERS:
            found = {m: over_seeds(kept, name, rows, numbers, m, seeds, m) for m in METHODS}
            mean = {method: statistics.mean(each[0]) for method, each in found.items()}
            cells = " | ".join(f"{mean[m]:.3f} ± {statistics.pstdev(found[m][0]):.3f}" for m in METHODS)
            against = [a / b for a, b in zip(found["ours"][0], found["PCA"][0], strict=True)]
            ratios.append(statistics.mean(against))
            other = mean["ours"] / min(mean["plain"], mean["pyod"])
            better += other <= 0.8
            took = " / ".join(f"{statistics.mean(found[m][1]):.1f}" for m in ("ours", "plain", "pyod"))
            print(
                f"| {name} | {rows.shape[0]:,} × {rows.shape[1]} | {numbers} | {cells} | "
                f"{ratios[-1]:.2f} ({min(against):.2f} – {max(against):.2f}) | {other:.2f} | {took} |",
                flush=True,
            )
    print(
        f"\nours : PCA over {len(ratios)} rows: mean {statistics.mean(ratios):.3f}, largest {max(ratios):.3f}; "
        f"at most 0.8 of the best other in {better}"
    )


def tune(settings: list[str], seeds: int) -> None:
    """Mean ratio to PCA on the tables that are not reported, with the settings."""
    for pair in settings:
        key, _, value = pair.partition("=")
        SETTINGS[key] = json.loads(value)
    kept = Kept(OUT / "tune.jsonl")
    label, ratios, seconds = " ".join(settings) or "as it is", [], []
    for name, load in TUNING.items():
        rows = load()
        for numbers in (2, 5):
            own, took = over_seeds(kept, name, rows, numbers, "ours", seeds, label)
            linear, _ = over_seeds(kept, name, rows, numbers, "PCA", seeds, "PCA")
            ratios.append(statistics.mean(a / b for a, b in zip(own, linear, strict=True)))
            seconds += took
    figures = " ".join(f"{ratio:.3f}" for ratio in ratios)
    print(
        f"{label}: mean {statistics.mean(ratios):.4f}, {statistics.mean(seconds):.1f} s a fit ({figures})", flush=True
    )


# ------------------------------------------------------------------------------------------------------------ anomalies


def labelled() -> dict[str, tuple[Array, Array]]:
    """Rows and their classes."""
    from aeon.datasets import load_classification

    found: dict[str, tuple[Array, Array]] = {}
    for name, load in (
        ("breast cancer", datasets.load_breast_cancer),
        ("wine", datasets.load_wine),
        ("digits", datasets.load_digits),
    ):
        bunch = load()
        found[name] = np.asarray(bunch.data), np.asarray(bunch.target)
    for name in ("ItalyPowerDemand", "GunPoint", "ArrowHead"):
        series, kinds = load_classification(name, return_metadata=False)
        found[name] = np.asarray(series, np.float64).reshape(len(series), -1), np.asarray(kinds)
    return found


def by_ours(train: Array, rows: Array, seed: int) -> Array:
    return -np.asarray(AutoencoderDetector(5, random_state=seed).fit(train).score_samples(rows))


def by_pca(train: Array, rows: Array, seed: int) -> Array:
    return np.asarray(((pca(train, rows, 5, seed) - rows) ** 2).mean(1))


def by_forest(train: Array, rows: Array, seed: int) -> Array:
    return -np.asarray(IsolationForest(random_state=seed).fit(train).score_samples(rows))


def by_pyod(train: Array, rows: Array, seed: int) -> Array:
    return np.asarray(pyod_autoencoder([64, 32], seed).fit(train).decision_function(rows))


DETECTORS = {"ours": by_ours, "PCA": by_pca, "isolation forest": by_forest, "pyod": by_pyod}


def auroc(method: str, rows: Array, odd: Array, seed: int) -> dict[str, float]:
    """Trained on three quarters of the normal rows; the others are told from those of the odd class."""
    train, test = train_test_split(rows[~odd], test_size=0.25, random_state=seed)
    scaler = StandardScaler().fit(train)
    scored = scaler.transform(np.concatenate([test, rows[odd]]))
    begin = time.perf_counter()
    scores = DETECTORS[method](scaler.transform(train), scored, seed)
    seconds = time.perf_counter() - begin
    return {"auroc": float(roc_auc_score(np.arange(len(scored)) >= len(test), scores)), "seconds": seconds}


def anomalies(seeds: int) -> None:
    """Each class in turn is what is odd; the mean over classes and seeds."""
    kept = Kept(OUT / "anomalies.jsonl")
    print(f"| table | classes | {' | '.join(DETECTORS)} |\n|---|---|{'---|' * len(DETECTORS)}")
    for name, (rows, kinds) in labelled().items():
        cells = []
        for method in DETECTORS:
            found = [
                kept.get(name, str(kind), seed, method, make=partial(auroc, method, rows, kinds == kind, seed))["auroc"]
                for kind in np.unique(kinds)
                for seed in range(seeds)
            ]
            cells.append(f"{statistics.mean(found):.3f}")
        print(f"| {name} | {len(np.unique(kinds))} | {' | '.join(cells)} |", flush=True)


# -------------------------------------------------------------------------------------------------------------- signals


def recording(name: str, length: int, stride: int) -> tuple[Array, Array]:
    """Windows [N, C, L] of a recording that ships inside aeon: of its first three quarters, and of the last one."""
    import aeon

    (folder,) = (Path(aeon.__file__).parent / "datasets" / "data").glob(name)
    rows = [np.genfromtxt(path, delimiter=",", skip_header=1)[:, 1:-1] for path in sorted(folder.glob("*.csv"))[::-1]]
    whole = np.concatenate(rows)
    border = len(whole) * 3 // 4

    def windows(part: Array, step: int) -> Array:
        return np.stack([part[at : at + length].T for at in range(0, len(part) - length + 1, step)])

    return windows(whole[:border], stride), windows(whole[border:], length)


def divided(name: str, seed: int) -> tuple[Array, Array]:
    from aeon.datasets import load_classification

    train, test = train_test_split(load_classification(name, return_metadata=False)[0], random_state=seed)
    return np.asarray(train), np.asarray(test)


SIGNALS: dict[str, Callable[[int], tuple[Array, Array]]] = {
    "walking (Daphnet, three accelerometers)": lambda seed: recording("Daphnet*", 64, 8),
    "pulse (KDD-TSAD 135)": lambda seed: recording("KDD-TSAD*", 128, 4),
    "OSULeaf": partial(divided, "OSULeaf"),
    "BasicMotions": partial(divided, "BasicMotions"),
}


def along_signals(model: str, name: str, numbers: int, seed: int) -> dict[str, float]:
    """The held-out share, over the deviations of channels, of a run with as many numbers a signal."""
    import tempfile

    import dist_ae

    train, test = SIGNALS[name](seed)
    mean, deviation = (each(train, axis=(0, 2), keepdims=True) for each in (np.mean, np.std))
    begin = time.perf_counter()
    if model == "PCA":
        scaled = [((each - mean) / deviation).reshape(len(each), -1) for each in (train, test)]
        seen = pca(scaled[0], scaled[1], numbers, seed)
        error = seen.reshape(test.shape) - (test - mean) / deviation
    else:
        values = {"data.layout": "signals", "model.latent_dim": numbers, "tracking.wandb": "off", "seed": seed}
        if model == "conv":
            values |= {"model.code": "vector", "train.steps": 2000, "train.eval_every": 50, "train.patience": 8}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            config = dist_ae.PRESETS["conv" if model == "conv" else "table"].override({**values, "run_dir": folder})
            dist_ae.train(config.override({"train.batch_size": min(32, len(train) // 4)}), data=train)
            error = (dist_ae.load(folder).reconstruct(test).numpy() - test) / deviation
    squares = ((test - mean) / deviation) ** 2
    return {"share": float((error**2).sum() / squares.sum()), "seconds": time.perf_counter() - begin}


def signals(seeds: int) -> None:
    kept, models = Kept(OUT / "signals.jsonl"), ("conv", "MLP", "PCA")
    print(f"| signals | to learn from | numbers | {' | '.join(models)} | seconds |\n|---|---|---|---|---|---|---|")
    for name, load in SIGNALS.items():
        for numbers in (5, 10):
            found = {
                model: [
                    kept.get(name, numbers, seed, model, make=partial(along_signals, model, name, numbers, seed))
                    for seed in range(seeds)
                ]
                for model in models
            }
            shares = {model: [each["share"] for each in runs] for model, runs in found.items()}
            cells = " | ".join(f"{statistics.mean(s):.3f} ± {statistics.pstdev(s):.3f}" for s in shares.values())
            took = " / ".join(f"{statistics.mean(r['seconds'] for r in found[m]):.0f}" for m in ("conv", "MLP"))
            shape = " × ".join(map(str, load(0)[0].shape))
            print(f"| {name} | {shape} | {numbers} | {cells} | {took} |", flush=True)


# ----------------------------------------------------------------------------------------------------------------- time


def timed(turns: int) -> None:
    """Ours and pyod's, in turns, on 10,000 × 30; each with the held-out share that it reaches."""
    rows = curved(13_334)[:, :30]
    print("| turn | ours, to its best | ours, whole fit | first evaluation | share | pyod | share | to its share |")
    print("|---|---|---|---|---|---|---|---|")
    for turn in range(turns):
        train, test = train_test_split(rows, test_size=0.25, random_state=turn)
        train, test = train[:10_000], test[:3_000]
        marks: list[tuple[float, float]] = []
        begin = time.perf_counter()
        with watched(begin, marks):
            made = Autoencoder(5, random_state=turn).fit(train)
        whole = time.perf_counter() - begin
        own = 1 - made.score(test)
        best = min(marks, key=lambda mark: mark[1])[0]
        begin = time.perf_counter()
        found = pyod(train, test, 5, turn)
        theirs = time.perf_counter() - begin
        share = float(((found - test) ** 2).sum() / ((test - train.mean(0)) ** 2).sum())
        reached = next((f"{seconds:.1f}" for seconds, value in marks if value <= share), "never")
        print(
            f"| {turn} | {best:.1f} s | {whole:.1f} s | {marks[0][0]:.1f} s | {own:.3f} | {theirs:.1f} s | "
            f"{share:.3f} | {reached} s |",
            flush=True,
        )


@contextlib.contextmanager
def watched(begin: float, marks: list[tuple[float, float]]) -> Iterator[None]:
    """Notes the seconds and the held-out error of each evaluation of a run."""
    from dist_ae import validation

    real = validation.Validation.metrics

    def noted(self: Any, *arguments: Any) -> dict[str, float]:
        found = real(self, *arguments)
        marks.append((time.perf_counter() - begin, found["mse"]))
        return found

    validation.Validation.metrics = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        validation.Validation.metrics = real  # type: ignore[method-assign]


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("share", "anomalies", "signals", "time", "tune"))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.what == "share":
        share(chosen.seeds)
    elif chosen.what == "tune":
        tune(chosen.settings, chosen.seeds)
    elif chosen.what == "anomalies":
        anomalies(chosen.seeds)
    elif chosen.what == "signals":
        signals(chosen.seeds)
    else:
        timed(chosen.seeds)


if __name__ == "__main__":
    main()
