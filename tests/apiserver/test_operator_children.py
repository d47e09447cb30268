"""A job on a real API server: what it becomes, and that it is kept so. No kubelet: the test plays it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apiserver.operating import (
    EVENTS,
    JOBS,
    PODS,
    POLICIES,
    SERVICES,
    Operator,
    Refusal,
    Rest,
    eventually,
    job,
    pod_names,
    stamp,
)
from apiserver.playing import Kubelet, Master
from cluster.controlplane import ControlPlane

NAMESPACE = "children"


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane) -> Iterator[Operator]:
    with Operator(control_plane, f"--namespaces={NAMESPACE}", "--progress=Pod", name="operator-children") as operator:
        yield operator


def started(rest: Rest, name: str, **spec: object) -> dict[str, str]:
    rest.create(JOBS, job(name, **spec))
    return complete(rest, name)


def complete(rest: Rest, name: str, **replicas: int) -> dict[str, str]:
    def check() -> dict[str, str]:
        pods = rest.pods_of(name)
        return pods if sorted(pods) == pod_names(name, **replicas) else {}

    return eventually(check)


def status_of(rest: Rest, name: str) -> dict[str, object]:
    status: dict[str, object] = rest.get(JOBS, name).get("status", {})
    return status


def condition(rest: Rest, name: str, type_: str) -> tuple[str, str]:
    found = {c["type"]: (c["status"], c["reason"]) for c in status_of(rest, name).get("conditions", ())}  # type: ignore[attr-defined]
    return found.get(type_, ("", ""))


def message(rest: Rest, name: str, type_: str) -> str:
    return str(next(c["message"] for c in status_of(rest, name)["conditions"] if c["type"] == type_))  # type: ignore[attr-defined]


def test_job_becomes_pods_and_service_and_network_policy_that_it_owns(rest: Rest, operator: Operator) -> None:
    started(rest, "made")
    uid = rest.get(JOBS, "made")["metadata"]["uid"]
    children = [
        rest.get(SERVICES, "made"),
        rest.get(POLICIES, "made"),
        *(rest.get(PODS, name) for name in pod_names("made")),
    ]
    for child in children:
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["kind"]) == (uid, True, "DistTrainJob")
        assert child["metadata"]["labels"]["disttrain.dev/job-name"] == "made"
    eventually(lambda: condition(rest, "made", "Valid") == ("True", "Accepted"))
    assert eventually(
        lambda: [e for e in rest.list(EVENTS) if e["involvedObject"].get("uid") == uid and e["reason"] == "Created"]
    )


def test_deleted_child_is_replaced_within_seconds(rest: Rest, operator: Operator) -> None:
    before = started(rest, "kept")
    for path, name in ((PODS, "kept-worker-1"), (SERVICES, "kept"), (POLICIES, "kept")):
        uid = rest.get(path, name)["metadata"]["uid"]
        options = {"gracePeriodSeconds": 0} if path == PODS else {}
        rest.delete(path, name, **options)
        # Not by the comparison with the API server, which comes once a minute, nor by asking for what is overdue after 15 s.
        eventually(lambda path=path, name=name, uid=uid: rest.get(path, name)["metadata"]["uid"] != uid, seconds=12)
    after = complete(rest, "kept")
    assert {name for name in before if before[name] != after[name]} == {"kept-worker-1"}


def test_failed_pod_is_replaced_and_counted_once(rest: Rest, operator: Operator, kubelet: Kubelet) -> None:
    before = started(rest, "failing")
    for name in before:
        kubelet.run(name)
    kubelet.fail("failing-worker-0", code=137, reason="OOMKilled")
    eventually(
        lambda: (
            rest.pods_of("failing").get("failing-worker-0", before["failing-worker-0"]) != before["failing-worker-0"]
        )
    )
    restarts = eventually(lambda: status_of(rest, "failing").get("restarts"))
    assert (restarts["total"], restarts["countedTowardsLimit"]) == (1, 1)
    assert (restarts["last"]["reason"], restarts["last"]["exitCode"], restarts["last"]["index"]) == (
        "OOMKilled",
        137,
        0,
    )
    eventually(lambda: status_of(rest, "failing")["restarts"]["accounted"] == [])  # type: ignore[index]
    after = complete(rest, "failing")
    assert {name for name in before if before[name] != after[name]} == {"failing-worker-0"}


def test_users_own_fault_fails_the_job_with_its_termination_message(
    rest: Rest, operator: Operator, kubelet: Kubelet
) -> None:
    for name in started(rest, "faulty"):
        kubelet.run(name)
    kubelet.fail(
        "faulty-worker-1", code=1, message='{"message": "NameError: name \'x\' is not defined", "where": "net.py:3"}'
    )
    eventually(lambda: condition(rest, "faulty", "Failed")[0] == "True")
    text = next(c["message"] for c in status_of(rest, "faulty")["conditions"] if c["type"] == "Failed")  # type: ignore[attr-defined]
    assert "faulty-worker-1" in text
    assert "NameError" in text
    assert status_of(rest, "faulty")["state"] == "Failed"


def test_workers_that_succeed_complete_the_job(rest: Rest, operator: Operator, kubelet: Kubelet) -> None:
    names = started(rest, "done")
    for name in names:
        kubelet.run(name)
    progress = '{"progress": {"attempt": 1, "step": 90, "totalSteps": 90, "finished": true, "loss": 0.25}}'
    for name in sorted(names, reverse=True):
        kubelet.succeed(name, *([progress] if "master" in name else []))
    eventually(lambda: condition(rest, "done", "Complete")[0] == "True")
    eventually(lambda: status_of(rest, "done").get("training", {}).get("step") == 90)  # type: ignore[attr-defined]
    metrics = operator.answer("/metrics")[1]
    assert 'disttrain_operator_jobs{state="Complete"}' in metrics
    assert 'disttrain_operator_jobs_finished_total{reason="WorkersSucceeded",result="Complete"}' in metrics


def test_suspend_frees_every_pod_and_resume_begins_a_new_attempt(
    rest: Rest, operator: Operator, kubelet: Kubelet
) -> None:
    before = started(rest, "paused")
    for name in before:
        kubelet.run(name)
    rest.merge(f"{JOBS}/paused", {"spec": {"suspend": True}})
    eventually(lambda: rest.pods_of("paused") == {})
    for name in rest.list(PODS, "disttrain.dev/job-name=paused"):
        kubelet.gone(name["metadata"]["name"])
    eventually(lambda: condition(rest, "paused", "Suspended")[0] == "True")
    assert status_of(rest, "paused")["state"] == "Suspended"
    rest.merge(f"{JOBS}/paused", {"spec": {"suspend": False}})
    after = complete(rest, "paused")
    assert set(after.values()).isdisjoint(before.values())
    eventually(lambda: status_of(rest, "paused")["attempt"] == 2)


def test_a_suspended_job_with_a_checkpoint_goes_on_with_another_strategy_and_leaves_no_old_pod(
    rest: Rest, operator: Operator, kubelet: Kubelet, master: Master
) -> None:
    path = f"{JOBS}/switched"
    rest.create(JOBS, job("switched", parameterServer={"replicas": 3}, observability=master.observability))

    def runs(**replicas: int) -> None:
        for name in complete(rest, "switched", **replicas):
            kubelet.run(name, "127.0.0.1" if "master" in name else "")

    def suspend() -> None:
        rest.merge(path, {"spec": {"suspend": True}})
        eventually(lambda: rest.pods_of("switched") == {})
        for pod in rest.list(PODS, "disttrain.dev/job-name=switched"):
            kubelet.gone(pod["metadata"]["name"])
        eventually(lambda: condition(rest, "switched", "Suspended")[0] == "True")

    runs(servers=3)
    master.report |= {"step": 10, "lastCheckpoint": {"step": 10, "time": stamp()}}
    eventually(lambda: status_of(rest, "switched").get("training", {}).get("lastCheckpoint"))  # type: ignore[attr-defined]
    suspend()
    data_parallel = {"type": "DataParallel", "parameterServer": None}
    rest.merge(path, {"spec": {"suspend": False, "strategy": data_parallel, "parameterServer": None}})
    runs(servers=0)
    servers = next(r for r in status_of(rest, "switched")["replicaStatuses"] if r["role"] == "ParameterServer")  # type: ignore[attr-defined]
    assert (servers["desired"], servers["ready"], servers["existing"]) == (0, 0, 0)
    suspend()
    sync = {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}
    rest.merge(path, {"spec": {"suspend": False, "strategy": sync, "parameterServer": {"replicas": 2}}})
    runs(servers=2)
    assert [service["metadata"]["name"] for service in rest.list(SERVICES, "disttrain.dev/job-name=switched")] == [
        "switched"
    ]


def test_finished_job_is_deleted_when_its_time_is_over(rest: Rest, operator: Operator, kubelet: Kubelet) -> None:
    names = started(rest, "short", runPolicy={"ttlSecondsAfterFinished": 1})
    for name in names:
        kubelet.run(name)
    for name in ("short-worker-0", "short-worker-1", "short-master-0"):
        kubelet.succeed(name)
    eventually(lambda: rest.find(JOBS, "short") is None)


def test_what_is_not_supported_yet_makes_no_pods_and_says_so(rest: Rest, operator: Operator) -> None:
    rest.create(JOBS, job("later", scheduling={"gang": "Kueue"}))
    eventually(lambda: condition(rest, "later", "Valid") == ("False", "NotYetSupported"))
    assert rest.list(PODS, "disttrain.dev/job-name=later") == []


def test_a_template_that_reaches_into_its_node_makes_no_pods_and_says_so(rest: Rest, operator: Operator) -> None:
    rest.create(JOBS, job("host", worker={"replicas": 1, "template": {"spec": {"hostNetwork": True}}}))
    eventually(lambda: condition(rest, "host", "Valid") == ("False", "TemplateNotAllowed"))
    assert rest.list(PODS, "disttrain.dev/job-name=host") == []


def test_the_scale_subresource_resizes_an_elastic_job(rest: Rest, operator: Operator, kubelet: Kubelet) -> None:
    names = started(rest, "elastic", worker={"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 3}})
    for name in names:
        kubelet.run(name)

    def target() -> int:
        return status_of(rest, "elastic")["worker"]["targetReplicas"]  # type: ignore[index]

    rest.merge(f"{JOBS}/elastic/scale", {"spec": {"replicas": 3}})
    complete(rest, "elastic", workers=3)
    eventually(lambda: target() == 3)
    rest.merge(f"{JOBS}/elastic/scale", {"spec": {"replicas": 1}})
    complete(rest, "elastic", workers=1)
    eventually(lambda: target() == 1)
    assert "total" not in status_of(rest, "elastic").get("restarts", {})
    with pytest.raises(Refusal, match="must lie within elastic"):
        rest.merge(f"{JOBS}/elastic/scale", {"spec": {"replicas": 4}})


def test_job_of_another_controller_is_left_alone(rest: Rest, operator: Operator) -> None:
    rest.create(JOBS, job("theirs", managedBy="kueue.x-k8s.io/multikueue"))
    started(rest, "after-theirs")  # the operator has been past it
    assert "status" not in rest.get(JOBS, "theirs")
    assert rest.list(PODS, "disttrain.dev/job-name=theirs") == []
    assert rest.find(SERVICES, "theirs") is None


def test_object_of_another_owner_is_never_adopted(rest: Rest, operator: Operator) -> None:
    theirs = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "taken-worker-0"}}
    theirs["spec"] = {"containers": [{"name": "own", "image": "x"}]}
    uid = rest.create(PODS, theirs)["metadata"]["uid"]
    rest.create(JOBS, job("taken"))
    eventually(lambda: "taken-worker-0" in str(status_of(rest, "taken").get("conditions")))
    pod = rest.get(PODS, "taken-worker-0")
    assert pod["metadata"]["uid"] == uid
    assert "ownerReferences" not in pod["metadata"]
    rest.delete(PODS, "taken-worker-0", gracePeriodSeconds=0)
    eventually(lambda: sorted(rest.pods_of("taken")) == pod_names("taken"), seconds=30)


def test_pods_of_a_former_job_of_the_same_name_are_not_taken_over(
    rest: Rest, operator: Operator, kubelet: Kubelet
) -> None:
    former = started(rest, "again")
    for name in former:
        kubelet.run(name)
    rest.delete(JOBS, "again")
    for name in former:  # what a garbage collector that is late has not come to yet
        assert rest.find(PODS, name)
    rest.create(JOBS, job("again"))
    eventually(lambda: "FormerJobEnds" in str(status_of(rest, "again").get("conditions")))
    assert "NameTaken" not in str(status_of(rest, "again"))
    assert rest.pods_of("again") == former
    for path, names in ((PODS, former), (SERVICES, ["again"]), (POLICIES, ["again"])):
        for name in names:
            rest.delete(path, name, gracePeriodSeconds=0)
    eventually(lambda: set(rest.pods_of("again")) == set(former), seconds=30)


def test_sidecar_that_crashes_is_named_and_its_pod_is_ready(rest: Rest, operator: Operator, kubelet: Kubelet) -> None:
    template = {"spec": {"containers": [{"name": "ship", "image": "x"}]}}
    for name in started(rest, "ships", worker={"replicas": 2, "template": template}):
        kubelet.run(name)
    eventually(lambda: "WaitingForPeers" in str(status_of(rest, "ships")["conditions"]))
    kubelet.crash_sidecar("ships-worker-0", "ship")
    expected = "Container ship of pod ships-worker-0: failed with exit code 3"
    eventually(lambda: expected in str(status_of(rest, "ships")["conditions"]))
    eventually(lambda: any(expected in event["message"] for event in rest.list(EVENTS)))
    assert "WaitingForPeers" in str(status_of(rest, "ships")["conditions"])
    assert status_of(rest, "ships")["worker"]["readyReplicas"] == 2


def test_refused_pod_is_reported_and_tried_again(rest: Rest, operator: Operator) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    quotas = "api/v1/{}/resourcequotas"
    created = rest.create(quotas, quota)
    rest.merge(f"{quotas}/none/status", {"status": {"hard": created["spec"]["hard"], "used": {"pods": "0"}}})
    try:
        rest.create(JOBS, job("refused"))
        eventually(lambda: "PodRefused" in str(status_of(rest, "refused").get("conditions")), seconds=20)
        assert "exceeded quota" in str(status_of(rest, "refused"))
    finally:
        rest.delete(quotas, "none")
    eventually(lambda: sorted(rest.pods_of("refused")) == pod_names("refused"), seconds=30)


def test_misspelt_field_of_a_template_is_reported_and_not_dropped(rest: Rest, operator: Operator) -> None:
    template = {"spec": {"containers": [{"name": "trainer", "livenessProbe": {"tcpSocket": {"prot": 80}}}]}}
    rest.create(JOBS, job("misspelt", master={"template": template}))
    eventually(lambda: condition(rest, "misspelt", "Valid") == ("False", "PodRefused"))
    assert "prot" in message(rest, "misspelt", "Valid")


def test_value_of_another_type_in_a_template_is_reported(rest: Rest, operator: Operator) -> None:
    template = {"spec": {"containers": [{"name": "trainer", "livenessProbe": "often"}]}}
    rest.create(JOBS, job("mistyped", master={"template": template}))
    eventually(lambda: condition(rest, "mistyped", "Valid") == ("False", "PodRefused"))


def test_secret_that_a_volume_names_and_that_does_not_exist_is_named_in_the_condition(
    rest: Rest, operator: Operator, kubelet: Kubelet
) -> None:
    for name in started(rest, "volumes"):
        kubelet.place(name, "node-1")
        kubelet.wait(name)
    words = 'MountVolume.SetUp failed for volume "data" : secret "nope" not found'
    kubelet.tell("volumes-worker-1", "FailedMount", words)
    eventually(lambda: condition(rest, "volumes", "Ready") == ("False", "SecretNotFound"), seconds=30)
    assert message(rest, "volumes", "Ready").startswith(f"volumes-worker-1: {words}; create it in the job's namespace")


@pytest.mark.parametrize("path", [PODS, SERVICES, POLICIES], ids=["pod", "service", "network policy"])
def test_child_that_lost_its_label_is_made_again(rest: Rest, operator: Operator, path: str) -> None:
    name = f"unlabelled-{path.rpartition('/')[2]}"
    started(rest, name)
    child = f"{name}-worker-0" if path == PODS else name
    uid = rest.get(path, child)["metadata"]["uid"]
    rest.merge(f"{path}/{child}", {"metadata": {"labels": {"disttrain.dev/job-name": None}}})
    eventually(lambda: rest.get(path, child)["metadata"]["uid"] != uid)
    complete(rest, name)


def test_network_policy_follows_the_job(rest: Rest, operator: Operator) -> None:
    started(rest, "open")
    rest.merge(f"{JOBS}/open", {"spec": {"network": {"policy": "None"}}})
    eventually(lambda: rest.find(POLICIES, "open") is None)
    rest.merge(f"{JOBS}/open", {"spec": {"network": {"policy": "JobOnly"}}})
    eventually(lambda: rest.find(POLICIES, "open"))


def test_unchanged_job_costs_no_write(rest: Rest, operator: Operator, kubelet: Kubelet, master: Master) -> None:
    for name in started(rest, "still", observability=master.observability):
        kubelet.run(name, ip="127.0.0.1")
    eventually(lambda: condition(rest, "still", "Ready")[0] == "True")
    other = Operator.requests(operator)
    # Each write of a label is news of the job, and a pass; none of them changes anything that was to be done.
    for number in range(5):
        rest.merge(f"{JOBS}/still", {"metadata": {"labels": {"touched": str(number)}}})
    version = rest.get(JOBS, "still")["metadata"]["resourceVersion"]
    started(rest, "after-still")
    assert rest.get(JOBS, "still")["metadata"]["resourceVersion"] == version
    assert operator.requests()["create", "pods", "201"] == other["create", "pods", "201"] + 4


def test_operator_leaves_no_mark_of_kopf(rest: Rest, operator: Operator) -> None:
    started(rest, "clean")
    for path, name in ((JOBS, "clean"), (PODS, "clean-master-0"), (SERVICES, "clean")):
        metadata = rest.get(path, name)["metadata"]
        assert "finalizers" not in metadata
        assert not [key for key in metadata.get("annotations", {}) if "kopf" in key]


def test_probes_say_that_it_lives(operator: Operator) -> None:
    assert operator.answer("/healthz") == (200, "ok\n")
    assert operator.answer("/readyz") == (200, "ok\n")
    assert 'disttrain_operator_watch_age_seconds{resource="pods"}' in operator.answer("/metrics")[1]


def test_metrics_tell_the_memory_and_cpu_of_the_operator(operator: Operator) -> None:
    lines = dict(line.rsplit(" ", 1) for line in operator.answer("/metrics")[1].splitlines() if line[0] != "#")
    assert float(lines["process_resident_memory_bytes"]) > 10e6
    assert float(lines["process_cpu_seconds_total"]) > 0
