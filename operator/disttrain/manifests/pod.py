"""The pod of a role and index: the operator's part, and the role's template merged into it.

Not here: the environment (environment.py), the security settings (security.py), how lists are merged (template.py).
"""

from types import MappingProxyType
from typing import Any, Final

from disttrain.api import trainer_status
from disttrain.api.code import Code
from disttrain.api.environment import CODE_DIR, COPIES_LIMIT, JOB, POD_UID
from disttrain.api.gangs import scheduler_name
from disttrain.api.job import DistTrainJob
from disttrain.api.joining import JOIN_KEY, join_file
from disttrain.api.names import (
    ANNOTATION_STATUS_TOKEN,
    ANNOTATION_TRAINER_IMAGE,
    CA,
    CERTIFICATE,
    CHECKPOINT_PATH,
    CODE_PATH,
    CONTROL_PORT,
    COPIES_PATH,
    DATA_KEY_PATH,
    DATA_URL_PATH,
    KEY,
    LABEL_ATTEMPT,
    LABEL_INDEX,
    LABEL_ROLE,
    RENDEZVOUS_PORT,
    SERVER_PORT,
    STATUS_PATH,
    TERMINATION_LOG,
    TLS_PATH,
    TRAINER_CONTAINER,
    VOLUME_PREFIX,
    ChildKind,
    Role,
    checkpoint_dir,
    pod_host,
    pod_name,
    service_name,
)
from disttrain.api.policies import Tls
from disttrain.api.storage import KEY_OF_SECRET
from disttrain.api.trainer import Command, Loop
from disttrain.manifests.environment import (
    cluster_addresses,
    default_environment,
    keeping_workers,
    reports_status,
    store_host,
    training_environment,
)
from disttrain.manifests.owner import child_metadata
from disttrain.manifests.pod_group import annotations_of_member, labels_of_member
from disttrain.manifests.resources import resources_of_trainer
from disttrain.manifests.secret import name_of_secret
from disttrain.manifests.security import container_security, pod_security
from disttrain.manifests.size import MAX_BYTES, too_large
from disttrain.manifests.template import merge_by, ports_of, restricted, split_containers
from disttrain.manifests.topology import with_one_value

ENTRYPOINT = ("env", "--block-signal=TERM", "python", "-P", "-m", "disttrain_trainer")
"""A container's first process never gets a signal that it has no handler for, but one that it blocks waits for it: a pod that is
deleted while Python starts ends then, and not after its grace period. -P: the current folder is not searched for modules; a file of the
user's with the name of one of Python's would break every process."""
GRACE_SECONDS = 30
GRACE_SECONDS_WITH_CHECKPOINT = 60
"""SIGTERM makes the job take a checkpoint first."""

LOST_NODE_SECONDS = 30
"""How long a pod stays on a node that does not report. Kubernetes would give it 300 s, in which a job of many nodes waits for one."""
_LOST_NODE: Final = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

_UNDISTURBED: Final = MappingProxyType(
    {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
)
"""Of master and servers: what makes nodes fewer leaves theirs alone. Without them every worker waits, and a PodDisruptionBudget
would count them like workers."""

_TMP: Final = f"{VOLUME_PREFIX}tmp"
_SHM: Final = f"{VOLUME_PREFIX}shm"
_CHECKPOINTS: Final = f"{VOLUME_PREFIX}checkpoints"
_DATA: Final = f"{VOLUME_PREFIX}data"
_DATA_KEY: Final = f"{VOLUME_PREFIX}data-key"
_DATA_URL: Final = f"{VOLUME_PREFIX}data-url"
_COPIES: Final = f"{VOLUME_PREFIX}copies"
_CODE: Final = f"{VOLUME_PREFIX}code"
_TLS: Final = f"{VOLUME_PREFIX}tls"
_STATUS: Final = f"{VOLUME_PREFIX}status"

_WITH_CODE: Final = (
    "sh",
    "-c",
    f'[ -d "${CODE_DIR}" ] || {{ echo "trainer.code.path: there is no such folder on the claim" >&2; exit 2; }}; '
    f'disttrain_code="${CODE_DIR}"; for disttrain_archive in "${CODE_DIR}"/*.zip; do '
    '[ -e "$disttrain_archive" ] && disttrain_code="$disttrain_code:$disttrain_archive"; done; '
    'export PYTHONPATH="$disttrain_code${PYTHONPATH:+:$PYTHONPATH}"; exec "$@"',
    "sh",
)
"""Before a command that has trainer.code. None of our programs runs in its container, and only the volume shows which archives it holds."""

_WITH_READER: Final = (
    *ENTRYPOINT[:2],  # also while sh looks
    "sh",
    "-c",
    "python -P -c 'import disttrain_trainer.strategies.command' 2>/dev/null || { "
    'echo "trainer.progress: the output of a command is read by our trainer, which this image does not have in this release: install it '
    'there (pip install disttrain[trainer]), or leave trainer.progress out" >&2; exit 2; }; exec "$@"',
    "sh",
    *ENTRYPOINT[2:],
)
"""Before a command whose output is read. Only the image knows whether it has our trainer."""

_SECRET_MODE: Final = 0o440
"""Of a file with a secret: its user and group. The trainer is of the group (security.py)."""

_Object = dict[str, Any]


def build_pod(
    job: DistTrainJob, role: Role, index: int, attempt: int, *, trainer_image: str, pod_group: ChildKind | None = None
) -> _Object:
    """The pod; `trainer_image` is the operator's own, for jobs that name none; `pod_group`: the kind of its PodGroup, None for no gang.
    Raises ValueError for a job that no pod can carry."""
    template = job.spec.template_of(role).pod_spec()
    trainer, sidecars = split_containers(template)
    init_containers = [*map(restricted, template.get("initContainers", [])), *sidecars]
    default_grace = GRACE_SECONDS_WITH_CHECKPOINT if job.spec.checkpoint else GRACE_SECONDS
    spec = {
        "terminationGracePeriodSeconds": default_grace,
        **template,
        # A failed pod is replaced by the plan, which alone knows the failure policy.
        "restartPolicy": "Never",
        "hostname": pod_name(job.metadata.name, role, index),
        "subdomain": service_name(job.metadata.name),
        "automountServiceAccountToken": False,
        # Else every Service of the namespace would be in the environment, MASTER_PORT of a Service "master" among them.
        "enableServiceLinks": False,
        "securityContext": pod_security(template.get("securityContext", {})),
        "containers": [_trainer_container(job, role, index, attempt, trainer, trainer_image)],
        "volumes": _volumes(job, role, index, template),
        "tolerations": _tolerations(template.get("tolerations", [])),
    }
    if init_containers:
        spec["initContainers"] = init_containers
    if priority_class := job.spec.scheduling.priority_class_name:
        spec["priorityClassName"] = priority_class
    if role is Role.WORKER and (key := job.spec.scheduling.topology_key):
        spec["affinity"] = with_one_value(job, key, template.get("affinity") or {})
    if pod_group is not None:
        spec.setdefault("schedulerName", scheduler_name(job.spec, pod_group))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(job, role, index, attempt, trainer_image, pod_group),
        "spec": spec,
    }


def _metadata(
    job: DistTrainJob, role: Role, index: int, attempt: int, trainer_image: str, pod_group: ChildKind | None
) -> _Object:
    metadata = child_metadata(job, pod_name(job.metadata.name, role, index))
    given = job.spec.template_of(role).metadata
    own_labels = {LABEL_ROLE: role.value, LABEL_INDEX: str(index), LABEL_ATTEMPT: str(attempt)}
    own_labels |= labels_of_member(job, pod_group)
    defaults = {
        # A mesh's proxy would outlive the trainer, and does not speak the protocols between the peers.
        "sidecar.istio.io/inject": "false",
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(job.spec.observability.metrics_port),
        "prometheus.io/path": "/metrics",
    }
    if role is not Role.WORKER:
        defaults |= _UNDISTURBED
    metadata["labels"] = {**((given and given.labels) or {}), **metadata["labels"], **own_labels}
    own_annotations = {ANNOTATION_TRAINER_IMAGE: trainer_image, **annotations_of_member(job, role, pod_group)}
    if reports_status(job, role):
        own_annotations[ANNOTATION_STATUS_TOKEN] = trainer_status.token(job.metadata.uid, attempt)
    metadata["annotations"] = {**defaults, **((given and given.annotations) or {}), **own_annotations}
    return metadata


def _trainer_container(
    job: DistTrainJob, role: Role, index: int, attempt: int, template: _Object, trainer_image: str
) -> _Object:
    image, command = job.spec.image or trainer_image, list(ENTRYPOINT)
    match job.spec.trainer.work:
        case Command(words) if role is Role.WORKER:
            # The reader of the output puts the code on the module path itself.
            before = _WITH_READER if job.spec.trainer.progress else _WITH_CODE if job.spec.trainer.code else ()
            command = [*before, *words]
        case Command():
            image = trainer_image  # that of a command need not have our trainer in it
    return {
        "image": image,
        **{key: value for key, value in template.items() if key != "restartPolicy"},
        "name": TRAINER_CONTAINER,
        "command": command,
        "env": _environment(job, role, index, attempt, template),
        "ports": ports_of(template.get("ports", []), _ports(job, role)),
        "resources": resources_of_trainer(job, role, template),
        "securityContext": container_security(template.get("securityContext", {})),
        "terminationMessagePath": TERMINATION_LOG,
        # Our trainer writes its termination message itself; for any other program the end of the log says most.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(job, role, template),
    }


def _environment(job: DistTrainJob, role: Role, index: int, attempt: int, template: _Object) -> list[_Object]:
    addresses = cluster_addresses(job)
    variables = training_environment(
        job,
        role,
        index,
        attempt,
        addresses,
        metrics_port=job.spec.observability.metrics_port,
        termination_log=TERMINATION_LOG,
        checkpoint_dir=checkpoint_dir(job.metadata.name, job.metadata.uid) if job.spec.checkpoint else None,
        data_dir=job.spec.data.volume.path if job.spec.data and job.spec.data.volume else None,
        data_key=f"{DATA_KEY_PATH}/{KEY_OF_SECRET}" if _secret_of(job, role) is not None else None,
        data_url_options=DATA_URL_PATH if _url_secret_of(job, role) is not None else None,
        copies_dir=COPIES_PATH if _keeps_copies(job, role) else None,
        code_dir="/".join(filter(None, (CODE_PATH, job.spec.trainer.code.path))) if job.spec.trainer.code else None,
        tls_dir=TLS_PATH if job.spec.network.tls is Tls.MUTUAL else None,
    )
    if len(variables[JOB].encode()) > MAX_BYTES and (problem := too_large(job)) is not None:
        raise ValueError(str(problem))
    # The root filesystem is read-only and the user may have no entry in /etc/passwd: caches need a home, getpass a name.
    defaults = {"HOME": "/tmp", "USER": "disttrain"} | default_environment(
        job,
        role,
        index,
        addresses,
        master_metrics=f"{pod_host(job.metadata.name, Role.MASTER, 0)}:{job.spec.observability.metrics_port}",
        status_token=f"{STATUS_PATH}/{trainer_status.TOKEN_FILE}",
    )
    # The kubelet expands $(NAME) and makes $ of $$; the configuration arrives as it is.
    exact = {name: value.replace("$", "$$") for name, value in variables.items()}
    given = [variable for variable in template.get("env", []) if variable["name"] not in exact]
    replaced = {variable["name"] for variable in given}
    # The template's variables come last and in their order: each may refer to those above it, and to ours.
    return [
        *_as_env(exact),
        *_pod_uid(job, role),
        *_copies_limit(job, role),
        *_as_env({name: value for name, value in defaults.items() if name not in replaced}),
        *merge_by("name", given),
    ]


def _pod_uid(job: DistTrainJob, role: Role) -> list[_Object]:
    """For the launcher of a worker or server of our own loop, which restarts its process in place: of which pod it is."""
    if not isinstance(job.spec.trainer.work, Loop) or role is Role.MASTER:
        return []
    return [{"name": POD_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}]


def _copies_limit(job: DistTrainJob, role: Role) -> list[_Object]:
    """The room for copies: limits.ephemeral-storage of the container, which is what the node has where the template sets none."""
    if not _keeps_copies(job, role):
        return []
    return [{"name": COPIES_LIMIT, "valueFrom": {"resourceFieldRef": {"resource": "limits.ephemeral-storage"}}}]


def _as_env(variables: dict[str, str]) -> list[_Object]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _ports(job: DistTrainJob, role: Role) -> list[_Object]:
    ports = {"metrics": job.spec.observability.metrics_port}
    if role is Role.MASTER:
        ports |= {"control": CONTROL_PORT}
    if role is Role.PARAMETER_SERVER or _keeps_copies(job, role):
        ports |= {"server": SERVER_PORT}
    if role is store_host(job):
        ports |= {"rendezvous": RENDEZVOUS_PORT}
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()]


def _volumes(job: DistTrainJob, role: Role, index: int, template: _Object) -> list[_Object]:
    own: list[_Object] = [{"name": _TMP, "emptyDir": {}}, {"name": _SHM, "emptyDir": {"medium": "Memory"}}]
    if job.spec.checkpoint is not None:
        own.append(_claim(_CHECKPOINTS, job.spec.checkpoint.volume.persistent_volume_claim))
    if job.spec.data is not None and job.spec.data.volume is not None:
        own.append(_claim(_DATA, job.spec.data.volume.persistent_volume_claim))
    if (code := _code_of(job, role)) is not None:
        if code.persistent_volume_claim is not None:
            own.append(_claim(_CODE, code.persistent_volume_claim))
        else:
            own.append({"name": _CODE, "configMap": {"name": code.config_map}})
    if (secret := _secret_of(job, role)) is not None:
        item = {"key": KEY_OF_SECRET, "path": KEY_OF_SECRET}
        own.append({"name": _DATA_KEY, "secret": {"secretName": secret, "items": [item], "defaultMode": _SECRET_MODE}})
    if (secret := _url_secret_of(job, role)) is not None:
        own.append({"name": _DATA_URL, "secret": {"secretName": secret, "defaultMode": _SECRET_MODE}})
    if reports_status(job, role):
        field = {"fieldPath": f"metadata.annotations['{ANNOTATION_STATUS_TOKEN}']"}
        projected: _Object = {"path": trainer_status.TOKEN_FILE, "fieldRef": field}
        own.append({"name": _STATUS, "downwardAPI": {"items": [projected], "defaultMode": _SECRET_MODE}})
    if _keeps_copies(job, role):
        own.append({"name": _COPIES, "emptyDir": {}})
    if job.spec.network.tls is Tls.MUTUAL:
        # Of the join tokens each pod has its own; the master has the key to them.
        join = JOIN_KEY if role is Role.MASTER else join_file(role, index)
        items = [{"key": name, "path": name} for name in (CA, CERTIFICATE, KEY, join)]
        secret_of_attempt = {"secretName": name_of_secret(job), "items": items, "defaultMode": _SECRET_MODE}
        own.append({"name": _TLS, "secret": secret_of_attempt})
    return merge_by("name", template.get("volumes", []), own)


def _keeps_copies(job: DistTrainJob, role: Role) -> bool:
    return role is Role.WORKER and keeping_workers(job) > 0


def _secret_of(job: DistTrainJob, role: Role) -> str | None:
    """The Secret with the key of the data: only workers read samples."""
    encryption = job.spec.data.encryption if job.spec.data is not None else None
    return encryption.secret_name if encryption is not None and role is Role.WORKER else None


def _url_secret_of(job: DistTrainJob, role: Role) -> str | None:
    """The Secret with what the URL of the data asks for."""
    return job.spec.data.url_secret_name if job.spec.data is not None and role is Role.WORKER else None


def _code_of(job: DistTrainJob, role: Role) -> Code | None:
    """The code of a pod: master and servers run none of the user's."""
    return job.spec.trainer.code if role is Role.WORKER else None


def _tolerations(template: list[_Object]) -> list[_Object]:
    """The template's, and ours for a node that is lost, unless the template says itself for how long such a node is tolerated."""

    def tolerated(taint: str) -> bool:
        return any(
            one.get("effect", "") in ("", "NoExecute")
            and (one.get("key") == taint or (not one.get("key") and one.get("operator") == "Exists"))
            for one in template
        )

    own = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST_NODE_SECONDS}
        for key in _LOST_NODE
        if not tolerated(key)
    ]
    return [*template, *own]


def _claim(name: str, claim: str) -> _Object:
    return {"name": name, "persistentVolumeClaim": {"claimName": claim}}


def _mounts(job: DistTrainJob, role: Role, template: _Object) -> list[_Object]:
    """Scratch space that a template may replace by a mount of its own there, the template's mounts, and ours that it may not."""
    scratch = [{"name": _TMP, "mountPath": "/tmp"}, {"name": _SHM, "mountPath": "/dev/shm"}]
    own: list[_Object] = []
    if job.spec.checkpoint is not None:
        own.append({"name": _CHECKPOINTS, "mountPath": CHECKPOINT_PATH})
    if job.spec.data is not None and job.spec.data.volume is not None:
        own.append({"name": _DATA, "mountPath": job.spec.data.volume.path, "readOnly": True})
    if _secret_of(job, role) is not None:
        own.append({"name": _DATA_KEY, "mountPath": DATA_KEY_PATH, "readOnly": True})
    if _url_secret_of(job, role) is not None:
        own.append({"name": _DATA_URL, "mountPath": DATA_URL_PATH, "readOnly": True})
    if reports_status(job, role):
        own.append({"name": _STATUS, "mountPath": STATUS_PATH, "readOnly": True})
    if _keeps_copies(job, role):
        own.append({"name": _COPIES, "mountPath": COPIES_PATH})
    if _code_of(job, role) is not None:
        own.append({"name": _CODE, "mountPath": CODE_PATH, "readOnly": True})
    if job.spec.network.tls is Tls.MUTUAL:
        own.append({"name": _TLS, "mountPath": TLS_PATH, "readOnly": True})
    return merge_by("mountPath", scratch, template.get("volumeMounts", []), own)
