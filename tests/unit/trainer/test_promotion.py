"""The coordinator of parameter servers whose shards have copies: what it orders, and what it does when a server is lost."""

from typing import Any

import pytest

from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member
from unit.trainer.served import SERVERS, WORKERS, Table


class Replicated(Table):
    """A training that has begun, with two servers for each shard; what the servers are told is kept."""

    def __init__(self, **options: Any) -> None:
        self._told: list[tuple[int, MessageType, dict[str, Any]]] = []
        super().__init__(replication=2, **options)
        self.join(*SERVERS, *WORKERS)

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        super().send(member, kind, **fields)
        if member in SERVERS:
            self._told.append((member.rank, kind, fields))

    def orders(self, kind: MessageType) -> list[tuple[int, dict[str, Any]]]:
        """What the servers were told of this kind since the last time."""
        told, self._told = self._told, []
        return [(server, fields) for server, of, fields in told if of is kind]


def replicated() -> Replicated:
    """With a copy of each shard on the other server."""
    table = Replicated()
    for shard in range(2):
        copied(table, shard)
    table.take()
    table.orders(MessageType.REPLICATE)
    return table


def copied(table: Table, shard: int, *, term: int = 1, complete: bool = True, primary: int | None = None) -> None:
    """The primary of a shard says that its copy on the other server is complete, or lost."""
    primary = shard if primary is None else primary
    said = {"type": MessageType.COPY, "generation": 1, "shard": shard, "term": term, "server": 1 - primary}
    table.training.on_message(SERVERS[primary], said | {"complete": complete}, table.now)


def test_copies_are_ordered_when_the_round_is_open() -> None:
    assert Replicated().orders(MessageType.REPLICATE) == [
        (0, {"shard": 0, "server": 1}),
        (1, {"shard": 1, "server": 0}),
    ]


def test_lost_server_is_replaced_by_the_complete_copies_of_its_shards_and_no_part_is_done_again() -> None:
    table = replicated()
    for worker in WORKERS:
        table.work(worker, 1)
    table.take()
    table.training.lost(SERVERS[0], table.now)
    said = table.take()
    assert (SERVERS[1], MessageType.PROMOTE, {"shards": [(0, 2)]}) in said
    assert [member for member, kind, _ in said if kind is MessageType.REFORM] == WORKERS
    table.said = said
    table.serve()
    invited = {member: fields for member, kind, fields in table.take(MessageType.ROUND)}
    assert set(invited) == set(WORKERS)
    assert {(fields["generation"], tuple(fields["primaries"])) for fields in invited.values()} == {(1, (1, 1))}
    assert table.tracker.step == 1
    assert table.tracker.promotions == 1
    assert table.tracker.redone_steps == 0
    assert table.work(WORKERS[0], 0)[0] == 2


def test_server_that_comes_back_gets_the_copies_of_both_shards() -> None:
    table = replicated()
    table.training.lost(SERVERS[0], table.now)
    table.serve()
    table.take()
    table.round_number[SERVERS[0]] = 0
    table.join(SERVERS[0])
    assert table.orders(MessageType.REPLICATE)[-2:] == [(1, {"shard": 0, "server": 0}), (1, {"shard": 1, "server": 0})]


def test_server_that_was_only_away_gives_up_what_has_another_primary() -> None:
    table = replicated()
    table.training.lost(SERVERS[0], table.now)
    table.serve()
    table.take()
    table.join(SERVERS[0])
    assert table.orders(MessageType.DISCARD) == [(0, {"shards": [(0, 1)]})]


def test_without_a_complete_copy_the_server_is_waited_for() -> None:
    table = replicated()
    copied(table, 0, complete=False)
    table.training.lost(SERVERS[0], table.now)
    assert table.orders(MessageType.PROMOTE) == []
    assert table.training.waiting_for(table.now) == "parameter-server-0 (0 s)"
    table.round_number[SERVERS[0]] = 0
    table.join(SERVERS[0])
    assert table.round_number == dict.fromkeys(SERVERS, 2)


def test_copy_that_is_lost_is_ordered_again_with_the_next_tick() -> None:
    table = replicated()
    copied(table, 0, complete=False)
    assert table.orders(MessageType.REPLICATE) == []
    table.training.tick(table.now)
    assert table.orders(MessageType.REPLICATE) == [(0, {"shard": 0, "server": 1})]


def test_report_of_a_copy_in_an_earlier_round_counts_for_nothing() -> None:
    table = Replicated()
    said = {"type": MessageType.COPY, "generation": 7, "shard": 0, "term": 1, "server": 1, "complete": True}
    table.training.on_message(SERVERS[0], said, table.now)
    table.training.lost(SERVERS[0], table.now)
    assert table.orders(MessageType.PROMOTE) == []


def test_replacement_of_a_lost_copy_leaves_workers_where_they_are() -> None:
    table = replicated()
    table.training.lost(SERVERS[0], table.now)
    table.serve()
    table.take()
    table.round_number[SERVERS[0]] = 0
    table.join(SERVERS[0])
    table.take()
    table.training.lost(SERVERS[0], table.now)
    said = table.take()
    assert [kind for _, kind, _ in said] == [MessageType.REPLICATE] * 2
    assert all(fields["server"] is None for _, _, fields in said)


def test_synchronous_copy_that_did_not_follow_on_takes_all_shards_back_to_the_checkpoint() -> None:
    """Both shards are on one server then: what it says of all of them does not show which one is behind."""
    table = replicated()
    table.training.lost(SERVERS[0], table.now)
    (question,) = table.orders(MessageType.DROP)
    said = {"type": MessageType.STATE, "id": question[1]["id"], "generation": 1, "applied": [], "ahead": 2}
    table.training.on_message(SERVERS[1], said, table.now)
    table.round_number[SERVERS[0]] = 0
    table.join(SERVERS[0])
    assert table.round_number == dict.fromkeys(SERVERS, 2)


def said_by(table: Table, server: int, *shards: tuple[int, int, bool, bool]) -> None:
    """A server says which shards it holds: (shard, term, primary, complete)."""
    said = table.state(SERVERS[server]) | {"type": MessageType.STATE, "shards": [list(one) for one in shards]}
    table.training.on_message(SERVERS[server], said, table.now)


@pytest.mark.parametrize("before", [True, False], ids=["before the loss", "after it"])
def test_process_that_leaves_waits_for_the_copies_of_a_lost_server_and_is_released_after_a_checkpoint(
    before: bool,
) -> None:
    table = replicated()
    for worker in WORKERS:
        table.work(worker, 1, ask=1)
    assert table.tracker.step == 1
    leaves = [lambda: table.training.terminate(table.now), lambda: table.training.lost(SERVERS[0], table.now)]
    for happens in leaves if before else reversed(leaves):
        happens()
    assert not table.training.released
    table.serve()
    assert table.on_disk is None, "shard 1 says nothing of shard 0, which it serves, too"
    for shard in range(2):
        saved = {"type": MessageType.SAVED, "id": "m.1" if not before else "m.2", "shard": shard, "digest": "x"}
        table.training.on_message(SERVERS[1], saved | {"file": f"shard-{shard}", "applied": [[0, 2]]}, table.now)
    assert table.on_disk is not None
    assert table.on_disk.step == 1
    assert table.training.released


def test_process_that_leaves_is_released_when_a_lost_server_has_no_copy() -> None:
    table = Replicated()
    for worker in WORKERS:
        table.work(worker, 1, ask=1)
    table.training.terminate(table.now)
    table.training.lost(SERVERS[0], table.now)
    assert table.training.released


def test_promotion_that_a_lost_master_ordered_last_is_undone_by_the_new_one() -> None:
    table = Replicated(slow=True)
    table.round_number = dict.fromkeys(SERVERS, 3)
    for server in range(2):
        hello = table.state(SERVERS[server]) | {"shards": [[server, 1, True, True], [1 - server, 1, False, True]]}
        table.training.joined(SERVERS[server], hello, table.now)
    table.find_at_last()
    table.orders(MessageType.DISCARD)
    said_by(table, 1, (1, 1, True, True), (0, 2, True, True))
    assert table.orders(MessageType.DISCARD) == [(1, {"shards": [(0, 2)]})]
    said_by(table, 0, (0, 1, True, True), (1, 1, False, True))
    assert table.orders(MessageType.DISCARD) == []


def test_checkpoint_is_not_hurried_for_a_member_that_is_lost_while_copies_take_over() -> None:
    table = Replicated(consistency="Async", steps=100, every=50)
    for shard in range(2):
        copied(table, shard)
    table.work(WORKERS[0], 3, ask=3)
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, table.now)
    table.training.lost(SERVERS[0], table.now)
    table.training.lost(WORKERS[1], table.now)
    table.serve()
    table.orders(MessageType.SAVE)
    table.training.tick(100)
    assert table.orders(MessageType.SAVE) == []
