"""The condition Restarting: what the job has lost and waits for, until it is whole again.

Not here: failures, which their own policy writes down (failures/), and lost nodes' pods that are deleted by force (lost_nodes.py).
"""

from disttrain.api.reasons import ConditionType, Reason
from disttrain.plan import words
from disttrain.plan.elastic import is_new
from disttrain.plan.model import Phase, PodView
from disttrain.plan.step import Claim, Truth
from disttrain.plan.view import REPORT_TIMEOUT, JobView


def restarting(view: JobView, ready: Claim, progressing: Claim) -> Claim:
    """The condition as it is seen; what a policy says of a failure stands above it."""
    before = view.status.condition(ConditionType.RESTARTING)
    if before is not None and before.status == "True":
        if ready.status == "True":
            return _claim("False", Reason.RECOVERED, before.message)
        if view.silent and before.reason != Reason.NODE_LOST:
            return _claim("True", Reason.NODE_LOST, words.node_lost(view.silent[0]))
        return _claim("True", before.reason, before.message)
    if (loss := _loss(view, progressing)) is not None:
        return loss
    if before is not None and before.reason != Reason.SUSPENDED:
        return _claim("False", before.reason, before.message)
    return _claim("False", Reason.NO_FAILURE)


def _loss(view: JobView, progressing: Claim) -> Claim | None:
    """A pod that the job had and that is lost without having failed."""
    if view.silent:
        return _claim("True", Reason.NODE_LOST, words.node_lost(view.silent[0]))
    if not view.status.is_true(ConditionType.SCHEDULED):
        return None
    for slot in view.expected:
        pod = view.present.get(slot)
        if view.needs_no_pod(slot) or is_new(view, *slot):
            continue
        if pod is None or pod.deleting:
            reason = words.disruption(pod) if pod is not None else Reason.REPLACED
            message = f"Pod {view.name(slot)} {words.HOW_LOST[reason]}; the operator creates it again"
            return _claim("True", reason, message)
        if pod.phase is Phase.RUNNING and not pod.ready and progressing.status != "True" and _was_ready(view, pod):
            message = f"Pod {pod.name} runs, but is no longer ready"
            return _claim("True", Reason.NOT_READY, message)
    return None


def _was_ready(view: JobView, pod: PodView) -> bool:
    """Whether a pod that is not ready was, in this attempt, and is not for longer than a readiness probe may fail by chance."""
    ready, progressing = map(view.status.condition, (ConditionType.READY, ConditionType.PROGRESSING))
    ran = view.stepped or (view.trained and progressing is not None and progressing.status == "Unknown")
    return ran and ready is not None and view.reached(max(ready.last_transition_time, pod.created) + REPORT_TIMEOUT)


def _claim(status: Truth, reason: str, message: str = "") -> Claim:
    return Claim(type=ConditionType.RESTARTING, status=status, reason=reason, message=message)
