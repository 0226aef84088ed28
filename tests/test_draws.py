"""Random draws are a function of seed, stream, step and row, the same on every device, and random where it matters."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import environment

from dist_ae.draws import DrawShapes, Step, draw, mask, normal
from dist_ae.draws.philox import LEVELS, normal_table, threshold
from dist_ae.presets import PRESETS

CPU = torch.device("cpu")
EVERYTHING = PRESETS["vae"].override({"objective.noise_std": 0.2, "model.dropout": 0.3})
SHAPES = DrawShapes(noise=(1, 4, 5), masks=((16,), (7,), (3, 2, 2)), epsilon=(5,))


def test_draws_of_rows_are_the_rows_of_the_whole_batch() -> None:
    whole = draw(SHAPES, Step(7), range(100), CPU, seed=0, std=0.2, keep=0.7)
    for rows in (range(32), range(32, 64), range(5, 9), range(31, 65), range(90, 100), range(10, 10), range(99, 100)):
        part = draw(SHAPES, Step(7), rows, CPU, seed=0, std=0.2, keep=0.7)
        for a, b in zip(
            [part.noise, part.epsilon, *part.masks], [whole.noise, whole.epsilon, *whole.masks], strict=True
        ):
            assert a is not None and b is not None
            assert torch.equal(a, b[rows.start : rows.stop])
            assert a.shape[1:] == b.shape[1:]


def test_masks_average_to_exactly_one_and_take_two_values() -> None:
    for keep in (0.9, 0.7, 0.5, 1 / 3, 1e-9, 1 - 1e-9):
        limit = threshold(keep)
        assert limit * np.float32(LEVELS / limit) / LEVELS == pytest.approx(1, rel=1e-7)
        values = mask(0, "mask", Step(0), range(500), (40,), CPU, keep)
        assert set(values.unique().tolist()) <= {0.0, float(np.float32(LEVELS / limit))}
    # 4 million units: their share is within 5 standard deviations of what was asked for, which a fault of 0.12 % would
    # miss.
    kept = mask(1, "mask", Step(2), range(10_000), (400,), CPU, 0.7).ne(0).double().mean()
    assert float(kept) == pytest.approx(0.7, abs=5 * (0.21 / 4e6) ** 0.5 + 1 / LEVELS)


def test_normals_have_the_moments_and_tails_of_a_normal_distribution() -> None:
    values = normal(0, "noise", Step(0), range(20_000), (200,), CPU).double().flatten()  # 4 million
    n = len(values)
    # Five standard errors each: a mean off by 0.25 %, a variance off by 0.36 %, a kurtosis off by 0.012 would be
    # noticed.
    assert abs(float(values.mean())) < 5 / n**0.5
    assert abs(float(values.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(values.pow(3).mean())) < 5 * (15 / n) ** 0.5
    assert abs(float(values.pow(4).mean()) - 2.998) < 5 * (96 / n) ** 0.5
    for at in (1.0, 2.0, 3.0, 4.0):
        beyond = torch.special.erfc(torch.tensor(at, dtype=torch.float64) / 2**0.5)
        found = float((values.abs() > at).double().mean())
        assert found == pytest.approx(float(beyond), abs=5 * float(beyond / n) ** 0.5 + 2 / LEVELS)
    assert float(normal_table().max()) == pytest.approx(4.33, abs=0.01)
    assert float(normal(0, "noise", Step(0), range(100), (200,), CPU, std=0.3).std()) == pytest.approx(0.3, rel=0.02)


def test_noise_of_unknown_strength_has_a_level_for_each_row_spread_evenly_between_its_ends() -> None:
    shapes = DrawShapes((1, 40, 40), (), None)
    rows = range(10_000, 14_000)
    noise = draw(shapes, Step(3), rows, CPU, seed=1, std=(0.02, 0.22)).noise
    assert noise is not None
    found = noise.flatten(1).double().square().mean(1).sqrt()
    # A level is found to 2 % from 1,600 values of a row; the levels are those of an even spread.
    order = found.sort().values
    expected = 0.02 + 0.2 * (torch.arange(len(rows)) + 0.5) / len(rows)
    assert float((order - expected).abs().max()) < 0.02
    part = draw(shapes, Step(3), range(12_000, 12_010), CPU, seed=1, std=(0.02, 0.22)).noise
    assert part is not None and torch.equal(part, noise[2000:2010])


def test_tables_of_other_seeds_streams_steps_and_rows_are_independent() -> None:
    # 200,000 values a table: a correlation of 1.2 % would be noticed.
    width, rows = 400, 500
    keys = list(itertools.product((0, 1, 2**62), ("noise", "epsilon"), (0, 1, 2**40)))
    tables = {key: normal(*key[:2], Step(key[2]), range(rows), (width,), CPU).double() for key in keys}
    tables["later rows"] = normal(0, "noise", Step(0), range(rows, 2 * rows), (width,), CPU).double()  # type: ignore[index]
    limit = 5 / (width * rows) ** 0.5
    for a, b in itertools.combinations(tables.values(), 2):
        assert abs(float((a * b).mean())) < limit
    table = tables[keys[0]]
    for lag in (1, 2, 3, 4, 16, width):  # neighbours in a word, in a block, in the next block, in the next row
        flat = table.flatten()
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < limit
    # Halves of one word are also independent in size: squares of neighbours do not go together.
    squares = table.flatten().square() - 1
    assert abs(float((squares[1:] * squares[:-1]).mean())) < 2 * limit


KERNEL = """
import torch, numpy as np
from dist_ae.draws import philox
from dist_ae.draws.philox_triton import draw_on_device
cpu = torch.device("cpu")
for seed, stream, step in ((0, 1, 0), (2**63 - 1, 2**64 - 1, 5), (7, 12345678901234567890, 2**33)):
    now = torch.tensor(step)
    for rows, width in ((range(0, 3), 16), (range(5, 9), 20), (range(100, 131), 33), (range(2), 1), (range(4, 4), 8)):
        for std in (1.0, 0.25, (0.02, 0.2)):
            ours = philox.numbers((seed, stream, step), rows, width, std)
            assert np.array_equal(ours, draw_on_device(seed, stream, now, rows, width, cpu, std, 1.0).numpy())
        for keep in (0.9, 1 / 3, 1.0):
            ours = philox.masks((seed, stream, step), rows, width, keep)
            assert np.array_equal(ours, draw_on_device(seed, stream, now, rows, width, cpu, None, keep).numpy())
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this build of torch comes without Triton")
def test_the_gpu_kernel_gives_the_cpus_draws_to_the_bit() -> None:
    # Triton's interpreter runs the kernel on the CPU; `make test-gpu` compares it on a GPU.
    command = [sys.executable, "-c", KERNEL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(TRITON_INTERPRET="1"), timeout=120)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]
