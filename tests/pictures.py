"""Real pictures for the tests: cut from scikit-learn's two photographs, written by Pillow in every format."""

from __future__ import annotations

import io
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


@cache
def photographs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


def cut(index: int, height: int = 48, width: int = 64) -> Image.Image:
    """A piece of one of the photographs, another one for each index."""
    picture = photographs()[index % 2]
    y, x = index * 37 % (428 - height), index * 53 % (641 - width)
    return Image.fromarray(picture[y : y + height, x : x + width])


def make_folder(root: Path, count: int, sizes: bool = True, classes: tuple[str, ...] = ("flower", "temple")) -> Path:
    """``count`` JPEG and PNG files in one folder a class, of differing sizes unless ``sizes`` is False."""
    for index in range(count):
        place = root / classes[index % len(classes)] if classes else root
        place.mkdir(parents=True, exist_ok=True)
        height, width = (40 + index * 7 % 50, 40 + index * 11 % 60) if sizes else (24, 24)
        cut(index, height, width).save(place / f"{index:05d}.{'jpg' if index % 3 else 'png'}", quality=92)
    return root


def make_tar(path: Path, count: int, label: str = "cls") -> Path:
    """A tar as WebDataset writes it."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for index in range(count):
            content = io.BytesIO()
            cut(index, 24, 24).save(content, "png")
            members = {
                "png": content.getvalue(),
                label: str(index % 3).encode() if label == "cls" else b'{"label": "a"}',
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"sub/{index:04d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path
