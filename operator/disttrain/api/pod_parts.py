"""The parts of a pod template that are merged with the operator's, or that it must be able to refuse: variables, ports, mounts, volumes.

Not here: containers and the pod (template.py), security contexts (security.py).
"""

from typing import Annotated, Literal

from pydantic import Field, StrictInt, StringConstraints

from disttrain.api.base import OpenModel, Rule
from disttrain.api.environment import LOG_FORMAT, PREFIX, PROFILE, RESERVED
from disttrain.api.names import VOLUME_PREFIX
from disttrain.api.types import FreeForm, PartName, Quantity, quantity_value

EnvName = Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", max_length=253)]
_RESERVED_CEL = "[" + ", ".join(f"'{name}'" for name in sorted(RESERVED) if not name.startswith(PREFIX)) + "]"


class EnvVar(OpenModel):
    """One environment variable of a container."""

    RULES = (
        Rule(
            cel=f"!(self.name in {_RESERVED_CEL}) && (!self.name.startsWith('{PREFIX}') || self.name in ['{LOG_FORMAT}', '{PROFILE}'])",
            check=lambda env: (
                env.name in (LOG_FORMAT, PROFILE) or (env.name not in RESERVED and not env.name.startswith(PREFIX))
            ),
            message="this variable is set by DistTrain for every training container; choose another name",
            field="name",
            shows="name",
        ),
        Rule(
            cel="!has(self.valueFrom) || !has(self.value) || self.value == ''",
            check=lambda env: env.value_from is None or not env.value,
            message="set either value or valueFrom",
            field="valueFrom",
            shows="name",
        ),
    )
    name: EnvName
    """Name of the variable; those of the torchrun contract and DISTTRAIN_* but DISTTRAIN_LOG_FORMAT are set by the operator."""
    value: Annotated[str, StringConstraints(max_length=32_000)] | None = None
    """Value; $(NAME) stands for a variable above it, those of the operator among them. For a secret use valueFrom.secretKeyRef."""
    value_from: Annotated[dict[str, FreeForm], Field(max_length=8)] | None = None
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


class Port(OpenModel):
    """A port of a container."""

    RULES = (
        Rule(
            cel="!has(self.hostPort) || self.hostPort == 0",
            check=lambda port: not port.host_port,
            message="a port of the node cannot be taken: every pod has a name of its own, reach it there",
            field="hostPort",
            shows="hostPort",
        ),
    )
    name: Annotated[str, StringConstraints(max_length=15)] | None = None
    """Name of the port; on `trainer` not metrics, rendezvous, control or server."""
    container_port: Annotated[StrictInt, Field(ge=1, le=65535)]
    """Number of the port."""
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None
    """TCP, UDP or SCTP. Default: TCP."""
    host_port: Annotated[StrictInt, Field(ge=0, le=65535)] | None = None
    """Not of the node: leave it out."""


class VolumeMount(OpenModel):
    """A volume in a container."""

    name: PartName
    """Name of the volume: one of the template's, or one of DistTrain's disttrain-*."""
    mount_path: Annotated[str, StringConstraints(pattern=r"^[^:]+$", max_length=1024)]
    """Where it is mounted. At /tmp and /dev/shm it takes the place of DistTrain's own scratch space."""


class ProjectedSource(OpenModel):
    """One source of a projected volume."""

    RULES = (
        Rule(
            cel="!has(self.serviceAccountToken)",
            check=lambda source: source.service_account_token is None,
            message="a training has no business with the API server: its pods get no token",
            field="serviceAccountToken",
        ),
    )
    service_account_token: FreeForm | None = None
    """No pod of a job gets a token: leave it out."""


class Projected(OpenModel):
    """A volume of several sources."""

    sources: Annotated[tuple[ProjectedSource, ...], Field(max_length=32)] | None = None
    """Secrets, ConfigMaps, fields of the pod."""


class Volume(OpenModel):
    """A volume of the pod."""

    RULES = (
        Rule(
            cel=f"!self.name.startsWith('{VOLUME_PREFIX}')",
            check=lambda volume: not volume.name.startswith(VOLUME_PREFIX),
            message=f"volumes {VOLUME_PREFIX}* are made by DistTrain; choose another name",
            field="name",
            shows="name",
        ),
    )
    name: PartName
    """Name of the volume; those that begin with disttrain- are DistTrain's own."""
    projected: Projected | None = None
    """Several sources in one folder."""
