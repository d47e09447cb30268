"""The work queue hands every part out, in order, until it is done; whatever happens to the workers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.data.index_set import IndexSet


def make(*, total: int = 12, parts_per_step: int = 3, aligned: bool = True, done: list[int] | None = None) -> WorkQueue:
    queue = WorkQueue(total=total, parts_per_step=parts_per_step, aligned=aligned, done=IndexSet(done or []))
    for worker in range(parts_per_step):
        queue.join(worker)
    return queue


def test_a_synchronous_worker_gets_its_own_slice_of_every_step() -> None:
    assert make().take(1, 10) == [1, 4, 7, 10]


def test_an_asynchronous_worker_gets_whatever_is_next() -> None:
    queue = make(aligned=False)
    assert queue.take(1, 2) == [0, 1]
    assert queue.take(0, 3) == [2, 3, 4]


def test_slices_of_a_worker_that_is_not_there_are_everybodys_lowest_first() -> None:
    queue = make()
    queue.leave(1)
    assert queue.take(0, 4) == [0, 1, 3, 4]


def test_slices_of_a_lost_worker_return_and_come_first() -> None:
    queue = make()
    queue.take(0, 3)
    queue.take(1, 3)
    queue.finish(0, [0, 3, 6])
    queue.leave(1)
    assert queue.take(0, 5) == [1, 4, 7, 9, 10]


def test_a_replacement_takes_over_what_the_lost_one_had() -> None:
    queue = make()
    queue.take(1, 2)
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


def test_done_slices_are_not_handed_out_again() -> None:
    queue = make(done=[0, 1, 2, 4])
    assert queue.step == 1
    assert queue.take(1, 9) == [7, 10]


def test_what_the_servers_know_counts_and_what_they_deny_returns() -> None:
    queue = make(total=6)
    queue.take(0, 2)
    queue.finish(0, [0, 3])
    queue.learn(IndexSet([1, 2]))
    assert queue.done == 4
    assert queue.unlearn(IndexSet([1, 2, 3])) == [0]
    assert queue.take(0, 9) == [0]


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["take", "finish", "lose", "join"]), st.integers(0, 2), st.integers(1, 4)),
        max_size=60,
    ),
    aligned=st.booleans(),
)
def test_whatever_happens_every_slice_is_computed_in_the_end(events: list[tuple[str, int, int]], aligned: bool) -> None:
    queue = make(total=30, aligned=aligned)
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
def test_many_slices_are_handed_out_quickly(aligned: bool) -> None:
    queue = make(total=300_000, aligned=aligned)
    for _ in range(10):
        for worker in range(3):
            parts = queue.take(worker, 1000)
            queue.finish(worker, parts)
    assert queue.done == 30_000
