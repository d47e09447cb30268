"""Workers of parameter servers that leave for good and join: what the master does with their parts, and when it lets them go."""

from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.net.messages import MessageType
from unit.trainer.served import SERVERS, WORKERS, Table, training

LEAVING = {"type": MessageType.LEAVING}


def released(table: Table) -> list[object]:
    return [member for member, kind, _ in table.said if kind is MessageType.RELEASED]


def done(table: Table, parts: list[int]) -> None:
    """The second worker reports parts as applied."""
    lease = table.lease[WORKERS[1]]
    for server in SERVERS:
        table.applied[server] |= set(parts)
    table.training.on_message(WORKERS[1], {"type": MessageType.REQUEST, "stay": lease, "count": 0, "done": parts}, 1)


def test_a_worker_that_leaves_finishes_its_parts_first_and_no_other_starts_over() -> None:
    table = training(fewest=1)
    assert table.work(WORKERS[1], 0, ask=2) == [1, 3]
    table.take()
    table.training.on_message(WORKERS[1], LEAVING, 1)
    assert released(table) == []
    assert table.tracker.world_size == 1
    assert table.work(WORKERS[0], 2, ask=2) == [0, 2]
    assert released(table) == []
    done(table, [1, 3])
    assert released(table)[-1] == WORKERS[1]
    table.take()
    table.training.lost(WORKERS[1], 2)
    assert table.take(MessageType.REFORM) == []
    assert table.tracker.lost_workers == 0
    assert table.training.waiting_for(3) is None
    table.serve()
    assert table.work(WORKERS[0], 0, ask=4) == [4, 5, 6, 7], "it computes the whole steps alone"


def test_a_worker_without_parts_leaves_at_once() -> None:
    table = training(fewest=1)
    table.take()
    table.training.on_message(WORKERS[1], LEAVING, 1)
    assert released(table) == [WORKERS[1]]


def test_below_the_fewest_a_worker_leaves_as_from_any_job_once_the_state_is_saved() -> None:
    table = training(fewest=2)
    for worker in WORKERS:
        table.work(worker, 1, ask=1)
    table.take()
    table.training.on_message(WORKERS[1], LEAVING, 1)
    assert released(table) == []


def test_when_the_job_itself_is_ended_no_worker_leaves_before_the_state_is_saved() -> None:
    table = training(fewest=1)
    for worker in WORKERS:
        table.work(worker, 1, ask=1)
    table.take()
    table.training.terminate(1)
    table.training.on_message(WORKERS[1], LEAVING, 1)
    assert released(table) == []


def test_with_too_few_workers_no_part_is_assigned_and_the_master_says_so() -> None:
    table = Table(fewest=2)
    table.join(*SERVERS, WORKERS[0])
    assert table.work(WORKERS[0], 0, ask=2) == []
    assert table.training.waiting_for(5) == "1 more worker (ready: 1 of at least 2)"
    table.join(WORKERS[1])
    assert table.training.waiting_for(5) is None
    assert [fields["slices"] for _, kind, fields in table.take() if kind is MessageType.ASSIGN] == [[0, 2]]


def test_below_the_fewest_the_rest_of_a_step_is_assigned_when_a_process_leaves_and_waits_for_its_save() -> None:
    table = training(fewest=2)
    assert table.work(WORKERS[0], 1, ask=1) == [0]
    assert table.work(WORKERS[1], 1, ask=1) == [1]
    assert table.work(WORKERS[0], 1, ask=1) == [2]
    table.training.lost(WORKERS[1], 1)
    table.serve()
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    table.serve()
    assert table.work(WORKERS[0], 0, ask=1) == []
    table.training.on_message(WORKERS[0], LEAVING, 2)
    assert [fields["slices"] for _, kind, fields in table.take() if kind is MessageType.ASSIGN] == [[3]]
    for server in SERVERS:
        table.applied[server] |= {3}
    lease = table.lease[WORKERS[0]]
    table.training.on_message(WORKERS[0], {"type": MessageType.REQUEST, "stay": lease, "count": 1, "done": [3]}, 3)
    said = {kind for _, kind, _ in table.take()}
    assert MessageType.SAVE in said
    assert MessageType.ASSIGN not in said, "no other step is begun"


def test_an_evaluation_that_a_worker_takes_with_it_is_done_by_another() -> None:
    table = training(fewest=1, evaluate=True, volume=False, steps=1)
    for worker in WORKERS:
        table.work_on(worker)
    table.serve()
    asked = [member for member, kind, _ in table.said if kind is MessageType.EVALUATE]
    assert asked == [WORKERS[0]]
    table.training.on_message(WORKERS[0], LEAVING, 1)
    table.training.lost(WORKERS[0], 2)
    table.serve()
    asked = [member for member, kind, _ in table.said if kind is MessageType.EVALUATE]
    assert asked == WORKERS


@given(
    parts=st.integers(1, 6),
    workers=st.integers(2, 4),
    counts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=20),
    done=st.integers(0, 5),
)
def test_without_a_worker_that_can_be_spared_the_others_finish_every_step_in_order(
    parts: int, workers: int, counts: list[tuple[int, int]], done: int
) -> None:
    """Each of the others computes its parts in ascending order, and a part of a step only when the step before is whole."""
    queue = WorkQueue(total=4 * parts, parts_per_step=parts, aligned=True)
    held: dict[int, list[int]] = {worker: [] for worker in range(workers)}
    for worker in held:
        queue.join(worker)
    for worker, count in counts:
        if worker in held:
            held[worker] += queue.take(worker, count)
    leaver = workers - 1
    for _ in range(done):
        for worker in held:
            step = queue.step
            now = [part for part in held[worker] if part // parts == step]
            queue.finish(worker, now)
            held[worker] = [part for part in held[worker] if part not in now]
    if not queue.can_spare(leaver):
        return
    queue.leave(leaver)
    del held[leaver]
    for _ in range(4 * parts + 1):
        for worker in held:
            if not held[worker]:
                held[worker] += queue.take(worker, 1)
            step = queue.step
            now = [part for part in held[worker] if part // parts == step]
            queue.finish(worker, now)
            held[worker] = [part for part in held[worker] if part not in now]
    assert queue.finished
