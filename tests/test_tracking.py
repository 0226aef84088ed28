"""Trackers get what metrics.jsonl gets, once a run, and never stop it.

What W&B really wrote is read back from its file.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from conftest import SMALL, forked, metrics
from PIL import Image

import dist_ae
from dist_ae.config import TrackingConfig
from dist_ae.figures import image_grid
from dist_ae.presets import PRESETS
from dist_ae.run.tracking import Tracking, wandb_mode


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB-style log (32 KiB blocks; each record crc32, length, type) of protobuf
    messages.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def history(run_dir: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(run_dir.glob("wandb/*run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows


@pytest.mark.slow
def test_weights_and_biases_gets_every_line_of_metrics_the_pictures_and_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = PRESETS["vae"].override(
        {**SMALL, "train.steps": 40, "train.log_every": 10, "tracking.wandb": "auto", "run_dir": str(tmp_path / "run")}
    )
    dist_ae.train(config)
    wandb.teardown()  # until then the last records may not be in the file
    rows = history(tmp_path / "run")
    for split in ("train", "val"):
        for line in metrics(tmp_path / "run", split):
            values = {f"{split}/{key}": value for key, value in line.items() if key not in ("step", "epoch", "split")}
            (row,) = [row for row in rows if row["_step"] == line["step"]]  # one row a step, train and val together
            assert {key: row[key] for key in values} == pytest.approx(values, rel=1e-12)
    assert {"loss", "reconstructions", "samples"} <= {key.split(".")[0] for row in rows for key in row}
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    kept = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb_id"]
    assert run.run_id == kept and run.project == "dist-ae" and run.display_name == config.label()
    assert list(run.tags) == ["vae", "digits", "mlp"]
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["best/step"] == result["best_step"] and summary["last/step"] == 40
    assert summary["last/val.neg_elbo"] == pytest.approx(result["metrics"]["val.neg_elbo"])
    assert f"wandb sync {tmp_path / 'run'}/wandb/offline-run-*" in capsys.readouterr().out
    logged = {
        item.key: json.loads(item.value_json)
        for r in records
        if r.WhichOneof("record_type") == "config"
        for item in r.config.update
    }
    logged |= {item.key: json.loads(item.value_json) for item in run.config.update}
    assert logged["config"]["model"]["latent_dim"] == 8


@pytest.mark.slow
def test_tensorboard_by_the_same_option(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = PRESETS["ae"].override(
        {**SMALL, "train.steps": 10, "tracking.tensorboard": True, "run_dir": str(tmp_path / "run")}
    )
    dist_ae.train(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in metrics(tmp_path / "run")]
    )
    assert "reconstructions" in events.Tags()["images"]
    (text,) = events.Tensors("configuration/text_summary")
    assert b'"latent_dim": 8' in text.tensor_proto.string_val[0]


@pytest.mark.slow
def test_a_slow_tracker_gets_each_picture_as_it_was_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn: list[Any] = []
    begin, log_image = Tracking._start, Tracking.log_image

    def begin_late(self: Tracking) -> list[Any]:
        while len(drawn) < 2:  # the second picture has replaced the first
            time.sleep(0.01)
        return begin(self)

    def seen(self: Tracking, name: str, path: Path, step: int) -> None:
        log_image(self, name, path, step)
        if name == "reconstructions":
            drawn.append(np.asarray(Image.open(path).convert("RGB")))

    monkeypatch.setattr(Tracking, "_start", begin_late)
    monkeypatch.setattr(Tracking, "log_image", seen)
    config = {"train.steps": 10, "train.eval_every": 5, "tracking.tensorboard": True, "run_dir": str(tmp_path / "run")}
    dist_ae.train(PRESETS["ae"].override({**SMALL, **config}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images("reconstructions")]
    assert len(drawn) == len(logged) == 2 and (drawn[0] != drawn[1]).any()
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(drawn, logged, strict=True))


def test_a_picture_that_no_longer_fits_on_the_disk_leaves_the_earlier_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "grid.png"

    def draw_twice(rank: int) -> None:
        image_grid(torch.rand(4, 1, 8, 8), path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError, match="large"):
            image_grid(torch.rand(4, 1, 8, 8), path)

    assert forked(1, draw_twice, tmp_path / "log") == [0], (tmp_path / "log-0.log").read_text()
    Image.open(path).load()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("setting", "variables", "netrc", "expected"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "", "online"),
        ("auto", {}, "machine api.wandb.ai login user password x", "online"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.example"}, "machine api.wandb.ai login user password x", "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "x"}, "", "off"),
        ("offline", {"WANDB_API_KEY": "x"}, "", "offline"),
        ("off", {"WANDB_API_KEY": "x"}, "", "off"),
    ],
)
def test_auto_is_online_where_a_key_is_configured_else_offline(
    setting: str, variables: dict[str, str], netrc: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    for name, value in {"NETRC": str(tmp_path / "netrc"), **variables}.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(TrackingConfig(wandb=setting))[0] == expected  # type: ignore[arg-type]
