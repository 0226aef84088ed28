"""What an objective may count beside the likelihood: structure (MS-SSIM), and the features of a network (as LPIPS)."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ae.config import InputError, ObjectiveConfig
from dist_ae.terminal import first_line

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents, fine to coarse (Wang, Simoncelli & Bovik 2003, § 3.2)
WINDOW = 11  # pixels
UNCORRELATED = 1e-3  # least likeness of a scale: below it, a fractional power has no gradient, or an infinite one


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Multi-scale SSIM of pairs of images [B, C, H, W] on [0, 1], [B]: 1 if they are equal.

    As Wang, Simoncelli and Bovik (2003), at those of their five scales that leave both sides at least 11 pixels, with
    exponents that sum to one. A scale on which the two do not correlate counts as 0.001.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # half a second to import

    count = next(n for n in range(len(SCALES), 0, -1) if n == 1 or min(images.shape[-2:]) >> (n - 1) >= WINDOW)
    total = torch.ones_like(images[:, 0, 0, 0])
    for scale, exponent in enumerate(SCALES[:count]):
        both, contrast = structural_similarity_index_measure(
            reconstructions, images, data_range=1.0, reduction="none", return_contrast_sensitivity=True
        )
        value = both if scale == count - 1 else contrast  # brightness is compared only at the coarsest scale
        total = total * value.clamp(min=UNCORRELATED) ** (exponent / sum(SCALES[:count]))
        images, reconstructions = F.avg_pool2d(images, 2), F.avg_pool2d(reconstructions, 2)
    return total


def distance(network: nn.Module, images: Tensor, reconstructions: Tensor) -> Tensor:
    """The distance of the network's features of pairs of images [B, C, H, W] on [0, 1], [B].

    As LPIPS (Zhang et al. 2018, equation 1) with weights of one: in each layer, the squared difference of features of
    unit length, summed over channels and averaged over positions; then the sum over the layers.
    """
    count = len(images)
    both = torch.cat([images, reconstructions]).float().expand(-1, 3, -1, -1)
    layers = network(both)
    total = both.new_zeros(count)
    for layer in [layers] if isinstance(layers, Tensor) else layers:
        unit = F.normalize(layer.float(), dim=1, eps=1e-10)
        squared = (unit[:count] - unit[count:]).square().sum(1)
        total = total + (squared if squared.dim() == 1 else squared.flatten(1).mean(1))
    return total


class Likeness:
    """The weighted sum of both terms, in nats per image, as configured."""

    def __init__(self, config: ObjectiveConfig, device: torch.device) -> None:
        self._structure, self._weight = config.ms_ssim, config.perceptual_weight
        self._network = None if config.perceptual is None else load(config.perceptual).to(device)

    def __call__(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """The loss of images and reconstructions [B, C, H, W] on [0, 1], [B]."""
        if images.dtype != torch.float64:
            images, reconstructions = images.float(), reconstructions.float()
        total = images.new_zeros(len(images))
        if self._structure:
            total = total + self._structure * (1 - ms_ssim(images, reconstructions))
        if self._network is not None:
            total = total + self._weight * distance(self._network, images, reconstructions)
        return total


def is_used(config: ObjectiveConfig) -> bool:
    return bool(config.ms_ssim) or config.perceptual is not None


def sha256(path: Path) -> str:
    """The SHA-256 of a feature network's file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = f"{error.strerror}; expected a feature network as .pt2 or TorchScript"
        raise InputError(f"objective.perceptual {path}: {reason}") from None


def check(config: ObjectiveConfig, image_shape: tuple[int, ...], is_image: bool) -> None:
    """Refuses terms that images of this shape do not allow.

    Raises:
        InputError: the records are no images, they are too small or do not have one or three channels, or the file is
            no network for them.
    """
    if not is_used(config):
        return
    channels, *sides = image_shape
    if not is_image or (config.ms_ssim and min(sides) < WINDOW):
        what = f"sides of at least {WINDOW} pixels" if is_image else "pictures, and the records of this data are none"
        raise InputError(f"objective.ms_ssim and objective.perceptual need {what}; leave them out")
    if config.perceptual is None:
        return
    path = config.perceptual
    if channels not in (1, 3):
        raise InputError(
            f"objective.perceptual: a feature network takes 1 or 3 channels, and the images have {channels}"
        )
    pair = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    try:
        value = distance(load(path), pair[:1], pair[1:])
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        value, reason = None, first_line(error)
    if value is None or value.shape != (1,) or not value.isfinite().all():
        why = f" ({reason})" if value is None else ""
        raise InputError(
            f"objective.perceptual {path}: it gives no features of images [N, 3, {sides[0]}, {sides[1]}] on [0, 1]{why}"
            "; expected one tensor [N, F, h, w], or several"
        )


def load(path: Path, key: str = "objective.perceptual") -> nn.Module:
    """Loads a feature network from torch.export (.pt2) or TorchScript, on the CPU, without gradients of its weights.

    Raises:
        InputError: there is no such file, or it is no such program; the message begins with ``key``.
    """
    if not path.is_file():
        raise InputError(f"{key} {path}: no such file; expected a feature network as .pt2 or TorchScript")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, but published feature networks come this way
            network: nn.Module
            if path.suffix == ".pt2":
                network = torch.export.load(path).module()
            else:
                network = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise InputError(f"{key} {path}: not a program of torch ({first_line(error)})") from None
    for parameter in network.parameters():
        parameter.requires_grad = False
    return network
