"""`disttrain history` and `plot` of a job of the cluster: from its master, through a real API server, with the user's rights."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from apiserver.operating import JOBS, PODS, Rest, job
from apiserver.playing import Kubelet, Master
from apiserver.test_cli import Call, disttrain
from cluster.controlplane import ControlPlane
from disttrain.api.history import Point

NAMESPACE = "history"
HERE = ("-n", NAMESPACE)
__all__ = ["disttrain"]  # a fixture


@pytest.fixture
def master() -> Iterator[Master]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(("192.0.2.1", 9))  # sends nothing: it finds the address that this machine would send from
        address = asked.getsockname()[0]
    with Master(address) as master:
        yield master


@pytest.fixture
def training(rest: Rest, kubelet: Kubelet, master: Master) -> str:
    """A job whose master runs."""
    spec = {"checkpoint": {"volume": {"persistentVolumeClaim": "ckpt"}}, "observability": master.observability}
    owner = rest.create(JOBS, job("training", **spec))["metadata"]
    labels = {"job-name": "training", "role": "master", "index": "0", "attempt": "1"}
    reference = {
        "apiVersion": "disttrain.dev/v1alpha1",
        "kind": "DistTrainJob",
        "name": "training",
        "uid": owner["uid"],
    }
    metadata = {"name": "training-master-0", "labels": {f"disttrain.dev/{name}": text for name, text in labels.items()}}
    body = {
        "metadata": {**metadata, "ownerReferences": [reference]},
        "spec": {"containers": [{"name": "trainer", "image": "x"}]},
    }
    rest.create(PODS, body)
    kubelet.run("training-master-0", master.address)
    return "training"


def test_history_and_plot_ask_the_master_and_say_why_there_is_none(
    control_plane: ControlPlane, rest: Rest, kubelet: Kubelet, master: Master, training: str, disttrain: Call
) -> None:
    code, out, err = disttrain("history", training, *HERE)
    assert (code, out) == (2, "")
    assert err == "history: the master of training has no history yet, or its trainer is of an older release\n"

    points = [Point(step=n, time=float(n), seconds=1.0, loss=1 / n) for n in range(1, 4)]
    master.history = "".join(f"{point.encode()}\n" for point in points) + '{"step":4,"ti'
    code, out, err = disttrain("history", training, *HERE, "-o", "csv")
    assert (code, err) == (0, "")
    assert [line.split(",")[1] for line in out.splitlines()] == ["step", "1", "2", "3"]
    code, out, err = disttrain("plot", training, *HERE)
    assert (code, err) == (0, "")
    assert out.startswith("training   step 3   loss 0.3333\n")

    code, out, err = disttrain("report", training, *HERE, "-o", "-")
    assert (code, err) == (0, "")
    assert "<title>training</title>" in out
    assert "persistentVolumeClaim" in out  # of the job's own configuration
    code, out, err = disttrain("plot", training, *HERE, kubeconfig=control_plane.kubeconfig_for("stranger"))
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert err.startswith("plot: you may not read the job in namespace history: ")

    kubelet.succeed("training-master-0")
    rest.merge(f"{JOBS}/training/status", {"status": {"state": "Complete"}})
    code, out, err = disttrain("plot", training, *HERE)
    assert (code, out) == (2, "")
    assert err == (
        "plot: training is Complete, and only a master that runs serves its history; it lies beside the checkpoints on claim ckpt\n"
    )
