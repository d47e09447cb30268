"""Gangs on a real API server with the CRD of a gang scheduler. No scheduler runs there: the test plays it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apiserver.operating import JOBS, PODS, SERVICES, Operator, Rest, eventually, job, pod_names
from apiserver.playing import Kubelet
from cluster.controlplane import ControlPlane

NAMESPACE = "gangs"
GROUPS = "apis/scheduling.x-k8s.io/v1alpha1/{}/podgroups"
VOLCANO_GROUPS = "apis/scheduling.volcano.sh/v1beta1/{}/podgroups"
CRDS = Path(__file__).with_name("gangs")
GANG = {"scheduling": {"gang": "Coscheduling"}}
FLAGS = (f"--namespaces={NAMESPACE}", "--progress=Pod", "--resync-seconds=1")


@pytest.fixture(scope="module")
def pod_groups(control_plane: ControlPlane, rest: Rest) -> Iterator[None]:
    install(control_plane, rest)
    yield
    control_plane.kubectl("delete", "-f", str(CRDS), "--ignore-not-found")


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, rest: Rest, pod_groups: None) -> Iterator[Operator]:
    with Operator(control_plane, *FLAGS, name="operator-gangs") as operator:
        yield operator


def install(control_plane: ControlPlane, rest: Rest) -> None:
    control_plane.kubectl("apply", "-f", str(CRDS))
    for groups in (GROUPS, VOLCANO_GROUPS):
        eventually(lambda: rest("GET", groups)["kind"] == "PodGroupList")  # noqa: B023


def pod_group(name: str) -> Any:
    """One that no job owns."""
    return {
        "apiVersion": "scheduling.x-k8s.io/v1alpha1",
        "kind": "PodGroup",
        "metadata": {"name": name},
        "spec": {"minMember": 1},
    }


def condition(rest: Rest, name: str, type_: str) -> Any:
    conditions = rest.get(JOBS, name)["status"]["conditions"]
    return next(one for one in conditions if one["type"] == type_)


def made(rest: Rest, name: str, **replicas: int) -> None:
    eventually(lambda: sorted(rest.pods_of(name)) == pod_names(name, **replicas))


def test_without_the_crd_a_job_gets_a_condition_and_nothing_else_until_it_is_installed(
    control_plane: ControlPlane, rest: Rest
) -> None:
    with Operator(control_plane, *FLAGS, name="operator-no-crd") as operator:
        rest.create(JOBS, job("early", **GANG))
        eventually(lambda: condition(rest, "early", "Valid")["reason"] == "GangSchedulerNotFound")
        assert "podgroups.scheduling.x-k8s.io" in condition(rest, "early", "Valid")["message"]
        assert (rest.pods_of("early"), rest.find(SERVICES, "early")) == ({}, None)
        install(control_plane, rest)
        # The process ends, so that its next one watches what the cluster has now.
        assert operator.program is not None
        eventually(lambda: not operator.program.alive)
        assert "podgroups.scheduling.x-k8s.io" in operator.log.splitlines()[-1]
        assert "podgroups.scheduling.x-k8s.io can be read now" in operator.log
        operator.start()
        made(rest, "early")
        assert rest.get(GROUPS, "early")["spec"]["minMember"] == 4
        rest.delete(JOBS, "early")
        for name in pod_names("early"):
            rest.delete(PODS, name, gracePeriodSeconds=0)
    control_plane.kubectl("delete", "-f", str(CRDS))


def test_pod_group_is_made_first_and_the_pods_name_it_and_its_scheduler(rest: Rest, operator: Operator) -> None:
    resources = {"requests": {"cpu": "500m", "memory": "1Gi"}}
    template = {"spec": {"containers": [{"name": "trainer", "resources": resources}]}}
    rest.create(JOBS, job("first", worker={"replicas": 3, "template": template}, **GANG))
    made(rest, "first", workers=3)
    group, uid = rest.get(GROUPS, "first"), rest.get(JOBS, "first")["metadata"]["uid"]
    (owner,) = group["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == (uid, True)
    assert group["spec"] == {
        "minMember": 5,
        "minResources": {"cpu": "1500m", "memory": str(3 * 2**30)},
        "scheduleTimeoutSeconds": 600,
    }
    for name in pod_names("first", workers=3):
        pod = rest.get(PODS, name)
        assert int(pod["metadata"]["resourceVersion"]) > int(group["metadata"]["resourceVersion"])
        assert pod["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] == "first"
        assert pod["spec"]["schedulerName"] == "scheduler-plugins-scheduler"


def test_gang_of_8_on_7_places_holds_nothing_after_the_time_out(
    rest: Rest, operator: Operator, kubelet: Kubelet
) -> None:
    rest.create(JOBS, job("eight", worker={"replicas": 6}, scheduling={"gang": "Coscheduling", "timeoutSeconds": 3}))
    made(rest, "eight", workers=6)
    *placed, last = pod_names("eight", workers=6)
    for name in placed:
        kubelet.place(name, "node-1")
    words = "0/7 nodes are available: 7 Insufficient cpu."
    kubelet.find_no_node(last, words)
    eventually(lambda: condition(rest, "eight", "Scheduled")["message"].startswith(f"7 of 8 placed; {last}: {words}"))
    eventually(lambda: rest.pods_of("eight") == {})
    for name in placed:
        kubelet.gone(name)
    eventually(lambda: rest.find(GROUPS, "eight") is None)
    assert rest.list(PODS, "disttrain.dev/job-name=eight") == []
    eventually(lambda: rest.get(JOBS, "eight")["status"]["state"] == "Pending")
    status = rest.get(JOBS, "eight")["status"]
    assert (status["attempt"], status.get("restarts", {}).get("total", 0)) == (2, 0)
    assert condition(rest, "eight", "Scheduled")["reason"] == "GangTimedOut"
    assert "7 of 8 placed" in condition(rest, "eight", "Scheduled")["message"]


def test_pod_group_of_another_owner_is_not_the_jobs(rest: Rest, operator: Operator) -> None:
    theirs = rest.create(GROUPS, pod_group("taken"))["metadata"]["uid"]
    rest.create(JOBS, job("taken", **GANG))
    eventually(lambda: condition(rest, "taken", "Valid")["reason"] == "NameTaken")
    assert rest.pods_of("taken") == {}
    assert rest.get(GROUPS, "taken")["metadata"]["uid"] == theirs
    rest.delete(GROUPS, "taken")
    eventually(lambda: sorted(rest.pods_of("taken")) == pod_names("taken"), seconds=30)
    assert rest.get(GROUPS, "taken")["spec"]["minMember"] == 4


def test_pod_group_goes_while_the_job_is_suspended(rest: Rest, operator: Operator) -> None:
    rest.create(JOBS, job("rests", **GANG))
    made(rest, "rests")
    rest.merge(f"{JOBS}/rests", {"spec": {"suspend": True}})
    eventually(lambda: rest.find(GROUPS, "rests") is None)
    rest.merge(f"{JOBS}/rests", {"spec": {"suspend": False}})
    made(rest, "rests")
    assert rest.get(GROUPS, "rests")["spec"]["minMember"] == 4


def test_pods_of_volcano_come_when_it_has_admitted_their_group(rest: Rest, operator: Operator) -> None:
    template = {"spec": {"schedulerName": "volcano"}}
    rest.create(JOBS, job("volcano", worker={"replicas": 2, "template": template}))  # Auto
    group = eventually(lambda: rest.find(VOLCANO_GROUPS, "volcano"))
    by_role = {"master": 1, "parameter-server": 1, "worker": 2}
    assert group["spec"] == {"minMember": 4, "minTaskMember": by_role, "minResources": {}}
    eventually(lambda: condition(rest, "volcano", "Scheduled")["reason"] == "WaitingForGang")
    rest.merge(f"{VOLCANO_GROUPS}/volcano", {"status": {"phase": "Pending"}})
    eventually(lambda: "in phase Pending" in condition(rest, "volcano", "Scheduled")["message"])
    assert rest.pods_of("volcano") == {}
    rest.merge(f"{VOLCANO_GROUPS}/volcano", {"status": {"phase": "Inqueue"}})
    made(rest, "volcano")
    for name in pod_names("volcano"):
        pod = rest.get(PODS, name)
        assert pod["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == "volcano"
        assert pod["spec"]["schedulerName"] == "volcano"
