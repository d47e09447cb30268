"""The parameter servers, as the master knows them: what each one holds, and questions to all of them at once.

Each shard has a server that serves it, its primary. A question is answered when every primary has answered. Pure; the sender sends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

from disttrain.api.names import Role
from disttrain_trainer.coordinator.shard_copies import Choice, Held, replaced
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
    held: dict[int, Held]
    """By shard."""
    ahead: int = 0
    """Versions by which the newest of the shards that it serves is ahead of the oldest."""


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
        self._terms = [1] * count
        self._there: dict[int, _Server] = {}
        self._processes: dict[int, str] = {}
        """The incarnation of each server's newest process."""
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
    def serving(self) -> list[str]:
        """The incarnations of the primaries. A process is never in two rounds of one number."""
        return [self._processes.get(index, "") for index in sorted({*self.primaries})]

    @property
    def missing(self) -> list[Member]:
        """Without which a shard is not served."""
        return [Member(Role.PARAMETER_SERVER, index) for index in sorted({*self.primaries} - {*self._there})]

    @property
    def round_numbers(self) -> set[int]:
        """The rounds that the primaries which are connected are in; 0 for none."""
        return {server.round_number for index, server in self._there.items() if index in self.primaries}

    @property
    def newest_round(self) -> int:
        """Of all connected servers; 0 for none."""
        return max((server.round_number for server in self._there.values()), default=0)

    @property
    def there(self) -> set[int]:
        """The servers that are connected."""
        return {*self._there}

    def is_primary(self, index: int, shard: int, term: int) -> bool:
        """Whether this server serves the shard, by this term."""
        return shard < self.count and (self.primaries[shard], self._terms[shard]) == (index, term)

    def holdings(self, round_number: int) -> dict[int, dict[int, Held]]:
        """What the servers that are in this round hold."""
        return {index: one.held for index, one in self._there.items() if one.round_number == round_number}

    def serves(self, index: int) -> bool:
        """Whether a server that came back still holds every shard of which it is the primary."""
        held = self._there[index].held
        wanted = [shard for shard, primary in enumerate(self.primaries) if primary == index]
        return all(shard in held and held[shard] == Held(self._terms[shard], True, True) for shard in wanted)

    def apart(self, parts_per_step: int) -> int:
        """By how many whole steps the shards differ, also those of one server."""
        oldest = {index: self._there[index].applied.floor // parts_per_step for index in self.primaries}
        return max(step + self._there[index].ahead for index, step in oldest.items()) - min(oldest.values())

    @property
    def applied(self) -> IndexSet:
        """The parts that are applied on every shard; for when they are complete."""
        return reduce(IndexSet.intersection, (self._there[index].applied for index in self.primaries))

    def know(self, index: int, message: Message) -> None:
        """Records the state that a server reported. What it says of its copies counts when it joins; then their primaries know better."""
        round_number = int(message["generation"])
        if (process := message.get("incarnation")) is not None:
            self._processes[index] = str(process)
        before = self._there.get(index)
        held = _held(index, message)
        if before is not None and before.round_number == round_number:
            held = before.held | {shard: one for shard, one in held.items() if one.is_primary}
        self._there[index] = _Server(round_number, parts_of(message), held, int(message.get("ahead", 0)))
        if norms := message.get("gradient_norms"):
            self._norms[index] = {(round_number, int(version)): squared for version, squared in norms}

    def lose(self, index: int) -> None:
        """A server is lost."""
        self._there.pop(index, None)

    def forget_rounds(self) -> None:
        """The shards of all servers are void: none is in a round any more."""
        for server in self._there.values():
            server.round_number, server.held = 0, {}

    def serve_own(self) -> None:
        """A round begins: each server has the shard of its own number."""
        self.primaries, self._terms = list(range(self.count)), [1] * self.count

    def take(self, choices: list[Choice], round_number: int) -> None:
        """These are the primaries: copies become primaries, and primaries that were replaced hold their shards no more."""
        promoted: dict[int, list[tuple[int, int]]] = {}
        for shard, choice in enumerate(choices):
            if choice.is_promoted:
                self._there[choice.server].held[shard] = Held(choice.term, True, True)
                promoted.setdefault(choice.server, []).append((shard, choice.term))
        for index, shards in replaced(self.holdings(round_number), choices).items():
            self._sender.send(Member(Role.PARAMETER_SERVER, index), MessageType.DISCARD, shards=shards)
            for shard, _ in shards:
                del self._there[index].held[shard]
        for index, shards in promoted.items():
            self._sender.send(Member(Role.PARAMETER_SERVER, index), MessageType.PROMOTE, shards=shards)
        self.primaries = [choice.server for choice in choices]
        self._terms = [choice.term for choice in choices]

    def know_copy(self, message: Message, round_number: int) -> bool:
        """Records what a primary said of its copy. False when it is not the primary any more, or not in this round."""
        shard, server = int(message["shard"]), int(message["server"])
        if message["generation"] != round_number or shard >= self.count or message["term"] != self._terms[shard]:
            return False
        if server in self._there:
            there = self._there[server]
            there.held.pop(shard, None)
            if message["complete"]:
                there.held[shard] = Held(self._terms[shard], False, True)
                there.round_number = round_number  # into which it came with the copy
        return True

    def discard_others(self, index: int) -> None:
        """A server gives up the shards of which it is a primary that was not chosen: it carried out the order of a master that is lost only
        after it had told the new one what it holds."""
        held = self._there[index].held
        others = [
            (shard, one.term)
            for shard, one in held.items()
            if one.is_primary and (self.primaries[shard], self._terms[shard]) != (index, one.term)
        ]
        if others:
            self.send(index, MessageType.DISCARD, shards=others)
        for shard, _ in others:
            del held[shard]

    def held(self, index: int) -> dict[int, Held]:
        """What a server that is there holds, by shard."""
        return self._there[index].held

    def hold_nothing(self, index: int) -> None:
        """What a server had is out of date."""
        self._there[index].held = {}

    def forget_copies(self, shard: int) -> None:
        """The copy of a shard is made again."""
        for server in self._there.values():
            if shard in server.held and not server.held[shard].is_primary:
                del server.held[shard]

    def distrust_copies(self, index: int) -> None:
        """A server came back: whether its copies followed on meanwhile is not known."""
        held = self._there[index].held
        self._there[index].held = {shard: one for shard, one in held.items() if one.is_primary}

    def send(self, index: int, kind: MessageType, **fields: object) -> None:
        """Sends to one."""
        self._sender.send(Member(Role.PARAMETER_SERVER, index), kind, **fields)

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


def _held(index: int, message: Message) -> dict[int, Held]:
    """What a server holds. One of an earlier release does not say: it serves the shard of its own number."""
    shards = message.get("shards")
    if shards is None:
        return {index: Held(1, True, True)} if int(message["generation"]) else {}
    return {int(shard): Held(int(term), bool(primary), bool(complete)) for shard, term, primary, complete in shards}


def parts_of(message: Message) -> IndexSet:
    """The parts that a server says it applied."""
    return IndexSet.from_intervals((start, stop) for start, stop in message["applied"])
