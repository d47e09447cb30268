"""Who serves each shard, and where its copy is to be: coordinator/shard_copies.py."""

import pytest

from disttrain_trainer.coordinator.shard_copies import Choice, Copies, Held, choose, replaced

PRIMARY, COPY, FILLING = Held(1, True, True), Held(1, False, True), Held(1, False, False)


def test_each_shard_is_served_by_its_primary_while_that_is_there() -> None:
    held = {0: {0: PRIMARY, 1: COPY}, 1: {1: PRIMARY, 0: COPY}}
    assert choose(held, shards=2) == [Choice(0, 1, False), Choice(1, 1, False)]
    assert replaced(held, [Choice(0, 1, False), Choice(1, 1, False)]) == {}


def test_complete_copy_takes_the_place_of_a_lost_primary() -> None:
    assert choose({1: {1: PRIMARY, 0: COPY}}, shards=2) == [Choice(1, 2, True), Choice(1, 1, False)]


@pytest.mark.parametrize("held", [{1: {1: PRIMARY, 0: FILLING}}, {1: {1: PRIMARY}}, {}])
def test_round_is_lost_with_a_shard_that_has_no_complete_copy(held: dict[int, dict[int, Held]]) -> None:
    assert choose(held, shards=2) is None


def test_primary_that_was_replaced_while_it_was_away_is_not_the_primary_any_more() -> None:
    second = Held(2, True, True)
    held = {0: {0: PRIMARY}, 1: {0: second, 1: PRIMARY}}
    choices = choose(held, shards=2)
    assert choices == [Choice(1, 2, False), Choice(1, 1, False)]
    assert replaced(held, choices) == {0: [(0, 1)]}


def test_copy_of_a_later_primary_is_preferred_to_an_earlier_primary() -> None:
    held = {0: {0: PRIMARY}, 1: {1: PRIMARY}, 2: {2: PRIMARY, 0: Held(2, False, True)}}
    choices = choose(held, shards=3)
    assert choices is not None
    assert choices[0] == Choice(2, 3, True)
    assert replaced(held, choices) == {0: [(0, 1)]}


def test_copy_lies_on_the_next_server_and_on_the_shards_own_once_the_next_one_serves_it() -> None:
    copies = Copies(shards=3, count=2)
    assert copies.wanted([0, 1, 2], {0, 1, 2}) == [(0, 0, 1), (1, 1, 2), (2, 2, 0)]
    assert copies.wanted([0, 1, 2], {0, 1, 2}) == [], "they are ordered already"
    assert copies.lost(0) == [2]
    assert copies.wanted([1, 1, 2], {1, 2}) == [], "its places are not there"
    assert copies.wanted([1, 1, 2], {0, 1, 2}) == [(0, 1, 0), (2, 2, 0)]


def test_copy_that_failed_is_ordered_again() -> None:
    copies = Copies(shards=2, count=2)
    copies.wanted([0, 1], {0, 1})
    copies.failed(1)
    assert copies.wanted([0, 1], {0, 1}) == [(1, 1, 0)]


def test_without_replication_no_copy_is_wanted() -> None:
    assert Copies(shards=2, count=1).wanted([0, 1], {0, 1}) == []
