"""The work of a job as numbered slices, and sets of slice numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.data.slices import Schedule, SliceSet

numbers = st.lists(st.integers(0, 60), max_size=80)
schedules = st.builds(
    Schedule,
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    world_size=st.integers(1, 9),
    seed=st.integers(0, 3),
    epochs=st.integers(1, 3),
)


@given(schedules)
def test_every_sample_comes_exactly_once_an_epoch(schedule: Schedule) -> None:
    slices = [schedule.slice(k) for k in range(schedule.total_slices)]
    for epoch in {s.epoch for s in slices}:
        seen = np.concatenate([s.indices for s in slices if s.epoch == epoch])
        assert sorted(seen) == list(range(schedule.samples))


@given(schedules)
def test_slices_of_a_step_are_near_equal_and_say_the_size_of_their_batch(schedule: Schedule) -> None:
    for step in range(schedule.total_steps):
        slices = [schedule.slice(step * schedule.world_size + part) for part in range(schedule.world_size)]
        assert {s.step for s in slices} == {step}
        assert {s.batch_samples for s in slices} == {sum(s.samples for s in slices)}
        assert max(s.samples for s in slices) - min(s.samples for s in slices) <= 1
        assert all(s.samples == len(s.indices) for s in slices)


def test_the_batches_do_not_depend_on_the_number_of_workers() -> None:
    def batch(world_size: int, step: int) -> list[int]:
        schedule = Schedule(samples=50, batch_size=8, world_size=world_size, seed=1, epochs=2)
        parts = [schedule.slice(step * world_size + part).indices for part in range(world_size)]
        return list(np.concatenate(parts))

    assert all(batch(1, step) == batch(3, step) == batch(8, step) for step in range(14))


def test_epochs_have_orders_of_their_own_that_depend_on_the_seed_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(Schedule(samples=50, batch_size=50, world_size=1, seed=seed, epochs=3).slice(epoch).indices)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_max_steps_ends_in_the_middle_of_an_epoch() -> None:
    schedule = Schedule(samples=10, batch_size=4, world_size=2, seed=0, max_steps=4)
    assert (schedule.steps_per_epoch, schedule.total_steps, schedule.total_slices) == (3, 4, 8)
    assert [schedule.slice(k).epoch for k in range(8)] == [1] * 6 + [2] * 2
    with pytest.raises(IndexError, match="slice 8 of 8"):
        schedule.slice(8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"batch_size": 0},
        {"world_size": 0},
        {"seed": -1},
        {"epochs": None},
        {"max_steps": 3},
        {"epochs": 0},
    ],
)
def test_numbers_that_make_no_schedule_are_refused(wrong: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**{"samples": 10, "batch_size": 2, "world_size": 2, "seed": 0, "epochs": 1, **wrong})  # type: ignore[arg-type]


def test_nobody_can_change_the_order_of_the_epoch_by_accident() -> None:
    schedule = Schedule(samples=10, batch_size=4, world_size=2, seed=0, epochs=1)
    with pytest.raises(ValueError, match="read-only"):
        schedule.slice(0).indices[0] = 5


@given(numbers)
def test_a_slice_set_is_a_set(added: list[int]) -> None:
    ours, theirs = SliceSet(), set()
    for number in added:
        assert ours.add(number) is (number not in theirs)
        theirs.add(number)
    assert list(ours) == sorted(theirs)
    assert len(ours) == len(theirs)
    assert all((number in ours) is (number in theirs) for number in range(62))
    assert ours.floor == next(number for number in range(62) if number not in theirs)
    assert ours == SliceSet(sorted(theirs))
    assert all(b < c for (_, b), (c, _) in zip(ours.intervals(), ours.intervals()[1:], strict=False)), "merged"


@given(numbers, numbers, st.integers(0, 70))
def test_intersections_and_gaps_of_slice_sets_are_those_of_sets(a: list[int], b: list[int], upto: int) -> None:
    both = SliceSet(a).intersection(SliceSet(b))
    assert list(both) == sorted(set(a) & set(b))
    assert len(both) == len(set(a) & set(b))
    assert list(SliceSet(a).missing(upto)) == sorted(set(range(upto)) - set(a))


@given(numbers)
def test_a_slice_set_survives_its_intervals(added: list[int]) -> None:
    ours = SliceSet(added)
    copy = SliceSet.from_intervals(ours.intervals())
    assert copy == ours
    assert len(copy) == len(ours)
    copy.add(99)
    assert 99 not in ours


@pytest.mark.parametrize("intervals", [[(3, 3)], [(5, 4)], [(0, 2), (2, 4)], [(4, 6), (0, 2)], [(-1, 3)]])
def test_intervals_that_are_not_ascending_and_apart_are_refused(intervals: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="interval"):
        SliceSet.from_intervals(intervals)
