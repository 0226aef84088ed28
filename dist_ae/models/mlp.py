"""The multilayer perceptron: encoder D → hidden → code, decoder mirrored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_ae.models.interface import ACTIVATIONS, Autoencoder, Components, LinearCode
from dist_ae.models.starts import leading, probabilistic

if TYPE_CHECKING:
    from dist_ae.config import Config, ObjectiveConfig


class MLP(Autoencoder):
    """Encoder D → hidden → L (2 L if variational), mirrored as decoder; nothing follows the last layers."""

    def __init__(self, config: Config, image_shape: Sequence[int]) -> None:
        model, objective = config.model, config.objective
        super().__init__(
            image_shape,
            (model.latent_dim,),
            variational=model.variational,
            bernoulli=objective.likelihood == "bernoulli",
            learned_sigma=objective.sigma == "learned",
        )
        self.activation = ACTIVATIONS[model.activation]
        down = (math.prod(image_shape), *model.hidden_dims)
        up = (model.latent_dim, *reversed(model.hidden_dims))
        self.encoder = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(down))
        self.to_code = nn.Linear(down[-1], model.latent_dim * (2 if model.variational else 1))
        self.decoder = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(up))
        self.to_pixels = nn.Linear(up[-1], math.prod(image_shape))
        self.encoder_masks = len(self.encoder)
        self.mask_shapes = tuple((width,) for width in (*model.hidden_dims, *reversed(model.hidden_dims)))

    def encode_raw(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        code: Tensor = self.to_code(self._hidden(images.flatten(1), self.encoder, masks))
        return code

    def decode_raw(self, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        raw: Tensor = self.to_pixels(self._hidden(code, self.decoder, masks))
        return raw.view(-1, *self.image_shape)

    def _hidden(self, hidden: Tensor, layers: nn.ModuleList, masks: Sequence[Tensor]) -> Tensor:
        for index, layer in enumerate(layers):
            hidden = self.activation(layer(hidden))
            if masks:
                hidden = hidden * masks[index]
        return hidden

    def linear_code(self) -> LinearCode:
        """As many components as fit into the code, the pixels and half of the narrowest hidden layer."""
        size = self.code_shape[0]
        widths = [layer.out_features // 2 for layer in self.encoder if isinstance(layer, nn.Linear)]
        return LinearCode(min(size, math.prod(self.image_shape), *widths), None, size)

    @torch.no_grad()
    def start_from(self, components: Components, objective: ObjectiveConfig) -> None:
        """Sets the weights so that the model is PCA (of a VAE: probabilistic PCA, Tipping & Bishop 1999).

        act(a) - act(-a) = a for relu, gelu and silu alike, so two hidden units carry one component through a layer
        unchanged. The other units keep their random incoming weights and start without influence.
        """
        components = leading(components, self.linear_code().components)
        k, mean, basis = len(components.variances), components.mean, components.basis
        into, out, logvar = basis, basis.T, None
        if self.variational:
            into, out, logvar, log_sigma = probabilistic(components, objective)
            if self.log_sigma is not None:
                self.log_sigma.fill_(log_sigma)
        layers = [*self.encoder, self.to_code, *self.decoder, self.to_pixels]
        for index, layer in enumerate(layers):
            assert isinstance(layer, nn.Linear)
            first, last, is_code = index == 0, layer is self.to_pixels, layer is self.to_code
            # A value a comes in as itself (from pixels or the code) or as a pair (a, -a) of hidden units. It goes out
            # in one of the same two forms.
            matrix = torch.eye(k, dtype=torch.float64)
            bias = torch.zeros(k, dtype=torch.float64)
            if first:
                matrix, bias = into, -into @ mean
            if last:
                matrix, bias = matrix @ out.T if first else out, mean
            if not first and layers[index - 1] is not self.to_code:
                matrix = torch.cat([matrix, -matrix], 1)
            if not (is_code or last):
                matrix, bias = torch.cat([matrix, -matrix]), torch.cat([bias, -bias])
            rows, columns = matrix.shape
            if is_code:
                layer.weight.zero_()
                layer.bias.zero_()
            layer.weight[:rows] = 0  # units outside the carried pairs start without influence on them
            layer.weight[:rows, :columns] = matrix.to(layer.weight)
            layer.bias[:rows] = bias.to(layer.bias)
            if is_code and logvar is not None:
                layer.bias[self.code_shape[0] : self.code_shape[0] + k] = logvar.to(layer.bias)
