"""A trained model as a module of tensors alone, and as one program that needs torch and nothing from this package."""

from __future__ import annotations

import copy
import io
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dist_ae.config import Fault, InputError
from dist_ae.errors import install
from dist_ae.models import Autoencoder
from dist_ae.models.conv import Conv

Part = Literal["whole", "encoder", "decoder"]
ONNX_TOLERANCE = 1e-4  # largest difference between torch and onnxruntime, on [0, 1] pixels or in codes of about one


class Exported(nn.Module):
    """The deterministic model, or one half of it, with tensors in and out.

    ``whole``: images [N, C, H, W] on [0, 1] → reconstructions, clamped to [0, 1], and (mean) codes [N, *code_shape].
    ``encoder``: images → codes. ``decoder``: codes → images. Records that are no images go in and come out in their own
    shape and units.

    A convolution that normalizes positions takes pictures of any size whose sides are multiples of its patches', at
    least two of them.
    """

    def __init__(self, model: Autoencoder, part: Part) -> None:
        super().__init__()
        self.model, self.part = model, part
        patch = model.patch if isinstance(model, Conv) and model.reach() is not None else (1, 1)
        fits = all(
            side % step == 0 and side >= 2 * step for side, step in zip(model.image_shape[1:], patch, strict=True)
        )
        self.patch = patch if fits and min(patch) > 1 else None  # None: of the model's own size alone

    def forward(self, given: Tensor) -> Any:
        model = self.model
        if self.patch is not None:
            down, across = (1, 1) if self.part != "decoder" else self.patch
            model = model.at(given.shape[2] * down, given.shape[3] * across) or model
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

    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """Which axes of what goes in have any length, as ``torch.export`` takes it."""
        axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if self.patch is not None:
            steps = self.patch if self.part != "decoder" else (1, 1)
            for axis, (name, step) in enumerate(zip(("height", "width"), steps, strict=True), 2):
                axes[axis] = step * torch.export.Dim(name, min=2)
        return (axes,)

    def example(self, count: int, generator: torch.Generator | None = None, more: int = 0) -> Tensor:
        """What could go in, [count, …]: noise on the scale of the training data.

        Args:
            more: patches that pictures are larger than the model's own, where that is possible.
        """
        model = self.model
        if self.patch is not None and more:
            height, width = model.image_shape[1:]
            model = model.at(height + more * self.patch[0], width + 2 * more * self.patch[1]) or model
        if self.part == "decoder":
            return torch.rand(count, *model.code_shape, generator=generator)
        images = torch.rand(count, *model.image_shape, generator=generator)
        return model.outside(images.to(next(model.parameters()).device)).cpu()


def program(model: Autoencoder, part: Part = "whole") -> torch.export.ExportedProgram:
    """``Exported`` as one program for any number of images. It needs torch and nothing from this package."""
    module = Exported(model, part).eval()
    example = module.example(2).to(next(model.parameters()).device)
    found = torch.export.export(module, (example,), dynamic_shapes=module.dynamic_shapes())
    found.example_inputs = None  # torch.export.save would pickle them
    return found


def torch_bytes(model: Autoencoder, part: Part = "whole") -> bytes:
    """A .pt2 for ``torch.export.load``."""
    file = io.BytesIO()
    torch.export.save(program(model, part), file)
    return file.getvalue()


def onnx_bytes(model: Autoencoder, part: Part = "whole") -> bytes:
    """An ONNX model for any number of images, whose results in onnxruntime were compared with torch's.

    Raises:
        InputError: the packages are missing.
        Fault: onnxruntime's results differ by more than ``ONNX_TOLERANCE``.
    """
    # From 1.29 on, importing it starts a thread that tells Microsoft of each session, and that reads the environment
    # without a lock: a run that began in the same process, and set a variable, could die of a segmentation fault.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx translates with
    except ImportError as error:
        raise InputError(f"--format onnx needs {error.name}: {install('onnx')}") from None
    module = Exported(copy.deepcopy(model), part).cpu().eval()  # the caller's stays where it is
    given, results = module.names
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        example = module.example(3, generator)
        torch.onnx.export(
            module,
            (example,),
            path,
            input_names=[given],
            output_names=results,
            dynamic_shapes=module.dynamic_shapes(),
            external_data=False,
            verbose=False,
        )
        content = path.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count, more in ((1, 0), (5, 1)):  # neither is the number it was traced with, and one is of another size
        images = module.example(count, generator, more)
        with torch.no_grad():
            wanted = module(images)
        found = session.run(None, {given: images.numpy()})
        for name, ours, theirs in zip(results, wanted if part == "whole" else [wanted], found, strict=True):
            scale = 1.0 if name == "images" else max(1.0, float(ours.abs().max()))  # of [0, 1], else of what comes out
            if (worst := float(np.abs(ours.numpy() - theirs).max())) > ONNX_TOLERANCE * scale:
                raise Fault(f"onnxruntime's {name} differ from torch's by {worst:.2g}; nothing was written")
    return content
