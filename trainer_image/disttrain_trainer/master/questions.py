"""Questions to all parameter servers at once: asked, and answered when every one of them has. Pure; sending is the sender's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

from disttrain.api.names import Role
from disttrain_trainer.data.slices import SliceSet
from disttrain_trainer.master.member import Member, Sender
from disttrain_trainer.messages import Message, Say

Then = Callable[[SliceSet], None]
"""Gets the slices that are applied on every server."""


@dataclass(slots=True)
class _Question:
    then: Then
    applied: list[SliceSet] = field(default_factory=list)


class Questions:
    """The open questions."""

    def __init__(self, *, sender: Sender, servers: int) -> None:
        self._sender = sender
        self._servers = servers
        self._count = 0
        self._open: dict[int, _Question] = {}

    def ask(self, kind: Say, then: Then, **fields: object) -> None:
        """Sends the question to all servers; each answers with STATE."""
        self._count += 1
        self._open[self._count] = _Question(then)
        self.tell(kind, id=self._count, **fields)

    def tell(self, kind: Say, **fields: object) -> None:
        """Sends to all servers."""
        for index in range(self._servers):
            self._sender.send(Member(Role.PARAMETER_SERVER, index), kind, **fields)

    def answer(self, message: Message) -> None:
        """A server's answer; with the last one the question is settled."""
        number = int(message.get("id") or 0)
        question = self._open.get(number)
        if question is None:
            return
        question.applied.append(slices_of(message))
        if len(question.applied) == self._servers:
            del self._open[number]
            question.then(reduce(SliceSet.intersection, question.applied))

    def drop(self) -> None:
        """A server is lost: nothing that was asked will be answered by all."""
        self._open.clear()


def slices_of(message: Message) -> SliceSet:
    """The slices that a server says it applied."""
    return SliceSet.from_intervals((start, stop) for start, stop in message["applied"])
