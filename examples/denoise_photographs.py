"""Removes noise from photographs: `python examples/denoise_photographs.py FOLDER OUT`. The model learns from clean
ones, in pieces of 64 × 64 pixels; a photograph of any size is then cleaned piece by piece."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import dist_ae

SIDE, NOISE = 64, 25 / 255  # pixels; standard deviation on [0, 1]
SETTINGS = {"model.latent_dim": 24, "model.widths": (32, 64), "train.batch_size": 16, "tracking.wandb": "off"}


def pieces(image):
    """[H, W, 3] → [N, 64, 64, 3], row by row; what is left at the right and below goes."""
    rows, columns = (length // SIDE for length in image.shape[:2])
    cut = image[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
    return cut.transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)


folder, out = map(Path, sys.argv[1:])
photographs = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.[jp][pn]g"))]
config = dist_ae.PRESETS["conv-denoising"].override({**SETTINGS, "objective.noise_std": NOISE, "train.epochs": 15})
model = dist_ae.load(dist_ae.train(config, data=np.concatenate([pieces(image) for image in photographs])).run_dir)
out.mkdir(exist_ok=True)
for number, image in enumerate(photographs):
    noisy = pieces(image) / 255 + np.random.default_rng(number).normal(0, NOISE, pieces(image).shape)
    clean = model.reconstruct(noisy.astype(np.float32)).permute(0, 2, 3, 1).numpy()
    rows, columns = (length // SIDE for length in image.shape[:2])
    whole = clean.reshape(rows, columns, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(rows * SIDE, columns * SIDE, 3)
    Image.fromarray((whole * 255).round().astype(np.uint8)).save(out / f"{number}.png")
