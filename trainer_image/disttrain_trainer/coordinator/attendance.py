"""Who of the job is missing, and since when; and who was told to end, and waits until its work is saved.

Pure; sending is the sender's.
"""

from collections.abc import Sequence

from disttrain_trainer.net.messages import Say
from disttrain_trainer.net.peers import Member, Sender

NAMED = 5
"""Members that are called by name; the others are a number."""


class Absences:
    """Members that are awaited."""

    def __init__(self) -> None:
        self._since: dict[Member, float] = {}

    def begin(self, member: Member, now: float) -> None:
        """It was lost."""
        self._since[member] = now

    def end(self, member: Member) -> None:
        """It is here."""
        self._since.pop(member, None)

    def words(self, missing: Sequence[Member], now: float) -> str | None:
        """Who is missing and for how long, for humans; None for nobody. Who was never here is missing since the first question."""
        if not missing:
            return None
        longest = max(now - self._since.setdefault(member, now) for member in missing)
        names = ", ".join(map(str, missing[:NAMED]))
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        return f"{names}{more} ({longest:.0f} s)"


class Leavers:
    """Processes that received SIGTERM: the members that said so, and the master itself."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._members: set[Member] = set()
        self._terminating = False
        self.released = False
        """Whether the master may go."""

    def add(self, member: Member) -> None:
        """A member waits to be released."""
        self._members.add(member)

    def forget(self, member: Member) -> None:
        """It is gone."""
        self._members.discard(member)

    def terminate(self) -> None:
        """So does the master."""
        self._terminating = True

    def release(self) -> None:
        """What could be saved is saved: they may go."""
        for member in self._members:
            self._sender.send(member, Say.RELEASED)
        self._members.clear()
        self.released = self._terminating
