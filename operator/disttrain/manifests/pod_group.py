"""The PodGroup of a job, and what its pods have by which the scheduler knows that they are of it. Not here: when it is made (plan/gang.py).

It says nothing of an attempt: pods that replace others are of the same group.
"""

from typing import Any, Final

from disttrain.api.gangs import fewest_pods
from disttrain.api.job import DistTrainJob
from disttrain.api.names import ChildKind, Role
from disttrain.manifests.owner import child_metadata
from disttrain.manifests.resources import requests_of

_LABEL_COSCHEDULING: Final = "scheduling.x-k8s.io/pod-group"
_ANNOTATION_VOLCANO: Final = "scheduling.k8s.io/group-name"
_ANNOTATION_VOLCANO_TASK: Final = "volcano.sh/task-spec"
"""The key in minTaskMember of the PodGroup under which the pod counts."""


def build_coscheduling_group(job: DistTrainJob) -> dict[str, Any]:
    """The PodGroup of scheduler-plugins."""
    timeout = {"scheduleTimeoutSeconds": job.spec.scheduling.timeout_seconds}
    return _build(job, "scheduling.x-k8s.io/v1alpha1", timeout)


def build_volcano_group(job: DistTrainJob) -> dict[str, Any]:
    """The PodGroup of Volcano. Its queue is the namespace's or the default one, which Volcano fills in."""
    by_role = {role.value: count for role, count in fewest_pods(job.spec).items()}
    priority_class = job.spec.scheduling.priority_class_name
    more = {"priorityClassName": priority_class} if priority_class else {}
    return _build(job, "scheduling.volcano.sh/v1beta1", {"minTaskMember": by_role, **more})


def labels_of_member(job: DistTrainJob, kind: ChildKind | None) -> dict[str, str]:
    """The labels of a pod of the group."""
    return {_LABEL_COSCHEDULING: job.metadata.name} if kind is ChildKind.COSCHEDULING_GROUP else {}


def annotations_of_member(job: DistTrainJob, role: Role, kind: ChildKind | None) -> dict[str, str]:
    """The annotations of a pod of the group."""
    volcano = {_ANNOTATION_VOLCANO: job.metadata.name, _ANNOTATION_VOLCANO_TASK: role.value}
    return volcano if kind is ChildKind.VOLCANO_GROUP else {}


def _build(job: DistTrainJob, api_version: str, more: dict[str, Any]) -> dict[str, Any]:
    counts = fewest_pods(job.spec)
    return {
        "apiVersion": api_version,
        "kind": "PodGroup",
        "metadata": child_metadata(job, job.metadata.name),
        "spec": {"minMember": sum(counts.values()), "minResources": requests_of(job, counts), **more},
    }
