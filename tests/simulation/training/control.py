"""The control connections: net/control_client.py at a process, net/control_server.py at the master."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from disttrain.api.names import Role
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member
from simulation.training.timeline import Call, Connection, Timeline

if TYPE_CHECKING:
    from simulation.training.job import Job

RECONNECT_SECONDS = 0.5
"""Seconds between two attempts to connect, about."""


class ControlClient:
    """A process's end. What changes while there is no connection is in the next hello."""

    def __init__(
        self,
        *,
        job: "Job",
        member: Member,
        incarnation: str,
        describe: Callable[[], Message],
        on_message: Callable[[Message], None],
        end: Call,
    ) -> None:
        """end: ends the process, which was released or replaced."""
        self._job = job
        self._member = member
        self._incarnation = incarnation
        self._describe = describe
        self._on_message = on_message
        self._end = end
        self._leaving = False
        self._closed = False
        self._admitted_by: object = None
        self._only: object = None
        """The only master that this process can still reach."""
        self.connection: Connection | None = None
        self.finished = False

    def connect(self) -> None:
        """Connects to the master that listens now, or tries again."""
        if self._closed:
            return
        master = self._job.master
        if master is None or self._only not in (None, master):
            self._again()
            return
        self.connection = connection = Connection(self._job.timeline, self._job.pace.control)
        connection.receive[0] = self._receive
        connection.ended[0] = self._lost
        master.control.accept(connection)
        hello = {"role": self._member.role, "rank": self._member.rank, "incarnation": self._incarnation}
        connection.send(0, {"type": MessageType.HELLO, **hello, **self.describe()})

    def describe(self) -> Message:
        """The process's fields of HELLO."""
        return self._describe()

    def send(self, kind: MessageType, **fields: object) -> bool:
        self._job.trace("%s says %s %s", self._member, kind, fields)
        return self.connection is not None and self.connection.send(0, {"type": kind, **fields})

    def leave(self) -> None:
        """SIGTERM."""
        self._leaving = True
        if not self.send(MessageType.LEAVING):
            self._end()

    def replaced(self) -> None:
        """Another process has its place: this one reaches no master that has not admitted it before.

        Such a master could not tell which of the two is the newer one. While both run, the old one is on a node without network.
        """
        self._only = self._admitted_by or self
        if self.connection is not None and self._admitted_by is not self._job.master:
            self.connection.cut()

    def close(self) -> None:
        """With the process."""
        self._closed = True
        if self.connection is not None:
            self.connection.close(0)

    def _receive(self, message: Message) -> None:
        if self._closed:
            return
        match message["type"]:
            case MessageType.WELCOME:
                self._admitted_by = self._job.master
                if self._leaving:
                    self.send(MessageType.LEAVING)
            case MessageType.REFUSED | MessageType.RELEASED:  # this process was replaced, or has nothing to wait for
                self._end()
            case MessageType.FINISH:
                self.finished = True
                self._on_message(message)
            case MessageType.WRONG:
                raise AssertionError(f"{self._member} is refused as unfit for the job: {message}")
            case _:
                self._on_message(message)

    def _lost(self) -> None:
        self.connection = None
        if self._leaving:
            self._end()
        else:
            self._again()

    def _again(self) -> None:
        self._job.timeline.soon(RECONNECT_SECONDS, self.connect)


class _Peer:
    def __init__(self, member: Member, connection: Connection) -> None:
        self.member = member
        self.connection = connection


class ControlServer:
    """The master's end: who is connected as whom, and which processes were replaced."""

    def __init__(
        self,
        *,
        timeline: Timeline,
        joined: Callable[[Member, Message], None],
        on_message: Callable[[Member, Message], None],
        lost: Callable[[Member], None],
    ) -> None:
        self._timeline = timeline
        self._joined = joined
        self._on_message = on_message
        self._lost = lost
        self._peers: dict[Member, _Peer] = {}
        self._newest: dict[Member, str] = {}
        self._retired: set[str] = set()
        self._connections: list[Connection] = []

    @property
    def connected(self) -> int:
        return len(self._peers)

    def connection(self, member: Member) -> Connection | None:
        peer = self._peers.get(member)
        return peer.connection if peer else None

    def accept(self, connection: Connection) -> None:
        self._connections.append(connection)
        connection.receive[1] = partial(self._hello, connection)

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        """Sends, if the member is connected."""
        if (peer := self._peers.get(member)) is not None:
            peer.connection.send(1, {"type": kind, **fields})

    def close(self) -> None:
        """With the master."""
        self._peers.clear()
        for connection in self._connections:
            connection.close(1)

    def _hello(self, connection: Connection, hello: dict[str, Any]) -> None:
        member, incarnation = Member(Role(hello["role"]), hello["rank"]), hello["incarnation"]
        if incarnation in self._retired:
            connection.send(1, {"type": MessageType.REFUSED})
            connection.close(1)
            return
        connection.send(1, {"type": MessageType.WELCOME})
        before = self._newest.get(member)
        if before is not None and before != incarnation:
            self._retired.add(before)
        self._newest[member] = incarnation
        if (old := self._peers.pop(member, None)) is not None:
            old.connection.close(1)
            self._lost(member)
        peer = self._peers[member] = _Peer(member, connection)
        connection.receive[1] = partial(self._receive, peer)
        connection.ended[1] = partial(self._ended, peer)
        self._joined(member, hello)

    def _receive(self, peer: _Peer, message: Message) -> None:
        if self._peers.get(peer.member) is peer:
            self._on_message(peer.member, message)

    def _ended(self, peer: _Peer) -> None:
        if self._peers.get(peer.member) is peer:
            del self._peers[peer.member]
            self._lost(peer.member)
