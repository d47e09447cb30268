"""The parameter servers, as the master knows them: what each one holds, and questions to all of them at once.

Each shard has a server that serves it, its primary. A question is answered when every primary has answered. Pure; the sender sends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

from disttrain.api.names import Role
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member, Sender

Then = Callable[[IndexSet], None]
"""Gets the parts that are applied on every server."""


@dataclass(slots=True)
class _Server:
    round_number: int
    """0 before its first one."""
    applied: IndexSet


@dataclass(slots=True)
class _Question:
    then: Then
    applied: list[IndexSet] = field(default_factory=list)


class Servers:
    """The servers that are there, and the open questions."""

    def __init__(self, *, sender: Sender, count: int) -> None:
        self._sender = sender
        self.count = count
        """How many the job has: as many as shards."""
        self.primaries = list(range(count))
        """The server of each shard."""
        self._there: dict[int, _Server] = {}
        self._asked = 0
        self.asked_at = 0.0
        """Time of the last question."""
        self._open: dict[int, _Question] = {}
        self._norms: dict[int, dict[tuple[int, int], float]] = {}
        """By server, round and version: the squared norm of its part of a step's gradient."""

    @property
    def complete(self) -> bool:
        """Whether every shard is served."""
        return all(index in self._there for index in self.primaries)

    @property
    def all_here(self) -> bool:
        return len(self._there) == self.count

    @property
    def gradient_norm(self) -> float | None:
        """That of the newest step which every server measured; None when there is none."""
        known = [self._norms.get(index, {}) for index in set(self.primaries)]
        common = set.intersection(*map(set, known))
        return math.sqrt(sum(norms[max(common)] for norms in known)) if common else None

    @property
    def missing(self) -> list[Member]:
        """Without which a shard is not served."""
        return [Member(Role.PARAMETER_SERVER, index) for index in sorted({*self.primaries} - {*self._there})]

    @property
    def round_numbers(self) -> set[int]:
        """The rounds that the connected servers are in; 0 for none."""
        return {server.round_number for server in self._there.values()}

    @property
    def applied(self) -> IndexSet:
        """The parts that are applied on every shard; for when they are complete."""
        return reduce(IndexSet.intersection, (self._there[index].applied for index in self.primaries))

    def know(self, index: int, message: Message) -> None:
        """Records the state that a server reported."""
        round_number = int(message["generation"])
        self._there[index] = _Server(round_number, parts_of(message))
        if norms := message.get("gradient_norms"):
            self._norms[index] = {(round_number, int(version)): squared for version, squared in norms}

    def lose(self, index: int) -> None:
        """A server is lost."""
        self._there.pop(index, None)

    def forget_rounds(self) -> None:
        """The shards of all servers are void: none is in a round any more."""
        for server in self._there.values():
            server.round_number = 0

    def send_to_all(self, kind: MessageType, **fields: object) -> None:
        """Sends to all servers."""
        for index in range(self.count):
            self._sender.send(Member(Role.PARAMETER_SERVER, index), kind, **fields)

    def send_to_primaries(self, kind: MessageType, **fields: object) -> None:
        """Sends to the servers that serve a shard."""
        for index in sorted({*self.primaries}):
            self._sender.send(Member(Role.PARAMETER_SERVER, index), kind, **fields)

    def ask(self, kind: MessageType, then: Then, now: float, **fields: object) -> None:
        """Sends a question to all primaries; each answers with STATE."""
        self._asked, self.asked_at = self._asked + 1, now
        self._open[self._asked] = _Question(then)
        self.send_to_primaries(kind, id=self._asked, **fields)

    def answer(self, message: Message) -> None:
        """A server's answer; the last one completes the question."""
        number = int(message.get("id") or 0)
        question = self._open.get(number)
        if question is None:
            return
        question.applied.append(parts_of(message))
        if len(question.applied) == len({*self.primaries}):
            del self._open[number]
            question.then(reduce(IndexSet.intersection, question.applied))

    @property
    def questioned(self) -> bool:
        """Whether an answer is missing."""
        return bool(self._open)

    def drop_questions(self) -> None:
        """A server is lost: no open question will be answered by all servers."""
        self._open.clear()


def parts_of(message: Message) -> IndexSet:
    """The parts that a server says it applied."""
    return IndexSet.from_intervals((start, stop) for start, stop in message["applied"])
