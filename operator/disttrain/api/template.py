"""The pod template of a role: a small typed core, and every other field of a pod as it is.

Typed is what the operator merges or must refuse: containers, images, environment, resources, volumes, security. The rest is kept and judged
by the API server itself when the operator makes the pod, so that the CRD stays small (TrainJob's is 450 KB, too large for `kubectl apply`).
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, StringConstraints

from disttrain.api.base import Model, OpenModel, Rule
from disttrain.api.names import CHECKPOINT_PATH, GPU, OWN_PATH, OWN_PORTS, TRAINER_CONTAINER
from disttrain.api.pod_parts import EnvVar, Port, Resources, Volume, VolumeMount
from disttrain.api.security import PodSecurityContext, SecurityContext
from disttrain.api.types import INT32_MAX, Image, LabelMap, PartName, StringMap, list_map

_Words = Annotated[tuple[Annotated[str, StringConstraints(max_length=32_768)], ...], Field(max_length=256)]
"""A command line: long enough for a script of the shell as one word."""
_OWN_PATHS = (CHECKPOINT_PATH, OWN_PATH)
_WHAT_RUNS = "what the trainer container runs is said by spec.trainer: a program of your own is trainer.command"


def _of_trainer(cel: str, check: Callable[["Container"], bool], message: str, field: str, shows: str = "") -> Rule:
    """What must hold for the trainer container, and for no other."""
    return Rule(
        cel=f"self.name != '{TRAINER_CONTAINER}' || {cel}",
        check=lambda container: container.name != TRAINER_CONTAINER or check(container),
        message=message,
        field=field,
        shows=shows,
    )


class Container(OpenModel):
    """A container; the one named `trainer` is merged into the training container, every other one is a sidecar."""

    RULES = (
        Rule(
            cel=f"self.name == '{TRAINER_CONTAINER}' || has(self.image)",
            check=lambda c: c.name == TRAINER_CONTAINER or c.image is not None,
            message="the container that trains is named trainer; any other one is a sidecar and needs an image",
            field="name",
            shows="name",
        ),
        _of_trainer(
            f"!has(self.resources) || !(has(self.resources.requests) && '{GPU}' in self.resources.requests) && "
            f"!(has(self.resources.limits) && '{GPU}' in self.resources.limits)",
            lambda c: c.resources is None or GPU not in {**(c.resources.requests or {}), **(c.resources.limits or {})},
            "nvidia.com/gpu of the trainer container is set by worker.gpusPerWorker, one process for each; set it there",
            "resources",
        ),
        _of_trainer("!has(self.command)", lambda c: c.command is None, _WHAT_RUNS, "command"),
        _of_trainer("!has(self.args)", lambda c: c.args is None, _WHAT_RUNS, "args"),
        _of_trainer(
            "!has(self.restartPolicy)",
            lambda c: c.restart_policy is None,
            "a failed trainer is replaced by failurePolicy, in a pod of its own; set the actions there",
            "restartPolicy",
            shows="restartPolicy",
        ),
        _of_trainer(
            "!has(self.securityContext) || !has(self.securityContext.readOnlyRootFilesystem) || "
            "self.securityContext.readOnlyRootFilesystem",
            lambda c: c.security_context is None or c.security_context.read_only_root_filesystem is not False,
            "the trainer's root filesystem is read-only; write to /tmp, or mount a volume",
            "securityContext.readOnlyRootFilesystem",
            shows="securityContext.readOnlyRootFilesystem",
        ),
        _of_trainer(
            f"!has(self.ports) || self.ports.all(p, !has(p.name) || !(p.name in {list(OWN_PORTS)}))",
            lambda c: all(port.name not in OWN_PORTS for port in c.ports or ()),
            f"ports {', '.join(OWN_PORTS)} are the training's own; choose another name",
            "ports",
        ),
        _of_trainer(
            "!has(self.volumeMounts) || self.volumeMounts.all(m, "
            + " && ".join(f"m.mountPath != '{path}' && !m.mountPath.startsWith('{path}/')" for path in _OWN_PATHS)
            + ")",
            lambda c: (
                not any(
                    mount.mount_path == path or mount.mount_path.startswith(f"{path}/")
                    for mount in c.volume_mounts or ()
                    for path in _OWN_PATHS
                )
            ),
            f"{' and '.join(_OWN_PATHS)} are where DistTrain mounts checkpoints, code and certificates; choose another path",
            "volumeMounts",
        ),
    )
    name: PartName
    """Name of the container: `trainer`, or that of a sidecar."""
    image: Image | None = None
    """Image of the container. Default for `trainer`: spec.image."""
    command: _Words | None = None
    """Entry point of a sidecar; not of `trainer`, which runs what spec.trainer says."""
    args: _Words | None = None
    """Arguments of a sidecar; not of `trainer`."""
    restart_policy: Literal["Always"] | None = None
    """Always, which every sidecar has; not of `trainer`."""
    env: Annotated[tuple[EnvVar, ...], *list_map("name", max_items=256)] | None = None
    """Environment variables, merged with those of the operator."""
    ports: Annotated[tuple[Port, ...], Field(max_length=64)] | None = None
    """Ports, beside those of the operator."""
    resources: Resources | None = None
    """Requests and limits."""
    volume_mounts: Annotated[tuple[VolumeMount, ...], *list_map("mountPath", max_items=64)] | None = None
    """Volumes in the container, beside those of the operator."""
    security_context: SecurityContext | None = None
    """User, group, and what keeps the container restricted."""


class InitContainer(OpenModel):
    """A container that runs before the training."""

    RULES = (
        Rule(
            cel=f"self.name != '{TRAINER_CONTAINER}'",
            check=lambda c: c.name != TRAINER_CONTAINER,
            message="trainer is the container that trains, it stands under containers; choose another name",
            field="name",
            shows="name",
        ),
    )
    name: PartName
    """Name of the container."""
    image: Image
    """Image of the container."""
    security_context: SecurityContext | None = None
    """User, group, and what keeps the container restricted."""


class PodSpec(OpenModel):
    """The pod's spec: containers, nodeSelector, tolerations, affinity, volumes, serviceAccountName and so on."""

    RULES = (
        Rule(
            cel="!has(self.hostname) && !has(self.subdomain)",
            check=lambda spec: spec.hostname is None and spec.subdomain is None,
            message="hostname and subdomain are set by DistTrain, so that a pod is found as <job>-<role>-<index>.<job>",
        ),
    )
    containers: Annotated[tuple[Container, ...], *list_map("name", max_items=16)] | None = None
    """The `trainer` container's own settings, and sidecars."""
    init_containers: Annotated[tuple[InitContainer, ...], *list_map("name", max_items=16)] | None = None
    """Containers that run before the training."""
    volumes: Annotated[tuple[Volume, ...], *list_map("name", max_items=64)] | None = None
    """Volumes, beside those of the operator."""
    node_selector: LabelMap | None = None
    """Labels that a node must have."""
    security_context: PodSecurityContext | None = None
    """Users, groups, and what keeps the pod restricted."""
    restart_policy: Literal["Never"] | None = None
    """Never: DistTrain replaces a failed pod itself, by failurePolicy."""
    termination_grace_period_seconds: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] | None = None
    """Seconds between SIGTERM and SIGKILL. Default: 30, and 60 with a checkpoint."""
    automount_service_account_token: Literal[False] | None = None
    """false: no pod of a job gets a token."""
    enable_service_links: Literal[False] | None = None
    """false: variables of the namespace's Services could be taken for ours."""
    hostname: Annotated[str, StringConstraints(max_length=63)] | None = None
    """Set by DistTrain: leave it out."""
    subdomain: Annotated[str, StringConstraints(max_length=63)] | None = None
    """Set by DistTrain: leave it out."""


class TemplateMetadata(Model):
    """Labels and annotations of the role's pods."""

    RULES = (
        Rule(
            cel="!has(self.labels) || self.labels.all(k, !k.startsWith('disttrain.dev/'))",
            check=lambda meta: not any(key.startswith("disttrain.dev/") for key in meta.labels or {}),
            message="labels under disttrain.dev/ are set by DistTrain; choose another prefix",
            field="labels",
        ),
    )
    labels: LabelMap | None = None
    """Labels added to the pods."""
    annotations: StringMap | None = None
    """Annotations added to the pods."""


class PodTemplate(Model):
    """A pod template, merged over what the operator makes for the role."""

    metadata: TemplateMetadata | None = None
    """Labels and annotations of the pods."""
    spec: PodSpec | None = None
    """Spec of the pods: resources, nodeSelector, tolerations, volumes, env, sidecars."""

    @property
    def containers(self) -> tuple[Container, ...]:
        """The containers that the template names."""
        return (self.spec and self.spec.containers) or ()

    def pod_spec(self) -> dict[str, Any]:
        """The template's pod spec as a plain object, {} when there is none."""
        return self.spec.to_dict() if self.spec else {}
