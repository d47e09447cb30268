"""The master's part in the norm of a gradient that lies on several servers."""

import math
from typing import Any

from disttrain_trainer.coordinator.gradient_norms import GradientNorms
from disttrain_trainer.net.incoming import parse
from disttrain_trainer.net.messages import MessageType


def norms(*, terms: tuple[int, int] = (1, 1)) -> GradientNorms:
    """Of two shards on the servers of their numbers, which serve them by these terms."""
    return GradientNorms(shards=2, serves=lambda server, shard, term: server == shard and term == terms[shard])


def squares(shard: int, value: float, *, version: int = 1, term: int = 1, round_number: int = 1) -> dict[str, Any]:
    part = {"shard": shard, "term": term, "version": version, "scale": 0.5, "nodes": [[[0, shard, value]], []]}
    return parse({"type": MessageType.NORM, "generation": round_number, "norms": [part]})


def stepped(shard: int, norm: float, *, version: int = 1, round_number: int = 1) -> dict[str, Any]:
    part = {"shard": shard, "term": 1, "version": version, "norm": norm}
    return parse({"type": MessageType.NORM, "generation": round_number, "norms": [part]})


def test_the_norm_is_told_once_every_shard_has_said_its_squares() -> None:
    found = norms()
    assert found.know(0, squares(0, 9.0)) == []
    assert found.newest is None
    assert found.know(1, squares(1, 16.0)) == [(1, 2.5)]
    assert found.newest == 2.5


def test_a_server_that_asks_again_is_told_again_the_first_norm() -> None:
    """Its sum was computed once more, with other bits: the other shard has made the step already."""
    found = norms()
    found.know(0, squares(0, 9.0))
    found.know(1, squares(1, 16.0))
    assert found.know(1, squares(1, 17.0)) == [(1, 2.5)]
    assert found.know(0, stepped(0, 2.5)) == []


def test_a_new_master_learns_what_the_one_before_has_decided() -> None:
    found = norms()
    assert found.know(0, squares(0, 9.0)) == []
    assert found.know(1, stepped(1, 2.4)) == []
    assert found.know(0, squares(0, 9.0)) == [(1, 2.4)]


def test_a_server_that_was_replaced_says_nothing_that_counts() -> None:
    found = norms(terms=(2, 1))
    found.know(1, squares(1, 16.0))
    assert found.know(0, squares(0, 9.0, term=1)) == []
    assert found.know(0, squares(0, 0.0, term=2)) == [(1, 2.0)]


def test_another_round_begins_with_nothing_and_an_earlier_one_is_over() -> None:
    found = norms()
    found.know(0, squares(0, 9.0))
    assert found.know(1, squares(1, 16.0, round_number=2)) == []
    assert found.know(0, squares(0, 9.0)) == []
    assert found.know(0, squares(0, 9.0, round_number=2)) == [(1, 2.5)]
    assert found.round_number == 2


def test_a_norm_that_is_not_finite_is_told_as_it_is() -> None:
    found = norms()
    found.know(0, squares(0, math.inf))
    assert found.know(1, squares(1, 1.0)) == [(1, math.inf)]
    found.know(0, squares(0, math.nan, version=2))
    ((version, norm),) = found.know(1, squares(1, 1.0, version=2))
    assert version == 2
    assert math.isnan(norm)


def test_no_more_is_kept_than_the_newest_steps() -> None:
    found = norms()
    for version in range(1, 50):
        found.know(0, squares(0, 9.0, version=version))
        assert found.know(1, squares(1, 16.0, version=version)) == [(version, 2.5)]
    assert found.know(0, squares(0, 9.0, version=3)) == []
    assert found.newest == 2.5
