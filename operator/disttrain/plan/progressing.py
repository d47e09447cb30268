"""The condition Progressing: whether steps are seen, and what it says without a step, or without a report.

Not here: what follows from a stall (deadlines.py).
"""

from datetime import datetime

from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.runtime import Progress
from disttrain.api.status import Condition
from disttrain.plan import words
from disttrain.plan.progress import usual_pause
from disttrain.plan.step import Claim, Truth
from disttrain.plan.view import REPORT_TIMEOUT, JobView


def progressing(view: JobView, ready: Claim) -> Claim:
    """The condition as it is seen. It is True only while steps are seen about as often as this training makes them."""
    before = view.status.condition(ConditionType.PROGRESSING)
    was_training = before is not None and before.status == "True"
    progress = view.progress
    if progress is None:
        return _without_report(view, before, ready)
    training = view.status.training
    if (
        before is not None
        and before.reason == Reason.STALLED
        and training is not None
        and progress.step == training.step
    ):
        return _claim("False", Reason.STALLED, before.message)
    if progress.last_update_time is not None or was_training:
        if (since := _no_step_since(view, progress, before)) is not None:
            message = f"No step was seen since {since:%H:%M:%S} UTC"
            if progress.waiting_for:
                message += f"; waiting for {words.without_clock(progress.waiting_for)}"
            return _claim("False", Reason.NO_STEP, message)
        waits = f"Waiting for {words.without_clock(progress.waiting_for)}" if progress.waiting_for else ""
        return _claim("True", Reason.TRAINING, waits)
    if not view.runs_our_loop:
        message = "The program reports no steps; disttrain_trainer.session reports them with one line of code"
        if progress.warning:
            message += f". {words.WARNING}{progress.warning}"
        return _claim("Unknown", Reason.NO_REPORT, message)
    return _claim("False", Reason.STARTING, "No step yet")


def _no_step_since(view: JobView, progress: Progress, before: Condition | None) -> datetime | None:
    """When the last step was seen, if that is longer ago than a step takes here; None while steps are made. Of a training that has made
    its last step none is expected: it evaluates, and takes its last checkpoint."""
    training = view.status.training
    if view.steps_now or (progress.total_steps is not None and progress.step >= progress.total_steps):
        return None
    if before is None or (before.status != "True" and before.reason != Reason.NO_STEP):
        return None  # the first report of the attempt; an earlier attempt may have reached the step
    last = training.last_update_time if training is not None else None
    if before.reason == Reason.NO_STEP:
        return last or before.last_transition_time  # until a step is seen
    last = max(last or before.last_transition_time, before.last_transition_time)
    listening = view.snapshot.listening_since or last
    return last if view.reached(max(last, listening) + usual_pause(view)) else None


def _without_report(view: JobView, before: Condition | None, ready: Claim) -> Claim:
    """Without a report: what was known holds for a while, then nothing is known."""
    if before is not None and before.reason == Reason.NO_STEP and ready.status != "True":
        return _claim("False", before.reason, before.message)
    if before is None or (before.status == "False" and ready.status != "True"):
        return _claim("False", Reason.STARTING, "No step yet")
    if before.status == "Unknown" or _silent(view, before):
        return _claim(
            "Unknown", Reason.NO_REPORT, "The operator cannot reach the master; training may still be running"
        )
    if before.status == "True":
        return _claim("True", Reason.TRAINING, before.message)
    return _claim("False", Reason.STARTING, "No step yet")


def _silent(view: JobView, progressing: Condition) -> bool:
    """Whether the master has not reported for so long that it is not known whether steps are made. The time counts from its last report, or
    from the moment at which it could have begun to speak; and only while this process listens, since the one before it
    may have been away for long."""
    read, listening = view.snapshot.progress_read, view.snapshot.listening_since
    if progressing.status == "True":
        if read is None and listening is None:
            return False
        training = view.status.training
        moments = [progressing.last_transition_time, training.last_update_time if training else None, read, listening]
    else:
        ready = view.status.condition(ConditionType.READY)
        if ready is None or ready.status != "True":
            # It becomes ready in this pass: our loop after all the time in which the master could have spoken.
            return view.runs_our_loop
        moments = [ready.last_transition_time, listening]
    return view.reached(max(moment for moment in moments if moment is not None) + REPORT_TIMEOUT)


def _claim(status: Truth, reason: str, message: str = "") -> Claim:
    return Claim(type=ConditionType.PROGRESSING, status=status, reason=reason, message=message)
