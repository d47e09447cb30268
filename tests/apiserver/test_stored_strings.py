"""Jobs of release 0.1.0, whose decimals are strings, under the CRD of today: they are never touched up, and go on.

The API server takes a stored value that its schema refuses as long as it does not change (CRD ratcheting, on since Kubernetes 1.30),
but a rule that reads such a value fails, and with it every write of the object, of its status too.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from apiserver.operating import JOBS, PODS, Operator, Rest, eventually, job, pod_names
from apiserver.playing import Kubelet
from apiserver.test_operator_versions import CRD, condition, namespace, pods, status
from cluster.controlplane import ControlPlane
from cluster.kubectl import KubectlError

DECIMALS = ("learningRate", "momentum", "weightDecay", "beta1", "beta2", "epsilon")
AT = "2026-11-26T00:00:00Z"


def as_it_was(schema: Any) -> None:
    """The types of 0.1.0. Its rules are left out: they read the strings as numbers."""
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        as_it_was(value)
    if isinstance(schema, dict):
        schema.pop("x-kubernetes-validations", None)


def stored(rest: Rest, *bodies: Any) -> None:
    """Stores jobs under the CRD of 0.1.0, and puts that of today back."""
    today = rest("GET", CRD)["spec"]
    before = copy.deepcopy(today)
    for version in before["versions"]:
        schema = version["schema"]["openAPIV3Schema"]
        as_it_was(schema)
        optimizer = schema["properties"]["spec"]["properties"]["trainer"]["properties"]["optimizer"]["properties"]
        training = schema["properties"]["status"]["properties"]["training"]["properties"]
        optimizer |= {name: {"type": "string"} for name in DECIMALS}
        training |= {name: {"type": "string"} for name in ("loss", "samplesPerSecond")}
        training["evaluation"]["additionalProperties"] = {"type": "string"}

    def put(spec: Any) -> None:
        eventually(lambda: rest("PUT", CRD, {**rest("GET", CRD), "spec": spec}))

    put(before)
    try:
        for body in bodies:
            name = body["metadata"]["name"]
            eventually(lambda body=body: rest.create(JOBS, body))  # type: ignore[misc]
            training = {"step": 7, "loss": "0.1834", "samplesPerSecond": "5120.4", "evaluation": {"accuracy": "0.9"}}
            rest.merge(f"{JOBS}/{name}/status", {"status": {"training": training, **body.get("status", {})}})
    finally:
        put(today)
    number = {**job("probe"), "metadata": {"name": "probe"}}
    eventually(lambda: rest("POST", f"{JOBS}?dryRun=All", number))


def old_job(name: str, **spec: Any) -> Any:
    body = job(name, **spec)
    body["spec"]["trainer"]["optimizer"] = {
        "name": "SGD",
        "learningRate": "1e-3",
        "momentum": "0.9",
        "weightDecay": "0",
    }
    return body


def test_every_write_of_a_stored_job_that_leaves_its_trainer_alone_is_taken(control_plane: ControlPlane) -> None:
    rest = namespace(control_plane, "strings")
    stored(rest, old_job("old", worker={"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 4}}))

    def patch(change: Any, *flags: str) -> None:
        control_plane.kubectl("patch", "dtj", "old", "-n", "strings", "--type=merge", "-p", json.dumps(change), *flags)

    def patch_status(change: Any) -> None:
        patch({"status": change}, "--subresource=status")

    patch_status({"state": "Training"})
    patch_status({"training": {"step": 8, "loss": 0.25}})
    assert status(rest, "old")["training"] == {
        "step": 8,
        "loss": 0.25,
        "samplesPerSecond": "5120.4",
        "evaluation": {"accuracy": "0.9"},
    }
    patch_status({"training": {"samplesPerSecond": 5000, "evaluation": {"accuracy": 0.95}}})
    patch({"metadata": {"labels": {"a": "b"}, "finalizers": ["example.org/stay"]}})
    patch({"metadata": {"finalizers": None}})
    control_plane.kubectl("scale", "dtj/old", "--replicas=3", "-n", "strings")
    patch({"spec": {"suspend": True}})
    suspended = [
        {"type": "Suspended", "status": "True", "reason": "Suspended", "message": "", "lastTransitionTime": AT}
    ]
    patch_status({"conditions": suspended, "training": {"lastCheckpoint": {"step": 5, "time": AT}}})
    patch_status({"training": {"step": 9}})
    patch({"spec": {"trainer": {"epochs": 9}}})
    patch({"spec": {"suspend": False}})
    row = control_plane.kubectl("get", "dtj", "old", "-n", "strings").splitlines()[1].split()
    assert row[3:6] == ["9", "0.25", "5000"]


def test_what_is_fixed_in_a_stored_job_is_fixed_and_its_optimizer_changes_in_numbers_only(
    control_plane: ControlPlane,
) -> None:
    rest = namespace(control_plane, "strings-fixed")
    conditions = [
        {"type": "Suspended", "status": "True", "reason": "Suspended", "message": "", "lastTransitionTime": AT}
    ]
    suspended = {**old_job("suspended", suspend=True), "status": {"conditions": conditions}}
    stored(rest, old_job("runs"), suspended)
    rest.merge(f"{JOBS}/suspended/status", {"status": {"training": {"lastCheckpoint": {"step": 5, "time": AT}}}})
    numbers = {"learningRate": 0.01, "momentum": 0.9, "weightDecay": 0}

    def refused(name: str, trainer: Any) -> str:
        change = json.dumps({"spec": {"trainer": trainer}})
        with pytest.raises(KubectlError) as error:
            control_plane.kubectl("patch", "dtj", name, "-n", "strings-fixed", "--type=merge", "-p", change)
        return error.value.stderr

    assert "spec.trainer: Invalid value" in refused("runs", {"epochs": 9})
    assert "spec.trainer: Invalid value" in refused("runs", {"optimizer": numbers})
    assert "is immutable while the job runs" in refused("runs", {"optimizer": numbers})
    for name in ("runs", "suspended"):
        assert "write each of its numbers without quotes" in refused(name, {"optimizer": {"learningRate": 0.01}})
        assert "must be of type number" in refused(name, {"optimizer": {"learningRate": "0.01"}})
    assert "is immutable once the job has a checkpoint" in refused("suspended", {"seed": 7})
    assert "is immutable once the job has a checkpoint" in refused(
        "suspended", {"optimizer": {**numbers, "name": "Adam"}}
    )
    rest.merge(f"{JOBS}/suspended", {"spec": {"trainer": {"optimizer": numbers}}})
    rest.merge(f"{JOBS}/suspended", {"spec": {"trainer": {"optimizer": {"learningRate": 1e-4}}}})
    assert rest.get(JOBS, "suspended")["spec"]["trainer"]["optimizer"]["learningRate"] == 1e-4
    assert "spec.trainer.optimizer.momentum" in refused("suspended", {"optimizer": {"momentum": 0}})


def test_operator_trains_a_stored_job_replaces_its_pods_suspends_and_ends_it(control_plane: ControlPlane) -> None:
    rest = namespace(control_plane, "strings-run")
    kubelet = Kubelet(rest)
    stored(rest, old_job("old"))
    with Operator(control_plane, "--namespaces=strings-run", "--progress=Pod", name="newer") as operator:
        eventually(lambda: list(pods(rest, "old")) == pod_names("old"))
        for pod in pod_names("old"):
            kubelet.run(pod)
        eventually(lambda: condition(rest, "old", "Scheduled") == "True")
        (container,) = rest.get(PODS, "old-worker-0")["spec"]["containers"]
        (config,) = [each["value"] for each in container["env"] if each["name"] == "DISTTRAIN_JOB"]
        optimizer = {"name": "SGD", "learningRate": "1e-3", "momentum": "0.9"}
        assert json.loads(config)["trainer"]["optimizer"] == optimizer, "as pods of 0.1.0 have it"
        uid = pods(rest, "old")["old-worker-0"]
        kubelet.fail("old-worker-0")
        eventually(lambda: pods(rest, "old").get("old-worker-0", uid) != uid, seconds=20)
        kubelet.run("old-worker-0")
        rest.merge(f"{JOBS}/old", {"spec": {"suspend": True}})
        eventually(lambda: condition(rest, "old", "Suspended") == "True", seconds=30)
        rest.merge(f"{JOBS}/old", {"spec": {"suspend": False}})
        eventually(lambda: list(pods(rest, "old")) == pod_names("old"), seconds=30)
        for pod in sorted(pod_names("old"), reverse=True):
            kubelet.run(pod)
        for pod in sorted(pod_names("old"), reverse=True):
            kubelet.succeed(pod)
        eventually(lambda: condition(rest, "old", "Complete") == "True", seconds=30)
        assert "refuses a part of the status" not in operator.log
