"""The pod template of a role: a small typed core, and every other field of a pod as it is.

Typed is what the operator merges or must refuse: container names, images, environment, resources. The rest is kept and judged by the API
server itself when the operator makes the pod, so that the CRD stays small (TrainJob's is 450 KB, too large for `kubectl apply`).
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from disttrain.api.base import Model, Rule
from disttrain.api.environment import PREFIX, RESERVED
from disttrain.api.names import GPU, TRAINER_CONTAINER
from disttrain.api.types import DnsLabel, FreeForm, Quantity, StringMap, list_map, quantity_value

EnvName = Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", max_length=253)]
_RESERVED_CEL = "[" + ", ".join(f"'{name}'" for name in sorted(RESERVED) if not name.startswith(PREFIX)) + "]"

_WHAT_RUNS = "what the trainer container runs is said by spec.trainer: a program of your own is trainer.command"


class OpenModel(Model):
    """A Kubernetes object of which we type a part; unknown fields are kept."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )


class EnvVar(OpenModel):
    """One environment variable of a container."""

    RULES = (
        Rule(
            cel=f"!(self.name in {_RESERVED_CEL}) && !self.name.startsWith('{PREFIX}')",
            check=lambda env: env.name not in RESERVED and not env.name.startswith(PREFIX),
            message="this variable is set by DistTrain for every training container; choose another name",
            field="name",
        ),
    )
    name: EnvName
    """Name of the variable; those of the torchrun contract and DISTTRAIN_* are set by the operator."""
    value: Annotated[str, StringConstraints(max_length=32768)] | None = None
    """Value, as it is. For a secret use valueFrom.secretKeyRef."""
    value_from: FreeForm | None = None
    """Source of the value, as in a Pod: secretKeyRef, configMapKeyRef, fieldRef, resourceFieldRef."""


class Resources(OpenModel):
    """Requests and limits of a container."""

    RULES = (
        Rule(
            cel="!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits) || "
            "quantity(string(self.requests[name])).compareTo(quantity(string(self.limits[name]))) <= 0)",
            check=lambda r: all(
                name not in (r.limits or {}) or quantity_value(amount) <= quantity_value(r.limits[name])
                for name, amount in (r.requests or {}).items()
            ),
            message="a request must be at most the limit of the same resource",
            field="requests",
        ),
    )
    requests: Annotated[dict[str, Quantity], Field(max_length=32)] | None = None
    """What the scheduler reserves, by resource name, such as cpu: 500m or memory: 4Gi."""
    limits: Annotated[dict[str, Quantity], Field(max_length=32)] | None = None
    """What the container may use at most, by resource name."""


class Container(OpenModel):
    """A container; the one named `trainer` is merged into the training container, every other one is a sidecar."""

    RULES = (
        Rule(
            cel="self.name != 'trainer' || !has(self.resources) || "
            "!(has(self.resources.requests) && 'nvidia.com/gpu' in self.resources.requests) && "
            "!(has(self.resources.limits) && 'nvidia.com/gpu' in self.resources.limits)",
            check=lambda c: (
                c.name != TRAINER_CONTAINER
                or c.resources is None
                or GPU not in {**(c.resources.requests or {}), **(c.resources.limits or {})}
            ),
            message="nvidia.com/gpu of the trainer container is set by worker.gpusPerWorker, one process for each; set it there",
            field="resources",
        ),
        Rule(
            cel="self.name != 'trainer' || !has(self.command)",
            check=lambda c: c.name != TRAINER_CONTAINER or c.command is None,
            message=_WHAT_RUNS,
            field="command",
        ),
        Rule(
            cel="self.name != 'trainer' || !has(self.args)",
            check=lambda c: c.name != TRAINER_CONTAINER or c.args is None,
            message=_WHAT_RUNS,
            field="args",
        ),
    )
    name: DnsLabel
    """Name of the container: `trainer`, or that of a sidecar."""
    image: Annotated[str, StringConstraints(pattern=r"^[^\s]+$", max_length=1024)] | None = None
    """Image of the container. Default for `trainer`: spec.image."""
    command: tuple[str, ...] | None = None
    """Entry point of a sidecar; not of `trainer`, which runs what spec.trainer says."""
    args: tuple[str, ...] | None = None
    """Arguments of a sidecar; not of `trainer`."""
    env: Annotated[tuple[EnvVar, ...], *list_map("name", max_items=256)] | None = None
    """Environment variables, merged with those of the operator."""
    resources: Resources | None = None
    """Requests and limits."""


class PodSpec(OpenModel):
    """The pod's spec: containers, nodeSelector, tolerations, affinity, volumes, serviceAccountName and so on."""

    containers: Annotated[tuple[Container, ...], *list_map("name", max_items=16)] | None = None
    """The `trainer` container's own settings, and sidecars."""
    node_selector: StringMap | None = None
    """Labels that a node must have."""
    restart_policy: Literal["Never"] | None = None
    """Never: DistTrain replaces a failed pod itself, by failurePolicy."""


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
    labels: StringMap | None = None
    """Labels added to the pods."""
    annotations: StringMap | None = None
    """Annotations added to the pods."""


class PodTemplate(Model):
    """A pod template, merged over what the operator makes for the role."""

    metadata: TemplateMetadata | None = None
    """Labels and annotations of the pods."""
    spec: PodSpec | None = None
    """Spec of the pods: resources, nodeSelector, tolerations, volumes, env, sidecars."""

    def pod_spec(self) -> dict[str, Any]:
        """The template's pod spec as a plain object, {} when there is none."""
        return self.spec.to_dict() if self.spec else {}
