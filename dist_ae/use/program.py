"""A trained model as a module with tensors in and out, and as a program that needs torch but not this package."""

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
    ``encoder``: images → codes. ``decoder``: codes → images. Records that are no images have their own shape and
    units at input and output.

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
        self.patch = patch if fits and min(patch) > 1 else None  # None: only the model's own size

    def forward(self, inputs: Tensor) -> Any:
        model = self.model
        if self.patch is not None:
            down, across = (1, 1) if self.part != "decoder" else self.patch
            model = model.at(inputs.shape[2] * down, inputs.shape[3] * across) or model
        if self.part == "decoder":
            return model.outside(model.decode(inputs))
        images = model.to_units(inputs if model.record_shape is None else inputs.reshape(-1, *model.image_shape))
        if self.part == "encoder":
            return model.encode(images)[0]
        output = model(images, None)
        return model.outside(output.reconstruction), output.mean

    @property
    def names(self) -> tuple[str, list[str]]:
        """The names of the input and of the outputs."""
        is_image = self.model.record_shape is None
        records, decoded = ("pictures", "images") if is_image else ("records", "reconstructions")
        outputs = {"whole": [decoded, "code"], "encoder": ["code"], "decoder": [decoded]}
        return "code" if self.part == "decoder" else records, outputs[self.part]

    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """The input axes of any length, for ``torch.export``."""
        axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
        if self.patch is not None:
            steps = self.patch if self.part != "decoder" else (1, 1)
            for axis, (name, step) in enumerate(zip(("height", "width"), steps, strict=True), 2):
                axes[axis] = step * torch.export.Dim(name, min=2)
        return (axes,)

    def example(self, count: int, generator: torch.Generator | None = None, extra: int = 0) -> Tensor:
        """A possible input, [count, …]: noise on the scale of the training data.

        Args:
            extra: patches by which pictures exceed the model's size, if that is possible.
        """
        model = self.model
        if self.patch is not None and extra:
            height, width = model.image_shape[1:]
            model = model.at(height + extra * self.patch[0], width + 2 * extra * self.patch[1]) or model
        if self.part == "decoder":
            return torch.rand(count, *model.code_shape, generator=generator)
        images = torch.rand(count, *model.image_shape, generator=generator)
        return model.outside(images.to(next(model.parameters()).device)).cpu()


def program(model: Autoencoder, part: Part = "whole") -> torch.export.ExportedProgram:
    """``Exported`` as a program for any number of images. It needs torch but not this package."""
    module = Exported(model, part).eval()
    example = module.example(2).to(next(model.parameters()).device)
    exported = torch.export.export(module, (example,), dynamic_shapes=module.dynamic_shapes())
    exported.example_inputs = None  # torch.export.save would pickle them
    return exported


def torch_bytes(model: Autoencoder, part: Part = "whole") -> bytes:
    """A .pt2 for ``torch.export.load``."""
    file = io.BytesIO()
    torch.export.save(program(model, part), file)
    return file.getvalue()


def onnx_bytes(model: Autoencoder, part: Part = "whole") -> bytes:
    """An ONNX model for any number of images. Its results in onnxruntime are compared with torch's.

    Raises:
        InputError: the packages are missing.
        Fault: onnxruntime's results differ by more than ``ONNX_TOLERANCE``.
    """
    # From 1.29 on, importing onnxruntime starts a thread that reports each session to Microsoft and reads the
    # environment without a lock: a run in the same process that sets a variable could die of a segmentation fault.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which torch.onnx needs
    except ImportError as error:
        raise InputError(f"--format onnx needs {error.name}: {install('onnx')}") from None
    module = Exported(copy.deepcopy(model), part).cpu().eval()  # a copy: the caller's model stays on its device
    input_name, output_names = module.names
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        example = module.example(3, generator)
        torch.onnx.export(
            module,
            (example,),
            path,
            input_names=[input_name],
            output_names=output_names,
            dynamic_shapes=module.dynamic_shapes(),
            external_data=False,
            verbose=False,
        )
        content = path.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count, extra in ((1, 0), (5, 1)):  # neither is the traced number of images, and one has another size
        images = module.example(count, generator, extra)
        with torch.no_grad():
            expected = module(images)
        actual = session.run(None, {input_name: images.numpy()})
        for name, ours, theirs in zip(output_names, expected if part == "whole" else [expected], actual, strict=True):
            scale = 1.0 if name == "images" else max(1.0, float(ours.abs().max()))  # images are on [0, 1]
            if (worst := float(np.abs(ours.numpy() - theirs).max())) > ONNX_TOLERANCE * scale:
                raise Fault(f"onnxruntime's {name} differ from torch's by {worst:.2g}; nothing was written")
    return content
