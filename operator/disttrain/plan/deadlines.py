"""The deadlines of a job: to start, to recover, to make a step, to be done.

Not here: the waits inside the training (each has its own deadline there), the back-off (failures/), the TTL (cleanup.py).
"""

from datetime import datetime, timedelta

from disttrain.api.reasons import ConditionType, Reason
from disttrain.plan import conditions, words
from disttrain.plan.completion import fail
from disttrain.plan.failures import steps
from disttrain.plan.model import Event
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import REPORT_TIMEOUT, JobView, Slot


def passed(view: JobView) -> Step | None:
    """What follows from a deadline that is over."""
    if (moment := _active_until(view)) is not None and view.reached(moment):
        seconds = view.spec.run_policy.active_deadline_seconds
        return fail(view, Reason.DEADLINE_EXCEEDED, f"Not done within {seconds} s (runPolicy.activeDeadlineSeconds)")
    if (moment := _ready_until(view)) is not None and view.reached(moment):
        return _never_ready(view)
    if (moment := _step_until(view)) is not None and view.reached(moment):
        return _stalled(view)
    return None


def _active_until(view: JobView) -> datetime | None:
    return _after(view.status.start_time, view.spec.run_policy.active_deadline_seconds)


def _ready_until(view: JobView) -> datetime | None:
    """From the moment at which the job stopped being ready; each step of those who go on without the missing pod moves it.

    Until the first step of the job it is the start-up that ends here. Later a lost pod is waited for: node and capacity come back, and the
    work that is done is worth more than the wait. Only runPolicy.recoveryDeadlineSeconds ends that.
    """
    ready = view.status.condition(ConditionType.READY)
    policy = view.spec.run_policy
    seconds = policy.recovery_deadline_seconds if view.trained else policy.startup_deadline_seconds
    started = view.status.start_time
    if seconds is None or started is None or ready is None or ready.status == "True":
        return None
    seen = conditions.ready(view)
    if seen.status == "True" or view.steps_now:
        return None  # it is written down in this pass
    if seen.reason == Reason.WAITING_FOR_PEERS and view.progress is None:
        return None  # every pod is there; only the operator cannot reach the master, and that wait ends by itself (conditions.py)
    since = max(started, ready.last_transition_time, _last_step(view) or started)
    moment = since + timedelta(seconds=seconds)
    listening = view.snapshot.listening_since
    return moment if view.progress or listening is None else max(moment, listening + REPORT_TIMEOUT)


def _step_until(view: JobView) -> datetime | None:
    """From the last step, or from the moment at which every pod was ready. It stands still while a pod is missing, without a node, not
    ready, or on a node that does not report. Only for a training that reports steps: silence of a user's script says nothing."""
    ready = view.status.condition(ConditionType.READY)
    if view.status.start_time is None or ready is None or view.progress is None or not view.whole:
        return None
    if ready.status != "True" and not view.trained:
        return None  # peers that never met: the start-up deadline
    if not view.runs_our_loop and view.progress.last_update_time is None:
        return None
    if view.status.training is not None and view.progress.step != view.status.training.step:
        return None  # a step that is not written down yet; the clock starts when it is
    moments = (view.status.start_time, ready.last_transition_time, _last_step(view), view.whole_since)
    since = max(moment for moment in moments if moment is not None)
    return _after(since, view.spec.run_policy.progress_deadline_seconds)


def _last_step(view: JobView) -> datetime | None:
    """When the step last advanced, by the operator's clock: that of a master may be wrong."""
    return view.status.training.last_update_time if view.status.training else None


def _never_ready(view: JobView) -> Step:
    policy = view.spec.run_policy
    if view.trained:
        reason, seconds = Reason.RECOVERY_DEADLINE_EXCEEDED, policy.recovery_deadline_seconds
        text = f"Not every pod was ready again within {seconds} s (runPolicy.recoveryDeadlineSeconds)"
    else:
        reason, seconds = Reason.STARTUP_DEADLINE_EXCEEDED, policy.startup_deadline_seconds
        text = f"Not every pod was ready within {seconds} s (runPolicy.startupDeadlineSeconds)"
    return fail(view, reason, f"{text}. {_waits_for(view)}".strip())


def _stalled(view: JobView) -> Step:
    """The first pass writes the stall down, so that a user sees it; the next one restarts the job, which counts once."""
    seconds = view.spec.run_policy.progress_deadline_seconds
    step = view.progress.step if view.progress else 0
    message = (
        f"No step for {seconds} s (runPolicy.progressDeadlineSeconds), the last was {step}. {_waits_for(view)}".strip()
    )
    progressing = view.status.condition(ConditionType.PROGRESSING)
    if progressing is None or progressing.reason != Reason.STALLED:
        return Step(
            claims=(Claim(type=ConditionType.PROGRESSING, status="False", reason=Reason.STALLED, message=message),),
            events=(Event(reason=Reason.STALLED, message=message, warning=True),),
            again=True,
        )
    if over := steps.limit_exceeded(view, message):
        return over
    blame, index = _awaited(view) or (None, 0)
    return steps.restart_by_rule(view, Reason.STALLED, message, blame=blame, index=index)


def _awaited(view: JobView) -> Slot | None:
    """The one pod that the master waits for. Of a stall in which it waits for none, or for several, no pod is to blame."""
    names = words.without_clock((view.progress and view.progress.waiting_for) or "").split(", ")
    slots = [slot for slot in view.wanted if f"{slot[0].value}-{slot[1]}" in names]
    return slots[0] if len(slots) == len(names) == 1 else None


def _waits_for(view: JobView) -> str:
    if view.progress is not None and view.progress.waiting_for:
        return f"Waiting for {words.without_clock(view.progress.waiting_for)}"
    conditions = map(view.status.condition, (ConditionType.VALID, ConditionType.SCHEDULED, ConditionType.READY))
    return next((c.message for c in conditions if c is not None and c.status == "False"), "")


def _after(moment: datetime | None, seconds: int | None) -> datetime | None:
    return None if moment is None or seconds is None else moment + timedelta(seconds=seconds)
