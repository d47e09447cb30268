"""The process groups of ranks that compute a part together: when one is formed, and when it is over.

Each group forms by itself: a rank that is lost costs the others of its group a new process group, and no other group's. Pure: the caller
sends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto


class Step(Enum):
    """What follows from a change."""

    NOTHING = auto()
    FORM = auto()
    """All ranks wait: they form the process group `current`."""
    ADOPT = auto()
    """All ranks are in the process group `current`, as a new master finds them."""
    DISSOLVE = auto()
    """The ranks of `take_stale` leave their process groups. The group is over if it was formed."""


@dataclass(slots=True)
class Formation:
    """One group.

    A rank holds the name of the process group that it is in, or None while it is in none. Names are unique over masters.
    """

    ranks: Sequence[int]
    current: str | None = None
    """The process group that all ranks are in."""
    _there: dict[int, str | None] = field(default_factory=dict)
    _waiting: set[int] = field(default_factory=set)
    _over: set[str] = field(default_factory=set)
    """Process groups that were dissolved."""
    _notified: set[int] = field(default_factory=set)
    """Ranks that the master notified of that, and that have not left yet."""

    @property
    def leader(self) -> int:
        """The rank that talks to the master for all."""
        return self.ranks[0]

    @property
    def missing(self) -> list[int]:
        """Ranks that are not connected; where all are, those that start."""
        absent = [rank for rank in self.ranks if rank not in self._there]
        return absent or [rank for rank in self.ranks if self.current is None and rank not in self._waiting]

    def take_stale(self) -> dict[int, str]:
        """Ranks that are in a process group that is over and were not notified of it, and which. They count as notified now."""
        found = self._stale
        self._notified.update(found)
        return found

    @property
    def _stale(self) -> dict[int, str]:
        held = {rank: name for rank, name in self._there.items() if name is not None and rank not in self._notified}
        return {rank: name for rank, name in held.items() if name != self.current}

    def join(self, rank: int, held: str | None, *, waits: bool) -> None:
        """A rank connected, in this process group or in none. waits: for one."""
        self._there[rank] = held
        self._waiting.discard(rank)
        self._notified.discard(rank)
        if waits and held is None:
            self._waiting.add(rank)

    def wait(self, rank: int) -> None:
        """A rank has left its process group, or its model is made, and waits."""
        if rank in self._there:
            self._notified.discard(rank)
            self._there[rank] = None
            self._waiting.add(rank)

    def lose(self, rank: int) -> None:
        """A rank is lost."""
        self._there.pop(rank, None)
        self._waiting.discard(rank)
        self._notified.discard(rank)

    def settle(self, name: str) -> Step:
        """What follows from what is known. name: of the process group that may be formed now."""
        if self.current is not None and all(self._there.get(rank) == self.current for rank in self.ranks):
            return Step.NOTHING
        if self.current is not None:
            self._over.add(self.current)
            self.current = None
            return Step.DISSOLVE
        if self._waiting.issuperset(self.ranks):
            self.current = name
            self._waiting.clear()
            self._there = dict.fromkeys(self.ranks, name)
            return Step.FORM
        held = {self._there.get(rank) for rank in self.ranks}
        if len(held) == 1 and None not in held and not held & self._over:
            self.current = held.pop()
            return Step.ADOPT
        # A new master waits for all ranks: they may be together in one process group.
        knows = len(self._there) == len(self.ranks) or any(name in self._over for name in self._stale.values())
        return Step.DISSOLVE if self._stale and knows else Step.NOTHING
