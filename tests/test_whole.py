"""Models on pictures of any size: piece by piece, without a seam."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_images

import dist_ae
from dist_ae import PRESETS
from dist_ae.config import DataConfig, InputError
from dist_ae.data import deep
from dist_ae.data.form import decode
from dist_ae.data.pictures import form_of
from dist_ae.models import Autoencoder, build
from dist_ae.use import commands, whole

RANDOM = np.random.default_rng(0)


def model_of(preset: str, shape: tuple[int, int, int], **settings_: Any) -> Autoencoder:
    """A model whose net changes every pixel: a new one is only its linear path."""
    config = PRESETS[preset].override({"model.start": "random", **settings_})
    model = build(config, shape).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / parameter.shape[1] ** 0.5)
    return model


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.sampled_from([(6,), (4, 6), (3, 4, 5)]),
    blocks=st.integers(1, 2),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
)
def test_a_picture_in_pieces_is_the_whole_picture_for_a_net_that_normalizes_positions(
    widths: tuple[int, ...], blocks: int, size: tuple[int, int], dtype: Any
) -> None:
    settings_ = {"model.widths": widths, "model.blocks": blocks, "model.norm": "position", "model.latent_dim": 3}
    model = model_of("conv", (3, 16, 16), **settings_)
    picture = RANDOM.random((3, *size), np.float32)
    if dtype != np.float32:
        picture = (picture * np.iinfo(dtype).max).astype(dtype)
    found = {}
    for core in (32, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(whole, "CORE", core)
            found[core] = whole.reconstructed(model, picture)
    assert found[32].dtype == dtype and found[32].shape == picture.shape
    step = 1e-6 if dtype == np.float32 else 1
    assert np.abs(found[32].astype(np.float64) - found[4096]).max() <= step


def test_what_a_net_sees_around_a_pixel_is_what_it_says_and_hardly_more() -> None:
    # The gradient of one pixel's reconstruction reaches the pixels that it depends on.
    for widths, blocks in (((6,), 1), ((4, 6), 1), ((4, 6), 2), ((3, 4, 5), 1)):
        model = model_of(
            "conv", (1, 16, 16), **{"model.widths": widths, "model.blocks": blocks, "model.norm": "position"}
        )
        reach, side = model.reach(), 512
        assert reach is not None
        sized = model.at(side, side)
        assert sized is not None
        image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0), requires_grad=True)
        sized(image, None).reconstruction[0, 0, side // 2, side // 2].backward()
        assert image.grad is not None
        rows = image.grad[0, 0].abs().sum(1).nonzero()[:, 0]
        furthest = max(side // 2 - int(rows.min()), int(rows.max()) - side // 2)
        assert furthest <= reach <= furthest + 3 * 2 ** len(widths)


class Same:
    """The output of a model that gives back what it gets."""

    def __init__(self, images: torch.Tensor) -> None:
        self.reconstruction = images


@pytest.mark.parametrize("preset", ["ae", "conv", "conv-vector"])
def test_windows_of_any_other_model_fade_into_each_other_and_leave_no_seam(preset: str) -> None:
    shape = (3, 12, 10)
    more: dict[str, Any] = {"conv": {"model.norm": "image"}, "conv-vector": {"model.code": "vector"}}.get(preset, {})
    model = model_of(preset.removesuffix("-vector"), shape, **more)
    assert model.reach() is None
    # Weights that add up to 1 take no value out of the range of the windows, which are all alike here.
    found = whole.reconstructed(model, np.full((3, 40, 33), 0.4, np.float32))
    window = model(torch.full((1, *shape), 0.4), None).reconstruction.clamp(0, 1)[0].numpy()
    assert (found.min((1, 2)) >= window.min((1, 2)) - 1e-5).all()
    assert (found.max((1, 2)) <= window.max((1, 2)) + 1e-5).all()
    # A model that gives back its input gives back the picture, to its last pixel.
    for size in ((40, 33), (12, 10), (5, 60), (1, 1)):
        picture = RANDOM.random((3, *size), np.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "forward", lambda self, images, draws=None: Same(images))
            assert np.abs(whole.reconstructed(model, picture) - picture).max() < 1e-6


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on crops of 16 × 16, whose net does something."""
    run = tmp_path_factory.mktemp("runs") / "denoiser"
    settings_ = {
        "data.crop": 16, "model.widths": (4, 6), "model.latent_dim": 12, "objective.noise_std": (0.02, 0.2),
        "train.steps": 6, "train.eval_every": 6, "tracking.wandb": "off", "tracking.pictures": False, "run_dir": run,
    }  # fmt: skip
    dist_ae.train(PRESETS["conv-denoising"].override(settings_))
    return run


@pytest.mark.slow
def test_pictures_keep_size_bits_exif_and_profile(denoiser: Path, tmp_path: Path) -> None:
    photo = load_sample_images().images[1][:150, :203]
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a flower", 6  # its description; turned by 90°
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photo).save(folder / "one.jpg", exif=exif, icc_profile=profile, quality=98)
    wide = (photo.astype(np.uint16) * 257 + 3).transpose(2, 0, 1)
    plain = Image.Exif()
    plain[0x010E] = "of 16 bits"
    (folder / "deep/colour.png").write_bytes(deep.png(wide, plain, profile))
    out = commands.denoise_run(denoiser, folder, out=tmp_path / "out")
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == {"one.png", "deep/colour.png"}
    with Image.open(out / "one.png") as image:
        assert image.size == (150, 203) and image.info["icc_profile"] == profile  # upright
        assert image.getexif()[0x010E] == "a flower" and 0x0112 not in image.getexif()
        upright = np.asarray(image)
    with Image.open(folder / "one.jpg") as image:
        before = np.rot90(np.asarray(image), -1)
    assert np.abs(upright.astype(int) - before).mean() < 20
    sixteen = decode(os.fspath(out / "deep/colour.png"), form_of(DataConfig(), "rgb"))
    assert sixteen.dtype == np.uint16 and sixteen.shape == wide.shape and (sixteen % 257 != 0).any()
    with Image.open(out / "deep/colour.png") as image:
        assert image.getexif()[0x010E] == "of 16 bits" and image.info["icc_profile"] == profile
    # From Python it is the same.
    assert np.array_equal(dist_ae.load(denoiser).whole_picture(before), upright)
    floats = dist_ae.load(denoiser).whole_picture(before / 255)
    assert floats.dtype == np.float64 and np.abs(floats * 255 - upright).max() <= 0.51
    for wrong in (before[:, :, :2], before.astype(np.int32), before[:0]):
        with pytest.raises(InputError, match="whole_picture: expected"):
            dist_ae.load(denoiser).whole_picture(wrong)
    # A single picture can be named, and comes out in the form of its name.
    one = commands.reconstruct_run(denoiser, folder / "one.jpg", out=tmp_path / "one.webp")
    with Image.open(one) as image:
        assert image.format == "WEBP" and image.size == (150, 203) and image.getexif()[0x010E] == "a flower"
    # The model's own size is there for the asking.
    small = commands.reconstruct_run(denoiser, folder / "one.jpg", out=tmp_path / "small.npy")
    assert np.load(small).shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_an_onnx_model_takes_pictures_of_any_size(denoiser: Path, tmp_path: Path) -> None:
    path, *_ = commands.export_run(denoiser, tmp_path / "model.onnx", format="onnx")
    session = onnxruntime.InferenceSession(path)
    model = dist_ae.load(denoiser).model
    for size in ((16, 16), (8, 40), (36, 24)):
        images = torch.from_numpy(RANDOM.random((2, 3, *size), np.float32))
        sized = model.at(*size)
        assert sized is not None
        with torch.no_grad():
            wanted = sized(images, None).reconstruction.clamp(0, 1)
        found = session.run(None, {"pictures": images.numpy()})[0]
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_what_has_no_size_of_its_own_is_refused_in_one_sentence(denoiser: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", RANDOM.random((2, 3, 16, 16)))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    size: Literal["own"] | None
    for images, size, message in (
        (tmp_path / "images.npy", "own", "--size model takes anything"),
        (None, "own", "name some"),
        (tmp_path / "broken.jpg", None, "broken.jpg: cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            commands.denoise_run(denoiser, images, out=tmp_path / "out", size=size)
        assert not (tmp_path / "out").exists()
