"""One self-contained page about a trained model.

It shows a map of images by their codes, the best and worst reconstructions, and the meaning of the code.
"""

from __future__ import annotations

import base64
import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_ae.config import InputError
from dist_ae.data.given import Given, blocks, floats
from dist_ae.data.records import Array
from dist_ae.files import to_json
from dist_ae.models import MLP, as_bytes
from dist_ae.use.program import onnx_bytes
from dist_ae.use.trained import TrainedModel

TEMPLATE = Path(__file__).with_name("explore.html")
LARGEST_PAGE = 15_000_000  # bytes of the page, which mail and chat programs still accept
LARGEST_DECODER = 5_000_000  # bytes of the page for the layers of an MLP, in base64
LARGEST_SPRITES = 8_000_000  # bytes of the page for thumbnails of images and reconstructions, in base64
DIRECTIONS = 128  # most principal directions of the code in the page: all of them for most models
STRIPS, FRAMES = 8, 9  # directions shown as film strips, and the frames of each, from -3 to 3 standard deviations
EXTREMES = 12  # images with the smallest and the largest error
LARGEST_STRIP_SIDE = 96  # pixels
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of onnxruntime-web


@torch.no_grad()
def explore_page(
    trained: TrainedModel, images: Given, title: str, facts: Sequence[str] = (), onnxruntime_web: Path | None = None
) -> str:
    """The page as HTML.

    Args:
        trained: the model.
        images: the images on the map, with their labels and class names if they have any.
        title: the page's title.
        facts: short lines under the title.
        onnxruntime_web: the folder of npm's onnxruntime-web, which decodes in the browser for models that are no MLP.

    Raises:
        InputError: there are fewer than three images, ``onnxruntime_web`` is not that folder, or the page
            exceeds 15 MB.
    """
    count = len(images.split)
    if count < 3:
        raise InputError(f"a map needs at least 3 images, got {count}")
    codes, errors, originals, reconstructed = _apply(trained, images)
    if not (np.isfinite(codes).all() and np.isfinite(errors).all()):
        raise InputError(
            "the model's codes or reconstructions of these images are not finite, so they cannot be put on a map"
        )
    mean, directions, scales = _principal(codes)
    coordinates = (codes - mean) @ directions.T
    share_kept = float((scales**2).sum() / np.maximum(codes.var(0, ddof=1).sum(), 1e-30))
    labels = images.split.labels
    worst_first = np.argsort(-errors, kind="stable")
    extremes = [*worst_first[::-1][:EXTREMES], *worst_first[:EXTREMES]]
    decoder = _decoder(trained, mean, directions, onnxruntime_web)
    if (
        "layers" in decoder
        and sum(len(text) for layer in decoder["layers"] for text in layer.values()) > LARGEST_DECODER
    ):
        decoder = {}
        facts = [*facts, "no live decoder: its weights are too large for a page"]
    page: dict[str, Any] = {
        "title": title,
        "facts": [*facts, f"{count:,} images on the map"],
        "count": count,
        "shape": trained.model.image_shape,
        "points": _text(_map(coordinates)),
        "errors": _text(errors.astype(np.float32)),
        "names": images.names,
        "labels": None if labels is None else labels.tolist(),
        "classes": list(images.classes),
        "kept": share_kept,
        "extremes": [int(image) for image in extremes],
        "pairs": _pairs(originals[extremes], reconstructed[extremes]),
        "strips": _strips(trained, mean, directions, scales),
        "samples": _samples(trained),
        "deviations": scales.tolist(),
        **_quantized(coordinates),
        **decoder,
        **_sprites(originals, reconstructed),
    }
    # With "<", a picture's name could end the element that holds the data.
    data = to_json(page, indent=None).decode().replace("<", "\\u003c")
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", _escaped(title)).replace("{{data}}", data)
    if len(html) > LARGEST_PAGE:
        raise InputError(
            f"the page would have {len(html):,} bytes, more than {LARGEST_PAGE:,}; show fewer images with --num"
        )
    return html


def _apply(trained: TrainedModel, images: Given) -> tuple[Array, Array, Tensor, Tensor]:
    """Codes [N, D], errors per pixel [N], and originals and reconstructions [N, C, H, W] as bytes."""
    codes, errors, originals, reconstructed = [], [], [], []
    for rows in blocks(images):
        clean = trained.model.to_units(floats(images, rows).to(trained.device))
        output = trained.model(clean, None)
        reconstruction = output.reconstruction.float()
        codes.append(output.mean.flatten(1).float().cpu().numpy())
        errors.append((reconstruction - clean).square().flatten(1).mean(1).cpu().numpy())
        originals.append(as_bytes(trained.model.visible(clean)).cpu())
        reconstructed.append(as_bytes(trained.model.visible(reconstruction)).cpu())
    return np.concatenate(codes), np.concatenate(errors), torch.cat(originals), torch.cat(reconstructed)


def _principal(codes: Array, most: int = DIRECTIONS) -> tuple[Array, Array, Array]:
    """Mean [D], principal directions [k, D] and standard deviations [k] of codes [N, D], k at most ``most``."""
    from sklearn.decomposition import PCA

    pca = PCA(min(most, *codes.shape), random_state=0).fit(codes)
    scales = np.sqrt(np.maximum(pca.explained_variance_, 0))
    # The sign of a direction has no meaning. A fixed one keeps the pages of two runs comparable.
    signs = np.sign(pca.components_[np.arange(len(scales)), np.abs(pca.components_).argmax(1)])
    return pca.mean_, pca.components_ * signs[:, None], scales


def _map(coordinates: Array) -> Array:
    """A position [N, 2] on [0, 1] for each image: its code if that has two numbers, else t-SNE of the codes."""
    count, numbers = coordinates.shape
    spread = coordinates.std(0)
    if spread.max(initial=0.0) <= 1e-6 * max(1.0, float(np.abs(coordinates).max(initial=0.0))):
        return np.full((count, 2), 0.5, np.float32)  # equal codes have one position; t-SNE would divide by zero
    if numbers > 2 and count > 10:
        from sklearn.manifold import TSNE

        # With 400 iterations and a coarser angle, 10,000 images take 8 s on two cores and give the same picture.
        perplexity = min(30.0, (count - 1) / 3)
        settings: dict[str, Any] = {"max_iter": 400, "angle": 0.6, "n_jobs": -1, "random_state": 0}
        coordinates = TSNE(perplexity=perplexity, init="pca", **settings).fit_transform(coordinates[:, :50])
    places = np.zeros((count, 2))
    places[:, : min(2, numbers)] = coordinates[:, :2]
    # A few distant images would squeeze the others together, so the range covers only nearly all images.
    low, high = np.quantile(places, [0.001, 0.999], axis=0)
    scaled: Array = ((places - low) / np.maximum(high - low, 1e-12)).clip(-0.05, 1.05).astype(np.float32)
    return scaled


def plane(codes: Tensor) -> Tensor:
    """The first two principal components of codes [N, D], as [N, 2]: a map for programs that show points."""
    places = torch.zeros(len(codes), 2)
    if len(codes) > 1:
        mean, directions, _ = _principal(codes.numpy(), 2)
        places[:, : len(directions)] = torch.from_numpy((codes.numpy() - mean) @ directions.T)
    return places


def _quantized(coordinates: Array) -> dict[str, Any]:
    """Coordinates as 16-bit integers and the step of each direction."""
    steps = np.maximum(np.abs(coordinates).max(0), 1e-12) / 32767
    whole = np.rint(coordinates / steps).astype("<i2")
    return {"codes": _text(whole), "steps": steps.tolist(), "directions": coordinates.shape[1]}


def _decoder(trained: TrainedModel, mean: Array, directions: Array, onnxruntime_web: Path | None) -> dict[str, Any]:
    """The decoder for the browser: the layers of an MLP, or else an ONNX model and its runtime."""
    code = {"mean": _text(mean.astype("<f4")), "basis": _text(directions.astype("<f2"))}
    if onnxruntime_web is not None:
        loader, program = (_runtime_file(onnxruntime_web, name) for name in RUNTIME_FILES)
        onnx = gzip.compress(onnx_bytes(trained.model, "decoder"), 6)
        runtime = {"loader": _text(loader), "program": _text(gzip.compress(program, 9)), "onnx": _text(onnx)}
        return {**code, "runtime": runtime, "codeShape": list(trained.model.code_shape)}
    if isinstance(trained.model, MLP) and not trained.model.standardized:
        layers = [*trained.model.decoder, trained.model.to_pixels]
        weights = [
            {"weight": _text(layer.weight.cpu().numpy().astype("<f2")), "bias": _text(layer.bias.cpu().numpy())}
            for layer in layers
        ]
        activation = trained.config.model.activation
        return {**code, "layers": weights, "activation": activation, "bernoulli": trained.model.bernoulli}
    return {}


def _runtime_file(folder: Path, name: str) -> bytes:
    for path in (folder / name, folder / "dist" / name):
        if path.is_file():
            return path.read_bytes()
    raise InputError(
        f"--onnxruntime-web {folder}: has no {name}; "
        "expected the folder from `npm install onnxruntime-web`, node_modules/onnxruntime-web"
    )


def _strips(trained: TrainedModel, mean: Array, directions: Array, scales: Array) -> list[str]:
    """A picture for each of the first directions: decoded codes along it, around the mean code."""
    moves = torch.linspace(-3, 3, FRAMES)
    strips = []
    for direction, scale in list(zip(directions, scales, strict=True))[:STRIPS]:
        moved = torch.from_numpy(mean) + moves[:, None] * float(scale) * torch.from_numpy(direction)
        decoded = trained.decode(moved.float().view(-1, *trained.model.code_shape))
        strips.append(
            _data_uri(_tiled(_shrunk(as_bytes(trained.pictures(decoded)), LARGEST_STRIP_SIDE), FRAMES), "PNG")
        )
    return strips


def _samples(trained: TrainedModel, columns: int = 12, rows: int = 4) -> str | None:
    if not trained.config.model.variational:
        return None
    samples = trained.pictures(trained.sample(columns * rows))
    return _data_uri(_tiled(_shrunk(as_bytes(samples), LARGEST_STRIP_SIDE), columns), "PNG")


def _pairs(originals: Tensor, reconstructed: Tensor) -> list[str]:
    """Pictures of an original over its reconstruction."""
    both = torch.cat([originals, reconstructed], 2)
    return [_data_uri(_tiled(_shrunk(pair[None], 2 * LARGEST_STRIP_SIDE), 1), "PNG") for pair in both]


def _sprites(originals: Tensor, reconstructed: Tensor) -> dict[str, Any]:
    """Thumbnails of all images and of all reconstructions, one sheet each, as fine as the page has room for."""
    columns = math.ceil(math.sqrt(len(originals)))
    small = [originals, reconstructed]
    for side, quality in ((32, 80), (32, 60), (28, 50), (24, 40), (20, 30), (16, 20)):
        small = [_shrunk(images, side) for images in small]
        sprites = [_data_uri(_tiled(images, columns), "WEBP", quality) for images in small]
        if sum(map(len, sprites)) <= LARGEST_SPRITES:
            break
    height, width = small[0].shape[-2:]
    return {"sprite": sprites[0], "reconstructions": sprites[1], "columns": columns, "tile": [width, height]}


def _shrunk(images: Tensor, side: int) -> Tensor:
    """Images [N, C, H, W] with height and width of at most ``side``."""
    height, width = images.shape[-2:]
    if max(height, width) <= side:
        return images
    size = [max(1, round(length * side / max(height, width))) for length in (height, width)]
    smaller = torch.nn.functional.interpolate(images.float(), size=size, mode="area")
    return smaller.round().to(torch.uint8)


def _tiled(images: Tensor, columns: int) -> Array:
    """Images [N, C, H, W] side by side in one picture [H', W', C]."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, channels, height, width), np.uint8)
    sheet[:count] = images.numpy()
    sheet = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return sheet.reshape(rows * height, columns * width, channels)


def _data_uri(picture: Array, kind: str, quality: int = 80) -> str:
    if picture.shape[2] not in (1, 3, 4):  # neither grey nor colour: show the first channel
        picture = picture[..., :1]
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{_text(file.getvalue())}"


def _text(content: bytes | Array) -> str:
    return base64.b64encode(content if isinstance(content, bytes) else content.tobytes()).decode()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
