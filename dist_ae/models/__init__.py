"""The autoencoder: pure torch, deterministic given its draws. Four systems are settings of one module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_ae.config import Config
from dist_ae.draws import Draws, keyed_seed

# exp(logvar) and exp(-logvar) stay finite and normal in half precision (largest 65,504, smallest normal 6.1e-5).
LOGVAR_RANGE = (-9.0, 11.0)


class Output(NamedTuple):
    """What a forward pass gives for B images. ``None`` means that this model has no such thing."""

    raw: Tensor  # [B, C, H, W], what the last layer gives: logits of a Bernoulli model, pixels on [-1, 1] of a Gaussian one
    mean: Tensor  # [B, latent_dim], the code
    logvar: Tensor | None  # [B, latent_dim], of a variational model
    log_sigma: Tensor | None  # [], of a Gaussian model that learns its σ
    bernoulli: bool

    @property
    def reconstruction(self) -> Tensor:
        """[B, C, H, W] on [0, 1]; a Gaussian model may leave that range."""
        return pixels(self.raw, self.bernoulli)


def pixels(raw: Tensor, bernoulli: bool) -> Tensor:
    """The last layer's output as pixels on [0, 1]."""
    return torch.sigmoid(raw) if bernoulli else (raw + 1) / 2


def centred(images: Tensor) -> Tensor:
    """Images on [0, 1] → on [-1, 1], where the model works."""
    return images.mul(2).sub_(1)


class Autoencoder(nn.Module):
    """Encoder D → hidden → L (twice L if variational), decoder L → hidden reversed → D, nothing after the last layers."""

    def __init__(self, config: Config, image_shape: Sequence[int]) -> None:
        """Builds the layers without weights (on torch's meta device); ``initialize`` fills them, from a generator of its own."""
        super().__init__()
        model = config.model
        self.image_shape = tuple(image_shape)
        self.variational = model.variational
        self.bernoulli = config.objective.likelihood == "bernoulli"
        activations: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
        self.activation = activations[model.activation]
        num_pixels = math.prod(image_shape)
        down = (num_pixels, *model.hidden_dims)
        with torch.device("meta"):
            self.encoder = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(down))
            self.to_code = nn.Linear(down[-1], model.latent_dim * (2 if model.variational else 1))
            up = (model.latent_dim, *reversed(model.hidden_dims))
            self.decoder = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(up))
            self.to_pixels = nn.Linear(up[-1], num_pixels)
            learned = config.objective.sigma == "learned"
            self.log_sigma = nn.Parameter(torch.empty(())) if learned else None

    def encode(self, images: Tensor, masks: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None]:
        """images [B, C, H, W] on [0, 1] → mean and log-variance of the code, each [B, latent_dim]; no log-variance unless variational.

        Raises:
            ValueError: images of another shape than the model's.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"expected images of shape [B, {', '.join(map(str, self.image_shape))}], got {list(images.shape)}"
            )
        hidden = self._hidden(centred(images.flatten(1)), self.encoder, masks[: len(self.encoder)])
        code = self.to_code(hidden)
        if not self.variational:
            return code, None
        mean, logvar = code.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode_raw(self, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """code [B, latent_dim] → the last layer's output [B, C, H, W]: logits of a Bernoulli model, pixels on [-1, 1] of a Gaussian one."""
        raw: Tensor = self.to_pixels(self._hidden(code, self.decoder, masks))
        return raw.view(-1, *self.image_shape)

    def decode(self, code: Tensor) -> Tensor:
        """code [B, latent_dim] → reconstruction [B, C, H, W] on [0, 1]."""
        return pixels(self.decode_raw(code), self.bernoulli)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Output:
        """Reconstructs images [B, C, H, W] on [0, 1]; a pure function of its arguments. ``draws=None`` is the deterministic model (mean code)."""
        draws = draws or Draws()
        corrupted = images if draws.noise is None else images + draws.noise
        mean, logvar = self.encode(corrupted, draws.masks)
        code = mean
        if logvar is not None and draws.epsilon is not None:
            code = (
                mean + torch.exp(0.5 * logvar) * draws.epsilon
            )  # z = μ + σ·ε ~ N(μ, σ²) (Kingma & Welling 2014, eq. 10)
        raw = self.decode_raw(code, draws.masks[len(self.encoder) :])
        return Output(raw, mean, logvar, self.log_sigma, self.bernoulli)

    def _hidden(self, hidden: Tensor, layers: nn.ModuleList, masks: Sequence[Tensor]) -> Tensor:
        for index, layer in enumerate(layers):
            hidden = self.activation(layer(hidden))
            if masks:
                hidden = hidden * masks[index]
        return hidden


@torch.no_grad()
def initialize(model: Autoencoder, seed: int) -> Autoencoder:
    """Fills the weights as ``nn.Linear`` does (uniform in ±1/√fan_in), keyed by seed and name: no global generator, any device gets the same."""
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            parameter.fill_(math.log(0.25))  # log σ: about the error of the mean image
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, nn.Linear)
        bound = layer.in_features**-0.5
        generator = torch.Generator().manual_seed(keyed_seed(seed, "weights", name))
        parameter.uniform_(-bound, bound, generator=generator)
    return model
