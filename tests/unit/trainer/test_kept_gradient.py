"""A gradient whose push was cut off is pushed again as it was, and is not computed again."""

import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disttrain_trainer.data.schedule import BatchPart, Schedule
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.loop.stopwatch import Stopwatch
from disttrain_trainer.model.flat import Vectors
from disttrain_trainer.net.members import ParameterServerMember
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.parameter_server.client import GradientInfo
from disttrain_trainer.strategies.kept_gradient import KeptGradient
from disttrain_trainer.strategies.push_pull import PushPull


class Model:
    took_part = None

    def __init__(self) -> None:
        self.vector = torch.zeros(2)

    def gradients(self) -> Vectors:
        return (self.vector,)


class Client:
    """Of one lease."""

    def __init__(self, *, version: int, breaks: bool) -> None:
        self.versions: tuple[int, ...] = (version,)
        self.breaks = breaks
        self.pushed: list[tuple[int, list[float], GradientInfo, tuple[int, ...]]] = []

    def join(self) -> None:
        pass

    def push(self, part: BatchPart, gradients: Vectors, info: GradientInfo) -> bool:
        if self.breaks:
            raise PeerLost("parameter-server-0", "closed by the peer")
        self.pushed.append((part.index, gradients[0].tolist(), info, self.versions))
        return True


class Worker:
    """What a worker keeps from lease to lease."""

    def __init__(self) -> None:
        self.model, self.kept, self.member = Model(), KeptGradient(), ParameterServerMember()
        self.rounds = 0
        """All have one number: masters and servers are new each time."""
        self.left: list[bool] = []
        self.buffers_break = False

    def exchange(self, client: Client, *, part: int, resumes: bool = False) -> PushPull:
        """The worker is invited; this part is assigned. resumes: in the same round as before."""
        member = self.member
        self.rounds += not resumes
        fields = {"generation": 4, "stay": f"m{self.rounds}.1", "servers": [f"s{self.rounds}"]}
        member.on_message({"type": MessageType.ROUND, "buffers": None, "anew": False, **fields})
        assert member.round is not None
        member.assignments.append(part)
        control: Any = SimpleNamespace(changed=threading.Condition(), send=lambda *_, **__: None)
        assignments = Assignments(control, member)
        assignments.begin(member.round)

        def leave_buffers(_: Client, __: BatchPart, *, again: bool) -> None:
            self.left.append(again)
            if self.buffers_break:
                raise PeerLost("parameter-server-0", "closed by the peer")

        staging = SimpleNamespace(gradients=lambda vectors: vectors)
        replica = SimpleNamespace(
            model=self.model,
            staging=staging,
            pull=lambda *_: True,
            take_buffers=lambda *_: True,
            leave_buffers=leave_buffers,
        )
        return PushPull(
            control=control,
            member=member,
            metrics=SimpleNamespace(),  # type: ignore[arg-type]
            assignments=assignments,
            client=client,  # type: ignore[arg-type]
            loop=SimpleNamespace(stopwatch=Stopwatch(defaultdict(float))),  # type: ignore[arg-type]
            schedule=Schedule(samples=8, batch_size=4, parts_per_step=2, seed=0, max_steps=2),
            replica=replica,  # type: ignore[arg-type]
            is_sync=True,
            every=0,
            save=lambda: None,
            evaluate=lambda: None,
            on_part=lambda: None,
            kept=self.kept,
        )

    def computes(self, exchange: PushPull, gradient: float) -> bool:
        """As the training loop; whether the part was computed."""
        (part,) = exchange.next_parts()
        self.model.vector.zero_()
        if is_computed := exchange.before(part) is not None:
            self.model.vector.fill_(gradient)
        exchange.complete()
        return is_computed


def worker_whose_push_was_cut_off() -> Worker:
    worker = Worker()
    exchange = worker.exchange(Client(version=7, breaks=True), part=1)
    with pytest.raises(PeerLost):
        worker.computes(exchange, 0.5)
    assert worker.member.describe()["begun"] == {"generation": 4, "stay": "m1.1", "servers": ["s1"], "slices": [1]}, (
        "in HELLO, too"
    )
    return worker


def test_it_is_pushed_again_in_the_same_round() -> None:
    worker = worker_whose_push_was_cut_off()
    client = Client(version=8, breaks=False)
    assert not worker.computes(worker.exchange(client, part=1, resumes=True), 0.25)
    assert client.pushed == [(1, [0.5, 0.5], GradientInfo(encoded=True), (7,))]
    assert worker.left == [False, True], "the buffers that the part left are those of then"
    assert "begun" not in worker.member.describe()


def test_it_is_kept_when_it_is_cut_off_again() -> None:
    worker = worker_whose_push_was_cut_off()
    with pytest.raises(PeerLost):
        worker.computes(worker.exchange(Client(version=8, breaks=True), part=1, resumes=True), 0.25)
    assert worker.member.describe()["begun"]["slices"] == [1]
    client = Client(version=9, breaks=False)
    worker.computes(worker.exchange(client, part=1, resumes=True), 0.25)
    assert client.pushed == [(1, [0.5, 0.5], GradientInfo(encoded=True), (7,))]


@pytest.mark.parametrize(("resumes", "part"), [(False, 1), (True, 2)], ids=["of a lost round", "the servers have it"])
def test_it_is_dropped(resumes: bool, part: int) -> None:
    worker = worker_whose_push_was_cut_off()
    client = Client(version=8, breaks=False)
    assert worker.computes(worker.exchange(client, part=part, resumes=resumes), 0.25)
    assert client.pushed == [(part, [0.25, 0.25], GradientInfo(), (8,))]
    assert "begun" not in worker.member.describe()


def test_one_that_was_not_encoded_yet_is_encoded_when_it_is_pushed() -> None:
    worker = Worker()
    worker.buffers_break = True
    with pytest.raises(PeerLost):
        worker.computes(worker.exchange(Client(version=7, breaks=False), part=0), 0.5)
    worker.buffers_break = False
    client = Client(version=8, breaks=False)
    assert not worker.computes(worker.exchange(client, part=0, resumes=True), 0.25)
    assert client.pushed == [(0, [0.5, 0.5], GradientInfo(), (7,))]
