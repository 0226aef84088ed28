"""Whatever stands in a configuration, an array's header or the environment: the outcome is a result or a sentence."""

from __future__ import annotations

import json
import os
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_ae.config import Config, InputError, load_config, parse
from dist_ae.data.sources import load
from dist_ae.files import Damaged, parse_json
from dist_ae.presets import PRESETS
from dist_ae.processes.environment import WORLD_NAMES, launched_world, use_cpu
from dist_ae.run.checkpoint import parse_tensors
from dist_ae.timeline import Asked, Best, State, Timeline, due

FAST = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
KEYS = [key for key, _ in Config().flat()]


@pytest.mark.slow
@FAST
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=20), ANYTHING, max_size=4))
def test_a_configuration_is_made_or_refused_naming_the_key(values: dict[str, Any]) -> None:
    try:
        config = PRESETS["ae"].override(values)
    except InputError as error:
        assert str(error)
        return
    # What is accepted can be written, read again and gives the same run.
    assert parse(json.loads(config.model_dump_json())) == config
    assert config.directory() == parse(json.loads(config.model_dump_json())).directory()


@pytest.mark.slow
@FAST
@given(st.binary(max_size=200) | st.builds(lambda value: json.dumps(value, default=str).encode(), ANYTHING))
def test_a_configuration_file_of_any_content_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    try:
        assert isinstance(load_config(path), Config)
    except InputError as error:
        assert "config.json" in str(error)


@pytest.mark.slow
@FAST
@given(
    st.sampled_from(["<", ">", "|", "="]),
    st.sampled_from(
        ["u1", "i1", "u2", "i8", "f2", "f4", "f8", "f16", "c8", "b1", "U3", "S2", "V4", "M8[s]", "O", "x9"]
    ),
    st.lists(st.integers(-2, 2**40) | st.integers(0, 6), max_size=5),
    st.booleans(),
    st.binary(max_size=400),
)
def test_an_array_file_with_any_header_gives_images_or_a_sentence(
    tmp_path: Path, order: str, kind: str, shape: list[int], fortran: bool, content: bytes
) -> None:
    header = f"{{'descr': '{order}{kind}', 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}".encode() + b"\n"
    path = tmp_path / "own.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)
    try:
        dataset = load(PRESETS["ae"].override({"data.name": f"array:{path}"}).data)
    except InputError as error:
        assert "own.npy" in str(error)
        return
    assert len(dataset.train) >= 1 and len(dataset.val) >= 1 and len(dataset.image_shape) == 3


@pytest.mark.slow
@FAST
@given(st.dictionaries(st.sampled_from([*WORLD_NAMES, "RANK", "MASTER_PORT", "LOCAL_RANK"]), st.text(max_size=5)))
def test_any_environment_is_understood_or_named(variables: dict[str, str]) -> None:
    variables = {key: value.replace("\0", "").encode(errors="ignore").decode() for key, value in variables.items()}
    with mock.patch.dict(os.environ, variables):
        try:
            rank, world = launched_world()
            assert 0 <= rank < world
        except InputError as error:
            assert str(error)


@FAST
@given(st.text(max_size=6))
def test_any_wish_for_the_cpu_is_understood_or_named(text: str) -> None:
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": text.replace("\0", "").encode(errors="ignore").decode()}):
        try:
            assert use_cpu() in (True, False)
        except InputError as error:
            assert "ACCELERATE_USE_CPU" in str(error)


@FAST
@given(st.binary(max_size=300) | st.builds(lambda h, b: struct.pack("<Q", len(h)) + h + b, st.binary(), st.binary()))
def test_any_bytes_are_tensors_or_damaged(data: bytes) -> None:
    for read in (parse_tensors, parse_json):
        try:
            assert isinstance(read(data, "file"), dict)
        except Damaged as error:
            assert str(error).startswith("file")


@FAST
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 200), st.integers(1, 50), st.integers(1, 50))
def test_a_timeline_sees_every_image_once_an_epoch(num: int, batch: int, total: int, evaluate: int, save: int) -> None:
    line = Timeline(num, min(batch, num), total, evaluate, save, 1)
    seen = [place for step in range(line.steps_per_epoch) for place in line.positions(step)]
    assert seen == list(range(num))
    assert line.evaluates(total) and line.saves(total) and not line.evaluates(0)


@FAST
@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.integers(1, 20),
    st.none() | st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_a_run_evaluates_saves_and_ends_where_it_is_due_however_often_it_is_stopped(
    total: int, evaluate: int, save: int, patience: int | None, seed: int
) -> None:
    # Walks the state machine as the loop does, with stops (which interrupt evaluations, too), saves by the clock, and
    # disks that take nothing in between, and resumes from what was saved.
    line = Timeline(100, 10, total, evaluate, save, 1)
    kept, evaluated_at, state, chance = State(), [], State(), random.Random(seed)
    while True:
        asked = Asked(stop=chance.random() < 0.2, save=chance.random() < 0.2)
        if due(line, state, patience, asked).evaluate:
            if chance.random() < 0.2:
                asked = Asked(stop=True)
            else:
                evaluated_at.append(state.step)
                value = chance.random()
                better = state.best is None or value < state.best.value
                best = Best(state.step, "val.mse", value) if better else state.best
                state = replace(state, evaluated=True, metrics={"mse": value}, best=best)
        now = due(line, state, patience, asked)
        assert not now.report or state.evaluated  # nothing is reported that was not measured
        assert not (asked.stop and now.evaluate)  # a stop does not wait for an evaluation
        if state.evaluated and state.best is not None and state.best.step == state.step:
            assert now.save  # the best weights are always on the disk
        if asked.stop or asked.save or now.end:
            assert now.save
        if now.save:
            kept = replace(state)
        if now.end and not asked.stop:
            break
        if asked.stop:
            state = State.of(json.loads(json.dumps(kept.to_json())))  # the same command again
            assert state == kept
            continue
        state = replace(state, step=state.step + 1, evaluated=False)
    assert evaluated_at == sorted(set(evaluated_at))  # nothing is evaluated twice
    assert set(evaluated_at) == {step for step in range(1, state.step + 1) if line.evaluates(step)}
    assert state.best is not None
    early = state.step < total
    assert not early or (patience is not None and state.step - state.best.step >= patience * evaluate)
