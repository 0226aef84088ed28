"""A real Slurm of two nodes (network namespaces): daemons, files and keys of its own, gone with the test."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, environment, metrics, relative_difference, weights
from test_hosts import BY_NAME, NETWORK, WHY_NOT, Hosts, alone, experiment, newest, until

pytestmark = [pytest.mark.slow, pytest.mark.long]

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING or WHY_NOT), reason=WHY_NOT or f"needs apt-get install slurmctld slurmd munge: no {', '.join(MISSING)}"
)
CONFIGURATION = """
ClusterName=test
SlurmctldHost=host0({network}.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0
ReturnToService=2
KillWait=30
MinJobAge=3600
NodeName=host0 NodeAddr={network}.1 CPUs=2 State=UNKNOWN
NodeName=host1 NodeAddr={network}.2 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=host0,host1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class Slurm:
    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
        self.more: dict[str, Any] = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, network=NETWORK))
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (folder / "state").mkdir()
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o600)
        files = {"socket": "munge.socket", "key-file": "key", "pid-file": "munge.pid", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in {**files, "log-file": "munge.log"}.items()]
        self.daemon(0, "munged", "--foreground", "--force", *options)
        until((folder / "munge.socket").exists, hosts)
        self.daemon(0, "slurmctld", "-D")
        for index in (0, 1):
            self.daemon(index, "slurmd", "-D", "-N", f"host{index}")
        until(lambda: self.said("sinfo", "--noheader", "--format=%A").split() == ["0/2"], hosts, 30)

    def daemon(self, index: int, *words: str) -> None:
        self.hosts.running.append(self.hosts[index].start(*words, **self.more))

    def said(self, *words: str) -> str:
        command = self.hosts[0].command(*words)
        done = subprocess.run(command, env=environment(**self.more), capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else f"{words[0]}: {done.stderr}"

    def job(self, number: str) -> dict[str, str]:
        words = self.said("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def has_ended(self, number: str) -> bool:
        return self.job(number)["JobState"] not in ("RUNNING", "PENDING", "COMPLETING")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # the path of a socket is short
    try:
        with Hosts(tmp_path / "hosts", BY_NAME) as hosts:
            yield Slurm(hosts, folder)
    finally:
        shutil.rmtree(folder)


@needs_slurm
def test_a_job_that_is_told_to_stop_queues_up_again_and_ends_as_undisturbed(slurm: Slurm, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    on_cpus = ("--gpus-per-node=0", "--ntasks-per-node=2", f"--output={log}", f"--chdir={REPOSITORY}")
    job = slurm.said(
        "sbatch", "--parsable", *on_cpus, "launch/slurm/train.sbatch", *experiment(run_dir, 3000)[3:]
    ).strip()
    assert job.isdigit(), job
    until(lambda: newest(run_dir) > 0, slurm.hosts)
    slurm.said("scancel", "--signal=TERM", job)
    until(lambda: slurm.job(job).get("Restarts") == "1", slurm.hosts, 30)
    stopped = newest(run_dir)
    until(lambda: slurm.job(job)["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"), slurm.hosts, 150)
    said = log.read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", said
    assert f"stopped at step {stopped} of 3000" in said and f"resuming at step {stopped}" in said
    assert "4 processes on 2 hosts" in said
    assert relative_difference(weights(run_dir), alone(tmp_path / "alone", 3000)) < 1e-9
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 3001))


@needs_slurm
def test_a_mistake_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    on_cpus = ("--gpus-per-node=0", "--ntasks-per-node=2", f"--output={tmp_path / 'job.log'}", f"--chdir={REPOSITORY}")
    job = slurm.said("sbatch", "--parsable", *on_cpus, "launch/slurm/train.sbatch", "vae", "--train.steps", "0").strip()
    until(lambda: slurm.job(job)["JobState"] == "FAILED", slurm.hosts, 60)
    assert slurm.job(job)["ExitCode"] == "2:0" and slurm.job(job)["Restarts"] == "0"
    assert "train.steps" in (tmp_path / "job.log").read_text()


@needs_slurm
def test_a_sweep_runs_on_a_ray_cluster_of_the_jobs_two_nodes_and_resumes(slurm: Slurm, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    (tmp_path / "token").chmod(0o600)
    slurm.more |= {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    on_cpus = ("--gpus-per-node=0", f"--output={tmp_path / 'job.log'}", f"--chdir={REPOSITORY}")
    settings = ["model.hidden_dims=16", "train.steps=20", "tracking.wandb=off"]
    sweep = [str(tmp_path / "sweeps"), "first", "ae", "--num-trials", "2"]
    command = ["sbatch", "--parsable", *on_cpus, "launch/slurm/sweep.sbatch", *sweep]
    command += [word for setting in settings for word in ("--set", setting)]
    for _ in range(2):
        job = slurm.said(*command).strip()
        until(partial(slurm.has_ended, job), slurm.hosts, 200)
        assert slurm.job(job)["JobState"] == "COMPLETED", (tmp_path / "job.log").read_text()
    assert len(list((tmp_path / "sweeps" / "first").glob("trials/*/reports.jsonl"))) == 2
    assert (tmp_path / "sweeps" / "first" / "best.json").exists()
