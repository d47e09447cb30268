"""scheduling.topologyKey: all workers on nodes with the same value of a label, such as one zone, one rack, one switch."""

from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import LABEL_JOB_NAME, LABEL_ROLE, Role

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def with_one_value(job: DistTrainJob, key: str, affinity: dict[str, Any]) -> dict[str, Any]:
    """The affinity of a worker's template, and that to the job's other workers. The scheduler lets the first worker choose: a pod that fits
    its own term is placed when there is no other one."""
    labels = {LABEL_JOB_NAME: job.metadata.name, LABEL_ROLE: Role.WORKER.value}
    own = {"labelSelector": {"matchLabels": labels}, "topologyKey": key}
    among_pods = affinity.get("podAffinity") or {}
    return {**affinity, "podAffinity": {**among_pods, _REQUIRED: [*among_pods.get(_REQUIRED, []), own]}}
