"""Bugs that are put into the trainer's coordinator, one at a time: a simulation that does not find them proves nothing."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import pytest

from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.coordinator.checkpoints import CheckpointCoordinator
from disttrain_trainer.coordinator.gradient_norms import GradientNorms
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.coordinator.workers import Workers
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType
from simulation.training.control import ControlClient


def an_acknowledged_part_is_assigned_again(patch: pytest.MonkeyPatch) -> None:
    """What a worker said to be done stays in its lease, and whatever comes back with a lease is assigned once more."""
    kept: WeakKeyDictionary[WorkQueue, set[int]] = WeakKeyDictionary()

    def finish(self: WorkQueue, worker: int, parts: list[int]) -> None:
        kept.setdefault(self, set()).update(parts)
        for part in parts:
            self.applied.add(part)

    take = WorkQueue.take

    def next_parts(self: WorkQueue, worker: int, count: int) -> list[int]:
        applied, returned = self.applied, kept.get(self, ())
        self.applied = IndexSet(index for index in applied if index not in returned)
        try:
            return take(self, worker, count)
        finally:
            self.applied = applied

    patch.setattr(WorkQueue, "finish", finish)
    patch.setattr(WorkQueue, "take", next_parts)


def a_part_of_an_older_lease_counts(patch: pytest.MonkeyPatch) -> None:
    """What a worker did before the servers went back to a checkpoint counts as done after it."""

    def holds_lease(self: Workers, rank: int, message: Message) -> bool:
        return rank in self.ready

    patch.setattr(Workers, "holds_lease", holds_lease)


def a_checkpoint_is_committed_without_one_shard(patch: pytest.MonkeyPatch) -> None:
    """A shard whose file is written counts for the next one, too."""
    saved = CheckpointCoordinator.server_saved

    def twice(self: CheckpointCoordinator, index: int, message: Message, now: float) -> None:
        saved(self, index, message, now)
        saved(self, index, message | {"shard": message["shard"] + 1} if "shard" in message else message, now)

    patch.setattr(CheckpointCoordinator, "server_saved", twice)


def squares_are_said_once(patch: pytest.MonkeyPatch) -> None:
    """What a server repeats to the master, also to a new one, is not heard: a step whose squares are lost waits for ever."""
    know = GradientNorms.know

    def once(self: GradientNorms, server: int, message: Message) -> list[tuple[int, float]]:
        return know(self, server, message) if message["type"] == MessageType.NORM else []

    patch.setattr(GradientNorms, "know", once)


def a_roll_back_is_forgotten_with_its_round(patch: pytest.MonkeyPatch) -> None:
    """Going back to a checkpoint undoes what the roll-back left out."""

    def merged(self: Course, known: Course) -> Course:
        return self

    patch.setattr(Course, "merged", merged)


def a_worker_does_not_say_what_it_has_begun(patch: pytest.MonkeyPatch) -> None:
    """To a new master: that one gives another worker the part whose gradient is kept."""
    describe = ControlClient.describe

    def silent(self: ControlClient) -> Message:
        return {name: field for name, field in describe(self).items() if name != "begun"}

    patch.setattr(ControlClient, "describe", silent)


PLANTED: tuple[tuple[Callable[[pytest.MonkeyPatch], None], str], ...] = (
    (an_acknowledged_part_is_assigned_again, "is assigned again"),
    (a_part_of_an_older_lease_counts, "which are not applied on every server"),
    (a_worker_does_not_say_what_it_has_begun, "gets the batch of part"),
    (squares_are_said_once, "the job did not end"),
    (a_roll_back_is_forgotten_with_its_round, "the job did not end"),
    (a_checkpoint_is_committed_without_one_shard, "is committed without the shard"),
)
"""Each with what the simulation says of it."""
