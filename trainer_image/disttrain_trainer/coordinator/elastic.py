"""The rounds of an elastic job with collectives: each has the members that are there, and none needs all of them.

A round of our loop ends after a whole step when members join or leave, so that no step is lost; that of a script ends at once, and its
programs are started again in the next one, as torchrun does. When a member is lost the others go on without it, after a moment in which
it may be back. Pure, as the coordinator that this one extends.
"""

from collections.abc import Callable, Collection, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from disttrain_trainer.coordinator import missing_members
from disttrain_trainer.coordinator.collective import CollectiveCoordinator
from disttrain_trainer.coordinator.formation import Formation
from disttrain_trainer.coordinator.place import Place
from disttrain_trainer.net.members import MemberState
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

RETURN_SECONDS = 10.0
"""How long a new master waits for the other members of a running round to connect to it."""
_IN_A_ROUND = (MemberState.RUNNING, MemberState.DONE)


class ElasticCoordinator(CollectiveCoordinator):
    """The coordinator of an elastic training with collectives."""

    def __init__(
        self, *, fewest: int, expected: Iterable[Member], wake: Callable[[float], None], in_steps: bool, **options: Any
    ) -> None:
        """fewest: members with which a round begins. expected: those of the first round. wake: has `tick` called after so many seconds.

        in_steps: the members end a round after a whole step, when they are asked to. options: as of CollectiveCoordinator.
        """
        super().__init__(**options)
        self._formation = Formation(fewest=fewest, expected=expected, wake=wake)
        self._wake = wake
        self._in_steps = in_steps
        self._retiring: set[Member] = set()
        """Members that leave for good."""
        self._let_go: set[Member] = set()
        """Those of them that may end."""
        self._round: frozenset[Member] | None = None
        """The members of the running round; None while this master does not know them."""
        self._ending = False
        """The members were asked to end the round."""
        self._awaited_since: float | None = None
        """Since when this master waits for the other members of a round that an earlier one began."""

    def joined(self, member: Member, hello: Message, now: float) -> None:
        self._retiring.discard(member)
        self._let_go.discard(member)
        self._formation.expected.add(member)
        super().joined(member, hello, now)

    def tick(self, now: float) -> None:
        super().tick(now)
        self._advance(now)

    def waiting_for(self, now: float) -> str | None:
        if self.ended or self._inside:
            return None
        ready = self._ready
        if len(ready) < self._formation.fewest:
            return missing_members.too_few(len(ready), self._formation.fewest)
        return self._missing_members.describe(sorted(self._formation.expected - ready), now)

    @property
    def _inside(self) -> dict[Member, Place]:
        """The members that are in the running round, or in one that this master does not know."""
        known = self._places.keys() if self._round is None else self._round
        return {m: place for m, place in self._places.items() if place.state in _IN_A_ROUND and m in known}

    @property
    def _ready(self) -> set[Member]:
        return {
            member
            for member, place in self._places.items()
            if place.state is MemberState.READY and place.fit and member not in self._retiring
        }

    @property
    def _first(self) -> Member:
        return min(self._round or self._inside or self._members[:1])

    def _missed(self, member: Member, place: Place, now: float) -> None:
        if member in self._retiring:
            self._retiring.discard(member)
            self._formation.expected.discard(member)
        else:
            self._missing_members.begin(member, now)
        self._broken = self._broken or place.state in _IN_A_ROUND

    def _leaves(self, member: Member) -> None:
        """A member received SIGTERM: it leaves for good when enough others stay that have a state, and the job itself goes on."""
        begun = any(place.round_number for place in self._places.values())
        stay = [
            other
            for other, place in self._places.items()
            if other != member and other not in self._retiring and place.fit and (place.round_number or not begun)
        ]
        if self._draining.terminating or len(stay) < self._formation.fewest:
            super()._leaves(member)
            return
        self._retiring.add(member)
        self._formation.expected.discard(member)

    def _advance(self, now: float) -> None:
        if self.ended:
            return
        for member in self._retiring - self._let_go:
            if member in self._places and self._places[member].state not in _IN_A_ROUND:
                self._let_go.add(member)
                self._sender.send(member, MessageType.RELEASED)
        self._call_back_strays()
        if inside := self._inside:
            self._go_on(inside, now)
            return
        if self._formation.begins(ready := self._ready, now):
            self._begin_soon(ready, now)
        if not self._inside:
            self._save_again()

    def _call_back_strays(self) -> None:
        """A member may come late, in a round of an earlier master that the others have left by now."""
        for member, place in self._places.items():
            in_another = self._round is not None and member not in self._round and place.state in _IN_A_ROUND
            if in_another and not place.reforming:
                place.reforming = True
                self._sender.send(member, MessageType.REFORM)

    def _go_on(self, inside: dict[Member, Place], now: float) -> None:
        """While members are in a round."""
        places = list(inside.values())
        if self._broken or not self._is_one_round(places):
            self._dissolve()
            return
        if self._round is None and not self._is_whole(inside, now):
            return
        if self._round is None:
            self._round = frozenset(inside)
            self._save_again()
        if not self._round <= inside.keys():
            # A member left the round: to be resized, or because it broke. One that has done all its work stays in a broken one alone.
            if not self._ending or any(place.state is MemberState.DONE for place in places):
                self._broken = True
                self._dissolve()
            return
        self._run_on(places, now)
        if not self.ended and not self._ending and self._is_to_end(inside, now):
            self._ending = True
            if not self._in_steps:
                self._dissolve()
            for member in inside if self._in_steps else ():
                self._sender.send(member, MessageType.RESIZE)

    def _is_whole(self, inside: dict[Member, Place], now: float) -> bool:
        """A new master: whether all members of a round that an earlier one began are there. It is ended when one may not come."""
        if len(inside) >= max(place.size for place in inside.values()):
            return True
        if self._awaited_since is None:
            self._awaited_since = now
            self._wake(RETURN_SECONDS)
        if len(inside) < len(self._places) or now - self._awaited_since >= RETURN_SECONDS:
            self._broken = True
            self._dissolve()
        return False

    def _is_to_end(self, inside: dict[Member, Place], now: float) -> bool:
        """Whether members are to leave the running round or to join it; near its end none does."""
        if any(place.state is MemberState.DONE for place in inside.values()):
            return False
        if self._retiring & inside.keys():
            return True
        newcomers = self._ready
        return bool(newcomers) and self._formation.begins(newcomers | inside.keys(), now)

    def _begin_round(self, members: Collection[Member], now: float) -> None:
        members = sorted(members)
        super()._begin_round(members, now)
        self._round, self._ending, self._awaited_since = frozenset(members), False, None
        self._formation.began(members)
        self._save_again()

    def _start(self, members: Collection[Member]) -> tuple[int, dict[str, object]]:
        step, fields = super()._start(members)
        return step, fields | {"members": [member.rank for member in members]}

    def _save_again(self) -> None:
        """At the border of a round: who was asked for the state before may have left that round without an answer."""
        self._saving = False
        if self._draining.pending or self._draining.terminating:
            self._save_or_release()

    def _save_or_release(self) -> None:
        """Between two rounds there is a state to save, too: in the next one, if there are enough members for it. While a new master does
        not know which round its members are in, it does not know which of them saves."""
        inside = self._inside
        enough: AbstractSet[Member] = self._ready | inside.keys()
        between = (self._ending or not inside) and len(enough) >= self._formation.fewest
        unknown = bool(inside) and self._round is None
        if not (self._saves and not self._broken and (between or unknown)):
            super()._save_or_release()
