"""Measures what each process spends its time on. Needs no communication; `pause` waits for the device."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dist_ae import devices

PARTS = ("data", "communication", "evaluation", "saving", "all")


class Clock:
    """Seconds spent on each of ``PARTS``, and images per second of training.

    On a CPU, ``communication`` is the time to exchange gradients, including the wait for the slowest process. On a GPU
    the host does not see it, so it counts as computing.
    """

    def __init__(self, device: torch.device) -> None:
        self.images, self._device = 0, device
        self._trained, self._part = 0.0, "other"
        self._since = self._last = time.perf_counter()
        self._spent = dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        """Training begins or resumes."""
        self._switch_to("training")

    def pause(self, part: str) -> None:
        """Training pauses for an evaluation or a checkpoint.

        Waits for the device, so that its outstanding work counts as training.
        """
        if self._part == "training":
            devices.wait_for(self._device)
        self._switch_to(part)

    def _switch_to(self, part: str) -> None:
        now = time.perf_counter()
        if self._part == "training":
            self._trained += now - self._since
        elif self._part in self._spent:
            self._spent[self._part] += now - self._since
        self._part, self._since = part, now

    def count(self, part: str, since: float) -> None:
        """Counts the seconds from ``since`` (of ``time.perf_counter``) until now towards a part of training."""
        self._spent[part] += time.perf_counter() - since

    def rate(self) -> float:
        """Images per second of training over all processes since this process began."""
        running = time.perf_counter() - self._since if self._part == "training" else 0.0
        return self.images / max(self._trained + running, 1e-9)

    def take(self) -> list[float]:
        """Seconds spent on each of ``PARTS`` since the last call; the last is all the time."""
        now = time.perf_counter()
        self._spent["all"], self._last = now - self._last, now
        seconds = [self._spent[part] for part in PARTS]
        self._spent = dict.fromkeys(PARTS, 0.0)
        return seconds


def shares(seconds_by_rank: Sequence[Sequence[float]]) -> dict[str, float]:
    """Combines the clocks of all processes: each part as a share of the time, and the slowest process.

    Args:
        seconds_by_rank: ``Clock.take`` of each rank, [world][part].

    Returns:
        ``time_data``, ``time_compute`` (all other time), ``time_evaluation`` and ``time_saving``. If the exchange of
        gradients was measured, also ``time_communication``. These shares add up to 1. Then also ``slowest_rank``, the
        rank that waits least for others, and ``slowest_costs``, the share of the time that a process waits for it on
        average.
    """
    *parts, total = (sum(column) for column in zip(*seconds_by_rank, strict=True))
    share = {name: seconds / max(total, 1e-9) for name, seconds in zip(PARTS[:-1], parts, strict=True)}
    metrics = {"time_data": share["data"], "time_compute": max(0.0, 1 - sum(share.values()))}
    metrics |= {f"time_{name}": share[name] for name in PARTS[1:-1] if name != "communication" or share[name]}
    waits = [row[PARTS.index("communication")] for row in seconds_by_rank]
    if len(waits) > 1 and max(waits) > 0:
        metrics["slowest_rank"] = waits.index(min(waits))
        metrics["slowest_costs"] = (sum(waits) / len(waits) - min(waits)) * len(waits) / max(total, 1e-9)
    return metrics
