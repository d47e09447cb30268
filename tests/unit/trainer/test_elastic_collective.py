"""The rounds of an elastic job: which members each has, when it begins, how it ends when members join or leave."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from configs import config_of
from disttrain.api.names import Role
from disttrain_trainer.coordinator.elastic import RETURN_SECONDS, ElasticCoordinator
from disttrain_trainer.coordinator.formation import SETTLE_SECONDS
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.members import MemberState, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member
from disttrain_trainer.strategies.script import contract
from training.job import digits

W = [Member(Role.WORKER, rank) for rank in range(5)]


class Table:
    """A job of two to five ranks that began with two."""

    def __init__(self, *, fewest: int = 2, expected: int = 2, in_steps: bool = True, saves: bool = False) -> None:
        self.said: list[tuple[Member, MessageType, dict[str, Any]]] = []
        self.wakes: list[float] = []
        self.tracker = Tracker(attempt=1)
        self.master = ElasticCoordinator(
            fewest=fewest,
            expected=W[:expected],
            wake=self.wakes.append,
            in_steps=in_steps,
            sender=self,
            tracker=self.tracker,
            members=tuple(W),
            renew_store=self.renew,
            saves=saves,
        )
        self.master.open(0)

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        self.said.append((member, kind, fields))

    def renew(self, opened: Callable[[float], None]) -> None:
        opened(1e6)

    def take(self) -> list[tuple[Member, MessageType]]:
        said, self.said = self.said, []
        return [(member, kind) for member, kind, _ in said]

    def rounds(self) -> list[tuple[list[int], int]]:
        """Members and source of the rounds that were begun."""
        found = [fields for _, kind, fields in self.said if kind is MessageType.ROUND]
        self.said = [one for one in self.said if one[1] is not MessageType.ROUND]
        return [(f["members"], f["source"]) for number, f in enumerate(found) if f not in found[:number]]

    def join(self, *members: Member, now: float = 0, **hello: Any) -> None:
        for member in members:
            self.master.joined(member, {"state": MemberState.READY, "step": -1, **hello}, now)

    def ready(self, *members: Member, step: int, now: float = 0) -> None:
        for member in members:
            self.master.on_message(member, {"type": MessageType.READY, "step": step}, now)

    def leaves(self, member: Member, now: float = 0) -> None:
        self.master.on_message(member, {"type": MessageType.LEAVING}, now)


def running(*members: Member, **options: Any) -> Table:
    table = Table(expected=len(members), **options)
    table.join(*members)
    assert table.rounds() == [([member.rank for member in members], members[0].rank)]
    return table


def test_a_round_begins_at_once_when_all_that_are_expected_are_ready() -> None:
    table = Table(expected=3)
    table.join(W[0], W[1])
    assert table.rounds() == []
    table.join(W[2])
    assert table.rounds() == [([0, 1, 2], 0)]
    assert table.tracker.world_size == 3


def test_it_begins_with_those_that_are_there_a_moment_after_they_are_enough() -> None:
    table = Table(expected=4)
    table.join(W[3])
    assert table.master.waiting_for(0) == "1 more worker (ready: 1 of at least 2)"
    table.join(W[1], now=5)
    assert table.wakes == [SETTLE_SECONDS]
    table.master.tick(5.5)
    assert table.rounds() == []
    assert table.master.waiting_for(5.5) == "worker-0, worker-2 (0 s)"
    table.master.tick(5 + SETTLE_SECONDS)
    assert table.rounds() == [([1, 3], 1)], "the numbers of those that take part may have holes"
    assert table.master.waiting_for(7) is None


def test_a_member_that_joins_ends_the_round_after_a_step_and_gets_the_newest_state() -> None:
    table = running(W[0], W[1])
    table.join(W[2], state=MemberState.STARTING)
    assert table.take() == []
    table.ready(W[2], step=-1)
    assert table.take() == [(W[0], MessageType.RESIZE), (W[1], MessageType.RESIZE)]
    table.ready(W[0], step=7)
    assert table.take() == [], "the other one is about to say so, too"
    table.ready(W[1], step=7)
    assert table.rounds() == [([0, 1, 2], 0)]
    assert table.tracker.redone_steps == 0


def test_several_that_join_together_are_waited_for_and_one_that_never_comes_is_not() -> None:
    table = running(W[0], W[1])
    table.join(W[2], W[3], state=MemberState.STARTING)
    table.ready(W[2], step=-1, now=1)
    assert table.take() == []
    table.master.tick(1 + SETTLE_SECONDS)
    assert table.take() == [(W[0], MessageType.RESIZE), (W[1], MessageType.RESIZE)]
    table.ready(W[0], W[1], step=7, now=2.5)
    table.master.tick(2.5 + SETTLE_SECONDS)
    assert table.rounds() == [([0, 1, 2], 0)]


def test_a_member_that_says_ready_as_its_hello_did_has_not_left_the_round_that_began_between_the_two() -> None:
    table = running(W[0], W[1])
    table.master.on_message(W[1], {"type": MessageType.READY, "generation": 0, "step": -1}, 1)
    assert table.take() == []
    table.master.on_message(W[1], {"type": MessageType.READY, "generation": 1, "step": -1}, 1)
    assert table.take() == [(W[0], MessageType.REFORM)]


def test_a_member_that_leaves_is_released_after_the_step_in_work() -> None:
    table = running(W[0], W[1], W[2])
    table.leaves(W[0])
    assert table.take() == [(member, MessageType.RESIZE) for member in W[:3]]
    table.ready(W[0], W[1], step=7)
    assert table.take() == [(W[0], MessageType.RELEASED)]
    table.ready(W[2], step=7)
    assert table.rounds() == [([1, 2], 1)]
    table.master.lost(W[0], 2)
    assert table.take() == []
    assert table.master.waiting_for(3) is None


def test_below_the_fewest_a_member_leaves_as_from_any_job() -> None:
    table = running(W[0], W[1], saves=True)
    table.leaves(W[1])
    assert table.take() == [(W[0], MessageType.SAVE)]


def test_the_state_must_not_leave_with_the_last_that_have_it() -> None:
    """Those that join have none before their first round."""
    table = running(W[0], W[1], saves=True)
    table.join(W[2], W[3], state=MemberState.STARTING)
    table.leaves(W[1])
    assert table.take() == [(W[0], MessageType.SAVE)]


def test_when_the_job_itself_is_ended_all_leave_once_the_state_is_saved() -> None:
    table = running(W[0], W[1], W[2], saves=True)
    table.master.terminate(1)
    table.leaves(W[2])
    assert set(table.take()) == {(W[0], MessageType.SAVE)}


def test_what_is_to_be_saved_between_two_rounds_is_saved_in_the_next_one() -> None:
    table = running(W[0], W[1], W[2], saves=True)
    table.leaves(W[2])
    table.leaves(W[1])
    table.take()
    table.ready(*W[:3], step=7)
    assert table.take()[-1] == (W[0], MessageType.SAVE)
    saved = {"type": MessageType.SAVED, "step": 8, "time": datetime(2026, 1, 1, tzinfo=UTC).isoformat(), "asked": True}
    table.master.on_message(W[0], saved, 2)
    assert (W[1], MessageType.RELEASED) in table.take()


def test_after_a_loss_the_others_wait_a_moment_and_go_on_without_it() -> None:
    table = running(W[0], W[1], W[2])
    table.master.lost(W[1], 1)
    assert table.take() == [(W[0], MessageType.REFORM), (W[2], MessageType.REFORM)]
    table.ready(W[0], step=9, now=1)
    table.ready(W[2], step=10, now=1)
    assert table.rounds() == []
    table.master.tick(1 + SETTLE_SECONDS)
    assert table.rounds() == [([0, 2], 2)]


def test_a_lost_member_that_is_back_in_time_is_in_the_next_round() -> None:
    table = running(W[0], W[1], W[2])
    table.master.lost(W[1], 1)
    table.take()
    table.ready(W[0], W[2], step=9, now=1)
    table.join(W[1], now=1.2)
    assert table.rounds() == [([0, 1, 2], 0)]


def test_with_too_few_no_round_begins_and_the_master_says_so() -> None:
    table = running(W[0], W[1])
    table.master.lost(W[1], 1)
    table.ready(W[0], step=9, now=1)
    table.master.tick(100)
    assert table.rounds() == []
    assert table.tracker.world_size == 0
    assert table.master.waiting_for(100) == "1 more worker (ready: 1 of at least 2)"


def test_near_the_end_of_the_job_no_round_is_ended() -> None:
    table = running(W[0], W[1])
    table.master.on_message(W[1], {"type": MessageType.DONE}, 1)
    table.join(W[2])
    assert table.take() == []
    table.master.on_message(W[0], {"type": MessageType.DONE}, 1)
    assert table.take() == [(member, MessageType.FINISH) for member in W[:3]]


def test_a_new_master_leaves_a_running_round_alone_once_all_its_members_are_there() -> None:
    table = Table(expected=0)
    for member in (W[1], W[3]):
        table.join(member, state=MemberState.RUNNING, generation=4, members=2)
    assert table.take() == []
    assert (table.tracker.round_number, table.tracker.world_size) == (4, 2)
    table.join(W[0])
    assert table.take() == [(W[1], MessageType.RESIZE), (W[3], MessageType.RESIZE)]


def test_a_new_master_ends_a_round_of_which_a_member_does_not_come() -> None:
    table = Table(expected=0)
    for member in (W[1], W[3]):
        table.join(member, state=MemberState.RUNNING, generation=4, members=3)
    assert table.wakes[0] == RETURN_SECONDS
    assert table.take() == []
    table.master.tick(RETURN_SECONDS)
    assert table.take() == [(W[1], MessageType.REFORM), (W[3], MessageType.REFORM)]


def test_one_that_comes_late_to_a_new_master_leaves_its_old_round() -> None:
    table = Table(expected=0)
    table.join(W[0], W[1])
    assert table.rounds() == [([0, 1], 0)]
    table.join(W[2], state=MemberState.RUNNING, generation=1, members=3)
    assert table.take() == [(W[2], MessageType.REFORM)]
    assert table.tracker.world_size == 2


def test_the_programs_of_a_script_are_stopped_when_a_member_joins() -> None:
    table = running(W[0], W[1], in_steps=False)
    table.join(W[2])
    assert table.take() == [(W[0], MessageType.REFORM), (W[1], MessageType.REFORM)]
    table.ready(W[0], W[1], step=-1)
    assert table.rounds() == [([0, 1, 2], 0)]


def test_a_script_sees_the_ranks_and_the_world_of_its_round() -> None:
    worker = {"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 5}, "processesPerWorker": 2}
    spec = digits(worker=worker) | {"trainer": {"script": {"file": "train.py"}}}
    config = config_of(spec)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")

    def seen(workers_per_machine: int) -> list[str]:
        on = config.model_copy(update={"workers_per_machine": workers_per_machine})
        this_round = Round(3, members=(0, 2, 4))
        environ = contract(on, index=4, local_rank=1, this_round=this_round)
        assert environ["TORCHELASTIC_RESTART_COUNT"] == "2"
        return [environ[name] for name in names]

    assert seen(1) == ["5", "6", "1", "2", "2", "3"]
    assert seen(5) == ["5", "6", "5", "6", "0", "1"], "in a local run the workers share a machine"


def save_asked(table: Table) -> list[Member]:
    return [member for member, kind in table.take() if kind is MessageType.SAVE]


def test_a_save_that_a_member_was_asked_for_as_it_left_its_round_is_asked_for_in_the_next_one() -> None:
    table = running(W[0], W[1], saves=True)
    table.leaves(W[1])
    assert save_asked(table) == [W[0]]
    table.join(W[2])
    assert (W[0], MessageType.RESIZE) in table.take()
    table.ready(W[0], W[1], step=7)
    assert save_asked(table) == [W[0]]


def test_a_job_that_is_ended_between_two_rounds_is_saved_in_the_next_one() -> None:
    table = running(W[0], W[1], saves=True)
    table.join(W[2])
    table.ready(W[0], step=7)
    table.take()
    table.master.terminate(1)
    assert not table.master.released
    table.ready(W[1], step=7)
    assert save_asked(table) == [W[0]]


def test_a_round_of_which_a_member_is_done_and_another_one_broke_is_ended_even_while_members_join() -> None:
    table = running(W[0], W[1])
    table.join(W[2])
    table.take()
    table.master.on_message(W[0], {"type": MessageType.DONE}, 1)
    table.ready(W[1], step=9)
    assert table.take() == [(W[0], MessageType.REFORM)]
    table.ready(W[0], step=10)
    assert table.rounds() == [([0, 1, 2], 0)]


def test_a_new_master_asks_for_the_state_once_it_knows_the_first_of_the_round() -> None:
    table = Table(expected=0, saves=True)
    table.join(W[3], state=MemberState.RUNNING, generation=4, members=2)
    table.leaves(W[3])
    assert table.take() == []
    table.join(W[1], state=MemberState.RUNNING, generation=4, members=2)
    assert save_asked(table) == [W[1]]


def test_a_member_that_drains_between_two_rounds_is_released_when_too_few_stay_for_another() -> None:
    table = running(W[0], W[1], W[2], saves=True)
    table.join(W[3], state=MemberState.STARTING)
    table.join(W[4])
    table.master.tick(SETTLE_SECONDS)
    assert (W[0], MessageType.RESIZE) in table.take()
    table.ready(*W[:3], step=7)
    table.master.terminate(1)
    table.leaves(W[0])
    for member in (W[1], W[2]):
        table.master.lost(member, 0.5)
        assert table.take() == []
    table.master.lost(W[4], 0.5)
    assert table.take() == [(W[0], MessageType.RELEASED)]
    assert table.master.released
