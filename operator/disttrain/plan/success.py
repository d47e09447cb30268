"""When the job is complete: its workers succeeded and the master had a moment to say how it ended; or the master says that all is done."""

from datetime import timedelta

from disttrain.api.names import Role
from disttrain.api.reasons import Reason
from disttrain.api.spec import SuccessPolicy
from disttrain.plan.ending import complete
from disttrain.plan.model import Phase
from disttrain.plan.step import Step
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
    master = world.present.get((Role.MASTER, 0))
    # That of a command hears nothing of its end, and has no last words.
    if master is not None and not master.done and not master.deleting and not world.runs_command:
        ends = [
            world.until(pod.ended, MASTER_GRACE)
            for (role, _), pod in world.present.items()
            if role is Role.WORKER and pod.phase is Phase.SUCCEEDED
        ]
        # A worker whose end nobody saw was remembered from an earlier pass: its moment is over.
        patience = max(ends, default=world.now)
        if world.now < patience:
            return Step(look=patience)
    message = f"{len(done)} of {workers} workers succeeded"
    return complete(world, Reason.WORKERS_SUCCEEDED, message)


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
