"""A parameter server whose shards are sets of parts: parameter_server/role.py, server.py, requests.py and shard_host.py.

Each order of the master takes a random time, one after the other, and an order may outlive the master that gave it (role.py, `run`).
A checkpoint's file is written apart (role.py, `_write`). A request of a worker takes a random time, too; a gradient that was received whole
is applied even if the worker is dropped or its connection ends meanwhile (shard_host.py, `push`). Who may start, and what becomes of a
part, is decided by the trainer's own policy (consistency.py).
"""

from collections import deque
from collections.abc import Callable
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, cast

from disttrain.api.names import Role
from disttrain_trainer.checkpoint.store import shard_of
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member
from disttrain_trainer.parameter_server import consistency
from disttrain_trainer.parameter_server.held_shards import HeldShards
from simulation.training.control import ControlClient
from simulation.training.copies import CopySender, Snapshot, condition
from simulation.training.shard_host import Answer, Request, Session, ShardHost
from simulation.training.timeline import Connection
from simulation.training.volume import ShardFile

if TYPE_CHECKING:
    from simulation.training.job import Job


class Server:
    """The process of one parameter server."""

    def __init__(self, job: "Job", index: int, incarnation: str) -> None:
        self.member = Member(Role.PARAMETER_SERVER, index)
        self.incarnation = incarnation
        self.alive = True
        self.held: HeldShards = HeldShards(condition())
        """Of simulated shards."""
        self.job = self._job = job
        self._index = index
        self._orders: deque[Message] = deque()
        self._saves: deque[Message] = deque()
        self._sessions: list[Session] = []
        self._await_round: list[tuple[Session, Request]] = []
        self._incarnations: dict[int, str] = {}
        self._retired: set[str] = set()
        self.control = ControlClient(
            job=job,
            member=self.member,
            incarnation=incarnation,
            describe=self._describe,
            on_message=self._order,
            end=self.end,
        )

    def start(self) -> None:
        """It listens for workers, then connects to the master."""
        self.control.connect()

    def end(self) -> None:
        """The end of the process, whatever it is at."""
        self._job.ended(self)

    def kill(self) -> None:
        self.alive = False
        self.control.close()
        for shard in range(self._job.config.parameter_servers):
            self.held.replicate(shard, None)
        for session in self._sessions:
            session.connection.close(1)

    # What the master says.

    def _describe(self) -> Message:
        applied = [host.policy.accepted for host in self.hosts]
        parts = reduce(IndexSet.intersection, applied).intervals() if applied else []
        shards = [list(holding) for holding in self.held.holdings]
        versions = [host.policy.version for host in self.hosts] or [0]
        ahead = max(versions) - min(versions)
        state = {"generation": self.held.round_number, "applied": parts, "ahead": ahead, "shards": shards}
        return state | ({"norms": self._norm_parts()} if self._job.clips else {})

    def _norm_parts(self) -> list[dict[str, Any]]:
        return [part for host in self.hosts if (part := host.norm_part()) is not None]

    def _tell_norms(self) -> None:
        if self.alive:
            self.control.send(MessageType.NORM, generation=self.held.round_number, norms=self._norm_parts())

    def _made(self, host: ShardHost) -> ShardHost:
        host.on_sum = lambda: self._job.timeline.soon(self._job.pace.orders, self._tell_norms)
        return host

    @property
    def hosts(self) -> list[ShardHost]:
        """Of the shards that it serves."""
        return cast("list[ShardHost]", self.held.hosts)

    def served(self, shard: int) -> ShardHost | None:
        """The shard, if this server is its primary."""
        return cast("ShardHost | None", self.held.served(shard))

    def place_copy(self, snapshot: Snapshot) -> ShardHost:
        """Raises Refusal."""
        round_number, shard = snapshot.round_number, snapshot.shard
        host = self._made(ShardHost(self._job, shard, round_number, snapshot.file, snapshot.term))
        host.previous, host.norm = snapshot.previous, snapshot.norm
        self._end_hosts(cast("list[ShardHost]", self.held.place_copy(round_number, shard, cast("Any", host))))
        return host

    def _end_hosts(self, over: list[ShardHost]) -> None:
        for host in over:
            host.end()
            for session in list(host.sessions.values()):
                session.connection.close(1)

    def _replicate(self, shard: int, target: int | None) -> None:
        host = self.served(shard)
        if target is None or host is None:
            self.held.replicate(shard, None)
            return
        term = host.term

        def changed(complete: bool) -> None:
            copy = {"shard": shard, "term": term, "server": target, "complete": complete}
            self.control.send(MessageType.COPY, generation=host.number, **copy)

        self.held.replicate(shard, cast("Any", CopySender(self, host, shard, target, changed)))

    def _order(self, order: Message) -> None:
        self._orders.append(order)
        if len(self._orders) == 1:
            self._job.timeline.soon(self._job.pace.orders, self._obey)

    def _obey(self) -> None:
        if not self.alive:
            return
        order = self._orders[0]
        answer = self._describe
        match order["type"]:
            case MessageType.FINISH:
                self._job.finished(self)
                return
            case MessageType.BEGIN:
                self._begin(order)
                self.control.send(MessageType.STATE, **answer())
            case MessageType.STATE:
                self.control.send(MessageType.STATE, id=order["id"], **answer())
            case MessageType.DROP:
                for rank in order["ranks"]:
                    self._drop(rank)
                self.control.send(MessageType.STATE, id=order["id"], **answer())
            case MessageType.PROMOTE:
                self.held.promote(order["shards"])
                self._admit_waiting()
                self.control.send(MessageType.STATE, **answer())
            case MessageType.DISCARD:
                self._end_hosts(cast("list[ShardHost]", self.held.discard(order["shards"])))
            case MessageType.REPLICATE:
                self._replicate(order["shard"], order["server"])
            case MessageType.NORM:
                for host in self.hosts:
                    if host.number == order["generation"]:
                        host.take_norm(order["version"], order["norm"])
            case MessageType.SAVE:
                self._saves.append(order)
                if len(self._saves) == 1:
                    self._job.timeline.soon(self._job.pace.disk, self._snapshot)
        self._orders.popleft()
        if self._orders:
            self._job.timeline.soon(self._job.pace.orders, self._obey)

    def _begin(self, order: Message) -> None:
        number = int(order["generation"])
        if number <= self.held.round_number:
            return
        file = self._job.oracle.restored(self._index, order["file"])
        self._job.trace("%s begins round %d from %s", self.member, number, order["file"])
        self._job.oracle.begun(number)
        host = self._made(ShardHost(self._job, self._index, number, file))
        self._end_hosts(cast("list[ShardHost]", self.held.begin(number, self._index, cast("Any", host))))
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        waiting, self._await_round = self._await_round, []
        for session, request in waiting:
            self._hello(session, request)

    def _drop(self, rank: int) -> None:
        for session in [s for s in self._sessions if s.rank == rank and s.connection.open[1]]:
            if session.host is not None:
                session.host.exit(session)
            session.connection.close(1)

    def _snapshot(self) -> None:
        """A copy of each shard now; the files are there once they are written."""
        hosts, order = self.hosts, self._saves[0]
        if not self.alive:
            return
        if not hosts or not all(host.initialized for host in hosts):
            self.control.send(MessageType.SAVED, id=order["id"], error="no parameters yet")
            self._end_save()
            return
        if any(host.policy.waits_for_norm and host.policy.version < order["step"] for host in hosts):
            if len(self._saves) > 1:
                self.control.send(MessageType.SAVED, id=order["id"], error="it is not wanted any more")
                self._end_save()
                return
            self._job.timeline.soon(self._job.pace.disk, self._snapshot)
            return
        files = {
            host.index: ShardFile(host.policy.version, host.policy.in_version.copy(), host.parts) for host in hosts
        }
        for shard in files:
            self.control.send(MessageType.COPIED, id=order["id"], shard=shard)
        self._job.timeline.soon(self._job.pace.disk, partial(self._written, order, files))

    def _written(self, order: Message, files: dict[int, ShardFile]) -> None:
        if not self.alive:
            return
        save = order["id"]
        for shard, file in files.items():
            name = f"{shard_of(shard)}{save}.safetensors"
            try:
                self._job.fault_of_the_volume()
                self._job.volume.write(order["folder"], name, file)
            except OSError as error:
                self.control.send(MessageType.SAVED, id=save, error=str(error))
                break
            applied = file.applied.intervals()
            self.control.send(MessageType.SAVED, id=save, shard=shard, file=name, digest=file.digest, applied=applied)
        self._end_save()

    def _end_save(self) -> None:
        self._saves.popleft()
        if self._saves:
            self._job.timeline.soon(self._job.pace.disk, self._snapshot)

    # What workers say.

    def accept(self, connection: Connection) -> None:
        self._sessions.append(Session(self, connection))

    def receive(self, session: Session, request: Request) -> None:
        """The request is here in whole; a thread serves it some time later."""
        self._job.timeline.soon(self._job.pace.requests, partial(self._serve, session, request))

    def _serve(self, session: Session, request: Request) -> None:
        if not self.alive:
            return
        if request.op == "hello":
            self._hello(session, request)
            return
        host = session.host
        assert host is not None, "a request before the hello"
        self._job.trace("%s serves worker %d: %s", self.member, session.rank, request)
        serve: dict[str, Callable[[ShardHost, Session, Request], None]] = {
            "init": self._initialize, "join": self._join, "leave": self._leave, "push": self._push, "pull": self._pull,
            "push_pull": self._push_pull, "bye": self._bye,
        }  # fmt: skip
        try:
            serve[request.op](host, session, request)
        except consistency.OutOfStep as error:
            self._job.oracle.wrong(f"{self.member} refuses {request} of worker {session.rank}: {error}")

    def _hello(self, session: Session, request: Request) -> None:
        host, number = self.served(request.shard), self.held.round_number
        if number > request.round_number:
            session.refuse(Answer("over"))
        elif number == request.round_number and host is not None:
            self._admit(host, session, request)
        else:
            self._await_round.append((session, request))

    def _admit(self, host: ShardHost, session: Session, request: Request) -> None:
        if not session.connection.open[1]:
            return
        if request.incarnation in self._retired:
            session.refuse(Answer("refused", text="replaced"))
            return
        before = self._incarnations.get(request.rank)
        if before is not None and before != request.incarnation:
            self._retired.add(before)
        self._incarnations[request.rank] = request.incarnation
        replaced = [
            s
            for s in self._sessions
            if s.rank == request.rank and s is not session and (s.host is host or s.incarnation != request.incarnation)
        ]
        session.incarnation = request.incarnation
        host.enter(session, request.rank)
        for old in replaced:
            old.connection.close(1)
        session.answer(Answer("welcome", version=host.policy.version, initialized=host.initialized))

    def _initialize(self, host: ShardHost, session: Session, request: Request) -> None:
        if host.over:
            session.refuse(Answer("over"))
        else:
            host.initialize(request.parts)
            session.answer(Answer("done"))

    def _join(self, host: ShardHost, session: Session, request: Request) -> None:
        if (refusal := host.require(session)) is not None:
            session.refuse(refusal)
        else:
            session.answer(Answer("done", clock=host.policy.join(session.rank, request.clock)))

    def _leave(self, host: ShardHost, session: Session, request: Request) -> None:
        if (refusal := host.require(session)) is not None:
            session.refuse(refusal)
        else:
            host.policy.leave(session.rank)
            host.notify()
            session.answer(Answer("done"))

    def _push(self, host: ShardHost, session: Session, request: Request) -> None:
        if host.over:
            session.refuse(Answer("over"))
        else:
            host.push(session, request)
            host.settle(partial(session.answer, Answer("done")))

    def _pull(self, host: ShardHost, session: Session, request: Request) -> None:
        host.pull(session, request.clock, request.step)

    def _push_pull(self, host: ShardHost, session: Session, request: Request) -> None:
        if host.over:
            session.refuse(Answer("over"))
        else:
            host.push(session, request)
            host.pull(session, request.clock + 1, request.step)

    def _bye(self, host: ShardHost, session: Session, request: Request) -> None:
        session.connection.close(1)
        self.forget(session)

    def forget(self, session: Session) -> None:
        """Its connection ended."""
        if session in self._sessions:
            self._sessions.remove(session)
        self._await_round = [one for one in self._await_round if one[0] is not session]
        if session.host is not None:
            session.host.exit(session)
