"""How many workers an elastic job uses now, and whether it is on the way from one number to another.

`spec.worker.replicas` is the wish: the scale subresource of a cluster changes it, and `disttrain scale` in a local run. Where some of these
workers find no node for scheduling.timeoutSeconds, the job goes on with those that have one, and tries from time to time whether there is
room for one more. What was decided is written down first (status.worker.room); the pods follow in the next pass.
"""

from datetime import datetime, timedelta

from disttrain.api.names import Role
from disttrain.api.reasons import ConditionType, JobState, Reason
from disttrain.api.status import Room
from disttrain.plan import children
from disttrain.plan.model import Event
from disttrain.plan.step import Step
from disttrain.plan.view import JobView

ROOM = "room"
"""The key of a Step's status under which it says what becomes of status.worker.room."""
PROBE_TIMEOUT = timedelta(seconds=30)
"""How long a probe may look for a node."""
FIRST_PAUSE = timedelta(seconds=60)
"""From the decision to use fewer workers to the first probe. Each probe that finds no node doubles it."""
LONGEST_PAUSE = timedelta(seconds=1800)
_NO_ROOM = frozenset({Reason.UNSCHEDULABLE, Reason.POD_REFUSED})
"""Reasons of Scheduled: the scheduler finds no node, or a quota refuses the pod."""


def target(view: JobView) -> int | None:
    """The number of workers that an elastic job uses; None for a job with a fixed number."""
    return None if view.spec.worker.elastic is None else view.workers


def room(view: JobView) -> Room | None:
    """What is written down of the room for workers."""
    return view.status.worker.room if view.status.worker is not None else None


def resize(view: JobView) -> Step | None:
    """The policy: fewer workers where the others find no node, and one more when there may be room again."""
    if view.spec.worker.elastic is None or not view.started:
        return None
    known = room(view)
    if known is None:
        return _shrink(view)
    if known.probing:
        return _judge(view, known)
    if known.workers >= view.wish:
        return Step(status={ROOM: None}, again=True)  # the job asks for no more than there is room for
    return _shrink(view) or _probe(view, known)


def resizing(view: JobView) -> bool:
    """Whether an elastic job that trains gets other workers: from the change of the target until the trainer has exactly these. A probe
    is not yet a worker."""
    wanted, before, known = target(view), view.status.worker, room(view)
    if wanted is None or before is None or before.target_replicas is None or not view.trained:
        return False
    if _only_a_probe(known, wanted):
        return False
    if before.target_replicas != wanted:
        return True
    return view.status.state is JobState.RESIZING and not _settled(view, wanted)


def sentence(view: JobView) -> str | None:
    """Such as "Resizing from 2 to 4 workers", in the pass in which the target changes; None in any other, and of a probe."""
    wanted, before, known = target(view), view.status.worker, room(view)
    if wanted is None or before is None or before.target_replicas in (None, wanted):
        return None
    if _only_a_probe(known, wanted):
        return None
    if known is None or known.workers != wanted:
        return f"Resizing from {before.target_replicas} to {wanted} workers"
    scheduled = view.status.condition(ConditionType.SCHEDULED)
    why = f": {scheduled.message}" if scheduled is not None and scheduled.status == "False" else ""
    return f"Resizing from {before.target_replicas} to {wanted} workers, as the others find no node{why}"


def is_new(view: JobView, role: Role, index: int) -> bool:
    """Whether a worker was not among those of the status that was last written: its pod is no lost one."""
    before = view.status.worker
    if role is not Role.WORKER or before is None or before.target_replicas is None:
        return False
    return index >= before.target_replicas


def _only_a_probe(known: Room | None, wanted: int) -> bool:
    """Whether a probe, that begins or found no node, is all that makes the number another one."""
    if known is None:
        return False
    return wanted == known.workers and (known.probing or known.failed_probes > 0)


def _shrink(view: JobView) -> Step | None:
    """The job goes on with the workers that have a node, when the others have waited long enough."""
    moment, placed = _patience_ends(view), _with_room(view)
    if moment is None or placed is None or not view.reached(moment):
        return None
    return Step(status={ROOM: Room(workers=placed, since=view.second)}, again=True)


def _probe(view: JobView, known: Room) -> Step | None:
    if not all(view.has_node(slot) or view.needs_no_pod(slot) for slot in view.wanted):
        return None  # where one that the job uses finds no node, one more would find none, either
    if not view.reached(known.since + _pause(known)):
        return None
    more = known.model_copy(update={"workers": known.workers + 1, "since": view.second, "probing": True})
    return Step(status={ROOM: more}, again=True)


def _judge(view: JobView, known: Room) -> Step | None:
    """What a probe has shown, when it has shown something."""
    if known.workers > view.wish:
        return Step(status={ROOM: None}, again=True)
    if view.has_node((Role.WORKER, known.workers - 1)):
        more = Room(workers=known.workers + 1, since=view.second, probing=True) if known.workers < view.wish else None
        message = f"Resizing from {known.workers - 1} to {known.workers} workers: there is a node again"
        return Step(status={ROOM: more}, events=(Event(reason=Reason.RESIZING, message=message),), again=True)
    if not view.reached(known.since + PROBE_TIMEOUT):
        return None
    fewer = Room(workers=known.workers - 1, since=view.second, failed_probes=known.failed_probes + 1)
    return Step(status={ROOM: fewer}, again=True)


def _patience_ends(view: JobView) -> datetime | None:
    """Until when the job waits for all its workers to find a node; None while none is missing for want of one."""
    scheduled = view.status.condition(ConditionType.SCHEDULED)
    if scheduled is None or scheduled.status != "False" or scheduled.reason not in _NO_ROOM:
        return None
    # The scheduler places workers in any order: the last one may have the node that another one waits for, and holds it until it is gone.
    if any(pod.role is Role.WORKER for pod in view.outdated):
        return None
    # A job that is resumed waits from then on: it was not scheduled while it was suspended, either. So does one that became smaller: its
    # workers may have the nodes of those that left.
    since, known = [scheduled.last_transition_time], room(view)
    if view.status.start_time is not None:
        since.append(view.status.start_time)
    if known is not None:
        since.append(known.since)
    return max(since) + timedelta(seconds=view.spec.scheduling.timeout_seconds)


def _with_room(view: JobView) -> int | None:
    """How many workers have a node, where the job can go on with them: all others want one and find none, and nothing else is missing."""
    refused = children.retryable_refusal(view) is not None
    placed = 0
    for slot in view.wanted:
        pod = view.present.get(slot)
        if view.needs_no_pod(slot) or view.has_node(slot):
            placed += slot[0] is Role.WORKER
        elif slot[0] is not Role.WORKER or not (refused if pod is None else pod.reason == Reason.UNSCHEDULABLE):
            return None
    elastic = view.spec.worker.elastic
    return placed if elastic is not None and elastic.min_replicas <= placed < view.workers else None


def _pause(known: Room) -> timedelta:
    return min(LONGEST_PAUSE, FIRST_PAUSE * (1 << min(known.failed_probes, 16)))


def _settled(view: JobView, wanted: int) -> bool:
    leaving = any(pod.role is Role.WORKER and pod.attempt == view.attempt for pod in view.outdated)
    counted = view.progress is None or view.progress.world_size == wanted * view.spec.processes_per_worker
    return view.whole and counted and not leaving
