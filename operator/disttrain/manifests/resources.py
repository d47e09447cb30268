"""What the pods of a job ask of a node: the resources of the trainer container, and the requests of whole pods, summed up."""

from collections import Counter
from decimal import ROUND_CEILING, Decimal
from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import GPU, Role
from disttrain.api.types import quantity_value
from disttrain.manifests.template import split_containers

_Object = dict[str, Any]


def resources_of_trainer(job: DistTrainJob, role: Role, template: _Object) -> _Object:
    """Requests and limits of the trainer container. template: that of the container."""
    resources: _Object = dict(template.get("resources", {}))
    if role is Role.WORKER and (gpus := job.spec.worker.gpus_per_worker):
        # An extended resource is never overcommitted: request and limit are one number.
        for kind in ("requests", "limits"):
            resources[kind] = {**resources.get(kind, {}), GPU: str(gpus)}
    return resources


def requests_of(job: DistTrainJob, counts: dict[Role, int]) -> dict[str, str]:
    """What so many pods of each role request together, as quantities by resource name."""
    total: Counter[str] = Counter()
    for role, count in counts.items():
        for name, amount in _requests_of_pod(job, role).items():
            total[name] += amount * count  # type: ignore[assignment]
    return {name: _quantity(Decimal(amount)) for name, amount in sorted(total.items())}


def _requests_of_pod(job: DistTrainJob, role: Role) -> dict[str, Decimal]:
    """As the scheduler counts them (KEP-753): init containers run one after the other, sidecars beside all that follow."""
    template = job.spec.template_of(role).pod_spec()
    trainer, sidecars = split_containers(template)
    beside: dict[str, Decimal] = {}
    most: dict[str, Decimal] = {}
    for container in (*template.get("initContainers", []), *sidecars):
        requested = _sum(beside, _requests(container.get("resources", {})))
        most = _largest(most, requested)
        if container.get("restartPolicy") == "Always":
            beside = requested
    return _largest(most, _sum(beside, _requests(resources_of_trainer(job, role, trainer))))


def _requests(resources: _Object) -> dict[str, Decimal]:
    """Of a container: a limit without a request is one."""
    given = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: quantity_value(amount) for name, amount in given.items()}


def _sum(one: dict[str, Decimal], other: dict[str, Decimal]) -> dict[str, Decimal]:
    return {name: one.get(name, Decimal()) + other.get(name, Decimal()) for name in one | other}


def _largest(one: dict[str, Decimal], other: dict[str, Decimal]) -> dict[str, Decimal]:
    return {name: max(one.get(name, Decimal()), other.get(name, Decimal())) for name in one | other}


def _quantity(amount: Decimal) -> str:
    """In whole units, or in thousandths of one, rounded up."""
    if amount == amount.to_integral_value():
        return str(int(amount))
    return f"{int((amount * 1000).to_integral_value(ROUND_CEILING))}m"
