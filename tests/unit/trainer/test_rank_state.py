"""Which step's state a rank of DataParallel holds, when the rank that gives it is lost on the way."""

from types import SimpleNamespace
from typing import Any

import pytest

from disttrain_trainer.errors import PeerLost
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.strategies.collective import DataParallel


def rank_with(*, number: int, step: int, broadcast: Any) -> tuple[DataParallel, CollectiveMember]:
    """A rank that holds the state of a step, and gets the state of others by `broadcast`."""
    loop = DataParallel.__new__(DataParallel)
    loop._rank = rank = CollectiveMember()
    rank.step = step
    loop._process = SimpleNamespace(rank=number)  # type: ignore[assignment]
    loop._task = SimpleNamespace(device=None)  # type: ignore[assignment]
    loop._state = SimpleNamespace(broadcast=broadcast)  # type: ignore[assignment]
    return loop, rank


def breaking(**_: Any) -> int:
    raise BrokenGroup(RuntimeError("closed by peer"))


@pytest.mark.parametrize(("number", "left"), [(0, -1), (1, 40)], ids=["who takes it over", "who gives it"])
def test_a_rank_that_has_half_of_a_state_says_that_it_has_none_and_the_one_that_gives_it_keeps_its_own(
    number: int, left: int
) -> None:
    loop, rank = rank_with(number=number, step=40, broadcast=breaking)
    with pytest.raises(BrokenGroup):
        loop._take_newest(Round(2, source=1))
    assert rank.step == left


def test_a_rank_that_has_taken_a_state_over_is_at_its_step() -> None:
    loop, rank = rank_with(number=0, step=-1, broadcast=lambda **_: 41)
    loop._take_newest(Round(2, source=1))
    assert rank.step == 41


def test_a_source_without_a_state_is_refused() -> None:
    loop, _ = rank_with(number=0, step=3, broadcast=lambda **_: -1)
    with pytest.raises(PeerLost, match="worker-1: it has no whole state to give"):
        loop._take_newest(Round(2, source=1))
