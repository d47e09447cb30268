"""Which members the next round of an elastic job has, and when it begins. Pure: the caller gives the time."""

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from disttrain_trainer.net.peers import Member

SETTLE_SECONDS = 1.0
"""How long members that are ready wait for others that may come: a new process reads its data, a lost one is restarted in its pod."""


class Formation:
    """The members that are expected: those of the last round, and those that joined since."""

    def __init__(self, *, fewest: int, expected: Iterable[Member], wake: Callable[[float], None]) -> None:
        """fewest: members with which a round begins. expected: those of the first round. wake: has the caller ask again after so many
        seconds."""
        self.fewest = fewest
        self.expected = set(expected)
        self._wake = wake
        self._since: float | None = None
        """When enough were ready."""

    def begins(self, ready: AbstractSet[Member], now: float) -> bool:
        """Whether a round begins with these: at once when all that are expected are ready, else a short time after enough are."""
        if len(ready) < self.fewest:
            self._since = None
            return False
        if ready >= self.expected:
            return True
        if self._since is None:
            self._since = now
            self._wake(SETTLE_SECONDS)
        return now - self._since >= SETTLE_SECONDS

    def began(self, members: Iterable[Member]) -> None:
        """A round began with these: no other one is expected before it joins."""
        self.expected = set(members)
        self._since = None
