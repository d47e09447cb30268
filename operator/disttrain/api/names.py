"""Every name that more than one part must agree on: the API group, labels, children, ports. Not their content."""

import re
from enum import StrEnum
from types import MappingProxyType
from typing import Final

GROUP: Final = "disttrain.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "DistTrainJob"
PLURAL: Final = "disttrainjobs"
SINGULAR: Final = "disttrainjob"
SHORT_NAME: Final = "dtj"

MANAGED_BY: Final = "disttrain.dev/operator"
"""The value of spec.managedBy that this operator serves; any other means: hands off (KEP-2232, MultiKueue)."""

LABEL_JOB_NAME: Final = "disttrain.dev/job-name"
LABEL_ROLE: Final = "disttrain.dev/role"
LABEL_INDEX: Final = "disttrain.dev/index"
LABEL_ATTEMPT: Final = "disttrain.dev/attempt"
LABEL_OPERATOR: Final = "disttrain.dev/operator"
"""Of a namespace, "true": its operators may read the metrics of jobs in other ones."""
LABEL_MONITORING: Final = "disttrain.dev/monitoring"
"""Of a namespace, "true": its pods may read the metrics of every job."""
OPERATOR_POD: Final = MappingProxyType({"app.kubernetes.io/name": "disttrain-operator"})
"""Labels by which an operator's pod is known."""
ANNOTATION_TRAINER_IMAGE: Final = "disttrain.dev/trainer-image"
"""On a pod: the trainer image of the operator that made it, which the pods of one attempt share."""
ANNOTATION_STATUS_TOKEN: Final = "disttrain.dev/status-token"
"""On a worker of a script or command: what its file in STATUS_PATH holds."""

FIELD_MANAGER: Final = "disttrain-operator"
TRAINER_CONTAINER: Final = "trainer"
"""The container that trains. A template's container of this name is merged into it; every other one is a sidecar."""
GPU: Final = "nvidia.com/gpu"

MAX_JOB_NAME: Final = 40
"""So that <job>-<role>-<index> fits in the 63 characters of a DNS label."""

RENDEZVOUS_PORT: Final = 29500
"""MASTER_PORT: the torch.distributed store. On the master for our own loop and scripts, on worker 0 for a command."""
CONTROL_PORT: Final = 29400
"""The master's control connection: membership, work queue, progress."""
SERVER_PORT: Final = 29600
"""A parameter server's data connection; a worker's, for copies of the data."""
METRICS_PORT: Final = 9400
OWN_PORTS: Final = ("metrics", "rendezvous", "control", "server")
"""The names of these ports in the pods and the Service of a job."""

VOLUME_PREFIX: Final = "disttrain-"
"""Every volume of a pod that begins so is ours."""
CHECKPOINT_PATH: Final = "/checkpoints"
OWN_PATH: Final = "/disttrain"
"""Whatever a pod has at or below it is ours, also in later versions."""
MODEL_FILE: Final = "model.safetensors"
"""The trained model, in the job's folder of the checkpoint claim, or in the folder of a local run."""
CODE_PATH: Final = f"{OWN_PATH}/code"
"""Where a worker has trainer.code."""
DATA_KEY_PATH: Final = f"{OWN_PATH}/data-key"
"""Where a worker has the Secret of data.encryption."""
DATA_URL_PATH: Final = f"{OWN_PATH}/data-url"
"""Where a worker has the Secret of data.urlSecretName."""
STATUS_PATH: Final = f"{OWN_PATH}/status"
"""Where a worker of a script or command has the token with which it may report (trainer_status.py)."""
COPIES_PATH: Final = f"{OWN_PATH}/copies"
"""Where a worker keeps its copies of the data, with data.replication."""
TLS_PATH: Final = f"{OWN_PATH}/tls"
"""Where a pod has the certificate of its attempt."""
CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
"""The files there, as in a Secret of type kubernetes.io/tls; the join tokens are beside them (joining.py)."""
TERMINATION_LOG: Final = "/dev/termination-log"


class Role(StrEnum):
    """What a pod does; the value is that of the label `disttrain.dev/role` and of the metric label `role`."""

    MASTER = "master"
    """Hosts the rendezvous, the work queue and the progress of the job. Never trains, needs no GPU."""
    PARAMETER_SERVER = "parameter-server"
    """Holds a shard of the parameters and of the optimiser's state."""
    WORKER = "worker"
    """Computes gradients."""

    @property
    def short(self) -> str:
        """The part of a pod's name: master, ps, worker."""
        return "ps" if self is Role.PARAMETER_SERVER else str(self.value)

    @property
    def status_name(self) -> str:
        """The name in status.replicaStatuses: Master, ParameterServer, Worker."""
        return {"master": "Master", "parameter-server": "ParameterServer", "worker": "Worker"}[self.value]


class ChildKind(StrEnum):
    """A kind of object of which a job has at most one, with the name of the job. A new kind is a line here, a rule in
    `plan.children.NEEDED`, a manifest in `manifests.CHILDREN`, and its place in `kube.api.CHILDREN`."""

    SERVICE = "Service"
    """The headless Service that gives every pod of the job a stable name."""
    NETWORK_POLICY = "NetworkPolicy"
    """The NetworkPolicy of network.policy JobOnly."""
    COSCHEDULING_GROUP = "PodGroup of Coscheduling"
    """The PodGroup of scheduling.gang Coscheduling."""
    VOLCANO_GROUP = "PodGroup of Volcano"
    """The PodGroup of scheduling.gang Volcano."""


POD_GROUPS: Final = frozenset({ChildKind.COSCHEDULING_GROUP, ChildKind.VOLCANO_GROUP})
"""Kinds that exist in a cluster only where a gang scheduler is installed. Pods are created after the job's object of such a kind."""


def secret_name(job: str, uid: str, attempt: int, suffix: str) -> str:
    """The Secret with the certificate of an attempt, for network.tls Mutual. suffix: random, so that no other user can create an object of
    that name first. The rest of the name is the job's, so that a changed status names no other Secret."""
    return f"{job}-{uid[:8]}-tls-{attempt}-{suffix}"


def checkpoint_dir(job: str, uid: str) -> str:
    """A job's own folder on the claim of its checkpoints: jobs that share a claim, or a name one after the other, meet there only by
    checkpoint.from."""
    return f"{CHECKPOINT_PATH}/{job}-{uid[:8]}"


def uid_in_folder(name: str, job: str) -> str | None:
    """The first characters of a job's uid, from the name of its folder on a claim: <job>-<uid>, and of a local run <job>-<start>-<uid>.

    None for a folder of another job.
    """
    found = re.fullmatch(rf"{re.escape(job)}(-[0-9]{{8}}-[0-9]{{6}})?-([0-9a-f]{{8}})", name)
    return found[2] if found else None


def pod_name(job: str, role: Role, index: int) -> str:
    """The name of a pod, the same in every attempt, so that a repeated create is a 409 and not a second pod."""
    return f"{job}-{role.short}-{index}"


def label(role: Role, index: int) -> str:
    """The short name of a process, before each of its lines: master, ps-0, worker-1."""
    return f"{role.short}-{index}" if role is not Role.MASTER else role.short


def service_name(job: str) -> str:
    """The headless Service that gives every pod of the job a stable name."""
    return job


def pod_host(job: str, role: Role, index: int) -> str:
    """The DNS name of a pod within its namespace."""
    return f"{pod_name(job, role, index)}.{service_name(job)}"
