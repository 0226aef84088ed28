"""One page to look into a run, opened in a real browser; and a model that leaves for other programs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from browser import cut_off, opened
from conftest import SMALL, run
from pictures import make_folder

import dist_ae
from dist_ae.config import InputError
from dist_ae.data import sources
from dist_ae.presets import PRESETS
from dist_ae.use import commands

pytestmark = pytest.mark.slow

IMAGES: Any = sources.load(PRESETS["ae"].data).val.images
CONV = {"model.architecture": "conv", "model.widths": (4, 8), "model.latent_dim": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    np.save(root / "table.npy", np.random.default_rng(0).standard_normal((300, 6), np.float32))
    table = {"data.name": f"array:{root}/table.npy", "model.latent_dim": 2}
    for name, preset, values in (("ae", "ae", {}), ("vae", "vae", {}), ("conv", "ae", CONV), ("table", "ae", table)):
        config = PRESETS[preset].override({**SMALL, **values, "train.steps": 60, "run_dir": str(root / name)})
        dist_ae.train(config)
    return root


def element(document: str, name: str) -> str:
    found = re.search(rf'id="{name}"[^>]*>(.*?)</(?:p|div|section|span)>', document, re.DOTALL)
    assert found, name
    return found[1]


@pytest.mark.parametrize("width", [500, 1400])  # a browser's window has at least 500 pixels
def test_the_page_shows_a_clicked_image_its_neighbours_and_the_decoded_line_between_two(
    trained: Path, width: int, tmp_path: Path
) -> None:
    ((status, out, err),) = run(1, "-m", "dist_ae", "explore", str(trained / "vae"), "--out", str(tmp_path / "p.html"))
    assert status == 0 and f"written: {tmp_path / 'p.html'}" in out, err
    assert not re.search(r'(?:src|href)="(?!data:)', (tmp_path / "p.html").read_text()), "it loads from elsewhere"
    document = opened(tmp_path / "p.html", width, "#3,7")
    assert '<body data-ready="yes">' in document, element(document, "hint")
    assert element(document, "what").startswith("image 7 · ")
    assert element(document, "near").count("<canvas") == 15 and element(document, "line").count("<canvas") == 9
    assert "decoded" in element(document, "lineNote")
    assert document.count('type="range"') == 8 and 'id="samplesSection" hidden' not in document


@pytest.mark.parametrize("name", ["vae", "table"])
def test_the_page_is_whole_on_a_telephone(trained: Path, name: str, tmp_path: Path) -> None:
    page = commands.explore_run(trained / name, out=tmp_path / "page.html")
    for width in (390, 1400):
        assert cut_off(page, width, tmp_path) == (0, 0), width


def test_a_model_that_cannot_be_decoded_in_the_browser_shows_the_nearest_images_instead(
    trained: Path, tmp_path: Path
) -> None:
    page = commands.explore_run(trained / "conv", out=tmp_path / "page.html", num=50)
    document = opened(page, 1400, "#3,7")
    assert '<body data-ready="yes">' in document and "--onnxruntime-web" in element(document, "lineNote")
    assert element(document, "line").count("<canvas") == 9 and 'id="liveSection" hidden' in document


@pytest.mark.long
def test_a_convolution_is_decoded_in_the_browser_by_onnxruntime(trained: Path, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("needs npm, to get onnxruntime-web")
    subprocess.run(["npm", "install", "--silent", "onnxruntime-web"], cwd=tmp_path, check=True, timeout=240)
    runtime = tmp_path / "node_modules/onnxruntime-web"
    page = commands.explore_run(trained / "conv", out=tmp_path / "page.html", onnxruntime_web=runtime)
    document = opened(page, 1400, "#3,7")
    assert '<body data-ready="yes">' in document and "decoded" in element(document, "lineNote")


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_of_a_folder_names_its_pictures_even_those_that_look_like_markup(
    trained: Path, tmp_path: Path
) -> None:
    make_folder(tmp_path / "in", 4)
    (tmp_path / "in" / "<script>alert(1)<").mkdir()
    shutil.copy(next((tmp_path / "in").rglob("*.png")), tmp_path / "in" / "<script>alert(1)<" / "x.png")
    page = commands.explore_run(trained / "ae", f"folder:{tmp_path / 'in'}", tmp_path / "page.html")
    assert "<script>alert(1)<" not in page.read_text()
    assert "<script>alert(1)</x.png" in page_data(page)["names"]


def test_the_page_s_largest_errors_and_map_are_those_of_the_images(trained: Path, tmp_path: Path) -> None:
    data = page_data(commands.explore_run(trained / "ae", out=tmp_path / "page.html"))
    scores = dist_ae.load(trained / "ae").score(IMAGES)
    assert data["extremes"][12] == int(scores.argmax()) and data["extremes"][0] == int(scores.argmin())
    assert data["count"] == len(IMAGES) == len(data["labels"]) and data["kept"] == pytest.approx(1, abs=1e-4)
    assert (
        commands.explore_run(trained / "ae", out=tmp_path / "again.html").read_bytes()
        == (tmp_path / "page.html").read_bytes()
    )


def test_a_decoder_too_large_for_a_page_is_left_out_and_the_page_says_so(tmp_path: Path) -> None:
    # The default MLP on pictures of 64 × 64 × 3: its decoder alone would be 17 MB.
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 64, 64)).astype(np.uint8)
    settings = {"train.batch_size": 8, "train.steps": 1, "tracking.wandb": "off", "run_dir": tmp_path / "run"}
    dist_ae.train(PRESETS["ae"].override({**settings, "model.start": "random"}), data=images)
    np.save(tmp_path / "images.npy", images)
    page = commands.explore_run(tmp_path / "run", str(tmp_path / "images.npy")).read_text()
    assert len(page) < 2_000_000 and "no live decoder" in page


def test_a_page_that_cannot_be_made_is_refused_in_one_sentence(trained: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"num": 2}, "at least 3 images"),
        ({"onnxruntime_web": tmp_path}, "npm install onnxruntime-web"),
        ({"out": tmp_path / "page.png"}, ".html"),
    ):
        with pytest.raises(InputError, match=message):
            commands.explore_run(trained / "conv", **arguments)
    np.save(tmp_path / "two.npy", IMAGES[:2])
    with pytest.raises(InputError, match="at least 3 images, got 2"):
        commands.explore_run(trained / "ae", tmp_path / "two.npy", tmp_path / "page.html")


@pytest.mark.parametrize("name", ["vae", "conv"])
def test_onnxruntime_gives_the_model_s_results_for_any_number_of_images(
    trained: Path, name: str, tmp_path: Path
) -> None:
    import onnxruntime

    model = dist_ae.load(trained / name)
    images, codes = IMAGES[:7].astype(np.float32) / 255, model.embed(IMAGES[:7])
    wanted = {"whole": [model.reconstruct(IMAGES[:7]), codes], "encoder": [codes], "decoder": [model.decode(codes)]}
    part: Any
    for part, expected in wanted.items():
        path, *_ = commands.export_run(trained / name, tmp_path / f"{part}.onnx", format="onnx", part=part)
        given = codes.numpy() if part == "decoder" else images
        session = onnxruntime.InferenceSession(path)
        for ours, theirs in zip(expected, session.run(None, {session.get_inputs()[0].name: given}), strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)


def test_an_exported_folder_loads_as_its_run_and_its_card_holds_the_run_s_figures(
    trained: Path, tmp_path: Path
) -> None:
    folder, *_ = commands.export_run(trained / "vae", tmp_path / "out", format="safetensors", license="cc-by-4.0")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "reconstructions.png"
    }  # fmt: skip
    run_model, exported = dist_ae.load(trained / "vae"), dist_ae.load(folder)
    assert torch.equal(run_model.embed(IMAGES), exported.embed(IMAGES))
    card = (folder / "README.md").read_text()
    result = json.loads((trained / "vae/result.json").read_text())
    assert "license: cc-by-4.0" in card and f"| `val.neg_elbo` | {result['metrics']['val.neg_elbo']:.6g} |" in card
    command = re.search(r"```sh\ndist-ae (.*)\n```", card)
    assert command
    again = run(1, "-m", "dist_ae", *command[1].split(), "--run-dir", str(tmp_path / "again"), "--train.steps", "60")
    assert again[0][0] == 0, again
    assert json.loads((tmp_path / "again/result.json").read_text())["weights_sha256"] == result["weights_sha256"]


def test_a_card_s_figures_are_those_of_the_exported_weights(tmp_path: Path) -> None:
    # A rate that spoils the model after a good start: the best weights, which are exported, are not the last.
    values = {**SMALL, "train.steps": 40, "train.eval_every": 5, "optim.lr": 0.5, "optim.schedule": "constant"}
    result = dist_ae.train(PRESETS["ae"].override({**values, "run_dir": str(tmp_path / "run")}))
    assert result.best_step < 40
    folder, *_ = commands.export_run(tmp_path / "run", tmp_path / "out", format="safetensors")
    found = re.search(r"\| `val.mse` \| (.*) \|", (folder / "README.md").read_text())
    assert found and float(found[1]) == pytest.approx(float(dist_ae.load(folder).score(IMAGES).mean()), rel=1e-4)


def test_a_run_whose_result_cannot_be_read_is_exported_as_unfinished(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "ae", run_dir)
    (run_dir / "result.json").write_text("{")
    folder, *_ = commands.export_run(run_dir, tmp_path / "out", format="safetensors")
    assert "| steps | unfinished |" in (folder / "README.md").read_text()


def test_an_uploaded_model_comes_back_from_the_hub(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub = tmp_path / "hub"

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> str:
            return f"https://huggingface.co/{name}"

        def upload_folder(
            self, repo_id: str, folder_path: Path, commit_message: str, allow_patterns: list[str]
        ) -> None:
            shutil.copytree(folder_path, hub / repo_id)
            assert sorted(allow_patterns) == sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(hub / name))
    *_, address = commands.export_run(
        trained / "ae", tmp_path / "out", format="safetensors", push_to_hub="someone/digits"
    )
    assert address == "https://huggingface.co/someone/digits"
    assert torch.equal(dist_ae.load("hf:someone/digits").embed(IMAGES), dist_ae.load(trained / "ae").embed(IMAGES))


def test_a_hub_that_cannot_be_reached_and_a_damaged_export_are_one_sentence(trained: Path, tmp_path: Path) -> None:
    ((status, _, error),) = run(
        1, "-m", "dist_ae", "export", str(trained / "ae"), "--format", "safetensors", "--out", str(tmp_path / "out"),
        "--push-to-hub", "someone/digits", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_none",
    )  # fmt: skip
    assert status == 2 and "Traceback" not in error and "--push-to-hub someone/digits" in error, error
    weights = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    safetensors.torch.save_file({**weights, "more": torch.zeros(1)}, tmp_path / "out/model.safetensors")
    with pytest.raises(InputError, match="other tensors than this model's"):
        dist_ae.load(tmp_path / "out")
    for arguments, message in (
        ({"format": "safetensors", "part": "decoder"}, "whole model"),
        ({"format": "onnx", "push_to_hub": "a/b"}, "safetensors"),
        ({"format": "onnx", "out": tmp_path / "m.pt2"}, ".onnx"),
    ):
        with pytest.raises(InputError, match=message):
            commands.export_run(trained / "ae", **arguments)


def test_codes_with_labels_and_a_plane_are_a_table_that_embedding_viewers_read(trained: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(commands.embed_run(trained / "ae", out=tmp_path / "codes.parquet"))
    assert table.column_names == ["path", "label", "x", "y", *(f"code_{number}" for number in range(8))]
    assert table["label"].to_pylist() == np.asarray(sources.load(PRESETS["ae"].data).val.labels).tolist()
    codes = np.stack([table[f"code_{number}"] for number in range(8)], 1)
    values = np.linalg.eigvalsh(np.cov(codes.T))
    assert np.var(np.asarray(table["x"]), ddof=1) == pytest.approx(values[-1], rel=1e-3)
    grid = pyarrow.parquet.read_table(commands.embed_run(trained / "conv", out=tmp_path / "grid.parquet"))
    assert grid.num_columns == 4 + int(np.prod(dist_ae.load(trained / "conv").model.code_shape))
