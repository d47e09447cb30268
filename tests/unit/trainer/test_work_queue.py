"""The ledger hands every slice out, in order, until it is done; whatever happens to the workers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.coordinator.work_queue import Ledger
from disttrain_trainer.data.index_set import IndexSet


def make(*, total: int = 12, world_size: int = 3, aligned: bool = True, done: list[int] | None = None) -> Ledger:
    ledger = Ledger(total=total, world_size=world_size, aligned=aligned, done=IndexSet(done or []))
    for worker in range(world_size):
        ledger.join(worker)
    return ledger


def test_a_synchronous_worker_gets_its_own_slice_of_every_step() -> None:
    assert make().take(1, 10) == [1, 4, 7, 10]


def test_an_asynchronous_worker_gets_whatever_is_next() -> None:
    ledger = make(aligned=False)
    assert ledger.take(1, 2) == [0, 1]
    assert ledger.take(0, 3) == [2, 3, 4]


def test_slices_of_a_worker_that_is_not_there_are_everybodys_lowest_first() -> None:
    ledger = make()
    ledger.leave(1)
    assert ledger.take(0, 4) == [0, 1, 3, 4]


def test_slices_of_a_lost_worker_return_and_come_first() -> None:
    ledger = make()
    ledger.take(0, 3)
    ledger.take(1, 3)
    ledger.finish(0, [0, 3, 6])
    ledger.leave(1)
    assert ledger.take(0, 5) == [1, 4, 7, 9, 10]


def test_a_replacement_takes_over_what_the_lost_one_had() -> None:
    ledger = make()
    ledger.take(1, 2)
    ledger.finish(1, [1])
    ledger.leave(1)
    ledger.join(1)
    assert ledger.take(1, 9) == [4, 7, 10]


def test_nothing_is_handed_out_beyond_the_limit() -> None:
    ledger = make()
    ledger.limit = 6
    assert [ledger.take(worker, 9) for worker in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert ledger.handed_out == 6
    ledger.limit = 12
    assert ledger.take(2, 9) == [8, 11]


def test_done_slices_are_not_handed_out_again() -> None:
    ledger = make(done=[0, 1, 2, 4])
    assert ledger.step == 1
    assert ledger.take(1, 9) == [7, 10]


def test_what_the_servers_know_counts_and_what_they_deny_returns() -> None:
    ledger = make(total=6)
    ledger.take(0, 2)
    ledger.finish(0, [0, 3])
    ledger.learn(IndexSet([1, 2]))
    assert ledger.done == 4
    assert ledger.unlearn(IndexSet([1, 2, 3])) == [0]
    assert ledger.take(0, 9) == [0]


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["take", "finish", "lose", "join"]), st.integers(0, 2), st.integers(1, 4)),
        max_size=60,
    ),
    aligned=st.booleans(),
)
def test_whatever_happens_every_slice_is_computed_in_the_end(events: list[tuple[str, int, int]], aligned: bool) -> None:
    ledger = make(total=30, aligned=aligned)
    held: dict[int, list[int]] = {worker: [] for worker in range(3)}
    for event, worker, count in events:
        if event == "join":
            ledger.join(worker)
            held[worker] = []
        elif event == "lose":
            assert ledger.leave(worker) == (worker in held)
            held.pop(worker, None)
        elif worker in held and event == "take":
            taken = ledger.take(worker, count)
            assert taken == sorted(taken)
            others = {index for other, slices in held.items() for index in slices}
            assert not others & set(taken), "a slice is held by two workers"
            held[worker] += taken
        elif worker in held:
            ledger.finish(worker, held[worker][:count])
            del held[worker][:count]
    ledger.leave(1)
    ledger.leave(2)
    ledger.join(0)
    while slices := ledger.take(0, 7):
        assert min(slices) == slices[0]
        ledger.finish(0, slices)
    assert ledger.finished


@pytest.mark.parametrize("aligned", [True, False])
def test_many_slices_are_handed_out_quickly(aligned: bool) -> None:
    ledger = make(total=300_000, aligned=aligned)
    for _ in range(10):
        for worker in range(3):
            slices = ledger.take(worker, 1000)
            ledger.finish(worker, slices)
    assert ledger.done == 30_000
