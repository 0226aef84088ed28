"""Weights & Biases may be down in any way: training ends with status 0, soon, and its own metrics are whole."""

from __future__ import annotations

import glob
import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, cli, environment, free_port, metrics

from dist_ae.use import doctor

pytestmark = pytest.mark.slow


class Answering(http.server.BaseHTTPRequestHandler):
    status = 500

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def body(self) -> dict[str, Any]:
        """What was asked, where it is about a run."""
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = json.loads(content or b"{}") if self.path.endswith(("/graphql", "file_stream")) else {}
        return found if isinstance(found, dict) else {}

    def silence(self) -> None:
        time.sleep(120)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None: ...


class DyingAfterHello(Answering):
    """Answers the first look, and nothing from then on."""

    status = 200
    do_POST = Answering.silence


class Deleted(Answering):
    """A server that knows the first run it is asked for as deleted, and takes any other; keeps the rows it is sent."""

    deleted: list[str]
    rows: list[tuple[str, int]]

    def do_POST(self) -> None:
        body = self.body()
        variables = body.get("variables", {})
        name = variables.get("name") or variables.get("run") or ""
        if name and not self.deleted:
            self.deleted.append(name)
        gone = bool(name) and name in self.deleted
        for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.rows.append((self.path.split("/")[-2], int(json.loads(line)["_step"])))
        bucket = {"id": "x", "name": name, "displayName": "d", "project": {"name": "p", "entity": {"name": "e"}}}
        found = {"upsertBucket": {"bucket": bucket, "inserted": True}, "model": {"bucket": None, "project": None}}
        files = {"runID": "x", "uploadHeaders": [], "files": []}
        answer: dict[str, Any] = {"data": {**found, "createRunFiles": files, "project": None, "viewer": None}}
        if gone:
            answer = {"errors": [{"message": "run was previously created and deleted; try a new run name"}]}
        data = json.dumps(answer).encode()
        self.send_response(409 if gone else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Keeping(Answering):
    """A server that keeps the rows it is sent, and says of a run that it has them up to the step ``known``."""

    rows: list[int]
    known: int

    def do_POST(self) -> None:
        body = self.body()
        for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.rows.append(int(json.loads(line)["_step"]))
        name = body.get("variables", {}).get("name") or "run"
        bucket = {"id": "x", "name": name, "displayName": "d", "project": {"name": "p", "entity": {"name": "e"}}}
        tail = json.dumps([json.dumps({"_step": self.known, "_runtime": 5})])
        told = {"historyLineCount": self.known, "logLineCount": 0, "eventsLineCount": 0, "historyTail": tail}
        told |= {
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }
        model = {
            "id": "m",
            "entity": {"id": "e", "name": "e"},
            "name": "p",
            "bucket": {**bucket, **told} if self.known else None,
            "project": None,
        }
        found = {"upsertBucket": {"bucket": bucket, "inserted": not self.known}, "model": model}
        files = {"runID": "x", "uploadHeaders": [], "files": []}
        data = json.dumps({"data": {**found, "createRunFiles": files, "project": None, "viewer": None}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(status: int) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answering,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def down(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, float, Path]]]:
    """One short run against each way of being down, all at once: (status, stderr, seconds, run directory)."""
    root = tmp_path_factory.mktemp("down")
    silent = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    servers = {f"answers {status}": serve(status) for status in (401, 429, 500)}
    servers["dies after the first answer"] = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DyingAfterHello)
    threading.Thread(target=servers["dies after the first answer"].serve_forever, daemon=True).start()
    ports = {name: server.server_address[1] for name, server in servers.items()}
    ports |= {"closed port": free_port(), "never answers": silent.getsockname()[1]}
    started, start = {}, time.monotonic()
    for name, port in ports.items():
        variables: dict[str, Any] = {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "WANDB_API_KEY": "0" * 40,
        }
        command = [
            sys.executable,
            "-m",
            "dist_ae",
            "train",
            "ae",
            "--run-dir",
            str(root / name.replace(" ", "-")),
            "--train.epochs",
            "3",
            "--train.log-every",
            "1",
        ]
        process = subprocess.Popen(
            command,
            env=environment(**variables),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        started[name] = process
    found: dict[str, tuple[int, str, float, Path]] = {}
    while len(found) < len(started) and time.monotonic() - start < 150:
        for name, process in started.items():
            if name not in found and process.poll() is not None:
                found[name] = (
                    process.returncode,
                    process.stderr.read() if process.stderr else "",
                    time.monotonic() - start,
                    root / name.replace(" ", "-"),
                )
        time.sleep(0.1)
    for process in started.values():
        process.kill()
    yield found
    for server in servers.values():
        server.shutdown()
    silent.close()


@pytest.mark.parametrize(
    "kind", ["closed port", "never answers", "answers 401", "answers 429", "answers 500", "dies after the first answer"]
)
def test_a_server_that_is_down_costs_nothing_but_a_warning(
    down: dict[str, tuple[int, str, float, Path]], kind: str
) -> None:
    status, err, seconds, run_dir = down[kind]
    assert status == 0, err
    assert "Traceback" not in err and "warning: " in err
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 37))
    print(kind, seconds)
    assert seconds < 150  # six of them beside each other on two cores; INIT_SECONDS and FINISH_SECONDS bound the wait


def test_an_offline_run_can_be_rebuilt_from_the_metrics(down: dict[str, tuple[int, str, float, Path]]) -> None:
    from test_tracking import history

    run_dir = down["never answers"][3]
    for path in run_dir.glob("wandb/*run-*"):
        path.rename(run_dir / f"set-aside-{path.name}")
    folder = doctor.rebuild_wandb(run_dir)
    kept = json.loads((run_dir / "tracking.json").read_text())["wandb_id"]
    assert kept in folder.name
    rows = {row["_step"]: row for row in history(run_dir)}
    for line in metrics(run_dir):
        assert rows[line["step"]]["train/loss"] == pytest.approx(line["loss"], rel=1e-12)


def test_a_run_that_was_deleted_on_the_server_goes_on_there_as_another_and_each_step_is_sent_once(
    tmp_path: Path,
) -> None:
    handler = type("Handler", (Deleted,), {"status": 200, "deleted": [], "rows": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    variables: dict[str, Any] = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-m", "dist_ae", "train", "ae", "--run-dir", str(tmp_path / "run")]
    command += ["--train.epochs", "3", "--train.log-every", "1"]
    done = subprocess.run(
        command, env=environment(**variables), cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    server.shutdown()
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and len(warnings) == 1, done.stderr
    new = json.loads((tmp_path / "run/tracking.json").read_text())["wandb_id"]
    assert f"run {handler.deleted[0]} was deleted; going on as run {new}" in warnings[0]  # type: ignore[attr-defined]
    rows = sorted(handler.rows)  # type: ignore[attr-defined]
    assert {name for name, _ in rows} == {new}
    assert len({step for _, step in rows}) == len(rows) and {step for _, step in rows} >= set(range(1, 37)), rows


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_of_a_run_that_was_killed_and_resumed_each_step_reaches_the_server_once_and_in_order(
    tmp_path: Path, mode: str
) -> None:
    known = 0 if mode == "offline" else 17  # that the server got before the kill
    handler: Any = type("Handler", (Keeping,), {"status": 200, "rows": [], "known": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    variables: dict[str, Any] = {"WANDB_MODE": mode, "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
    run_dir, steps = tmp_path / "run", 150
    command = ["train", "ae", "--run-dir", str(run_dir), "--train.steps", str(steps), "--train.log-every", "1"]
    command += ["--train.save-every", "10", "--train.eval-every", "50", "--train.batch-size", "512"]
    program = [sys.executable, "-m", "dist_ae", *command]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(program, env=environment(**variables), cwd=REPOSITORY, **quiet) as process:
        end = time.monotonic() + 100
        while process.poll() is None and not (run_dir / "checkpoints/00000030").is_dir() and time.monotonic() < end:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -9
    handler.rows.clear()  # whatever it sent: the server says how much of it it knows
    handler.known = known
    done = cli(*command, **variables)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    if mode == "offline":
        assert not handler.rows
        (line,) = re.findall(r"to upload, wandb sync (\S+)", done.stdout)
        folders = glob.glob(line)
        assert len(folders) == 1 and len(list(run_dir.glob("wandb/unfinished-run-*"))) == 1
        synced = [str(Path(sys.executable).with_name("wandb")), "sync", *folders]
        online = environment(**(variables | {"WANDB_MODE": "online"}))
        subprocess.run(synced, env=online, cwd=tmp_path, check=True, **quiet)  # it leaves logs where it is called
    server.shutdown()
    assert handler.rows == list(range(known + 1 if known else 0, steps + 1))  # with the start, 0
