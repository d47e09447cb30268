"""On a GPU the optimiser takes no step before the sums of a step are there, and none at all when the world ended meanwhile."""

import pytest

from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.replicate import Replicated


class Work:
    """A sum that is done after so many looks."""

    def __init__(self, looks: int = 0, error: Exception | None = None) -> None:
        self.looks = looks
        self._error = error

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        assert self.looks < 0

    def exception(self) -> Exception | None:
        return self._error


def replica(*works: Work) -> Replicated:
    made = Replicated.__new__(Replicated)  # a GPU's sums need a GPU
    made._works = list(works)  # type: ignore[arg-type]
    return made


def test_it_waits_for_every_sum() -> None:
    works = [Work(3), Work(5)]
    replica(*works).await_sums(lambda: True)
    assert all(work.looks < 0 for work in works)


def test_a_sum_that_was_aborted_with_its_round_is_none() -> None:
    with pytest.raises(BrokenGroup, match="within a step"):
        replica(Work()).await_sums(lambda: False)


def test_the_end_of_a_round_ends_the_wait() -> None:
    alive = iter([True, True, False, False])
    with pytest.raises(BrokenGroup):
        replica(Work(10**9)).await_sums(lambda: next(alive))


def test_a_sum_that_failed_breaks_the_group() -> None:
    with pytest.raises(BrokenGroup, match="NCCL says no"):
        replica(Work(error=RuntimeError("NCCL says no"))).await_sums(lambda: True)
