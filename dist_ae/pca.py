"""Principal components of a data set, computed by all processes together.

They are the start of a model and its baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_ae import devices
from dist_ae.config import Config, InputError
from dist_ae.data.order import evenly_spaced, share
from dist_ae.data.reader import Reader
from dist_ae.models import Autoencoder, Components, pad_to_multiple
from dist_ae.processes.runtime import Processes
from dist_ae.processes.stop import StopRequested

SAMPLE_IMAGES = 65_536  # most images used: all of 60,000, a fixed sample of a million
SAMPLE_VALUES = 2**28  # most pixels used, which bounds the time for large images
CHUNK_VALUES = 2**20  # pixels in one product: about 20 MB with all intermediate results
EXACT_SIZE = 1024  # up to this size the covariance is decomposed; beyond, an iteration finds the leading directions
LARGEST_EXACT = 4096  # the same if more than a quarter of the directions is needed, which takes some 10 s
MOST = 4096  # directions of larger vectors: decomposing a matrix of 12,288² would take minutes on every process
PASSES = 4  # over the sample
NO_VARIANCE = 1e-12  # share of the total variance below which a direction counts as having none

Size = tuple[int, int]  # height, width


def sample_rows(num_images: int, size: int) -> Tensor:
    """The images that PCA uses: evenly spaced rows, a pure function of the sizes of data set and image."""
    return evenly_spaced(num_images, min(SAMPLE_IMAGES, max(SAMPLE_VALUES // size, 1024)))


def extra_directions(num: int) -> int:
    """Directions that the iteration computes in addition to ``num`` (Halko, Martinsson and Tropp 2011).

    As many again: with only 16, PCA of photographs' patches with 128 numbers had a 2.3 % larger error than the exact
    one. A weak baseline flatters every model.
    """
    return max(64, min(num, 512))


def patches(images: Tensor, size: Size) -> Tensor:
    """images [B, C, H, W] → patches [B·h·w, C·height·width]. Lower and right edges repeat the last pixels."""
    padded = pad_to_multiple(images, size)
    return F.unfold(padded, size, stride=size).transpose(1, 2).flatten(0, 1)


def vector_size(image_shape: Sequence[int], patch: Size | None) -> int:
    """Numbers of an image, or of one of its patches."""
    return math.prod(image_shape) if patch is None else image_shape[0] * math.prod(patch)


def patch_count(image_shape: Sequence[int], patch: Size | None) -> int:
    """Patches of an image; 1 if the whole image is coded."""
    if patch is None:
        return 1
    return math.prod(-(-side // multiple) for side, multiple in zip(image_shape[1:], patch, strict=True))


@torch.no_grad()
def principal_components(
    reader: Reader, num: int, patch: Size | None, runtime: Processes, stop: Callable[[], bool] = lambda: False
) -> Components:
    """The ``num`` leading principal components of images, or of their patches, on [-1, 1].

    There are fewer if fewer directions have variance. They are those of a fixed sample: small vectors get the exact
    decomposition of its covariance, large ones a randomized subspace iteration (Halko, Martinsson and
    Tropp 2011, algorithm 4.4), whose cost grows with ``num`` and not with the square of their size. Each process takes
    its part of the chunks; apart from rounding, the result does not depend on the number of processes.

    Raises:
        StopRequested: ``stop`` answered yes. It is asked before every chunk, equally often on every process.
    """
    vectors = _Vectors(reader, patch, runtime, stop)
    if vectors.size <= EXACT_SIZE or (num > vectors.size // 4 and vectors.size <= LARGEST_EXACT):
        mean, covariance = vectors.covariance()
        values, basis = torch.linalg.eigh(covariance)
        values, basis = values.flip(0)[:num], basis.flip(1)[:, :num]
        total = float(covariance.diagonal().sum())
    else:
        mean, values, basis, total = vectors.leading(num)
    # Directions without variance are arbitrary, up to rounding errors: drop them.
    count = max(1, int((values > NO_VARIANCE * total).sum()))
    values, basis = values[:count], basis[:, :count]
    # A decomposition leaves the sign open: make the largest entry of each component positive.
    basis = basis * torch.where(basis.gather(0, basis.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return Components(mean, values.clamp(min=0), basis.T.contiguous(), total, reader.standardized)


class _Vectors:
    """The sample's images or patches as the rows of a matrix, which is never in memory as a whole in floating point."""

    def __init__(self, reader: Reader, patch: Size | None, runtime: Processes, stop: Callable[[], bool]) -> None:
        self._patch, self._runtime, self._stop = patch, runtime, stop
        shape = reader.split.images.shape[1:]
        rows = sample_rows(len(reader.split), math.prod(shape))
        self.size = vector_size(shape, patch)
        self.count = len(rows) * patch_count(shape, patch)
        self._bytes = reader.split.images.dtype == "uint8" and reader.split.scaling is None
        # From the stored numbers to the scale inside the model.
        self._scale, self._shift = (1.0, 0.0) if reader.standardized else (2.0, -1.0)
        if self._bytes:
            self._scale = 2 / 255
        # Processes take whole chunks, so the result of a chunk does not depend on the number of processes.
        chunks = torch.split(rows, max(1, CHUNK_VALUES // math.prod(shape)))
        self._chunks_per_process = -(-len(chunks) // runtime.world)
        mine = share(range(len(chunks)), runtime.rank, runtime.world)
        self._reader, self._mine = reader, chunks[mine.start : mine.stop]
        self.device = reader.device if devices.has_float64(reader.device) else torch.device("cpu")

    def chunks(self) -> Iterator[Tensor]:
        """This process's vectors, chunk by chunk, [n, size]: whole numbers 0…255 in float32 for bytes, else float64.

        They are on the reader's device, which computes all products; for a device without float64, on the host.

        Every pass reads them again, since a copy of the sample would often be as large as the data set.
        """
        for index in range(self._chunks_per_process):
            if self._stop():
                raise StopRequested
            if index < len(self._mine):
                following = self._mine[index + 1] if index + 1 < len(self._mine) else None
                images = self._reader.raw(self._mine[index], following)
                images = images.to(self.device)
                images = images.float() if self._bytes else self._reader.scaled(images, torch.float64)
                if self._reader.missing:
                    images = torch.where(images.isnan(), 0.0, images)  # the mean
                yield images.flatten(1) if self._patch is None else patches(images, self._patch)

    def _sum(self, values: Tensor) -> Tensor:
        return self._runtime.sum(values.to(self._runtime.device, self._runtime.exact)).cpu().double()

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [size] and covariance [size, size]. Products of 256 rows of bytes are exact in float32."""
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        gram = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for chunk in self.chunks():
            for part in torch.split(chunk, 256):
                total += part.sum(0)
                gram += part.T @ part
        total, gram = self._sum(total), self._sum(gram)
        mean = total / self.count
        return mean * self._scale + self._shift, (gram / self.count - torch.outer(mean, mean)) * self._scale**2

    def leading(self, num: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Mean [size], variances [num], directions [size, num] and the total variance."""
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for chunk in self.chunks():
            for part in torch.split(chunk, 256):
                total += part.sum(0)
        mean = self._sum(total) / self.count
        width = min(num + extra_directions(num), self.size)
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(self.size, width, generator=generator, dtype=torch.float64))[0]
        for turn in range(PASSES):
            applied = torch.zeros(self.size, width, dtype=torch.float64, device=self.device)
            squares = torch.zeros((), dtype=torch.float64, device=self.device)
            dtype = torch.float32 if self._bytes else torch.float64
            offset, directions = mean.to(self.device, dtype), basis.to(self.device, dtype)
            for chunk in self.chunks():
                centred = chunk.sub_(offset)
                applied += centred.T @ (centred @ directions)
                squares += centred.square().sum()
            applied = self._sum(applied) / self.count  # the covariance, applied to the basis
            if turn < PASSES - 1:
                basis = torch.linalg.qr(applied)[0]
        # Rayleigh-Ritz: the covariance within the basis is small enough to decompose.
        within = basis.T @ applied
        values, rotation = torch.linalg.eigh((within + within.T) / 2)
        directions = (basis @ rotation).flip(1)[:, :num]
        variance = float(self._sum(squares)) / self.count * self._scale**2
        return mean * self._scale + self._shift, values.flip(0)[:num] * self._scale**2, directions, variance


def of_model(
    model: Autoencoder, reader: Reader, runtime: Processes, stop: Callable[[], bool] = lambda: False
) -> Components | None:
    """The components for a model's start and baseline; None if it has no linear code, or one that is too long."""
    code = model.linear_code()
    if code is None:
        return None
    size = vector_size(reader.split.images.shape[1:], code.patch)
    if size > LARGEST_EXACT and min(code.values, size) > MOST:
        return None  # `check` refuses such a start; there is no baseline
    return principal_components(reader, min(code.values, size), code.patch, runtime, stop)


def check(config: Config, model: Autoencoder) -> None:
    """Refuses a PCA start that is not possible.

    Raises:
        InputError: with the reason and the way out.
    """
    if config.model.start != "pca":
        return
    if config.objective.likelihood == "bernoulli":
        raise InputError(
            "model.start pca gives pixels, not the logits of objective.likelihood bernoulli; use model.start random, "
            "or the likelihood gaussian or discretized"
        )
    code = model.linear_code()
    if code is None:
        raise InputError("model.start pca: this model has no PCA start; use model.start random")
    if code.components < 1:
        raise InputError("model.start pca needs hidden layers of at least 2 units")
    size = vector_size(model.image_shape, code.patch)
    if size > LARGEST_EXACT and min(code.values, size) > MOST:
        raise InputError(
            f"model.start pca: {code.values:,} components of {size:,} numbers take too long to compute, the limit is "
            f"{MOST:,}; use model.start random, a shorter code, or a code that is a grid"
        )


@torch.no_grad()
def baseline(
    model: Autoencoder,
    components: Components,
    val: Reader,
    runtime: Processes,
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """The squared error per pixel on [0, 1] of PCA, or of patch PCA, with as many code values as the model has.

    Args:
        components: of the training images, from ``of_model``.
        val: the images to measure the error on.

    Raises:
        StopRequested: ``stop`` answered yes.
    """
    code = model.linear_code()
    assert code is not None
    shape = val.split.images.shape[1:]
    device = val.device if devices.has_float64(val.device) else torch.device("cpu")
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    starts = range(0, len(val.split), max(1, CHUNK_VALUES // math.prod(shape)))
    mine = share(range(len(starts)), runtime.rank, runtime.world)
    rows = [torch.arange(at, min(at + starts.step, len(val.split))) for at in starts[mine.start : mine.stop]]
    batches = val.each(rows)
    for turn in range(-(-len(starts) // runtime.world)):
        if stop():
            raise StopRequested
        if turn < len(mine):
            images = next(batches)
            entries = (~images.isnan()).flatten(1).sum(1).to(device)
            squared = errors(components, code.patch, images).to(device).double() * entries
            if val.missing:
                squared = torch.where(entries > 0, squared, 0.0)
            sums += torch.stack([squared, entries.double()]).sum(1)
    total, count = runtime.sum(sums.to(runtime.device, runtime.exact)).tolist()
    return float(total / count)


def coded(components: Components, patch: Size | None, images: Tensor) -> tuple[Tensor, Tensor]:
    """Applies PCA, or PCA of patches, to images [B, C, H, W]: codes [B, values], reconstructions [B, C, H, W].

    Images are on [0, 1], or standardized if those of the components are; then the mean replaces NaN.
    """
    mean, basis = components.mean.to(images.device).float(), components.basis.to(images.device).float()
    images = images.float()
    inside = torch.where(images.isnan(), 0.0, images) if components.standardized else images.mul(2).sub(1)
    vectors = inside.flatten(1) if patch is None else patches(inside, patch)
    codes = (vectors - mean) @ basis.T
    decoded = unpatched(codes @ basis + mean, inside.shape, patch)
    return codes.view(len(images), -1), decoded if components.standardized else decoded.add(1).div(2)


def errors(components: Components, patch: Size | None, images: Tensor) -> Tensor:
    """The squared error of ``coded`` per pixel that is not missing: [B]."""
    squared = (coded(components, patch, images)[1] - images.float()).square().flatten(1)
    return squared.nanmean(1) if components.standardized else squared.mean(1)


def unpatched(vectors: Tensor, shape: torch.Size, patch: Size | None) -> Tensor:
    """Inverts ``patches`` for images of ``shape``: [B, C, H, W]."""
    if patch is None:
        return vectors.view(shape)
    batch, _, height, width = shape
    size = (-(-height // patch[0]) * patch[0], -(-width // patch[1]) * patch[1])
    columns = vectors.view(batch, -1, vectors.shape[1]).transpose(1, 2)
    return F.fold(columns, size, patch, stride=patch)[..., :height, :width]
