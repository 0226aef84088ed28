"""Profiles some steps of a run with torch's profiler. The weights stay the same to the bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from dist_ae.terminal import say

ROWS = 40  # of the table


class Profile:
    """Profiles ``steps`` and writes a trace for chrome://tracing or Perfetto, and a table, into ``folder``.

    ``steps=None`` or ``folder=None`` (other ranks) profiles nothing.
    """

    def __init__(self, steps: range | None, folder: Path | None) -> None:
        self._steps, self._folder = steps, folder
        self._profiler: Any = None
        self.written: Path | None = None

    def before(self, step: int) -> None:
        """Called before each step: begins or ends the profile there."""
        if self._steps is None or self._folder is None:
            return
        if self._profiler is None and step in self._steps:
            devices = [torch.profiler.ProfilerActivity.CPU]
            devices += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = torch.profiler.profile(activities=devices)
            self._profiler.start()
        elif self._profiler is not None and step >= self._steps.stop:
            self.end()

    def end(self) -> None:
        """Writes the profile, if there is one."""
        if self._profiler is None or self._folder is None or self._steps is None:
            return
        profiler, self._profiler, steps = self._profiler, None, self._steps
        self._steps = None
        profiler.stop()
        name = f"{steps.start}-{steps.stop}"
        sort_by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / f"trace-{name}.json"))
            table = self._folder / f"table-{name}.txt"
            table.write_text(profiler.key_averages().table(sort_by=sort_by, row_limit=ROWS) + "\n")
        except (OSError, RuntimeError) as error:  # a profile never fails a run
            say(f"warning: the profile could not be written: {error}", sys.stderr)
        else:
            self.written = table

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
