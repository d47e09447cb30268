"""Which step's state a rank of DataParallel holds, when the rank that gives it is lost on the way."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disttrain_trainer.errors import PeerLost
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.strategies.collective import take_newest


def take_over(rank: CollectiveMember, *, number: int, broadcast: Any) -> None:
    """A rank gets the state of rank 1 by `broadcast`."""
    state: Any = SimpleNamespace(broadcast=broadcast)
    take_newest(rank, Round(2, source=1), state=state, own=number, device=torch.device("cpu"))


def rank_at(step: int) -> CollectiveMember:
    rank = CollectiveMember()
    rank.step = step
    return rank


def breaking(**_: Any) -> int:
    raise BrokenGroup(RuntimeError("closed by peer"))


@pytest.mark.parametrize(("number", "left"), [(0, -1), (1, 40)], ids=["who takes it over", "who gives it"])
def test_a_rank_that_has_half_of_a_state_says_that_it_has_none_and_the_one_that_gives_it_keeps_its_own(
    number: int, left: int
) -> None:
    rank = rank_at(40)
    with pytest.raises(BrokenGroup):
        take_over(rank, number=number, broadcast=breaking)
    assert rank.step == left


def test_a_rank_that_has_taken_a_state_over_is_at_its_step() -> None:
    rank = rank_at(-1)
    take_over(rank, number=0, broadcast=lambda **_: 41)
    assert rank.step == 41


def test_a_source_without_a_state_is_refused() -> None:
    with pytest.raises(PeerLost, match="worker-1: it has no whole state to give"):
        take_over(rank_at(3), number=0, broadcast=lambda **_: -1)
