"""Members that are missing, and since when. Pure."""

from collections.abc import Sequence

from disttrain_trainer.net.peers import Member

NAMED_MEMBERS = 5
"""At most so many missing members are listed by name; the others are counted."""


class MissingMembers:
    """The members that the job waits for, and since when."""

    def __init__(self) -> None:
        self._since: dict[Member, float] = {}

    def begin(self, member: Member, now: float) -> None:
        """The member was lost at this time."""
        self._since[member] = now

    def end(self, member: Member) -> None:
        """The member joined."""
        self._since.pop(member, None)

    def describe(self, missing: Sequence[Member], now: float) -> str | None:
        """One line that names the missing members and the longest absence; None when no member is missing.

        A member that never joined counts as missing since the first call that names it.
        """
        if not missing:
            return None
        longest = max(now - self._since.setdefault(member, now) for member in missing)
        names = ", ".join(map(str, missing[:NAMED_MEMBERS]))
        more = f" and {len(missing) - NAMED_MEMBERS} more" if len(missing) > NAMED_MEMBERS else ""
        return f"{names}{more} ({longest:.0f} s)"


def too_few(ready: int, fewest: int) -> str:
    """What an elastic job waits for that has fewer workers ready than it needs."""
    more = fewest - ready
    return f"{more} more worker{'s' if more > 1 else ''} (ready: {ready} of at least {fewest})"
