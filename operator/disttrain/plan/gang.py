"""The gang of a job: its PodGroup, and when the pods that have a node are deleted because the others find none.

| the pods | what follows |
|---|---|
| none | the PodGroup is created, then the pods; under Volcano when the PodGroup has left phase Pending |
| fewer have a node than the job needs, for less than scheduling.timeoutSeconds | they wait |
| the same for longer, at the start or after a loss | the next attempt: every pod is deleted, and counts nowhere |
| none, after that | the PodGroup is deleted, too: a scheduler may hold room for it. After a pause all begins again |

A PodGroup has no part of an attempt, so that a pod that replaces another one is of the same group. Not here: its manifest.
"""

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

from disttrain.api.gangs import (
    LABEL_KUEUE_QUEUE,
    fewest_pods,
    scheduler_name,
)
from disttrain.api.names import POD_GROUPS, ChildKind
from disttrain.api.policies import Gang
from disttrain.api.reasons import ConditionType, Reason
from disttrain.plan import disruptions
from disttrain.plan.failures import steps
from disttrain.plan.model import Delete, Event
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import JobView, Slot

PAUSE = timedelta(seconds=120)
"""From the moment at which a gang gives its nodes back to its next try. Its pods take a minute of it to end, with their checkpoint; in the
rest the pods of others take the nodes."""
_PENDING = ("", "Pending")
_OF_A_NODE = "nodes are available"
"""In what the scheduler says of a pod that fits no node. Of the other pods of a gang it says only that one of them does not fit."""


def problem(view: JobView) -> tuple[Reason, str] | None:
    """Why the job cannot have its gang, with the reason; None where it can, or needs none."""
    if view.snapshot.local:
        return None
    if _queued(view):
        remedy = f"take the label {LABEL_KUEUE_QUEUE} off, or set scheduling.gang to None"
        return Reason.NOT_YET_SUPPORTED, f"Not supported by this version: queues of Kueue; {remedy}"
    chosen = view.gang_scheduler
    if chosen is None or chosen.kind not in view.snapshot.unavailable:
        return None
    missing = f"The cluster has no {chosen.pod_groups} for scheduling.gang {chosen.gang}, or the operator has no right to them"
    remedy = "install the scheduler and deploy/components/gang-scheduling, or set scheduling.gang to None"
    return Reason.GANG_SCHEDULER_NOT_FOUND, f"{missing}; {remedy}"


def _queued(view: JobView) -> bool:
    """Whether the job waits for a queue of Kueue. One that an earlier version has started runs without it until it is suspended."""
    if view.spec.scheduling.gang is not Gang.AUTO or LABEL_KUEUE_QUEUE not in (view.job.metadata.labels or {}):
        return False
    valid = view.status.condition(ConditionType.VALID)
    refused = valid is not None and valid.reason == Reason.NOT_YET_SUPPORTED
    return refused or view.spec.suspend or not view.started


def needs(view: JobView, kind: ChildKind) -> bool:
    """Whether the job needs its PodGroup of that kind now."""
    chosen = view.gang_scheduler
    return chosen is not None and chosen.kind is kind and (bool(view.snapshot.pods) or not is_backing_off(view))


def group_deletions(view: JobView) -> tuple[Delete, ...]:
    """The deletion of the PodGroup of a job that has no pods to be placed. The next one has the numbers of then."""
    return tuple(Delete(kind=kind) for kind in sorted(POD_GROUPS & view.snapshot.children))


def admitted(view: JobView) -> bool:
    """Whether the pods may be created: those of a PodGroup in phase Pending would only burden the scheduler, which may refuse them. A pod
    that replaces another one does not wait."""
    chosen = view.gang_scheduler
    return chosen is None or not chosen.admits or bool(view.present) or view.snapshot.pod_group_phase not in _PENDING


def not_admitted(view: JobView) -> str:
    """Why the pods are not created."""
    if view.snapshot.pod_group_phase:
        return f"PodGroup {view.job.metadata.name} is in phase {view.snapshot.pod_group_phase}: its queue has no room for it yet"
    return f"PodGroup {view.job.metadata.name} has no phase yet; if it stays so, see whether its scheduler runs"


def incomplete(view: JobView) -> bool:
    """Whether fewer pods of a gang have a node than it needs."""
    return view.gang_scheduler is not None and _placed(view) < _fewest(view)


def sentence(view: JobView) -> str:
    """How many pods of the gang have a node, and what keeps the first of the others from one."""
    return f"{_placed(view)} of {_fewest(view)} placed; {_obstacle(view)}"


def timed_out(view: JobView) -> Step | None:
    """The policy: all nodes are released where a part of the gang found none in time."""
    moment = _waits_until(view)
    if moment is None or not view.reached(moment):
        return None
    seconds = view.spec.scheduling.timeout_seconds
    text = f"{sentence(view)}. Not all had a node within {seconds} s (scheduling.timeoutSeconds)"
    message = f"{text}: every pod is deleted, so that other jobs can have the nodes, and created again later"
    step = steps.restart_uncounted(view, Reason.GANG_TIMED_OUT, message)
    scheduled = Claim(type=ConditionType.SCHEDULED, status="False", reason=Reason.GANG_TIMED_OUT, message=message)
    # A job that has not made a step is not restarted: it is still on its way to its start.
    without = {ConditionType.SCHEDULED} | (set() if view.trained else {ConditionType.RESTARTING})
    claims = (scheduled, *(claim for claim in step.claims if claim.type not in without))
    events = (Event(reason=Reason.GANG_TIMED_OUT, message=message, warning=True),)
    return replace(step, claims=claims, events=events)


def is_backing_off(view: JobView) -> bool:
    """Whether the job has a gang that released its nodes, and creates no pods yet."""
    scheduled, lost = view.status.condition(ConditionType.SCHEDULED), view.status.disruptions
    if view.gang_scheduler is None or view.present or lost is None:
        return False
    if scheduled is None or scheduled.reason != Reason.GANG_TIMED_OUT:
        return False
    return not view.reached(lost.last + max(PAUSE, disruptions.delay(lost.in_a_row)))


def _waits_until(view: JobView) -> datetime | None:
    """Until when the pods that have a node wait for the others: counted from the creation of the newest pod without a node, or from the
    loss of one that cannot be replaced. None: they wait for no pod, there is none, or one is still to be created: the scheduler was not
    asked for a node yet."""
    scheduled, started = view.status.condition(ConditionType.SCHEDULED), view.status.start_time
    if scheduled is None or scheduled.status == "True" or started is None or not view.present or not incomplete(view):
        return None
    waiting = [view.present.get(slot) for slot in _waiting(view)]
    if None in waiting and not (view.refusals or view.snapshot.name_conflicts or view.snapshot.former):
        return None
    asked = [pod.created for pod in waiting if pod is not None]
    first = min(pod.created for pod in view.present.values())
    since = max(scheduled.last_transition_time, started, first, *asked)
    return since + timedelta(seconds=view.spec.scheduling.timeout_seconds)


def _fewest(view: JobView) -> int:
    return sum(fewest_pods(view.spec).values())


def _placed(view: JobView) -> int:
    """Of each role no more than the gang needs: a worker beyond its fewest stands in for no master."""
    placed = Counter(role for role, _ in set(view.wanted) - set(_waiting(view)))
    return sum(min(placed[role], count) for role, count in fewest_pods(view.spec).items())


def _waiting(view: JobView) -> list[Slot]:
    """The places whose pod has no node."""
    return [slot for slot in view.wanted if not view.needs_no_pod(slot) and not view.has_node(slot)]


def _obstacle(view: JobView) -> str:
    waiting = _waiting(view)
    pods = [pod for slot in waiting if (pod := view.present.get(slot)) is not None]
    said = [pod for pod in pods if pod.reason == Reason.UNSCHEDULABLE]
    if said:
        first = next((pod for pod in said if _OF_A_NODE in pod.message), said[0])
        return f"{first.name}: {first.message or first.reason}"
    if view.refusals:
        return f"{view.refusals[0].name}: {view.refusals[0].message}"
    chosen = view.gang_scheduler
    if not pods or chosen is None:
        return f"{view.name(waiting[0])} is to be created" if waiting else "none is missing"
    name = scheduler_name(view.spec, chosen.kind)
    return f"{pods[0].name}: scheduler {name} has said nothing of it; see whether it runs"
