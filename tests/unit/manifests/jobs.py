"""The jobs of the golden files: between them every branch of the manifests."""

from typing import Any

from disttrain.api import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.status import CertificateStatus, DistTrainJobStatus

MODEL = {
    "model": "disttrain_trainer.examples.digits:model",
    "dataset": "disttrain_trainer.examples.digits:dataset",
    "optimizer": {"name": "SGD", "learningRate": 0.1},
    "epochs": 5,
}


def job(name: str = "digits", **spec: Any) -> DistTrainJob:
    """A job in namespace `team`; data parallel with two workers where the spec does not say otherwise."""
    body = {"strategy": {"type": "DataParallel"}, "trainer": MODEL, "worker": {"replicas": 2}, **spec}
    return DistTrainJob.parse({"metadata": {"name": name, "namespace": "team", "uid": f"uid-of-{name}"}, "spec": body})


PARAMETER_SERVER = {
    "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "BoundedStaleness", "maxStaleness": 4}},
    "parameterServer": {"replicas": 2},
}
VOLUMES = {
    "checkpoint": {"volume": {"persistentVolumeClaim": "ckpt"}, "everySteps": 50},
    "data": {"volume": {"persistentVolumeClaim": "images", "path": "/images"}},
}
TEMPLATE = {
    "metadata": {"labels": {"team": "vision"}, "annotations": {"sidecar.istio.io/inject": "true"}},
    "spec": {
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "terminationGracePeriodSeconds": 120,
        "securityContext": {"runAsUser": 1000, "fsGroup": 1000, "supplementalGroups": [2000]},
        "volumes": [
            {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
            {"name": "logs", "emptyDir": {}},
        ],
        "initContainers": [{"name": "fetch", "image": "fetch:1"}],
        "containers": [
            {
                "name": "trainer",
                "env": [
                    {"name": "NCCL_DEBUG", "value": "INFO"},
                    {"name": "HOME", "value": "/logs"},
                    {"name": "OUT", "value": "/logs/$(RANK)"},
                ],
                "ports": [{"containerPort": 8080}],
                "resources": {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "16Gi"}},
                "volumeMounts": [{"name": "logs", "mountPath": "/logs"}, {"name": "dshm", "mountPath": "/dev/shm"}],
                "securityContext": {"runAsUser": 1001, "seLinuxOptions": {"level": "s0:c1,c2"}},
            },
            {"name": "tensorboard", "image": "tensorboard:2", "volumeMounts": [{"name": "logs", "mountPath": "/logs"}]},
        ],
    },
}
AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
        }
    },
    "podAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "kubernetes.io/hostname"}
        ]
    },
}

JOBS: dict[str, tuple[DistTrainJob, tuple[tuple[Role, int], ...]]] = {
    "data-parallel": (job(), ((Role.MASTER, 0), (Role.WORKER, 1))),
    "parameter-server": (
        job(**PARAMETER_SERVER, **VOLUMES, image="team/train:1"),
        ((Role.MASTER, 0), (Role.PARAMETER_SERVER, 1), (Role.WORKER, 0)),
    ),
    "tls": (
        job(**PARAMETER_SERVER, network={"tls": "Mutual"}).model_copy(
            update={
                "status": DistTrainJobStatus(
                    attempt=2, certificate=CertificateStatus(attempt=2, suffix="0123456789abcdef", uid="uid-of-secret")
                )
            }
        ),
        ((Role.PARAMETER_SERVER, 1),),
    ),
    "gpus-and-template": (
        job(
            worker={"replicas": 4, "gpusPerWorker": 8, "template": TEMPLATE},
            scheduling={"priorityClassName": "high"},
            observability={"metricsPort": 9500},
        ),
        ((Role.WORKER, 3),),
    ),
    "gang": (
        job(
            **PARAMETER_SERVER,
            worker={
                "replicas": 4,
                "elastic": {"minReplicas": 3, "maxReplicas": 8},
                "gpusPerWorker": 8,
                "template": TEMPLATE,
            },
            scheduling={"gang": "Coscheduling", "timeoutSeconds": 300},
        ),
        ((Role.MASTER, 0), (Role.WORKER, 3)),
    ),
    "gang-of-volcano": (
        job(
            worker={"replicas": 2, "template": {"spec": {"schedulerName": "volcano", "affinity": AFFINITY}}},
            scheduling={"gang": "Volcano", "priorityClassName": "high", "topologyKey": "topology.kubernetes.io/zone"},
        ),
        ((Role.MASTER, 0), (Role.WORKER, 1)),
    ),
    "script": (
        job(trainer={"code": {"configMap": "code"}, "script": {"file": "train.py", "args": ["--lr", "0.1"]}}),
        ((Role.MASTER, 0), (Role.WORKER, 0)),
    ),
    "command": (
        job(
            trainer={"command": ["python", "-m", "mine"]},
            image="team/mine:1",
            worker={"replicas": 2, "gpusPerWorker": 2},
        ),
        ((Role.MASTER, 0), (Role.WORKER, 1)),
    ),
    "command-that-is-read": (
        job(trainer={"command": ["torchrun", "train.py"], "progress": {"pattern": "step (?P<step>[0-9]+)"}}),
        ((Role.WORKER, 1),),
    ),
    "command-with-code": (
        job(
            trainer={
                "command": ["python", "-m", "mine"],
                "code": {"persistentVolumeClaim": "sources", "path": "team/src"},
            }
        ),
        ((Role.WORKER, 1),),
    ),
}
