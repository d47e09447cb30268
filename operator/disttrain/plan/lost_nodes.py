"""Pods whose deletion cannot end because their node is gone: no kubelet confirms it. A node that is merely slow is another matter."""

from collections.abc import Iterator
from datetime import timedelta

from disttrain.plan.model import DeletePod, Phase, PodView
from disttrain.plan.view import JobView

FORCED_DELETION_DELAY = timedelta(seconds=60)
"""From the last report of a node that does not report; beyond the grace period where only the pod's end is missing. A node that comes back
after it finds its pod's successor at work; the trainers refuse the older incarnation."""
NODE_LOST = "NodeLost"
BY_TAINT = "DeletionByTaintManager"


def forced(view: JobView) -> tuple[DeletePod, ...]:
    """The deletions that no node will confirm."""
    return tuple(DeletePod(name=pod.name, uid=pod.uid, grace_seconds=0) for pod in _given_up(view))


def _given_up(view: JobView) -> Iterator[PodView]:
    for pod in view.snapshot.pods:
        # The taint manager marks the pods of an unreachable node as disrupted, and says nothing else of it. A program that drains a node
        # or preempts does so too, with other reasons: there the kubelet is alive, and the old process may still be at work.
        gone = pod.phase is Phase.UNKNOWN or pod.reason == NODE_LOST or pod.disruption == BY_TAINT
        moments = []
        if pod.silent_since is not None:
            # No kubelet counts the grace period there, whether the operator or another client deleted the pod.
            moments.append(pod.silent_since + FORCED_DELETION_DELAY)
        if (gone or pod.silent_since is not None) and pod.deletion_deadline is not None:
            moments.append(pod.deletion_deadline + FORCED_DELETION_DELAY)
        if pod.deleting and moments and view.reached(min(moments)):
            yield pod
