"""How urgent it is to write a changed status. Each write is a request a job, so what can wait goes along with a later change."""

from dataclasses import replace

from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.status import DistTrainJobStatus, Room
from disttrain.plan import disruptions
from disttrain.plan.model import Plan, Write

_NEEDED_NEXT = frozenset({"attempt", "restarts", "disruptions", "start_time", "completion_time", "certificate"})
"""Fields that the next step depends on: a failed pod is deleted only when its failure is written."""
_BEGINNING = frozenset({"start_time", "attempt"})
"""Those of them that a job begins with. If the operator dies before it writes them, the next one sees the pods, and writes them."""
_AT_FIRST = {
    ConditionType.VALID: "True",
    ConditionType.SUSPENDED: "False",
    ConditionType.COMPLETE: "False",
    ConditionType.FAILED: "False",
}
"""Conditions whose change is written now, and their status in a job that begins without trouble."""
_STAGES = frozenset({ConditionType.SCHEDULED, ConditionType.READY, ConditionType.PROGRESSING})
"""Conditions that become true one after the other in a job that starts."""
_PASSING = frozenset({Reason.SCHEDULING, Reason.STARTING, Reason.WAITING_FOR_PEERS})
"""Reasons of a False stage that pass by themselves. Any other a user has to know: no node, no image, no Secret, no step for long."""
_PROGRESS = frozenset({"training", "goodput", "health"})
"""Fields that change with each step. Of `health` only that a breach begins."""
_SMALL = frozenset({"conditions", "replica_statuses", "worker", "goodput"})
"""Fields whose change is small while every condition keeps its status and reason."""


def urgency(before: DistTrainJobStatus, after: DistTrainJobStatus) -> Write:
    """When the change from the stored status to the planned one is written."""
    if after is before:
        return Write.WITH_NEXT  # most passes: nothing has changed, and nothing is compared
    fields = {name for name in DistTrainJobStatus.model_fields if getattr(before, name) != getattr(after, name)}
    old, new = _conditions(before), _conditions(after)
    changed = {type_ for type_ in old.keys() | new.keys() if old.get(type_) != new.get(type_)}
    trouble = any(
        new[type_][0] == "False" and new[type_][1] not in _PASSING for type_ in changed & _STAGES & new.keys()
    )
    # The next pass may not see any more that a pod is being replaced, or that a worker succeeded.
    seen_once = ConditionType.RESTARTING in changed and new.get(ConditionType.RESTARTING, ("",))[0] == "True"
    if trouble or seen_once or _completed(before) != _completed(after) or _room(before) != _room(after):
        return Write.NOW
    urgent = changed & _AT_FIRST.keys()
    begins = before.start_time is None and after.start_time is not None and fields & _NEEDED_NEXT <= _BEGINNING
    if begins and all(type_ not in old and new[type_][0] == _AT_FIRST[ConditionType(type_)] for type_ in urgent):
        return Write.BEGINNING
    if urgent or fields & _NEEDED_NEXT:
        return Write.NOW
    if fields <= _SMALL and not changed:
        return Write.WITH_NEXT
    return Write.PROGRESS if fields <= _PROGRESS and _breaches_only_begin(before, after) else Write.SOON


def not_carried_out(plan: Plan, before: DistTrainJobStatus) -> Plan:
    """The plan of which a creation failed, so that its status is true. Of a job that has not begun it is written now: deadlines count from
    its start, and the failure may last for hours, in which a user looks at the job."""
    status = disruptions.without_creations(plan.status, before)
    if before.certificate is not None:  # its Secret may not be deleted, and nothing else knows its name
        status = status.model_copy(update={"certificate": before.certificate})
    return replace(plan, status=status, write=urgency(before, status) if before.start_time is not None else Write.NOW)


def _breaches_only_begin(before: DistTrainJobStatus, after: DistTrainJobStatus) -> bool:
    """Whether no rule of spec.health acted, and no stored breach ended. A metric that flaps round its bound is then seldom written; the
    end of a breach that is written does not wait, since the next breach would be taken for the same one."""

    def acted(status: DistTrainJobStatus) -> set[tuple[str, bool, int]]:
        return {(entry.name, entry.done, entry.roll_backs) for entry in status.health if entry.done or entry.roll_backs}

    return acted(before) == acted(after) and all(
        entry in after.health for entry in before.health if entry.since is not None
    )


def _conditions(status: DistTrainJobStatus) -> dict[str, tuple[str, str]]:
    return {condition.type: (condition.status, condition.reason) for condition in status.conditions}


def _room(status: DistTrainJobStatus) -> Room | None:
    return status.worker.room if status.worker is not None else None


def _completed(status: DistTrainJobStatus) -> str | None:
    return status.worker.completed_indexes if status.worker is not None else None
