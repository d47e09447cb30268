"""spec.suspend: free every pod, and go on later as a new attempt.

A job is Suspended only when its last pod is gone. Pods end with their own grace period, in which the master takes a checkpoint.
"""

from disttrain.api.reasons import ConditionType, Reason
from disttrain.plan import lost_nodes
from disttrain.plan.model import DeletePod, Event
from disttrain.plan.restart import begun_anew
from disttrain.plan.step import Claim, Step
from disttrain.plan.world import World


def asked(world: World) -> Step | None:
    """What spec.suspend asks for; None for a job that runs and shall."""
    if world.spec.suspend:
        return _suspend(world)
    if not _is_written(world):
        return None
    # A suspended job may be changed. That it is none any more is written down before there are pods, the first ones too.
    return _resume(world) if world.started else Step(again=True)


def _is_written(world: World) -> bool:
    """Whether the status says that the job is suspended, or is being."""
    condition = world.status.condition(ConditionType.SUSPENDED)
    return condition is not None and (condition.status == "True" or condition.reason == Reason.SUSPENDING)


def _suspend(world: World) -> Step:
    still = len(world.snapshot.pods)
    if still == 0:
        message = "No pod is left; set spec.suspend to false to go on"
        news = (
            () if world.status.is_true(ConditionType.SUSPENDED) else (Event(reason=Reason.SUSPENDED, message=message),)
        )
        return Step(claims=(_suspended("True", Reason.SUSPENDED, message), *_at_rest()), events=news)
    # Written down first: of a suspension that nobody remembers, the pods would come back in the same attempt, under its old clocks.
    written = _is_written(world)
    going = world.snapshot.pods if written else ()
    deletions = tuple(DeletePod(name=pod.name, uid=pod.uid) for pod in going if not pod.deleting)
    message = "Waiting for the pods to take their checkpoint and end"
    return Step(
        actions=(*deletions, *lost_nodes.forced(world)),
        claims=(_suspended("False", Reason.SUSPENDING, message), *_at_rest()),
        look=lost_nodes.upcoming(world),
        again=not written,
    )


def _resume(world: World) -> Step:
    """A new attempt with new clocks, written down before its pods are made."""
    restarts = world.restarts.model_copy(update={"counted_towards_limit": 0, "accounted": ()})
    message = f"Resumed as attempt {world.attempt + 1}"
    return Step(
        status={"attempt": world.attempt + 1, "start_time": world.second, "restarts": restarts, "disruptions": None},
        claims=(_suspended("False", Reason.RESUMED, message), *begun_anew("The job is resumed")),
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
