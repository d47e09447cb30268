"""When the job is complete: its workers succeeded and the master had a moment to say how it ended; or the master says that all is done."""

from datetime import datetime, timedelta

from disttrain.api.names import Role
from disttrain.api.reasons import Reason
from disttrain.api.spec import SuccessPolicy
from disttrain.plan.ending import complete
from disttrain.plan.model import Phase
from disttrain.plan.progress import newest
from disttrain.plan.step import Step
from disttrain.plan.words import WARNING
from disttrain.plan.world import World

MASTER_GRACE = timedelta(seconds=10)
"""For the master to end after the workers, and leave the final progress as its last words; for workers, to end after a master
that says that all is done."""


def reached(world: World) -> Step | None:
    """The end of the job by its successPolicy. It stands above failures: what fails after the work is done does not matter."""
    workers = world.spec.worker.replicas
    done = world.completed & set(range(workers))
    if not done or (world.spec.success_policy is SuccessPolicy.ALL_WORKERS and len(done) < workers):
        return _all_work_is_done(world, done=len(done))
    # A worker whose end is not seen any more was remembered from an earlier pass: its moment is over.
    ends = [
        pod.ended for (role, _), pod in world.present.items() if role is Role.WORKER and pod.phase is Phase.SUCCEEDED
    ]
    patience = max((world.until(end, MASTER_GRACE) for end in ends), default=world.now)
    if world.now < patience and _more_is_to_come(world, after=max(ends, default=world.now)):
        return Step(look=patience)
    warning = _missing_steps(world) + _apart(world)
    message = f"{len(done)} of {workers} workers succeeded{warning}"
    return complete(world, Reason.WORKERS_SUCCEEDED, message, warning=bool(warning))


def _more_is_to_come(world: World, *, after: datetime) -> bool:
    """Whether the master is going to say how far the job came."""
    master = world.present.get((Role.MASTER, 0))
    if master is None or master.done or master.deleting:
        return False
    if not world.runs_command:
        return True
    # That of a command hears nothing of its end, and has no last words: a later report has to do, where one can say that steps are missing.
    read = world.snapshot.progress_read
    return bool(_missing_steps(world)) and (read is None or read <= after)


def _missing_steps(world: World) -> str:
    """What a user is to know of a script or command that ended well before the last step that it announced; "" for nothing."""
    progress = newest(world)
    if world.spec.trainer.model is not None or progress is None or progress.total_steps is None:
        return ""
    if progress.step >= progress.total_steps:
        return ""
    return (
        f", but reported only step {progress.step} of {progress.total_steps}: look whether the program ended too early"
    )


def _apart(world: World) -> str:
    """What the master says of a success that may be none: the programs did not train together; "" for nothing."""
    progress = newest(world)
    return f". {WARNING}{progress.warning}" if progress is not None and progress.warning else ""


def _all_work_is_done(world: World, *, done: int) -> Step | None:
    """The others did the work of a worker that was lost near the end: its replacement would wait for a master that has gone home.

    Mostly it is a normal end, of which the master's part was seen first: workers that run have a moment to end well. Nothing else
    happens meanwhile. What fails now fails after the work was done, so it is neither counted nor replaced; also while the master, who
    reported the end, waits for the others to go.
    """
    master = world.present.get((Role.MASTER, 0))
    if master is not None and master.done:
        progress, patience = master.termination.progress, world.until(master.ended, MASTER_GRACE)
    elif master is not None and world.failed:
        progress, patience = world.progress, world.now
    else:
        return None
    if progress is None or not progress.finished:
        return None
    if world.now < patience and any(
        role is Role.WORKER and pod.phase is Phase.RUNNING and not pod.deleting and not world.settled((role, index))
        for (role, index), pod in world.present.items()
    ):
        return Step(look=patience)
    message = f"All steps are done; {done} of {world.spec.worker.replicas} workers were there at the end"
    return complete(world, Reason.TRAINING_DONE, message)
