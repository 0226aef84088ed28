"""Whatever is trained, killed and resumed on whatever number of processes ends as the straight run."""

from __future__ import annotations

import os
from pathlib import Path

import fuzz
import pytest

pytestmark = pytest.mark.slow

FIRST = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 16))
def test_a_random_experiment_broken_at_random_ends_as_the_straight_run(seed: int, tmp_path: Path) -> None:
    fuzz.case(seed, tmp_path)
