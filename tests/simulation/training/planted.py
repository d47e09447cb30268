"""Bugs that are put into the trainer's coordinator, one at a time: a simulation that does not find them proves nothing."""

from collections.abc import Callable

import pytest

from disttrain_trainer.coordinator.checkpoints import CheckpointCoordinator, _Save
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.coordinator.workers import Workers
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message


def an_acknowledged_part_is_assigned_again(patch: pytest.MonkeyPatch) -> None:
    """What a worker said to be done stays in its lease, and whatever comes back with a lease is assigned once more."""

    def finish(self: WorkQueue, worker: int, parts: list[int]) -> None:
        for part in parts:
            self._done.add(part)

    take = WorkQueue.take

    def next_parts(self: WorkQueue, worker: int, count: int) -> list[int]:
        done, returned = self._done, {index for parts in self._open.values() for index in parts}
        self._done = IndexSet(index for index in done if index not in returned)
        try:
            return take(self, worker, count)
        finally:
            self._done = done

    patch.setattr(WorkQueue, "finish", finish)
    patch.setattr(WorkQueue, "take", next_parts)


def a_part_of_an_older_lease_counts(patch: pytest.MonkeyPatch) -> None:
    """What a worker did before the servers went back to a checkpoint counts as done after it."""

    def holds_lease(self: Workers, rank: int, message: Message) -> bool:
        return rank in self._leases

    patch.setattr(Workers, "holds_lease", holds_lease)


def a_checkpoint_is_committed_without_one_shard(patch: pytest.MonkeyPatch) -> None:
    """The manifest is written once all servers but one have written their files."""
    complete = CheckpointCoordinator._complete

    def early(self: CheckpointCoordinator, save: _Save) -> None:
        count = self._servers.count
        self._servers.count = max(1, count - 1)
        try:
            complete(self, save)
        finally:
            self._servers.count = count

    patch.setattr(CheckpointCoordinator, "_complete", early)


PLANTED: tuple[tuple[Callable[[pytest.MonkeyPatch], None], str], ...] = (
    (an_acknowledged_part_is_assigned_again, "is assigned again"),
    (a_part_of_an_older_lease_counts, "which are not applied on every server"),
    (a_checkpoint_is_committed_without_one_shard, "is committed without the shard"),
)
"""Each with what the simulation says of it."""
