"""No figure looks better than it is: NaN, diverged runs, baselines, exports and ends."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import shutil
import socket
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import SMALL, digits_file, forked, metrics
from hypothesis import given
from hypothesis import strategies as st

import dist_ae
from dist_ae import pca, sentences, step
from dist_ae.capture import capture
from dist_ae.config import InputError
from dist_ae.data.reader import Reader
from dist_ae.data.records import Split
from dist_ae.evaluate import better, comparable, not_finite, psnr
from dist_ae.files import to_json
from dist_ae.models import LinearCode
from dist_ae.outcome import NonFinite
from dist_ae.presets import PRESETS
from dist_ae.processes.runtime import Alone
from dist_ae.quality import Posterior
from dist_ae.run.tracking import server_answers
from dist_ae.scores import code_moments
from dist_ae.timeline import Best, State, Timeline
from dist_ae.use import commands, export, program
from dist_ae.use.evaluation import _code_remarks
from dist_ae.use.write import write_table
from dist_ae.validation import Validation

FLOATS = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-300])
FEW = {"model.start": "random", **SMALL, "train.batch_size": 8, "model.hidden_dims": (8,), "model.latent_dim": 2}


def strict(path: Path) -> Any:
    """JSON as other programs read it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path}: {word} is no JSON")

    return (
        [json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines()]
        if (path.suffix == ".jsonl")
        else json.loads(path.read_text(), parse_constant=refuse)
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    return digits_file(tmp_path_factory.mktemp("data"), 60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Path:
    run = tmp_path_factory.mktemp("merit") / "run"
    dist_ae.train(PRESETS["ae"].override({**FEW, "data.name": digits, "train.steps": 4, "run_dir": str(run)}))
    return run


# -------------------------------------------------------------------------------------------------------- not finite


@given(FLOATS, st.none() | FLOATS, st.sampled_from([1, -1]))
def test_what_is_not_finite_is_never_better_and_never_stays_best(value: float, best: float | None, sign: int) -> None:
    found = better(value, best, sign)
    if not math.isfinite(value):
        assert not found
    elif best is None or not math.isfinite(best):
        assert found
    else:
        assert found == (value > best if sign > 0 else value < best)


@given(FLOATS)
def test_psnr_of_nan_is_nan_and_no_error_has_a_figure_that_json_lacks(mse: float) -> None:
    if math.isnan(mse):
        assert math.isnan(psnr(mse))
    elif 0 <= mse < math.inf:
        assert math.isfinite(psnr(mse)) and psnr(mse) <= 200
    assert psnr(0.01) == pytest.approx(20) and psnr(0.0) == 200


@pytest.mark.slow
@given(
    st.recursive(FLOATS | st.text() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8)
)
def test_every_value_is_written_as_json_that_is_json(value: Any) -> None:
    for indent in (None, 2):
        text = to_json(value, indent).decode()
        json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert not_finite({"a": 1.0, "b": math.nan, "c": math.inf}) == ["b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mse", "denoised_psnr", "train_mse"])
def test_an_evaluation_that_is_not_finite_ends_the_run_and_nothing_of_it_is_kept(
    tmp_path: Path, digits: str, name: str
) -> None:
    config = PRESETS["ae"].override(
        {**FEW, "data.name": digits, "train.steps": 6, "train.eval_every": 2, "run_dir": str(tmp_path / "run")}
    )
    real, calls = Validation.metrics, []

    def spoiled(self: Validation, *arguments: Any) -> dict[str, float]:
        calls.append(1)
        return {**real(self, *arguments), **({name: math.nan} if len(calls) == 2 else {})}

    with (
        mock.patch.object(Validation, "metrics", spoiled),
        pytest.raises(NonFinite, match=rf"evaluation after step 4 is not finite \(val.{name}\)"),
    ):
        dist_ae.train(config)
    assert [line["step"] for line in metrics(tmp_path / "run", "val")] == [2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000002"]
    assert dist_ae.train(config).steps == 6  # what was a passing fault is made good


def test_weights_or_moments_that_are_not_finite_are_never_saved(tmp_path: Path, digits: str) -> None:
    config = PRESETS["ae"].override({**FEW, "data.name": digits, "train.steps": 6, "train.save_every": 2})
    real = step.Learner.step

    def overflowing(self: step.Learner, number: int) -> None:
        real(self, number)
        if number == 3:
            next(iter(self.tensors()["optimizer"].values())).view(-1)[0] = math.inf

    config = config.override({"run_dir": str(tmp_path / "run")})
    with mock.patch.object(step.Learner, "step", overflowing), pytest.raises(NonFinite, match="optimizer"):
        dist_ae.train(config)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000002"]


EXTREMES: dict[str, list[Any]] = {
    "objective.sigma": [1e-6, 1e6], "objective.beta": [1e6], "objective.noise_std": [100.0], "optim.lr": [1e6, 1e-30],
    "optim.eps": [1e-30, 1e6], "optim.weight_decay": [1e6], "optim.clip_norm": [1e-30, 1e30],
    "optim.warmup_steps": [10**12],
    "objective.beta_warmup_steps": [10**12], "train.timeout": [1e6], "train.save_minutes": [1e6, 1e-300],
    "train.keep": [10**12], "train.patience": [10**12], "train.eval_every": [10**12], "train.log_every": [10**12],
    "train.max_per_process": [10**12], "evaluation.batch_size": [10**12], "evaluation.noise_std": [100.0],
    "optim.betas": [(0.0, 0.0), (0.999999999, 0.999999999)], "seed": [2**63 - 1],
    "data.val_fraction": [1e-300, 1 - 1e-16],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", EXTREMES)
def test_a_value_at_the_end_of_its_bounds_gives_a_result_or_a_sentence(tmp_path: Path, digits: str, key: str) -> None:
    for number, value in enumerate(EXTREMES[key]):
        for preset in ("ae", "vae"):
            run_dir = tmp_path / f"{preset}-{number}"
            changes = {**FEW, "data.name": digits, "train.steps": 3, "train.batch_size": 1, key: value}
            config = PRESETS[preset].override({**changes, "run_dir": str(run_dir)})
            for _ in range(2):  # also when it is resumed
                with contextlib.suppress(InputError, dist_ae.config.Fault):
                    dist_ae.train(config)
            for path in run_dir.glob("*.json*"):
                strict(path)


def test_values_beyond_their_bounds_are_refused_by_name() -> None:
    beyond = {"objective.sigma": 1e-160, "objective.beta": 1e300, "train.timeout": 1e300, "optim.lr": 1e20}
    for key, value in {**beyond, "evaluation.noise_std": 1e38, "train.steps": 10**30, "model.blocks": 10**7}.items():
        with pytest.raises(InputError, match=key.rpartition(".")[2]):
            PRESETS["ae"].override({key: value})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ae", "vae", "conv", "conv-vae"])
def test_a_start_from_data_without_variance_is_the_mean(tmp_path: Path, preset: str) -> None:
    images = np.full((24, 1, 8, 8), 77, np.uint8)
    conv = {"model.widths": (8, 8)} if preset.startswith("conv") else {"model.hidden_dims": (16,)}
    config = PRESETS[preset].override(
        {
            **conv, "model.start": "pca", "model.latent_dim": 2, "train.batch_size": 8, "train.steps": 4,
            "tracking.wandb": "off", "objective.likelihood": "gaussian", "run_dir": str(tmp_path / "run"),
        }
    )  # fmt: skip
    result = dist_ae.train(config, data=images)
    assert result.metrics["val.mse"] < 1e-2, result.metrics


@pytest.mark.slow
def test_a_run_that_is_worse_than_the_mean_image_says_so_and_no_other_does(
    tmp_path: Path, digits: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, (lr, steps, expected) in enumerate(((1e-30, 1, True), (1e-2, 60, False))):
        changes = {**FEW, "data.name": digits, "model.start": "random", "optim.lr": lr, "train.steps": steps}
        dist_ae.train(PRESETS["ae"].override({**changes, "run_dir": str(tmp_path / str(number))}))
        assert ("worse than always predicting the mean image" in capfd.readouterr().out) == expected


@pytest.mark.parametrize(("metric", "denoised", "knows_noise"), [
    ("val.denoised_psnr", 19.9, True), ("val.denoised_psnr", 10.6, False), ("val.mse", 19.9, False),
])  # fmt: skip
def test_a_model_that_denoises_well_and_fails_on_clean_images_is_not_told_to_train_longer(
    metric: str, denoised: float, knows_noise: bool
) -> None:
    """Seen with `conv-denoising` on Fashion-MNIST, 128 numbers, seed 2: val.mse 1.48."""
    metrics = {"mse": 1.48, "noisy_psnr": 10.5, "denoised_psnr": denoised}
    state = State(step=1876, metrics=metrics, best=Best(1876, metric, 1.48, 0.3), pca_mse=0.0063)
    code = LinearCode(components=128, patch=None, values=128)
    for sentence in (sentences.against_mean(state, 0.0866), sentences.against_pca(state, code, 128, False)):
        assert ("a range of noise" in sentence) == knows_noise and ("Train longer" in sentence) != knows_noise


# ------------------------------------------------------------------------------------------------------ wrong figures


@pytest.mark.parametrize("num", [16, 32, 64, 128, 256])
def test_pca_of_large_vectors_is_as_good_as_the_exact_one(num: int) -> None:
    images, centred, values = PHOTOGRAPHS()
    found = pca.principal_components(Reader(Split(images), torch.device("cpu")), num, None, Alone(torch.device("cpu")))
    left = float((centred - (centred @ found.basis.T) @ found.basis).square().sum() / len(centred))
    best = float(values[num:].sum())
    assert left <= 1.001 * best, f"{left / best - 1:.2%} above the optimum"
    np.testing.assert_allclose(found.variances, values[:num], rtol=0.02)
    assert found.total_variance == pytest.approx(float(values.sum()), rel=1e-6)


_CACHE: list[Any] = []


def PHOTOGRAPHS() -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Patches of 20 × 20 × 3 of the two photographs, less their mean, and the variances of their exact components."""
    if not _CACHE:
        from pictures import photographs

        windows = [
            np.lib.stride_tricks.sliding_window_view(p, (20, 20), axis=(0, 1))[::19, ::19] for p in photographs()
        ]
        images = np.ascontiguousarray(np.concatenate([w.reshape(-1, 3, 20, 20) for w in windows]))
        vectors = torch.from_numpy(images.reshape(len(images), -1)).double() / 127.5 - 1
        centred = vectors - vectors.mean(0)
        _CACHE.append((images, centred, torch.linalg.eigvalsh(centred.T @ centred / len(centred)).flip(0)))
    found: tuple[np.ndarray, torch.Tensor, torch.Tensor] = _CACHE[0]
    return found


def test_pca_of_too_many_numbers_is_refused_as_a_start_and_left_out_as_a_baseline() -> None:
    from dist_ae.models import blank

    config = PRESETS["conv"].override({"model.code": "vector", "model.latent_dim": 8192, "model.start": "pca"})
    model = blank(config, (3, 64, 64))
    with pytest.raises(InputError, match=r"8,192 components of 12,288 numbers take too long"):
        pca.check(config, model)
    images = np.zeros((4, 3, 64, 64), np.uint8)
    assert pca.of_model(model, Reader(Split(images), torch.device("cpu")), Alone(torch.device("cpu"))) is None


@pytest.mark.slow
def test_a_denoising_run_that_is_resumed_with_other_noise_compares_no_two_tasks(
    tmp_path: Path, digits: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {
        **FEW,
        "model.start": "pca",
        "data.name": digits,
        "train.eval_every": 2,
        "run_dir": str(tmp_path / "run"),
    }
    config = PRESETS["denoising"].override({**changes, "optim.schedule": "constant", "train.steps": 4})
    dist_ae.train(config.override({"evaluation.noise_std": 0.01}))
    easy = State.of(json.loads((tmp_path / "run" / "checkpoints" / "00000004" / "state.json").read_text())).best
    assert easy is not None and easy.noise_std == 0.01
    result = dist_ae.train(config.override({"evaluation.noise_std": 0.5, "train.steps": 8}))
    assert "the search for the best evaluation begins anew" in capfd.readouterr().err
    harder = [line for line in metrics(tmp_path / "run", "val") if line["step"] >= 4]
    assert result.best_step >= 4 and max(line["denoised_psnr"] for line in harder) < easy.value
    assert [line["step"] for line in metrics(tmp_path / "run", "val")] == [0, 2, 4, 6, 8]
    # An older run kept no noise, and is taken as it is; other tasks do not depend on it.
    assert comparable({"step": 1}, "denoised_psnr", 0.3) and comparable({"noise_std": 0.1}, "mse", 0.3)
    assert not comparable({"noise_std": 0.1}, "denoised_psnr", 0.3)


def test_no_evaluation_gives_a_model_an_empty_batch(tmp_path: Path) -> None:
    from dist_ae.config import EvaluationConfig, ObjectiveConfig
    from dist_ae.evaluate import evaluate, mean_squared_error
    from dist_ae.models import build
    from dist_ae.quality import _codes

    images = np.random.default_rng(0).integers(0, 256, (101, 1, 8, 8)).astype(np.uint8)
    reader, sizes = Reader(Split(images), torch.device("cpu")), []
    config = PRESETS["vae"].override({**FEW, "objective.likelihood": "gaussian"})
    model = build(config, (1, 8, 8))

    def watched(batch: torch.Tensor, draws: Any = None) -> Any:
        sizes.append(len(batch))
        return model(batch, draws)

    class Part(Alone):
        """One of two processes, whose sums are its own."""

        def __init__(self, rank: int) -> None:
            super().__init__(torch.device("cpu"))
            self.rank, self.world = rank, 2

    found: list[dict[str, float]] = []
    with (
        torch.no_grad(),
        mock.patch.object(type(model), "encode", autospec=True, side_effect=type(model).encode) as code,
    ):
        for rank in (0, 1):
            with contextlib.suppress(AssertionError):  # half of the images is not all of them
                found.append(evaluate(watched, reader, ObjectiveConfig(), EvaluationConfig(batch_size=50), Part(rank)))
            mean_squared_error(watched, reader, 50, Part(rank))
            _codes(model, None, reader, torch.arange(101), 50, Part(rank))
        sizes += [len(call.args[1]) for call in code.call_args_list]
    assert len(sizes) > 12 and min(sizes) == 1


def test_a_load_during_training_finds_a_checkpoint_however_often_they_change(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run") and tmp_path / "run"
    checkpoints = run / "checkpoints"
    done, loads = threading.Event(), 0

    def churn() -> None:
        """What training does: a new checkpoint comes by a rename, then the one before goes."""
        names = [f"{number:08d}" for number in (4, 5)]
        state = json.loads((checkpoints / names[0] / "state.json").read_text())
        assert state["step"] == 4
        while not done.is_set():
            shutil.copytree(checkpoints / names[0], checkpoints / ".tmp-next")
            os.rename(checkpoints / names[0], checkpoints / ".tmp-pruned")
            os.rename(checkpoints / ".tmp-next", checkpoints / names[0])
            shutil.rmtree(checkpoints / ".tmp-pruned")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        while loads < 60:
            with contextlib.suppress(InputError):
                dist_ae.load(run)
            loads += 1
    finally:
        done.set()
        thread.join()
    # Between two listings that differ, it looks again: a checkpoint that goes after it was listed is no failure.
    from dist_ae import saved

    real, seen = saved.read_weights, list[Path]()

    def pruned(folder: Path, model: Any) -> Any:
        if not seen:
            seen.append(folder)
            os.rename(folder, checkpoints / "00000003")
        return real(folder, model)

    with mock.patch.object(saved, "read_weights", pruned), pytest.raises(InputError, match="of step 4"):
        dist_ae.load(run)  # it did look again: what it found there is of another step than its name says
    os.rename(checkpoints / "00000003", checkpoints / "00000004")
    assert dist_ae.load(run).source is not None


# -------------------------------------------------------------------------------------------------------- what leaves


def card_of(trained: Path, tmp_path: Path, **values: Any) -> tuple[str, dict[str, Any]]:
    loaded = dist_ae.load(trained)
    loaded.config = loaded.config.override(values)
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    export.write_folder(loaded, trained, folder)
    return (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())["config"]


def test_an_export_tells_no_path_and_its_command_trains_the_same_data(trained: Path, tmp_path: Path) -> None:
    card, config = card_of(trained, tmp_path, init_from="/home/somebody/runs/first", **{"data.name": "hf:owner/name"})
    assert "somebody" not in card and config["init_from"] is None and "the weights of another run" in card
    assert "--data.name hf:owner/name" in card and config["data"]["name"] == "hf:owner/name"
    local = tmp_path / "secret place" / "set"
    local.mkdir(parents=True)
    card, config = card_of(trained, tmp_path, **{"data.name": f"hf:{local}"})
    assert "secret place" not in card and config["data"]["name"] == "hf:set"


def test_a_model_card_shows_a_name_and_runs_no_markup_of_it(trained: Path, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> [a](javascript:b) `c` | d\n# e"
    card, _ = card_of(trained, tmp_path, name=name, **{"data.name": "folder:/x/```\n<script>"})
    outside = re.sub(r"(?ms)^(`{3,})sh$.*?^\1$", "", card)
    assert "<img" not in outside and "<script" not in outside and "\n# e" not in outside
    assert not re.search(r"(?<!\\)\[a\]\(", outside)
    assert len(re.findall(r"(?m)^`{3,}", card)) == 4  # two blocks, each closed by its own fence


def test_a_cell_of_a_table_is_no_formula_and_still_a_path(tmp_path: Path) -> None:
    from dist_ae.data.given import Given

    names = ["=cmd|' /C calc'!A0.png", "+1.png", "-1.png", "@a.png", "a/=b.png", "plain.png"]
    images = Given(Split(np.zeros((6, 1, 2, 2), np.uint8)), names)
    path = write_table(tmp_path / "t.csv", images, {"score": torch.zeros(6)})
    cells = [row["path"] for row in csv.DictReader(path.open())]
    assert not any(cell[0] in "=+-@\t\r" for cell in cells)
    assert [os.path.normpath(cell) for cell in cells] == names


def test_onnx_leaves_the_model_where_it_is(trained: Path) -> None:
    pytest.importorskip("onnxscript")
    loaded = dist_ae.load(trained)
    moved = loaded.model.to("meta")  # a device that is not the CPU
    with contextlib.suppress(Exception):
        program.onnx_bytes(loaded.model)
    assert all(p.device.type == "meta" for p in moved.parameters())


def test_only_what_an_export_wrote_is_uploaded(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "diary.txt").write_text("private")
    with mock.patch("huggingface_hub.HfApi") as api:
        commands.export_run(trained, tmp_path / "export", format="safetensors", push_to_hub="owner/name")
    patterns = api.return_value.upload_folder.call_args.kwargs["allow_patterns"]
    assert "model.safetensors" in patterns and not any("diary" in p or "*" in p for p in patterns)


# ------------------------------------------------------------------------------------------------------------- bounds


def test_lines_of_any_length_are_refused_before_they_are_made(trained: Path, digits: str) -> None:
    model = dist_ae.load(trained)
    images = np.zeros((2, 1, 8, 8), np.uint8)
    with pytest.raises(InputError, match="at most 10,000"):
        model.interpolate(images, images, 100_000)
    with (
        mock.patch("dist_ae.use.trained.free_memory", return_value=2**20),
        pytest.raises(InputError, match="too many for the memory"),
    ):
        model.interpolate(images, images, 5_000)
    assert model.interpolate(images, images, 3).shape == (2, 3, 1, 8, 8)


# --------------------------------------------------------------------------------------------------------------- ends


def test_a_page_of_equal_pictures_is_drawn(trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "equal.npy", np.full((40, 1, 8, 8), 9, np.uint8))
    path = commands.explore_run(trained, tmp_path / "equal.npy", tmp_path / "page.html")
    data = re.search(r"application/json[^>]*>(.*?)</script>", path.read_text(), re.DOTALL)
    assert data is None or "NaN" not in data[1]
    # Of a model whose code has many numbers, t-SNE would be asked for a map.
    from dist_ae.use.explore import _map

    assert (_map(np.zeros((40, 8))) == 0.5).all() and np.isfinite(_map(np.ones((40, 8)) * 1e6)).all()


def test_a_tracker_s_server_that_speaks_no_http_is_a_reason_to_go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                connection.recv(1000)
                connection.sendall(b"220 mail.example.org ESMTP\r\n")
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert "does not answer" in (server_answers() or "")
        thread.join()


def test_a_working_folder_that_was_deleted_is_said_so(tmp_path: Path) -> None:
    def lost(rank: int) -> None:
        folder = tmp_path / "gone"
        folder.mkdir()
        os.chdir(folder)
        folder.rmdir()
        import sys

        from dist_ae import __main__

        sys.argv = ["dist-ae", "train", "ae"]
        __main__.main()

    assert forked(1, lost, tmp_path / "log") == [2]
    said = (tmp_path / "log-0.log").read_text()
    assert "was deleted" in said and "Traceback" not in said and "MKL" not in said


# ------------------------------------------------------- what a mutation of the code could change without a word


@pytest.mark.parametrize("count", [12, 400])
def test_the_covariance_of_codes_is_shrunk_as_chen_and_others_say(trained: Path, count: int) -> None:
    from sklearn.covariance import OAS

    model = dist_ae.load(trained).model
    images = np.random.default_rng(0).integers(0, 128, (count, 1, 8, 8)).astype(np.uint8)
    images[256:] += 100  # the middle of the first images is not that of all
    reader = Reader(Split(images), torch.device("cpu"))
    moments = code_moments(model, reader, 50, Alone(torch.device("cpu")))
    with torch.no_grad():
        codes = model.encode(reader.span(range(count)))[0]
    expected = OAS().fit(codes.double().numpy())
    assert count > 12 or expected.shrinkage_ > 0.02  # so that leaving it out is seen
    np.testing.assert_allclose(moments.distance(codes) ** 2, expected.mahalanobis(codes.double().numpy()), rtol=1e-3)


def test_of_a_long_code_the_variances_alone_are_kept(trained: Path) -> None:
    model = dist_ae.load(trained).model
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8)).astype(np.uint8)
    reader = Reader(Split(images), torch.device("cpu"))
    with mock.patch("dist_ae.scores.FULL_COVARIANCE", 1):
        moments = code_moments(model, reader, 50, Alone(torch.device("cpu")))
    with torch.no_grad():
        codes = model.encode(reader.span(range(60)))[0].double()
    expected = ((codes - codes.mean(0)).square() / codes.var(0, correction=0)).sum(1).sqrt()
    assert moments.whitening.shape == (2,)
    np.testing.assert_allclose(moments.distance(codes), expected, rtol=1e-4)


def test_remarks_on_a_code_name_what_is_off_and_nothing_else() -> None:
    def remarks(mean: float = 0.0, variance: float = 1.0, of_means: float = 0.5) -> str:
        ones = torch.ones(3)
        means = torch.tensor([mean, 0.0, 0.0])
        variances, moved = torch.tensor([variance, 1.0, 1.0]), torch.tensor([of_means, 0.5, 0.5])
        return " ".join(_code_remarks(Posterior(ones, means, variances, moved), {"active_units": 3.0}))

    assert remarks() == "" and remarks(mean=0.29) == "" and remarks(variance=1.49) == ""
    for off in (remarks(mean=0.31), remarks(mean=-0.31), remarks(variance=1.51), remarks(variance=1 / 1.51)):
        assert "1 of 3 numbers are off N(0, 1)" in off and "collapsed" not in off
    assert "1 of 3 numbers of the code have collapsed" in remarks(of_means=0.009) and remarks(of_means=0.011) == ""


@pytest.mark.parametrize("same", [True, False])
def test_a_graph_is_used_only_where_it_gives_the_step_s_result(same: bool, capfd: pytest.CaptureFixture[str]) -> None:
    value = torch.tensor([1.0])

    class Fake:
        def __init__(self, work: Any, *arguments: Any) -> None:
            work()

        def replay(self) -> None:
            value.add_(2.0 if same else 2.001)

    def work() -> None:
        value.add_(2.0)

    with mock.patch("dist_ae.capture.Graph", Fake):
        graph = capture(work, [value], torch.device("cpu"))
    assert (graph is not None) == same and float(value) == 1.0
    assert ("differs from the step itself" in capfd.readouterr().err) == (not same)


def test_pictures_are_drawn_at_doubling_intervals_and_at_the_end() -> None:
    line = Timeline(100, 10, total_steps=100, eval_every=10, save_every=20, log_every=5)
    assert [step for step in range(10, 101, 10) if line.draws_pictures(step)] == [10, 20, 40, 80, 100]
    assert [step for step in range(101) if line.saves(step)] == [20, 40, 60, 80, 100]
    assert [step for step in range(101) if line.evaluates(step)] == list(range(10, 101, 10))
