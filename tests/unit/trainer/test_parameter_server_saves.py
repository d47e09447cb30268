"""The checkpoints of parameter servers when something is in the way: a slow server, a full volume, SIGTERM, the end of the job."""

from typing import Any

import pytest

from disttrain_trainer.checkpoint import final
from disttrain_trainer.errors import CRASHED
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member
from unit.trainer.served import SERVERS, STEPS, WORKERS, Table, finish, shard, training


def due(**options: Any) -> tuple[Table, str]:
    """A training whose first checkpoint was ordered, and not written yet; and the id of the save."""
    table = training(**options)
    table.work(WORKERS[0], 4)
    table.work(WORKERS[1], 4)
    (save,) = {fields["id"] for _, kind, fields in table.take(MessageType.SAVE)}
    return table, save


def write(table: Table, number: int, save: str, digest: str = "x") -> None:
    """A server says that it wrote its file."""
    server = SERVERS[number]
    said = {"type": MessageType.SAVED, "id": save, "file": shard(server, save), "digest": digest}
    table.training.on_message(server, said | table.state(server), 0)


def copied(table: Table, member: Member, save: str) -> None:
    """A server or a worker says that it copied what it is to write."""
    table.training.on_message(member, {"type": MessageType.COPIED, "id": save}, 0)


def until_evaluated(table: Table, *workers: Member) -> Member:
    """These work until one is asked to evaluate; who."""
    while not (asked := [member for member, kind, _ in table.said if kind is MessageType.EVALUATE]):
        for worker in workers:
            table.work_on(worker)
            table.serve()
    table.take()
    return asked[0]


def at(table: Table, now: float) -> None:
    """Time passes."""
    table.now = now
    table.training.tick(now)
    table.serve()


def test_what_is_written_for_a_save_that_was_given_up_counts_in_no_other() -> None:
    table, first = due()
    table.training.lost(SERVERS[1], 0)
    table.training.joined(SERVERS[1], table.state(SERVERS[1]), 0)
    (second,) = {fields["id"] for _, kind, fields in table.take(MessageType.SAVE)}
    write(table, 0, first, "of the first")
    write(table, 1, second, "of the second")
    assert table.on_disk is None
    write(table, 0, second, "of the second")
    assert table.on_disk is not None
    assert table.on_disk.files == {shard(server, second): "of the second" for server in SERVERS}


def test_a_manifest_that_comes_after_its_save_was_given_up_ends_no_other_save() -> None:
    table, first = due()
    write(table, 0, first)
    answers: list[Any] = []
    table.publish = lambda *, answer, **_: answers.append(answer)  # type: ignore[method-assign]
    write(table, 1, first)
    table.training.lost(SERVERS[1], 0)
    table.training.joined(SERVERS[1], table.state(SERVERS[1]), 0)
    (second,) = {fields["id"] for _, kind, fields in table.take(MessageType.SAVE)}
    del table.publish  # type: ignore[method-assign]
    table.publish(step=4, parts=8, files={}, finished=False, answer=answers[0])
    for number in range(2):
        write(table, number, second)
    assert table.on_disk is not None
    assert table.on_disk.files.keys() == {shard(server, second) for server in SERVERS}


def test_it_is_said_who_keeps_a_checkpoint_waiting_and_after_the_time_out_the_training_goes_on_without() -> None:
    table, save = due()
    write(table, 0, save)
    assert table.training.waiting_for(5) is None
    assert table.training.waiting_for(20) == "checkpoint 4 to be written by parameter-server-1 (20 s)"
    at(table, 601)
    assert table.on_disk is None
    assert table.work(WORKERS[0], 0)[0] == 8


def test_a_job_whose_last_checkpoint_cannot_be_written_is_not_done_until_there_is_room() -> None:
    table = training()
    finish_but(table, full=True)
    assert not table.training.ended
    assert not table.tracker.finished
    assert table.training.waiting_for(7) == (
        "the last checkpoint, which cannot be written: [Errno 28] No space left on device (7 s)"
    )
    at(table, final.RETRY_SECONDS / 2)
    table.full = False
    at(table, final.RETRY_SECONDS * 0.9)
    assert not table.training.ended, "it was tried again at once"
    at(table, final.RETRY_SECONDS)
    assert table.training.ended
    assert table.on_disk is not None
    assert table.on_disk.finished


def test_a_master_that_cannot_write_the_last_checkpoint_ends_with_what_is_wrong_to_be_started_again() -> None:
    table = training()
    finish_but(table, full=True)
    at(table, final.GIVE_UP_SECONDS)
    with pytest.raises(final.Unsaved, match=rf"the last checkpoint, of step {STEPS}, .*No space left on device") as end:
        at(table, final.GIVE_UP_SECONDS + 1)
    assert end.value.exit_code == CRASHED
    assert not table.tracker.finished


def finish_but(table: Table, *, full: bool) -> None:
    """Works to the end; the volume is full before the last checkpoint."""
    while "cannot be written" not in (table.training.waiting_for(0) or ""):
        table.full = full and table.tracker.step >= 8
        for worker in WORKERS:
            table.work(worker, 20)
            table.serve()


def test_who_leaves_while_the_final_parameters_are_evaluated_is_released_after_a_checkpoint_of_them() -> None:
    table = training(consistency="Async", evaluate=True, every=1000)
    table.full = True
    finish(table)
    assert table.on_disk is None
    table.take()
    table.full = False
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, 0)
    assert [kind for _, kind, _ in table.said if kind in (MessageType.SAVE, MessageType.RELEASED)] == [
        MessageType.SAVE,
        MessageType.SAVE,
    ]
    table.serve()
    assert table.on_disk is not None
    assert (table.on_disk.step, table.on_disk.finished) == (STEPS, False)
    assert (WORKERS[1], MessageType.RELEASED, {}) in table.take()
    table.evaluate(WORKERS[0], 0.5)
    table.serve()
    assert table.on_disk.finished


@pytest.mark.parametrize("consistency", ["Sync", "Async"])
def test_the_final_parameters_are_saved_before_the_evaluation_which_may_fail_and_once(consistency: str) -> None:
    table = training(consistency=consistency, evaluate=True, every=1000)
    evaluator = until_evaluated(table, *WORKERS)
    assert table.on_disk is not None
    assert (table.on_disk.step, table.on_disk.finished) == (STEPS, False)
    saved = table.on_disk.files
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, 0)
    assert table.take(MessageType.SAVE, MessageType.RELEASED) == [(WORKERS[1], MessageType.RELEASED, {})]
    table.evaluate(evaluator, 0.5)
    assert table.take(MessageType.SAVE) == []
    assert table.on_disk.finished
    assert table.on_disk.files == saved
    assert table.training.ended


def test_a_volume_that_is_full_delays_the_evaluation_by_one_try() -> None:
    table = training(consistency="Async", evaluate=True, every=1000)
    table.full = True
    assert until_evaluated(table, *WORKERS) in WORKERS
    assert table.on_disk is None
    table.training.tick(1)
    assert table.take(MessageType.SAVE) == []


def test_who_leaves_while_the_last_checkpoint_is_written_is_released_after_it() -> None:
    table = training(consistency="Async", evaluate=True, every=1000)
    table.full = True
    finish(table)
    table.full = False
    table.evaluate(WORKERS[0], 0.5)
    writing = [one for one in table.said if one[1] is MessageType.SAVE]
    table.take()
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, 0)
    assert table.take(MessageType.RELEASED) == []
    table.said = writing
    table.serve()
    assert (WORKERS[1], MessageType.RELEASED, {}) in table.take()
    assert table.training.ended


def test_who_leaves_before_the_end_is_confirmed_does_not_wait_for_the_evaluation() -> None:
    table = training(consistency="Async", evaluate=True, every=1000)
    for server in SERVERS:
        table.applied[server] = set(range(2 * STEPS))
    done = {"type": MessageType.REQUEST, "stay": table.lease[WORKERS[0]], "count": 0, "done": list(range(2 * STEPS))}
    table.training.on_message(WORKERS[0], done, 0)
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, 0)
    table.serve()
    assert table.on_disk is not None
    said = table.take()
    assert (WORKERS[1], MessageType.RELEASED, {}) in said
    assert said.index((WORKERS[1], MessageType.RELEASED, {})) < said.index((WORKERS[0], MessageType.EVALUATE, {}))


def test_a_parameter_that_is_not_finite_is_no_end_of_a_job() -> None:
    table = training(consistency="Async", evaluate=True, every=1000)
    table.full = True
    finish(table)
    table.take()
    table.full = False
    table.evaluate(WORKERS[0], 0.5)
    assert len(table.take(MessageType.SAVE)) == 2
    table.training.on_message(SERVERS[1], {"type": MessageType.NAN, "step": STEPS}, 0)
    table.training.lost(SERVERS[1], 0)
    assert not table.training.ended
    assert table.tracker.nan_loss == f"parameter-server-1 at step {STEPS}"
    assert table.on_disk is None


def test_a_job_that_was_made_shorter_than_it_was_trained_is_evaluated_and_ends() -> None:
    table = Table()
    for server in SERVERS:
        table.round_number[server], table.applied[server] = 3, set(range(2 * STEPS + 4))
    table.join(*SERVERS, WORKERS[0])
    table.serve()
    assert table.training.ended


@pytest.mark.parametrize("consistency", ["Sync", "Async", "BoundedStaleness"])
@pytest.mark.parametrize("every", [4, 20])
def test_a_save_whose_server_loses_its_connection_is_made_once_it_is_back(consistency: str, every: int) -> None:
    table = training(consistency=consistency, steps=40, every=every)
    while not any(kind is MessageType.SAVE for _, kind, _ in table.said):
        for worker in WORKERS:
            table.work_on(worker)
    table.said = [one for one in table.said if one[0] != SERVERS[1]]  # the order was lost with the connection
    table.training.lost(SERVERS[1], 0)
    table.join(SERVERS[1])
    for _ in range(100):
        for worker in WORKERS:
            table.work_on(worker)
            table.serve()
    assert table.training.ended


def test_an_evaluation_of_a_round_that_is_lost_is_not_the_final_one() -> None:
    table = training(consistency="Async", evaluate=True)
    slow = until_evaluated(table, *WORKERS)
    before = table.lease[slow]
    table.training.lost(SERVERS[1], 0)
    table.round_number[SERVERS[1]], table.applied[SERVERS[1]] = 0, set()
    table.join(SERVERS[1])
    assert until_evaluated(table, *(worker for worker in WORKERS if worker != slow)) == slow, "it is there the longest"
    table.evaluate(slow, 0.1, lease=before)
    table.serve()
    assert table.tracker.evaluation is None
    assert not table.training.ended
    table.evaluate(slow, 0.9)
    table.serve()
    assert table.tracker.evaluation == {"accuracy": 0.9}
    assert table.training.ended


def test_a_worker_that_evaluates_is_not_asked_for_its_buffers_while_there_is_another() -> None:
    table = training(consistency="Async", evaluate=True, buffers=True, every=20)
    table.lost = True
    evaluator = until_evaluated(table, *WORKERS)
    table.lost = False
    table.training.on_message(SERVERS[1], {"type": MessageType.LEAVING}, 0)
    table.serve()
    (buffer_writer,) = [member for member, kind, _ in table.take(MessageType.SAVE) if member in WORKERS]
    assert buffer_writer != evaluator


def leave(table: Table, now: float = 0) -> list[MessageType]:
    """A worker leaves; which messages the servers and workers receive then."""
    table.take()
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, now)
    return [kind for _, kind, _ in table.said if kind in (MessageType.SAVE, MessageType.RELEASED)]


def test_who_leaves_an_async_training_is_released_after_a_checkpoint_of_whole_steps() -> None:
    table = training(consistency="Async", every=1000)
    parts = table.work(WORKERS[0], 2, ask=3)
    assert len(parts) == 3, "the first of the second step is still in work"
    assert leave(table) == []
    assert table.work(WORKERS[1], 1, ask=20) == [3], "what is missing of the step that is in work, and no more"
    done = {"type": MessageType.REQUEST, "stay": table.lease[WORKERS[0]], "count": 0, "done": parts}
    for server in SERVERS:
        table.applied[server].add(2)
    table.training.on_message(WORKERS[0], done, 0)
    table.serve()
    assert table.on_disk is not None
    assert (table.on_disk.step, table.on_disk.parts) == (2, 4)
    assert (WORKERS[1], MessageType.RELEASED, {}) in table.take()


def test_who_leaves_an_async_training_waits_for_whole_steps_only_for_some_seconds() -> None:
    table = training(consistency="Async", every=1000)
    table.work(WORKERS[0], 2, ask=3)
    assert leave(table, now=10) == []
    table.training.tick(14)
    assert MessageType.SAVE not in [kind for _, kind, _ in table.said]
    table.training.tick(15.5)
    assert MessageType.SAVE in [kind for _, kind, _ in table.said]


@pytest.mark.parametrize("consistency", ["Async", "BoundedStaleness"])
def test_a_save_for_a_process_that_leaves_which_a_lost_connection_cancels_stops_no_worker(consistency: str) -> None:
    table = training(consistency=consistency, every=1000)
    in_work = table.work(WORKERS[0], 2, ask=3)[2:]
    assert leave(table) == []
    table.training.lost(SERVERS[1], 0)
    table.training.joined(SERVERS[1], table.state(SERVERS[1]), 0)
    for server in SERVERS:
        table.applied[server].update(in_work)
    done = {"type": MessageType.REQUEST, "stay": table.lease[WORKERS[0]], "count": 0, "done": in_work}
    table.training.on_message(WORKERS[0], done, 0)
    finish(table)
    assert table.tracker.step == STEPS


def test_a_sync_checkpoint_of_which_some_servers_have_a_part_more_is_not_committed() -> None:
    table, save = due()
    table.applied[SERVERS[1]].add(8)
    write(table, 0, save)
    write(table, 1, save)
    assert table.on_disk is None
    assert table.work(WORKERS[0], 20), "the training goes on"


def lose_all_workers(table: Table) -> None:
    for worker in WORKERS:
        table.training.lost(worker, 0)
    table.serve()


@pytest.mark.parametrize("consistency", ["Sync", "Async", "BoundedStaleness"])
def test_a_master_that_ends_after_the_last_worker_saves_the_whole_steps_at_once(consistency: str) -> None:
    table = training(consistency=consistency, every=1000)
    assert table.work(WORKERS[0], 1, ask=1) == [0]
    assert table.work(WORKERS[1], 1, ask=1) == [1]
    assert table.work(WORKERS[0], 1, ask=1) == [2]
    lose_all_workers(table)
    table.training.terminate(0)
    table.serve()
    assert table.on_disk is not None
    assert table.on_disk.step == 1
    assert table.training.released


def test_a_master_that_ends_while_two_servers_hold_different_steps_saves_neither_and_does_not_wait() -> None:
    table = training(every=1000)
    table.work(WORKERS[0], 1, ask=1)
    table.work(WORKERS[1], 1, ask=1)
    table.applied[SERVERS[0]] |= {2, 3}
    lose_all_workers(table)
    table.training.terminate(0)
    table.serve()
    assert table.on_disk is None
    assert table.training.released


def test_the_training_goes_on_when_every_server_has_copied_and_the_next_checkpoint_waits_for_the_first() -> None:
    table, first = due()
    copied(table, SERVERS[0], first)
    assert table.work(WORKERS[0], 0) == [], "one server has not copied"
    copied(table, SERVERS[1], "m.0")
    assert table.work(WORKERS[0], 0) == [], "that was for another save"
    copied(table, SERVERS[1], first)
    assert table.on_disk is None
    while table.tracker.step < 8:
        for worker in WORKERS:
            others = [one for one in table.said if one[0] != worker]
            table.work(worker, 20)
            table.said += others
    assert table.tracker.step == 8
    assert MessageType.SAVE not in [kind for _, kind, _ in table.said]
    assert table.work(WORKERS[0], 0) == [], "the next checkpoint is due"
    for number, server in enumerate(SERVERS):
        file = {"type": MessageType.SAVED, "id": first, "file": shard(server, first), "digest": "x"}
        table.training.on_message(server, file | {"applied": [[0, 8]], "generation": number}, 0)
    assert table.on_disk is not None
    assert table.on_disk.step == 4
    table.serve()
    assert table.on_disk.step == 8


def test_who_leaves_while_a_checkpoint_is_written_is_released_after_a_newer_one() -> None:
    table, first = due()
    for server in SERVERS:
        copied(table, server, first)
    table.work(WORKERS[0], 1, ask=1)
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, 0)
    table.work(WORKERS[1], 1, ask=1)
    assert table.tracker.step == 5
    for server in SERVERS:
        file = {"type": MessageType.SAVED, "id": first, "file": shard(server, first), "digest": "x"}
        table.training.on_message(server, file | {"applied": [[0, 8]], "generation": 1}, 0)
    assert table.on_disk is not None
    assert table.on_disk.step == 4
    assert (WORKERS[1], MessageType.RELEASED, {}) not in table.said
    table.serve()
    assert table.on_disk.step == 5
    assert (WORKERS[1], MessageType.RELEASED, {}) in table.said


def with_buffers() -> tuple[Table, str]:
    """A first checkpoint whose servers have copied, and worker 0 was asked for its buffers."""
    table, save = due(buffers=True)
    for server in SERVERS:
        copied(table, server, save)
    assert table.work(WORKERS[1], 0) == [], "the buffers are not copied"
    return table, save


def test_a_worker_that_is_lost_with_its_copied_buffers_costs_the_checkpoint_once_the_training_has_gone_on() -> None:
    table, save = with_buffers()
    copied(table, WORKERS[1], save)
    assert table.work(WORKERS[1], 0) == [], "that worker was not asked"
    copied(table, WORKERS[0], save)
    assert table.work(WORKERS[1], 0) == [9, 11, 13, 15]
    table.training.lost(WORKERS[0], 1)
    for number in range(2):
        write(table, number, save)
    assert table.on_disk is None
    assert MessageType.SAVE not in [kind for member, kind, _ in table.said if member in WORKERS]


def test_a_worker_that_is_lost_before_it_has_copied_its_buffers_is_replaced_by_another() -> None:
    table, save = with_buffers()
    table.training.lost(WORKERS[0], 1)
    assert [member for member, kind, _ in table.said if kind is MessageType.SAVE and member in WORKERS] == [WORKERS[1]]
    drop = next(fields for _, kind, fields in table.said if kind is MessageType.DROP)
    for server in SERVERS:
        table.training.on_message(server, {"type": MessageType.STATE, "id": drop["id"], **table.state(server)}, 1)
    copied(table, WORKERS[0], save)
    table.training.on_message(WORKERS[1], {"type": MessageType.READY, "samples": 80, "buffers": True}, 1)
    assert table.work(WORKERS[1], 0) == [], "the one that is lost counts no more"
    copied(table, WORKERS[1], save)
    assert [fields["slices"] for _, _, fields in table.take(MessageType.ASSIGN)] == [[*range(8, 14)]]


def test_a_worker_that_starts_over_still_writes_the_buffers_that_it_has_copied() -> None:
    table, save = with_buffers()
    copied(table, WORKERS[0], save)
    table.take()
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80, "buffers": True}, 1)
    assert [kind for member, kind, _ in table.take() if member == WORKERS[0]] == [MessageType.ROUND]
