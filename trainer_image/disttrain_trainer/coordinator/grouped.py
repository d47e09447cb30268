"""Parameter servers whose workers are groups of ranks: what the master sends when a rank joins, sends a message or is lost.

A group is one worker to the work queue: it is number g of the groups, and its first rank talks for it. What is added here is how a group
comes together (formations.py), and who of it gets which message.
"""

from collections.abc import Sequence
from typing import Any

from disttrain.api.mesh import Mesh
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.coordinator.formations import Formation, Step
from disttrain_trainer.coordinator.missing_members import MissingMembers
from disttrain_trainer.coordinator.parameter_server import ParameterServerCoordinator
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

_TO_ALL = frozenset({MessageType.FINISH, MessageType.WRONG, MessageType.REFORM})
"""What every rank of a group gets; the rest is for its first."""


class GroupSender:
    """Sends what is for a worker to the ranks of the group of that number, and names ranks to servers where groups are meant."""

    def __init__(self, sender: Sender, groups: Sequence[Sequence[int]]) -> None:
        self._sender = sender
        self._groups = groups
        self._leases: dict[int, object] = {}
        """The newest of each group."""

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        """See Sender. RELEASED goes to a rank, which has asked for it."""
        if kind is MessageType.DROP:
            numbers: Any = fields["ranks"]
            fields["ranks"] = [rank for number in numbers for rank in self._groups[number]]
        if member.role is not Role.WORKER or kind is MessageType.RELEASED:
            self._sender.send(member, kind, **fields)
            return
        if kind is MessageType.ROUND:
            self._leases[member.rank] = fields["stay"]
        if kind is MessageType.REFORM:
            fields["stay"] = self._leases.get(member.rank)
        ranks = self._groups[member.rank]
        for rank in ranks if kind in _TO_ALL else ranks[:1]:
            self._sender.send(Member(Role.WORKER, rank), kind, **fields)


class GroupedCoordinator(ParameterServerCoordinator):
    """The coordinator of strategy Hybrid with parameter servers."""

    def __init__(self, *, sender: Sender, config: JobConfig, incarnation: str, **options: Any) -> None:
        """options: as of ParameterServerCoordinator. `open` must be called when there is a store for the ranks to meet in."""
        mesh = Mesh.of(config.strategy, workers=config.workers, processes=config.processes_per_worker)
        groups = [[rank for rank in range(mesh.size) if mesh.data_rank(rank) == group] for group in range(mesh.data)]
        super().__init__(sender=GroupSender(sender, groups), config=config, incarnation=incarnation, **options)
        self._ranks_sender = sender
        self._mesh = mesh
        self._formations = [Formation(ranks) for ranks in groups]
        self._hellos: dict[int, Message] = {}
        """What the first rank of each group said when it connected."""
        self._absent = MissingMembers()
        self._name = incarnation
        self._formed = 0
        self._has_store = False

    def open(self, now: float) -> None:
        """There is a store: groups may form."""
        self._has_store = True
        for group in range(len(self._formations)):
            self._settle(group, now)

    def joined(self, member: Member, hello: Message, now: float) -> None:
        if member.role is not Role.WORKER:
            super().joined(member, hello, now)
            return
        self._absent.end(member)
        if self.ended:
            self._ranks_sender.send(member, MessageType.FINISH)
            return
        group = self._mesh.data_rank(member.rank)
        formation = self._formations[group]
        formation.join(member.rank, hello.get("formation"), waits=bool(hello.get("awaits_group")))
        if member.rank == formation.leader:
            self._hellos[group] = hello
        self._settle(group, now)

    def on_message(self, member: Member, message: Message, now: float) -> None:
        kind = message["type"]
        if member.role is not Role.WORKER or kind in (MessageType.LEAVING, MessageType.NAN):
            super().on_message(member, message, now)
            return
        group = self._mesh.data_rank(member.rank)
        formation = self._formations[group]
        if kind == MessageType.AWAITS_GROUP:
            formation.wait(member.rank)
            self._settle(group, now)
            return
        speaks = self._mesh.counts(member.rank) if kind == MessageType.REPORT else member.rank == formation.leader
        is_stale = kind == MessageType.READY and message.get("formation") != formation.current
        if speaks and formation.current is not None and not is_stale:
            super().on_message(Member(Role.WORKER, group), message, now)

    def _worker_of(self, rank: int) -> int:
        return self._mesh.data_rank(rank)

    def lost(self, member: Member, now: float) -> None:
        if member.role is not Role.WORKER:
            super().lost(member, now)
            return
        self._draining.forget(member)
        if self.ended:
            return
        self._absent.begin(member, now)
        group = self._mesh.data_rank(member.rank)
        self._formations[group].lose(member.rank)
        self._settle(group, now)

    def waiting_for(self, now: float) -> str | None:
        ranks = [rank for formation in self._formations for rank in formation.missing]
        absent = [] if self._workers.ready else [Member(Role.WORKER, rank) for rank in ranks]
        absent += self._servers.missing
        return self._absent.describe(absent, now) if absent and not self.ended else super().waiting_for(now)

    def _settle(self, group: int, now: float) -> None:
        """Forms or ends the process group of a group, as the state of its ranks requires."""
        formation = self._formations[group]
        if self.ended or not self._has_store:
            return
        was_formed = formation.current
        name = f"{self._name}.{group}.{self._formed + 1}"
        match formation.settle(name):
            case Step.FORM:
                self._formed += 1
                log.info("group %d is ranks %s", group, ", ".join(map(str, formation.ranks)))
                for rank in formation.ranks:
                    self._ranks_sender.send(Member(Role.WORKER, rank), MessageType.FORM, formation=name)
                self._workers.join(group)
            case Step.ADOPT:
                self._workers.join(group)
                if (hello := self._hellos.get(group)) is not None and hello.get("samples") is not None:
                    self._worker_ready(group, hello, now)
            case Step.DISSOLVE:
                for rank, held in formation.take_stale().items():
                    self._ranks_sender.send(Member(Role.WORKER, rank), MessageType.DISSOLVE, formation=held)
                if was_formed is not None:
                    self._worker_lost(group, now)
                self._settle(group, now)
            case Step.NOTHING:
                pass
