"""Sweeps on real local Ray clusters: end to end, strangers, lost processes and nodes, cloning, early stopping."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, environment, free_port

import dist_ae
from dist_ae.config import InputError
from dist_ae.models.weights import weights_sha256
from dist_ae.run.checkpoint import OPTIMIZER, WEIGHTS

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

import tune.sweep  # noqa: E402
from tune.budget import Budget  # noqa: E402
from tune.plan import Settings, Sweep, Trial, only_driver, plan_trials, read_sweep  # noqa: E402
from tune.report import write_report  # noqa: E402
from tune.results import Selection, results  # noqa: E402
from tune.spaces import parse_space  # noqa: E402
from tune.sweep import checked, start  # noqa: E402
from tune.sweep import cluster as joined  # noqa: E402

pytestmark = pytest.mark.slow

BEST = Selection("best")
TINY = {"model.hidden_dims": (16,), "train.batch_size": 100, "tracking.wandb": "off", "train.log_every": 1000}
LR = {"choice": [1e-3, 3e-3]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with two CPUs, which the tests of this module join one after the other."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield made
    made.shutdown()


def sweep_of(
    folder: Path,
    address: str,
    part: dict[str, Any],
    trials: int = 0,
    preset: str = "ae",
    overrides: dict[str, Any] | None = None,
    **settings: Any,
) -> Sweep:
    space = parse_space({"presets": {preset: part}}, "s")
    return checked(
        space,
        {**TINY, **(overrides or {})},
        None,
        Settings(address=address, num_trials=trials, **settings),
        "s",
        folder,
    )


def run(sweep: Sweep) -> Sweep:
    start(sweep, BEST, 0)
    return read_sweep(sweep.path)


def sha(sweep: Sweep, trial: Trial) -> str:
    return str(json.loads((sweep.run_dir(trial) / "result.json").read_text())["weights_sha256"])


def undisturbed(sweep: Sweep, trial: Trial, folder: Path) -> str:
    """The weights' hash of the same experiment, trained here without Ray."""
    return dist_ae.train(sweep.answer(trial).override({"run_dir": folder / f"undisturbed-{trial.id}"})).weights_sha256


def wait(condition: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
    return value


def meanwhile(action: Callable[[], None]) -> threading.Thread:
    """Does something while a sweep runs; an error in it fails the test in ``finish``."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def holder(folder: Path) -> int | None:
    """The process that trains in a run directory."""
    match = re.match(r"pid (\d+)", (folder / ".holder").read_text()) if (folder / ".holder").exists() else None
    return int(match[1]) if match else None


def reports(folder: Path) -> int:
    path = folder / "reports.jsonl"
    return path.read_text().count('"progress"') if path.exists() else 0


def starts(folder: Path) -> int:
    """How often training began in a trial's folder, from what it printed."""
    return sum(
        (folder / name).read_text().count(" parameters, ")
        for name in ("log.txt", "log-0.txt")
        if (folder / name).exists()
    )


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": "/tmp"}
    return subprocess.Popen(
        [sys.executable, "-m", "tune", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# -- on one machine, from the command line


def test_a_sweep_from_the_command_line_to_the_answer(tmp_path: Path) -> None:
    arguments = [
        "all",
        "--num-trials",
        "4",
        "--name",
        "first",
        "--confirm",
        "2",
        "--set",
        "train.epochs=2",
        "--set",
        "model.hidden_dims=16",
    ]
    process = command(*arguments, "--set", "tracking.wandb=offline", cwd=tmp_path)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    # Two of the four lead, and each is trained with two fresh seeds; what looks alike then may bring in a third.
    assert " fresh seeds" in out and out.count(" finished ") >= 8 and "95 % interval" in out
    sweep = read_sweep(tmp_path / "runs/sweeps/first")
    rows = results(sweep)
    assert [row.outcome.status for row in rows] == ["finished"] * 4
    assert {row.trial.preset for row in rows} == {"ae", "denoising", "dropout", "vae"}
    # best.json is the whole experiment: trained by itself it ends with the winner's weights.
    config = dist_ae.load_config(sweep.path / "best.json").override(
        {"run_dir": tmp_path / "again", "tracking.wandb": "off"}
    )
    assert dist_ae.train(config).weights_sha256 == sha(sweep, rows[0].trial)
    for row in rows:  # a W&B run for each trial, known by the trial's id, in the sweep's group
        folder = sweep.run_dir(row.trial)
        assert list(folder.glob(f"wandb/offline-run-*-{row.trial.id}"))
        kept = json.loads((folder / "config.json").read_text())["config"]
        assert kept["tracking"]["group"] == "first" and kept["name"] == f"first-{row.trial.number:04d}"
    # The answer is a run of the same group, and one line uploads all of them.
    assert len(list(sweep.path.glob(f"wandb/offline-run-*-{sweep.key}-summary/files/media/html/*.html"))) == 1
    paths = [f"{sweep.path}/{part}wandb/offline-run-*" for part in ("", "trials/*/", "confirm/trials/*/")]
    assert f"to upload, wandb sync {' '.join(paths)}" in re.sub(r"\s+", " ", out)
    page = (sweep.path / "report.html").read_text()
    assert page.count('<img alt="Chart: ') == 3 and (sweep.path / "trials.csv").exists()
    second = command("ae", "--name", "first", cwd=tmp_path)
    out, _ = second.communicate(timeout=30)
    assert second.returncode == 2 and "--resume first" in out


def test_a_sweep_on_a_table_answers_beside_pca_in_share_of_variance(tmp_path: Path) -> None:
    from sklearn.datasets import load_wine

    rows = load_wine().data
    rows[::7, 2] = math.nan
    lines = [",".join("" if math.isnan(value) else repr(float(value)) for value in row) for row in rows]
    (tmp_path / "wine.csv").write_text("\n".join([",".join(f"c{i}" for i in range(13)), *lines]))
    fixed = {"data.name": f"table:{tmp_path}/wine.csv", "data.missing": "mask", "data.cache": f"{tmp_path}/cache"}
    fixed |= {"train.steps": "60", "tracking.wandb": "off"}
    sets = [part for key, value in fixed.items() for part in ("--set", f"{key}={value}")]
    process = command("table", "--num-trials", "3", "--name", "wine", *sets, cwd=tmp_path)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    sweep = read_sweep(tmp_path / "runs/sweeps/wine")
    best = next(row for row in results(sweep) if row.outcome.status == "finished")
    page = (sweep.path / "report.html").read_text()
    found = re.search(r"with a code of (\d+), .*: unexplained share of variance (\d\.\d+) beside (\d\.\d+)", page)
    assert found is not None and float(found[2]) <= float(found[3])
    pca = best.outcome.metric("val.pca_mse")
    assert "r2 of each column" in page and "PCA with a code of the same size" in page
    assert best.size != int(found[1]) or pca == pytest.approx(float(found[3]), rel=1e-2)


def test_a_killed_driver_is_resumed_without_rays_files(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[presets.ae]\n"train.steps" = {choice = [20, 1600]}\n"optim.lr" = {choice = [1e-3, 2e-3]}\n'
    )
    sets = [
        f"--set={key}"
        for key in ("model.hidden_dims=16", "train.eval_every=20", "optim.schedule=constant", "tracking.wandb=off")
    ]
    first = command(
        "--space", "s.toml", "--search", "grid", "--name", "k", "--max-concurrent", "2", *sets, cwd=tmp_path
    )
    folder = tmp_path / "runs/sweeps/k"
    trials = folder / "trials"

    def long_ones() -> list[Path]:
        return [
            p.parent
            for p in trials.glob("*/reports.jsonl")
            if reports(p.parent) >= 4 and not (p.parent / "result.json").exists()
        ]

    try:
        wait(lambda: len(list(trials.glob("*/result.json"))) == 2 and long_ones())
        interrupted = long_ones()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    sweep = read_sweep(folder)
    finished = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in trials.glob("*/result.json")}
    for path in folder.glob("ray/**/*.pkl"):
        path.write_bytes(b"")
    for path in folder.glob("ray/**/*.json"):
        path.unlink()
    wait(
        lambda: all(holder(p) is None or not Path(f"/proc/{holder(p)}").exists() for p in interrupted), 30
    )  # Ray's processes end with the driver

    second = command("--resume", "k", cwd=tmp_path)
    out, _ = second.communicate(timeout=280)
    assert second.returncode == 0, out
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished} == finished, (
        "finished trials were run again"
    )
    outcomes = {trial.id: sweep.outcome(trial) for trial in sweep.trials()}
    assert [o.status for o in outcomes.values()] == ["finished"] * 4
    for path in interrupted:
        trial = sweep.trial(path.name)
        assert "resuming at step" in (path / "log.txt").read_text()
        assert [r["step"] for r in outcomes[trial.id].reports] == list(range(20, 1601, 20))
    assert sha(sweep, sweep.trial(interrupted[0].name)) == undisturbed(
        sweep, sweep.trial(interrupted[0].name), tmp_path
    )


CLIENT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("inside:", ray.get(ray.remote(lambda: 41 + 1).options(num_cpus=0).remote(), timeout=60))
"""


def client(address: str, **environment: str) -> subprocess.Popen[str]:
    """Runs code on the Ray at an address, as another user of this machine would."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, address],
        env={**inherited, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_running_sweep_is_closed_to_strangers_and_returns_in_seconds_when_interrupted(tmp_path: Path) -> None:
    arguments = ["ae", "--num-trials", "2", "--name", "i", "--train.steps", "1000000", "--train.eval-every", "50"]
    process = command(*arguments, cwd=tmp_path)
    trials = tmp_path / "runs/sweeps/i/trials"
    try:
        wait(lambda: any(reports(path.parent) >= 2 for path in trials.glob("*/reports.jsonl")))
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [(p.name(), c.laddr) for p in family for c in p.net_connections("inet") if c.status == "LISTEN"]
        assert len(listening) >= 5, "Ray's servers were not found"
        assert not [found for found in listening if found[1].ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
        (port,) = (address.port for name, address in listening if name == "gcs_server")
        (server,) = (p for p in family if p.name() == "gcs_server")
        # Loopback is open to every user of the machine: they need the token.
        token, at = server.environ()["RAY_AUTH_TOKEN"], f"127.0.0.1:{port}"
        friend = client(at, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        guesser = client(at, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * len(token))
        stranger = client(at, RAY_AUTH_MODE="disabled")
        assert "inside: 42" in friend.communicate(timeout=90)[0]
        for refused in (guesser, stranger):
            out, err = refused.communicate(timeout=90)
            assert refused.returncode != 0 and "inside" not in out and "AuthenticationError" in err, err
        addresses = [a.address for all_ in psutil.net_if_addrs().values() for a in all_ if a.family == socket.AF_INET]
        for outside in [address for address in addresses if not address.startswith("127.")]:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((outside, port), timeout=5)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, out
    assert time.monotonic() - began < 15
    assert "--resume i" in out


@pytest.mark.parametrize("end", ["all processes", pytest.param("the central one", marks=pytest.mark.long)])
def test_a_signal_to_all_of_a_sweep_s_processes_ends_in_the_command_that_goes_on(tmp_path: Path, end: str) -> None:
    arguments = ["ae", "--num-trials", "2", "--name", "g", "--train.steps", "1000000", "--train.eval-every", "50"]
    words = [sys.executable, "-m", "tune", *arguments]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    trials = tmp_path / "runs/sweeps/g/trials"
    family: list[psutil.Process] = []
    try:
        wait(lambda: any(reports(path.parent) >= 2 for path in trials.glob("*/reports.jsonl")))
        family = psutil.Process(process.pid).children(recursive=True)
        if end == "all processes":  # as systemd, Slurm and `timeout` do, and a terminal that is closed
            for one in [process.pid, *(child.pid for child in family)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGTERM)
        else:
            (server,) = (child for child in family if child.name() == "gcs_server")
            server.kill()
        began = time.monotonic()
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, out
    assert time.monotonic() - began < 30 and "--resume g" in out and "Traceback" not in out, out
    wait(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family))


# -- a cluster


def test_one_and_two_workers_give_the_same_trials(cluster: Cluster, tmp_path: Path) -> None:
    part = {"objective.noise_std": {"uniform": [0.1, 0.5]}}
    found = {}
    for workers in (1, 2):
        made = {"precision": "fp64", "train.epochs": 2}
        sweep = run(
            sweep_of(tmp_path / str(workers), cluster.address, part, 1, "denoising", made, workers_per_trial=workers)
        )
        found[workers] = [(t.values, sweep.outcome(t).reports) for t in sweep.trials()]
        assert {json.loads((sweep.run_dir(t) / "result.json").read_text())["world_size"] for t in sweep.trials()} == {
            workers
        }
    for (one, first), (two, second) in zip(found[1], found[2], strict=True):
        assert one == two
        assert [r["step"] for r in first] == [r["step"] for r in second] == [15, 30]
        for a, b in zip(first, second, strict=True):
            for name in ("val.mse", "val.denoised_psnr"):
                assert a[name] == pytest.approx(b[name], rel=1e-9)
    # Beside each other, nothing but the workers differs, and neither is ahead by anything that could be read.
    single, double = tmp_path / "1" / "s", tmp_path / "2" / "s"
    beside = tune.compare(single, double, page=tmp_path / "both.html")
    assert beside.differs["--workers-per-trial"] == {str(single): "1", str(double): "2"}
    assert set(beside.differs) == {"--workers-per-trial", "finished trials", "training steps", "seconds of trials"}
    assert re.search(r"with one seed$", beside.sentences[0]) and len(beside.levels) == 1
    values = [best.value for best in beside.levels[0].best.values()]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_killed_actor_a_wrong_trial_and_a_diverging_one(cluster: Cluster, tmp_path: Path) -> None:
    """The first goes on and ends as if nothing had been; the others are not tried again and do not stop the sweep."""
    part = {"optim.lr": {"choice": [1e-3, 1e6]}}
    sweep = sweep_of(
        tmp_path, cluster.address, part, overrides={"train.steps": 3000, "train.eval_every": 100}, search="grid"
    )
    killed: list[int] = []

    def kill() -> None:
        folder = wait(
            lambda: next(
                (p.parent for p in (sweep.path / "trials").glob("*-0000/reports.jsonl") if reports(p.parent) >= 3), None
            )
        )
        killed.append(wait(lambda: holder(folder)))
        os.kill(killed[0], signal.SIGKILL)

    thread = meanwhile(kill)
    sweep = run(sweep)
    thread.join()
    good, bad = sweep.trials()
    assert killed and starts(sweep.trial_dir(good.id)) == 2
    assert sweep.outcome(good).status == "finished"
    assert sha(sweep, good) == undisturbed(sweep, good, tmp_path)
    # What the folder says the trial reported is what its run directory evaluated, each step once.
    lines = [json.loads(line) for line in (sweep.run_dir(good) / "metrics.jsonl").read_text().splitlines()]
    # The start is evaluated too, but it is no result of training, and is not reported.
    evaluated = [(line["step"], line["mse"]) for line in lines if line["split"] == "val" and line["step"] > 0]
    assert [(r["step"], r["val.mse"]) for r in sweep.outcome(good).reports] == evaluated
    failed = sweep.outcome(bad)
    assert failed.status == "failed" and failed.error is not None and failed.error.startswith("NonFinite")
    assert starts(sweep.trial_dir(bad.id)) == 1
    assert [row.trial.id for row in results(sweep)] == [good.id, bad.id]


def test_asha_stops_weak_trials_and_gives_their_place_to_the_next(cluster: Cluster, tmp_path: Path) -> None:
    rates = [3e-3, 1e-3, *(10.0**-k for k in range(5, 12))]
    made = {"train.steps": 540, "train.eval_every": 20, "optim.schedule": "constant"}
    sweep = run(
        sweep_of(
            tmp_path,
            cluster.address,
            {"optim.lr": {"choice": rates}},
            overrides=made,
            scheduler="asha",
            search="grid",
        )
    )
    outcomes = [sweep.outcome(trial) for trial in sweep.trials()]
    stopped = [o for o in outcomes if o.status == "stopped"]
    assert len(stopped) >= 5 and {o.status for o in outcomes} == {"finished", "stopped"}
    # A stopped trial takes no step after the verdict: its training log ends at the last report.
    for trial, outcome in zip(sweep.trials(), outcomes, strict=True):
        if outcome.status == "stopped":
            steps = [
                json.loads(line)["step"] for line in (sweep.run_dir(trial) / "metrics.jsonl").read_text().splitlines()
            ]
            assert max(steps) == outcome.reports[-1]["step"] < 540
    assert results(sweep)[0].trial.values["optim.lr"] == 3e-3
    assert sum(o.reports[-1]["step"] for o in outcomes) < 0.6 * 540 * len(rates)


def test_a_budget_ends_an_open_search_with_an_answer_and_what_was_cut_off_goes_on(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"train.steps": 1000, "train.eval_every": 50, "tracking.pictures": False}
    sweep = sweep_of(tmp_path, cluster.address, {"optim.lr": LR}, overrides=made, budget=10)
    folder, spent = sweep.path / "trials", [0.0]

    def clock() -> float:
        under_way = [p.parent for p in folder.glob("*/reports.jsonl") if not (p.parent / "result.json").exists()]
        if any(folder.glob("*/result.json")) and any(reports(path) >= 2 for path in under_way):
            spent[0] = 600.0  # the ten minutes are over while a trial is under way
        return time.monotonic() + spent[0]

    with only_driver(sweep.path, new=True), joined(sweep):
        plan_trials(sweep)
        tune.sweep.run(sweep, "this", Budget(10, time.monotonic(), clock=clock))
    outcomes = [sweep.outcome(trial) for trial in sweep.trials()]
    cut = [outcome for outcome in outcomes if outcome.status in ("unfinished", "pending")]
    assert spent[0] and cut and len(outcomes) > 2, "more trials were planned than run at once"
    assert f"this continues {len(cut)} trials" in capsys.readouterr().out
    assert any(0 < outcome.reports[-1]["step"] < 1000 for outcome in cut if outcome.reports)
    answer = write_report(sweep, BEST)
    assert answer is not None and answer.trials[0]["status"] == "finished" and "cut off" not in str(answer)


def test_population_based_training_clones_weights_and_optimizer(cluster: Cluster, tmp_path: Path) -> None:
    part = {"optim.lr": {"choice": [3e-3, 1e-3, 1e-6, 1e-7]}, "objective.noise_std": {"uniform": [0.1, 0.5]}}
    made = {"train.steps": 600, "train.eval_every": 60, "train.keep": 50}
    sweep = run(sweep_of(tmp_path, cluster.address, part, 4, "denoising", made, scheduler="pbt"))
    trials = sweep.trials()
    assert [sweep.outcome(trial).status for trial in trials] == ["finished"] * 4
    clones = [trial for trial in trials if trial.generation]
    assert clones, "no trial was cloned"
    for trial in clones:
        folder = sweep.run_dir(trial)
        (begin,) = (folder / "start").iterdir()
        sources = list(sweep.trial_dir(trial.donors[-1]).glob(f"**/checkpoints/{begin.name}"))
        for name in (WEIGHTS, OPTIMIZER):
            copied = _hash(begin / name)
            assert copied in {_hash(source / name) for source in sources}, f"{name} is not the donor's"
            # It really went on from there: the new generation's first checkpoint is the copy, before any step.
            assert _hash(folder / "checkpoints" / begin.name / name) == copied
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["step"] == int(begin.name)
        kept = json.loads((folder / "config.json").read_text())["config"]
        assert (kept["optim"]["lr"], kept["objective"]["noise_std"]) == (
            trial.values["optim.lr"],
            trial.values["objective.noise_std"],
        )
        assert 0.1 <= kept["objective"]["noise_std"] <= 0.5
        # The trial's own weights at that step were others.
        own = sweep.trial_dir(trial.id) / "checkpoints" / begin.name
        assert trial.generation > 1 or not own.exists() or _hash(own / WEIGHTS) != _hash(begin / WEIGHTS)


def _hash(path: Path) -> str:
    import safetensors.torch

    return weights_sha256(safetensors.torch.load_file(path))


def test_a_lost_node_costs_no_trial(tmp_path: Path) -> None:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [made.add_node(num_cpus=1), made.add_node(num_cpus=1)]
        sweep = sweep_of(
            tmp_path,
            made.address,
            {"optim.lr": LR},
            overrides={"train.steps": 4000, "train.eval_every": 100},
            search="grid",
        )

        def lose() -> None:
            wait(lambda: sum(reports(p.parent) >= 3 for p in (sweep.path / "trials").glob("*/reports.jsonl")) == 2)
            made.remove_node(nodes[1], allow_graceful=False)

        thread = meanwhile(lose)
        sweep = run(sweep)
        thread.join()
    finally:
        made.shutdown()
    trials = sweep.trials()
    assert [sweep.outcome(trial).status for trial in trials] == ["finished"] * 2
    assert sorted(starts(sweep.trial_dir(trial.id)) for trial in trials) == [1, 2]
    lost = next(trial for trial in trials if starts(sweep.trial_dir(trial.id)) == 2)
    assert sha(sweep, lost) == undisturbed(sweep, lost, tmp_path)


def test_a_trial_of_several_workers_goes_on_when_one_is_killed_and_frees_all_when_it_is_stopped(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Two at a time would not fit: each trial begins only when all workers of the one before it are gone."""
    made = {"train.steps": 120, "train.eval_every": 10, "optim.schedule": "constant", "precision": "fp64"}
    part = {"optim.lr": {"choice": [3e-3, 1e-9, 2e-3]}}
    sweep = sweep_of(
        tmp_path, cluster.address, part, overrides=made, scheduler="asha", search="grid", workers_per_trial=2
    )

    def kill() -> None:
        folder = wait(
            lambda: next(
                (p.parent for p in (sweep.path / "trials").glob("*-0000/reports.jsonl") if reports(p.parent) >= 3), None
            )
        )
        os.kill(wait(lambda: holder(folder)), signal.SIGKILL)

    thread = meanwhile(kill)
    sweep = run(sweep)
    thread.join()
    good, weak, last = sweep.trials()
    assert [starts(sweep.trial_dir(trial.id)) for trial in (good, weak, last)] == [2, 1, 1]
    assert sweep.outcome(good).status == "finished"
    undisturbed_run = dist_ae.train(sweep.answer(good).override({"run_dir": tmp_path / "alone"}))
    assert sweep.outcome(good).metric("val.mse") == pytest.approx(undisturbed_run.metrics["val.mse"], rel=1e-9)
    assert sweep.outcome(weak).status == "stopped"
    assert sweep.outcome(weak).reports[-1]["step"] < 120
    assert sweep.outcome(last).status in ("finished", "stopped")


# A machine's /tmp/ray is its own. Nodes that share one replace the code of a job under each other's processes.
OWN_FOLDER = ["unshare", "--mount", "sh", "-c", 'mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$@"', "_"]


@pytest.mark.long
@pytest.mark.timeout(420)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_cluster_of_separate_processes_loses_a_node(workers: int, tmp_path: Path) -> None:
    """As in launch/ray/README.md: `ray start`, token authentication, a sweep submitted as a job, one node killed.

    Two trials of one worker go on on the node that is left; one trial of two waits for a node that comes.
    """
    pytest.importorskip("aiohttp", reason="submitting a job needs ray[default]")
    if subprocess.run([*OWN_FOLDER, "true"], capture_output=True).returncode:
        pytest.skip("this machine forbids mount namespaces")
    port, dashboard = free_port(), free_port()
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    nodes: list[subprocess.Popen[bytes]] = []

    def node(*arguments: str) -> subprocess.Popen[bytes]:
        log = open(tmp_path / f"node-{len(nodes)}.log", "wb")  # noqa: SIM115 - open as long as the node runs
        process = subprocess.Popen(
            [*OWN_FOLDER, "ray", "start", "--block", "--disable-usage-stats", *arguments],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        nodes.append(process)
        return process

    def worker() -> subprocess.Popen[bytes]:
        log, process = tmp_path / f"node-{len(nodes)}.log", node("--address", f"127.0.0.1:{port}", "--num-cpus", "1")
        wait(lambda: "Ray runtime started" in log.read_text(), 90)
        return process

    def kill(process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    count = 2 // workers
    name = ["--name", "first", "--storage", str(tmp_path / "sweeps"), "--num-trials", str(count)]
    arguments = ["ae", *name, "--workers-per-trial", str(workers)]
    settings = {"model.hidden_dims": 16, "model.latent_dim": 8, "precision": "fp64", "optim.schedule": "constant"}
    settings |= {"train.steps": 3000 // workers, "train.eval_every": 100, "tracking.wandb": "off"}
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    try:
        head = ("--head", "--port", str(port), "--num-cpus", "0", "--dashboard-host", "127.0.0.1")
        node(*head, "--dashboard-port", str(dashboard))
        wait(lambda: _answers(dashboard), 90)
        joined = [worker(), worker()]  # one after the other: each then finds free ports
        strangers = {key: value for key, value in environment.items() if key != "RAY_AUTH_TOKEN_PATH"}
        strangers["RAY_AUTH_MODE"] = "disabled"
        refused = subprocess.run(["ray", "job", "list"], env=strangers, capture_output=True, text=True, timeout=60)
        assert refused.returncode != 0, "a stranger without the token was let in"
        job = subprocess.Popen(
            [str(REPOSITORY / "launch/ray/submit.sh"), *arguments],
            env=environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        trials = tmp_path / "sweeps/first/trials"

        def began() -> int:
            return sum(reports(path.parent) >= 3 for path in trials.glob("*/reports.jsonl"))

        wait(lambda: job.poll() is not None or began() == count, 200)
        assert job.poll() is None, job.communicate()[0]
        kill(joined[1])
        if workers == 2:
            worker()
        out, _ = job.communicate(timeout=280)
        assert job.returncode == 0, out
    finally:
        for process in reversed(nodes):
            if process.poll() is None:
                kill(process)
    sweep = read_sweep(tmp_path / "sweeps/first")
    assert [sweep.outcome(trial).status for trial in sweep.trials()] == ["finished"] * count
    assert sorted(starts(sweep.trial_dir(trial.id)) for trial in sweep.trials()) == [1, 2][-count:]
    for trial in sweep.trials():
        alone = dist_ae.train(sweep.answer(trial).override({"run_dir": tmp_path / f"alone-{trial.id}"}))
        assert sweep.outcome(trial).metric("val.mse") == pytest.approx(alone.metrics["val.mse"], rel=1e-9)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_cluster_too_small_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, cluster.address, {"optim.lr": LR}, 2, workers_per_trial=4, overrides={"train.steps": 10})
    with pytest.raises(InputError, match="the cluster has 2"):
        run(sweep)
    assert not (sweep.path / "sweep.json").exists()
