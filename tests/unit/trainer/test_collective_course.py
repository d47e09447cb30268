"""Roll-backs and evaluations of ranks, as the master decides them, also one that is new."""

from typing import Any

import pytest

from configs import config_of
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.coordinator.collective import CollectiveCoordinator
from disttrain_trainer.coordinator.evaluations import Evaluations
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member

A, B = (Member(Role.WORKER, rank) for rank in range(2))
NAN = {"step": 7, "generation": 1, "parts": [14, 15]}


def config() -> JobConfig:
    return config_of(
        {
            "strategy": {"type": "DataParallel"},
            "worker": {"replicas": 2},
            "trainer": {
                "model": "m:m",
                "dataset": "m:d",
                "evaluate": "m:e",
                "evaluateEverySteps": 5,
                "nanPolicy": {"rollBacks": 1},
                "optimizer": {"name": "SGD", "learningRate": 0.1},
                "maxSteps": 20,
            },
        }
    )


class Table:
    """A master of two ranks; what it says is kept."""

    def __init__(self) -> None:
        self.said: list[tuple[Member, MessageType, dict[str, Any]]] = []
        self.tracker = Tracker(attempt=1)
        self.collective = CollectiveCoordinator(
            sender=self,
            tracker=self.tracker,
            members=(A, B),
            renew_store=lambda opened: opened(0),
            evaluations=Evaluations(config=config(), tracker=self.tracker),
        )
        self.collective.open(0)

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        self.said.append((member, kind, fields))

    def take(self, kind: MessageType) -> list[tuple[Member, dict[str, Any]]]:
        said, self.said = self.said, []
        return [(member, fields) for member, of, fields in said if of is kind]

    def say(self, member: Member, kind: MessageType, **fields: object) -> None:
        self.collective.on_message(member, {"type": kind, **fields}, 0)

    def begin(self, **hello: object) -> None:
        for member in (A, B):
            self.collective.joined(member, {"state": "ready", "step": 0, **hello}, 0)


def test_all_ranks_go_back_and_begin_again_without_the_parts() -> None:
    table = Table()
    table.begin()
    table.take(MessageType.ROUND)
    table.say(B, MessageType.NAN, **NAN)
    orders = table.take(MessageType.REFORM)
    assert [(member, fields["roll_back"], fields["course"]["left_out"]) for member, fields in orders] == [
        (A, True, [14, 15]),
        (B, True, [14, 15]),
    ]
    table.say(A, MessageType.NAN, **NAN)  # it found the same
    assert table.tracker.nan_loss is None
    table.say(A, MessageType.READY, step=5, course=Course(evaluated=5).model_dump())
    table.say(B, MessageType.READY, step=-1)
    rounds = table.take(MessageType.ROUND)
    assert [fields["course"]["left_out"] for _, fields in rounds] == [[14, 15]] * 2
    assert [fields["course"]["evaluated"] for _, fields in rounds] == [5, 5]
    table.say(B, MessageType.NAN, **NAN | {"generation": 2, "step": 9})
    assert table.tracker.nan_loss == "worker-1 at step 9"


@pytest.mark.parametrize("first", [A, B])
def test_a_new_master_hears_of_a_loss_that_the_old_one_may_not_have_heard_of(first: Member) -> None:
    table = Table()
    running = {"state": "running", "generation": 1, "step": 7}
    for member in (first, B if first == A else A):
        table.collective.joined(member, running | ({"nan": NAN} if member == B else {}), 0)
    orders = table.take(MessageType.REFORM)
    assert sorted(member for member, fields in orders if fields.get("roll_back")) == [A, B]


def test_a_new_master_hears_what_a_rank_found_before() -> None:
    table = Table()
    found = {"generation": 1, "step": 5, "slice": 0, "of": 1, "evaluation": {"accuracy": 0.5}, "weights": None}
    running = {"state": "running", "generation": 1, "step": 5}
    table.collective.joined(A, running | {"found": found}, 0)
    table.collective.joined(B, running, 0)
    courses = {member: fields["course"]["evaluated"] for member, fields in table.take(MessageType.COURSE)}
    assert courses == {A: 5, B: 5}
    assert table.tracker.evaluation == {"accuracy": 0.5}


@pytest.mark.parametrize("first", [A, B])
def test_a_rank_that_a_new_master_knew_before_it_knew_of_an_evaluation_hears_of_it(first: Member) -> None:
    table = Table()
    running = {"state": "running", "generation": 1, "step": 5}
    told = running | {"course": Course(evaluated=5, evaluation={"accuracy": 0.5}).model_dump()}
    for member in (first, B if first == A else A):
        table.collective.joined(member, told if member == A else running, 0)
    assert [(member, fields["course"]["evaluated"]) for member, fields in table.take(MessageType.COURSE)] == [(B, 5)]


def test_a_new_master_knows_the_parts_that_are_left_out_from_a_rank_that_is_not_the_newest() -> None:
    table = Table()
    went_back = Course(evaluated=5, roll_backs=1, left_out=[14, 15], rolled_back="worker-1 at step 7")
    table.collective.joined(A, {"state": "ready", "step": 5, "course": went_back.model_dump()}, 0)
    table.collective.joined(B, {"state": "running", "generation": 1, "step": 7}, 0)
    table.say(B, MessageType.READY, step=7)
    rounds = table.take(MessageType.ROUND)
    assert [(fields["source"], fields["course"]["left_out"]) for _, fields in rounds] == [(1, [14, 15])] * 2
