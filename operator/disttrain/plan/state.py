"""status.state: one word for the printer column, derived from the conditions and from nothing that is not in the status."""

from collections.abc import Iterable

from disttrain.api.reasons import ConditionType, JobState, Reason
from disttrain.plan.elastic import resizing
from disttrain.plan.step import Claim
from disttrain.plan.view import JobView


def state(view: JobView, claims: Iterable[Claim], *, making: bool) -> JobState:
    """The first that holds, from the final to the tentative. `making`: pods are made before this is written down."""
    by_type = {claim.type: claim for claim in claims}

    def true(type_: ConditionType) -> bool:
        return by_type[type_].status == "True"

    progressing = by_type[ConditionType.PROGRESSING]
    if true(ConditionType.COMPLETE):
        return JobState.COMPLETE
    if true(ConditionType.FAILED):
        return JobState.FAILED
    if true(ConditionType.SUSPENDED):
        return JobState.SUSPENDED
    if by_type[ConditionType.SUSPENDED].reason == Reason.SUSPENDING:
        return view.status.state or JobState.PENDING  # what it was, until the last pod is gone
    if progressing.reason == Reason.STALLED:
        return JobState.STALLED
    if true(ConditionType.RESTARTING):
        return JobState.RESTARTING
    if resizing(view):
        return JobState.RESIZING
    if progressing.reason == Reason.NO_STEP:
        return JobState.STALLED if true(ConditionType.READY) else JobState.RESTARTING
    if progressing.status == "True":
        return JobState.TRAINING
    if not true(ConditionType.SCHEDULED):
        return JobState.SCHEDULING if view.present or making else JobState.PENDING
    reports = view.runs_our_loop
    # That the operator cannot reach the master does not mean that the steps have stopped.
    if true(ConditionType.READY) and progressing.status == "Unknown" and (view.stepped or not reports):
        return JobState.TRAINING
    return JobState.STARTING
