"""What the operator survives of the way to the API server: refused writes, watches that are cut, watches that fall silent."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from apiserver.meddling import Meddler, Watches
from apiserver.operating import JOBS, PODS, Operator, Rest, eventually, job, pod_names
from apiserver.playing import Kubelet, Master
from cluster.controlplane import ControlPlane

NAMESPACE = "meddled"


@pytest.fixture
def meddler(control_plane: ControlPlane) -> Iterator[Meddler]:
    with Meddler(control_plane) as meddler:
        yield meddler


@pytest.fixture
def operator(control_plane: ControlPlane, meddler: Meddler, request: pytest.FixtureRequest) -> Iterator[Operator]:
    with Operator(
        control_plane,
        f"--namespaces={NAMESPACE}",
        "--progress=Pod",
        "--resync-seconds=1",
        kubeconfig=meddler.kubeconfig,
        name=f"operator-{request.node.name}",
    ) as operator:
        yield operator


def running(rest: Rest, kubelet: Kubelet, master: Master, name: str) -> None:
    """A job of which every pod runs, and whose status says so."""
    rest.create(JOBS, job(name, observability=master.observability))
    eventually(lambda: sorted(rest.pods_of(name)) == pod_names(name))
    for pod in pod_names(name):
        kubelet.run(pod, ip="127.0.0.1")
    eventually(lambda: condition(rest, name, "Ready") == "True")


def condition(rest: Rest, name: str, type_: str) -> str:
    conditions: list[Any] = rest.get(JOBS, name)["status"]["conditions"]
    return str(next(c["status"] for c in conditions if c["type"] == type_))


def restarts(rest: Rest, name: str) -> Any:
    return rest.get(JOBS, name)["status"].get("restarts")


def test_writes_that_are_refused_wait_as_asked_and_count_no_failure_twice(
    rest: Rest, operator: Operator, kubelet: Kubelet, meddler: Meddler, master: Master
) -> None:
    running(rest, kubelet, master, "busy")
    uids = {pod: rest.get(PODS, pod)["metadata"]["uid"] for pod in ("busy-worker-0", "busy-worker-1")}
    meddler.refuse_writes(3, retry_after=2)
    kubelet.fail("busy-worker-1")
    eventually(lambda: meddler.refused)
    kubelet.fail("busy-worker-0")  # news that wants a write at once, and has to wait all the same
    for pod, uid in uids.items():
        eventually(lambda pod=pod, uid=uid: rest.get(PODS, pod)["metadata"]["uid"] != uid, seconds=30)
    eventually(lambda: restarts(rest, "busy")["accounted"] == [])
    assert restarts(rest, "busy")["total"] == 2
    path = meddler.refused[0].path
    begun = [write.time for write in meddler.writes if write.path == path and write.time >= meddler.refused[0].time]
    assert [write.path for write in meddler.refused] == [path] * 3
    assert all(later - earlier > 1.95 for earlier, later in pairwise(begun[:4]))


def test_creations_that_are_refused_are_made_up_for(
    rest: Rest, operator: Operator, kubelet: Kubelet, meddler: Meddler
) -> None:
    meddler.refuse_writes(5, retry_after=1)
    rest.create(JOBS, job("late"))
    eventually(lambda: sorted(rest.pods_of("late")) == pod_names("late"))
    eventually(lambda: rest.get(JOBS, "late")["status"]["state"] == "Scheduling")
    assert len(meddler.refused) == 5
    assert restarts(rest, "late") is None


@pytest.mark.parametrize("watches", [Watches.CUT, Watches.MUTED], ids=["cut", "mute"])
def test_pod_that_fails_while_watches_are(
    rest: Rest, operator: Operator, kubelet: Kubelet, meddler: Meddler, master: Master, watches: Watches
) -> None:
    name = f"watched-{watches.name.lower()}"
    running(rest, kubelet, master, name)
    if watches is Watches.CUT:
        meddler.cut_watches()
    meddler.watches = watches
    uid = rest.get(PODS, f"{name}-worker-1")["metadata"]["uid"]
    kubelet.fail(f"{name}-worker-1")
    eventually(lambda: rest.get(PODS, f"{name}-worker-1")["metadata"]["uid"] != uid)
    kubelet.run(f"{name}-worker-1")
    eventually(lambda: condition(rest, name, "Ready") == "True" and condition(rest, name, "Restarting") == "False")
    assert restarts(rest, name)["total"] == 1
    assert operator.answer("/healthz")[0] == 200
    meddler.watches = Watches.PASSED
    rest.delete(PODS, f"{name}-ps-0", gracePeriodSeconds=0)
    eventually(lambda: sorted(rest.pods_of(name)) == pod_names(name))
