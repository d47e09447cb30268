"""What the master knows of a rank of a group that trains with parameter servers, or has set by its messages (docs/design/0018).

The first rank of a group is a worker of the servers as any other, and the others do what it says: of rounds they hear nothing from the
master but that a lease is over, which ends their waits at the servers.
"""

from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import Client, Group, ParameterServerMember
from disttrain_trainer.net.messages import Message, MessageType


class GroupMember(ParameterServerMember):
    """One rank of a group. Changed with `control.changed` held."""

    def __init__(self) -> None:
        super().__init__()
        self.follows = False
        """Not the first of its group."""
        self.formation: str | None = None
        """The process group that it is in; None while it is in none."""
        self.group: Group | None = None
        """Its connections, in which the main thread may wait."""
        self._waits = False
        self._ordered: str | None = None
        """The process group that the master has ordered; "" where it was dissolved before this rank has joined it."""
        self._lease = ""
        """That of `client`."""
        self._ended: str | None = None
        """The lease that ended last, as the master said."""

    def describe(self) -> Message:
        """The fields of HELLO. A rank that is in no group is no worker of the servers yet."""
        fields: Message = {"formation": self.formation, "awaits_group": self._waits}
        return fields if self.formation is None else fields | super().describe()

    def _begun(self) -> Message:
        """Nothing: a group keeps no gradient."""
        return {}

    def await_group(self, control: ControlClient, *, timeout: float) -> str | None:
        """Leaves its process group; blocks until the master has another one formed, and returns its name. None when the job is done."""
        while not control.finished:
            with control.changed:
                self._waits, self.formation, self._ordered = True, None, None
            control.send(MessageType.AWAITS_GROUP)
            control.wait(
                lambda: True if control.finished or self._ordered is not None else None,
                what="the other processes of the group, and the master",
                timeout=timeout,
            )
            with control.changed:
                found, self._ordered = self._ordered, None
                if found:
                    self._waits, self.formation = False, found
                    self._enter(None)
                    return found
        return None

    def connect(self, client: Client | None, lease: str) -> None:
        """The connections to the servers are these, for this lease. They are closed at once where it is over."""
        self.client, self._lease = client, lease
        if client is not None and lease == self._ended:
            client.close(goodbye=False)

    def on_message(self, message: Message) -> None:
        match message["type"]:
            case MessageType.FORM:
                self._ordered = str(message["formation"])
            case MessageType.DISSOLVE if self.formation == message["formation"]:
                self.formation = None
                self._enter(None)
                if self.group is not None:
                    self.group.end()
            case MessageType.DISSOLVE:
                if self._ordered == message["formation"]:
                    self._ordered = ""
            case MessageType.REFORM if self.follows:
                self._ended = str(message.get("stay"))
                if self.client is not None and self._lease == self._ended:
                    self.client.close(goodbye=False)
            case _:
                super().on_message(message)
