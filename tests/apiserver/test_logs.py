"""`disttrain logs` against a real API server that asks a kubelet which the test plays: no line is lost, and none comes twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apiserver.kubelet_logs import SECOND, KubeletLogs
from apiserver.operating import JOBS, PODS, Rest, eventually, job
from apiserver.playing import Kubelet
from apiserver.test_cli import Call, disttrain
from cluster.controlplane import ControlPlane
from disttrain.client import logs as client_logs
from disttrain.client import watching
from disttrain.client.jobs import Jobs
from disttrain.kube.client import KubeClient, connect
from disttrain.logs import LogLine

NAMESPACE = "logs"
__all__ = ["disttrain"]  # a fixture


@pytest.fixture
def node(rest: Rest, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[KubeletLogs]:
    name = f"node-{abs(hash(request.node.name))}"
    with KubeletLogs(rest, tmp_path, name) as node:
        yield node


class Cluster:
    """A job whose pods the test makes, ends and replaces, and all that they printed."""

    def __init__(self, rest: Rest, kubelet: Kubelet, node: KubeletLogs, name: str, body: Any = None) -> None:
        self.rest, self.kubelet, self.node, self.name = rest, kubelet, node, name
        self.printed: dict[str, list[str]] = defaultdict(list)
        self.body = body or rest.create(JOBS, job(name))

    def start(self, pod: str, *, runs: bool = True) -> None:
        """A pod such as worker-0."""
        short, _, index = pod.rpartition("-")
        role = {"ps": "parameter-server"}.get(short, short)
        owner = {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob", "name": self.name}
        labels = {"disttrain.dev/job-name": self.name, "disttrain.dev/role": role, "disttrain.dev/index": index}
        labels["disttrain.dev/attempt"] = "1"
        owners = [{**owner, "uid": self.body["metadata"]["uid"], "controller": True}]
        spec = {
            "nodeName": self.node.node,
            "restartPolicy": "Never",
            "containers": [{"name": "trainer", "image": "x"}],
        }
        metadata = {"name": f"{self.name}-{pod}", "labels": labels, "ownerReferences": owners}
        self.rest.create(PODS, {"metadata": metadata, "spec": spec})
        if runs:
            self.run(pod)

    def run(self, pod: str, *, lines: int = 0) -> None:
        """Its container starts, which has printed so many lines when the API server hears of it. Until then it has no log."""
        self.node.begin(f"{self.name}-{pod}")
        for _ in range(lines):
            self.print(pod)
        self.kubelet.run(f"{self.name}-{pod}")

    def print(self, pod: str, *, after: int = 1) -> None:
        """A line that says which it is."""
        text = f"{pod} line {len(self.printed[pod])}"
        self.printed[pod].append(text)
        self.node.print(f"{self.name}-{pod}", text, after=after)

    def followed(self, pod: str) -> bool:
        return self.node.followers(f"{self.name}-{pod}") > 0

    def kill(self, pod: str) -> None:
        """kill -9 of its container, and the operator deletes the pod."""
        self.node.end(f"{self.name}-{pod}")
        self.kubelet.fail(f"{self.name}-{pod}")
        self.kubelet.gone(f"{self.name}-{pod}")

    def replace(self, *pods: str) -> None:
        """Pods of the same names, whose containers take the time that any container takes to start."""
        for pod in pods:
            self.start(pod, runs=False)
        time.sleep(0.7)
        for pod in pods:
            self.run(pod)

    def finish(self, *pods: str) -> None:
        """The job is done; its pods stay."""
        for pod in pods:
            self.node.end(f"{self.name}-{pod}")
            self.kubelet.succeed(f"{self.name}-{pod}")
        self.rest.merge(f"{JOBS}/{self.name}/status", {"status": {"state": "Complete"}})


@pytest.fixture
def cluster(rest: Rest, kubelet: Kubelet, node: KubeletLogs) -> Callable[[str], Cluster]:
    return lambda name: Cluster(rest, kubelet, node, name)


def play(cluster: Cluster, seed: int) -> None:
    """Prints, cuts connections, kills pods, restarts the job, and lets a pod come late, in an order that the seed draws."""
    draw = random.Random(seed)
    pods = ["master-0", "worker-0", "worker-1"]
    events = ["cut", "kill", "late", "restart", "cut"]
    draw.shuffle(events)
    for event in ["", *events]:
        for _ in range(draw.randrange(5, 40)):
            cluster.print(draw.choice(pods), after=draw.choice((1, 1000, SECOND // 7, SECOND)))
        match event:
            case "cut":
                cluster.node.cut()
                for pod in pods:
                    cluster.print(pod)
            case "kill":
                pod = draw.choice(pods)
                eventually(lambda pod=pod: cluster.followed(pod))
                cluster.print(pod)
                cluster.kill(pod)
                cluster.replace(pod)
            case "late":
                pods.append("worker-2")
                cluster.start("worker-2", runs=False)
                cluster.run("worker-2", lines=3)
            case "restart":
                eventually(lambda: all(map(cluster.followed, pods)))
                for pod in pods:
                    cluster.print(pod)
                    cluster.kill(pod)
                cluster.replace(*pods)
    cluster.finish(*pods)


async def seen(control_plane: ControlPlane, cluster: Cluster, acts: Callable[[], None]) -> list[LogLine]:
    """All lines that are shown while something happens in the cluster, to the job's end."""
    found: list[LogLine] = []
    async with connect(connections=0) as client:
        api = KubeClient(client, timeout_seconds=20)
        jobs = Jobs(api, NAMESPACE)
        body = await jobs.get(cluster.name)
        playing = asyncio.create_task(asyncio.to_thread(acts))
        lines = client_logs.of_job(jobs, api, body, client_logs.Wanted(), follow=True)
        try:
            async with asyncio.timeout(60), contextlib.aclosing(lines):
                async for some in lines:
                    found += some
        finally:
            await playing  # what went wrong there is the reason
    await asyncio.sleep(0.25)  # until the connections are closed under TLS (aiohttp, "Graceful shutdown")
    return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # connections that were cut
@pytest.mark.timeout(400)
@pytest.mark.parametrize("first", range(0, 20, 5))
def test_no_line_is_lost_over_a_kill_a_restart_of_the_job_a_late_pod_and_lost_connections(
    control_plane: ControlPlane, cluster: Callable[[str], Cluster], monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    for module in (client_logs, watching):
        monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)
    for seed in range(first, first + 5):
        played = cluster(f"played-{seed}")
        for pod in ("master-0", "worker-0", "worker-1"):
            played.start(pod)
        lines = asyncio.run(seen(control_plane, played, lambda played=played, seed=seed: play(played, seed)))
        # Sorted: under load a line of a killed pod may come later than the moment that those of the pod in its place wait for it.
        printed = sorted(line for of_pod in played.printed.values() for line in of_pod)
        shown = sorted(line.text for line in lines)
        lost, twice = Counter(printed) - Counter(shown), Counter(shown) - Counter(printed)
        assert (lost, twice) == (Counter(), Counter()), f"seed {seed}"
        gc.collect()  # the connections that were cut, while their warnings are expected


def test_logs_that_are_there_are_in_the_order_of_time_and_chosen_by_role_rank_tail_and_since(
    cluster: Callable[[str], Cluster], disttrain: Call
) -> None:
    there = cluster("there")
    for pod in ("master-0", "worker-0", "worker-1"):
        there.start(pod)
    for pod in ("worker-1", "master-0", "worker-0", "worker-1", "worker-0"):
        there.print(pod, after=SECOND)
    here = ("logs", "there", "-n", NAMESPACE)
    code, out, err = disttrain(*here)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "[worker-1] worker-1 line 0",
        "[master]   master-0 line 0",
        "[worker-0] worker-0 line 0",
        "[worker-1] worker-1 line 1",
        "[worker-0] worker-0 line 1",
    ]
    assert disttrain(*here, "--rank", "1", "--tail", "1")[1] == "[worker-1] worker-1 line 1\n"
    assert disttrain(*here, "--role", "master")[1] == "[master]   master-0 line 0\n"
    since = disttrain(*here, "--since", "2026-11-30T12:00:05Z")[1]
    assert since == "[worker-0] worker-0 line 1\n"
    code, out, err = disttrain(*here, "--rank", "7")
    assert (code, out) == (0, "")
    assert err.startswith("there: no lines: ")
    assert "there is no run gone in .disttrain/runs; namespace" in disttrain("logs", "gone")[2]


def test_ctrl_c_ends_a_log_that_is_followed_quietly_and_a_reader_that_is_gone_does_too(
    control_plane: ControlPlane, cluster: Callable[[str], Cluster], tmp_path: Path
) -> None:
    followed = cluster("followed")
    followed.start("worker-0")
    followed.print("worker-0")
    environment: dict[str, Any] = {**os.environ, "KUBECONFIG": str(control_plane.kubeconfig)}
    command = [str(Path(sys.executable).with_name("disttrain")), "logs", "-f", "followed", "-n", NAMESPACE]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path, "env": environment}
    # Tests that run in the background ignore Ctrl-C, and with them what they start.
    pipes |= {"text": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "[worker-0] worker-0 line 0\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=30) == ("", "")
        assert child.returncode == 130
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(timeout=30) == 1
        assert child.stderr.read() == ""
