"""Pods that are taken away without a fault of the job: how many in a row, and how long the job waits before it makes them again.

A disruption counts towards no limit, so only a pause that grows keeps the operator from creating the same pod thousands of times while
another client deletes it, or a node evicts it. Not here: failures that count (failures/account.py).
"""

from datetime import datetime, timedelta

from disttrain.api.reasons import ConditionType
from disttrain.api.status import Disruptions, DistTrainJobStatus
from disttrain.plan.model import PodView
from disttrain.plan.view import JobView

FIRST_DELAY = timedelta(seconds=1)
LONGEST_DELAY = timedelta(seconds=300)
FORGOTTEN_AFTER = 2 * LONGEST_DELAY
"""Without a disruption for so long, the next one is the first again, also of a program that reports no steps."""
_BY_KUBELET = "TerminationByKubelet"
_EVICTED = "Evicted"
_OWN_USE = ("was using", "exceed", "usage of")
"""What the kubelet says of a pod that used more than it asked for. Of a pod that had to go for others it names the node's need alone."""


def delay(number: int) -> timedelta:
    """The wait after so many failures, from the end of the failed pod: 1 s, 2 s, 4 s … 300 s."""
    return min(LONGEST_DELAY, FIRST_DELAY * (1 << min(max(number, 1) - 1, 16)))


def in_a_row(view: JobView) -> int:
    """Disruptions since the job last made steps with all its pods."""
    stored = view.status.disruptions
    return stored.in_a_row if stored is not None and not _over(view, stored) else 0


def carried_over(view: JobView) -> Disruptions | None:
    """What is kept of them: nothing when the job trains again."""
    return view.status.disruptions if in_a_row(view) else None


def one_more(view: JobView) -> Disruptions:
    """The disruption that is seen now, with those before it."""
    return Disruptions(in_a_row=in_a_row(view) + 1, last=view.second)


def made_again(view: JobView, disruptions: Disruptions) -> Disruptions:
    """A pod is made again now; the next pause counts from here."""
    return disruptions.model_copy(update={"last": view.second})


def paused_until(disruptions: Disruptions | None) -> datetime | None:
    """Until when nothing is made again. The first time it is made at once."""
    if disruptions is None or disruptions.in_a_row <= 1:
        return None
    return disruptions.last + delay(disruptions.in_a_row)


def taken_away(view: JobView) -> bool:
    """Whether pods that the job needs were deleted by others since the status was written: fewer exist than it says, and not because a
    failed pod is being replaced. That the operator deleted such a pod may not be written yet."""
    if view.refusals or view.snapshot.name_conflicts or view.snapshot.former:
        return False  # the status counts a pod as made that was refused
    if all(view.needs_no_pod(slot) or _stands(view.present.get(slot)) for slot in view.wanted):
        return False
    standing = {pod.uid for pod in view.present.values() if _stands(pod)}
    replaced = sum(uid not in standing for uid in view.restarts.accounted)
    return sum(status.existing for status in view.status.replica_statuses) > len(standing) + replaced


def without_creations(status: DistTrainJobStatus, before: DistTrainJobStatus) -> DistTrainJobStatus:
    """The status of a plan that could not be carried out to its end. A pod that may not have been made does not count as one that exists:
    else the next pass would take it for a pod that was taken away. And the pause does not begin again with a pod that was not made."""
    existing = {replicas.role: replicas.existing for replicas in before.replica_statuses}
    replicas = tuple(
        one.model_copy(update={"existing": min(one.existing, existing.get(one.role, 0))})
        for one in status.replica_statuses
    )
    return status.model_copy(update={"replica_statuses": replicas, "disruptions": before.disruptions})


def by_its_own_use(pod: PodView) -> bool:
    """Whether the kubelet evicted a pod for what the pod itself used: memory or ephemeral storage beyond its requests or limits."""
    if pod.disruption != _BY_KUBELET or pod.reason != _EVICTED:
        return False
    message = pod.message.lower()
    return not message or any(words in message for words in _OWN_USE)


def _stands(pod: PodView | None) -> bool:
    return pod is not None and not pod.deleting


def _over(view: JobView, stored: Disruptions) -> bool:
    ready = view.status.condition(ConditionType.READY)
    if ready is None or ready.last_transition_time < stored.last:
        return False
    # In the second in which the pod was lost, readiness was lost, too.
    whole_again = ready.status == "True" or ready.last_transition_time > stored.last
    return whole_again and (view.stepped_since(stored.last) or view.reached(stored.last + FORGOTTEN_AFTER))
