"""What a picture says about itself when it is decoded, and what these facts say of a whole set.

Packing finds them on the way and keeps them beside the pictures; ``dist-ae look`` shows them. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dist_ae.data.records import Array

SIDE = 8  # of the small grey copy that pictures are compared by
NEAR = 3.0  # levels of 255: root mean square difference of small copies below which pictures look alike
BLACK = 8.0  # levels of 255: nearly black below it everywhere
BUCKET = 64  # of the pictures that share a part of their hash, one is compared with so many behind it


class Facts(NamedTuple):
    """Of one picture."""

    width: int  # as it is seen, turned upright
    height: int
    mode: str  # Pillow's: L, RGB, RGBA, P, I;16, …
    kind: str  # JPEG, PNG, …; "" for pixels that come without a file
    low: float  # the smallest value; of more than 8 bits as the file has it, else after it got its size
    high: float
    digest: int  # of the file's bytes: 64 bits of BLAKE2
    small: bytes  # SIDE × (SIDE + 1) grey levels
    clear: bool = False  # some of it is transparent; not kept with packed sets


RECORD = np.dtype(
    [
        ("width", "<u4"), ("height", "<u4"), ("mode", "S8"), ("kind", "S8"), ("low", "<f4"), ("high", "<f4"),
        ("digest", "<u8"), ("small", "u1", (SIDE, SIDE + 1)),
    ]
)  # fmt: skip
FLAT = 2  # levels by which an area is brighter than another: noise turns no bit of the hash where nothing changes
MEAN = (1 / 3, 1 / 3, 1 / 3, -0.4)  # Pillow adds a half and cuts: the mean rounded down, of any three bytes
DEEP = ("I", "F")  # first letters of modes with more than 8 bits


def digest_of(content: Any) -> int:
    """64 bits that stand for a file's bytes, or for pixels."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(content, str):
        with open(content, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    else:
        digest.update(content if isinstance(content, bytes) else np.ascontiguousarray(content).data)
    return int.from_bytes(digest.digest(), "little")


def small_copy(pixels: Array) -> bytes:
    """A picture uint8 [C, H, W] as SIDE × (SIDE + 1) grey levels, by means of areas."""
    grey = pixels[0] if len(pixels) == 1 else pixels.mean(0, dtype=np.float32).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE + 1, SIDE), Image.Resampling.BOX).tobytes()


def of_pixels(images: Sequence[Image.Image]) -> tuple[list[float], list[float], list[bytes]]:
    """The smallest and largest value and the small copy of each of some pictures.

    Args:
        images: L or RGB, all of one size, as high as a multiple of ``SIDE``.
    """
    if not images:
        return [], [], []
    width, height = images[0].size
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    together = Image.new(mode, (width, height * len(images)))
    for row, image in enumerate(images):
        together.paste(image, (0, row * height))
    values = np.asarray(together).reshape(len(images), -1)
    grey = together if mode == "L" else together.convert("L", MEAN)
    # Areas end where pictures do, so none takes anything from the next one. Across first, as Pillow does with one.
    narrow = grey.resize((SIDE + 1, grey.height), Image.Resampling.BOX)
    small = narrow.resize((SIDE + 1, SIDE * len(images)), Image.Resampling.BOX).tobytes()
    size = SIDE * (SIDE + 1)
    return (
        values.min(1).astype(float).tolist(),
        values.max(1).astype(float).tolist(),
        [small[start : start + size] for start in range(0, len(small), size)],
    )


def table(facts: Sequence[Facts | None]) -> Array:
    """The facts of pictures as one array of ``RECORD``; zeros where there are none."""
    found = np.zeros(len(facts), RECORD)
    for row, each in enumerate(facts):
        if each is not None:
            small = np.frombuffer(each.small, np.uint8).reshape(SIDE, SIDE + 1)
            found[row] = (each.width, each.height, each.mode, each.kind, each.low, each.high, each.digest, small)
    return found


def twins(records: Array) -> Array:
    """For each picture the row of the first one with the same bytes: its own where it is the first, or the only one."""
    _, first, inverse = np.unique(records["digest"], return_index=True, return_inverse=True)
    return np.asarray(first[inverse.reshape(-1)])


def leaks(records: Array, held_out: Array) -> int:
    """How many of the pictures that are held out have a copy among the others."""
    return int(np.isin(records["digest"][held_out], records["digest"][~held_out]).sum())


def near_leaks(records: Array, held_out: Array, alike: Sequence[tuple[int, int]]) -> int:
    """How many of the pictures that are held out look like one of the others, and are no copies of any.

    Args:
        alike: pairs of pictures, as ``look_alikes`` gives them, which are the first ones of their copies.
    """
    first = twins(records)
    trained = set(first[~held_out].tolist())
    near = {pair[1 - side] for pair in alike for side in (0, 1) if pair[side] in trained} - trained
    return int(np.isin(first[held_out], sorted(near)).sum())


def flat(records: Array) -> Array:
    """Which pictures have one level everywhere."""
    return np.asarray(records["high"] <= records["low"])


def look_alikes(records: Array) -> list[tuple[int, int]]:
    """Pairs of pictures that look alike and are no copies, by small grey copies of 8 × 9 levels.

    These differ by less than ``NEAR`` levels, and by less than a tenth of their own contrast. Only those are compared
    that share a quarter of their difference hash (whether each of 8 × 8 areas is brighter than the next).
    """
    small = records["small"].astype(np.int16)
    levels = small.reshape(len(small), -1)
    mean, contrast = levels.mean(1), levels.std(1)
    bits = (small[:, :, 1:] > small[:, :, :-1] + FLAT).reshape(len(records), -1)
    parts = np.packbits(bits, 1).view(">u2")  # [N, 4]
    rows = np.flatnonzero((twins(records) == np.arange(len(records))) & ~flat(records))  # one of each set of copies
    found: set[tuple[int, int]] = set()
    for part in parts.T:
        order = rows[np.argsort(part[rows], kind="stable")]
        for apart in range(1, BUCKET):  # those that share a part lie side by side
            same = np.flatnonzero(part[order[:-apart]] == part[order[apart:]])
            if not len(same):
                break
            left, right = order[same], order[same + apart]
            # Copies that differ so little have means and contrasts that differ no more: few pairs are left to compare.
            most = np.minimum(NEAR, contrast[left] / 10) + 1e-3
            near = (abs(mean[left] - mean[right]) < most) & (abs(contrast[left] - contrast[right]) < most)
            left, right = left[near], right[near]
            error = np.sqrt(np.square(small[left] - small[right], dtype=np.int32).mean((1, 2)))
            alike = error < np.minimum(NEAR, contrast[left] / 10)
            found.update(zip(left[alike].tolist(), right[alike].tolist(), strict=True))
    return sorted({(min(pair), max(pair)) for pair in found})


def summary(records: Array, held_out: Array, alike: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What the facts say of a set, JSON-ready: the figures of ``dist-ae look``.

    Args:
        held_out: which pictures the source itself holds out, bool [N].
        alike: what ``look_alikes`` gives.
    """
    if not len(records):
        return {"pictures": 0, "given_split": False, "leaks": 0, "near_leaks": 0}
    first, plain = twins(records), flat(records)
    counts = np.bincount(first, minlength=len(records))
    near = {row for pair in alike for row in pair}
    sizes = Counter(zip(records["width"].tolist(), records["height"].tolist(), strict=True))
    ratios = records["width"] / np.maximum(records["height"], 1)
    deep = np.array([mode.startswith(DEEP) for mode in records["mode"].astype(str)])
    kinds = Counter(f"{kind} {mode}".strip() for kind, mode in zip(*(
        records[name].astype(str).tolist() for name in ("kind", "mode")
    ), strict=True))  # fmt: skip
    found = {
        "pictures": len(records),
        "sizes": {"different": len(sizes), "most": [[w, h, n] for (w, h), n in sizes.most_common(5)]},
        "smallest": [int(records["width"].min()), int(records["height"].min())],
        "largest": [int(records["width"].max()), int(records["height"].max())],
        "ratio": [float(f"{value:.3g}") for value in np.quantile(ratios, [0, 0.5, 1])],
        "modes": dict(kinds.most_common()),
        "range": [float(records["low"].min()), float(records["high"].max())],
        "copies": int((counts[first] > 1).sum()),
        "extra_copies": int((counts - 1).clip(0).sum()),
        "near_duplicates": len(near),
        "given_split": bool(held_out.any()),
        "leaks": leaks(records, held_out),
        "near_leaks": near_leaks(records, held_out, alike),
        "flat": int(plain.sum()),
        "nearly_black": int((~deep & ~plain & (records["small"].max((1, 2)) < BLACK)).sum()),
    }
    if deep.any():
        found["deep"] = {
            "pictures": int(deep.sum()),
            "range": [float(records["low"][deep].min()), float(records["high"][deep].max())],
        }
    return found


def remarks(looked: Mapping[str, Any]) -> list[str]:
    """What a person who trains on a set should know of it: the two or three figures of its summary that matter."""
    count = looked.get("pictures", 0)
    found = []
    if looked.get("leaks"):
        found.append(
            f"{looked['leaks']:,} of the pictures held out by the source are copies of training pictures: the error on "
            "them says nothing about new ones"
        )
    if looked.get("near_leaks", 0) > count / 1000:
        found.append(
            f"{looked['near_leaks']:,} of the pictures held out by the source look nearly like a training picture, as "
            "frames of one clip do"
        )
    if looked.get("copies"):
        found.append(
            f"{looked['copies']:,} of {count:,} pictures have a twin of the same bytes"
            f"{'' if looked.get('given_split') else '; twins are kept on one side of the split'}"
        )
    if looked.get("near_duplicates", 0) > count / 100:
        way_out = "--data.group PATTERN keeps frames of one clip, or views of one thing, on one side of the split"
        found.append(
            f"{looked['near_duplicates']:,} of {count:,} pictures look nearly like another one"
            f"{'' if looked.get('grouped') else f'; {way_out}'}"
        )
    if looked.get("flat", 0) + looked.get("nearly_black", 0) > count / 100:
        found.append(
            f"{looked['flat']:,} of {count:,} pictures have one colour, {looked['nearly_black']:,} are nearly black"
        )
    return found[:3]
