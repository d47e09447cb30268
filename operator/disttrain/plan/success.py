"""When the job is complete: its workers succeeded and the master had a moment to say how it ended; or the master says that all is done."""

from datetime import datetime, timedelta

from disttrain.api.names import Role
from disttrain.api.policies import SuccessPolicy
from disttrain.api.reasons import Reason
from disttrain.api.runtime import Progress
from disttrain.plan.completion import complete
from disttrain.plan.model import Phase
from disttrain.plan.progress import newest
from disttrain.plan.step import Step
from disttrain.plan.view import JobView
from disttrain.plan.words import WARNING

LAST_REPORT_GRACE = timedelta(seconds=10)
"""For the master to end after the workers, and leave the final progress in its termination message; for workers, to end after a master
that says that all is done."""


NODES_PRECISION = timedelta(seconds=1)
"""Of the moment at which a pod ended: a report that was read in the same second may be older."""


def reached(view: JobView) -> Step | None:
    """The end of the job by its successPolicy. It stands above failures: what fails after the work is done does not matter."""
    workers = view.workers
    of_all = view.spec.success_policy is SuccessPolicy.ALL_WORKERS
    done = view.completed & set(range(workers)) if of_all else view.completed
    if not done or (of_all and len(done) < workers):
        return _all_work_is_done(view, done=len(done))
    # A worker whose end is not seen any more was remembered from an earlier pass: its moment is over.
    ends = [
        pod.ended for (role, _), pod in view.present.items() if role is Role.WORKER and pod.phase is Phase.SUCCEEDED
    ]
    until = max((view.until(end, LAST_REPORT_GRACE) for end in ends), default=view.now)
    more = _more_is_to_come(view, after=max(ends, default=view.now))
    if more and not view.reached(until):
        return Step(asks=view.runs_command)
    warning = _missing_steps(view) + _warned(view)
    message = f"{len(done)} of {workers} workers succeeded{_ended_early(newest(view))}{warning}"
    return complete(view, Reason.WORKERS_SUCCEEDED, message, warning=bool(warning), unsure=more)


def _more_is_to_come(view: JobView, *, after: datetime) -> bool:
    """Whether the master is going to say how far the job came."""
    master = view.present.get((Role.MASTER, 0))
    if master is None or master.done or master.deleting:
        return False
    if not view.runs_command:
        return True
    # The master of a command does not see its end, and leaves no termination message: a report that is read after it decides. Programs
    # end when the master has what they said.
    read = view.snapshot.progress_read
    return read is None or read < (after if view.snapshot.local else after + NODES_PRECISION)


def _missing_steps(view: JobView) -> str:
    """What a user is to know of a script or command that ended well before the last step that it announced; "" for nothing."""
    progress = newest(view)
    if view.runs_our_loop or progress is None or progress.total_steps is None:
        return ""
    if progress.step >= progress.total_steps:
        return ""
    return (
        f", but reported only step {progress.step} of {progress.total_steps}: check whether the program ended too early"
    )


def _warned(view: JobView) -> str:
    """What the master warns of: the programs did not train together, or a number of the evaluation is not finite; "" for nothing."""
    progress = newest(view)
    return f". {WARNING}{progress.warning}" if progress is not None and progress.warning else ""


def _ended_early(progress: Progress | None) -> str:
    """Why a training ended before its last step; "" for one that did not."""
    if progress is None or not progress.stopped or progress.total_steps is None:
        return ""
    return f" at step {progress.step} of {progress.total_steps} ({progress.stopped})"


def _all_work_is_done(view: JobView, *, done: int) -> Step | None:
    """The others did the work of a worker that was lost near the end: its replacement would wait for a master that has gone home.

    Mostly it is a normal end, of which the master's part was seen first: workers that run have a moment to end well. Nothing else
    happens meanwhile. What fails now fails after the work was done, so it is neither counted nor replaced; also while the master, who
    reported the end, waits for the others to go.
    """
    master = view.present.get((Role.MASTER, 0))
    if master is not None and master.done:
        progress, until = master.termination.progress, view.until(master.ended, LAST_REPORT_GRACE)
    elif master is not None and view.failed:
        progress, until = view.progress, view.now
    else:
        return None
    if progress is None or not progress.finished:
        return None
    at_work = any(
        role is Role.WORKER and pod.phase is Phase.RUNNING and not pod.deleting and not view.needs_no_pod((role, index))
        for (role, index), pod in view.present.items()
    )
    if at_work and not view.reached(until):
        return Step()
    message = f"All steps are done{_ended_early(progress)}; {done} of {view.workers} workers ended well"
    warning = f". {WARNING}{progress.warning}" if progress.warning else ""
    return complete(view, Reason.TRAINING_DONE, message + warning, warning=bool(warning), unsure=at_work)
