"""Two namespaces: what one holds, names or claims says nothing about the jobs of the other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disttrain.api import DistTrainJob, Progress
from disttrain.api.names import API_VERSION, KIND, ChildKind
from disttrain.controller.cache import Cache, Key
from disttrain.controller.expectations import Expectations
from disttrain.controller.progress import Master
from disttrain.controller.record import JobRecord
from disttrain.controller.snapshot import running_master, take_snapshot
from disttrain.controller.volume_failures import MOUNT_SECONDS, VolumeFailures
from disttrain.kube.api import EVENTS, JOBS, NETWORK_POLICIES, PODS, SERVICES, Resource
from disttrain.plan.model import Delete
from unit.controller.fake_api import NOON, ApiServer, job
from unit.controller.fake_cluster import Operator
from unit.controller.hand_turned import hand_turned, now

UID = "uid-of-the-job"
KINDS = pytest.mark.parametrize("resource", [PODS, SERVICES, NETWORK_POLICIES], ids=lambda kind: kind.plural)
NAMES = {PODS: "digits-worker-0", SERVICES: "digits", NETWORK_POLICIES: "digits"}


def child(
    resource: Resource, namespace: str, *, uid: str, name: str = "", version: int = 5, role: str = "worker"
) -> dict[str, Any]:
    """An object that names the job as its controller; one of another namespace has no right to."""
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": "digits", "uid": UID, "controller": True}
    labels = {"job-name": "digits", "role": role, "index": "0", "attempt": "1"}
    metadata = {
        "name": name or NAMES[resource],
        "namespace": namespace,
        "uid": uid,
        "resourceVersion": str(version),
        "creationTimestamp": "2026-01-01T11:00:00Z",
        "labels": {f"disttrain.dev/{name}": value for name, value in labels.items()},
        "ownerReferences": [owner],
    }
    conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T11:00:00Z"}]
    status = {"phase": "Running", "podIP": "10.0.0.9", "conditions": conditions} if resource is PODS else {}
    return {"metadata": metadata, "spec": {}, "status": status}


def the_job(namespace: str = "team") -> dict[str, Any]:
    body = job()
    body["metadata"] |= {"namespace": namespace, "uid": UID, "resourceVersion": "4", "generation": 1}
    return body


def seen(cache: Cache) -> tuple[int, bool, bool]:
    """The number of pods, and whether there is a Service and a NetworkPolicy, as the plan of the job sees them."""
    snapshot = take_snapshot(cache, JobRecord(UID), DistTrainJob.parse(the_job()), NOON)
    return len(snapshot.pods), *(kind in snapshot.children for kind in (ChildKind.SERVICE, ChildKind.NETWORK_POLICY))


@KINDS
def test_object_of_another_namespace_that_names_our_job_as_its_owner_is_no_child(resource: Resource) -> None:
    cache = Cache()
    cache.stores[resource].put(child(resource, "evil", uid="theirs"))
    assert seen(cache) == (0, False, False)
    cache.stores[resource].put(child(resource, "team", uid="ours"))
    assert seen(cache) == tuple({PODS: 1}.get(kind, True) * (kind is resource) for kind in NAMES)


@KINDS
def test_end_of_another_namespaces_object_takes_no_child_away(resource: Resource) -> None:
    cache = Cache()
    store = cache.stores[resource]
    store.put(child(resource, "team", uid="ours"))
    store.put(child(resource, "evil", uid="theirs"))
    before = seen(cache)
    store.drop(Key("evil", NAMES[resource]), "theirs")
    assert seen(cache) == before
    assert [entry.uid for entry in store.owned_by("team", UID)] == ["ours"]


@KINDS
async def test_change_of_another_namespaces_object_is_not_the_awaited_change_of_ours(resource: Resource) -> None:
    cache = Cache()
    expectations = Expectations(cache)
    ours = Key("team", "digits")
    expectations.created(ours, resource, child(resource, "team", uid="ours"), 0.0)
    expectations.seen(Key("evil", "digits"), "ours", gone=True)
    assert expectations.next_deadline(ours) is not None


def test_progress_is_not_read_from_another_namespaces_pod() -> None:
    cache = Cache()
    cache.pods.put(child(PODS, "evil", uid="theirs", name="digits-master-0", role="master"))
    assert running_master(cache, "team", UID) is None
    cache.pods.put(child(PODS, "team", uid="ours", name="digits-master-0", role="master"))
    master = running_master(cache, "team", UID)
    assert master
    assert master.uid == "ours"


@hand_turned
async def test_report_of_another_namespaces_master_is_not_taken_for_our_masters() -> None:
    operator = Operator(ApiServer())
    operator.cache.pods.put(child(PODS, "evil", uid="theirs", name="digits-master-0", role="master"))
    record = operator.records.of(Key("team", "digits"), UID)
    master = Master(namespace="evil", pod="digits-master-0", uid="theirs", ip="10.0.0.9", port=9400, interval=5)
    operator.reconciler.reported(Key("evil", "digits"), master, Progress(attempt=1, step=7))
    assert record.progress is None


@hand_turned
async def test_network_policy_of_another_namespace_is_never_deleted_for_our_job() -> None:
    server = ApiServer()
    operator = Operator(server)
    operator.cache.stores[NETWORK_POLICIES].put(child(NETWORK_POLICIES, "evil", uid="theirs"))
    parsed = DistTrainJob.parse(the_job())
    await operator.executor.carry_out(parsed, JobRecord(UID), (Delete(kind=ChildKind.NETWORK_POLICY),))
    assert server.asked("delete", NETWORK_POLICIES) == []


@hand_turned
async def test_event_of_another_namespace_says_nothing_of_our_pods_volumes() -> None:
    class Server(ApiServer):
        async def list(self, resource: Resource, namespace: str | None, **chosen: Any) -> Any:
            assert resource is EVENTS
            assert namespace == "team"
            async for page in super().list(resource, namespace, **chosen):
                yield page

    found = list[dict[str, str]]()
    reader = VolumeFailures(Server(), lambda _, messages: found.append(messages))
    reader.follow(Key("team", "digits"), now())
    await asyncio.sleep(MOUNT_SECONDS + 1)
    await reader.close()
    assert found == [{}]


def test_jobs_of_one_name_in_two_namespaces_are_two_jobs() -> None:
    cache = Cache()
    first, second = the_job("team"), the_job("evil")
    second["metadata"]["uid"] = "another"
    cache.stores[JOBS].put(first)
    cache.stores[JOBS].put(second)
    assert {entry.key.namespace: entry.uid for entry in cache.jobs} == {"team": UID, "evil": "another"}
