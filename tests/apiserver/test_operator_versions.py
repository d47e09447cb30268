"""Two versions, two tenants, and an API server that was restored from a backup: on a real API server."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apiserver.operating import JOBS, PODS, POLICIES, SERVICES, Operator, Refusal, Rest, eventually, job, pod_names
from apiserver.playing import Kubelet
from cluster.controlplane import ControlPlane

CRD = "apis/apiextensions.k8s.io/v1/customresourcedefinitions/disttrainjobs.disttrain.dev"
FLAGS = ("--progress=Pod",)


def namespace(control_plane: ControlPlane, name: str) -> Rest:
    control_plane.kubectl("create", "namespace", name)
    return Rest(control_plane, name)


def status(rest: Rest, name: str) -> Any:
    return rest.get(JOBS, name).get("status", {})


def condition(rest: Rest, name: str, type_: str) -> str:
    return next((c["status"] for c in status(rest, name).get("conditions", ()) if c["type"] == type_), "")


def pods(rest: Rest, name: str) -> dict[str, str]:
    """Uids of its pods that are not on their way out, by name."""
    found = rest.list(PODS, f"disttrain.dev/job-name={name}")
    return {p["metadata"]["name"]: p["metadata"]["uid"] for p in found if "deletionTimestamp" not in p["metadata"]}


def newer(properties: Any) -> None:
    """The schema of a later release: a field with a default, a field of the status, a field of an entry of a list."""
    properties["spec"]["properties"]["runPolicy"]["properties"]["newKnob"] = {"type": "integer", "default": 5}
    properties["status"]["properties"]["lastEvent"] = {"type": "string"}
    conditions = properties["status"]["properties"]["conditions"]["items"]["properties"]
    conditions["severity"] = {"type": "string"}


@contextlib.contextmanager
def schema(rest: Rest, change: Callable[[Any], None]) -> Iterator[None]:
    """The CRD of another release for the length of a block."""

    def put(spec: Any) -> None:
        # By its newest version: the API server's own controllers write its status meanwhile.
        eventually(lambda: rest("PUT", CRD, {**rest("GET", CRD), "spec": spec}))

    old = rest("GET", CRD)["spec"]
    new = copy.deepcopy(old)
    for version in new["versions"]:
        change(version["schema"]["openAPIV3Schema"]["properties"])
    put(new)
    try:
        yield
    finally:
        put(old)


def looked_after(rest: Rest, name: str) -> None:
    """Waits until the operator has made passes over all jobs: those that were there come before a new one."""
    rest.create(JOBS, job(name))
    eventually(lambda: list(pods(rest, name)) == pod_names(name))


def test_older_operator_looks_after_jobs_while_a_newer_crd_is_applied(control_plane: ControlPlane) -> None:
    rest = namespace(control_plane, "upgraded")
    kubelet = Kubelet(rest)
    with Operator(control_plane, "--namespaces=upgraded", *FLAGS, name="older"):
        rest.create(JOBS, job("runs"))
        eventually(lambda: list(pods(rest, "runs")) == pod_names("runs"))
        for pod in pod_names("runs"):
            kubelet.run(pod)
        eventually(lambda: condition(rest, "runs", "Scheduled") == "True")
        with schema(rest, newer):
            eventually(lambda: rest.get(JOBS, "runs")["spec"]["runPolicy"].get("newKnob") == 5)
            uid = pods(rest, "runs")["runs-worker-0"]
            kubelet.fail("runs-worker-0")
            eventually(lambda: pods(rest, "runs").get("runs-worker-0", uid) != uid, seconds=20)
            assert condition(rest, "runs", "Valid") == "True"
            assert status(rest, "runs")["restarts"]["total"] == 1
            looked_after(rest, "new")


def test_roll_back_leaves_finished_running_and_suspended_jobs_as_they_are(control_plane: ControlPlane) -> None:
    rest = namespace(control_plane, "rolled-back")
    kubelet = Kubelet(rest)
    flags = ("--namespaces=rolled-back", *FLAGS)
    with Operator(control_plane, *flags, name="before"):
        for name in ("done", "runs"):
            rest.create(JOBS, job(name))
            eventually(lambda name=name: list(pods(rest, name)) == pod_names(name))  # type: ignore[misc]
            for pod in pod_names(name):
                kubelet.run(pod)
        rest.create(JOBS, job("suspended", suspend=True))
        for pod in sorted(pod_names("done"), reverse=True):
            kubelet.succeed(pod)
        eventually(lambda: condition(rest, "done", "Complete") == "True", seconds=30)
        eventually(lambda: condition(rest, "suspended", "Suspended") == "True")
        eventually(lambda: condition(rest, "runs", "Scheduled") == "True")
    for pod in pod_names("done"):
        kubelet.gone(pod)
    running, before = pods(rest, "runs"), {name: status(rest, name) for name in ("done", "runs", "suspended")}
    with schema(rest, newer):
        # The API server takes a schema over a moment after its CRD is stored, and prunes by the old one until then.
        eventually(lambda: rest.get(JOBS, "runs")["spec"]["runPolicy"].get("newKnob") == 5)
        for name in before:  # what the newer release has written
            patch = {"status": {"lastEvent": "x", "training": {"step": 7, "loss": 0.25}}}
            written = eventually(lambda name=name, patch=patch: rest.merge(f"{JOBS}/{name}/status", patch))  # type: ignore[misc]
            assert written["status"]["lastEvent"] == "x"
        with Operator(control_plane, *flags, name="rolled-back") as operator:
            looked_after(rest, "under-the-newer-crd")
            for name, old in before.items():
                now = status(rest, name)
                assert now["lastEvent"] == "x"
                assert now["training"]["loss"] == 0.25
                assert {field: now.get(field) for field in ("completionTime", "startTime", "attempt")} == {
                    field: old.get(field) for field in ("completionTime", "startTime", "attempt")
                }
            assert "do not know" not in operator.log
            assert "fields that this version does not know are ignored: " in operator.log
    with Operator(control_plane, *flags, name="with-its-own-crd"):
        looked_after(rest, "under-its-own-crd")
        assert condition(rest, "done", "Complete") == "True"
        assert condition(rest, "suspended", "Suspended") == "True"
        assert (pods(rest, "done"), pods(rest, "suspended"), pods(rest, "runs")) == ({}, {}, running)


def with_config_map_of_a_script(properties: Any) -> None:
    """The schema of an earlier release: a script names its ConfigMap itself."""
    del properties["spec"]["properties"]["trainer"]["properties"]["script"]["x-kubernetes-validations"]


def test_a_script_with_a_config_map_of_an_earlier_release_goes_on_and_a_new_one_is_refused(
    control_plane: ControlPlane,
) -> None:
    rest = namespace(control_plane, "earlier")
    script = {"configMap": "my-code", "file": "train.py"}
    body = job("stored", strategy={"type": "DataParallel"}, trainer={"script": script})
    del body["spec"]["parameterServer"]
    with schema(rest, with_config_map_of_a_script):
        eventually(lambda: rest.create(JOBS, body))
    new = {**body, "metadata": {**body["metadata"], "name": "new"}}
    with Operator(control_plane, "--namespaces=earlier", *FLAGS, name="later"):
        eventually(lambda: set(pods(rest, "stored")) == {"stored-master-0", "stored-worker-0", "stored-worker-1"})
        volumes = rest.get(PODS, "stored-worker-0")["spec"]["volumes"]
        assert [v["configMap"]["name"] for v in volumes if v["name"] == "disttrain-code"] == ["my-code"]
        eventually(lambda: condition(rest, "stored", "Valid") == "True")
        rest.merge(f"{JOBS}/stored", {"spec": {"suspend": True}})  # what an update leaves as it is may stay
        eventually(lambda: condition(rest, "stored", "Suspended") == "True")
        assert rest.get(JOBS, "stored")["spec"]["trainer"]["script"]["configMap"] == "my-code"
        with pytest.raises(Refusal, match=r"write trainer\.code\.configMap"):
            rest.create(JOBS, new)


def test_objects_of_another_namespace_that_name_our_job_are_none_of_it(control_plane: ControlPlane) -> None:
    victim, evil = namespace(control_plane, "victim"), namespace(control_plane, "evil")
    kubelet = Kubelet(victim)
    body = job("target", strategy={"type": "DataParallel"}, trainer={"command": ["python", "-m", "mine"]})
    del body["spec"]["parameterServer"]
    with Operator(control_plane, "--namespaces=victim,evil", *FLAGS, "--resync-seconds=2", name="both"):
        victim.create(JOBS, body)
        wanted = ["target-master-0", "target-worker-0", "target-worker-1"]
        eventually(lambda: list(pods(victim, "target")) == wanted)
        for pod in wanted:
            kubelet.run(pod)
        eventually(lambda: condition(victim, "target", "Scheduled") == "True")
        made = pods(victim, "target")
        uid = victim.get(JOBS, "target")["metadata"]["uid"]
        owner = {
            "apiVersion": "disttrain.dev/v1alpha1",
            "kind": "DistTrainJob",
            "name": "target",
            "uid": uid,
            "controller": True,
        }
        places = {"job-name": "target", "role": "worker", "index": "0", "attempt": "1"}
        labels = {f"disttrain.dev/{name}": value for name, value in places.items()}
        metadata = {"labels": labels, "ownerReferences": [owner], "finalizers": ["example.org/stay"]}
        containers = {"containers": [{"name": "trainer", "image": "x"}]}
        evil.create(PODS, {"metadata": {**metadata, "name": "target-worker-0"}, "spec": containers})
        evil.create(
            SERVICES, {"metadata": {**metadata, "name": "target"}, "spec": {"clusterIP": "None", "selector": labels}}
        )
        evil.create(POLICIES, {"metadata": {**metadata, "name": "target"}, "spec": {"podSelector": {}}})
        evil.delete(PODS, "target-worker-0")
        for kind in (SERVICES, POLICIES):
            victim.delete(kind, "target")
            eventually(lambda kind=kind: victim.find(kind, "target"), seconds=20)  # type: ignore[misc]
        assert status(victim, "target")["attempt"] == 1
        assert pods(victim, "target") == made


def test_operator_of_an_api_server_that_was_restored_ends_with_one_line_and_its_successor_is_right() -> None:
    with ControlPlane() as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", "crds/disttrainjobs.yaml")
        eventually(lambda: Rest(control_plane)("GET", JOBS))
        rest = namespace(control_plane, "restored")
        flags = ("--namespaces=restored", *FLAGS, "--resync-seconds=2")
        with Operator(control_plane, *flags, name="operator") as operator:
            rest.create(JOBS, job("kept"))
            eventually(lambda: list(pods(rest, "kept")) == pod_names("kept"))
            eventually(lambda: status(rest, "kept").get("startTime"))
            with at_rest(control_plane):
                backup = control_plane.folder / "backup"
                shutil.copytree(data(control_plane), backup)
            for number in range(3):
                rest.create(JOBS, job(f"lost-{number}"))
                eventually(lambda number=number: status(rest, f"lost-{number}").get("startTime"))  # type: ignore[misc]
            with at_rest(control_plane):
                shutil.rmtree(data(control_plane))
                shutil.copytree(backup, data(control_plane))
            program = operator.program
            assert program
            eventually(lambda: not program.alive, seconds=60)
            (line,) = [line for line in operator.log.splitlines() if "restored from a backup" in line]
            assert "the operator ends, so that its next process starts from what the API server has now" in line
            assert "Traceback" not in operator.log
            operator.start()
            rest.delete(PODS, "kept-worker-0", gracePeriodSeconds=0)
            eventually(lambda: list(pods(rest, "kept")) == pod_names("kept"), seconds=30)


def data(control_plane: ControlPlane) -> Any:
    return control_plane.folder / "etcd"


@contextlib.contextmanager
def at_rest(control_plane: ControlPlane) -> Iterator[None]:
    """API server and etcd do not run for the length of a block."""
    control_plane.api_server.stop()
    control_plane.etcd.stop()
    yield
    control_plane.etcd.start()
    control_plane.start_api_server()
