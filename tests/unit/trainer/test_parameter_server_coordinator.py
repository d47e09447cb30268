"""What the master of a training with parameter servers decides: when a round begins, what is saved when, and the end."""

import pytest

from disttrain_trainer.checkpoint.store import name_of
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member
from unit.trainer.served import SERVERS, WORKERS, Table, finish, training


def test_workers_are_invited_when_every_server_has_begun() -> None:
    table = Table()
    table.join(SERVERS[0], WORKERS[0])
    assert table.take(MessageType.BEGIN, MessageType.ROUND) == []
    assert table.training.waiting_for(3) == "worker-1, parameter-server-1 (0 s)"
    table.join(SERVERS[1])
    fields = {"generation": 1, "stay": "m.1", "buffers": None, "anew": True, "primaries": [0, 1]}
    fields["servers"] = ["s0", "s1"]
    assert table.take(MessageType.ROUND) == [(WORKERS[0], MessageType.ROUND, fields)]


def test_synchronous_parts_stop_at_the_checkpoint_and_go_on_after_it() -> None:
    table = training()
    assert table.work(WORKERS[0], 4) == [0, 2, 4, 6]
    assert table.work(WORKERS[1], 4, ask=20)[:1] == [1]
    table.serve()
    assert table.on_disk is not None
    assert (table.on_disk.step, table.on_disk.parts) == (4, 8)
    assert table.work(WORKERS[0], 0)[0] == 8


def test_without_sync_a_checkpoint_has_a_head_start_and_no_worker_waits_while_it_is_written_in_time() -> None:
    table = training(consistency="Async", steps=100, every=10)
    table.work(WORKERS[0], 17, ask=17)
    assert table.take(MessageType.SAVE) == []
    table.work(WORKERS[0], 1, ask=1)
    assert [fields["folder"] for _, kind, fields in table.said if kind is MessageType.SAVE] == [name_of(9)] * 2
    assert table.work(WORKERS[1], 0, ask=1) == [18]


def test_without_sync_the_steps_wait_one_interval_after_the_newest_checkpoint_for_the_next() -> None:
    table = training(consistency="Async", steps=100, every=10)
    table.work(WORKERS[0], 18, ask=18)
    written = [one for one in table.said if one[1] is MessageType.SAVE]
    assert table.work(WORKERS[0], 2) == [18, 19]
    assert table.work(WORKERS[0], 0) == []
    table.said = written
    table.serve()
    assert table.on_disk is not None
    assert table.on_disk.step == 9
    assignments = [
        s for _, kind, fields in table.take(MessageType.ASSIGN) if kind is MessageType.ASSIGN for s in fields["slices"]
    ]
    assert assignments == list(range(20, 38))


def test_a_checkpoint_that_cannot_be_written_stops_no_worker() -> None:
    table = training(consistency="Async", steps=100, every=10)
    table.work(WORKERS[0], 18, ask=18)
    full = {"type": MessageType.SAVED, "id": "m.1", "error": "No space left on device"}
    table.training.on_message(SERVERS[0], full, 0)
    assert table.on_disk is None
    assert table.work(WORKERS[0], 0, ask=30) == list(range(18, 38))


@pytest.mark.parametrize("consistency", ["Sync", "Async"])
def test_a_new_master_of_servers_that_are_far_beyond_the_newest_checkpoint_saves_soon(consistency: str) -> None:
    table = Table(consistency=consistency)
    for server in SERVERS:
        table.round_number[server], table.applied[server] = 3, set(range(11))
    table.join(*SERVERS, *WORKERS)
    table.work(WORKERS[1], 1, ask=1)
    table.serve()
    assert table.on_disk is not None
    assert table.on_disk.step in (5, 6)


def test_a_lost_server_takes_everybody_back_to_the_checkpoint() -> None:
    table = training()
    table.work(WORKERS[0], 4)
    table.work(WORKERS[1], 4)
    table.serve()
    table.work(WORKERS[0], 1)
    table.take()
    table.training.lost(SERVERS[1], 1)
    table.round_number[SERVERS[1]], table.applied[SERVERS[1]] = 0, set()
    table.training.joined(SERVERS[1], table.state(SERVERS[1]), 1)
    file = "step-00000004/shard-1-m.1.safetensors"
    assert (SERVERS[1], MessageType.BEGIN, {"generation": 2, "file": file}) in table.said
    assert [m for m, kind, _ in table.said if kind is MessageType.REFORM] == WORKERS
    table.serve()
    for worker in WORKERS:
        table.training.on_message(worker, {"type": MessageType.READY, "samples": 80}, 1)
    assert table.tracker.step == 4
    assert table.work(WORKERS[0], 0)[0] == 8


def test_a_server_that_only_lost_its_connection_costs_nothing() -> None:
    table = training()
    table.work(WORKERS[0], 2)
    table.take()
    table.training.lost(SERVERS[1], 1)
    table.training.joined(SERVERS[1], table.state(SERVERS[1]), 1)
    assert table.take(MessageType.BEGIN, MessageType.REFORM) == []
    assert table.tracker.round_number == 1


def test_a_new_master_learns_from_the_servers_what_was_done() -> None:
    table = Table()
    for server in SERVERS:
        table.round_number[server], table.applied[server] = 3, {0, 1, 2, 3, 4}
    table.applied[SERVERS[1]].remove(4)
    table.join(*SERVERS, *WORKERS)
    assert table.take(MessageType.BEGIN) == []
    assert table.tracker.step == 2
    assert table.work(WORKERS[0], 0)[0] == 4


def test_parts_of_a_lost_worker_go_to_the_other_when_it_starts_again() -> None:
    table = training()
    assert table.work(WORKERS[1], 0) == [1, 3, 5, 7]
    table.training.lost(WORKERS[1], 1)
    assert [m for m, kind, _ in table.said if kind is MessageType.REFORM] == [WORKERS[0]]
    table.serve()
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    assert table.work(WORKERS[0], 0)[:3] == [0, 1, 2]


def test_a_worker_with_other_data_is_sent_away() -> None:
    table = Table()
    table.join(*SERVERS, WORKERS[0])
    table.take()
    table.training.joined(WORKERS[1], {"samples": 81}, 0)
    ((member, _, fields),) = table.take(MessageType.WRONG)
    assert member == WORKERS[1]
    assert "worker-1 has 81 training samples, others have 80" in fields["reason"]


def test_the_end_is_confirmed_evaluated_and_saved() -> None:
    table = training(evaluate=True)
    finish(table)
    assert [m for m, kind, _ in table.said if kind is MessageType.EVALUATE] == [WORKERS[0]]
    assert not table.training.ended
    table.evaluate(WORKERS[0], 0.5)
    table.serve()
    assert table.on_disk is not None
    assert table.on_disk.finished
    assert table.training.ended
    assert {m for m, kind, _ in table.take(MessageType.FINISH)} == {*SERVERS, *WORKERS}
    assert table.tracker.evaluation == {"accuracy": 0.5}


def test_another_worker_evaluates_when_the_first_is_lost() -> None:
    table = training(evaluate=True)
    finish(table)
    table.take()
    table.training.lost(WORKERS[0], 9)
    assert [m for m, kind, _ in table.said if kind is MessageType.EVALUATE] == [WORKERS[1]]


def test_who_leaves_is_released_after_a_checkpoint_at_the_next_whole_step() -> None:
    table = training()
    table.work(WORKERS[0], 2, ask=2)
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, 1)
    assert table.take(MessageType.RELEASED) == []
    table.work(WORKERS[1], 2)
    table.said.append((SERVERS[0], MessageType.STATE, {"id": 0}))
    table.serve()
    assert (WORKERS[1], MessageType.RELEASED, {}) in table.said
    assert table.on_disk is not None
    assert table.on_disk.step == 2


def test_without_a_volume_who_leaves_is_released_at_once() -> None:
    table = training(volume=False)
    table.work(WORKERS[0], 2)
    table.training.on_message(WORKERS[1], {"type": MessageType.LEAVING}, 1)
    assert table.take(MessageType.RELEASED) == [(WORKERS[1], MessageType.RELEASED, {})]


def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite() -> None:
    table = training()
    table.training.on_message(WORKERS[0], {"type": MessageType.NAN, "step": 1}, 0)
    table.work(WORKERS[0], 4)
    table.work(WORKERS[1], 4)
    assert table.take(MessageType.SAVE) == []
    assert table.tracker.nan_loss == "worker-0 at step 1"


def test_a_message_with_an_earlier_lease_of_a_worker_does_not_count() -> None:
    table = training()
    earlier = table.lease[WORKERS[0]]
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    table.training.on_message(WORKERS[0], {"type": MessageType.REQUEST, "stay": earlier, "count": 0, "done": [0, 2]}, 1)
    assert table.work(WORKERS[0], 0)[0] == 0


def test_a_lost_worker_is_a_recovery_when_its_parts_went_to_others() -> None:
    table = training(consistency="Async")
    table.training.lost(WORKERS[1], 1)
    assert table.tracker.lost_workers == 1
    table.join(WORKERS[1])
    assert table.tracker.lost_workers == 1


def test_a_worker_that_is_lost_before_the_training_begins_is_no_recovery() -> None:
    table = Table()
    table.join(SERVERS[0], WORKERS[1])
    table.training.lost(WORKERS[1], 1)
    assert table.tracker.lost_workers == 0


def save_buffers(table: Table, worker: Member, file: str) -> None:
    answer = {"type": MessageType.SAVED, "id": "m.1", "file": file, "digest": "x"}
    table.training.on_message(worker, answer, 0)


def at_checkpoint(table: Table) -> list[Member]:
    """Brings the training to its first checkpoint, which the servers write; the workers that were asked for their buffers."""
    table.work(WORKERS[0], 4)
    table.training.on_message(
        WORKERS[1], {"type": MessageType.REQUEST, "stay": table.lease[WORKERS[1]], "count": 4, "done": []}, 0
    )
    for server in SERVERS:
        table.applied[server] |= set(range(8))
    table.take()
    table.training.on_message(
        WORKERS[1], {"type": MessageType.REQUEST, "stay": table.lease[WORKERS[1]], "count": 0, "done": [1, 3, 5, 7]}, 0
    )
    asked = [member for member, kind, _ in table.said if kind is MessageType.SAVE and member in WORKERS]
    table.serve()
    return asked


def test_a_checkpoint_waits_for_the_buffers_of_the_lowest_worker() -> None:
    table = training(buffers=True)
    assert at_checkpoint(table) == [WORKERS[0]]
    assert table.on_disk is None
    save_buffers(table, WORKERS[1], "buffers-of-a-worker-that-was-not-asked")
    assert table.on_disk is None
    save_buffers(table, WORKERS[0], "buffers-1.safetensors")
    assert table.on_disk is not None
    assert table.on_disk.file_of("buffers-") == "buffers-1.safetensors"
    table.take()
    table.training.on_message(WORKERS[1], {"type": MessageType.READY, "samples": 80, "buffers": True}, 1)
    ((_, _, fields),) = table.take(MessageType.ROUND)
    assert fields["buffers"] == f"{name_of(4)}/buffers-1.safetensors"


def test_another_worker_gives_its_buffers_when_the_first_is_lost_and_without_any_the_checkpoint_waits_for_one() -> None:
    table = training(buffers=True)
    at_checkpoint(table)
    table.take()
    table.training.lost(WORKERS[0], 1)
    assert (WORKERS[1], MessageType.SAVE, {"id": "m.1", "folder": name_of(4)}) in table.take()
    table.training.lost(WORKERS[1], 2)
    table.serve()
    assert table.on_disk is None, "without a worker's file the manifest could name no tensors"
    table.join(WORKERS[0])
    assert (WORKERS[0], MessageType.SAVE, {"id": "m.2", "folder": name_of(4)}) in table.take()
    written = {"type": MessageType.SAVED, "id": "m.2", "file": "buffers-2.safetensors", "digest": "x"}
    table.training.on_message(WORKERS[0], written, 3)
    assert table.on_disk is not None
    assert (table.on_disk.step, table.on_disk.file_of("buffers-")) == (4, "buffers-2.safetensors")


@pytest.mark.parametrize("before", [True, False])
def test_a_process_that_leaves_when_all_workers_are_lost_is_released_without_a_checkpoint(before: bool) -> None:
    table = training(buffers=True)
    for worker in WORKERS:
        table.work(worker, 1, ask=1)
    assert table.tracker.step == 1
    table.work(WORKERS[0], 0, ask=1)  # a step is in work: a checkpoint would have to wait for it
    if before:
        table.training.terminate(0)
        assert not table.training.released
    for worker in WORKERS:
        table.training.lost(worker, 0)
    table.serve()
    if not before:
        table.training.terminate(0)
        table.serve()
    assert table.on_disk is None
    assert table.training.released


def test_a_worker_that_starts_again_is_asked_again_for_its_buffers() -> None:
    table = training(buffers=True)
    at_checkpoint(table)
    table.take()
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80, "buffers": True}, 1)
    assert [kind for member, kind, _ in table.take() if member == WORKERS[0]] == [MessageType.ROUND, MessageType.SAVE]


def test_a_worker_that_starts_again_is_asked_again_for_the_evaluation() -> None:
    table = training(evaluate=True)
    finish(table)
    table.take()
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 9)
    assert [kind for member, kind, _ in table.take() if member == WORKERS[0]] == [
        MessageType.ROUND,
        MessageType.EVALUATE,
    ]
