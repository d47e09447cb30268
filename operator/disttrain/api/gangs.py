"""The schedulers that place the pods of a job together or not at all, and how the pods of a job name theirs. No decisions."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from disttrain.api.names import ChildKind, Role
from disttrain.api.policies import Gang
from disttrain.api.spec import DistTrainJobSpec

LABEL_KUEUE_QUEUE: Final = "kueue.x-k8s.io/queue-name"
"""On a job: the queue of Kueue that is to admit it."""


@dataclass(frozen=True, slots=True)
class GangScheduler:
    """One of them."""

    gang: Gang
    kind: ChildKind
    """Its PodGroup, which is a child of the job."""
    name: str
    """schedulerName of the pods, where no template of the job has another one."""
    pod_groups: str
    """The name of the CRD of its PodGroups."""
    admits: bool = False
    """Whether it says by the phase of a PodGroup when its pods may be created."""


GANG_SCHEDULERS: Mapping[Gang, GangScheduler] = MappingProxyType(
    {
        Gang.COSCHEDULING: GangScheduler(
            Gang.COSCHEDULING,
            ChildKind.COSCHEDULING_GROUP,
            "scheduler-plugins-scheduler",
            "podgroups.scheduling.x-k8s.io",
        ),
        Gang.VOLCANO: GangScheduler(
            Gang.VOLCANO, ChildKind.VOLCANO_GROUP, "volcano", "podgroups.scheduling.volcano.sh", admits=True
        ),
    }
)
"""By the value of scheduling.gang that asks for it."""


def named_schedulers(spec: DistTrainJobSpec) -> tuple[str, ...]:
    """The schedulers that the templates name, each once."""
    templates = (spec.template_of(role).spec for role in Role)
    names = ((template.model_extra or {}).get("schedulerName") for template in templates if template is not None)
    return tuple(dict.fromkeys(str(name) for name in names if name))


def may_be_gang(spec: DistTrainJobSpec) -> bool:
    """Whether the pods of a job may be placed together; with Auto it depends on the cluster."""
    if spec.scheduling.gang is not Gang.AUTO:
        return spec.scheduling.gang in GANG_SCHEDULERS
    return any(named_schedulers(spec) == (one.name,) for one in GANG_SCHEDULERS.values())


def scheduler_name(spec: DistTrainJobSpec, kind: ChildKind) -> str:
    """schedulerName of the pods whose own template has none, for a job with a PodGroup of that kind."""
    default = next(one.name for one in GANG_SCHEDULERS.values() if one.kind is kind)
    return next(iter(named_schedulers(spec)), default)


def fewest_pods(spec: DistTrainJobSpec) -> dict[Role, int]:
    """The pods that have to run at the same time: an elastic job goes on with its fewest workers."""
    elastic = spec.worker.elastic
    workers = spec.worker.replicas if elastic is None else elastic.min_replicas
    counts = {Role.MASTER: 1, Role.PARAMETER_SERVER: spec.servers, Role.WORKER: workers}
    return {role: count for role, count in counts.items() if count}
