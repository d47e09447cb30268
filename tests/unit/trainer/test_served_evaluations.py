"""Evaluations between two steps with parameter servers: which worker is asked when, and what the others may do meanwhile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from disttrain_trainer.checkpoint.store import name_of
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Answer, Member
from unit.trainer.served import SERVERS, WORKERS, Table, training

STOPPING: dict[str, Any] = {"earlyStopping": {"metric": "accuracy", "mode": "Max", "patience": 1}}


def table_of(consistency: str = "Sync", **fields: Any) -> Table:
    return training(consistency=consistency, evaluate=True, evaluateEverySteps=3, every=100, **fields)


class SlowFolders(Table):
    """The volume takes its time to make the folder of a checkpoint: `make` ends it."""

    make: Callable[[], None]

    def prepare(self, step: int, answer: Answer[str | OSError]) -> None:
        self.make = partial(answer, name_of(step), self.now)


def copied(table: Table, member: Member) -> None:
    (save,) = {str(fields["id"]) for _, kind, fields in table.said if kind is MessageType.SAVE}
    message = {"type": MessageType.COPIED, "id": save}
    table.training.on_message(member, message | (table.state(member) if member in SERVERS else {}), table.now)


def asked(table: Table) -> list[tuple[Member, int]]:
    orders = [one for one in table.said if one[1] is MessageType.EVALUATE]
    table.said = [one for one in table.said if one not in orders]
    return [(member, int(str(fields["step"]))) for member, _, fields in orders]


def work_on(table: Table, *workers: Member) -> list[tuple[Member, int]]:
    """They compute all that they get, each with one open request; who is asked to evaluate then, and which step."""
    for _ in range(10):
        for worker in workers:
            parts = [
                part
                for member, kind, fields in table.said
                if (member, kind) == (worker, MessageType.ASSIGN)
                for part in fields["slices"]
            ]
            table.said = [one for one in table.said if one[:2] != (worker, MessageType.ASSIGN)]
            for server in table.applied:
                table.applied[server] |= set(parts)
            request = {"type": MessageType.REQUEST, "stay": table.lease[worker], "count": 20, "done": parts}
            table.training.on_message(worker, request, 0)
        if found := asked(table):
            return found
    return []


def begun_save(table: Table) -> dict[str, Any]:
    """They work until the servers are asked to save; what they were asked, and have not answered."""
    while not (saves := [fields for _, kind, fields in table.said if kind is MessageType.SAVE]):
        work_on(table, *WORKERS)
    table.said = [one for one in table.said if one[1] is not MessageType.SAVE]
    return saves[0]


def test_sync_workers_stop_until_one_of_them_has_the_parameters_and_go_on_while_it_evaluates() -> None:
    table = table_of()
    assert table.work(WORKERS[0], 3) == [0, 2, 4]
    assert table.work(WORKERS[1], 3) == [1, 3, 5]
    assert asked(table) == [(WORKERS[1], 3)]
    assert table.work(WORKERS[0], 0) == []
    table.says(WORKERS[1], begun=True)
    # All parts up to the next evaluation are the other worker's.
    assert table.work(WORKERS[0], 6) == [6, 7, 8, 9, 10, 11]
    table.says(WORKERS[1], step=3, evaluation={"accuracy": 0.5})
    assert (table.tracker.evaluation, table.tracker.evaluation_step) == ({"accuracy": 0.5}, 3)
    assert [course.evaluated for course in table.amended] == [3]
    assert asked(table) == [(WORKERS[1], 6)]


def test_sync_workers_wait_for_a_result_that_may_end_the_training() -> None:
    table = table_of(**STOPPING)
    for step in (3, 6):
        assert work_on(table, *WORKERS) == [(WORKERS[1], step)]
        table.says(WORKERS[1], begun=True)
        assert table.take(MessageType.ASSIGN) == []
        table.says(WORKERS[1], step=step, evaluation={"accuracy": 0.5})
    assert table.tracker.course.stopped is not None
    table.serve()
    orders = [fields for _, kind, fields in table.take() if kind is MessageType.SAVE]
    assert orders or table.on_disk is not None
    table.serve()
    assert table.training.ended
    assert table.tracker.step == 6


def test_another_worker_evaluates_when_the_one_that_did_is_lost() -> None:
    table = table_of()
    table.work(WORKERS[0], 20)
    table.work(WORKERS[1], 20)
    table.says(WORKERS[1], begun=True)
    table.work(WORKERS[0], 1)
    table.training.lost(WORKERS[1], 1)
    table.serve()
    assert asked(table) == []  # the other one still computes
    table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    table.serve()
    assert work_on(table, WORKERS[0]) == [(WORKERS[0], 3)]


@pytest.mark.parametrize("returns", [False, True])
def test_the_worker_that_evaluates_goes_on_when_another_one_is_lost_or_starts_over(returns: bool) -> None:
    table = table_of()
    assert work_on(table, *WORKERS) == [(WORKERS[1], 3)]
    table.says(WORKERS[1], begun=True)
    table.work(WORKERS[0], 0)
    if returns:
        table.training.on_message(WORKERS[0], {"type": MessageType.READY, "samples": 80}, 1)
    else:
        table.training.lost(WORKERS[0], 1)
    table.serve()
    assert [kind for member, kind, _ in table.said if member == WORKERS[1]] == []
    table.says(WORKERS[1], step=3, evaluation={"accuracy": 0.5})
    assert table.tracker.evaluation_step == 3
    assert table.work(WORKERS[1], 0), "then it computes parts again"


def test_a_worker_that_trains_alone_copies_its_buffers_before_it_evaluates() -> None:
    """It does nothing else while it evaluates, and a second worker that joins then would get no part."""
    table = SlowFolders(evaluate=True, evaluateEverySteps=3, every=3, buffers=True)
    table.join(*SERVERS, WORKERS[0])
    table.work(WORKERS[0], 20)
    assert asked(table) == []
    table.make()
    assert asked(table) == []
    for member in (*SERVERS, WORKERS[0]):
        copied(table, member)
    assert asked(table) == [(WORKERS[0], 3)]
    table.says(WORKERS[0], begun=True)
    table.training.joined(WORKERS[1], {"samples": 80, "buffers": True}, 0)
    assert table.work(WORKERS[1], 0)[:2] == [6, 7]


def test_a_worker_that_joins_copies_its_buffers_where_the_one_that_was_asked_for_them_evaluates() -> None:
    table = SlowFolders(evaluate=True, evaluateEverySteps=4, every=6, buffers=True)
    table.join(*SERVERS, *WORKERS)
    assert work_on(table, *WORKERS) == [(WORKERS[1], 4)]
    table.says(WORKERS[1], begun=True)
    work_on(table, WORKERS[0])
    assert table.tracker.step == 6
    table.training.lost(WORKERS[0], 1)
    table.make()
    table.training.joined(WORKERS[0], {"samples": 80, "buffers": True}, 2)
    assert [member for member, kind, _ in table.said if kind is MessageType.SAVE and member in WORKERS] == WORKERS[::-1]
    for member in (*SERVERS, WORKERS[0]):
        copied(table, member)
    table.serve()
    assert table.work(WORKERS[0], 0)[:2] == [12, 13]


@pytest.mark.parametrize("consistency", ["Sync", "Async", "BoundedStaleness"])
def test_the_final_parameters_are_evaluated_after_those_of_an_earlier_step(consistency: str) -> None:
    table = training(consistency=consistency, evaluate=True, evaluateEverySteps=9, every=100)
    ((evaluator, _),) = work_on(table, *WORKERS)
    table.says(evaluator, begun=True)
    (other,) = {*WORKERS} - {evaluator}
    for _ in range(3):
        assert work_on(table, other) == []
        table.serve()
    assert table.tracker.step == 10
    table.says(evaluator, step=9, evaluation={"accuracy": 0.5})
    assert [course.evaluated for course in table.amended] == [9]
    (final,) = [member for member, kind, _ in table.take() if kind is MessageType.EVALUATE]
    table.evaluate(final, 0.9)
    table.serve()
    assert (table.training.ended, table.tracker.evaluation) == (True, {"accuracy": 0.9})


@pytest.mark.parametrize("consistency", ["Sync", "Async", "BoundedStaleness"])
def test_the_training_ends_also_when_the_worker_that_evaluates_an_earlier_step_is_lost(consistency: str) -> None:
    table = training(consistency=consistency, evaluate=True, evaluateEverySteps=9, every=100)
    ((evaluator, _),) = work_on(table, *WORKERS)
    table.says(evaluator, begun=True)
    (other,) = {*WORKERS} - {evaluator}
    for _ in range(3):
        work_on(table, other)
        table.serve()
    table.training.lost(evaluator, 1)
    table.serve()
    if consistency == "Sync":
        assert asked(table) == [(other, 9)]
        table.says(other, begun=True)
        table.says(other, step=9, evaluation={"accuracy": 0.5})
    assert [member for member, kind, _ in table.take() if kind is MessageType.EVALUATE] == [other]
    table.evaluate(other, 0.9)
    table.serve()
    assert (table.training.ended, table.tracker.evaluation) == (True, {"accuracy": 0.9})


def test_an_evaluation_is_left_out_when_no_worker_has_its_parameters() -> None:
    table = table_of()
    table.work(WORKERS[0], 20)
    table.work(WORKERS[1], 20)
    table.says(WORKERS[1], missing=True)
    table.says(WORKERS[0], missing=True)
    assert (table.tracker.course.evaluated, table.tracker.course.evaluation) == (3, None)
    assert table.work(WORKERS[0], 0)[0] == 6


@pytest.mark.parametrize("consistency", ["Async", "BoundedStaleness"])
def test_without_sync_a_worker_evaluates_when_its_parts_are_done_and_no_other_waits(consistency: str) -> None:
    table = table_of(consistency)
    others = table.work(WORKERS[1], 0, ask=2)
    table.work(WORKERS[0], 6, ask=6)
    assert asked(table) == []
    table.work(WORKERS[1], 0, ask=0)
    for server in table.applied:
        table.applied[server] |= set(others)
    done = {"type": MessageType.REQUEST, "stay": table.lease[WORKERS[1]], "count": 0, "done": others}
    table.training.on_message(WORKERS[1], done, 0)
    assert asked(table) == [(WORKERS[1], 3)]
    assert table.work(WORKERS[0], 0)
    table.says(WORKERS[1], begun=True)
    table.says(WORKERS[1], step=4, evaluation={"accuracy": 0.5})
    assert table.tracker.evaluation_step == 4


def test_a_new_master_knows_the_course_from_the_workers() -> None:
    first = table_of()
    first.work(WORKERS[0], 20)
    first.work(WORKERS[1], 20)
    first.says(WORKERS[1], begun=True)
    first.says(WORKERS[1], step=3, evaluation={"accuracy": 0.5})
    course = first.tracker.course.model_dump()
    second = Table(evaluate=True, evaluateEverySteps=3, every=100)
    for server in second.applied:
        second.round_number[server], second.applied[server] = 1, set(range(6))
    second.join(*second.applied)
    for worker in WORKERS:
        second.training.joined(worker, {"samples": 80, "course": course, "generation": 1}, 0)
        second.serve()
    assert second.tracker.course == first.tracker.course
    assert asked(second) == []


def test_a_round_that_is_lost_takes_its_course_with_it() -> None:
    table = table_of()
    table.work(WORKERS[0], 20)
    table.work(WORKERS[1], 20)
    table.says(WORKERS[1], begun=True)
    table.says(WORKERS[1], step=3, evaluation={"accuracy": 0.5})
    stale = {"course": table.tracker.course.model_dump(), "generation": 1}
    server = next(iter(table.applied))
    table.training.lost(server, 1)
    table.round_number[server], table.applied[server] = 0, set()
    table.training.joined(server, table.state(server), 1)
    table.serve()
    for worker in WORKERS:
        table.training.on_message(worker, {"type": MessageType.READY, "samples": 80, **stale}, 1)
    assert table.tracker.course.evaluated == 0
    assert table.work(WORKERS[0], 0)[0] == 0


def test_a_loss_that_is_not_finite_takes_the_servers_back_to_the_checkpoint_without_its_parts() -> None:
    table = training(nanPolicy={"rollBacks": 1})
    while table.on_disk is None:
        work_on(table, *WORKERS)
        table.serve()
    step = table.on_disk.step
    nan = {"type": MessageType.NAN, "step": step + 1, "parts": [2 * step + 2, 2 * step + 3]}
    table.training.on_message(WORKERS[0], nan | {"stay": table.lease[WORKERS[0]]}, 0)
    table.training.on_message(WORKERS[1], nan | {"stay": table.lease[WORKERS[1]]}, 0)  # it found the same
    table.serve()
    for worker in WORKERS:
        table.training.on_message(worker, {"type": MessageType.READY, "samples": 80}, 0)
    rounds = [fields for member, kind, fields in table.take() if kind is MessageType.ROUND]
    assert rounds
    assert all(fields["course"]["left_out"] == nan["parts"] for fields in rounds)
    assert (table.tracker.step, table.tracker.nan_loss) == (step, None)
    assert table.amended[-1].left_out == nan["parts"]
    table.training.on_message(WORKERS[0], nan | {"stay": table.lease[WORKERS[0]]}, 0)
    assert table.tracker.nan_loss == f"worker-0 at step {step + 1}"


def test_a_gradient_before_a_checkpoint_that_is_not_finite_takes_the_servers_back_to_the_one_before() -> None:
    table = training(nanPolicy={"rollBacks": 1})
    while table.on_disk is None:
        work_on(table, *WORKERS)
        table.serve()
    step = table.on_disk.step
    save = begun_save(table)
    parts = [2 * save["step"] - 2, 2 * save["step"] - 1]
    nan = {"type": MessageType.NAN, "id": save["id"], "step": save["step"] - 1, "parts": parts, "reason": "not finite"}
    servers = list(table.applied)
    for server in servers:  # the second found the same
        table.training.on_message(server, nan, 0)
    table.serve()
    for worker in WORKERS:
        table.training.on_message(worker, {"type": MessageType.READY, "samples": 80}, 0)
    assert (table.tracker.step, table.tracker.nan_loss) == (step, None)
    assert table.amended[-1].left_out == parts
    assert table.amended[-1].roll_backs == 1
    table.training.on_message(servers[0], nan | {"id": begun_save(table)["id"]}, 0)
    assert (servers[0], MessageType.NAN, {"reason": "not finite"}) in table.take()
    assert table.tracker.nan_loss == f"parameter-server-0 at step {save['step'] - 1}"


def test_sync_evaluations_that_lie_far_before_the_checkpoint_are_passed_over() -> None:
    table = Table(evaluate=True, evaluateEverySteps=1, every=100, steps=1000)
    for server in table.applied:
        table.round_number[server], table.applied[server] = 1, set(range(2 * 500))
    table.join(*table.applied, *WORKERS)
    passed = 0
    while (orders := work_on(table, *WORKERS)) and orders[0][1] < 500:
        passed += 1
        table.says(orders[0][0], missing=True)
    assert passed <= 2 * len(WORKERS)
    assert orders == [(WORKERS[1], 500)]
