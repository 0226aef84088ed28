"""From Python: images that are in memory, and a model of the user's own, with all that holds for ours."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL, forked, metrics, relative_difference, weights
from sklearn.datasets import load_digits

import dist_ae
from dist_ae import step
from dist_ae.config import Config, InputError
from dist_ae.presets import PRESETS

IMAGES = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
SPEC = importlib.util.spec_from_file_location("own_model", REPOSITORY / "examples" / "own_model.py")
assert SPEC is not None and SPEC.loader is not None
EXAMPLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(EXAMPLE)
OWN: dict[str, Any] = {**SMALL, "model.start": "random", "precision": "fp64", "train.steps": 30, "train.save_every": 4}


def config(run_dir: Path, **more: Any) -> Config:
    return PRESETS["denoising"].override({**OWN, "run_dir": str(run_dir), **more})


def test_the_example_is_short() -> None:
    assert len((REPOSITORY / "examples" / "own_model.py").read_text().splitlines()) < 40


@pytest.mark.slow
def test_a_model_of_ones_own_is_the_same_on_1_and_2_processes_killed_and_resumed(tmp_path: Path) -> None:
    def train(name: str, die_at: int | None = None) -> Any:
        def work(rank: int) -> None:
            real = step.Learner.step

            def step_or_die(self: step.Learner, number: int) -> None:
                if number == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(self, number)

            with mock.patch.object(step.Learner, "step", step_or_die):
                dist_ae.train(config(tmp_path / name), data=IMAGES, model=EXAMPLE.Convolutional)

        return work

    assert forked(1, train("plain"), tmp_path / "log") == [0]
    assert forked(1, train("broken", die_at=13), tmp_path / "log") == [-signal.SIGKILL]
    assert forked(2, train("broken"), tmp_path / "log") == [0, 0]
    assert relative_difference(weights(tmp_path / "broken"), weights(tmp_path / "plain")) < 1e-9
    assert [line["step"] for line in metrics(tmp_path / "broken")] == list(range(1, 31))

    model = dist_ae.load(tmp_path / "plain", model=EXAMPLE.Convolutional)
    assert model.embed(IMAGES[:5, None]).shape == (5, 2, 2, 2)
    assert model.interpolate(IMAGES[:2, None], IMAGES[2:4, None], 5).shape == (2, 5, 1, 8, 8)
    with pytest.raises(InputError, match=r"load\(run_dir, model=build\)"):
        dist_ae.load(tmp_path / "plain")


@pytest.mark.slow
def test_a_model_of_ones_own_need_not_take_an_empty_batch(tmp_path: Path) -> None:
    class NeedsImages(EXAMPLE.Convolutional):  # type: ignore[misc, name-defined]
        def encode_raw(self, images: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
            assert len(images) > 0
            raw: torch.Tensor = super().encode_raw(images, masks)
            return raw

    def train(name: str) -> Any:
        # 100 images in batches of 33: the last of an epoch has one, so that one of two processes has none.
        values = {"train.batch_size": 33, "train.save_every": None, "data.val_fraction": 0.5}
        return lambda rank: dist_ae.train(config(tmp_path / name, **values), data=IMAGES[:200], model=NeedsImages)

    assert forked(1, train("one"), tmp_path / "log") == [0]
    assert forked(2, train("two"), tmp_path / "log") == [0, 0]
    assert relative_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-9


@pytest.mark.slow
def test_images_from_python_train_as_the_same_images_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", IMAGES)
    settings = {**SMALL, "train.steps": 8}
    file = {"data.name": f"array:{tmp_path / 'digits.npy'}", "run_dir": str(tmp_path / "file")}
    expected = dist_ae.train(PRESETS["ae"].override({**settings, **file})).weights_sha256

    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(IMAGES)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(IMAGES[index]), index % 10

    given = {"numpy": IMAGES, "channels last": IMAGES[..., None], "torch": torch.from_numpy(IMAGES), "set": Pictures()}
    for name, data in given.items():
        run = PRESETS["ae"].override({**settings, "run_dir": str(tmp_path / name)})
        assert dist_ae.train(run, data=data).weights_sha256 == expected, name
    pair = dist_ae.train(PRESETS["ae"].override({**settings, "run_dir": str(tmp_path / "pair")}), data=(IMAGES, IMAGES))
    assert pair.weights_sha256 != expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("digits.npy", "got str"),
        ([[1, 2], [3, 4]], "got list"),
        (np.zeros((10, 4, 4), np.int64), "expected uint8"),
        (np.zeros(10), r"got shape \[10\]; reshape one column"),
        ((IMAGES, IMAGES, IMAGES), "got 3 parts"),
        ((IMAGES, IMAGES[:, :4]), "differ in shape"),
    ],
)
def test_what_is_not_images_is_refused_before_anything_is_written(data: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        dist_ae.train(config(tmp_path / "run"), data=data)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_its_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.variational = False, the configuration says True"):
        dist_ae.train(config(tmp_path / "run", **{"model.variational": True}), data=IMAGES, model=EXAMPLE.Convolutional)
    with pytest.raises(InputError, match=r"expected a dist_ae\.Autoencoder, got Linear"):
        dist_ae.train(config(tmp_path / "run"), data=IMAGES, model=lambda shape: torch.nn.Linear(1, 1))  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="no PCA start"):
        dist_ae.train(config(tmp_path / "run", **{"model.start": "pca"}), data=IMAGES, model=EXAMPLE.Convolutional)
    with pytest.raises(InputError, match=r"expected a dist_ae\.Config"):
        dist_ae.train("ae")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"train\(config, model=build\)"):
        dist_ae.train(config(tmp_path / "run", **{"model.architecture": "own"}))
    assert not (tmp_path / "run").exists()


def test_what_the_package_offers_is_listed() -> None:
    assert {"train", "load", "PRESETS", "Config", "Autoencoder"} <= set(dir(dist_ae))


class Stateful(dist_ae.Autoencoder):
    """A model of one's own with a layer that is not a function of one image."""

    def __init__(self, shape: tuple[int, ...], layer: torch.nn.Module) -> None:
        super().__init__(shape, (4,))
        self.into, self.between, self.out = torch.nn.Linear(64, 4), layer, torch.nn.Linear(4, 64)

    def encode_raw(self, images: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        code: torch.Tensor = self.between(self.into(images.flatten(1)))
        return code

    def decode_raw(self, code: torch.Tensor, masks: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        raw: torch.Tensor = self.out(code).view(-1, *self.image_shape)
        return raw


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.1), torch.nn.SyncBatchNorm(4)], ids=str)
def test_a_layer_that_depends_on_the_batch_is_refused_by_name(layer: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"model: between is a {type(layer).__name__}.*GroupNorm"):
        dist_ae.train(config(tmp_path / "run"), data=IMAGES, model=lambda shape: Stateful(shape, layer))
    dist_ae.train(
        config(tmp_path / "run", **{"train.steps": 2}),
        data=IMAGES,
        model=lambda shape: Stateful(shape, torch.nn.GroupNorm(1, 4)),
    )


@pytest.mark.slow
def test_a_tensor_of_any_type_is_taken_and_labels_are_no_validation_images(tmp_path: Path) -> None:
    floats = torch.from_numpy(IMAGES).float() / 255
    settings = {"model.architecture": "mlp", "train.steps": 2}
    for name, data in (("half", floats.half()), ("bf16", floats.bfloat16()), ("grad", floats.requires_grad_())):
        dist_ae.train(config(tmp_path / name, **settings), data=data)
    for labels in (np.zeros(len(IMAGES), np.int64), list(range(len(IMAGES)))):
        with pytest.raises(InputError, match="leave labels out"):
            dist_ae.train(config(tmp_path / "run", **settings), data=(IMAGES, labels))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got list"):
        dist_ae.train(config(tmp_path / "run", **settings), data=(IMAGES, [[1], [1, 2]]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"np\.stack"):
        dist_ae.train(config(tmp_path / "run", **settings), data=list(IMAGES))  # type: ignore[arg-type]


class Wrong(Stateful):
    """A model of one's own with a fault that must be found before anything is trained."""

    def __init__(self, shape: tuple[int, ...], fault: str) -> None:
        super().__init__(shape, torch.nn.Identity())
        self.fault = fault
        if fault == "frozen":
            self.requires_grad_(False)
        if fault == "tied":
            self.twin = torch.nn.Linear(64, 4)
            self.twin.weight = self.into.weight
        if fault == "lazy":
            self.out = torch.nn.LazyLinear(64)  # type: ignore[assignment]

    def encode_raw(self, images: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        code = super().encode_raw(images, masks)
        if self.fault == "batch":
            code = code - code.mean(0)
        if self.fault == "random":
            code = torch.nn.functional.dropout(code, 0.5)
        return code[:, :3] if self.fault == "code" else code

    def decode_raw(self, code: torch.Tensor, masks: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        raw = super().decode_raw(torch.nn.functional.pad(code, (0, 4 - code.shape[1])), masks)
        return raw[:, :, 1:] if self.fault == "pixels" else raw


FAULTS = {
    "frozen": "none of its parameters asks for a gradient",
    "tied": r"twin\.weight is into\.weight",
    "lazy": "as a lazy layer",
    "batch": "depends on the other images of its batch",
    "random": "another result each time",
    "code": r"encode_raw gives \[3\] for an image, expected \[4\]",
    "pixels": r"decode_raw gives \[1, 7, 8\] for an image, expected \[1, 8, 8\]",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_could_not_be_trained_exactly_is_refused_before_training(fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=FAULTS[fault]):
        dist_ae.train(config(tmp_path / "run"), data=IMAGES, model=lambda shape: Wrong(shape, fault))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_so_and_refuses_a_model_that_is_another_by_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path / "run", **{"train.steps": 2})
    with pytest.raises(InputError, match="not the model itself"):
        dist_ae.train(settings, data=IMAGES, model=EXAMPLE.Convolutional((1, 8, 8)))
    first = dist_ae.train(settings, data=IMAGES, model=EXAMPLE.Convolutional)
    capsys.readouterr()
    assert dist_ae.train(settings, data=IMAGES, model=EXAMPLE.Convolutional).metrics == first.metrics
    assert "was finished before, at step 2; nothing is trained" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"run has no whole checkpoint: 00000002/weights\.safetensors"):
        dist_ae.train(settings, data=IMAGES, model=lambda shape: Wrong(shape, ""))


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, number: int) -> Any:
        return self.item(IMAGES[number], number)


@pytest.mark.slow
def test_a_torch_dataset_gives_images_or_pairs(tmp_path: Path) -> None:
    settings = {"model.architecture": "mlp", "train.steps": 2}
    for number, item in enumerate(
        (lambda x, i: [torch.from_numpy(x), i % 10], lambda x, i: (x, i % 10), lambda x, i: x)
    ):
        dist_ae.train(config(tmp_path / str(number), **settings), data=Pairs(item))
    with pytest.raises(InputError, match="gives items of type dict"):
        dist_ae.train(config(tmp_path / "run", **settings), data=Pairs(lambda x, i: {"image": x}))
