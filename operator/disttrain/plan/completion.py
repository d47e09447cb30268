"""How a job becomes Complete or Failed: one status, written once. Not here: when (success.py, failures/, deadlines.py)."""

from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.status import Restarts
from disttrain.plan.model import Event
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import JobView


def complete(view: JobView, reason: Reason, message: str, *, warning: bool = False, unsure: bool = False) -> Step:
    """The job reached its end. warning: the user should look at how; unsure: what a pod has yet to say may only not have been seen."""
    return _end(view, ConditionType.COMPLETE, reason, message, warning=warning, final=unsure)


def fail(view: JobView, reason: Reason, message: str) -> Step:
    """The job will not be tried again."""
    return _end(view, ConditionType.FAILED, reason, message, warning=True, final=True)


def _end(view: JobView, end: ConditionType, reason: Reason, message: str, *, warning: bool, final: bool) -> Step:
    other = ConditionType.FAILED if end is ConditionType.COMPLETE else ConditionType.COMPLETE
    ceased = (other, ConditionType.READY, ConditionType.PROGRESSING, ConditionType.RESTARTING)
    return Step(
        # The pods are cleaned up in later passes, when the end is written down: a crash in between must not undo it.
        status={"completion_time": view.second, "restarts": _closed(view), "disruptions": None},
        claims=(
            Claim(type=end, status="True", reason=reason, message=message),
            *(Claim(type=type_, status="False", reason=reason, message=f"The job is {end.value}") for type_ in ceased),
        ),
        events=(Event(reason=reason, message=message, warning=warning),),
        # Pods that ended well stay so; a failure may only seem one, because the cache is old.
        final=final,
        again=True,
    )


def _closed(view: JobView) -> Restarts | None:
    """The account without what was only kept in order not to count twice."""
    if view.status.restarts is None and not view.restarted_in_place:
        return None
    return view.restarts.model_copy(update={"accounted": (), "in_place": ()})
