"""Where the time of a job went: every second between its start and its end in exactly one bucket.

The seconds since the last entry belong to the state that was stored then; a change of state is always written, so none is
given to the wrong one. Not here: the trainer's own phases (metrics of the pods).
"""

from disttrain.api.reasons import State
from disttrain.api.status import Goodput, TrainingStatus
from disttrain.plan.world import World

_BUCKETS = {
    State.PENDING: "queued_seconds",
    State.SCHEDULING: "queued_seconds",
    State.STARTING: "starting_seconds",
    State.RESTARTING: "starting_seconds",
    State.RESIZING: "starting_seconds",
    State.TRAINING: "productive_seconds",
    State.STALLED: "stalled_seconds",
}
"""A suspended job has no bucket: it holds nothing."""


def ledger(world: World, training: TrainingStatus | None) -> Goodput | None:
    """The ledger up to now."""
    if not world.started:
        return None
    before = world.status.goodput or Goodput(accounted_until=world.status.start_time)
    entries = before.model_dump(exclude={"accounted_until"})
    since = before.accounted_until or world.second
    bucket = _BUCKETS.get(world.status.state or State.PENDING)
    if bucket is not None:
        entries[bucket] += max(0, int((world.second - since).total_seconds()))
    # Steps that were lost are done again: the time they had taken, at the mean speed, was not productive after all.
    stored = world.status.training
    if stored is not None and training is not None and training.step < stored.step:
        lost = entries["productive_seconds"] * (stored.step - training.step) // stored.step
        entries["productive_seconds"] -= lost
        entries["redone_seconds"] += lost
    return Goodput(**entries, accounted_until=max(since, world.second))
