"""The convolutional autoencoder: a residual net beside a linear code of the image's patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ae import devices
from dist_ae.models.interface import ACTIVATIONS, Autoencoder, Components, LinearCode, pad_to_multiple
from dist_ae.models.starts import leading, probabilistic, whitened

if TYPE_CHECKING:
    from dist_ae.config import Config, ObjectiveConfig


class Convolution(nn.Module):
    """A convolution whose kernel is kept as a matrix [out, in · side · side], as Muon takes it and PCA gives it."""

    def __init__(self, inputs: int, outputs: int, side: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = (outputs, inputs, side, side), stride, (side - stride + 1) // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs * side * side))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight.view(self.kernel), self.bias, self.stride, self.padding)


class Block(nn.Module):
    """x + second(act(first(act(norm(x))))). ``second`` starts at zero, and a mask drops channels before it."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.width, self.activation = width, activation
        self.norm = nn.GroupNorm(1, width)  # over one image, never over the batch
        self.first, self.second = Convolution(width, width), Convolution(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x) if devices.keeps_channels_last(x.device) else normalized(x, self.norm)
        hidden = self.activation(self.first(self.activation(normed)))
        changed: Tensor = self.second(hidden if mask is None else hidden * mask)
        return x + changed


def normalized(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """What a GroupNorm of one group gives, in the order of x's memory: CUDA's own would copy it in every block."""
    variance, mean = torch.var_mean(x.float() if x.dtype != torch.float64 else x, (1, 2, 3), correction=0, keepdim=True)
    weight, bias = (parameter.view(1, -1, 1, 1) for parameter in (norm.weight, norm.bias))
    scale = torch.rsqrt(variance + norm.eps) * weight
    return torch.addcmul(bias - mean * scale, x.to(mean.dtype), scale)


class Down(nn.Module):
    """Half the height and width: a 2 × 2 patch convolution beside a shortcut without parameters (as in DC-AE)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs, self.change = outputs, Convolution(inputs, outputs, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.change(x)
        return changed + match(to_depth(x), self.outputs)


class Up(nn.Module):
    """Twice the height and width: the transpose of ``Down``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs, self.change = outputs, Convolution(inputs, 4 * outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return to_space(self.change(x) + match(x, 4 * self.outputs), 2)


def to_depth(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, C · 4, H / 2, W / 2]: the pixels of each 2 × 2 patch as channels, in the order of a kernel."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)


def to_space(x: Tensor, side: int) -> Tensor:
    """[B, C · side², H, W] → [B, C, H · side, W · side], the inverse of ``to_depth``.

    It is torch's pixel_shuffle, but in channels-last order on every device and with a gradient for an empty batch.
    """
    batch, channels, height, width = x.shape
    x = x.view(batch, channels // side**2, side, side, height, width)
    return x.permute(0, 4, 2, 5, 3, 1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def match(x: Tensor, channels: int) -> Tensor:
    """[B, C, H, W] → [B, channels, H, W] without parameters: means of groups of channels, or repeated channels."""
    batch, have, height, width = x.shape
    if have == channels:
        return x
    if have < channels:
        return x.repeat_interleave(-(-channels // have), 1)[:, :channels]
    group = -(-have // channels)
    padded = F.pad(x, (0, 0, 0, 0, 0, group * channels - have))
    return padded.view(batch, channels, group, height, width).mean(2)


Layer = nn.Linear | Convolution


class Conv(Autoencoder):
    """Residual blocks at each resolution, and beside them a linear path from patches to the code and back.

    The net's last layers start at zero, so the model starts as its linear path. A grid code has ``latent_dim`` channels
    for each patch of f × f pixels, f = 2 ** len(widths). A vector code has ``latent_dim`` numbers for the whole image.
    Images of any size are padded to a multiple of f by repeating the edge, and cropped back.
    """

    def __init__(self, config: Config, image_shape: Sequence[int]) -> None:
        model, widths, size = config.model, config.model.widths, config.model.latent_dim
        channels, height, width = image_shape
        self.factor, self.vector = 2 ** len(widths), model.code == "vector"
        grid = (-(-height // self.factor), -(-width // self.factor))
        super().__init__(
            image_shape,
            (size,) if self.vector else (size, *grid),
            variational=model.variational,
            bernoulli=config.objective.likelihood == "bernoulli",
            learned_sigma=config.objective.sigma == "learned",
        )
        act = self.activation = ACTIVATIONS[model.activation]
        predicted = size * (2 if model.variational else 1)
        # Blocks begin at half the resolution; at full resolution they would cost four times as much.
        down: list[nn.Module] = [Convolution(channels, widths[0], 4, 2)]
        up: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                down.append(Down(widths[level - 1], width))
                up.insert(0, Up(width, widths[level - 1]))
            down += [Block(width, act) for _ in range(model.blocks)]
            up = [*(Block(width, act) for _ in range(model.blocks)), *up]
        self.encoder = nn.ModuleList(down)
        self.to_code: Layer
        self.from_code: Layer
        self.project: Layer
        self.expand: Layer
        if self.vector:
            cells, pixels = widths[-1] * math.prod(grid), math.prod(image_shape)
            self.to_code, self.from_code = nn.Linear(cells, predicted), nn.Linear(size, cells)
            self.project, self.expand = nn.Linear(pixels, predicted), nn.Linear(size, pixels)
        else:
            self.to_code, self.from_code = Convolution(widths[-1], predicted), Convolution(size, widths[-1])
            self.project = Convolution(channels, predicted, self.factor, self.factor)
            self.expand = Convolution(size, channels * self.factor**2, 1)
        self.decoder = nn.ModuleList(up)
        self.to_pixels = Convolution(widths[0], 4 * channels)
        self.grid = (widths[-1], *grid)
        blocks = {name: layer for name, layer in self.named_modules() if isinstance(layer, Block)}
        self.zeros = ("to_code", "to_pixels", *(f"{name}.second" for name in blocks))
        self.mask_shapes = tuple((block.width, 1, 1) for block in blocks.values())
        self.encoder_masks = len(blocks) // 2

    def encode_raw(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        padded = pad_to_multiple(images, self.factor).contiguous(memory_format=torch.channels_last)
        hidden = self.activation(self._run(self.encoder, padded, masks))
        if self.vector:
            hidden, padded = hidden.flatten(1), images.flatten(1)
        net: Tensor = self.to_code(hidden)
        linear: Tensor = self.project(padded)
        return net + linear

    def decode_raw(self, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        _, height, width = self.image_shape
        hidden: Tensor = self.from_code(code)
        linear: Tensor = self.expand(code)
        if self.vector:
            hidden = hidden.view(-1, *self.grid).contiguous(memory_format=torch.channels_last)
            linear = linear.view(-1, *self.image_shape)
        else:
            linear = to_space(linear, self.factor)[..., :height, :width]
        net: Tensor = self.to_pixels(self.activation(self._run(self.decoder, hidden, masks)))
        return linear + to_space(net, 2)[..., :height, :width]

    @staticmethod
    def _run(layers: nn.ModuleList, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        left = iter(masks)
        for layer in layers:
            x = layer(x, next(left, None)) if isinstance(layer, Block) else layer(x)
        return x

    def linear_code(self) -> LinearCode:
        """PCA of the patches for a grid code, of the whole image for a vector code."""
        size, channels = self.code_shape[0], self.image_shape[0]
        most = math.prod(self.image_shape) if self.vector else channels * self.factor**2
        return LinearCode(min(size, most), None if self.vector else self.factor, size)

    @torch.no_grad()
    def start_from(self, components: Components, objective: ObjectiveConfig) -> None:
        """Sets the linear path so that the model is PCA with a code of variance one (of a VAE: probabilistic PCA)."""
        components = leading(components, self.linear_code().components)
        into, out = whitened(components)
        logvar = torch.zeros(len(into))
        if self.variational:
            into, out, logvar, log_sigma = probabilistic(components, objective)
            if self.log_sigma is not None:
                self.log_sigma.fill_(log_sigma)
        size, k = self.code_shape[0], len(into)
        for layer in (self.project, self.expand, self.to_code, self.to_pixels):
            layer.weight.zero_()
            layer.bias.zero_()
        self.project.weight[:k] = into.to(self.project.weight)
        self.project.bias[:k] = (-into @ components.mean).to(self.project.bias)
        self.expand.weight[:, :k] = out.to(self.expand.weight)
        self.expand.bias.copy_(components.mean)
        if self.variational:
            self.project.bias[size : size + k] = logvar.to(self.project.bias)
