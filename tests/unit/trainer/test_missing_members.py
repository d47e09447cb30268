"""Which members are missing, as one line."""

from disttrain.api.names import Role
from disttrain_trainer.coordinator.missing_members import MissingMembers
from disttrain_trainer.net.peers import Member

WORKERS = [Member(Role.WORKER, rank) for rank in range(8)]


def test_the_longest_absence_is_said_and_five_names() -> None:
    missing = MissingMembers()
    missing.begin(WORKERS[3], 10)
    assert missing.describe(WORKERS[2:4], 12) == "worker-2, worker-3 (2 s)"
    assert missing.describe(WORKERS, 20) == "worker-0, worker-1, worker-2, worker-3, worker-4 and 3 more (10 s)"
    assert missing.describe([], 20) is None


def test_absence_that_ended_counts_again_from_the_next_question() -> None:
    missing = MissingMembers()
    missing.begin(WORKERS[0], 0)
    missing.end(WORKERS[0])
    assert missing.describe(WORKERS[:1], 100) == "worker-0 (0 s)"
