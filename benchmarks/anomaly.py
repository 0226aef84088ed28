"""How well scores tell anomalous images from normal ones, and what scoring costs beside the model's own forward.

    python -m benchmarks.anomaly auroc [--preset ae] [--code 16] [--epochs 3] [--seeds 3] [--storage FOLDER]
    python -m benchmarks.anomaly speed [--count 20000] [--rounds 5] [--storage FOLDER]

``auroc``: of Fashion-MNIST one class is held out; a model is trained on the nine others, and all validation images are
scored, those of the held-out class being the anomalous ones. Beside it PCA with as many numbers, of the same training
images, by its error and by the Mahalanobis distance of its code. Prints one Markdown row a class: mean over the seeds,
then the mean over classes with its range over the seeds. Runs stay in ``--storage`` and are not trained twice.

``speed``: images a second of ``score`` and ``embed`` on arrays at batch 1024 beside the model's own forward or encoder
(target ≥ 0.8), and the seconds of both on PNG files beside decoding the files on all cores (target ≤ 1.15). The
rounds take turns; ratios are of each round, with their median and range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

import dist_ae
from dist_ae.data import sources

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
Array = np.ndarray[Any, np.dtype[Any]]


def fashion_mnist() -> tuple[Array, Array, Array, Array]:
    """Training images and labels, validation images and labels."""
    data = sources.load(dist_ae.PRESETS["ae-fast"].data)
    assert isinstance(data.train.images, np.ndarray) and isinstance(data.val.images, np.ndarray)
    assert data.train.labels is not None and data.val.labels is not None
    return data.train.images, data.train.labels, data.val.images, data.val.labels


def of_pca(train: Array, images: Array, numbers: int) -> dict[str, Array]:
    """Scores by scikit-learn's PCA of the training images."""
    flat = [part.reshape(len(part), -1).astype(np.float32) / 255 for part in (train, images)]
    pca = PCA(numbers, svd_solver="covariance_eigh").fit(flat[0])
    codes = pca.transform(flat[1])
    error = np.square(pca.inverse_transform(codes) - flat[1]).mean(1)
    return {"PCA error": error, "PCA mahalanobis": np.square(codes / np.sqrt(pca.explained_variance_)).sum(1)}


def auroc(preset: str, code: int, epochs: int, seeds: int, storage: Path) -> None:
    train, train_labels, images, labels = fashion_mnist()
    table: dict[str, Array] = {}  # score → AUROC [seeds, classes]
    for held_out in range(10):
        normal = train[train_labels != held_out], images[labels != held_out]
        linear = of_pca(normal[0], images, code)
        for seed in range(seeds):
            settings = {"model.latent_dim": code, "train.epochs": epochs, "seed": seed, "tracking.wandb": "off"}
            name = f"{preset}-{code}-{epochs}-without-{held_out}-seed-{seed}"
            config = dist_ae.PRESETS[preset].override({**settings, "run_dir": storage / name})
            model = dist_ae.load(dist_ae.train(config, data=normal).run_dir)
            names = ["error", "mahalanobis", *(["neg_elbo"] if model.config.model.variational else [])]
            scores = {score: model.score(images, score=score).numpy() for score in names} | linear
            for score, values in scores.items():
                found = table.setdefault(score, np.zeros((seeds, 10)))
                found[seed, held_out] = roc_auc_score(labels == held_out, values)
    print(f"| held out | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    for held_out, name in enumerate(CLASSES):
        print(f"| {name} | {' | '.join(f'{found[:, held_out].mean():.3f}' for found in table.values())} |")
    means = {score: found.mean(1) for score, found in table.items()}
    cells = (f"{each.mean():.4f} ({each.min():.4f} – {each.max():.4f})" for each in means.values())
    print(f"| **mean** (range over {seeds} seeds) | {' | '.join(cells)} |")


def decode(paths: list[Path]) -> int:
    """Decodes pictures one by one, as anybody would."""
    return sum(np.asarray(Image.open(path).convert("L")).size for path in paths)


def in_turns(rounds: int, works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(what: str, above: list[float], below: list[float], target: str) -> None:
    found = [a / b for a, b in zip(above, below, strict=True)]
    print(f"| {what} | {statistics.median(found):.2f} | {min(found):.2f} – {max(found):.2f} | {target} |")


def speed(count: int, rounds: int, storage: Path) -> None:
    train, _, images, _ = fashion_mnist()
    settings = {"model.latent_dim": 16, "train.steps": 50, "tracking.wandb": "off", "run_dir": storage / "speed"}
    model = dist_ae.load(dist_ae.train(dist_ae.PRESETS["ae"].override(settings), data=(train, images)).run_dir)
    batches = torch.from_numpy(np.resize(train, (max(count, 1024) // 1024 * 1024, 1, 28, 28))).float() / 255

    @torch.no_grad()
    def bare(function: Callable[[torch.Tensor], Any]) -> None:
        for batch in batches.split(1024):
            function(batch)

    arrays = in_turns(
        rounds,
        {
            "forward": lambda: bare(lambda x: model.model(x, None)),
            "score": lambda: model.score(batches, batch_size=1024),
            "encoder": lambda: bare(model.model.encode),
            "embed": lambda: model.embed(batches, batch_size=1024),
        },
    )
    folder = storage / f"pictures-{count}"
    paths = [folder / f"{index:06d}.png" for index in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for path, image in zip(paths, np.resize(train, (count, 28, 28)), strict=True):
        if not path.exists():
            Image.fromarray(image).save(path)
    cores = len(os.sched_getaffinity(0))
    pieces = [paths[start : start + 256] for start in range(0, count, 256)]

    def decoding() -> None:
        with ProcessPoolExecutor(cores) as pool:  # its start counts, as it does for us
            sum(pool.map(decode, pieces))

    files = in_turns(
        rounds,
        {
            "decoding": decoding,
            "reading": lambda: model.given(folder),
            "score": lambda: model.score(folder),
            "embed": lambda: model.embed(folder),
        },
    )
    print("| ratio, round by round | median | range | target |\n|---|---|---|---|")
    print(f"<!-- {len(batches):,} images, {count:,} files, {cores} cores, {rounds} rounds -->")
    for name, own in (("score", "forward"), ("embed", "encoder")):
        ratio(f"speed of `{name}` on arrays : the model's own {own}, batch 1024", arrays[own], arrays[name], "≥ 0.8")
        ratio(f"time of `{name}` on PNG files : decoding them on all cores", files[name], files["decoding"], "≤ 1.15")
        ratio(
            f"time of `{name}` on PNG files : reading them as it does, without the model",
            files[name],
            files["reading"],
            "",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("auroc", "speed"))
    parser.add_argument("--preset", default="ae")
    parser.add_argument("--code", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--storage", type=Path, default=Path("runs/benchmarks/anomaly"))
    chosen = parser.parse_args()
    if chosen.what == "auroc":
        auroc(chosen.preset, chosen.code, chosen.epochs, chosen.seeds, chosen.storage)
    else:
        speed(chosen.count, chosen.rounds, chosen.storage)


if __name__ == "__main__":
    main()
