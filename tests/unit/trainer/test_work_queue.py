"""The work queue hands every part out, in order, until it is done; whatever happens to the workers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.data.index_set import IndexSet


def make(
    *, total: int = 12, parts_per_step: int = 3, workers: int = 3, aligned: bool = True, done: list[int] | None = None
) -> WorkQueue:
    queue = WorkQueue(total=total, parts_per_step=parts_per_step, aligned=aligned, done=IndexSet(done or []))
    for worker in range(workers):
        queue.join(worker)
    return queue


def test_a_synchronous_worker_gets_its_own_part_of_every_step() -> None:
    assert make().take(1, 10) == [1, 4, 7, 10]


def test_an_asynchronous_worker_gets_whatever_is_next() -> None:
    queue = make(aligned=False)
    assert queue.take(1, 2) == [0, 1]
    assert queue.take(0, 3) == [2, 3, 4]


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6]]),
        (2, [[0, 2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11, 13]]),
        (3, [[0, 3, 6, 9, 12, 15, 18], [1, 4, 7, 10, 13, 16, 19], [2, 5, 8, 11, 14, 17, 20]]),
        (
            4,
            [
                [0, 4, 6, 10, 12, 16, 18],
                [1, 5, 7, 11, 13, 17, 19],
                [2, 3, 8, 9, 14, 15, 20],
                [21, 22, 24, 27, 30, 33, 39],
            ],
        ),
    ],
)
def test_the_parts_of_a_step_are_shared_among_any_number_of_workers(workers: int, expected: list[list[int]]) -> None:
    queue = make(total=60, parts_per_step=6, workers=workers)
    assert [queue.take(worker, 7) for worker in range(workers)] == expected


def test_more_workers_than_parts_take_turns() -> None:
    queue = make(total=8, parts_per_step=2, workers=3)
    assert [queue.take(worker, 2) for worker in range(3)] == [[0, 2], [1, 3], [4, 6]]
    queue.finish(0, [0, 2])
    assert queue.take(0, 2) == [5, 7]


def test_parts_of_a_worker_that_is_not_there_are_shared_among_the_others() -> None:
    queue = make()
    queue.leave(1)
    assert queue.take(0, 4) == [0, 2, 3, 5]
    assert queue.take(2, 4) == [1, 4, 6, 7]


def test_parts_of_a_lost_worker_return_and_come_first() -> None:
    queue = make()
    queue.take(0, 3)
    queue.take(1, 3)
    queue.finish(0, [0, 3, 6])
    queue.leave(1)
    assert queue.take(0, 5) == [1, 2, 4, 5, 8]


def test_a_worker_that_waits_for_a_step_gets_no_part_of_an_earlier_one() -> None:
    # It computes its parts in their order: behind the part of step 1, which cannot begin before step 0 is whole, that of step 0
    # would never be computed.
    queue = make(total=8, parts_per_step=2, workers=2)
    assert queue.take(0, 2) == [0, 2]
    queue.finish(0, [0])
    assert queue.take(0, 1) == [4]
    assert queue.take(1, 1) == [1]


def test_a_replacement_takes_over_what_the_lost_one_had() -> None:
    queue = make()
    for worker in range(3):
        queue.take(worker, 2)
    queue.finish(1, [1])
    queue.leave(1)
    queue.join(1)
    assert queue.take(1, 9) == [4, 7, 10]


def test_nothing_is_handed_out_beyond_the_limit() -> None:
    queue = make()
    queue.limit = 6
    assert [queue.take(worker, 9) for worker in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert queue.handed_out == 6
    queue.limit = 12
    assert queue.take(2, 9) == [8, 11]


def test_done_parts_are_not_handed_out_again() -> None:
    queue = make(done=[0, 1, 2, 4])
    assert queue.step == 1
    assert queue.take(1, 9) == [3, 7, 10]


def test_what_the_servers_know_counts_and_what_they_deny_returns() -> None:
    queue = make(total=6)
    queue.take(0, 2)
    queue.finish(0, [0, 3])
    queue.learn(IndexSet([1, 2]))
    assert queue.done == 4
    assert queue.unlearn(IndexSet([1, 2, 3])) == [0]
    assert queue.take(0, 9) == [0, 4]


def resumed(queue: WorkQueue, worker: int, *parts: int) -> int | None:
    queue.reserve(worker, list(parts))
    return queue.resume(worker, list(parts))


def test_a_worker_resumes_the_first_part_that_is_neither_done_nor_of_another() -> None:
    queue = make(done=[0])
    assert queue.take(1, 1) == [1]
    queue.limit = 3
    assert [resumed(queue, 0, part) for part in (0, 1, 2, 3)] == [None, None, 2, None]
    assert queue.holders(2) == [0]
    assert resumed(make(done=[0]), 0, 0, 2, 1) == 2, "in its order"


def test_parts_that_a_worker_may_have_begun_are_not_assigned_before_it_is_known_which_are_applied() -> None:
    queue = make()
    queue.reserve(0, [0, 1, 2])
    assert 0 not in queue.take(1, 2)
    queue.learn(IndexSet([0]))
    assert queue.resume(0, [0, 1, 2]) == 1
    assert queue.holders(2) == [], "it begins a part when the one before is applied"


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["take", "finish", "lose", "join"]), st.integers(0, 2), st.integers(1, 4)),
        max_size=60,
    ),
    aligned=st.booleans(),
    parts_per_step=st.sampled_from([1, 2, 3, 5, 6]),
)
def test_whatever_happens_every_part_is_computed_in_the_end(
    events: list[tuple[str, int, int]], aligned: bool, parts_per_step: int
) -> None:
    queue = make(total=30, parts_per_step=parts_per_step, aligned=aligned)
    held: dict[int, list[int]] = {worker: [] for worker in range(3)}
    for event, worker, count in events:
        if event == "join":
            queue.join(worker)
            held[worker] = []
        elif event == "lose":
            assert queue.leave(worker) == (worker in held)
            held.pop(worker, None)
        elif worker in held and event == "take":
            taken = queue.take(worker, count)
            assert taken == sorted(taken)
            others = {index for other, parts in held.items() for index in parts}
            assert not others & set(taken), "a part is held by two workers"
            held[worker] += taken
        elif worker in held:
            queue.finish(worker, held[worker][:count])
            del held[worker][:count]
    queue.leave(1)
    queue.leave(2)
    queue.join(0)
    while parts := queue.take(0, 7):
        assert min(parts) == parts[0]
        queue.finish(0, parts)
    assert queue.finished


@pytest.mark.parametrize("aligned", [True, False])
def test_many_parts_are_handed_out_quickly(aligned: bool) -> None:
    queue = make(total=300_000, aligned=aligned)
    for _ in range(10):
        for worker in range(3):
            parts = queue.take(worker, 1000)
            queue.finish(worker, parts)
    assert queue.done == 30_000
