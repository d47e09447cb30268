"""Between two tries of a last file a rank waits: for the end of its round, or for a question of the master's that it can answer."""

import time

import pytest

from configs import config_of
from disttrain.api.names import Role
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.rank import over

TRAINER = {
    "model": "a:m",
    "dataset": "a:d",
    "loss": "a:l",
    "optimizer": {"name": "SGD", "learningRate": 0.1},
    "batchSize": 8,
    "maxSteps": 1,
}
ROUND = Round(1)


class Saves:
    """The checkpoints of a rank, whose answer takes the question back."""

    def __init__(self, member: CollectiveMember) -> None:
        self._member = member
        self.answers = 0

    def wait(self) -> None: ...

    def answer(self) -> None:
        self._member.save_asked = False
        self.answers += 1


@pytest.fixture
def member() -> CollectiveMember:
    made = CollectiveMember()
    made.round = ROUND
    return made


@pytest.fixture
def control() -> ControlClient:
    config = config_of({"strategy": {"type": "DataParallel"}, "trainer": TRAINER, "worker": {"replicas": 2}})
    process = Process(config=config, role=Role.WORKER, index=0)
    return ControlClient(process=process, describe=dict, on_message=lambda message: None, on_released=lambda: None)


def test_a_rank_without_checkpoints_waits_though_the_master_asks(
    member: CollectiveMember, control: ControlClient
) -> None:
    member.save_asked = True
    began = time.monotonic()
    assert not over(member, control, None, ROUND, 0.1)
    assert time.monotonic() - began >= 0.1
    assert member.save_asked


def test_one_that_writes_them_answers_at_once(member: CollectiveMember, control: ControlClient) -> None:
    member.save_asked = True
    saves = Saves(member)
    began = time.monotonic()
    assert not over(member, control, saves, ROUND, 60)
    assert time.monotonic() - began < 30
    assert saves.answers == 1


def test_the_end_of_the_round_ends_the_wait(member: CollectiveMember, control: ControlClient) -> None:
    member.round = Round(2)
    assert over(member, control, None, ROUND, 60)
