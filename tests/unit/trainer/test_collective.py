"""A round begins when all ranks are ready and ends when one is lost, and the rank with the newest state is the source."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from disttrain.api.names import Role
from disttrain_trainer.coordinator.collective import CollectiveCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.script_joining import ENDED_EARLY_SECONDS, JOIN_SECONDS
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.net.members import MemberState
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member

A, B = (Member(Role.WORKER, rank) for rank in range(2))


class Sent:
    """A sender that keeps what it was given."""

    def __init__(self) -> None:
        self.said: list[tuple[Member, MessageType, dict[str, Any]]] = []

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        self.said.append((member, kind, fields))

    def take(self) -> list[tuple[Member, MessageType, dict[str, Any]]]:
        said, self.said = self.said, []
        return said


class Table:
    """A collective of two with everything around it."""

    def __init__(
        self,
        *,
        saves: bool = False,
        opened: bool = True,
        lasting: bool = True,
        script: bool = False,
        schedule: Callable[[int], Schedule] | None = None,
    ) -> None:
        self.sent = Sent()
        self.tracker = Tracker(attempt=1)
        self.renewals = 0
        self.used = False
        self.collective = CollectiveCoordinator(
            sender=self.sent,
            tracker=self.tracker,
            members=(A, B),
            renew_store=self._renew,
            saves=saves,
            lasting=lasting,
            used=(lambda: self.used) if script else None,
            schedule=schedule,
        )
        if opened:
            self.collective.open(0)

    def _renew(self, opened: Callable[[float], None]) -> None:
        self.renewals += 1
        opened(0)

    def join(
        self, member: Member, *, state: MemberState = MemberState.READY, round_number: int = 0, step: int = -1
    ) -> None:
        self.collective.joined(member, {"state": state, "generation": round_number, "step": step}, 0)

    def say(self, member: Member, kind: MessageType, *, now: float = 0, **fields: object) -> None:
        message: Message = {"type": kind, **fields}
        self.collective.on_message(member, message, now)

    def begin_round(self) -> "Table":
        self.join(A)
        self.join(B)
        self.sent.take()
        return self


def test_a_round_begins_when_all_are_ready() -> None:
    table = Table()
    table.join(A)
    assert table.sent.take() == []
    assert table.collective.waiting_for(7) == "worker-1 (0 s)"
    table.join(B, step=30)
    assert table.sent.take() == [(m, MessageType.ROUND, {"generation": 1, "source": 1}) for m in (A, B)]
    assert table.tracker.world_size == 2
    assert table.collective.waiting_for(8) is None


def test_no_round_begins_before_there_is_a_store() -> None:
    table = Table(opened=False)
    table.join(A)
    table.join(B)
    assert table.sent.take() == []
    table.collective.open(0)
    assert [kind for _, kind, _ in table.sent.take()] == [MessageType.ROUND, MessageType.ROUND]


def test_a_member_that_still_imports_is_waited_for() -> None:
    table = Table()
    table.join(A)
    table.join(B, state=MemberState.STARTING)
    assert table.sent.take() == []
    table.say(B, MessageType.READY, step=-1)
    assert len(table.sent.take()) == 2


def test_a_loss_ends_the_round_and_the_next_one_has_the_newest_state_and_an_empty_store() -> None:
    table = Table().begin_round()
    table.collective.lost(B, 1)
    assert table.sent.take() == [(A, MessageType.REFORM, {})]
    table.say(A, MessageType.READY, step=41)
    table.join(B, step=40)
    assert table.sent.take() == [(m, MessageType.ROUND, {"generation": 2, "source": 0}) for m in (A, B)]
    assert table.renewals == 1


def test_survivors_that_notice_first_get_no_second_message() -> None:
    table = Table().begin_round()
    table.say(A, MessageType.READY, step=41)
    assert table.sent.take() == [(B, MessageType.REFORM, {})]
    table.collective.lost(B, 1)
    assert table.sent.take() == []


def test_steps_that_only_the_lost_rank_had_are_counted_as_done_again() -> None:
    table = Table().begin_round()
    table.say(A, MessageType.REPORT, step=50, samples=1, loss=1.0)
    table.collective.lost(A, 1)
    table.say(B, MessageType.READY, step=47)
    table.join(A, step=40)
    assert table.tracker.step == 47
    assert table.tracker.redone_steps == 3


def test_a_new_master_leaves_a_running_round_alone() -> None:
    table = Table()
    table.join(A, state=MemberState.RUNNING, round_number=3)
    table.join(B, state=MemberState.RUNNING, round_number=3)
    assert table.sent.take() == []
    assert table.tracker.round_number == 3


def test_a_new_master_ends_a_round_of_which_one_is_a_replacement() -> None:
    table = Table()
    table.join(A, state=MemberState.RUNNING, round_number=3)
    table.join(B)
    assert table.sent.take() == [(A, MessageType.REFORM, {})]
    table.say(A, MessageType.READY, step=9)
    assert table.sent.take() == [(m, MessageType.ROUND, {"generation": 4, "source": 0}) for m in (A, B)]


def test_the_job_is_done_when_all_are() -> None:
    table = Table().begin_round()
    table.say(A, MessageType.DONE, evaluation={"accuracy": 1.0})
    assert not table.collective.ended
    table.say(B, MessageType.DONE)
    assert table.collective.ended
    assert table.sent.take() == [(A, MessageType.FINISH, {}), (B, MessageType.FINISH, {})]
    assert table.tracker.evaluation == {"accuracy": 1.0}


def test_a_rank_that_is_done_is_needed_again_when_another_is_lost() -> None:
    table = Table().begin_round()
    table.say(A, MessageType.DONE)
    table.collective.lost(B, 1)
    assert table.sent.take() == [(A, MessageType.REFORM, {})]


def test_only_the_first_failure_is_blamed() -> None:
    table = Table().begin_round()
    table.say(B, MessageType.FAILED, message="boom")
    table.say(A, MessageType.FAILED, message="connection closed by peer")
    assert [said for said in table.sent.take() if said[1] is MessageType.FAILED] == [
        (B, MessageType.FAILED, {"ended": []})
    ]


def test_a_master_that_is_new_when_all_is_done_knows_how_many_steps_that_were() -> None:
    table = Table(
        schedule=lambda samples: Schedule(samples=samples, batch_size=8, parts_per_step=2, seed=0, max_steps=150)
    )
    for member in (A, B):
        hello = {"state": MemberState.DONE, "generation": 3, "step": 150, "samples": 64, "layout": "x"}
        table.collective.joined(member, hello, 0)
    assert table.collective.ended
    assert (table.tracker.step, table.tracker.total_steps, table.tracker.steps_per_epoch) == (150, 150, 8)


def test_a_member_that_fails_because_another_program_had_ended_is_told_which() -> None:
    table = Table(script=True).begin_round()
    table.say(A, MessageType.DONE)
    table.say(B, MessageType.FAILED, message="connection closed by peer")
    assert (B, MessageType.FAILED, {"ended": ["worker-0"]}) in table.sent.take()


def test_a_failure_after_a_loss_is_its_consequence() -> None:
    table = Table().begin_round()
    table.collective.lost(A, 1)
    table.say(B, MessageType.FAILED, message="connection closed by peer")
    assert table.sent.take() == [(B, MessageType.REFORM, {})]


def test_who_leaves_is_released_when_rank_0_has_saved() -> None:
    table = Table(saves=True).begin_round()
    table.say(B, MessageType.LEAVING)
    table.say(A, MessageType.LEAVING)
    assert table.sent.take() == [(A, MessageType.SAVE, {})]
    table.say(A, MessageType.SAVED, step=12, time=datetime(2026, 1, 1, tzinfo=UTC).isoformat(), asked=True)
    assert {(m, kind) for m, kind, _ in table.sent.take()} == {(A, MessageType.RELEASED), (B, MessageType.RELEASED)}
    assert table.tracker.last_checkpoint is not None


def test_who_leaves_without_a_checkpoint_volume_is_released_at_once() -> None:
    table = Table().begin_round()
    table.say(B, MessageType.LEAVING)
    assert table.sent.take() == [(B, MessageType.RELEASED, {})]


def test_a_rank_that_lost_the_source_in_the_middle_of_its_state_is_no_source_though_it_was_further() -> None:
    table = Table().begin_round()
    table.say(A, MessageType.REPORT, step=50, samples=1, loss=1.0)
    table.collective.lost(B, 1)
    table.say(A, MessageType.READY, step=-1)
    table.join(B, step=0)
    assert table.sent.take()[-2:] == [(m, MessageType.ROUND, {"generation": 2, "source": 1}) for m in (A, B)]
    assert table.tracker.redone_steps == 50


def test_a_new_master_starts_the_programs_of_a_script_again_since_their_store_is_gone() -> None:
    table = Table(lasting=False)
    table.join(A, state=MemberState.RUNNING, round_number=3)
    table.join(B, state=MemberState.RUNNING, round_number=3)
    assert table.sent.take() == [(A, MessageType.REFORM, {}), (B, MessageType.REFORM, {})]
    table.say(A, MessageType.FAILED, message="the store is gone")
    table.say(A, MessageType.READY)
    table.say(B, MessageType.READY)
    assert table.sent.take() == [(m, MessageType.ROUND, {"generation": 4, "source": 0}) for m in (A, B)]


def test_a_new_master_finishes_a_script_whose_programs_are_all_done() -> None:
    table = Table(lasting=False)
    table.join(A, state=MemberState.DONE, round_number=3)
    table.join(B, state=MemberState.DONE, round_number=3)
    assert table.collective.ended


def test_a_new_master_keeps_the_evaluation_that_the_one_before_got() -> None:
    table = Table()
    hello = {"state": MemberState.DONE, "generation": 1, "step": 9, "evaluation": {"accuracy": 0.5}}
    table.collective.joined(A, hello, 0)
    table.join(B, state=MemberState.DONE, round_number=1, step=9)
    assert table.collective.ended
    assert table.tracker.evaluation == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("samples", "layout", "said"),
    [
        (90, "x", "worker-1 has 90 training samples, others have 100: trainer.dataset"),
        (100, "y", "worker-1 has another model"),
    ],
)
def test_a_rank_that_trains_something_else_is_refused_and_no_round_begins_with_it(
    samples: int, layout: str, said: str
) -> None:
    table = Table()
    table.join(A, state=MemberState.STARTING)
    table.join(B, state=MemberState.STARTING)
    table.say(A, MessageType.READY, step=0, samples=100, layout="x")
    table.say(B, MessageType.READY, step=-1, samples=samples, layout=layout)
    ((member, kind, fields),) = table.sent.take()
    assert (member, kind) == (B, MessageType.WRONG)
    assert fields["reason"].startswith(said)
    table.collective.lost(B, 1)
    table.join(B, state=MemberState.STARTING)
    table.say(B, MessageType.READY, step=-1, samples=100, layout="x")
    assert [kind for _, kind, _ in table.sent.take()] == [MessageType.ROUND, MessageType.ROUND]


def test_the_step_falls_back_with_the_first_report_of_a_scripts_new_round_and_old_ones_do_not_count() -> None:
    table = Table().begin_round()
    for round_number, step, now in [(1, 50, 50), (2, 11, 11), (1, 51, 11), (2, 12, 12)]:
        table.collective.reported(0, {"generation": round_number, "step": step, "samples": 1}, 0)
        assert table.tracker.step == now
    assert table.tracker.redone_steps == 39


def test_the_agents_get_one_message_that_no_process_of_the_script_joined() -> None:
    table = Table(script=True).begin_round()
    table.collective.tick(JOIN_SECONDS - 1)
    assert table.sent.take() == []
    table.collective.tick(JOIN_SECONDS)
    assert table.sent.take() == [(m, MessageType.NOT_JOINED, {"seconds": JOIN_SECONDS}) for m in (A, B)]
    assert table.tracker.warning == "no process of the script has joined the others after 45 s"
    table.collective.tick(JOIN_SECONDS + 1)
    assert table.sent.take() == []
    table.used = True
    table.collective.tick(JOIN_SECONDS + 2)
    assert table.tracker.warning is None, "it has joined after all"


@pytest.mark.parametrize("how", ["joined", "reports steps", "our own loop", "has ended"])
def test_a_script_that_trains_gets_no_warning(how: str) -> None:
    table = Table(script=how != "our own loop").begin_round()
    table.used = how in ("joined", "has ended")
    if how == "reports steps":
        table.say(A, MessageType.REPORT, step=1)
    if how == "has ended":
        table.say(A, MessageType.DONE)
        table.say(B, MessageType.DONE)
        table.sent.take()
    table.collective.tick(JOIN_SECONDS)
    assert (table.sent.take(), table.tracker.warning) == ([], None)


def test_a_script_that_ends_before_it_joins_is_named_while_the_others_wait_for_it() -> None:
    table = Table(script=True).begin_round()
    table.used = True  # by B, which waits
    table.say(A, MessageType.DONE, now=2.0)
    table.collective.tick(2.0 + ENDED_EARLY_SECONDS - 0.1)
    assert table.tracker.warning is None
    table.collective.tick(2.0 + ENDED_EARLY_SECONDS)
    assert table.tracker.warning is not None
    assert table.tracker.warning.startswith(f"{A}: the script has ended with exit code 0, and still runs on {B}")
    table.collective.tick(20)
    assert table.tracker.warning is not None, "B waits still"
    table.say(B, MessageType.DONE, now=21)
    assert table.tracker.warning is None


@pytest.mark.parametrize("how", ["reports steps", "after the time to join", "at the same time"])
def test_a_script_that_has_trained_may_end_before_the_others(how: str) -> None:
    table = Table(script=True).begin_round()
    table.used = True
    if how == "reports steps":
        table.say(B, MessageType.REPORT, step=1)
    table.say(A, MessageType.DONE, now=JOIN_SECONDS if how == "after the time to join" else 2.0)
    if how == "at the same time":
        table.say(B, MessageType.DONE, now=2.0 + ENDED_EARLY_SECONDS - 0.1)
    table.collective.tick(JOIN_SECONDS + 100)
    assert table.tracker.warning is None


def test_the_time_to_join_begins_with_each_round() -> None:
    table = Table(script=True).begin_round()
    table.collective.lost(B, 1)
    table.collective.tick(JOIN_SECONDS)
    assert MessageType.NOT_JOINED not in [kind for _, kind, _ in table.sent.take()], "there is no round"


def test_a_script_whose_processes_trained_apart_ends_with_a_warning() -> None:
    table = Table(script=True).begin_round()
    table.say(A, MessageType.DONE)
    table.say(B, MessageType.DONE)
    assert table.collective.ended
    assert table.tracker.progress(now=1, waiting_for=None).warning == table.tracker.warning
    assert "2 processes trained separate models" in (table.tracker.warning or "")
