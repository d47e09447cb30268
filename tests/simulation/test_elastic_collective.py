"""Ranks of an elastic job that join, leave and are lost at any moment, the master too: each round has one state, and the job ends.

The ranks compute nothing: a step is taken when every member of a round takes it. Messages of each connection come in order, and late.
`make simulation` tries many more schedules.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from disttrain.api.names import Role
from disttrain_trainer.coordinator.elastic import ElasticCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.members import CollectiveMember, MemberState
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member
from width import WIDE

SCHEDULES = 5000 if WIDE else 300
STEPS = 12
MOST = 4


class Rank:
    """A process: the trainer's own view of it, its step, and what is under way between it and the master."""

    def __init__(self, number: int, *, in_steps: bool) -> None:
        self.member = Member(Role.WORKER, number)
        self.view = CollectiveMember()
        self.in_steps = in_steps
        self.leaving = self.connected = False
        self.to_master: deque[Message] = deque()
        self.to_rank: deque[Message] = deque()

    def send(self, kind: MessageType, **fields: Any) -> bool:
        if self.connected:
            self.to_master.append({"type": kind, **fields})
        return self.connected

    def ready(self) -> None:
        """As get_ready does."""
        self.view.state, self.view.round = MemberState.READY, None
        self.say_ready()

    def say_ready(self) -> None:
        self.send(MessageType.READY, generation=self.view.describe()["generation"], step=self.view.step)


class Schedule:
    """One schedule; the seed decides everything."""

    def __init__(self, seed: int) -> None:
        self.chance = Random(seed)
        self.fewest = self.chance.choice((1, 1, 2, 3))
        self.in_steps = self.chance.random() < 0.7
        self.now = 0.0
        self.wakes: list[float] = []
        self.ranks: dict[int, Rank] = {}
        self.events = self.chance.choice((0, 3, 10, 30))
        self.finished = False
        self.start_master()
        for number in range(self.chance.randint(self.fewest, MOST)):
            self.start(number)

    # The master.

    def start_master(self) -> None:
        self.wakes = []
        self.tracker = Tracker(attempt=1)
        self.master = ElasticCoordinator(
            fewest=self.fewest,
            expected=(),
            wake=lambda seconds: self.wakes.append(self.now + seconds),
            in_steps=self.in_steps,
            sender=self,
            tracker=self.tracker,
            members=tuple(Member(Role.WORKER, number) for number in range(MOST)),
            renew_store=lambda opened: opened(self.now),
            lasting=self.in_steps,
        )
        self.master.open(self.now)
        for rank in self.ranks.values():
            self.connect(rank)

    def send(self, member: Member, kind: MessageType, **fields: Any) -> None:
        rank = self.ranks.get(member.rank)
        if kind is MessageType.ROUND:
            assert len(fields["members"]) >= self.fewest
            assert fields["members"] == sorted(set(fields["members"]))
        if rank is not None and rank.connected:
            rank.to_rank.append({"type": kind, **fields})

    # The ranks.

    def start(self, number: int) -> None:
        rank = self.ranks[number] = Rank(number, in_steps=self.in_steps)
        self.connect(rank)

    def connect(self, rank: Rank) -> None:
        rank.to_master.clear()
        rank.to_rank.clear()
        rank.connected = True
        rank.to_master.append({"type": MessageType.HELLO, **rank.view.describe()})
        if rank.view.state is MemberState.READY and self.chance.random() < 0.3:
            rank.say_ready()  # it became ready as it connected: HELLO and READY say the same
        if rank.leaving:
            rank.send(MessageType.LEAVING)

    def end(self, rank: Rank) -> None:
        """A process is gone: the others of its round see their connections to it end."""
        if self.ranks.get(rank.member.rank) is not rank:
            return
        del self.ranks[rank.member.rank]
        self.master.lost(rank.member, self.now)
        for other in self.of_round(rank):
            if other.view.state is MemberState.RUNNING:
                other.ready()

    def of_round(self, rank: Rank) -> list[Rank]:
        this = rank.view.round
        return (
            []
            if this is None
            else [
                other
                for other in self.ranks.values()
                if other is not rank
                and other.view.round is not None
                and (other.view.round.number, other.view.round.members) == (this.number, this.members)
            ]
        )

    def move(self, rank: Rank) -> None:
        """What its main thread does next."""
        view = rank.view
        if view.state is MemberState.STARTING:
            view.step = -1 if rank.member.rank else 0
            rank.ready()
        elif view.state is MemberState.RUNNING and view.round is None:
            rank.ready()
        elif view.state is MemberState.RUNNING and view.round is not None:
            self.take_a_step(rank)

    def take_a_step(self, rank: Rank) -> None:
        assert rank.view.round is not None
        together = [rank, *self.of_round(rank)]
        if len(together) < len(rank.view.round.members) or any(one.view.round is None for one in together):
            return  # they wait for one another
        source = next(one for one in together if one.member.rank == rank.view.round.source)
        step = max(source.view.step, 0)
        assert all(one.view.step <= step for one in together), "the newest state is taken over"
        if step < STEPS:
            step += 1
        for one in together:
            one.view.step = step
        if step == STEPS:
            for one in together:
                if one.view.state is MemberState.RUNNING and self.chance.random() < 0.1:
                    one.ready()  # its connections break after the last step of the others
                elif one.view.state is MemberState.RUNNING:
                    one.view.state = MemberState.DONE
                    one.send(MessageType.DONE)
        elif any(one.view.resize_asked for one in together):
            for one in together:
                one.ready()

    def receive(self, rank: Rank) -> None:
        message = rank.to_rank.popleft()
        match message["type"]:
            case MessageType.RELEASED:
                assert rank.leaving
                if rank.view.state not in (MemberState.RUNNING, MemberState.DONE):
                    self.released_in_order = True
                self.end(rank)
            case MessageType.FINISH:
                self.finished = True
            case MessageType.REFORM:
                rank.view.round = None
                if rank.view.state is MemberState.DONE:
                    rank.view.state = MemberState.RUNNING
            case _:
                rank.view.on_message(message)

    def deliver(self, rank: Rank) -> None:
        message = rank.to_master.popleft()
        if message["type"] is MessageType.HELLO:
            self.master.joined(rank.member, message, self.now)
        else:
            self.master.on_message(rank.member, message, self.now)

    # What happens.

    def event(self) -> None:
        self.events -= 1
        running = [rank for rank in self.ranks.values() if not rank.leaving]
        kind = self.chance.randrange(4)
        if kind == 0 and len(running) > self.fewest:
            rank = self.chance.choice(running)
            rank.leaving = True
            rank.send(MessageType.LEAVING)
        elif kind == 1 and self.ranks:
            self.end(self.chance.choice(list(self.ranks.values())))
        elif kind == 2:
            self.start_master()
        elif missing := [number for number in range(MOST) if number not in self.ranks]:
            self.start(self.chance.choice(missing))

    def run(self) -> None:
        for _ in range(20_000):
            self.now += 0.01
            if self.finished:
                return
            if due := [at for at in self.wakes if at <= self.now]:
                self.wakes = [at for at in self.wakes if at > self.now]
                assert due
                self.master.tick(self.now)
            if self.events and self.chance.random() < 0.05:
                self.event()
            for number in range(MOST):  # what the plan does
                missing = number not in self.ranks
                if missing and len(self.ranks) < self.fewest and not self.finished and self.chance.random() < 0.1:
                    self.start(number)
            rank = self.chance.choice(list(self.ranks.values())) if self.ranks else None
            if rank is not None:
                choices: list[Callable[[Rank], None]] = [self.move]
                choices += [self.deliver] * bool(rank.to_master) + [self.receive] * bool(rank.to_rank)
                self.chance.choice(choices)(rank)
        states = {str(rank.member): (rank.view.state, rank.view.step, rank.leaving) for rank in self.ranks.values()}
        raise AssertionError(f"the job did not end: {states}, {self.master.waiting_for(self.now)}")


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_any_schedule() -> None:
    for seed in range(SCHEDULES):
        try:
            Schedule(seed).run()
        except Exception as error:
            raise AssertionError(f"schedule {seed}: {error!r}") from error
