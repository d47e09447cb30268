"""What the master of parameter servers decides when a process is lost at the worst moment, itself included."""

import pytest

from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.coordinator.parameter_server import RETURN_SECONDS
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member
from unit.trainer.served import SERVERS, WORKERS, Table, finish, training


def taken_over(**options: object) -> Table:
    """A new master of two servers in round 3; no worker has come yet, and no server has answered."""
    table = Table(**options)
    for server in SERVERS:
        table.round_number[server], table.applied[server] = 3, {0, 1, 2}
        table.training.joined(server, table.state(server), 0)
    return table


def messages_to(table: Table, member: Member) -> list[MessageType]:
    return [kind for to, kind, _ in table.take() if to == member]


def test_a_new_master_drops_every_worker_so_that_none_waits_for_one_that_was_lost_with_the_old_one() -> None:
    table = taken_over(consistency="BoundedStaleness")
    drops = [(member, fields["ranks"]) for member, kind, fields in table.said if kind is MessageType.DROP]
    assert drops == [(server, [0, 1]) for server in SERVERS]


def test_a_new_master_invites_no_worker_before_every_server_has_dropped_all() -> None:
    # Else a server that is late would drop a worker that has a new lease.
    table = taken_over()
    table.training.joined(WORKERS[0], {"samples": 80, "buffers": False}, 0)
    assert [kind for member, kind, _ in table.said if member == WORKERS[0]] == []
    table.serve()
    assert [kind for member, kind, _ in table.said if member == WORKERS[0]] == [MessageType.ROUND]


def test_a_new_master_asks_again_when_a_server_is_lost_before_it_has_dropped_the_workers() -> None:
    table = taken_over()
    table.training.lost(SERVERS[1], 0)
    table.take()
    table.join(SERVERS[1], WORKERS[0])
    assert [kind for member, kind, _ in table.said if member == WORKERS[0]] == [MessageType.ROUND]


def test_a_server_that_did_not_get_the_order_to_drop_a_worker_gets_it_when_it_is_back() -> None:
    table = training(consistency="BoundedStaleness")
    table.training.lost(SERVERS[1], 1)
    table.training.lost(WORKERS[1], 1)
    table.take()
    table.training.joined(SERVERS[1], table.state(SERVERS[1]), 2)
    assert [(m, fields["ranks"]) for m, kind, fields in table.said if kind is MessageType.DROP and m == SERVERS[1]] == [
        (SERVERS[1], [1])
    ]


@pytest.mark.parametrize("lost", [SERVERS, SERVERS[:1]], ids=["all servers", "one server"])
def test_servers_that_are_lost_before_the_first_worker_is_ready_are_waited_for(lost: list[Member]) -> None:
    table = Table()
    table.join(*SERVERS)
    for server in lost:
        table.training.lost(server, 1)
    table.join(WORKERS[0])
    assert table.take(MessageType.ROUND) == []
    for server in lost:
        table.training.joined(server, table.state(server), 2)
    ((member, _, fields),) = table.take(MessageType.ROUND)
    assert (member, fields["generation"]) == (WORKERS[0], 1)


def test_a_server_that_has_begun_while_its_connection_was_down_is_not_waited_for() -> None:
    table = Table()
    for server in SERVERS:
        table.training.joined(server, table.state(server), 0)
    table.training.joined(WORKERS[0], {"samples": 80, "buffers": False}, 0)
    table.training.lost(SERVERS[1], 1)
    for server in SERVERS:
        table.round_number[server] = 1
    table.training.on_message(SERVERS[0], {"type": MessageType.STATE, **table.state(SERVERS[0])}, 1)
    table.take()
    table.training.joined(SERVERS[1], table.state(SERVERS[1]), 2)
    assert [member for member, _, _ in table.take(MessageType.ROUND)] == [WORKERS[0]]


def test_a_server_that_carries_out_the_last_order_of_a_lost_master_only_now_takes_everybody_with_it() -> None:
    table = taken_over()
    table.serve()
    table.join(WORKERS[0])
    table.take()
    table.training.on_message(SERVERS[1], {"type": MessageType.STATE, "generation": 4, "applied": []}, 1)
    assert {fields["generation"] for _, kind, fields in table.said if kind is MessageType.BEGIN} == {5}


def test_parts_of_a_worker_that_starts_again_while_another_waits_for_them_recall_the_other() -> None:
    # The connection of a worker to a server broke, and that to the master did not: no process was lost.
    table = training()
    assert table.work(WORKERS[1], 0) == [1, 3, 5, 7]
    assert table.work(WORKERS[0], 0) == [0, 2, 4, 6]
    table.training.on_message(WORKERS[1], {"type": MessageType.READY, "samples": 80}, 1)
    table.serve()
    said = table.take()
    assert [kind for member, kind, _ in said if member == WORKERS[0]] == [MessageType.REFORM]
    assert [kind for member, kind, _ in said if member == WORKERS[1]] == [MessageType.ROUND]
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    table.serve()
    assert messages_to(table, WORKERS[1]) == [], "a worker that was called away calls no other one away"
    assert table.work(WORKERS[0], 0)[0] == 0
    assert table.work(WORKERS[1], 0)[0] == 1


@pytest.mark.parametrize("consistency", ["Sync", "Async"])
@pytest.mark.parametrize("lost", [True, False], ids=["a worker is lost", "a worker starts again"])
def test_no_part_is_handed_out_again_before_the_servers_have_said_which_are_applied(
    lost: bool, consistency: str
) -> None:
    """Of those that no worker has reported: a script would get a batch whose step has returned once more."""
    table = training(consistency=consistency)
    assert sorted(table.work(WORKERS[1], 0, ask=2) + table.work(WORKERS[0], 0, ask=2)) == [0, 1, 2, 3]
    for applied in table.applied.values():
        applied |= {0, 1}
    if lost:
        table.training.lost(WORKERS[1], 1)
    for worker in WORKERS[: 1 if lost else 2]:
        table.training.on_message(worker, {"type": MessageType.READY, "samples": 80}, 1)
        asks = {"type": MessageType.REQUEST, "stay": table.lease[worker], "count": 2, "done": []}
        table.training.on_message(worker, asks, 1)
    assert MessageType.ASSIGN not in [kind for _, kind, _ in table.said]
    table.serve()
    handed_out = sorted(part for _, _, fields in table.take(MessageType.ASSIGN) for part in fields["slices"])
    assert handed_out == ([2, 3] if lost else [2, 3, 4, 5])


def test_a_part_that_is_pushed_while_the_others_are_called_away_is_not_handed_out_again() -> None:
    """The worker pushes until it gets to know that another one is lost; by then the servers may have answered."""
    table = training()
    assert [table.work(worker, 0, ask=2) for worker in WORKERS] == [[0, 2], [1, 3]]
    table.training.lost(WORKERS[1], 1)
    table.serve()
    for applied in table.applied.values():
        applied.add(0)
    table.join(WORKERS[1])
    assert table.work(WORKERS[1], 0, ask=2) == [1, 3]
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    assert not table.work(WORKERS[0], 0, ask=2)
    table.training.tick(9)
    table.serve()
    assert [fields["slices"] for _, _, fields in table.take(MessageType.ASSIGN)] == [[2, 4]]


def begun(
    *parts: int, number: int = 1, servers: tuple[str, ...] = ("s0", "s1"), lease: str = "old.2"
) -> dict[str, object]:
    """A worker's claim that it may have begun these parts."""
    fields = {"generation": number, "stay": lease, "servers": list(servers), "slices": list(parts)}
    return {"samples": 80, "begun": fields}


@pytest.mark.parametrize("consistency", ["Sync", "Async"])
def test_the_part_that_a_worker_has_begun_is_its_own_once_the_servers_have_said_what_they_have(
    consistency: str,
) -> None:
    table = training(consistency=consistency)
    assert [table.work(worker, 0, ask=1) for worker in WORKERS] == [[0], [1]]
    claim = begun(
        1, servers=("s8", "s9"), lease=table.lease[WORKERS[1]]
    )  # the copies have taken the places of all primaries
    table.training.on_message(WORKERS[1], {"type": MessageType.READY} | claim, 1)
    table.serve()
    said = [(kind, fields.get("slices")) for member, kind, fields in table.said if member == WORKERS[1]]
    assert said == [(MessageType.ROUND, None), (MessageType.ASSIGN, [1])]


@pytest.mark.parametrize(
    "claim",
    [begun(1, number=0), begun(1, servers=("s2", "s3")), begun(0)],
    ids=["of a lost round", "of a lost round of the same number", "of another worker"],
)
def test_a_part_that_a_worker_has_computed_is_not_its_own(claim: dict[str, object]) -> None:
    table = training(consistency="Async")
    assert [table.work(worker, 0, ask=1) for worker in WORKERS] == [[0], [1]]
    table.training.on_message(WORKERS[1], {"type": MessageType.READY} | claim, 1)
    table.serve()
    assert messages_to(table, WORKERS[1]) == [MessageType.ROUND]


def test_a_new_master_gives_a_worker_the_part_that_it_has_begun_and_no_other_worker_gets_it() -> None:
    """The old master had assigned parts 0, 2 and 4 to the worker; every server has part 0."""
    table = Table(consistency="Async")
    for server in SERVERS:
        table.round_number[server], table.applied[server] = 1, {0}
        table.join(server)
    table.join(WORKERS[0], samples=80)
    table.serve()
    table.join(WORKERS[1], **begun(0, 2, 4))
    table.serve()
    assert [(member, fields["slices"]) for member, _, fields in table.take(MessageType.ASSIGN)] == [(WORKERS[1], [2])]
    assert table.work(WORKERS[0], 0, ask=2) == [1, 3]


def test_a_new_master_of_a_script_assigns_no_part_before_every_worker_is_back_or_taken_for_lost() -> None:
    """A worker that is not back may have begun any part."""
    table = Table(consistency="Async", model=None, dataset=None, script={"file": "train.py"})
    for server in SERVERS:
        table.round_number[server] = 1
        table.join(server)
    table.join(WORKERS[0])
    assert table.work(WORKERS[0], 0, ask=2) == []
    table.training.tick(RETURN_SECONDS)
    assert [fields["slices"] for _, _, fields in table.take(MessageType.ASSIGN)] == [[0, 1]]


def test_a_new_master_leaves_out_what_a_worker_says_that_comes_when_the_round_is_open() -> None:
    table = Table(consistency="Async", nanPolicy={"rollBacks": 2})
    for server in SERVERS:
        table.round_number[server] = 2
        table.join(server)
    table.join(WORKERS[0])
    course = Course().without([4], "worker-1 at step 2")
    table.join(WORKERS[1], generation=2, course=course.model_dump())
    assert table.tracker.course.left_out == [4]
    assert table.amended == [course]


def test_a_worker_without_parts_recalls_no_other_when_it_starts_again() -> None:
    table = training()
    table.work(WORKERS[0], 0)
    table.training.on_message(WORKERS[1], {"type": MessageType.READY, "samples": 80}, 1)
    assert messages_to(table, WORKERS[0]) == []


def test_a_round_without_a_checkpoint_is_from_scratch_and_one_from_a_checkpoint_is_not() -> None:
    table = training()
    table.work(WORKERS[0], 4)
    table.work(WORKERS[1], 4)
    table.serve()
    table.take()
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    ((_, _, fields),) = table.take(MessageType.ROUND)
    assert fields["anew"] is False
    table = Table(volume=False)
    table.join(*SERVERS, WORKERS[0])
    ((_, _, fields),) = table.take(MessageType.ROUND)
    assert fields["anew"] is True


def test_a_worker_that_is_lost_when_all_is_applied_calls_no_evaluator_away() -> None:
    table = training(evaluate=True)
    finish(table)
    table.take()
    table.training.lost(WORKERS[1], 9)
    assert messages_to(table, WORKERS[0]) == []


@pytest.mark.parametrize("lost_one", [False, True])
def test_servers_that_come_before_the_checkpoint_folder_is_read_wait_for_what_is_in_it(lost_one: bool) -> None:
    before = training()
    for worker in WORKERS:
        before.work(worker, 4)
    before.serve()
    table = Table(slow=True)
    table.on_disk = before.on_disk
    table.join(*SERVERS, *WORKERS)
    assert table.take(MessageType.BEGIN, MessageType.ROUND) == []
    if lost_one:
        table.training.lost(SERVERS[1], 0)
        table.join(SERVERS[1])
    table.find_at_last()
    assert table.applied == {server: set(range(8)) for server in SERVERS}
    assert table.tracker.step == 4
    assert table.tracker.round_number == 1


def test_servers_that_come_back_while_the_folder_is_read_once_more_begin_from_what_is_in_it() -> None:
    table = training()
    for worker in WORKERS:
        table.work(worker, 4)
    table.serve()
    table.slow = True
    for server in SERVERS:
        table.training.lost(server, 0)
        table.round_number[server], table.applied[server] = 0, set()
    table.join(*SERVERS)
    assert table.take(MessageType.BEGIN) == []
    table.find_at_last()
    assert table.applied == {server: set(range(8)) for server in SERVERS}
    assert table.tracker.round_number == 2
