"""Weights & Biases and TensorBoard through Accelerate's trackers, on rank 0.

They run in a thread of their own and never stop or slow training. ``metrics.jsonl`` is the record: what a tracker
misses can be rebuilt from it.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import queue
import re
import shlex
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from dist_ae.config import LONGEST, TrackingConfig
from dist_ae.terminal import first_line, say

INIT_SECONDS = 20  # how long a server may take to accept a run before it is kept offline
FINISH_SECONDS = 15  # how long the end of a run waits for trackers
LONGEST_TAG = 64  # most characters of a tag that W&B accepts
WHOLE = "dist-ae-last-step"  # in the folder of an offline run that ended in order: its last step
DELETED = r"\b409\b|previously created and deleted"  # in what a server says of a run's id
STOP_SECONDS = 4  # how long a stopped run waits for them, since stopping must not take longer than 10 s in all


def wandb_mode(config: TrackingConfig) -> tuple[str, str]:
    """(mode, why): online, offline or off. ``WANDB_MODE`` has the last word over ``auto``."""
    if config.wandb != "auto":
        return config.wandb, "as configured"
    wanted = os.environ.get("WANDB_MODE")
    if wanted:
        return {"disabled": "off", "dryrun": "offline"}.get(wanted, wanted), f"WANDB_MODE={wanted}"
    if os.environ.get("WANDB_API_KEY"):
        return "online", "WANDB_API_KEY is set"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, NetrcParseError):
        known = False
    return ("online", f"a key for {host} is configured") if known else ("offline", "no key is configured")


def server_answers(seconds: float = 5.0) -> str | None:
    """Why the W&B server cannot be used now, or None. Makes one request, since wandb itself retries for minutes."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        with urllib.request.urlopen(url, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}" if error.code >= 500 or error.code in (401, 403, 429) else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{url} does not answer ({error})"


class Tracking:
    """The trackers of one run. Every method returns at once and never raises."""

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        run_name: str,
        run_id: str,
        description: Mapping[str, Any],
        say: Callable[[str], None],
        tags: Sequence[str] = (),
        parts: Sequence[str] = (),
        again: str | None = None,
        renamed: Callable[[str], None] = lambda _: None,
        before: tuple[int, bytes] = (0, b""),
    ) -> None:
        """Args:
        before: the step that the run is resumed at, and its metrics.jsonl till there: W&B gets what it lacks of it.
        renamed: keeps another id, where the server takes the run's own no more.
        parts: patterns in the run directory where further offline runs lie that belong to this one.
        again: what to say where something was lost; left out, it is a run that can be rebuilt from its metrics.
        """
        self._config, self._run_dir, self._name, self._id = config, run_dir, run_name, run_id
        self._parts = ("wandb/offline-run-*", *parts)
        quoted = shlex.quote(str(run_dir))
        rebuilt = f"`dist-ae doctor {quoted} --replay-wandb` rebuilds an offline run from it"
        self._again, self._url = again or f"metrics.jsonl is complete, and {rebuilt}", ""
        self._description = description
        self._queue: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost = False
        self._renamed, self._before, self._last = renamed, before, before[0]
        self._say, self._tags = say, tuple(tag[:LONGEST_TAG] for tag in dict.fromkeys(tags) if tag)
        mode, why = wandb_mode(config)
        self._mode = mode
        if mode != "off":
            say(f"Weights & Biases: {mode} ({why}), run {run_id}")
        if mode != "off" or config.tensorboard:
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs the scalars of one step."""
        if self._thread is not None:
            self._queue.put(("log", (dict(values), step)))

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Logs a picture that was drawn into the run directory. It is read now, since the next one replaces it."""
        if self._thread is None:
            return
        try:
            self._queue.put(("image", (name, path.read_bytes(), step)))
        except OSError as error:
            self._give_up(f"the picture {path.name}", error)

    def summarize(self, values: Mapping[str, float | str]) -> None:
        """Logs figures of the whole run; later ones replace earlier ones. TensorBoard has no place for them."""
        if self._thread is not None:
            self._queue.put(("summary", (dict(values),)))

    def log_page(self, name: str, page: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Logs a page that stands alone, and tables as rows of cells by column. TensorBoard has no place for them."""
        if self._thread is not None:
            self._queue.put(("page", (name, page, tables)))

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.finish(FINISH_SECONDS if kind is None else STOP_SECONDS)

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """Ends the trackers, waiting no longer than ``seconds`` for them."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive() or self._lost:
            say(f"warning: not everything reached the trackers; {self._again}", sys.stderr)
        if self._thread.is_alive():
            _forget_wandb()
        elif self._mode == "offline" and any(self._run_dir.glob(self._parts[0])):
            # The patterns match the folders of all resumes, which wandb joins by the run's id.
            there = [part for part in self._parts if any(self._run_dir.glob(part))]
            paths = " ".join(f"{shlex.quote(str(self._run_dir))}/{part}" for part in there)
            self._say(f"Weights & Biases: to upload, wandb sync {paths}")
        elif self._url:
            self._say(f"Weights & Biases: {self._url}")
        self._thread = None

    # -- in the thread

    def _work(self) -> None:
        try:
            trackers = self._start()
        except BaseException as error:  # a thread that dies says so in a traceback, and nothing is tracked
            self._give_up("the trackers", error)
            trackers = []
        while (item := self._queue.get()) is not None:
            kind, arguments = item
            for tracker in list(trackers):
                try:
                    if kind == "log":
                        values, step = arguments
                        tracker.log(values, step=step)
                        self._last = step
                    elif kind in ("summary", "page") and tracker.name != "wandb":
                        continue
                    elif kind == "summary":
                        tracker.tracker.summary.update(*arguments)
                    elif kind == "page":
                        _log_page(tracker.tracker, *arguments)
                    else:
                        self._log_image(tracker, *arguments)
                except BaseException as error:
                    self._give_up(tracker.name, error)
                    trackers.remove(tracker)
        for tracker in trackers:
            try:
                folder = Path(tracker.tracker.dir).parent if tracker.name == "wandb" else None
                tracker.finish()
                if folder is not None and self._mode == "offline":
                    (folder / WHOLE).write_text(str(self._last))
            except BaseException as error:
                self._give_up(tracker.name, error)

    def _start(self) -> list[Any]:
        trackers: list[Any] = []
        if self._config.tensorboard:
            try:
                from accelerate.tracking import TensorBoardTracker

                board = TensorBoardTracker(run_name="tensorboard", logging_dir=self._run_dir)
                board.start()
                board.writer.add_text("configuration", _as_text(self._description))
                trackers.append(board)
            except Exception as error:
                self._give_up("TensorBoard", error)
        if self._mode == "online" and (reason := server_answers()):
            say(
                f"warning: Weights & Biases: {reason}; going on offline, `wandb sync` uploads the run later", sys.stderr
            )
            self._mode = "offline"
        for mode in {"online": ("online", "offline"), "off": ()}.get(self._mode, ("offline",)):
            try:
                try:
                    trackers.append(self._start_wandb(mode))
                except Exception as error:
                    _end_failed_start()  # else the id counts as in use
                    if mode == "offline" or not re.search(DELETED, str(error)):
                        raise
                    self._begin_anew()
                    trackers.append(self._start_wandb(mode))
                break
            except Exception as error:
                what = "Weights & Biases offline" if mode == "offline" else "Weights & Biases; going on offline"
                self._give_up(what, error)
        return trackers

    def _begin_anew(self) -> None:
        """Takes another id in place of one whose run was deleted on the server."""
        old, self._id = self._id, new_run_id()
        self._renamed(self._id)
        say(
            f"warning: Weights & Biases: the server says that run {old} was deleted; going on as run {self._id}, which "
            f"has the steps from here on. `dist-ae doctor {shlex.quote(str(self._run_dir))} --replay-wandb` rebuilds "
            "the others",
            sys.stderr,
        )

    def _start_wandb(self, mode: str) -> Any:
        from accelerate.state import PartialState
        from accelerate.tracking import WandBTracker

        if not PartialState._shared_state:  # a sweep's own process trains nothing, and the tracker asks for it
            PartialState(cpu=True)
        options = wandb_options(self._config, self._run_dir, self._name, self._id, mode, FINISH_SECONDS - 5)
        resume = "allow" if mode == "online" else None
        there = self._set_aside() if mode == "offline" else -1
        tracker = WandBTracker(run_name=self._config.project, tags=list(self._tags), resume=resume, **options)
        tracker.start()
        self._url = tracker.tracker.url or "" if mode == "online" else ""
        tracker.store_init_configuration(dict(self._description))
        if mode == "online":
            there = tracker.tracker.starting_step - 1  # of what the server has
        # A process that is killed takes with it what wandb had not yet written or sent.
        for step, values in by_step(self._before[1]):
            if step > there:
                tracker.log(values, step=step)
        return tracker

    def _set_aside(self) -> int:
        """The last step that earlier offline runs of this one hold; -1: none do.

        Those that were killed are set aside: of several runs with one id, one that is torn keeps `wandb sync` from
        sending any. So are those that go on beyond the step that is resumed, whose steps come once more.
        """
        last = -1
        for folder in sorted(self._run_dir.glob(f"wandb/offline-run-*-{self._id}")):
            try:
                step = int((folder / WHOLE).read_text())
            except (OSError, ValueError):
                step = LONGEST
            if step <= self._before[0]:
                last = max(last, step)
            else:
                os.rename(folder, folder.with_name(folder.name.replace("offline", "unfinished", 1)))
        return last

    def _log_image(self, tracker: Any, name: str, content: bytes, step: int) -> None:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        if tracker.name == "wandb":
            import wandb

            tracker.tracker.log({name: wandb.Image(picture)}, step=step)
        else:
            tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def _give_up(self, what: str, error: BaseException) -> None:
        say(f"warning: {what}: {type(error).__name__}: {first_line(error)}; training goes on", sys.stderr)
        self._lost = True


def _log_page(run: Any, name: str, page: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    import wandb

    made: dict[str, Any] = {name: wandb.Html(page.read_text(encoding="utf-8"), inject=False)}
    for key, rows in tables.items():
        if rows:
            made[key] = wandb.Table(list(rows[0]), [list(row.values()) for row in rows])
    run.log(made)


def wandb_options(
    config: TrackingConfig, run_dir: Path, name: str, run_id: str | None, mode: str, patience: float = 600
) -> dict[str, Any]:
    """What W&B is started with, beside the project: so that it neither redirects the terminal nor prints.

    Args:
        run_id: the run's own, also after a resume; None makes a new one.
        mode: online or offline.
        patience: seconds that its end waits for what is still to be written or sent.
    """
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=patience)
    return {"id": run_id, "name": name, "group": config.group, "dir": run_dir, "mode": mode, "settings": settings}


def _as_text(description: Mapping[str, Any]) -> str:
    """A configuration as indented JSON, which Markdown shows as it is."""
    return "    " + json.dumps(description, indent=2).replace("\n", "\n    ")


def _end_failed_start() -> None:
    """Lets go of what a start that failed left behind."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _forget_wandb() -> None:
    """Keeps wandb's exit hook from waiting without end for a server that does not answer.

    There is no public way to do so.
    """
    setup = sys.modules.get("wandb.sdk.wandb_setup")
    connection = getattr(getattr(setup, "_singleton", None), "_connection", None)
    unregister = getattr(connection, "_cleanup", None)
    if unregister is not None:
        unregister()


def by_step(metrics: bytes) -> list[tuple[int, dict[str, float]]]:
    """The figures of metrics.jsonl by step, as they are logged; lines that cannot be read are left out."""
    found: dict[int, dict[str, float]] = {}
    for raw in metrics.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            line = json.loads(raw)
            step, split = int(line.pop("step")), str(line.pop("split"))
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "epoch"}
            found.setdefault(step, {}).update({f"{split}/{key}": value for key, value in numbers.items()})
    return sorted(found.items())


def new_run_id() -> str:
    """An id for W&B that is the same after every resume, since the run directory keeps it."""
    return uuid.uuid4().hex[:12]
