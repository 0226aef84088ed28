"""The convolutional model beside the MLP, PCA, JPEG, WebP and non-local means: every figure given of it.

    python -m benchmarks.conv [PART ...] [--seeds 3] [--pictures FOLDER ...]  # rates, crops, ...

Prints one Markdown row a result: mean (range over the seeds). Runs stay in ``--storage`` and are not trained twice.
Photographs are cut from ``--pictures``, such as those of Debian's packages gnome-backgrounds, mate-backgrounds,
lomiri-wallpapers-16.04, lomiri-wallpapers-20.04, plasma-workspace-wallpapers, sway-backgrounds and ukui-wallpapers.
Non-local means needs scikit-image, `rates` needs constriction: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import bisect
import io
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist_ae
from dist_ae.config import InputError
from dist_ae.evaluate import fixed_noise, psnr

SIDE = 64  # of a patch of a photograph
PHOTOGRAPHS = {"train.batch_size": 32, "optim.name": "muon", "optim.lr": 0.01, "optim.warmup_steps": 200}
BERNOULLI = {"objective.likelihood": "bernoulli", "objective.sigma": 8**-0.5, "model.start": "random"}
Images = np.ndarray[Any, np.dtype[Any]]


class Bench:
    """Trains over the seeds and keeps every run."""

    def __init__(self, storage: Path, seeds: int) -> None:
        self.storage, self.seeds = storage, seeds

    def train(self, preset: str, values: dict[str, Any], seed: int = 0) -> dist_ae.Result:
        config = dist_ae.PRESETS[preset].override({"tracking.wandb": "off", **values, "seed": seed})
        return dist_ae.train(config.override({"run_dir": self.storage / config.directory().name}))

    def metric(self, preset: str, values: dict[str, Any], name: str) -> list[float]:
        return [self.train(preset, values, seed).metrics[name] for seed in range(self.seeds)]


def row(*cells: object) -> None:
    """Prints a Markdown row; lists become mean and range."""
    print("| " + " | ".join(_spread(c) if isinstance(c, list) else str(c) for c in cells) + " |", flush=True)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.5g}"
    return f"{mean} ({min(values):.5g} – {max(values):.5g})" if len(values) > 1 else mean


# ----------------------------------------------------------------------------------------------------- Fashion-MNIST


def fashion(bench: Bench) -> None:
    """`conv-fast`, a code of 147 numbers: the length of the schedule, and random weights in place of PCA."""
    row("start", "epochs", "val.mse", "patch PCA", "seconds of training")
    for epochs, start in ((1, "pca"), (2, "pca"), (4, "pca"), (20, "pca"), (1, "random"), (4, "random")):
        values = {"model.start": start, "train.epochs": epochs}
        results = [bench.train("conv-fast", values, seed) for seed in range(bench.seeds)]
        row(
            start,
            epochs,
            [result.metrics["val.mse"] for result in results],
            f"{results[0].metrics['val.pca_mse']:.5g}",
            [epochs * 60_000 / result.images_per_second for result in results],
        )
    curves(bench)


def curves(bench: Bench) -> None:
    """What the start gains: the error over the first epoch, from PCA and from random weights, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for start in ("pca", "random"):
        # A folder of its own: the same run with one evaluation may stand in the usual one.
        values = {"name": f"start-{start}", "model.start": start, "train.epochs": 1, "train.eval_every": 80}
        lines = (bench.train("conv-fast", values).run_dir / "metrics.jsonl").read_text().splitlines()
        found = [line for line in map(json.loads, lines) if line["split"] == "val"]
        axis.plot([line["step"] for line in found], [line["mse"] for line in found], "o-", ms=3, label=start)
    axis.set(xlabel="step", ylabel="val.mse", yscale="log", title="conv-fast, 147 numbers: one net, two starts")
    axis.legend(frameon=False)
    figure.savefig(bench.storage / "conv-start.png", dpi=150)


def sizes(bench: Bench) -> None:
    """Error against the size of the code, in about the same time: MLP, convolution, and their best linear codes."""
    from matplotlib.figure import Figure

    mlp = {"data.name": "fashion_mnist", "train.epochs": 20}
    curves: dict[str, list[tuple[int, float]]] = {"MLP": [], "PCA": [], "conv": [], "patch PCA": []}
    row("model", "numbers", "val.mse", "linear code of that size")
    for channels in (1, 2, 3, 6):
        numbers = 49 * channels
        pairs = (
            ("MLP", "PCA", "ae", {**mlp, "model.latent_dim": numbers}),
            ("conv", "patch PCA", "conv-fast", {"model.latent_dim": channels, "train.epochs": 4}),
        )
        for name, linear, preset, values in pairs[numbers > 256 :]:  # the hidden layer of the MLP has 256 units
            results = [bench.train(preset, values, seed).metrics for seed in range(bench.seeds)]
            found = [result["val.mse"] for result in results]
            curves[name].append((numbers, statistics.mean(found)))
            curves[linear].append((numbers, results[0]["val.pca_mse"]))
            row(name, numbers, found, f"{results[0]['val.pca_mse']:.5g}")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), "o--" if "PCA" in name else "o-", ms=4, label=name)
    title = "Fashion-MNIST: MLP after 20 epochs, convolution after 4"
    axis.set(xlabel="numbers of the code", ylabel="val.mse", xscale="log", yscale="log", title=title)
    axis.legend(frameon=False)
    figure.savefig(bench.storage / "conv-sizes.png", dpi=150)


def vae(bench: Bench) -> None:
    """The negative ELBO with 20 numbers and Bernoulli pixels after ten epochs; discretized, bits per dimension."""
    row("model", "val.neg_elbo, nats")
    common = {"data.name": "fashion_mnist", "train.epochs": 10, "model.latent_dim": 20}
    row("vae", bench.metric("vae", common, "val.neg_elbo"))
    conv = {**common, "model.widths": (32, 64), "model.code": "vector"}
    conv |= {"train.batch_size": 128, "optim.warmup_steps": 100}
    row("conv-vae, vector", bench.metric("conv-vae", {**conv, **BERNOULLI}, "val.neg_elbo"))
    discretized = {**conv, "objective.likelihood": "discretized"}
    row("conv-vae, discretized, bits per dimension", bench.metric("conv-vae", discretized, "val.bits_per_dim"))


# ------------------------------------------------------------------------------------------------------- photographs


def patches(folders: list[Path], storage: Path) -> str:
    """Scales each picture to 512 pixels on its shorter side and cuts 64 × 64 patches; every twelfth is validation.

    Returns:
        The data name of the packed patches.

    Raises:
        InputError: no picture in the folder.
    """
    from PIL import Image, ImageOps

    file = storage / "photographs.npz"
    if not file.exists():
        kinds = (".jpg", ".jpeg", ".png", ".webp")
        names = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in kinds)
        cut: list[Images] = []
        known: list[Images] = []
        for name in names:
            with Image.open(name) as opened:
                if min(opened.size) < 512:
                    continue
                opened.draft("RGB", (1024, 1024))
                picture = opened.convert("RGB")
            scale = 512 / min(picture.size)
            across, down = (round(length * scale) // SIDE for length in picture.size)
            picture = ImageOps.fit(picture, (across * SIDE, down * SIDE), Image.Resampling.LANCZOS)
            # The same wallpaper comes in several sizes and shapes, and would be in both parts.
            small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX)).astype(np.float64)
            if any(np.abs(small - other).mean() < 12 for other in known):
                continue
            known.append(small)
            whole = np.asarray(picture).reshape(down, SIDE, across, SIDE, 3)
            cut.append(whole.transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE))
        if not cut:
            raise InputError(f"--pictures {' '.join(map(str, folders))}: no picture of at least 512 pixels there")
        everything = np.concatenate(cut)
        held_out = np.arange(len(everything)) % 12 == 0
        storage.mkdir(parents=True, exist_ok=True)
        np.savez(file, train=everything[~held_out], val=everything[held_out])
        print(f"{len(cut)} pictures: {(~held_out).sum()} patches to train on, {held_out.sum()} others", flush=True)
    return f"array:{file}"


def in_bytes(run_dir: Path, train: Images, val: Images) -> float:
    """The PSNR of a trained model when each number of the code is kept as one byte."""
    model = dist_ae.load(run_dir)
    seen, codes = model.embed(train[:2000]), model.embed(val)
    axes = [0, *range(2, codes.ndim)]
    low, high = seen.amin(axes, keepdim=True), seen.amax(axes, keepdim=True)
    step = (high - low) / 255
    rounded = ((codes - low) / step).round().clamp(0, 255) * step + low
    decoded = torch.cat([model.decode(part) for part in rounded.split(256)])
    return psnr(float((decoded - torch.from_numpy(val) / 255).square().mean()))


def compressed(val: Images, bytes_per_image: int, kind: str) -> str:
    """The PSNR of JPEG or WebP at that size: all images as one mosaic, so that a file's header costs nothing."""
    from PIL import Image

    columns = math.isqrt(len(val))
    kept = val[: columns * (len(val) // columns)]
    mosaic = kept.reshape(-1, columns, 3, SIDE, SIDE).transpose(0, 3, 1, 4, 2).reshape(-1, columns * SIDE, 3)

    def coded(quality: int) -> io.BytesIO:
        file, more = io.BytesIO(), {"method": 6} if kind == "WEBP" else {"optimize": True}
        Image.fromarray(mosaic).save(file, kind, quality=quality, **more)
        return file

    fits = bisect.bisect_right(range(1, 96), bytes_per_image * len(kept), key=lambda quality: coded(quality).tell())
    if fits == 0:
        return "–"
    error = np.asarray(Image.open(coded(fits)).convert("RGB")).astype(np.float64) - mosaic
    return f"{psnr(float(np.square(error / 255).mean())):.2f}"


def entropy_coded(run_dir: Path, train: Images, val: Images, budget: int) -> float:
    """The PSNR at so many bytes an image: codes rounded to one step for all, coded by constriction's range ANS.

    The frequencies of each channel are those of training codes, which a decoder would have. The step is the finest
    that stays within the budget.
    """
    import constriction

    model = dist_ae.load(run_dir)
    seen, codes = (model.embed(images).transpose(0, 1).flatten(1) for images in (train[:4000], val))  # [channels, ...]

    def coded(step: float) -> tuple[int, torch.Tensor]:
        size, rounded = 0, (codes / step).round()
        for before, values in zip((seen / step).round(), rounded, strict=True):
            low = int(min(before.min(), values.min()))
            counts = np.bincount((before - low).int().numpy(), minlength=int(values.max()) - low + 1) + 0.5
            table = constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse((values - low).int().numpy().astype(np.int32), table)
            size += 4 * coder.num_words()
        return size, rounded * step

    fine, coarse = 1e-4, 1e2
    for _ in range(30):
        middle = math.sqrt(fine * coarse)
        fine, coarse = (fine, middle) if coded(middle)[0] <= budget * len(val) else (middle, coarse)
    kept = coded(coarse)[1].view(codes.shape[0], len(val), *model.model.code_shape[1:]).transpose(0, 1)
    decoded = torch.cat([model.decode(part) for part in kept.split(256)])
    return psnr(float((decoded - torch.from_numpy(val) / 255).square().mean()))


def rates(bench: Bench, folders: list[Path]) -> None:
    """PSNR at several sizes of the entropy-coded code of 768 numbers, beside JPEG and WebP of that size."""
    name = patches(folders, bench.storage)
    with np.load(name.removeprefix("array:")) as file:
        train, val = file["train"], file["val"]
    values = {"data.name": name, "model.widths": (32, 64, 128), "model.latent_dim": 12, "train.epochs": 4}
    results = [bench.train("conv", {**values, **PHOTOGRAPHS}, seed) for seed in range(bench.seeds)]
    row("bytes an image", "conv, dB", "JPEG", "WebP")
    for budget in (128, 256, 384, 512, 768):
        ours = [entropy_coded(result.run_dir, train, val, budget) for result in results]
        row(budget, ours, compressed(val, budget, "JPEG"), compressed(val, budget, "WEBP"))


def crops(bench: Bench, folders: list[Path]) -> None:
    """Random crops beside fixed squares of the same pictures: PSNR on held-out whole pictures, 768 numbers a square."""
    from dist_ae.data.crops import Crops
    from dist_ae.data.sources import load
    from dist_ae.use.whole import reconstructed

    own = {"data.name": f"folder:{folders[-1]}", "data.image_size": 512, "data.crop": SIDE, "data.corrupt": "skip"}
    config = dist_ae.PRESETS["conv"].override(own)
    dataset = load(config.data)
    file = bench.storage / "squares.npz"
    held = dataset.val.images
    assert isinstance(held, Crops) and dataset.val.rows is not None and dataset.train.rows is not None
    if not file.exists():
        np.savez(file, train=held.take(dataset.train.rows), val=held.take(dataset.val.rows))
    pictures = [held.picture(number) for number in np.unique(dataset.val.rows >> 33).tolist()]
    values = {"model.widths": (32, 64, 128), "model.latent_dim": 12, "train.steps": 1500, **PHOTOGRAPHS}
    row("training", "held-out whole pictures, dB", "error on validation : training")
    for label, data in (
        ("fixed squares", {"data.name": f"array:{file}"}),
        ("crops and flips", {**own, "data.flip": True}),
    ):
        results = [bench.train("conv", {**values, **data}, seed) for seed in range(bench.seeds)]
        found = []
        for result in results:
            model = dist_ae.load(result.run_dir).model
            errors = [(reconstructed(model, picture) / 255 - picture / 255).ravel() for picture in pictures]
            found.append(psnr(float(np.square(np.concatenate(errors)).mean())))
        row(label, found, [r.metrics["val.mse"] / r.metrics["val.train_mse"] for r in results])


def photographs(bench: Bench, folders: list[Path]) -> None:
    """PSNR at 1/16 and 1/96 of the values after four epochs, beside patch PCA, JPEG and WebP at the same bits."""
    name = patches(folders, bench.storage)
    with np.load(name.removeprefix("array:")) as file:
        train, val = file["train"], file["val"]
    row("code", "conv, dB", "in bytes", "patch PCA", "random weights, seed 0", "JPEG", "WebP")
    for widths, channels in (((32, 64, 128), 12), ((32, 64, 128, 192), 8)):
        numbers = channels * (SIDE // 2 ** len(widths)) ** 2
        values: dict[str, Any] = {"data.name": name, "model.widths": widths, "model.latent_dim": channels}
        values |= {"train.epochs": 4, **PHOTOGRAPHS}
        results = [bench.train("conv", values, seed) for seed in range(bench.seeds)]
        row(
            f"{numbers} numbers, widths {' '.join(map(str, widths))}",
            [result.metrics["val.psnr"] for result in results],
            [in_bytes(result.run_dir, train, val) for result in results],
            f"{psnr(results[0].metrics['val.pca_mse']):.2f}",
            f"{bench.train('conv', {**values, 'model.start': 'random'}).metrics['val.psnr']:.2f}",
            compressed(val, numbers, "JPEG"),
            compressed(val, numbers, "WEBP"),
        )
    comparison(bench, name, val)


def comparison(bench: Bench, name: str, val: Images) -> None:
    """One picture: originals, the MLP, patch PCA and the convolution with codes of 768 numbers."""
    from dist_ae.figures import image_rows

    conv = {"data.name": name, "model.widths": (32, 64, 128), "model.latent_dim": 12, **PHOTOGRAPHS}
    mlp = {"data.name": name, "model.hidden_dims": (1024,), "model.latent_dim": 768}
    # Most patches of wallpapers are nearly plain: ten evenly spaced ones of the quarter with the most detail.
    detail = np.abs(np.diff(val.astype(np.int16), axis=-1)).mean((1, 2, 3))
    shown = np.sort(np.argsort(detail)[-len(val) // 4 :])[:: len(val) // 40][:10]
    rows = {"original": torch.from_numpy(val[shown]) / 255}
    models = {
        "MLP": bench.train("ae", {**mlp, "train.epochs": 4}),
        # A rate of nothing leaves the start as it is.
        "patch PCA": bench.train("conv", {**conv, "optim.lr": 1e-12, "train.steps": 1}),
        "conv": bench.train("conv", {**conv, "train.epochs": 4}),
    }
    for label, result in models.items():
        rows[label] = dist_ae.load(result.run_dir).reconstruct(val[shown])
    image_rows(rows, bench.storage / "conv-comparison.png")
    image_rows({label: rows[label] for label in rows if label != "MLP"}, bench.storage / "photographs.png")


def denoising(bench: Bench, folders: list[Path]) -> None:
    """PSNR of denoised photographs beside non-local means, on the same noisy images."""
    from skimage.restoration import denoise_nl_means

    name = patches(folders, bench.storage)
    with np.load(name.removeprefix("array:")) as file:
        val = file["val"]
    row("noise", "conv-denoising, dB", "non-local means", "noisy")
    for level in (25, 50):
        std = level / 255
        values = {"data.name": name, "model.widths": (32, 64), "model.latent_dim": 24, "train.epochs": 4}
        values |= {"train.batch_size": 64, "optim.warmup_steps": 100}
        values |= {"objective.noise_std": std, "evaluation.noise_std": std}
        found = bench.metric("conv-denoising", values, "val.denoised_psnr")
        config = dist_ae.PRESETS["conv-denoising"].override(values)
        clean = torch.from_numpy(val) / 255
        noisy = clean + fixed_noise(
            config.evaluation.noise_std, range(len(val)), tuple(val.shape[1:]), torch.device("cpu")
        )
        settings: dict[str, Any] = {"patch_size": 5, "patch_distance": 6, "sigma": std, "channel_axis": 0}
        errors = []
        for h in (0.6, 0.8, 1.0):  # the best of its usual strengths, chosen on these very images
            cleaned = np.stack([denoise_nl_means(n, h=h * std, fast_mode=True, **settings) for n in noisy.numpy()])
            errors.append(float(((cleaned - clean.numpy()) ** 2).mean()))
        best = min(errors)
        row(f"{level}/255", found, f"{psnr(best):.2f}", f"{psnr(float((noisy - clean).square().mean())):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[Bench, list[Path]], None]] = {
        "fashion": lambda bench, _: fashion(bench),
        "sizes": lambda bench, _: sizes(bench),
        "vae": lambda bench, _: vae(bench),
        "photographs": photographs,
        "rates": rates,
        "crops": crops,
        "denoising": denoising,
    }
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; left out, all of them")
    parser.add_argument("--seeds", type=int, default=1)
    standard = [Path("/usr/share/wallpapers"), Path("/usr/share/backgrounds")]
    parser.add_argument("--pictures", type=Path, nargs="+", default=standard)
    parser.add_argument("--storage", type=Path, default=Path("runs/conv"))
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected {', '.join(parts)}")
    arguments.storage.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.storage, arguments.seeds)
    for name in arguments.parts or list(parts):
        print(f"\n{name}: {(parts[name].__doc__ or globals()[name].__doc__ or '').splitlines()[0]}\n", flush=True)
        parts[name](bench, arguments.pictures)


if __name__ == "__main__":
    main()
