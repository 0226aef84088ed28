"""Records a run in metrics.jsonl, the trackers and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from dist_ae.run.directory import RunDirectory
from dist_ae.run.progress import Display
from dist_ae.run.tracking import Tracking
from dist_ae.timeline import Best, Timeline


class Records:
    """Records metrics, pictures and messages. Ranks other than 0 have no ``folder`` and ``tracking``: does nothing."""

    def __init__(
        self, folder: RunDirectory | None, tracking: Tracking | None, display: Display, timeline: Timeline
    ) -> None:
        self._folder, self._tracking, self._display, self._timeline = folder, tracking, display, timeline
        self._stack = ExitStack()

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """The means of training since the last call."""
        self._record("train", step, values)
        self._display.advance(step, values["loss"], values["images_per_second"])

    def stepped(self, step: int) -> None:
        """Called after every step, so that nobody waits long for a sign of life."""
        self._display.stepped(step)

    def validation(self, step: int, metrics: Mapping[str, float], best: Best, images_per_second: float) -> None:
        """An evaluation, the best one so far, and the speed of training."""
        self._record("val", step, metrics)
        self._display.evaluated(step, self._timeline, metrics, images_per_second)
        if self._tracking is not None:
            last = {f"last/val.{name}": value for name, value in metrics.items()}
            best_so_far = {"best/step": best.step, f"best/{best.metric}": best.value}
            self._tracking.summarize({**best_so_far, "last/step": step, **last})

    def picture(self, name: str, path: Path, step: int) -> None:
        """A picture that was drawn into the run directory."""
        if self._tracking is not None:
            self._tracking.log_image(name, path, step)

    def say(self, text: str) -> None:
        """A line for a person; an empty one is left out."""
        self._display.say(text)

    def warn(self, text: str) -> None:
        """A warning: something went wrong without ending the run."""
        if self._folder is not None:
            self._folder.warn(text)

    def _record(self, split: str, step: int, values: Mapping[str, float]) -> None:
        if self._folder is not None:
            epoch = self._timeline.epochs_done(step)
            self._folder.append_metrics({"step": step, "epoch": epoch, "split": split, **values})
        if self._tracking is not None:
            self._tracking.log({f"{split}/{name}": value for name, value in values.items()}, step)

    def __enter__(self) -> Records:
        self._stack.enter_context(self._display)
        if self._tracking is not None:
            self._stack.enter_context(self._tracking)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]
