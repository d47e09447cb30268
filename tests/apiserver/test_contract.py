"""What the operator relies on of an API server holds of the real one, and of the one in memory with which whole operators are simulated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from apiserver.operating import JOBS as JOBS_PATH
from apiserver.operating import PODS as PODS_PATH
from apiserver.operating import Rest, job
from apiserver.playing import Kubelet
from cluster.controlplane import ControlPlane
from disttrain.api.names import LABEL_JOB_NAME
from disttrain.kube.api import COSCHEDULING_GROUPS, JOBS, PODS, SERVICES, Body, Conflict, KubeApi, NotFound, Resource
from disttrain.kube.client import KubeClient, connect
from simulation.controller.api_server import ApiServer
from simulation.controller.client import DirectApi
from simulation.controller.stories import EDITS
from simulation.controller.world import World

NAMESPACE = "contract"
NOTHING = Resource("example.org", "v1", "nothings", "Nothing")
GROUPS = Path(__file__).with_name("gangs") / "coscheduling.yaml"


class InMemory:
    """The one of the simulation."""

    def __init__(self) -> None:
        self._server = ApiServer(World().clock)
        self._server.absent = frozenset({NOTHING})
        self.api: KubeApi = DirectApi(self._server)

    def place(self, pod: str) -> None:
        self._server.patch(PODS, NAMESPACE, pod, {"spec": {"nodeName": "node-1"}})

    def say(self, pod: str, **status: Any) -> None:
        self._server.patch_status(PODS, NAMESPACE, pod, {"status": status})

    def edit(self, name: str, patch: Body) -> Body:
        return self._server.patch(JOBS, NAMESPACE, name, patch)

    def watch(self, resource: Resource, version: int) -> list[tuple[str, Body]]:
        return [(change.type, change.body) for change in self._server.since(resource, version)]


class Real:
    """kube-apiserver."""

    def __init__(self, api: KubeApi, rest: Rest) -> None:
        self.api = api
        self._rest = rest
        self._kubelet = Kubelet(rest)

    def place(self, pod: str) -> None:
        self._kubelet.place(pod, "node-1")

    def say(self, pod: str, **status: Any) -> None:
        self._rest.merge(f"{PODS_PATH}/{pod}/status", {"status": status})

    def edit(self, name: str, patch: Body) -> Body:
        edited: Body = self._rest.merge(f"{JOBS_PATH}/{name}", patch)
        return edited

    def watch(self, resource: Resource, version: int) -> list[tuple[str, Body]]:
        path = resource.path(NAMESPACE).lstrip("/")
        lines = self._rest.text("GET", f"{path}?watch=1&resourceVersion={version}&timeoutSeconds=1").splitlines()
        return [(event["type"], event["object"]) for event in map(json.loads, lines)]


Server = InMemory | Real


@pytest.fixture(params=["in memory", "real"])
async def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    if request.param == "in memory":
        yield InMemory()
        return
    control_plane: ControlPlane = request.getfixturevalue("control_plane")
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    async with connect(connections=4) as client:
        yield Real(KubeClient(client, timeout_seconds=60), request.getfixturevalue("rest"))


def pod(name: str, **metadata: Any) -> Body:
    containers = [{"name": "trainer", "image": "example.org/trainer:1"}]
    labels = {LABEL_JOB_NAME: name}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, **metadata},
        "spec": {"containers": containers, "terminationGracePeriodSeconds": 20},
    }


def version_of(body: Body) -> int:
    return int(body["metadata"]["resourceVersion"])


async def test_created_object_is_answered_with_its_metadata_alone(server: Server) -> None:
    made = await server.api.create(PODS, NAMESPACE, pod("made"))
    assert {"name", "namespace", "uid", "resourceVersion", "creationTimestamp", "labels"} <= made["metadata"].keys()
    assert "spec" not in made
    assert (await server.api.get(PODS, NAMESPACE, "made"))["status"]["phase"] == "Pending"


async def test_name_that_is_taken_is_a_conflict_that_says_so(server: Server) -> None:
    await server.api.create(PODS, NAMESPACE, pod("taken"))
    with pytest.raises(Conflict) as caught:
        await server.api.create(PODS, NAMESPACE, pod("taken"))
    assert (caught.value.status, caught.value.reason) == (409, "AlreadyExists")


async def test_what_is_not_there_is_not_found(server: Server) -> None:
    with pytest.raises(NotFound):
        await server.api.get(PODS, NAMESPACE, "nothing")
    with pytest.raises(NotFound):
        await server.api.delete(PODS, NAMESPACE, "nothing", uid="")
    with pytest.raises(NotFound):
        await server.api.patch_status(JOBS, NAMESPACE, "nothing", {"status": {"attempt": 1}})


async def test_kind_that_the_server_does_not_have_is_not_found(server: Server) -> None:
    with pytest.raises(NotFound):
        _ = [page async for page in server.api.list(NOTHING, None, selector=LABEL_JOB_NAME)]
    with pytest.raises(NotFound):
        await server.api.create(NOTHING, NAMESPACE, {"metadata": {"name": "one"}})


async def test_pod_group_is_watched_and_gone_with_the_answer_to_its_deletion(
    server: Server, request: pytest.FixtureRequest
) -> None:
    if isinstance(server, Real):
        control_plane: ControlPlane = request.getfixturevalue("control_plane")
        control_plane.kubectl("apply", "-f", str(GROUPS))
        request.addfinalizer(lambda: control_plane.kubectl("delete", "-f", str(GROUPS)))
        control_plane.kubectl("wait", "--for=condition=Established", "-f", str(GROUPS))
    body = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "spec": {"minMember": 3}}
    made = await server.api.create(COSCHEDULING_GROUPS, NAMESPACE, {**body, "metadata": {"name": "gang"}})
    assert "spec" not in made
    assert (await server.api.get(COSCHEDULING_GROUPS, NAMESPACE, "gang"))["spec"] == {"minMember": 3}
    left = await server.api.delete(COSCHEDULING_GROUPS, NAMESPACE, "gang", uid=made["metadata"]["uid"])
    assert left["kind"] == "Status"
    events = server.watch(COSCHEDULING_GROUPS, version_of(made) - 1)
    assert [type_ for type_, _ in events][-2:] == ["ADDED", "DELETED"]


async def test_status_is_no_part_of_a_creation_nor_of_an_edit(server: Server) -> None:
    await server.api.create(JOBS, NAMESPACE, {**job("no-status"), "status": {"attempt": 7}})
    server.edit("no-status", {"status": {"attempt": 8}})
    assert "status" not in await server.api.get(JOBS, NAMESPACE, "no-status")


async def test_generation_grows_with_the_spec_alone(server: Server) -> None:
    await server.api.create(JOBS, NAMESPACE, job("grows"))
    written = await server.api.patch_status(JOBS, NAMESPACE, "grows", {"status": {"attempt": 1}})
    assert (written["metadata"]["generation"], written["status"]["attempt"]) == (1, 1)
    assert server.edit("grows", {"metadata": {"labels": {"a": "b"}}})["metadata"]["generation"] == 1
    assert server.edit("grows", {"spec": {"suspend": True}})["metadata"]["generation"] == 2


async def test_write_on_an_older_version_is_a_conflict_and_writes_nothing(server: Server) -> None:
    await server.api.create(JOBS, NAMESPACE, job("moved"))
    before = await server.api.get(JOBS, NAMESPACE, "moved")
    await server.api.patch_status(JOBS, NAMESPACE, "moved", {"status": {"attempt": 1}})
    about = {name: before["metadata"][name] for name in ("uid", "resourceVersion")}
    with pytest.raises(Conflict) as caught:
        await server.api.patch_status(JOBS, NAMESPACE, "moved", {"metadata": about, "status": {"attempt": 9}})
    assert (caught.value.status, caught.value.reason) == (409, "Conflict")
    assert (await server.api.get(JOBS, NAMESPACE, "moved"))["status"]["attempt"] == 1


async def test_the_version_alone_guards_a_status_and_not_the_uid(server: Server) -> None:
    await server.api.create(JOBS, NAMESPACE, job("guarded"))
    about = {"uid": "00000000-0000-4000-8000-000000000000"}
    patch = {"metadata": about, "status": {"attempt": 9}}
    written = await server.api.patch_status(JOBS, NAMESPACE, "guarded", patch)
    assert (written["status"]["attempt"], written["metadata"]["uid"] == about["uid"]) == (9, False)


async def test_write_that_changes_nothing_makes_no_version(server: Server) -> None:
    await server.api.create(JOBS, NAMESPACE, job("same"))
    written = await server.api.patch_status(JOBS, NAMESPACE, "same", {"status": {"attempt": 1}})
    again = await server.api.patch_status(JOBS, NAMESPACE, "same", {"status": {"attempt": 1, "state": None}})
    assert version_of(again) == version_of(written)
    assert server.watch(JOBS, version_of(written)) == []


@pytest.mark.parametrize("number", range(len(EDITS)))
async def test_edit_of_the_simulation_is_accepted_of_a_job_that_runs(server: Server, number: int) -> None:
    name = f"edited-{number}"
    await server.api.create(JOBS, NAMESPACE, job(name))
    await server.api.patch_status(
        JOBS, NAMESPACE, name, {"status": {"attempt": 1, "startTime": "2026-11-26T00:00:00Z"}}
    )
    for section, fields in server.edit(name, {"spec": EDITS[number]})["spec"].items():
        if section in EDITS[number]:
            assert EDITS[number][section].items() <= fields.items()


async def test_null_in_a_patch_takes_a_field_away(server: Server) -> None:
    await server.api.create(JOBS, NAMESPACE, job("null"))
    await server.api.patch_status(JOBS, NAMESPACE, "null", {"status": {"attempt": 1, "restarts": {"total": 2}}})
    patch = {"status": {"restarts": {"total": None, "countedTowardsLimit": 1}}}
    written = await server.api.patch_status(JOBS, NAMESPACE, "null", patch)
    assert "total" not in written["status"]["restarts"]


async def test_pod_without_a_node_is_gone_with_the_answer_to_its_deletion(server: Server) -> None:
    made = await server.api.create(PODS, NAMESPACE, pod("no-node"))
    left = await server.api.delete(PODS, NAMESPACE, "no-node", uid=made["metadata"]["uid"])
    assert not left["metadata"].get("deletionGracePeriodSeconds")
    with pytest.raises(NotFound):
        await server.api.get(PODS, NAMESPACE, "no-node")


async def test_pod_with_a_node_ends_within_its_grace_period(server: Server) -> None:
    made = await server.api.create(PODS, NAMESPACE, pod("ending"))
    server.place("ending")
    left = await server.api.delete(PODS, NAMESPACE, "ending", uid=made["metadata"]["uid"])
    assert (left["metadata"]["deletionGracePeriodSeconds"], "deletionTimestamp" in left["metadata"]) == (20, True)
    again = await server.api.delete(PODS, NAMESPACE, "ending", uid=made["metadata"]["uid"])
    assert version_of(again) == version_of(left)
    await server.api.delete(PODS, NAMESPACE, "ending", uid=made["metadata"]["uid"], grace_seconds=0)
    with pytest.raises(NotFound):
        await server.api.get(PODS, NAMESPACE, "ending")


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_pod_that_has_ended_is_gone_with_the_answer_to_its_deletion(server: Server, phase: str) -> None:
    name = f"ended-{phase.lower()}"
    made = await server.api.create(PODS, NAMESPACE, pod(name))
    server.place(name)
    server.say(name, phase=phase)
    await server.api.delete(PODS, NAMESPACE, name, uid=made["metadata"]["uid"])
    with pytest.raises(NotFound):
        await server.api.get(PODS, NAMESPACE, name)


async def test_deletion_by_another_uid_is_a_conflict_and_deletes_nothing(server: Server) -> None:
    made = await server.api.create(PODS, NAMESPACE, pod("successor"))
    with pytest.raises(Conflict) as caught:
        await server.api.delete(PODS, NAMESPACE, "successor", uid="00000000-0000-4000-8000-000000000000")
    assert (caught.value.status, caught.value.reason) == (409, "Conflict")
    assert (await server.api.get(PODS, NAMESPACE, "successor"))["metadata"]["uid"] == made["metadata"]["uid"]


async def test_object_with_a_finalizer_stays_until_that_is_taken_off(server: Server) -> None:
    body = job("held")
    body["metadata"]["finalizers"] = ["example.org/stays"]
    made = await server.api.create(JOBS, NAMESPACE, body)
    await server.api.delete(JOBS, NAMESPACE, "held", uid=made["metadata"]["uid"])
    assert "deletionTimestamp" in (await server.api.get(JOBS, NAMESPACE, "held"))["metadata"]
    server.edit("held", {"metadata": {"finalizers": None}})
    with pytest.raises(NotFound):
        await server.api.get(JOBS, NAMESPACE, "held")


async def test_list_is_of_a_version_and_by_labels_and_fields(server: Server) -> None:
    for name in ("one", "two"):
        await server.api.create(PODS, NAMESPACE, pod(name))
    pages = [page async for page in server.api.list(PODS, NAMESPACE, selector=f"{LABEL_JOB_NAME}=two")]
    assert [body["metadata"]["name"] for page in pages for body in page.items] == ["two"]
    assert pages[0].version >= version_of(pages[0].items[0])
    pages = [page async for page in server.api.list(PODS, NAMESPACE, fields="metadata.name=one,status.phase=Pending")]
    assert [body["metadata"]["name"] for page in pages for body in page.items] == ["one"]
    pages = [page async for page in server.api.list(PODS, None, selector=LABEL_JOB_NAME)]
    assert {"one", "two"} <= {body["metadata"]["name"] for page in pages for body in page.items}


async def test_watch_reports_each_version_in_order_and_the_deletion_with_one_of_its_own(server: Server) -> None:
    service = {"metadata": {"name": "watched"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
    (page,) = [page async for page in server.api.list(SERVICES, NAMESPACE)]
    made = await server.api.create(SERVICES, NAMESPACE, {"apiVersion": "v1", "kind": "Service", **service})
    await server.api.patch(SERVICES, NAMESPACE, "watched", {"metadata": {"labels": {"a": "b"}}})
    await server.api.delete(SERVICES, NAMESPACE, "watched", uid=made["metadata"]["uid"])
    events = server.watch(SERVICES, page.version)
    assert [type_ for type_, _ in events] == ["ADDED", "MODIFIED", "DELETED"]
    versions = [version_of(body) for _, body in events]
    assert versions == sorted(set(versions))
    assert {body["metadata"]["uid"] for _, body in events} == {made["metadata"]["uid"]}
