"""A trained model as a module of tensors alone, and as one program that needs torch and nothing from this package."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_ae.models import Autoencoder

Part = Literal["whole", "encoder", "decoder"]


class Exported(nn.Module):
    """The deterministic model, or one half of it, with tensors in and out.

    ``whole``: images [N, C, H, W] on [0, 1] → reconstructions, clamped to [0, 1], and (mean) codes [N, *code_shape].
    ``encoder``: images → codes. ``decoder``: codes → images. Records that are no images go in and come out in their own
    shape and units.
    """

    def __init__(self, model: Autoencoder, part: Part) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, given: Tensor) -> Any:
        model = self.model
        if self.part == "decoder":
            return model.outside(model.decode(given))
        images = model.to_units(given if model.record_shape is None else given.reshape(-1, *model.image_shape))
        if self.part == "encoder":
            return model.encode(images)[0]
        output = model(images, None)
        return model.outside(output.reconstruction), output.mean

    @property
    def names(self) -> tuple[str, list[str]]:
        """The names of what goes in and of what comes out."""
        one = "images" if self.model.record_shape is None else "reconstructions"
        given = "pictures" if self.model.record_shape is None else "records"
        outputs = {"whole": [one, "code"], "encoder": ["code"], "decoder": [one]}
        return "code" if self.part == "decoder" else given, outputs[self.part]

    def example(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """What could go in, [count, …]: noise on the scale of the training data."""
        model = self.model
        if self.part == "decoder":
            return torch.rand(count, *model.code_shape, generator=generator)
        images = torch.rand(count, *model.image_shape, generator=generator)
        return model.outside(images.to(next(model.parameters()).device)).cpu()


def program(model: Autoencoder, part: Part = "whole") -> torch.export.ExportedProgram:
    """``Exported`` as one program for any number of images. It needs torch and nothing from this package."""
    module = Exported(model, part).eval()
    example = module.example(2).to(next(model.parameters()).device)
    found = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    found.example_inputs = None  # torch.export.save would pickle them
    return found
