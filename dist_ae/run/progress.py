"""The progress of a run: a bar in a terminal, plain lines elsewhere, on rank 0 only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dist_ae.terminal import say, time_left
from dist_ae.timeline import Timeline

HOSTS = 16  # most hosts that are shown
QUIET_SECONDS = 30.0  # without a line, after which one reports the step; nobody waits a minute for the first


def processes_table(
    places: Sequence[tuple[str, str]], shares: Sequence[int], precision: str, exchange: str
) -> list[str]:
    """The processes of a run, with one line per host, and how they exchange gradients.

    Args:
        places: host and device of each process, by rank.
        shares: images of a batch that each process computes, by rank.
        exchange: of the gradients, in words.
    """
    by_host: dict[str, list[int]] = {}
    for rank, (host, _) in enumerate(places):
        by_host.setdefault(host, []).append(rank)
    rows = [("host", "ranks", "devices", "images of a batch")]
    for host, ranks in list(by_host.items())[:HOSTS]:
        contiguous = len(ranks) > 1 and ranks[-1] - ranks[0] + 1 == len(ranks)
        listed = f"{ranks[0]}-{ranks[-1]}" if contiguous else " ".join(map(str, ranks))
        devices, images = _counted([places[rank][1] for rank in ranks]), _counted([shares[rank] for rank in ranks])
        rows.append((host, listed, devices, images))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(by_host) > HOSTS:
        lines.append(f"… and {len(by_host) - HOSTS} more hosts")
    total = f"{len(places)} processes on {len(by_host)} host{'s' if len(by_host) > 1 else ''}"
    return [*lines, f"{total} share a batch of {sum(shares):,}, {precision}; gradients: {exchange}"]


def _counted(values: Sequence[object]) -> str:
    return " + ".join(f"{count} × {value}" for value, count in Counter(values).items())


class Display:
    """Shows a run's progress. ``visible=False`` (other ranks) shows nothing.

    ``denoises``: the run trains to remove noise, so the error of denoising is shown, too.
    """

    def __init__(self, visible: bool, step: int, total_steps: int, denoises: bool = False) -> None:
        self._denoises = denoises
        self._visible, self._console, self._stack = visible, Console(), ExitStack()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_step, self._total = step, total_steps
        self._started: float | None = None  # when the first step was taken
        self._last_line, self._pause = time.monotonic(), QUIET_SECONDS
        if visible and self._console.is_terminal:
            columns = (
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = self._stack.enter_context(Progress(*columns, console=self._console, transient=True))
            self._task = self._bar.add_task("train", total=total_steps, completed=step, note="")

    def say(self, text: str) -> None:
        """Prints one line."""
        if not self._visible or not text:
            return
        self._last_line = time.monotonic()
        if self._bar is None:
            say(text)
        else:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stepped(self, step: int) -> None:
        """Called after every step: after a while without output, reports the step. Never reads from the device.

        Each silence is twice as long as the one before, up to ten minutes, so a long run writes few such lines.
        """
        now = time.monotonic()
        if self._started is None:
            self._started, self._first_step = now, step
        if not self._visible or now - self._last_line < self._pause:
            return
        self._pause = min(2 * self._pause, 600.0)
        if self._bar is None:
            self.say(f"step {step}/{self._total}{self._left(step)}")
        else:
            self._last_line = now
            self._bar.update(self._task, completed=step)

    def _left(self, step: int) -> str:
        if self._started is None:
            return ""
        return time_left(time.monotonic() - self._started, step - self._first_step, self._total - step)

    def advance(self, step: int, loss: float, images_per_second: float) -> None:
        """Moves the bar. Called at logging steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=f"loss {loss:,.2f} · {images_per_second:,.0f} images/s")

    def evaluated(self, step: int, timeline: Timeline, metrics: Mapping[str, float], images_per_second: float) -> None:
        """Prints one line per evaluation."""
        shown = {"mse": f"{metrics['mse']:.5f}"}
        if "r2" in metrics:
            shown["r2"] = f"{metrics['r2']:.4f}"
        else:
            shown["psnr"] = f"{metrics['psnr']:.2f} dB"
        if "neg_elbo" in metrics:
            shown["-ELBO"] = f"{metrics['neg_elbo']:.2f} nats"
        if self._denoises and "r2" in metrics:
            shown["denoised mse"] = f"{metrics['denoised_mse']:.5f}"
        elif self._denoises:
            shown["denoised"] = f"{metrics['denoised_psnr']:.2f} dB"
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        where = f"epoch {timeline.epochs_done(step):<5g} step {step}/{timeline.total_steps}"
        speed = f"  {images_per_second:,.0f} images/s{self._left(step)}" if step else ""
        self.say(f"{where}  val {text}{speed}")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
