"""The manifests of launch/ are what Kubernetes knows, and start what the image has."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import REPOSITORY, metrics
from test_hosts import NETWORK, Hosts, needs_hosts, until

OLDEST = "1.31"  # in which podFailurePolicy is stable
JOB = REPOSITORY / "launch/kubernetes/job.yaml"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def job() -> dict[str, Any]:
    return next(document for document in documents(JOB) if document["kind"] == "Job")["spec"]


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_the_job_and_the_pods_of_the_ray_cluster_are_valid(version: str) -> None:
    cluster = documents(REPOSITORY / "launch/ray/kuberay.yaml")[0]["spec"]["rayClusterSpec"]
    pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    named = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **pod} for pod in pods]
    for document in (*documents(JOB), *named):
        kubernetes_validate.validate(document, version, strict=True)
    wrong = documents(JOB)
    wrong[1]["spec"]["podFailurPolicy"] = wrong[1]["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong[1], version, strict=True)


def test_a_stop_is_repeated_a_mistake_fails_the_job_and_a_fault_backs_off() -> None:
    def action(status: int) -> str:
        """What the first rule that fits does with a container that ends so; Count is what Kubernetes does by itself."""
        rules = (
            rule
            for rule in job()["podFailurePolicy"]["rules"]
            if status in rule.get("onExitCodes", {}).get("values", [])
        )
        return next((str(rule["action"]) for rule in rules), "Count")

    assert [action(status) for status in (75, 2, 1, 137)] == ["Ignore", "FailJob", "Count", "Count"]
    assert job()["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["type"] == "DisruptionTarget"


@pytest.mark.slow
@needs_hosts
def test_the_pods_of_the_job_train_together(tmp_path: Path) -> None:
    """Its own command on two hosts, with what Kubernetes puts into each pod."""
    container = job()["template"]["spec"]["containers"][0]
    given = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert int(given["WORLD_SIZE"]) == job()["completions"] == job()["parallelism"] == 2
    own = [
        "ae",
        "--model.hidden-dims",
        "16",
        "--train.steps",
        "20",
        "--train.log-every",
        "1",
        "--tracking.wandb",
        "off",
    ]
    (tmp_path / "dist-ae").write_text('#!/bin/sh\nexec "$PYTHON" -m dist_ae "$@"\n')
    (tmp_path / "dist-ae").chmod(0o755)
    given |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = [*container["command"], *container["args"][:2], *own, "--run-dir", str(tmp_path / "run")]
    with Hosts(tmp_path / "hosts", f"127.0.0.1 localhost\n{NETWORK}.1 {given['MASTER_ADDR']}\n") as hosts:
        pods = [host.start(*command, **given, JOB_COMPLETION_INDEX=str(rank)) for rank, host in enumerate(hosts)]
        hosts.running += pods
        until(lambda: all(pod.poll() is not None for pod in pods), hosts)
        assert [pod.returncode for pod in pods] == [0, 0], "\n".join(host.said() for host in hosts)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 21))
