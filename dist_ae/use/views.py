"""Records as `dist-ae score` sees them: at the model's size, or whole pictures cut into squares.

Both kinds have the same methods. The score of a whole picture is the largest score of its squares, and so are the
scores that its threshold is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_ae.config import DataConfig, InputError
from dist_ae.data.crops import Crops
from dist_ae.data.form import decode
from dist_ae.data.given import Given, blocks, floats, picked
from dist_ae.data.pictures import Picture, colour_of, form_of
from dist_ae.data.records import Array, Split, Whole, at_once
from dist_ae.quality import structural_similarity
from dist_ae.scores import Calibration, score_images
from dist_ae.terminal import Waiting
from dist_ae.use.trained import TrainedModel, images_of
from dist_ae.use.whole import on_scale, own_size, readable, reconstructed

Kind = Literal["error", "ssim"]
Measure = Callable[[Tensor, range], Tensor]  # of records [B, C, H, W] on the model's scale and their places: [B]


class Map(NamedTuple):
    """Where an image and its reconstruction differ."""

    place: int
    image: Tensor  # [C, H, W]
    reconstruction: Tensor  # [C, H, W]
    values: Tensor  # [H, W]


class AtModelSize:
    """Records of the model's shape."""

    held_out, size = "validation images", "the model's size"
    largest = 384  # pixels of the longer side of a heat map's panels

    def __init__(self, trained: TrainedModel, records: Given) -> None:
        self.trained, self.records = trained, records
        self.masks: DataConfig = trained.config.data  # how masks are brought to the size of the maps

    def scores(self, name: str) -> Tensor:
        return self.trained.score(self.records, score=name)

    def each(self, measure: Measure) -> Tensor:
        """A measure of every record, [N]."""
        return self.trained.each(measure, self.records)

    def calibration(self, name: str) -> Calibration:
        """The scores of held-out records."""
        return self.trained.calibration()

    def shown(self, index: Sequence[int]) -> Tensor:
        """Records as pictures [len(index), C, H, W] on [0, 1]."""
        return self.trained.pictures(floats(picked(self.records, np.asarray(index)), range(len(index))))

    def maps(self, kind: Kind) -> Iterator[Map]:
        for rows in blocks(self.records):
            images = floats(self.records, rows)
            output = self.trained.pictures(self.trained.reconstruct(images))
            images = self.trained.pictures(images)
            for place, *parts in zip(rows, images, output, error_maps(images, output, kind), strict=True):
                yield Map(place, *parts)


class AtOwnSize:
    """Whole pictures, of a model that was trained on crops: scaled as in training, one in memory at a time."""

    held_out, size = "held-out pictures", "their own size"
    largest = 2048

    def __init__(self, trained: TrainedModel, pictures: Sequence[Picture]) -> None:
        self.trained, self._pictures = trained, pictures
        self.records = Given(Split(np.empty((len(pictures), 0))), [picture.name for picture in pictures])
        self.masks = trained.config.data.model_copy(update={"crop": None, "fit": "stretch"})
        channels, self._side, _ = trained.model.image_shape
        self._form = form_of(trained.config.data, colour_of(trained.config.data, channels) or "rgb")
        self._oddest: list[int] = []  # the square of each picture that gave its score

    def _open(self, number: int) -> Array:
        with readable(self._pictures[number]):
            return decode(self._pictures[number].content, self._form)

    def _squares(self, picture: Array) -> Tensor:
        """The squares of a picture, side by side, [n, C, side, side] on the model's scale.

        A picture smaller than a square is mirrored at its edges.
        """
        lacking = [max(0, self._side - side) for side in picture.shape[1:]]
        picture = np.pad(picture, [(0, 0), (0, lacking[0]), (0, lacking[1])], "symmetric")
        crops = Crops(Whole.of([picture]), self._side)
        return on_scale(self.trained.model, crops.take(crops.tiles(0)))

    @torch.no_grad()
    def _of_squares(self, picture: Array, measure: Measure) -> Tensor:
        squares, size = self._squares(picture), at_once(1000, self.trained.model.image_shape)
        starts = range(0, len(squares), size)
        parts = [(squares[at : at + size], range(at, min(at + size, len(squares)))) for at in starts]
        return torch.cat([measure(part, rows).float().cpu() for part, rows in parts])

    def _measure(self, name: str) -> Measure:
        model, config = self.trained.model, self.trained.config
        moments = self.trained.calibration().moments if name == "mahalanobis" else None
        return lambda images, rows: score_images(model, images, rows, config, (name,), moments)[name]

    def scores(self, name: str) -> Tensor:
        scores, measure, waiting = [], self._measure(name), Waiting("scoring", len(self._pictures), "pictures")
        self._oddest = []
        for number in range(len(self._pictures)):
            largest = self._of_squares(self._open(number), measure).max(0)
            self._oddest.append(int(largest.indices))
            scores.append(largest.values)
            waiting()
        return torch.stack(scores)

    def each(self, measure: Measure) -> Tensor:
        """The largest measure over the squares of every picture, [N]."""
        numbers = range(len(self._pictures))
        return torch.stack([self._of_squares(self._open(number), measure).max() for number in numbers])

    def calibration(self, name: str) -> Calibration:
        """The scores of held-out pictures, computed from the run's data at every call."""
        crops, measure = self.trained.dataset().val, self._measure(name)
        assert isinstance(crops.images, Crops) and crops.rows is not None
        numbers = np.unique(crops.rows >> 33).tolist()
        scores = [self._of_squares(crops.images.picture(number), measure).max() for number in numbers]
        return Calibration(self.trained.calibration().moments, {name: torch.stack(scores).sort().values})

    def shown(self, index: Sequence[int]) -> Tensor:
        """The oddest square of each picture."""
        squares = [self._squares(self._open(number))[self._oddest[number]] for number in index]
        return self.trained.model.visible(torch.stack(squares)).cpu()

    def maps(self, kind: Kind) -> Iterator[Map]:
        for number in range(len(self._pictures)):
            picture = self._open(number)
            image, output = self._visible(picture), self._visible(reconstructed(self.trained.model, picture))
            yield Map(number, image, output, error_maps(image[None], output[None], kind, self._side)[0])

    def _visible(self, picture: Array) -> Tensor:
        return self.trained.model.visible(on_scale(self.trained.model, picture)).cpu()


View = AtModelSize | AtOwnSize


def view_of(trained: TrainedModel, images: Any, size: Literal["own", "model"] | None) -> View:
    """The user's records, or the run's validation images. Only runs on crops score pictures at their own size.

    Raises:
        InputError: ``size`` is "own", and that is not possible.
    """
    if size == "own" and trained.config.data.crop is None:
        raise InputError("--size own: scores of whole pictures need a run that was trained on crops, --data.crop 64")
    if trained.config.data.crop is not None and (whole := own_size(trained, images, None, size)) is not None:
        return AtOwnSize(trained, whole[0])
    return AtModelSize(trained, images_of(trained, images))


def error_maps(images: Tensor, reconstructions: Tensor, kind: Kind, side: int | None = None) -> Tensor:
    """Where images and reconstructions [B, C, H, W] differ, [B, H, W].

    ``error``: squared error, mean over channels, smoothed by a Gaussian of 1/32 of ``side``, at least one pixel.
    ``ssim``: 1 - structural similarity, [0, 2], in windows of 11 × 11.

    Args:
        side: in pixels; left out, the shorter side of the images.
    """
    if kind == "ssim":
        return 1 - structural_similarity(images, reconstructions)[1].mean(1)
    from torchvision.transforms.v2 import functional

    squared = (images - reconstructions).square().mean(1, keepdim=True)
    sigma = max(1.0, (side or min(images.shape[-2:])) / 32)
    # A window of three σ to each side, if the image is that large.
    widths = [2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in images.shape[-2:]]
    blurred: Tensor = functional.gaussian_blur(squared, [widths[1], widths[0]], [sigma, sigma])
    return blurred[:, 0]
