"""The work of a job as numbered parts, and sets of part numbers."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from disttrain.api.trainer import LastBatch
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.data.order import KeyedPermutation
from disttrain_trainer.data.schedule import Schedule, parts_of

numbers = st.lists(st.integers(0, 60), max_size=80)
schedules = st.builds(
    Schedule,
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    parts_per_step=st.integers(1, 9),
    seed=st.integers(0, 3),
    epochs=st.integers(1, 3),
    last_batch=st.sampled_from([LastBatch.KEEP, LastBatch.SPREAD]),
)


def batches(**numbers: Any) -> list[int]:
    """The sizes of the batches of an epoch."""
    schedule = Schedule(seed=0, epochs=1, **{"parts_per_step": 1, **numbers})
    return [schedule.part(step * schedule.parts_per_step).batch_samples for step in range(schedule.total_steps)]


def parts(step: int, **numbers: Any) -> list[int]:
    """The sizes of the parts of a step."""
    schedule = Schedule(seed=0, epochs=1, **numbers)
    return [schedule.part(step * schedule.parts_per_step + part).samples for part in range(schedule.parts_per_step)]


@given(schedules)
def test_every_sample_comes_exactly_once_an_epoch(schedule: Schedule) -> None:
    parts = [schedule.part(k) for k in range(schedule.total_parts)]
    for epoch in {s.epoch for s in parts}:
        seen = np.concatenate([s.indices for s in parts if s.epoch == epoch])
        assert sorted(seen) == list(range(schedule.samples))


@given(schedules)
def test_parts_of_a_step_are_near_equal_and_say_the_size_of_their_batch(schedule: Schedule) -> None:
    for step in range(schedule.total_steps):
        parts = [schedule.part(step * schedule.parts_per_step + part) for part in range(schedule.parts_per_step)]
        assert {s.step for s in parts} == {step}
        assert {s.batch_samples for s in parts} == {sum(s.samples for s in parts)}
        filled = [s.samples for s in parts if s.samples]
        assert max(filled) - min(filled) <= 1
        assert filled == [s.samples for s in parts][: len(filled)], "the first parts are filled first"
        assert all(s.samples == len(s.indices) for s in parts)


@given(schedules)
def test_no_part_has_a_single_sample_where_full_batches_give_each_part_two(schedule: Schedule) -> None:
    if schedule.batch_size < 2 * schedule.parts_per_step or schedule.samples == 1:
        return
    assert 1 not in {schedule.part(k).samples for k in range(schedule.total_parts)}


@pytest.mark.parametrize(
    ("last_batch", "samples", "sizes"),
    [
        (LastBatch.KEEP, 66, [32, 32, 2]),
        (LastBatch.KEEP, 65, [32, 33]),
        (LastBatch.KEEP, 64, [32, 32]),
        (LastBatch.KEEP, 1, [1]),
        (LastBatch.KEEP, 3, [3]),
        (LastBatch.DROP, 66, [32, 32]),
        (LastBatch.DROP, 63, [32]),
        (LastBatch.SPREAD, 66, [33, 33]),
        (LastBatch.SPREAD, 65, [32, 33]),
        (LastBatch.SPREAD, 95, [47, 48]),
        (LastBatch.SPREAD, 97, [32, 32, 33]),
        (LastBatch.SPREAD, 63, [63]),
        (LastBatch.SPREAD, 5, [5]),
    ],
)
def test_the_remainder_of_an_epoch_is_kept_dropped_or_spread(
    last_batch: LastBatch, samples: int, sizes: list[int]
) -> None:
    assert batches(samples=samples, batch_size=32, last_batch=last_batch) == sizes
    assert batches(samples=samples, batch_size=32, last_batch=last_batch, parts_per_step=3) == sizes


def test_batches_of_one_sample_stay_batches_of_one_sample() -> None:
    assert batches(samples=3, batch_size=1) == [1, 1, 1]


@pytest.mark.parametrize(
    ("samples", "batch_size", "workers", "last"),
    [
        (66, 64, 2, [2, 0]),
        (67, 64, 2, [3, 0]),
        (68, 64, 2, [2, 2]),
        (69, 64, 3, [2, 3, 0]),
        (64 + 7, 64, 4, [2, 2, 3, 0]),
        (6, 4, 4, [1, 1, 0, 0]),
        (5, 3, 2, [1, 1]),
    ],
)
def test_a_small_last_batch_goes_to_as_many_workers_as_get_what_a_full_one_gives(
    samples: int, batch_size: int, workers: int, last: list[int]
) -> None:
    assert parts(1, samples=samples, batch_size=batch_size, parts_per_step=workers) == last


@pytest.mark.parametrize(("samples", "given_to"), [(1, [1, 0]), (2, [2, 0]), (3, [3, 0]), (4, [2, 2])])
def test_a_data_set_smaller_than_the_batch_is_one_batch(samples: int, given_to: list[int]) -> None:
    assert parts(0, samples=samples, batch_size=64, parts_per_step=2) == given_to


def test_what_is_dropped_is_another_remainder_in_each_epoch() -> None:
    schedule = Schedule(samples=10, batch_size=4, parts_per_step=1, seed=0, epochs=2, last_batch=LastBatch.DROP)
    seen = [set(np.concatenate([schedule.part(2 * epoch + k).indices for k in range(2)])) for epoch in range(2)]
    assert len(seen[0]) == len(seen[1]) == 8
    assert seen[0] != seen[1]


def test_the_batches_do_not_depend_on_the_number_of_workers() -> None:
    def batch(parts_per_step: int, step: int) -> list[int]:
        schedule = Schedule(samples=50, batch_size=8, parts_per_step=parts_per_step, seed=1, epochs=2)
        parts = [schedule.part(step * parts_per_step + part).indices for part in range(parts_per_step)]
        return list(np.concatenate(parts))

    assert all(batch(1, step) == batch(3, step) == batch(8, step) for step in range(14))


def test_epochs_have_orders_of_their_own_that_depend_on_the_seed_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(Schedule(samples=50, batch_size=50, parts_per_step=1, seed=seed, epochs=3).part(epoch).indices)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@pytest.mark.parametrize("batch_size", [100, 2048, 3000])
def test_parts_have_the_samples_of_their_positions_whichever_part_is_asked_for_before(batch_size: int) -> None:
    schedule = Schedule(samples=10_001, batch_size=batch_size, parts_per_step=3, seed=5, epochs=2)
    epochs = [KeyedPermutation(10_001, 5)(epoch, np.arange(10_001)) for epoch in range(2)]
    for index in np.random.default_rng(0).permutation(schedule.total_parts).tolist():
        part = schedule.part(index)
        start = part.step % schedule.steps_per_epoch * batch_size
        positions = start + np.arange(part.batch_samples)
        before = sum(schedule.part(other).samples for other in range(part.step * 3, index))
        expected = epochs[part.epoch - 1][positions[before : before + part.samples]]
        assert np.array_equal(part.indices, expected)


class Backwards:
    """The order of a layout of its own: the last sample first, the same in each epoch."""

    name = "backwards"

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return 9 - positions


def test_a_layout_may_bring_an_order_of_its_own() -> None:
    schedule = Schedule(samples=10, batch_size=5, parts_per_step=2, seed=0, epochs=2, order=Backwards())
    assert [schedule.part(k).indices.tolist() for k in range(8)] == [[9, 8], [7, 6, 5], [4, 3], [2, 1, 0]] * 2


def test_max_steps_ends_in_the_middle_of_an_epoch() -> None:
    schedule = Schedule(samples=10, batch_size=4, parts_per_step=2, seed=0, max_steps=4)
    assert (schedule.steps_per_epoch, schedule.total_steps, schedule.total_parts) == (3, 4, 8)
    assert [schedule.part(k).epoch for k in range(8)] == [1] * 6 + [2] * 2
    with pytest.raises(IndexError, match="part 8 of 8"):
        schedule.part(8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"batch_size": 0},
        {"parts_per_step": 0},
        {"seed": -1},
        {"epochs": None},
        {"max_steps": 3},
        {"epochs": 0},
        {"samples": 1, "last_batch": LastBatch.DROP},
    ],
)
def test_numbers_that_make_no_schedule_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**{"samples": 10, "batch_size": 2, "parts_per_step": 2, "seed": 0, "epochs": 1, **wrong})


def test_the_order_of_the_epoch_cannot_be_changed_by_accident() -> None:
    schedule = Schedule(samples=10, batch_size=4, parts_per_step=2, seed=0, epochs=1)
    with pytest.raises(ValueError, match="read-only"):
        schedule.part(0).indices[0] = 5


@given(numbers)
def test_a_index_set_is_a_set(added: list[int]) -> None:
    ours, theirs = IndexSet(), set()
    for number in added:
        assert ours.add(number) is (number not in theirs)
        theirs.add(number)
    assert list(ours) == sorted(theirs)
    assert len(ours) == len(theirs)
    assert all((number in ours) is (number in theirs) for number in range(62))
    assert ours.floor == next(number for number in range(62) if number not in theirs)
    assert ours == IndexSet(sorted(theirs))
    assert all(b < c for (_, b), (c, _) in zip(ours.intervals(), ours.intervals()[1:], strict=False)), "merged"


@given(numbers, numbers, st.integers(0, 70))
def test_intersections_and_gaps_of_index_sets_are_those_of_sets(a: list[int], b: list[int], upto: int) -> None:
    both = IndexSet(a).intersection(IndexSet(b))
    assert list(both) == sorted(set(a) & set(b))
    assert len(both) == len(set(a) & set(b))
    assert list(IndexSet(a).missing(upto)) == sorted(set(range(upto)) - set(a))


@given(numbers)
def test_a_index_set_survives_its_intervals(added: list[int]) -> None:
    ours = IndexSet(added)
    copy = IndexSet.from_intervals(ours.intervals())
    assert copy == ours
    assert len(copy) == len(ours)
    copy.add(99)
    assert 99 not in ours


@pytest.mark.parametrize("intervals", [[(3, 3)], [(5, 4)], [(0, 2), (2, 4)], [(4, 6), (0, 2)], [(-1, 3)]])
def test_intervals_that_are_not_ascending_and_apart_are_refused(intervals: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="interval"):
        IndexSet.from_intervals(intervals)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6), (7, 6), (3, 1)])
def test_ranks_of_a_collective_share_the_parts_of_a_step(ranks: int, parts: int) -> None:
    shares = [parts_of(rank, ranks=ranks, parts_per_step=parts) for rank in range(ranks)]
    assert [part for share in shares for part in share] == list(range(parts)), "each once, in order"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert 0 in shares[0]
