"""What a job with packed data adds to its pods: the key as a file for those who read samples, and a place for copies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.manifests import build_pod


def packed(**data: Any) -> DistTrainJob:
    trainer = {
        "model": "m:m",
        "dataset": "disttrain_trainer.data:packed",
        "optimizer": {"name": "SGD", "learningRate": 0.1},
        "epochs": 1,
    }
    spec = {
        "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}},
        "parameterServer": {"replicas": 1},
        "trainer": trainer,
        "worker": {"replicas": 2},
        "data": {
            name: value for name, value in {"volume": {"persistentVolumeClaim": "claim"}, **data}.items() if value
        },
    }
    return DistTrainJob.parse({"metadata": {"name": "j", "namespace": "n", "uid": "0123456789"}, "spec": spec})


def pod(job: DistTrainJob, role: Role) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The volumes of a pod by name, where they are mounted, and its variables."""
    spec = build_pod(job, role, 0, 1, trainer_image="t:1")["spec"]
    container = spec["containers"][0]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    return {v["name"]: v for v in spec["volumes"]}, mounts, {v["name"]: v.get("value", "") for v in container["env"]}


def test_the_key_is_a_file_of_the_workers_and_no_variable() -> None:
    volumes, mounts, variables = pod(packed(encryption={"secretName": "s"}), Role.WORKER)
    items = [{"key": "key", "path": "key"}]
    assert volumes["disttrain-data-key"]["secret"] == {"secretName": "s", "items": items, "defaultMode": 0o440}
    assert mounts["disttrain-data-key"]["readOnly"] is True
    assert variables["DISTTRAIN_DATA_KEY"] == mounts["disttrain-data-key"]["mountPath"] + "/key"
    assert "secretKeyRef" not in json.dumps(
        build_pod(packed(encryption={"secretName": "s"}), Role.WORKER, 0, 1, trainer_image="t")
    )


def test_the_secret_of_a_url_is_files_of_the_workers_and_no_variable() -> None:
    job = packed(volume=None, url="s3://bucket/digits", urlSecretName="s")
    volumes, mounts, variables = pod(job, Role.WORKER)
    assert volumes["disttrain-data-url"]["secret"] == {"secretName": "s", "defaultMode": 0o440}
    assert mounts["disttrain-data-url"]["readOnly"] is True
    assert variables["DISTTRAIN_DATA_URL_OPTIONS"] == mounts["disttrain-data-url"]["mountPath"]
    assert json.loads(variables["DISTTRAIN_JOB"].replace("$$", "$"))["data"]["url"] == "s3://bucket/digits"
    assert "DISTTRAIN_DATA_DIR" not in variables
    assert "disttrain-data" not in volumes
    for role in (Role.MASTER, Role.PARAMETER_SERVER):
        assert "disttrain-data-url" not in pod(job, role)[0]


@pytest.mark.parametrize("role", [Role.MASTER, Role.PARAMETER_SERVER])
def test_who_reads_no_samples_has_neither_key_nor_copies(role: Role) -> None:
    volumes, _, variables = pod(packed(encryption={"secretName": "s"}, replication=2), role)
    assert not volumes.keys() & {"disttrain-data-key", "disttrain-copies"}
    assert not variables.keys() & {"DISTTRAIN_DATA_KEY", "DISTTRAIN_COPIES_DIR"}


def test_copies_lie_on_the_workers_own_disk_and_each_knows_where_the_others_serve_theirs() -> None:
    volumes, mounts, variables = pod(packed(replication=2), Role.WORKER)
    assert volumes["disttrain-copies"] == {"name": "disttrain-copies", "emptyDir": {}}
    assert variables["DISTTRAIN_COPIES_DIR"] == mounts["disttrain-copies"]["mountPath"]
    container = build_pod(packed(replication=2), Role.WORKER, 0, 1, trainer_image="t:1")["spec"]["containers"][0]
    (limit,) = [variable for variable in container["env"] if variable["name"] == "DISTTRAIN_COPIES_LIMIT"]
    assert limit["valueFrom"] == {"resourceFieldRef": {"resource": "limits.ephemeral-storage"}}
    addresses = json.loads(variables["DISTTRAIN_JOB"].replace("$$", "$"))["addresses"]
    assert addresses["copies"] == ["j-worker-0.j:29600", "j-worker-1.j:29600"]


def test_without_replication_no_disk_has_a_copy() -> None:
    volumes, _, variables = pod(packed(), Role.WORKER)
    assert "disttrain-copies" not in volumes
    assert "copies" not in json.loads(variables["DISTTRAIN_JOB"].replace("$$", "$"))["addresses"]
