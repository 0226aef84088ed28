"""A denoiser on held-out whole pictures, beside non-local means and BM3D, which are told the noise.

    python -m benchmarks.denoise RUN --levels 15 25 50 --pictures 5

RUN was trained with ``--data.crop``; its held-out pictures are taken whole, so no crop of training touches them. The
noise is Gaussian, keyed by the picture. PSNR is of the mean squared error over all pixels of all pictures.
``pip install bm3d scikit-image`` (BM3D is free for uses that are not commercial).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

import dist_ae
from dist_ae.data.crops import Crops
from dist_ae.data.sources import located
from dist_ae.evaluate import fixed_noise
from dist_ae.use.whole import reconstructed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--levels", type=float, nargs="+", default=[15, 25, 50], help="of the noise, in 255ths")
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--side", type=int, default=512, help="most pixels of a side: the middle of a larger picture")
    parser.add_argument("--data-root", type=Path, help="where the run's data lies, if elsewhere")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = dist_ae.load(given.run)
    model.config = located(model.config, given.data_root)
    held = model.dataset().val
    assert isinstance(held.images, Crops) and held.rows is not None
    numbers = np.unique(held.rows >> 33)[: given.pictures]
    rows = []
    for level in given.levels:
        squared: dict[str, float] = {}
        seconds: dict[str, float] = {}
        pixels = 0
        for number in numbers.tolist():
            picture = held.images.picture(number)
            top, left = (max(0, (side - given.side) // 2) for side in picture.shape[1:])
            clean = picture[:, top : top + given.side, left : left + given.side].astype(np.float32) / 255
            noise = fixed_noise(level / 255, range(number, number + 1), clean.shape, torch.device("cpu"))[0].numpy()
            pixels += clean.size
            for name, found, took in methods(model, clean + noise, level / 255):
                squared[name] = squared.get(name, 0.0) + float(
                    np.square(found.clip(0, 1) - clean, dtype=np.float64).sum()
                )
                seconds[name] = seconds.get(name, 0.0) + took
        row = {name: -10 * math.log10(value / pixels) for name, value in squared.items()}
        rows.append({"level": level, "pictures": len(numbers), "psnr": row, "seconds": seconds})
        print(
            f"σ = {level:g}: "
            + ", ".join(f"{name} {value:.2f} dB ({seconds[name]:.0f} s)" for name, value in row.items())
        )
        if given.out is not None:
            given.out.write_text(json.dumps(rows, indent=1) + "\n")


def methods(model: dist_ae.TrainedModel, noisy: np.ndarray, std: float) -> list[tuple[str, np.ndarray, float]]:
    """(name, picture [C, H, W], seconds) of each method."""
    import bm3d
    from skimage.restoration import denoise_nl_means

    image = noisy.transpose(1, 2, 0)
    by_bm3d = bm3d.bm3d_rgb if image.shape[2] == 3 else bm3d.bm3d
    tasks = {
        "noisy": lambda: noisy,
        "model": lambda: reconstructed(model.model, noisy),
        "non-local means": lambda: denoise_nl_means(
            image, h=0.8 * std, sigma=std, patch_size=5, patch_distance=6, fast_mode=True, channel_axis=2
        ).transpose(2, 0, 1),
        "BM3D": lambda: by_bm3d(image.squeeze(), std).reshape(image.shape).transpose(2, 0, 1),
    }
    found = []
    for name, task in tasks.items():
        start = time.perf_counter()
        cleaned = task()
        found.append((name, cleaned, time.perf_counter() - start))
    return found


if __name__ == "__main__":
    main()
