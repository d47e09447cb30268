"""The two ways to run a job, side by side: what a process finds in a pod, and what it finds in a local run.

Each variable and each part of the life cycle is the same, or it is listed here with the reason why it cannot be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.local.addresses import Ports
from disttrain.local.documents import Documents
from disttrain.local.expansion import expanded
from disttrain.local.folders import RunFolder
from disttrain.local.processes import Process
from disttrain.local.programs import Programs
from disttrain.manifests import build_pod

SHELL = {"PATH": "/usr/bin:/bin", "HOME": "/home/me", "USER": "me", "LANG": "de_DE.UTF-8", "NCCL_DEBUG": "INFO"}
"""The environment of the shell that starts the local run."""

OTHER_VALUE = {
    "HOME": "the user's own; a container has none that can be written",
    "USER": "the user's own; the user of a container may have no name",
    "MASTER_ADDR": "loopback in place of the name of a pod",
    "MASTER_PORT": "a free port: all processes share the ports of one machine",
    "PET_MASTER_ADDR": "as MASTER_ADDR",
    "PET_MASTER_PORT": "as MASTER_PORT",
    "KUBEFLOW_TRAINER_SERVER_URL": "as MASTER_ADDR and MASTER_PORT",
    "KUBEFLOW_TRAINER_SERVER_TOKEN": "as DISTTRAIN_DATA_KEY: a file in memory",
    "LOCAL_RANK": "the workers of our loop and of scripts share one machine",
    "LOCAL_WORLD_SIZE": "as LOCAL_RANK",
    "GROUP_RANK": "as LOCAL_RANK: it counts machines, and for a command pods",
    "DISTTRAIN_JOB": "holds the addresses, and how many workers share a machine",
    "DISTTRAIN_METRICS_PORT": "as MASTER_PORT",
    "DISTTRAIN_TERMINATION_LOG": "a file of the run's folder in place of the container's own",
    "DISTTRAIN_CHECKPOINT_DIR": "the claim is a folder under .disttrain",
    "DISTTRAIN_DATA_DIR": "as DISTTRAIN_CHECKPOINT_DIR",
    "DISTTRAIN_DATA_KEY": "the Secret of the file, in memory",
    "DISTTRAIN_DATA_URL_OPTIONS": "as DISTTRAIN_DATA_KEY",
    "DISTTRAIN_COPIES_DIR": "a folder of the run in place of one of the pod",
}
"""Variables of both, with values that differ, and why."""
ONLY_LOCAL = {
    "DISTTRAIN_POD_UID": "of each process, to end it with all that it started; in a pod only of one that is restarted in place",
    "PATH": "of this machine, with the folder of our Python first; in a pod it comes from the image",
    "LANG": "the shell's, as everything that the user set for programs of this machine",
    "NCCL_DEBUG": "as LANG",
    "OMP_NUM_THREADS": "a share of the machine's cores; in a pod the container's CPU limit counts, and our trainer sets it",
    "CUDA_VISIBLE_DEVICES": "the GPUs of the job; in a pod the device plugin shows the container its own alone",
    "DISTTRAIN_PARENT_PID": "the process ends with the run; in a pod the kubelet sees to that",
    "DISTTRAIN_MODEL_DIR": "the folder of the run, which is there for ever; a pod has the checkpoint claim alone, DISTTRAIN_CHECKPOINT_DIR",
    "DISTTRAIN_RUN_ID": "finds what a killed run leaves behind",
}
"""Variables of a local run that a pod's container is not given, and why."""

TEMPLATE = {
    "spec": {
        "terminationGracePeriodSeconds": 7,
        "containers": [
            {
                "name": "trainer",
                "env": [
                    {"name": "ROOT", "value": "/out"},
                    {"name": "OUT", "value": "$(ROOT)/$(RANK) of $(WORLD_SIZE), $$(RANK) $(NONE) $(PET_NNODES)"},
                    {"name": "LATE", "value": "$(PYTHONUNBUFFERED)"},
                    {"name": "PYTHONUNBUFFERED", "value": "$(ROOT)"},
                    {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                ],
            }
        ],
    }
}
MODEL = {
    "model": "disttrain_trainer.examples.digits:model",
    "dataset": "disttrain_trainer.examples.digits:dataset",
    "optimizer": {"name": "SGD", "learningRate": 0.1},
    "epochs": 1,
    "seed": 3,
}
SERVED = {"strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}, "parameterServer": {}}
KINDS: dict[str, dict[str, Any]] = {
    "our loop": {"trainer": MODEL},
    "parameter servers": {"trainer": MODEL, **SERVED},
    "script": {"trainer": {"script": {"file": "train.py"}}},
    "command": {"trainer": {"command": ["torchrun", "train.py"]}},
}

Both = Callable[..., tuple[dict[str, str], dict[str, str]]]


def parse(**spec: Any) -> DistTrainJob:
    body = {"strategy": {"type": "DataParallel"}, "worker": {"replicas": 2, "processesPerWorker": 2}, **spec}
    return DistTrainJob.parse({"metadata": {"name": "j", "namespace": "n", "uid": "0123456789"}, "spec": body})


def environment_of_pod(job: DistTrainJob, role: Role, index: int) -> dict[str, str]:
    """The variables of the trainer's container, expanded as the kubelet does."""
    pod = build_pod(job, role, index, 1, trainer_image="t:1")
    variables: dict[str, str] = {}
    for entry in pod["spec"]["containers"][0]["env"]:
        value = expanded(entry.get("value", ""), variables)
        if "valueFrom" in entry:
            value = {"metadata.name": pod["metadata"]["name"], "metadata.uid": "u"}[
                entry["valueFrom"]["fieldRef"]["fieldPath"]
            ]
        variables[entry["name"]] = value
    return variables


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    """The environment of a process in a pod, and in a local run that a shell with these variables starts."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    ports, kept = Ports(), list[Programs]()

    def answer(
        job: DistTrainJob, role: Role, index: int, *documents: dict[str, Any], **shell: str
    ) -> tuple[dict[str, str], dict[str, str]]:
        with monkeypatch.context() as patched:
            for name in os.environ:
                patched.delenv(name)
            for name, value in {**SHELL, **shell}.items():
                patched.setenv(name, value)
            folder = RunFolder.new("j")
            if job.spec.data is not None:
                (folder.claim("data") / "file").touch()
            programs = Programs(job, Documents(documents), folder, ports)
            kept.append(programs)  # as long as it is there, so is what it has in memory
            process = Process(
                name=f"j-{role.short}-{index}",
                uid="u",
                role=role,
                index=index,
                attempt=1,
                metrics_port=1,
                log=Path("log"),
                termination_log=Path("words"),
            )
            local = programs.environment(process) | {"DISTTRAIN_POD_UID": process.uid}  # as Process.run does
            return environment_of_pod(job, role, index), local

    yield answer
    ports.close()


@pytest.mark.parametrize(
    ("kind", "role"),
    [
        (kind, role)
        for kind in KINDS
        for role in Role
        if role is not Role.PARAMETER_SERVER or kind == "parameter servers"
    ],
)
def test_a_process_finds_the_same_variables_in_a_pod_and_in_a_local_run(both: Both, kind: str, role: Role) -> None:
    volumes = {
        "checkpoint": {"volume": {"persistentVolumeClaim": "c"}},
        "data": {"volume": {"persistentVolumeClaim": "data", "path": "/d"}},
    }
    index = 1 if role is Role.WORKER else 0
    for spec in ({}, volumes):
        pod, local = both(parse(**KINDS[kind], **spec), role, index)
        assert set(pod) <= set(local)
        assert set(local) - set(pod) <= set(ONLY_LOCAL), "each with its reason"
        assert {name for name in pod if pod[name] != local[name]} <= set(OTHER_VALUE), "each with its reason"


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_sets_the_same_variables_in_both(both: Both, kind: str) -> None:
    worker = {"replicas": 2, "template": TEMPLATE}
    pod, local = both(parse(**{**KINDS[kind], "worker": worker}), Role.WORKER, 1)
    for name in ("ROOT", "OUT", "LATE", "PYTHONUNBUFFERED", "NAME"):
        assert pod[name] == local[name]
    known = "2" if kind == "command" else "$(PET_NNODES)"
    assert pod["OUT"] == f"/out/1 of 2, $(RANK) $(NONE) {known}"
    assert (pod["LATE"], pod["PYTHONUNBUFFERED"]) == ("$(PYTHONUNBUFFERED)", "/out")


@pytest.mark.parametrize(
    "name",
    [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PET_NNODES",
        "PET_RDZV_BACKEND",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_ERROR_FILE",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
        "PMIX_RANK",
        "DISTTRAIN_JOB",
        "DISTTRAIN_OF_A_LATER_VERSION",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shell_that_is_part_of_a_training_does_not_reach_the_processes(both: Both, kind: str, name: str) -> None:
    for role in (Role.MASTER, Role.WORKER):
        _, local = both(parse(**KINDS[kind]), role, 0, **{name: "of the shell"})
        assert local.get(name) != "of the shell"


def test_what_the_user_sets_for_programs_of_this_machine_reaches_them(both: Both) -> None:
    shell = {"PYTHONPATH": "/src", "HF_HOME": "/models", "OMP_NUM_THREADS": "3", "RANKING": "x", "PETS": "y"}
    _, local = both(parse(**KINDS["command"]), Role.WORKER, 0, **shell)
    assert {name: local[name] for name in shell} == shell


def test_ranks_of_one_machine_say_so_and_those_of_pods_do_not(both: Both) -> None:
    for kind in ("our loop", "script", "parameter servers"):
        pod, local = both(parse(**KINDS[kind]), Role.WORKER, 1)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        assert [pod[name] for name in names] == ["2", "4", "0", "2", "1"]
        assert [local[name] for name in names] == ["2", "4", "2", "4", "0"]


def test_a_command_counts_pods_in_both(both: Both) -> None:
    for variables in both(parse(**KINDS["command"]), Role.WORKER, 1):
        names = ("RANK", "WORLD_SIZE", "GROUP_RANK", "PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK")
        assert [variables[name] for name in names] == ["1", "2", "1", "2", "2", "1"]
        assert not [name for name in variables if name.startswith("LOCAL_")]
        assert variables["PET_MASTER_ADDR"] == variables["MASTER_ADDR"]
        assert variables["PET_MASTER_PORT"] == variables["MASTER_PORT"]


@pytest.mark.parametrize("checkpoint", [None, {"volume": {"persistentVolumeClaim": "c"}}])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_process_has_the_same_time_to_end_after_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Any, template: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    worker = {"replicas": 1, **({"template": template} if template else {})}
    job = parse(trainer=MODEL, worker=worker, **({"checkpoint": checkpoint} if checkpoint else {}))
    ports = Ports()
    programs = Programs(job, Documents([]), RunFolder.new("j"), ports)
    for role in (Role.MASTER, Role.WORKER):
        spec = build_pod(job, role, 0, 1, trainer_image="t:1")["spec"]
        assert programs.grace_seconds(role) == spec["terminationGracePeriodSeconds"]
    ports.close()


def test_secrets_of_the_data_are_on_no_disk_of_a_local_run(both: Both, tmp_path: Path) -> None:
    trainer = MODEL | {"dataset": "disttrain_trainer.data:packed"}
    data = {"url": "file:///packs", "urlSecretName": "options", "encryption": {"secretName": "key"}}
    documents = [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "options"}, "stringData": {"endpoint": "planted"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"key": "planted, too"}},
    ]
    pod, local = both(parse(trainer=trainer, data=data), Role.WORKER, 1, *documents)
    assert set(pod) <= set(local)
    assert json.loads(Path(local["DISTTRAIN_DATA_URL_OPTIONS"]).read_text()) == {"endpoint": "planted"}
    assert Path(local["DISTTRAIN_DATA_KEY"]).read_text() == "planted, too"
    assert not any(b"planted" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
