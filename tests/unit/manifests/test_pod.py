"""What must hold for every pod, whatever its template says."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from disttrain.api import DistTrainJob, JobConfig
from disttrain.api.environment import POD_UID, RESERVED
from disttrain.api.names import Role
from disttrain.api.runtime import Addresses
from disttrain.api.status import RollBack
from disttrain.api.template import PodTemplate
from disttrain.manifests import build_pod, build_service, cluster_addresses, training_environment
from disttrain.manifests.environment import job_config
from unit.manifests.jobs import JOBS, PARAMETER_SERVER, VOLUMES, job

HOSTILE_CONTAINER = {
    "privileged": True,
    "allowPrivilegeEscalation": True,
    "readOnlyRootFilesystem": False,
    "runAsNonRoot": False,
    "runAsUser": 0,
    "capabilities": {"add": ["SYS_ADMIN"], "drop": []},
    "seccompProfile": {"type": "Unconfined"},
    "appArmorProfile": {"type": "Unconfined"},
    "seLinuxOptions": {"type": "spc_t", "user": "root", "role": "sysadm_r"},
    "procMount": "Unmasked",
    "windowsOptions": {"hostProcess": True},
    "ofALaterKubernetes": True,
}
HOSTILE = {
    "automountServiceAccountToken": True,
    "enableServiceLinks": True,
    "restartPolicy": "Always",
    "hostname": "other",
    "subdomain": "other",
    "securityContext": {
        **{key: HOSTILE_CONTAINER[key] for key in ("runAsNonRoot", "runAsUser", "seccompProfile", "appArmorProfile")},
        **{key: HOSTILE_CONTAINER[key] for key in ("seLinuxOptions", "windowsOptions", "ofALaterKubernetes")},
        "sysctls": [{"name": "kernel.msgmax", "value": "1"}],
    },
    "volumes": [{"name": "disttrain-checkpoints", "emptyDir": {}}],
    "initContainers": [{"name": "first", "image": "a:1", "securityContext": HOSTILE_CONTAINER}],
    "containers": [
        {
            "name": "trainer",
            "restartPolicy": "Always",
            "securityContext": HOSTILE_CONTAINER,
            "env": [{"name": "MASTER_ADDR", "value": "elsewhere"}],
            "volumeMounts": [{"name": "other", "mountPath": "/checkpoints"}],
        },
        {"name": "sidecar", "image": "b:1", "restartPolicy": "Never", "securityContext": HOSTILE_CONTAINER},
    ],
}


def _rule(codes: list[int], conditions: list[str] | None = None) -> dict[str, Any]:
    also = {"onPodConditions": conditions} if conditions else {}
    return {"name": "mine", "onExitCodes": codes, "action": "RestartJob", **also}


ADDRESSES = Addresses(control="a:1", rendezvous="a:2")


class Unchecked(PodTemplate):
    """A template that came past the rules of the API, such as one stored before they were there."""

    def pod_spec(self) -> dict[str, Any]:
        return HOSTILE


def _hostile_job() -> DistTrainJob:
    each = job(worker={"replicas": 1}, **VOLUMES)
    worker = each.spec.worker.model_copy(update={"template": Unchecked()})
    return each.model_copy(update={"spec": each.spec.model_copy(update={"worker": worker})})


HOSTILE_JOB = _hostile_job()


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
    found += [f"sysctl {sysctl['name']}" for sysctl in pod.get("sysctls", [])]
    found += _loosened("pod", pod)
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
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        found += _loosened(container["name"], own)
        found += [f"{container['name']}: {rule}" for rule, holds in rules.items() if not holds]
    return found


def _loosened(whose: str, context: dict[str, Any]) -> list[str]:
    """What pods and containers have in common."""
    se_linux = context.get("seLinuxOptions", {})
    rules = {
        "runAsUser": context.get("runAsUser") != 0,
        "appArmorProfile": context.get("appArmorProfile", {}).get("type", "RuntimeDefault") != "Unconfined",
        "seLinuxOptions": se_linux.get("type", "") in ("", "container_t", "container_init_t", "container_kvm_t")
        and not (se_linux.get("user") or se_linux.get("role")),
        "windowsOptions": not context.get("windowsOptions", {}).get("hostProcess"),
        "a field of a later Kubernetes": "ofALaterKubernetes" not in context,
    }
    return [f"{whose}: {rule}" for rule, holds in rules.items() if not holds]


def test_the_check_sees_what_the_hostile_template_tries():
    found = restricted_violations(HOSTILE)
    for rule in ("privileged", "runAsUser", "appArmorProfile", "seLinuxOptions", "procMount", "windowsOptions"):
        assert f"trainer: {rule}" in found
    assert {"sysctl kernel.msgmax", "pod: appArmorProfile", "pod: seLinuxOptions"} <= set(found)


@pytest.mark.parametrize("key", sorted(HOSTILE_CONTAINER))
def test_the_api_refuses_each_of_these_so_that_none_is_dropped_in_silence(key):
    container = {"name": "trainer", "securityContext": {key: HOSTILE_CONTAINER[key]}}
    with pytest.raises(ValidationError):
        job(worker={"template": {"spec": {"containers": [container]}}})


@pytest.mark.parametrize("key", sorted(HOSTILE["securityContext"]))
def test_and_each_of_these_of_a_pod(key):
    with pytest.raises(ValidationError):
        job(worker={"template": {"spec": {"securityContext": {key: HOSTILE["securityContext"][key]}}}})


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
    assert (env["RANK"], env["WORLD_SIZE"], env["GROUP_RANK"]) == ("2", "3", "2")
    assert env["MASTER_ADDR"] == "digits-worker-0.digits"
    assert not [name for name in env if name.startswith(("TORCHELASTIC", "LOCAL_"))]


def test_a_bare_torchrun_in_a_command_forms_one_world():
    each = job(trainer={"command": ["torchrun", "train.py"]}, worker={"replicas": 3, "gpusPerWorker": 4})
    env = environment(each, Role.WORKER, 2)
    assert {name: value for name, value in env.items() if name.startswith("PET_")} == {
        "PET_NNODES": "3",
        "PET_NPROC_PER_NODE": "4",
        "PET_NODE_RANK": "2",
        "PET_MASTER_ADDR": "digits-worker-0.digits",
        "PET_MASTER_PORT": "29500",
    }
    assert not [name for name in environment(each, Role.MASTER, 0) if name.startswith("PET_")]
    for trainer in ({"script": {"file": "a.py"}}, JOBS["data-parallel"][0].spec.trainer.to_dict()):
        assert not [name for name in environment(job(trainer=trainer), Role.WORKER, 0) if name.startswith("PET_")]


@pytest.mark.parametrize(
    ("worker", "count"), [({}, "1"), ({"processesPerWorker": 3}, "3"), ({"gpusPerWorker": 2}, "2")]
)
def test_how_many_processes_torchrun_starts_in_each_pod(worker, count):
    each = job(trainer={"command": ["torchrun", "train.py"]}, worker={"replicas": 2, **worker})
    env = environment(each, Role.WORKER, 1)
    assert (env["PET_NPROC_PER_NODE"], env["PET_NNODES"], env["WORLD_SIZE"]) == (count, "2", "2")


def test_a_template_replaces_a_default_and_refers_to_what_is_above_it():
    given = [
        {"name": "ROOT", "value": "/logs"},
        {"name": "HOME", "value": "$(ROOT)/home"},
        {"name": "PET_NNODES", "value": "$(WORLD_SIZE)"},
        {"name": "PET_MASTER_PORT", "value": "1234"},
        {"name": "PYTHONUNBUFFERED", "value": ""},
    ]
    template = {"spec": {"containers": [{"name": "trainer", "env": given}]}}
    each = job(trainer={"command": ["torchrun"]}, worker={"replicas": 2, "template": template})
    env = build_pod(each, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]["containers"][0]["env"]
    names = [entry["name"] for entry in env]
    assert env[-5:] == given, "in their order, and after all of ours"
    assert len(names) == len(set(names))


def test_python_writes_each_line_at_once_in_every_pod():
    for each, places in JOBS.values():
        for role, index in places:
            assert environment(each, role, index)["PYTHONUNBUFFERED"] == "1"


def test_several_processes_of_a_worker_without_gpus():
    each = job(worker={"replicas": 2, "processesPerWorker": 3})
    env = environment(each, Role.WORKER, 1)
    assert (env["RANK"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], env["WORLD_SIZE"]) == ("3", "0", "3", "6")


def test_a_command_runs_in_the_users_image_and_its_master_in_ours():
    each = job(trainer={"command": ["python", "-m", "mine"]}, image="mine:1")
    worker, master = (
        build_pod(each, role, 0, 1, trainer_image="ours:1")["spec"]["containers"][0]
        for role in (Role.WORKER, Role.MASTER)
    )
    assert (worker["image"], worker["command"]) == ("mine:1", ["python", "-m", "mine"])
    assert (master["image"], master["command"][-4:]) == ("ours:1", ["python", "-P", "-m", "disttrain_trainer"])


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


def test_jobs_that_share_a_claim_have_folders_of_their_own_also_when_one_is_created_again():
    first = job(**VOLUMES)
    successor = first.model_copy(update={"metadata": first.metadata.model_copy(update={"uid": "another"})})
    folders = {
        environment(each, Role.WORKER, 0)["DISTTRAIN_CHECKPOINT_DIR"]
        for each in (first, successor, job("other", **VOLUMES))
    }
    assert len(folders) == 3
    assert all(folder.startswith("/checkpoints/") for folder in folders)


def test_a_roll_back_is_told_to_each_process_and_the_span_of_its_rule_to_the_configuration():
    rules = [
        {"name": name, "metric": "Loss", "above": 2, "forSeconds": seconds, "action": action}
        for name, seconds, action in (("a", 60, "RollBack"), ("b", 90, "RollBack"), ("c", 900, "Event"))
    ]
    volume = {"persistentVolumeClaim": "c"}
    each = job(health={"rules": rules}, checkpoint={"volume": volume})
    assert '"rollBackSeconds":210' in environment(each, Role.WORKER, 0)["DISTTRAIN_JOB"]
    assert "which the trainer of this image does not know" in environment(each, Role.WORKER, 0)["DISTTRAIN_JOB"]
    assert "DISTTRAIN_ROLL_BACK" not in environment(each, Role.WORKER, 0)
    status = each.status.model_copy(update={"roll_back": RollBack(attempt=3, step=120)})
    for role in (Role.MASTER, Role.WORKER):
        assert environment(each.model_copy(update={"status": status}), role, 0)["DISTTRAIN_ROLL_BACK"] == "3:120"


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


def test_all_workers_of_our_loop_iterate_over_a_set_in_the_same_order_unless_the_template_says_otherwise():
    digits = JOBS["data-parallel"][0].spec.trainer.to_dict()
    each = job(trainer={**digits, "seed": 7}, worker={"replicas": 3})
    assert [environment(each, Role.WORKER, index)["PYTHONHASHSEED"] for index in range(3)] == ["7"] * 3
    assert "PYTHONHASHSEED" not in environment(each, Role.MASTER, 0)
    template = {"spec": {"containers": [{"name": "trainer", "env": [{"name": "PYTHONHASHSEED", "value": "1"}]}]}}
    own = job(trainer=digits, worker={"replicas": 1, "template": template})
    assert environment(own, Role.WORKER, 0)["PYTHONHASHSEED"] == "1"
    script = job(trainer={"command": ["x"]})
    assert "PYTHONHASHSEED" not in environment(script, Role.WORKER, 0), "a program of the user's own has its own ways"


def test_a_template_cannot_take_our_volumes_away():
    spec = build_pod(HOSTILE_JOB, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["disttrain-checkpoints"]["persistentVolumeClaim"]["claimName"] == "ckpt"
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["/checkpoints"]["name"] == "disttrain-checkpoints"
    assert mounts["/images"]["readOnly"] is True


def test_a_template_cannot_have_the_trainer_restarted_or_its_variables_replaced():
    trainer = build_pod(HOSTILE_JOB, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]["containers"][0]
    assert "restartPolicy" not in trainer
    assert environment(HOSTILE_JOB, Role.WORKER, 0)["MASTER_ADDR"] == "digits-master-0.digits"


def trainer_of(container: dict[str, Any], **pod: Any) -> Any:
    template = {"spec": {"containers": [{"name": "trainer", **container}], **pod}}
    each = job(worker={"replicas": 1, "template": template}, **VOLUMES)
    return build_pod(each, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]["containers"][0]


def test_a_variable_of_the_template_can_refer_to_ours():
    # The kubelet replaces $(NAME) by variables that stand above.
    env = trainer_of({"env": [{"name": "OUT", "value": "$(DISTTRAIN_CHECKPOINT_DIR)/x"}]})["env"]
    names = [entry["name"] for entry in env]
    assert names.index("OUT") > names.index("DISTTRAIN_CHECKPOINT_DIR")
    assert env[names.index("OUT")]["value"] == "$(DISTTRAIN_CHECKPOINT_DIR)/x"
    assert len(names) == len(set(names))


def test_ports_of_a_template_stay_beside_ours_with_and_without_a_name():
    given = [{"containerPort": 8080}, {"containerPort": 8081}, {"containerPort": 9400, "protocol": "UDP", "name": "a"}]
    ports = trainer_of({"ports": [*given, {"containerPort": 9400, "name": "mine"}]})["ports"]
    assert ports == [*given, {"name": "metrics", "containerPort": 9400, "protocol": "TCP"}]


def test_a_template_brings_its_own_scratch_space_by_mounting_it():
    volume = {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}
    mounts = trainer_of({"volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}, volumes=[volume])["volumeMounts"]
    assert {mount["mountPath"]: mount["name"] for mount in mounts} == {
        "/tmp": "tmp",
        "/dev/shm": "disttrain-shm",
        "/checkpoints": "disttrain-checkpoints",
        "/images": "disttrain-data",
    }
    # A volume that only has such a name is no scratch space.
    elsewhere = trainer_of({"volumeMounts": [{"name": "tmp", "mountPath": "/mnt"}]}, volumes=[volume])["volumeMounts"]
    assert {"name": "disttrain-tmp", "mountPath": "/tmp"} in elsewhere


@pytest.mark.parametrize("nothing", [{"initContainers": None}, {"volumes": None}, {"securityContext": None}])
def test_null_in_a_template_is_absent(nothing):
    assert trainer_of({"ports": None, "env": None, "securityContext": None, "volumeMounts": None}, **nothing)


def test_what_cannot_be_handed_to_a_process_makes_no_pod():
    trainer = {**JOBS["data-parallel"][0].spec.trainer.to_dict(), "config": {"text": "x" * 200_000}}
    with pytest.raises(
        ValueError, match=r"spec\.trainer\.config: the configuration of a training process has 20\d\d\d\d bytes"
    ):
        build_pod(job(trainer=trainer), Role.MASTER, 0, 1, trainer_image="t:1")


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


@pytest.mark.parametrize("role", Role)
def test_what_makes_nodes_fewer_leaves_those_of_master_and_servers_alone(role):
    asked = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    annotations = build_pod(job(**PARAMETER_SERVER), role, 0, 1, trainer_image="t:1")["metadata"]["annotations"]
    assert (asked.items() <= annotations.items()) is (role is not Role.WORKER)
    assert bool(asked.keys() & annotations.keys()) is (role is not Role.WORKER)


def test_a_template_may_let_its_master_be_disturbed():
    template = {"metadata": {"annotations": {"karpenter.sh/do-not-disrupt": "false"}}}
    pod = build_pod(job(master={"template": template}), Role.MASTER, 0, 1, trainer_image="t:1")
    assert pod["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "false"


def lost_node_seconds(*tolerations):
    each = job(worker={"replicas": 1, "template": {"spec": {"tolerations": list(tolerations)}}})
    merged = build_pod(each, Role.WORKER, 0, 1, trainer_image="t:1")["spec"]["tolerations"]
    assert merged[: len(tolerations)] == list(tolerations)
    return {one["key"].split("/")[1]: one["tolerationSeconds"] for one in merged[len(tolerations) :]}


def test_every_pod_leaves_a_lost_node_after_30_seconds():
    assert lost_node_seconds() == {"not-ready": 30, "unreachable": 30}
    for role in (Role.MASTER, Role.PARAMETER_SERVER):
        pod = build_pod(job(**PARAMETER_SERVER), role, 0, 1, trainer_image="t:1")
        assert [one["tolerationSeconds"] for one in pod["spec"]["tolerations"]] == [30, 30]


UNREACHABLE = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}


@pytest.mark.parametrize(
    ("toleration", "left"),
    [
        pytest.param({**UNREACHABLE, "tolerationSeconds": 900}, {"not-ready": 30}, id="one of the two, for longer"),
        pytest.param(UNREACHABLE, {"not-ready": 30}, id="for ever"),
        pytest.param({"operator": "Exists"}, {}, id="every taint"),
        pytest.param({"operator": "Exists", "effect": "NoExecute"}, {}, id="every taint that evicts"),
        pytest.param({"operator": "Exists", "effect": "NoSchedule"}, {"not-ready": 30, "unreachable": 30}, id="others"),
        pytest.param(
            {"key": "nvidia.com/gpu", "operator": "Exists"}, {"not-ready": 30, "unreachable": 30}, id="another taint"
        ),
    ],
)
def test_a_template_says_itself_how_long_a_lost_node_is_tolerated(toleration, left):
    assert lost_node_seconds(toleration) == left


def test_a_command_finds_code_and_archives_before_the_users_own_modules(tmp_path: Path) -> None:
    trainer = {"command": ["printenv", "PYTHONPATH"], "code": {"persistentVolumeClaim": "c", "path": "src"}}
    pod = build_pod(job(trainer=trainer), Role.WORKER, 0, 1, trainer_image="t:1")
    command = pod["spec"]["containers"][0]["command"]

    def run(folder: Path, **env: str) -> tuple[int, str]:
        given = {"PATH": "/usr/bin:/bin", "DISTTRAIN_CODE_DIR": str(folder), **env}
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run(tmp_path) == (0, f"{tmp_path}\n")
    for name in ("b.zip", "a.zip", "mine.py"):
        (tmp_path / name).touch()
    assert run(tmp_path, PYTHONPATH="/own") == (0, f"{tmp_path}:{tmp_path}/a.zip:{tmp_path}/b.zip:/own\n")
    assert run(tmp_path / "none") == (2, "trainer.code.path: there is no such folder on the claim\n")


@pytest.mark.parametrize("has_trainer", [True, False])
def test_a_command_whose_output_is_read_needs_our_trainer_in_its_image(tmp_path: Path, has_trainer: bool) -> None:
    """The kubelet expands the names of variables in the words of the container's command alone: they are the trainer's arguments."""
    trainer = {"command": ["prog", "$(RANK)"], "progress": {"pattern": "(?P<step>[0-9]+)"}}
    pod = build_pod(job(trainer=trainer), Role.WORKER, 0, 1, trainer_image="t:1")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = -c ] && exit {0 if has_trainer else 1}; echo "$@"\n')
    python.chmod(0o755)
    command = pod["spec"]["containers"][0]["command"]
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if has_trainer:
        assert (done.returncode, done.stdout) == (0, "-P -m disttrain_trainer prog $(RANK)\n"), done
    else:
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.startswith("trainer.progress: the output of a command is read by our trainer")


@pytest.mark.parametrize(
    ("policy", "codes"),
    [
        pytest.param({}, (), id="the default rules name none of them"),
        pytest.param({"rules": [_rule([75, 137, 3])]}, (75, 137), id="a rule"),
        pytest.param({"rules": [_rule([134], conditions=["DisruptionTarget"])]}, (134,), id="a rule with a condition"),
        pytest.param({"rules": [], "defaultAction": "RestartJob"}, tuple(range(129, 256)), id="another default action"),
    ],
)
def test_a_process_knows_the_exit_codes_that_the_failure_policy_decides_about(
    policy: dict[str, Any], codes: tuple[int, ...]
) -> None:
    config, unknown = JobConfig.decode(job_config(job(failurePolicy=policy), 1, ADDRESSES).encode())
    assert (config.exit_codes_of_rules, unknown) == (codes, ())


def test_the_pods_whose_process_is_restarted_in_place_know_their_uid() -> None:
    def knows(spec: DistTrainJob, role: Role) -> bool:
        env = build_pod(spec, role, 0, 1, trainer_image="t:1")["spec"]["containers"][0]["env"]
        return {"name": POD_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}} in env

    served = JOBS["parameter-server"][0]
    assert [knows(served, role) for role in Role] == [role is not Role.MASTER for role in Role]
    assert not knows(JOBS["script"][0], Role.WORKER)
    assert not knows(JOBS["command"][0], Role.WORKER)
