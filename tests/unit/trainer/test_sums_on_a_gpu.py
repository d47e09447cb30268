"""On a GPU the optimiser takes no step before the sums of a step are there, and none at all when the round ended meanwhile."""

import pytest

from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.replicate import await_sums


class Work:
    """A sum that is done after so many looks."""

    def __init__(self, looks: int = 0, error: Exception | None = None) -> None:
        self.looks = looks
        self._error = error

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def exception(self) -> Exception | None:
        return self._error


def test_it_waits_for_every_sum() -> None:
    works = [Work(3), Work(5)]
    await_sums([*works], lambda: True)
    assert all(work.looks < 0 for work in works)


def test_a_sum_that_was_aborted_with_its_round_is_none() -> None:
    with pytest.raises(BrokenGroup, match="within a step"):
        await_sums([Work()], lambda: False)


def test_the_end_of_a_round_ends_the_wait() -> None:
    alive = iter([True, True, False, False])
    with pytest.raises(BrokenGroup):
        await_sums([Work(10**9)], lambda: next(alive))


def test_a_sum_that_failed_breaks_the_group() -> None:
    with pytest.raises(BrokenGroup, match="NCCL says no"):
        await_sums([Work(error=RuntimeError("NCCL says no"))], lambda: True)
