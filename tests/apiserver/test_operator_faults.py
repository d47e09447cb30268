"""What the operator survives: its own death at any moment, an API server that goes away, events that never come, a job it cannot read."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apiserver.operating import JOBS, PODS, SERVICES, Operator, Rest, eventually, job, pod_names
from apiserver.playing import Kubelet, Master
from cluster.controlplane import ControlPlane

NAMESPACE = "faults"


@pytest.fixture
def operator(control_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Operator]:
    operator = Operator(
        control_plane, f"--namespaces={NAMESPACE}", "--progress=Pod", name=f"operator-{request.node.name}"
    )
    yield operator
    operator.kill()


def status(rest: Rest, name: str) -> Any:
    return rest.get(JOBS, name).get("status", {})


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.2])
def test_failure_is_counted_once_though_the_operator_is_killed_over_it(
    rest: Rest, operator: Operator, kubelet: Kubelet, moment: float
) -> None:
    name = f"killed-{int(moment * 1000)}"
    rest.create(JOBS, job(name))
    operator.start()
    eventually(lambda: sorted(rest.pods_of(name)) == pod_names(name))
    for pod in pod_names(name):
        kubelet.run(pod)
    uid = rest.get(PODS, f"{name}-worker-1")["metadata"]["uid"]
    kubelet.fail(f"{name}-worker-1")
    time.sleep(moment)  # no waiting for something: the moment of the kill is the input of this test
    operator.kill()
    operator.start()
    eventually(lambda: rest.get(PODS, f"{name}-worker-1")["metadata"]["uid"] != uid)
    eventually(lambda: status(rest, name)["restarts"]["accounted"] == [])
    assert status(rest, name)["restarts"]["total"] == 1
    assert sorted(rest.pods_of(name)) == pod_names(name)


def test_killed_in_the_middle_of_a_burst_it_finishes_it_after_its_restart(rest: Rest, operator: Operator) -> None:
    jobs = [f"burst-{number}" for number in range(20)]
    operator.start()
    for name in jobs:
        rest.create(JOBS, job(name))
    operator.kill()
    operator.start()
    started = time.monotonic()
    for name in jobs:
        eventually(lambda name=name: sorted(rest.pods_of(name)) == pod_names(name), seconds=30)
    assert time.monotonic() - started < 30
    for name in jobs:
        rest.delete(JOBS, name)


def test_what_happens_while_it_is_away_is_found_when_it_comes_back(
    rest: Rest, operator: Operator, kubelet: Kubelet
) -> None:
    rest.create(JOBS, job("away"))
    operator.start()
    eventually(lambda: sorted(rest.pods_of("away")) == pod_names("away"))
    operator.kill()
    rest.delete(PODS, "away-ps-0", gracePeriodSeconds=0)
    rest.delete(SERVICES, "away")
    rest.merge(f"{JOBS}/away", {"spec": {"runPolicy": {"backoffLimit": 2}}})
    operator.start()
    eventually(lambda: sorted(rest.pods_of("away")) == pod_names("away") and rest.find(SERVICES, "away"))
    eventually(lambda: status(rest, "away")["observedGeneration"] == 2)


def test_sigterm_ends_it_in_order(rest: Rest, operator: Operator) -> None:
    operator.start()
    began = time.monotonic()
    assert operator.stop() == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in operator.log


def test_second_sigterm_changes_nothing(rest: Rest, operator: Operator) -> None:
    operator.start()
    assert operator.program
    operator.program.send(signal.SIGTERM)
    assert operator.stop() == 0
    assert "Traceback" not in operator.log


def test_sigterm_while_the_api_server_is_away_ends_it(
    control_plane: ControlPlane, rest: Rest, operator: Operator
) -> None:
    operator.start()
    control_plane.api_server.stop()
    try:
        began = time.monotonic()
        assert operator.stop() == 0
        assert time.monotonic() - began < 8  # 5 of them kopf gives to its own requests
    finally:
        control_plane.start_api_server()
    assert "Traceback" not in operator.log


def test_job_that_cannot_be_read_is_reported_and_not_touched(
    control_plane: ControlPlane, rest: Rest, operator: Operator
) -> None:
    operator.start()
    crds = "apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    crd = rest.get(crds, "disttrainjobs.disttrain.dev")
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    loose = json.loads(json.dumps(crd))
    for version in loose["spec"]["versions"]:
        version["schema"] = {"openAPIV3Schema": anything}
    body = job("unreadable")
    body["spec"]["worker"] = {"replicas": 0}

    def replaced(spec: Any) -> Any:
        """By its newest version: the API server's own controllers write its status meanwhile."""
        newest = rest.get(crds, "disttrainjobs.disttrain.dev")
        return rest("PUT", f"{crds}/disttrainjobs.disttrain.dev", {**newest, "spec": spec})

    eventually(lambda: replaced(loose["spec"]))
    try:
        eventually(lambda: rest.create(JOBS, body))
    finally:
        eventually(lambda: replaced(crd["spec"]))
    rest.create(JOBS, job("readable"))
    eventually(lambda: sorted(rest.pods_of("readable")) == pod_names("readable"))
    conditions = eventually(lambda: status(rest, "unreadable").get("conditions"))
    assert [(c["type"], c["status"], c["reason"]) for c in conditions] == [("Valid", "False", "InvalidSpec")]
    assert "worker.replicas" in conditions[0]["message"]
    assert rest.pods_of("unreadable") == {}
    assert operator.answer("/healthz")[0] == 200
    rest.delete(JOBS, "unreadable")


def test_api_server_that_goes_away_for_a_while(control_plane: ControlPlane, rest: Rest, operator: Operator) -> None:
    operator.start()
    rest.create(JOBS, job("outage"))
    eventually(lambda: sorted(rest.pods_of("outage")) == pod_names("outage"))
    control_plane.api_server.stop()
    time.sleep(2)  # long enough for requests to fail
    control_plane.start_api_server()
    rest.delete(PODS, "outage-worker-0", gracePeriodSeconds=0)
    eventually(lambda: sorted(rest.pods_of("outage")) == pod_names("outage"), seconds=30)
    assert operator.answer("/healthz")[0] == 200


def test_pod_that_vanishes_before_a_broken_watch_has_listed_again_is_replaced(
    control_plane: ControlPlane, rest: Rest, operator: Operator
) -> None:
    operator.start()
    rest.create(JOBS, job("unseen"))
    eventually(lambda: sorted(rest.pods_of("unseen")) == pod_names("unseen"))
    with operator.frozen():
        control_plane.api_server.stop()
        control_plane.start_api_server()  # its watch cache begins here: a watch from before is Gone
        rest.delete(PODS, "unseen-worker-0", gracePeriodSeconds=0)
    eventually(lambda: sorted(rest.pods_of("unseen")) == pod_names("unseen"), seconds=30)


def test_event_that_never_came_is_made_good_by_the_comparison(rest: Rest, control_plane: ControlPlane) -> None:
    operator = Operator(control_plane, f"--namespaces={NAMESPACE}", "--resync-seconds=1", name="operator-resync")
    with operator:
        rest.create(JOBS, job("missed"))
        eventually(lambda: sorted(rest.pods_of("missed")) == pod_names("missed"))
        # A pod without its label is not in the watch any more, and no watch reports its deletion.
        rest.merge(f"{PODS}/missed-worker-1", {"metadata": {"labels": {"disttrain.dev/job-name": None}}})
        rest.delete(PODS, "missed-worker-1", gracePeriodSeconds=0)
        eventually(lambda: sorted(rest.pods_of("missed")) == pod_names("missed"))


def test_progress_of_the_master_reaches_the_status(rest: Rest, operator: Operator, kubelet: Kubelet) -> None:
    operator.start()
    with Master() as master:
        master.report |= {"step": 41, "loss": 0.5, "lastUpdateTime": "2026-01-01T00:00:00Z"}
        rest.create(JOBS, job("relabeled", observability=master.observability))
        eventually(lambda: sorted(rest.pods_of("relabeled")) == pod_names("relabeled"))
        for pod in pod_names("relabeled"):
            kubelet.run(pod, ip="127.0.0.1")
        assert eventually(lambda: status(rest, "relabeled").get("training"))["step"] == 41
        master.report["step"] = 60
        eventually(lambda: status(rest, "relabeled")["training"]["step"] == 60)


def test_pod_on_a_node_that_is_gone_is_removed_by_force_and_made_again(
    control_plane: ControlPlane, rest: Rest, kubelet: Kubelet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The minute of waiting is shortened, as the interpreter starts.
    (tmp_path / "sitecustomize.py").write_text(
        "from datetime import timedelta\nfrom disttrain.plan import lost_nodes\nlost_nodes.FORCED_DELETION_DELAY = timedelta(seconds=3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = (f"--namespaces={NAMESPACE}", "--progress=Pod")
    with Operator(control_plane, *flags, name="operator-lost-node"):
        rest.create(JOBS, job("lost"))
        eventually(lambda: sorted(rest.pods_of("lost")) == pod_names("lost"))
        for pod in pod_names("lost"):
            kubelet.place(pod, "node-1")
            kubelet.run(pod)
        uid = rest.get(PODS, "lost-worker-1")["metadata"]["uid"]
        began = time.monotonic()
        kubelet.lose("lost-worker-1")
        assert rest.get(PODS, "lost-worker-1")["metadata"]["uid"] == uid
        eventually(lambda: rest.get(PODS, "lost-worker-1")["metadata"]["uid"] != uid)
        assert time.monotonic() - began > 2
        # One that does not report is not asked for the end of a grace period.
        kubelet.run("lost-master-0")
        kubelet.fall_silent("lost-master-0")
        eventually(lambda: "NodeLost" in str(status(rest, "lost")["conditions"]))
        assert status(rest, "lost")["state"] == "Restarting"
        uid = rest.get(PODS, "lost-master-0")["metadata"]["uid"]
        rest.delete(PODS, "lost-master-0", gracePeriodSeconds=600)
        eventually(lambda: rest.get(PODS, "lost-master-0")["metadata"]["uid"] != uid, seconds=20)
        # Pods whose node may only be slow are left to it.
        rest.delete(PODS, "lost-worker-0", gracePeriodSeconds=1)
        uid = rest.get(PODS, "lost-worker-0")["metadata"]["uid"]
        time.sleep(5)  # nothing happens
        assert rest.get(PODS, "lost-worker-0")["metadata"]["uid"] == uid
