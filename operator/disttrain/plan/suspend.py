"""spec.suspend: free every pod, and go on later as a new attempt.

A job is Suspended only when its last pod is gone. Pods end with their own grace period, in which the master takes a checkpoint.
"""

from disttrain.api.reasons import ConditionType, Reason
from disttrain.plan import certificate, gang, lost_nodes
from disttrain.plan.elastic import ROOM
from disttrain.plan.failures.steps import new_attempt_claims
from disttrain.plan.model import Action, DeletePod, Event
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import JobView


def asked(view: JobView) -> Step | None:
    """What spec.suspend asks for; None for a job that is not suspended and is not to be."""
    if view.spec.suspend:
        return _suspend(view)
    if not _is_written(view):
        return None
    # A suspended job may be changed. That it is none any more is written down before there are pods, the first ones too.
    return _resume(view) if view.started else Step(again=True)


def _is_written(view: JobView) -> bool:
    """Whether the status says that the job is suspended, or is being."""
    condition = view.status.condition(ConditionType.SUSPENDED)
    return condition is not None and (condition.status == "True" or condition.reason == Reason.SUSPENDING)


def _suspend(view: JobView) -> Step:
    still = len(view.snapshot.pods)
    if still == 0:
        message = "No pod is left; set spec.suspend to false to resume the job"
        events = (
            () if view.status.is_true(ConditionType.SUSPENDED) else (Event(reason=Reason.SUSPENDED, message=message),)
        )
        claims = (_suspended("True", Reason.SUSPENDED, message), *_at_rest())
        actions: tuple[Action, ...] = (*certificate.spent(view), *gang.group_deletions(view))
        return Step(actions=actions, status={"certificate": None}, claims=claims, events=events)
    # Written down first: else an operator that starts in between would create the pods again in the same attempt, with its old deadlines.
    written = _is_written(view)
    going = view.snapshot.pods if written else ()
    deletions = tuple(DeletePod(name=pod.name, uid=pod.uid) for pod in going if not pod.deleting)
    message = "Waiting for the pods to take their checkpoint and end"
    return Step(
        actions=(*deletions, *lost_nodes.forced(view)),
        claims=(_suspended("False", Reason.SUSPENDING, message), *_at_rest()),
        again=not written,
    )


def _resume(view: JobView) -> Step:
    """A new attempt with new clocks, written down before its pods are made."""
    restarts = view.restarts.model_copy(update={"counted_towards_limit": 0, "accounted": (), "in_place": ()})
    message = f"Resumed as attempt {view.attempt + 1}"
    return Step(
        status={
            "attempt": view.attempt + 1,
            "start_time": view.second,
            "restarts": restarts,
            "disruptions": None,
            ROOM: None,  # there may be other nodes by now
        },
        claims=(_suspended("False", Reason.RESUMED, message), *new_attempt_claims("The job is resumed")),
        events=(Event(reason=Reason.RESUMED, message=message),),
        again=True,
    )


def _suspended(status: str, reason: Reason, message: str) -> Claim:
    return Claim(
        type=ConditionType.SUSPENDED, status="True" if status == "True" else "False", reason=reason, message=message
    )


def _at_rest() -> tuple[Claim, ...]:
    """What can be said of a job that has no pods to speak of."""
    kinds = (ConditionType.SCHEDULED, ConditionType.READY, ConditionType.PROGRESSING, ConditionType.RESTARTING)
    return tuple(
        Claim(type=kind, status="False", reason=Reason.SUSPENDED, message="spec.suspend is set") for kind in kinds
    )
