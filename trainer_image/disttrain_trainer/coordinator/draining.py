"""Members that drain: they received SIGTERM, and wait until the coordinator releases them.

Pure; sending is the sender's.
"""

from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member, Sender


class DrainingMembers:
    """The members that reported SIGTERM, and the master itself."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._members: set[Member] = set()
        self.terminating = False
        """Whether the master received SIGTERM."""
        self.released = False
        """Whether the master may end."""

    @property
    def pending(self) -> bool:
        """Whether a member waits for RELEASED."""
        return bool(self._members)

    def add(self, member: Member) -> None:
        """The member reported SIGTERM; it waits for RELEASED."""
        self._members.add(member)

    def forget(self, member: Member) -> None:
        """The member's connection ended."""
        self._members.discard(member)

    def terminate(self) -> None:
        """The master received SIGTERM."""
        self.terminating = True

    def release(self) -> None:
        """Sends RELEASED to every draining member: what could be saved is saved."""
        for member in self._members:
            self._sender.send(member, MessageType.RELEASED)
        self._members.clear()
        self.released = self.terminating
