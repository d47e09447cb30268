"""The order of an epoch: each sample once, in any order alike, and computed for the positions that are asked for alone."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from disttrain_trainer.data.order import KeyedPermutation

EPOCHS = 1000


def epoch_of(samples: int, *, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    return KeyedPermutation(samples, seed)(epoch, np.arange(samples))


def chi_square(counts: NDArray[np.int64]) -> float:
    """Pearson's statistic of counts that should be equal."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def is_plausible(statistic: float, *, free: int) -> bool:
    """Whether chance gives such a statistic with so many degrees of freedom: within 4 standard deviations."""
    return abs(statistic - free) < 4 * math.sqrt(2 * free)


@cache
def orders(samples: int) -> NDArray[np.int64]:
    """The orders of many epochs, one a row."""
    order = KeyedPermutation(samples, 7)
    return np.stack([order(epoch, np.arange(samples)) for epoch in range(EPOCHS)])


def square_is_plausible(counts: NDArray[np.int64]) -> bool:
    """The same of a square whose rows and columns have equal sums by construction."""
    size = len(counts)
    return is_plausible(chi_square(counts) * (size - 1) / size, free=(size - 1) ** 2)


def test_each_sample_comes_once() -> None:
    for samples in range(1, 301):
        assert np.array_equal(np.sort(epoch_of(samples, epoch=samples % 3)), np.arange(samples)), samples


@given(st.integers(1, 20_000), st.integers(0, 1 << 63), st.integers(0, 1 << 31))
def test_each_sample_comes_once_whatever_the_seed_and_the_epoch(samples: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_of(samples, seed=seed, epoch=epoch)), np.arange(samples))


@given(st.integers(100_000, 1 << 62), st.integers(0, 1 << 62))
def test_of_a_data_set_that_no_table_could_hold_any_positions_are_computed(samples: int, at: int) -> None:
    positions = (at + np.arange(1000)) % samples
    found = KeyedPermutation(samples, 0)(0, positions)
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < samples


@given(st.integers(1, 5000), st.lists(st.integers(0, 1 << 30), max_size=50))
def test_a_position_has_its_sample_whatever_else_is_asked_for(samples: int, numbers: list[int]) -> None:
    positions = np.array(numbers, np.int64) % samples
    assert np.array_equal(KeyedPermutation(samples, 0)(0, positions), epoch_of(samples)[positions])
    assert np.array_equal(positions, np.array(numbers, np.int64) % samples), "what is handed in stays as it is"


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    found = {tuple(epoch_of(50, seed=seed, epoch=epoch)) for seed in range(10) for epoch in range(10)}
    assert len(found) == 100
    assert tuple(epoch_of(50, seed=3, epoch=4)) in found


@pytest.mark.parametrize("samples", [2, 3, 10, 32, 97])
def test_every_sample_is_at_every_position_equally_often(samples: int) -> None:
    counts = np.stack([np.bincount(column, minlength=samples) for column in orders(samples).T])
    assert square_is_plausible(counts)


@pytest.mark.parametrize("samples", [10, 32, 97])
def test_neighbours_are_as_far_apart_as_chance_would_have_them(samples: int) -> None:
    distances = np.diff(orders(samples)).ravel() % samples
    assert is_plausible(chi_square(np.bincount(distances, minlength=samples)[1:]), free=samples - 2)


@pytest.mark.parametrize("samples", [10, 97])
def test_an_epoch_says_nothing_of_the_next_one(samples: int) -> None:
    """The sample at a position, and the one at the same position an epoch later: every pair is equally likely."""
    rows = orders(samples)
    pairs = rows[:-1] * samples + rows[1:]
    counts = np.bincount(pairs.ravel(), minlength=samples * samples)
    assert square_is_plausible(counts.reshape(samples, samples))


def test_of_many_samples_neighbours_and_epochs_are_uncorrelated() -> None:
    samples, count = 10**8, 100_000
    order = KeyedPermutation(samples, 0)
    one, other = (order(epoch, np.arange(count)) / samples for epoch in (0, 1))
    for a, b in ((one[:-1], one[1:]), (one, other), (one, np.arange(count))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(count)
    assert is_plausible(chi_square(np.histogram(one, bins=100, range=(0, 1))[0]), free=99)
