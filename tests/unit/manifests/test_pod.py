"""What must hold for every pod, whatever its template says."""

import json
from typing import Any

import pytest

from disttrain.api import JobConfig
from disttrain.api.environment import RESERVED
from disttrain.api.names import Role
from disttrain.manifests import build_network_policy, build_pod, build_service, cluster_addresses, training_environment
from unit.manifests.jobs import JOBS, PARAMETER_SERVER, VOLUMES, job

HOSTILE = {
    "spec": {
        "automountServiceAccountToken": True,
        "enableServiceLinks": True,
        "restartPolicy": "Never",
        "hostname": "other",
        "subdomain": "other",
        "securityContext": {"runAsNonRoot": False, "seccompProfile": {"type": "Unconfined"}},
        "volumes": [{"name": "checkpoint", "emptyDir": {}}],
        "initContainers": [{"name": "first", "image": "a:1", "securityContext": {"privileged": True}}],
        "containers": [
            {
                "name": "trainer",
                "securityContext": {
                    "privileged": True,
                    "allowPrivilegeEscalation": True,
                    "readOnlyRootFilesystem": False,
                    "runAsNonRoot": False,
                    "capabilities": {"add": ["SYS_ADMIN"], "drop": []},
                    "seccompProfile": {"type": "Unconfined"},
                },
                "volumeMounts": [{"name": "other", "mountPath": "/checkpoints"}],
            },
            {"name": "sidecar", "image": "b:1", "securityContext": {"allowPrivilegeEscalation": True}},
        ],
    }
}
HOSTILE_JOB = job(worker={"replicas": 1, "template": HOSTILE}, **VOLUMES)


def pods() -> list[Any]:
    rows = [
        pytest.param(each, role, index, id=f"{name}: {role.short} {index}")
        for name, (each, places) in JOBS.items()
        for role, index in places
    ]
    return [*rows, pytest.param(HOSTILE_JOB, Role.WORKER, 0, id="a template that tries to loosen everything")]


def restricted_violations(spec: dict[str, Any]) -> list[str]:
    """The rules of the `restricted` Pod Security Standard that a pod breaks, as its admission evaluates them."""
    pod = spec.get("securityContext", {})
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    found += [f"volume {v['name']}" for v in spec.get("volumes", []) if "hostPath" in v]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = container.get("securityContext", {})
        rules = {
            "privileged": not own.get("privileged", False),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": own.get("runAsNonRoot", pod.get("runAsNonRoot")) is True,
            "runAsUser": own.get("runAsUser", pod.get("runAsUser")) != 0,
            "capabilities": "ALL" in own.get("capabilities", {}).get("drop", [])
            and set(own["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"},
            "seccompProfile": own.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
            in ("RuntimeDefault", "Localhost"),
        }
        found += [f"{container['name']}: {rule}" for rule, holds in rules.items() if not holds]
    return found


@pytest.mark.parametrize(("each", "role", "index"), pods())
def test_every_pod_is_restricted(each, role, index):
    spec = build_pod(each, role, index, 1, trainer_image="t:1")["spec"]
    assert restricted_violations(spec) == []
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"], spec["restartPolicy"]) == (
        False,
        False,
        "Never",
    )


@pytest.mark.parametrize(("each", "role", "index"), pods())
def test_every_pod_is_known_by_name_label_and_owner(each, role, index):
    pod = build_pod(each, role, index, 3, trainer_image="t:1")
    name = each.metadata.name
    assert pod["metadata"]["name"] == pod["spec"]["hostname"] == f"{name}-{role.short}-{index}"
    assert pod["spec"]["subdomain"] == name
    labels = {key: value for key, value in pod["metadata"]["labels"].items() if key.startswith("disttrain.dev/")}
    assert labels == {
        "disttrain.dev/job-name": name,
        "disttrain.dev/role": role.value,
        "disttrain.dev/index": str(index),
        "disttrain.dev/attempt": "3",
    }
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (each.metadata.uid, True, True)
    assert (owner["apiVersion"], owner["kind"]) == ("disttrain.dev/v1alpha1", "DistTrainJob")


@pytest.mark.parametrize(("each", "role", "index"), pods())
def test_every_mount_has_its_volume(each, role, index):
    spec = build_pod(each, role, index, 1, trainer_image="t:1")["spec"]
    volumes = [volume["name"] for volume in spec["volumes"]]
    assert len(volumes) == len(set(volumes))
    mounts = [mount for mount in spec["containers"][0]["volumeMounts"]]
    assert {mount["name"] for mount in mounts} <= set(volumes)
    assert {"/tmp", "/dev/shm"} <= {mount["mountPath"] for mount in mounts}


def environment(each, role, index) -> dict[str, str]:
    container = build_pod(each, role, index, 2, trainer_image="t:1")["spec"]["containers"][0]
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def test_the_torchrun_contract_of_a_worker_with_gpus():
    env = environment(job(worker={"replicas": 3, "gpusPerWorker": 4}), Role.WORKER, 2)
    assert {name: env[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE")} == {
        "RANK": "8",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "2",
        "WORLD_SIZE": "12",
    }
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("digits-master-0.digits", "29500")


def test_a_command_is_one_rank_in_a_pod_and_rank_0_hosts_the_store():
    each = job(trainer={"command": ["x"]}, worker={"replicas": 3, "gpusPerWorker": 4})
    env = environment(each, Role.WORKER, 2)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("2", "3", "1")
    assert env["MASTER_ADDR"] == "digits-worker-0.digits"
    assert not [name for name in env if name.startswith("TORCHELASTIC")]


def test_a_command_runs_in_the_users_image_and_its_master_in_ours():
    each = job(trainer={"command": ["python", "-m", "mine"]}, image="mine:1")
    worker, master = (
        build_pod(each, role, 0, 1, trainer_image="ours:1")["spec"]["containers"][0]
        for role in (Role.WORKER, Role.MASTER)
    )
    assert (worker["image"], worker["command"]) == ("mine:1", ["python", "-m", "mine"])
    assert (master["image"], master["command"][-3:]) == ("ours:1", ["python", "-m", "disttrain_trainer"])


def test_master_and_servers_have_no_rank():
    each = job(**PARAMETER_SERVER)
    for role in (Role.MASTER, Role.PARAMETER_SERVER):
        env = environment(each, role, 0)
        assert not {"RANK", "LOCAL_RANK", "GROUP_RANK"} & env.keys()
        assert env["DISTTRAIN_ROLE"] == role.value


def test_the_configuration_arrives_as_it_is_written():
    config = {"path": "$(HOME)/x", "price": "$$5"}
    each = job(trainer={**JOBS["data-parallel"][0].spec.trainer.to_dict(), "config": config})
    raw = environment(each, Role.WORKER, 0)["DISTTRAIN_JOB"]
    assert "$(" not in raw.replace("$$", "")
    assert JobConfig.model_validate_json(raw.replace("$$", "$")).trainer.config == config


def test_the_environment_of_a_local_process_is_the_same_code():
    each = job(**PARAMETER_SERVER)
    env = training_environment(
        each,
        Role.WORKER,
        1,
        1,
        cluster_addresses(each),
        metrics_port=1,
        termination_log="/t",
        checkpoint_dir="/c",
        data_dir="/d",
    )
    assert env.keys() <= RESERVED
    assert (env["DISTTRAIN_CHECKPOINT_DIR"], env["DISTTRAIN_DATA_DIR"]) == ("/c", "/d")
    config = json.loads(env["DISTTRAIN_JOB"])
    assert config["addresses"]["parameterServers"] == ["digits-ps-0.digits:29600", "digits-ps-1.digits:29600"]


def test_a_template_cannot_take_our_volumes_away():
    spec = build_pod(HOSTILE_JOB, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["checkpoint"]["persistentVolumeClaim"]["claimName"] == "ckpt"
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["/checkpoints"]["name"] == "checkpoint"
    assert mounts["/data" if "/data" in mounts else "/images"]["readOnly"] is True


def test_other_containers_are_native_sidecars():
    spec = build_pod(HOSTILE_JOB, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]
    assert [container["name"] for container in spec["containers"]] == ["trainer"]
    assert [(each["name"], each.get("restartPolicy")) for each in spec["initContainers"]] == [
        ("first", None),
        ("sidecar", "Always"),
    ]


def test_gpus_are_requested_as_they_are_limited():
    template = {"spec": {"containers": [{"name": "trainer", "resources": {"limits": {"memory": "1Gi"}}}]}}
    each = job(worker={"replicas": 1, "gpusPerWorker": 2, "template": template})
    resources = build_pod(each, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]["containers"][0]["resources"]
    assert resources == {"limits": {"memory": "1Gi", "nvidia.com/gpu": "2"}, "requests": {"nvidia.com/gpu": "2"}}
    master = build_pod(each, Role.MASTER, 0, 1, trainer_image="t:1")["spec"]["containers"][0]["resources"]
    assert master == {}


@pytest.mark.parametrize(("spec", "seconds"), [({}, 30), ({"checkpoint": VOLUMES["checkpoint"]}, 60)])
def test_a_checkpoint_has_a_longer_grace_period(spec, seconds):
    pod = build_pod(job(**spec), Role.WORKER, 0, 1, trainer_image="t:1")
    assert pod["spec"]["terminationGracePeriodSeconds"] == seconds


def test_the_service_publishes_names_before_pods_are_ready():
    service = build_service(job(**PARAMETER_SERVER))
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"disttrain.dev/job-name": "digits"}
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {"rendezvous": 29500, "control": 29400, "server": 29600, "metrics": 9400}


def test_the_network_policy_lets_in_the_job_and_everybody_to_the_metrics():
    spec = build_network_policy(job(observability={"metricsPort": 9500}))["spec"]
    own = {"podSelector": {"matchLabels": {"disttrain.dev/job-name": "digits"}}}
    assert spec == {
        **own,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [own]}, {"ports": [{"protocol": "TCP", "port": 9500}]}],
    }
