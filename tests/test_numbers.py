"""Tables, signals, volumes and 16 bits: one form of record, their own units in and out, and never worse than PCA."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Forked, cli, metrics, relative_difference, train_jobs, weights
from sklearn.datasets import load_breast_cancer, load_wine

import dist_ae
from dist_ae import PRESETS, InputError
from dist_ae.config import DataConfig
from dist_ae.data import reader, records
from dist_ae.data.array_files import pack_arrays
from dist_ae.data.layout import fitted, laid_out
from dist_ae.data.records import Split
from dist_ae.data.scaling import scaling_of
from dist_ae.data.sources import load
from dist_ae.data.tables import open_packed_table
from dist_ae.use import commands

SMALL = {"model.hidden_dims": (32, 16), "model.latent_dim": 3, "train.steps": 60, "train.batch_size": 32}
SMALL |= {"train.log_every": 20, "tracking.wandb": "off"}


def table(path: Path, rows: int = 569, missing: float = 0.0) -> Path:
    """Breast cancer, 30 columns and its labels, as CSV."""
    data = load_breast_cancer()
    gaps = np.random.default_rng(0).random(data.data.shape) < missing
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*data.feature_names, "kind"])
        for values, absent, kind in zip(data.data[:rows], gaps, data.target, strict=False):
            cells = ["" if gone else repr(float(value)) for value, gone in zip(values, absent, strict=True)]
            out.writerow([*cells, data.target_names[kind]])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    name = f"table:{table(folder / 'cancer.csv')}"
    values = {
        **SMALL,
        "data.name": name,
        "data.label": "kind",
        "data.cache": folder / "cache",
        "run_dir": folder / "run",
    }
    dist_ae.train(PRESETS["table"].override(values))
    return folder / "run"


# -- layouts


@pytest.mark.parametrize(
    ("shape", "layout", "inside", "outside"),
    [
        ((7, 5), "auto", (5, 1, 1), (5,)),
        ((7, 4, 6), "auto", (1, 4, 6), None),
        ((7, 4, 6), "signals", (4, 1, 6), (4, 6)),
        ((7, 6), "signals", (1, 1, 6), (1, 6)),
        ((7, 8, 8, 3), "auto", (3, 8, 8), None),
        ((7, 8, 8, 5), "images-last", (5, 8, 8), None),
        ((7, 4, 5, 6), "volumes", (1, 20, 6), (1, 4, 5, 6)),
        ((7, 2, 4, 5, 6), "auto", (2, 20, 6), (2, 4, 5, 6)),
    ],
)
def test_every_array_becomes_records_of_channels_and_back(
    shape: tuple[int, ...], layout: Any, inside: tuple[int, ...], outside: tuple[int, ...] | None
) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    laid = laid_out(values, layout, "data")
    assert laid.records.shape == (7, *inside) and laid.shape == outside
    again, one = fitted(values, inside, outside), fitted(values[2], inside, outside)
    assert again is not None and np.array_equal(again, laid.records)
    assert one is not None and np.array_equal(one[0], laid.records[2])
    if outside is not None:
        assert np.array_equal(laid.records.reshape(7, *outside).ravel(), values.ravel())


# -- scale and units


@pytest.mark.slow
def test_other_floats_are_standardized_by_the_training_part_and_keep_their_units(run: Path) -> None:
    data = load_breast_cancer().data
    config = dist_ae.load(run).config
    assert (
        config.data.scale == "standard" and config.model.record_shape == (30,) and len(config.data.columns or ()) == 30
    )
    dataset = load(config.data)
    train = data[dataset.train.rows]
    scaling = dataset.train.scaling
    assert scaling is not None
    np.testing.assert_allclose(scaling.offset.ravel(), train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scaling.scale.ravel(), train.std(0), rtol=1e-5)
    model = dist_ae.load(run)
    seen = model.reconstruct(data).numpy()
    share = ((seen - data) / train.std(0)) ** 2
    assert seen.shape == data.shape and 0.01 < share.mean() < 1
    found = json.loads((run / "result.json").read_text())["metrics"]
    last = dist_ae.load(run, "last").reconstruct(data[dataset.val.rows]).numpy()
    held_out = data[dataset.val.rows]
    assert found["val.mse"] == pytest.approx((((last - held_out) / train.std(0)) ** 2).mean(), rel=1e-3)
    squares = (((held_out - train.mean(0)) / train.std(0)) ** 2).mean()
    assert found["val.r2"] == pytest.approx(1 - found["val.mse"] / squares, rel=1e-3)
    assert "val.psnr" not in found


def test_a_scale_that_shifts_and_stretches_the_data_changes_nothing(tmp_path: Path) -> None:
    data, losses = load_wine().data, []
    for name, values in {"own": data, "shifted": data * 1000 - 7}.items():
        config = PRESETS["table"].override({**SMALL, "precision": "fp64", "run_dir": tmp_path / name})
        dist_ae.train(config, data=values)
        losses.append([line["mse"] for line in metrics(tmp_path / name, "val")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # float32 records: 1000 x - 7 is rounded anew


def test_columns_without_variance_are_carried_as_constants(tmp_path: Path) -> None:
    data = np.column_stack([load_wine().data, np.full(178, 1234.5)])
    result = dist_ae.train(PRESETS["table"].override({**SMALL, "run_dir": tmp_path / "run"}), data=data)
    seen = dist_ae.load(result.run_dir).reconstruct(data)
    assert (seen[:, -1] - 1234.5).abs().max() < 0.05


def test_16_bits_stay_16_bits_and_bytes_stay_on_0_1(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 65536, (40, 6, 6)).astype(np.uint16)
    dataset = load(DataConfig(name=f"array:{_saved(tmp_path, images)}"))
    from dist_ae.data.reader import Reader

    reader = Reader(dataset.train, torch.device("cpu"), torch.float64)
    rows = np.asarray(dataset.train.rows)
    taken = reader.take(torch.arange(len(rows)))
    np.testing.assert_array_equal(taken.numpy()[:, 0], images[rows] / 65535)
    config = PRESETS["ae"].override({**SMALL, "train.batch_size": 16, "train.steps": 5, "run_dir": tmp_path / "run"})
    assert dist_ae.train(config, data=images).metrics["val.psnr"] > 5


def _saved(folder: Path, array: Any) -> Path:
    np.save(folder / "own.npy", array)
    return folder / "own.npy"


# -- never worse than PCA


@pytest.mark.parametrize("rate", [1e-7, 10.0])
def test_a_run_that_starts_as_pca_is_never_worse_on_held_out_rows(rate: float, tmp_path: Path) -> None:
    config = PRESETS["table"].override({**SMALL, "optim.lr": rate, "run_dir": tmp_path / "run", "train.eval_every": 20})
    result = dist_ae.train(config, data=load_wine().data)
    steps = {line["step"]: line["mse"] for line in metrics(tmp_path / "run", "val")}
    assert steps[0] == pytest.approx(result.metrics["val.pca_mse"], rel=1e-4)  # the start is PCA, and is evaluated
    assert min(steps.values()) <= steps[0] and steps[result.best_step] == min(steps.values())
    used = dist_ae.load(tmp_path / "run")
    assert used.source == (tmp_path / "run", result.best_step)


# -- missing entries


@pytest.mark.slow
def test_missing_entries_are_the_mean_count_nothing_and_come_back_filled_in(tmp_path: Path) -> None:
    data = load_wine().data.copy()
    gaps = np.random.default_rng(0).random(data.shape) < 0.1
    with_gaps = np.where(gaps, np.nan, data)
    with pytest.raises(
        InputError, match=r"value nan at row \d+, column \d+; numbers must be finite; data.missing mask"
    ):
        dist_ae.train(PRESETS["table"].override({**SMALL, "run_dir": tmp_path / "refused"}), data=with_gaps)
    values = {**SMALL, "data.missing": "mask", "train.steps": 300, "run_dir": tmp_path / "run"}
    result = dist_ae.train(PRESETS["table"].override(values), data=with_gaps)
    model = dist_ae.load(tmp_path / "run")
    filled = model.reconstruct(with_gaps).numpy()
    assert np.isfinite(filled).all() and result.metrics["val.mse"] < 1
    scale = np.nanstd(with_gaps, 0)
    error = (((filled - data) / scale) ** 2)[gaps].mean()
    mean_error = (((np.nanmean(with_gaps, 0) - data) / scale) ** 2)[gaps].mean()
    assert error < 0.8 * mean_error  # imputed better than by the mean
    # What a missing entry "is" changes nothing: the score is over the others.
    assert model.contributions(with_gaps).numpy()[gaps].max() == 0


@pytest.mark.slow
def test_a_table_with_missing_entries_follows_the_float64_rule_on_1_2_and_3_processes(tmp_path: Path) -> None:
    name = f"table:{table(tmp_path / 'gaps.csv', 200, missing=0.05)}"
    values = {**SMALL, "data.name": name, "data.label": "kind", "data.missing": "mask", "precision": "fp64"}
    values |= {"train.steps": 50, "optim.eps": 1e-3, "data.cache": str(tmp_path / "cache"), "train.log_every": 1}
    for world in (1, 2, 3):
        job = {"preset": "table", "overrides": {**values, "run_dir": str(tmp_path / str(world))}}
        train_jobs(world, [job], tmp_path)
    one = weights(tmp_path / "1")
    for world in (2, 3):
        assert relative_difference(weights(tmp_path / str(world)), one) < 1e-10
        for line, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / str(world)), strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-10)


# -- tables


BAD_TABLES: dict[str, tuple[str | bytes, str]] = {
    "a broken row": ("a,b\n1,2\n3\n", r"row 2 has 1 entries, and the header has 2"),
    "mixed types": ("a,b\n1,2\n" + "3,4\n" * 3 + "5,x\n", r"column 'b'"),
    "late text": ("a,b\n" + "1,2\n" * 2_500_000 + "5,x\n", r"'x' in column 'b' of row 2500001 is no number"),
    "no numeric column": ("a,b\nx,y\nz,w\n", "no numeric column"),
    "one row": ("a,b\n1,2\n", "1 row; at least 2"),
    "no row": ("a,b\n", "0 rows; at least 2"),
    "empty": ("", "empty"),
    "duplicate names": ("a,a\n1,2\n3,4\n", "two columns are called 'a'"),
    "infinities": ("a,b\n1,2\n3,inf\n", r"inf in column 'b' of row 2"),
    "decimal commas": ("a;b\n1,5;2,5\n3,5;4\n", r"column 'a' \(and 1 more\) holds decimal commas|no numeric column"),
    "missing": ("a,b\n1,2\n3,\n5,6\n", r"row 2, column 'b'"),
    "dates": ("a,b\n1,2024-01-01\n2,2024-01-02\n", r"column 'b' holds dates or times"),
    "text beside numbers": ("a,b\n1,x\n2,y\n", r"column 'b' holds text.*--data.exclude \"b\""),
    "beyond float32": ("a,b\n1,2\n3,1e300\n", "beyond float32"),
    "not UTF-8": (b"a,b\n1,\xff\n2,3\n", "UTF-8|column 'b'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD_TABLES)
def test_a_bad_table_is_one_sentence_with_file_row_and_column(kind: str, tmp_path: Path) -> None:
    content, expected = BAD_TABLES[kind]
    (tmp_path / "bad.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as error:
        load(DataConfig(name=f"table:{tmp_path / 'bad.csv'}", cache=tmp_path / "cache"))
    assert "\n" not in str(error.value)
    packed = list((tmp_path / "cache").glob("tables/*/records.npy"))
    assert not packed or kind == "missing"  # a whole table, which data.missing mask takes


def test_a_table_of_too_many_columns_a_bom_and_other_separators(tmp_path: Path) -> None:
    wide = ",".join(f"c{i}" for i in range(10_001)) + "\n" + (",".join("1" * 10_001) + "\n") * 2
    (tmp_path / "wide.csv").write_text(wide)
    with pytest.raises(InputError, match="10,001 columns are more than 10,000"):
        load(DataConfig(name=f"table:{tmp_path / 'wide.csv'}", cache=tmp_path / "cache"))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfa;b\n1;2\n3;4\n5;9\n")
    dataset = load(DataConfig(name=str(tmp_path / "bom.csv"), cache=tmp_path / "cache"))
    assert dataset.columns == ("a", "b") and len(dataset.train) + len(dataset.val) == 3


def test_csv_and_parquet_of_the_same_rows_are_the_same_data(tmp_path: Path) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    path = table(tmp_path / "one.csv")
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), tmp_path / "one.parquet", row_group_size=100)
    both = [
        load(DataConfig(name=f"table:{tmp_path / name}", label="kind", cache=tmp_path / "cache"))
        for name in ("one.csv", "one.parquet")
    ]
    assert both[0].fingerprint == both[1].fingerprint and both[0].columns == both[1].columns
    assert both[0].classes == ("malignant", "benign")
    chosen = DataConfig(
        name=f"table:{tmp_path / 'one.csv'}", columns=("mean area", "mean radius"), cache=tmp_path / "cache"
    )
    assert load(chosen).columns == ("mean area", "mean radius")


# -- uses


def test_a_table_goes_through_every_use_in_its_own_units_and_names(run: Path, tmp_path: Path) -> None:
    source = str(run.parent / "cancer.csv")
    data = load_breast_cancer()

    def rows(path: Path) -> list[dict[str, str]]:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    codes = rows(commands.embed_run(run, source, tmp_path / "codes.csv"))
    assert (
        len(codes) == 569 and codes[0]["label"] == "malignant" and codes[568]["row"] == "568" and "code_2" in codes[0]
    )
    seen = rows(commands.reconstruct_run(run, source, tmp_path / "seen.csv"))
    own = dist_ae.load(run).reconstruct(data.data)
    assert float(seen[5]["mean area"]) == pytest.approx(float(own[5, 3]), rel=1e-5)
    from dist_ae.use.commands import score_run

    odd = data.data[:50].copy()
    odd[7, 3] = 1e5  # an area that no cell has
    np.save(tmp_path / "odd.npy", odd)
    scored = score_run(run, str(tmp_path / "odd.npy"), tmp_path / "scores.csv")
    found = rows(tmp_path / "scores.csv")
    assert int(scored.scores.argmax()) == 7 and found[7]["flagged"] == "True" and found[7]["odd_1"] == "mean area"
    page = commands.explore_run(run, None, tmp_path / "page.html").read_text()
    assert "mean area" in page and "http" not in page.replace("http-equiv", "")
    with pytest.raises(InputError, match="would replace the images it is made of"):
        commands.reconstruct_run(run, source, run.parent / "cancer.csv")
    with pytest.raises(InputError, match="would replace the images it is made of"):  # also where they are not given
        commands.embed_run(run, None, run.parent / "cancer.csv")
    for wrong, expected in (("pictures.png", "ends in .csv"), ("folder", "ends in .csv")):
        with pytest.raises(InputError, match=expected):
            commands.reconstruct_run(run, source, tmp_path / wrong)
    with pytest.raises(InputError, match="heat maps are for images"):
        score_run(run, source, tmp_path / "s.csv", maps=tmp_path / "maps")
    with pytest.raises(InputError, match=r"takes rows of 30 columns, \[N, 30\], got \[4, 29\]"):
        dist_ae.load(run).embed(data.data[:4, :29])


@pytest.mark.slow
def test_evaluate_says_r2_by_column_beside_pca(run: Path, tmp_path: Path) -> None:
    done = cli("evaluate", str(run), "--out", str(tmp_path / "e.json"))
    assert done.returncode == 0 and "columns with the lowest r2" in done.stdout, done.stderr
    found = json.loads((tmp_path / "e.json").read_text())
    assert set(found["columns"]["mean area"]) == {"r2", "pca_r2"} and not found["denoising"]
    dataset = load(dist_ae.load(run).config.data)
    held_out, model = load_breast_cancer().data[dataset.val.rows], dist_ae.load(run)
    mean = load_breast_cancer().data[dataset.train.rows].mean(0)
    error = ((model.reconstruct(held_out).numpy() - held_out) ** 2).sum(0)
    r2 = 1 - error / ((held_out - mean) ** 2).sum(0)
    assert found["columns"]["mean area"]["r2"] == pytest.approx(r2[3], rel=1e-3)


@pytest.mark.slow
def test_an_exported_table_takes_and_gives_its_own_units(run: Path, tmp_path: Path) -> None:
    import onnxruntime

    data = load_breast_cancer().data[:9].astype(np.float32)
    path, *_ = commands.export_run(run, tmp_path / "model.onnx", format="onnx")
    seen, code = onnxruntime.InferenceSession(path).run(None, {"records": data})
    model = dist_ae.load(run)
    scale = load_breast_cancer().data.std(0)
    assert np.abs((seen - model.reconstruct(data).numpy()) / scale).max() < 1e-3
    assert np.abs(code - model.embed(data).numpy()).max() < 1e-3
    folder, *_ = commands.export_run(run, tmp_path / "folder", format="safetensors")
    assert torch.equal(dist_ae.load(folder).reconstruct(data), model.reconstruct(data))


def test_frames_choose_their_columns_by_name(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    data = load_breast_cancer(as_frame=True).data
    model = dist_ae.load(run)
    mixed = data[data.columns[::-1]].assign(more="text")
    assert torch.equal(model.embed(mixed), model.embed(data))
    with pytest.raises(InputError, match="no column 'mean area'"):
        model.embed(data.drop(columns="mean area"))
    assert isinstance(data, pandas.DataFrame)


@pytest.mark.slow
def test_signals_and_volumes_go_through_the_mlp_and_a_convolution_refuses_volumes(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    phase = chance.random((120, 2, 1)) * 6
    signals = np.sin(np.linspace(0, 12, 50) + phase) * 40 + 100
    values = {**SMALL, "data.layout": "signals", "run_dir": tmp_path / "signals", "train.steps": 200}
    result = dist_ae.train(PRESETS["table"].override(values), data=signals)
    model = dist_ae.load(result.run_dir)
    assert model.reconstruct(signals).shape == (120, 2, 50) and result.metrics["val.mse"] < 0.7
    volumes = chance.normal(size=(60, 1, 4, 5, 6))
    result = dist_ae.train(PRESETS["table"].override({**SMALL, "run_dir": tmp_path / "volumes"}), data=volumes)
    assert dist_ae.load(result.run_dir).reconstruct(volumes).shape == volumes.shape
    with pytest.raises(InputError, match=r"volumes.*mlp"):
        dist_ae.train(PRESETS["conv"].override({"run_dir": tmp_path / "conv"}), data=volumes)
    with pytest.raises(InputError, match=r"rows of 13 columns.*mlp"):
        dist_ae.train(PRESETS["conv"].override({"run_dir": tmp_path / "conv"}), data=load_wine().data)


@pytest.mark.slow
def test_a_killed_table_resumes_to_the_same_bits(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", 200)
    values = {**SMALL, "data.name": f"table:{path}", "data.label": "kind", "data.cache": tmp_path / "cache"}
    values |= {"train.eval_every": 20, "train.patience": None}

    def train(rank: int, name: str, stop: int | None) -> None:
        from unittest import mock

        from dist_ae import step

        real = step.Learner.step

        def dying(self: Any, number: int) -> None:
            if number == stop:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGKILL)
            real(self, number)

        with mock.patch.object(step.Learner, "step", dying):
            dist_ae.train(PRESETS["table"].override({**values, "run_dir": tmp_path / name}))

    assert Forked(1, lambda rank: train(rank, "plain", None), tmp_path / "a").wait() == [0]
    assert Forked(1, lambda rank: train(rank, "killed", 50), tmp_path / "b").wait() == [-9]
    assert Forked(1, lambda rank: train(rank, "killed", None), tmp_path / "c").wait() == [0]
    plain, killed = weights(tmp_path / "plain"), weights(tmp_path / "killed")
    assert all(torch.equal(plain[name], killed[name]) for name in plain) and "units_scale" in plain


# -- larger than memory


@pytest.mark.slow
def test_packing_a_parquet_holds_a_small_part_of_it_in_memory(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {f"c{i}": np.random.default_rng(i).random(600_000, np.float32) for i in range(20)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "large.parquet", row_group_size=25_000)
    script = (
        "import sys, pyarrow; from dist_ae.config import DataConfig; from dist_ae.data.tables import *; "
        "pack_table(Table(sys.argv[1], DataConfig()), Path(sys.argv[2])); "
        "print(pyarrow.default_memory_pool().max_memory())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "large.parquet"), str(tmp_path / "out")]
    most = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert most < (tmp_path / "large.parquet").stat().st_size / 2  # pyarrow's own reading ahead takes all of it
    _, packed, _ = open_packed_table(tmp_path / "out")
    np.testing.assert_array_equal(packed, np.stack(list(columns.values()), 1))


@pytest.mark.slow
def test_a_large_table_stays_mapped_and_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, found = f"table:{table(tmp_path / 'cancer.csv', missing=0.02)}", []
    for most in (reader.MOST_COPIED, 0):
        monkeypatch.setattr(reader, "MOST_COPIED", most)
        own = {"data.name": name, "data.label": "kind", "data.missing": "mask", "data.cache": tmp_path / "cache"}
        config = PRESETS["table"].override({**SMALL, **own, "precision": "fp64", "run_dir": tmp_path / str(most)})
        dataset = load(config.data)
        held = reader.Reader(dataset.train, torch.device("cpu")).held
        assert held.endswith("memory-mapped") == (most == 0)
        found.append(dist_ae.train(config).metrics)
    assert found[0] == found[1]


@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_the_scale_of_numbers_far_from_0_keeps_every_digit(missing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = 1e6 + np.random.default_rng(0).standard_normal((1000, 3))
    values[np.random.default_rng(1).random(values.shape) < missing] = np.nan
    monkeypatch.setattr(records, "CHUNK_BYTES", 500)  # many chunks
    found = scaling_of(Split(values[:, :, None, None]), "standard", missing > 0)
    assert found is not None
    np.testing.assert_allclose(found.offset.ravel(), np.nanmean(values, 0), rtol=1e-14)
    np.testing.assert_allclose(found.scale.ravel(), np.nanstd(values, 0), rtol=1e-9)


@pytest.mark.parametrize("harm", ["link", "pipe", "short", "manifest", "other type"])
def test_a_packed_table_of_a_stranger_is_one_sentence(harm: str, tmp_path: Path) -> None:
    import os

    config = DataConfig(name=str(table(tmp_path / "t.csv", 20)), label="kind", cache=tmp_path / "cache")
    load(config)
    (folder,) = (tmp_path / "cache" / "tables").glob("t.csv-*[0-9a-f]")
    records = folder / "records.npy"
    if harm in ("link", "pipe"):
        records.rename(tmp_path / "moved.npy")
        records.symlink_to(tmp_path / "moved.npy") if harm == "link" else os.mkfifo(records)
    elif harm == "short":
        os.truncate(records, 200)
    elif harm == "manifest":
        (folder / "records.json").write_text('{"format": 1, "rows": -5, "columns": [1]}')
    else:
        np.save(records, np.zeros((20, 30)))
    with pytest.raises(InputError, match=r"damaged|holds float64|symbolic link|not a regular file"):
        load(DataConfig(name=f"packed:{folder}"))


# -- packed by hand


@pytest.mark.slow
def test_tables_and_arrays_are_packed_verified_and_trained_from(tmp_path: Path) -> None:
    data = load_breast_cancer().data.astype(np.float32)
    np.save(tmp_path / "own.npy", data)
    (tmp_path / "many").mkdir()
    for number, part in enumerate(np.array_split(data, 3)):
        np.save(tmp_path / "many" / f"{number}.npy", part)
    (tmp_path / "single").mkdir()
    for number, row in enumerate(data):
        np.save(tmp_path / "single" / f"{number:03}.npy", row)
    sources = {
        "csv": (f"table:{table(tmp_path / 'cancer.csv')}", "--label", "kind"),
        "npy": (str(tmp_path / "own.npy"),),
        "many": (str(tmp_path / "many"), "--each", "records"),
        "single": (str(tmp_path / "single"), "--each", "record"),
    }
    found = {}
    for name, (source, *options) in sources.items():
        out = tmp_path / "packed" / name
        assert "569 records of 30" in cli("pack", source, str(out), *options).stdout
        assert cli("doctor", str(out)).stdout.count("ok") >= 2
        own = {**SMALL, "data.name": f"packed:{out}", "run_dir": tmp_path / "runs" / name}
        found[name] = dist_ae.train(PRESETS["table"].override(own)).metrics
        assert dist_ae.load(tmp_path / "runs" / name).embed(f"packed:{out}").shape == (569, 3)
    assert found["csv"] == found["npy"] == found["many"] == found["single"]
    whole = bytearray((out / "records.npy").read_bytes())
    whole[-1] ^= 1
    (out / "records.npy").write_bytes(whole)
    damaged = cli("doctor", str(out))
    assert damaged.returncode == 1 and "records.npy is not what was written" in damaged.stdout
    refused = cli("train", "ae", "--data.name", f"folder:{tmp_path / 'many'}")
    assert refused.returncode == 2 and "dist-ae pack" in refused.stderr
    refused = cli("pack", str(tmp_path / "many"), str(tmp_path / "packed" / "which"))
    assert refused.returncode == 2 and "--each record" in refused.stderr
    assert not (tmp_path / "packed" / "which").exists()


def test_arrays_keep_their_type_and_shape_when_packed(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for kind in (np.uint8, np.uint16):
        images = draw.integers(0, np.iinfo(kind).max, (40, 2, 6, 5)).astype(kind)
        np.save(tmp_path / "own.npy", images)
        pack_arrays([tmp_path / "own.npy"], tmp_path / kind.__name__, None)
        dataset = load(DataConfig(name=f"packed:{tmp_path / kind.__name__}"))
        assert dataset.train.images.dtype == kind and dataset.scale == "none"
        np.testing.assert_array_equal(dataset.train.images, images)
    np.save(tmp_path / "own.npy", np.full((3, 2), 1e300))
    with pytest.raises(InputError, match=r"own.npy: the value 1e\+300 is beyond float32"):
        pack_arrays([tmp_path / "own.npy"], tmp_path / "beyond", None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["uint16", "uint8"]
