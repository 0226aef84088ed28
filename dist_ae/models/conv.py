"""The convolutional autoencoder: a residual net beside a linear code of the image's patches.

Signals [C, 1, L] have one row, and then so have kernels, strides and patches: all of them run along the length.
"""

from __future__ import annotations

import copy
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


Size = tuple[int, int]  # height, width


class Convolution(nn.Module):
    """A convolution whose kernel is stored as a matrix [out, in · height · width], the form that Muon and PCA use."""

    def __init__(self, inputs: int, outputs: int, size: Size, stride: Size = (1, 1)) -> None:
        super().__init__()
        self.kernel, self.stride = (outputs, inputs, *size), stride
        self.padding = (size[0] - stride[0] + 1) // 2, (size[1] - stride[1] + 1) // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs * math.prod(size)))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight.view(self.kernel), self.bias, self.stride, self.padding)


class Block(nn.Module):
    """x + second(act(first(act(norm(x))))). ``second`` starts at zero, and a mask drops channels before it."""

    def __init__(self, width: int, size: Size, activation: Callable[[Tensor], Tensor], local: bool) -> None:
        super().__init__()
        self.width, self.activation = width, activation
        # Over the channels of a position, or over one image; never over the batch.
        self.norm = nn.LayerNorm(width) if local else nn.GroupNorm(1, width)
        self.first, self.second = Convolution(width, width, size), Convolution(width, width, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = normalized(x, self.norm)
        hidden = self.activation(self.first(self.activation(normed)))
        changed: Tensor = self.second(hidden if mask is None else hidden * mask)
        return x + changed


def normalized(x: Tensor, norm: nn.LayerNorm | nn.GroupNorm) -> Tensor:
    """Normalizes x [B, C, H, W] in its own memory order: CUDA's GroupNorm would copy it in every block."""
    normed: Tensor
    if isinstance(norm, nn.LayerNorm):
        normed = norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)
    if devices.keeps_channels_last(x.device):
        normed = norm(x)
        return normed
    variance, mean = torch.var_mean(x.float() if x.dtype != torch.float64 else x, (1, 2, 3), correction=0, keepdim=True)
    weight, bias = (parameter.view(1, -1, 1, 1) for parameter in (norm.weight, norm.bias))
    scale = torch.rsqrt(variance + norm.eps) * weight
    return torch.addcmul(bias - mean * scale, x.to(mean.dtype), scale)


class Down(nn.Module):
    """Halves height and width: a 2 × 2 patch convolution plus a shortcut without parameters (as in DC-AE)."""

    def __init__(self, inputs: int, outputs: int, step: Size) -> None:
        super().__init__()
        self.outputs, self.step, self.change = outputs, step, Convolution(inputs, outputs, step, step)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.change(x)
        return changed + match(to_depth(x, self.step), self.outputs)


class Up(nn.Module):
    """Doubles height and width: the transpose of ``Down``."""

    def __init__(self, inputs: int, outputs: int, step: Size) -> None:
        super().__init__()
        self.outputs, self.step = math.prod(step) * outputs, step
        self.change = Convolution(inputs, self.outputs, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return to_space(self.change(x) + match(x, self.outputs), self.step)


def to_depth(x: Tensor, step: Size) -> Tensor:
    """[B, C, H, W] → [B, C · h · w, H / h, W / w]: pixels of each h × w patch as channels, in the order of a kernel."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // step[0], step[0], width // step[1], step[1])
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)


def to_space(x: Tensor, step: Size) -> Tensor:
    """[B, C · h · w, H, W] → [B, C, H · h, W · w], the inverse of ``to_depth``.

    Like torch's pixel_shuffle, but in channels-last order on every device and with a gradient for an empty batch.
    """
    batch, channels, height, width = x.shape
    x = x.view(batch, channels // math.prod(step), *step, height, width)
    return x.permute(0, 4, 2, 5, 3, 1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def match(x: Tensor, channels: int) -> Tensor:
    """[B, C, H, W] → [B, channels, H, W] without parameters: means of groups of channels, or repeated channels."""
    batch, inputs, height, width = x.shape
    if inputs == channels:
        return x
    if inputs < channels:
        return x.repeat_interleave(-(-channels // inputs), 1)[:, :channels]
    group = -(-inputs // channels)
    padded = F.pad(x, (0, 0, 0, 0, 0, group * channels - inputs))
    return padded.view(batch, channels, group, height, width).mean(2)


Layer = nn.Linear | Convolution


class Conv(Autoencoder):
    """Residual blocks at each resolution, plus a linear path from patches to the code and back.

    The net's last layers start at zero, so the model starts as its linear path. A grid code has ``latent_dim`` channels
    for each patch of f × f pixels, f = 2 ** len(widths), or of f values of a signal. A vector code has ``latent_dim``
    numbers for the whole image. Images of any size are padded to a multiple of f by repeating the edge, and cropped
    back.
    """

    def __init__(self, config: Config, image_shape: Sequence[int]) -> None:
        model, widths, size = config.model, config.model.widths, config.model.latent_dim
        channels, height, width = image_shape
        self.vector = model.code == "vector"

        def size_of(side: int) -> Size:
            return (1 if height == 1 else side), side

        self.patch, self.step, kernel = size_of(2 ** len(widths)), size_of(2), size_of(3)
        grid = (-(-height // self.patch[0]), -(-width // self.patch[1]))
        super().__init__(
            image_shape,
            (size,) if self.vector else (size, *grid),
            variational=model.variational,
            bernoulli=config.objective.likelihood == "bernoulli",
            learned_sigma=config.objective.sigma == "learned",
        )
        act, local = ACTIVATIONS[model.activation], model.norm == "position"
        self.activation = act
        predicted = size * (2 if model.variational else 1)
        # Blocks begin at half the resolution; at full resolution they would cost four times as much.
        down: list[nn.Module] = [Convolution(channels, widths[0], size_of(4), self.step)]
        up: list[nn.Module] = []
        for level, breadth in enumerate(widths):
            if level:
                down.append(Down(widths[level - 1], breadth, self.step))
                up.insert(0, Up(breadth, widths[level - 1], self.step))
            down += [Block(breadth, kernel, act, local) for _ in range(model.blocks)]
            up = [*(Block(breadth, kernel, act, local) for _ in range(model.blocks)), *up]
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
            self.to_code, self.from_code = (
                Convolution(widths[-1], predicted, kernel),
                Convolution(size, widths[-1], kernel),
            )
            self.project = Convolution(channels, predicted, self.patch, self.patch)
            self.expand = Convolution(size, channels * math.prod(self.patch), (1, 1))
        self.decoder = nn.ModuleList(up)
        self.to_pixels = Convolution(widths[0], math.prod(self.step) * channels, kernel)
        self.grid = (widths[-1], *grid)
        blocks = {name: layer for name, layer in self.named_modules() if isinstance(layer, Block)}
        self.zeros = ("to_code", "to_pixels", *(f"{name}.second" for name in blocks))
        self.mask_shapes = tuple((block.width, 1, 1) for block in blocks.values())
        self.encoder_masks = len(blocks) // 2

    def at(self, height: int, width: int) -> Conv | None:
        if self.vector:
            return None
        other = copy.copy(self)  # shares all tensors
        other.image_shape = (self.image_shape[0], height, width)
        other.code_shape = (self.code_shape[0], -(-height // self.patch[0]), -(-width // self.patch[1]))
        return other

    def reach(self) -> int | None:
        if self.vector or any(isinstance(layer, nn.GroupNorm) for layer in self.modules()):
            return None
        pixels = 0
        for layers in (self.encoder, self.decoder):
            scale = 2 if layers is self.encoder else self.patch[1]
            for layer in layers:
                if isinstance(layer, Down | Up):
                    scale = 2 * scale if isinstance(layer, Down) else scale // 2
                elif isinstance(layer, Block):
                    pixels += 2 * scale  # two kernels of 3 × 3
        # The first kernel of 4 × 4, the last of 3 × 3, and those around the code; rounded up to whole patches.
        pixels += 2 + 2 + 2 * self.patch[1]
        return (-(-pixels // self.patch[1]) + 1) * self.patch[1]

    def encode_raw(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        padded = pad_to_multiple(images, self.patch).contiguous(memory_format=torch.channels_last)
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
            linear = to_space(linear, self.patch)[..., :height, :width]
        net: Tensor = self.to_pixels(self.activation(self._run(self.decoder, hidden, masks)))
        return linear + to_space(net, self.step)[..., :height, :width]

    @staticmethod
    def _run(layers: nn.ModuleList, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        remaining = iter(masks)
        for layer in layers:
            x = layer(x, next(remaining, None)) if isinstance(layer, Block) else layer(x)
        return x

    def linear_code(self) -> LinearCode:
        """PCA of the patches for a grid code, of the whole image for a vector code."""
        size, channels = self.code_shape[0], self.image_shape[0]
        most = math.prod(self.image_shape) if self.vector else channels * math.prod(self.patch)
        return LinearCode(min(size, most), None if self.vector else self.patch, size)

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
