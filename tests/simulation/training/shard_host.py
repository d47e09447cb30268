"""A shard of the simulation, whose parameters are sets of parts: parameter_server/shard_host.py, and the copy of replicated_host.py."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from disttrain_trainer.parameter_server import consistency
from disttrain_trainer.parameter_server.shard_state import ShardState
from disttrain_trainer.parameter_server.update_log import Record, UpdateLog
from simulation.training.copies import condition
from simulation.training.timeline import Call, Connection
from simulation.training.volume import ShardFile

if TYPE_CHECKING:
    from simulation.training.job import Job
    from simulation.training.server import Server


class Request(NamedTuple):
    """What a worker asks of a server; `connection.py` has the same as operations of frames."""

    op: str
    """hello, init, join, leave, push, pull, push_pull, bye."""
    clock: int = 0
    step: int | None = None
    index: int = 0
    round_number: int = 0
    rank: int = 0
    incarnation: str = ""
    parts: int = 0
    shard: int = 0


class Answer(NamedTuple):
    """What a server answers."""

    op: str
    """welcome, done, values, over (the round is), refused."""
    clock: int = 0
    version: int = 0
    parts: int = 0
    """Of the parameters: a bit for each part in them."""
    initialized: bool = False
    text: str = ""


class Session:
    """A worker as one connection knows it."""

    def __init__(self, server: "Server", connection: Connection) -> None:
        self.connection = connection
        self.rank = -1
        self.incarnation = ""
        self.host: ShardHost | None = None
        connection.receive[1] = partial(server.receive, self)
        connection.ended[1] = partial(server.forget, self)

    def answer(self, answer: Answer) -> None:
        self.connection.send(1, answer)

    def refuse(self, answer: Answer) -> None:
        self.answer(answer)
        self.connection.close(1)


class ShardHost:
    """One shard in a round: the parameters as the set of the parts in them."""

    def __init__(self, job: "Job", index: int, number: int, file: ShardFile | None, term: int | None = None) -> None:
        """term: of a copy."""
        self._job = job
        self.index = index
        self.number = number
        self.over = False
        self.term = 1 if term is None else term
        self.is_primary = self.complete = term is None
        self.changed = condition()
        self.log: UpdateLog | None = None
        self.on_record: Call = lambda: None
        self.on_sum: Call = lambda: None
        self._settling: list[tuple[UpdateLog, int, Call]] = []
        self.norm: tuple[int, float] | None = None
        """The newest version that a step with a norm has made, and the norm."""
        self._square = 0.0
        """Of the sum that waits for its norm; another one each time that a sum is made, as where a gradient is not repeatable."""
        self.policy = consistency.build(
            job.strategy,
            parts_per_step=job.config.parts_per_step,
            version=file.version if file else 0,
            accepted=file.applied.copy() if file else None,
            clips=job.clips,
        )
        self.initialized = file is not None
        self.parts = file.parts if file else 0
        """In the parameters."""
        self.accepted = self.parts
        """Those that count here: they are in the parameters, or will be once their step is whole."""
        self._sum = 0
        """In the sum, of which the next update is made."""
        self.previous: tuple[int, int] | None = None
        """Sync: the version before and its parts, for who has not read it yet (shard.py, `acquire`)."""
        self.sessions: dict[int, Session] = {}
        self._waiting: list[tuple[Session, int, int | None]] = []

    def enter(self, session: Session, rank: int) -> None:
        if rank in self.sessions:
            self.policy.leave(rank)
        self.sessions[rank] = session
        session.rank, session.host = rank, self
        self.notify()

    def exit(self, session: Session) -> None:
        if self.sessions.get(session.rank) is session:
            del self.sessions[session.rank]
            self.policy.leave(session.rank)
            self.notify()

    def initialize(self, parts: int) -> None:
        if not self.initialized:
            self._job.oracle.initialized(self.index, parts)
            self.initialized, self.parts = True, parts
            self.notify()

    def push(self, session: Session, request: Request) -> None:
        """A gradient is here; it counts once."""
        assert self.initialized, "a gradient for a shard without parameters"
        arrival = self.policy.arrive(request.index, empty=False)
        if arrival is not None:
            self.accepted |= 1 << request.index
            self._job.oracle.applied(self.index, request.index, self.parts | self._sum)
            self._sum |= 1 << request.index
            if arrival.update is not None:
                self.previous = (self.policy.version - 1, self.parts) if self._job.sync else None
                self.parts, self._sum = self.parts | self._sum, 0
                self._record(request.index)
            if arrival.summed is not None:
                self._square = self._job.of_norms.random()
                self.on_sum()
        if self.sessions.get(session.rank) is session:
            self.policy.complete(session.rank, request.clock)
        self.notify()

    def pull(self, session: Session, clock: int, step: int | None) -> None:
        self._waiting.append((session, clock, step))
        self.notify()

    def norm_part(self) -> dict[str, Any] | None:
        """What the master needs for the norm of a step (shard_host.py, `norm_part`)."""
        place = {"shard": self.index, "term": self.term}
        if self.policy.waits_for_norm:
            return place | {
                "version": self.policy.version + 1,
                "scale": 1.0,
                "nodes": [[(0, self.index, self._square)]],
            }
        return place | {"version": self.norm[0], "norm": self.norm[1]} if self.norm is not None else None

    def take_norm(self, version: int, norm: float) -> None:
        """The step is made with this norm, if it waits for it."""
        if self.over or not self.policy.waits_for_norm or version != self.policy.version + 1:
            return
        self._job.oracle.steps_with(self.index, self.number, version, norm)
        self.previous = (self.policy.version, self.parts)
        self.parts, self._sum = self.parts | self._sum, 0
        self.policy.proceed()
        self.norm = version, norm
        self._record((version - 1) * self._job.config.parts_per_step)
        self.notify()

    def settle(self, then: Call) -> None:
        """Calls it once the copy has all that was changed before (shard_host.py, `settle`)."""
        if self.log is None:
            then()
        else:
            self._settling.append((self.log, self.log.made, then))
            self.notify()

    def _record(self, index: int) -> None:
        if self.log is not None:
            size = self._job.config.parts_per_step if self._job.sync else 1
            first = index - index % size
            self.log.add(Record(parts=(first, first + size), norm=self.norm[1] if self.norm else None))
            self.on_record()

    def follow(self, record: Record) -> None:
        """Does what the primary did (replicated_host.py, `follow`)."""
        self.complete = self.complete or record.complete
        first, stop = record.parts or (0, 0)
        if self._job.sync and stop:
            self.previous = (self.policy.version, self.parts)
        for index in range(first, stop):
            self.policy.arrive(index, empty=False)
            self._job.oracle.applied(self.index, index, self.parts)
            self.parts |= 1 << index
        if self.policy.waits_for_norm:
            self.policy.proceed()
        if record.norm is not None:
            self.norm = self.policy.version, record.norm
        self.accepted = self.parts

    def promote(self, term: int) -> None:
        self.is_primary, self.term = True, term

    def state(self) -> ShardState:
        return ShardState()

    def notify(self) -> None:
        """Answers those who may start now (shard_host.py, `pull`)."""
        for settling in list(self._settling):
            if settling in self._settling and (self.over or settling[0].has(settling[1])):
                self._settling.remove(settling)
                settling[2]()
        for waiting in list(self._waiting):
            if waiting in self._waiting and (answer := self._start(*waiting)) is not None:
                self._waiting.remove(waiting)
                self.settle(partial(self._answer, waiting[0], waiting[2], answer))

    def end(self) -> None:
        self.over = True
        self.notify()

    def _answer(self, session: Session, step: int | None, answer: Answer) -> None:
        session.answer(self._values(step) if answer.op == "values" and not self.over else answer)

    def require(self, session: Session) -> Answer | None:
        """Why a session is not served any more."""
        if self.over:
            return Answer("over")
        return None if self.sessions.get(session.rank) is session else Answer("refused", text="dropped")

    def _start(self, session: Session, clock: int, step: int | None) -> Answer | None:
        if (refusal := self.require(session)) is not None:
            return refusal
        if not self.initialized or not self.policy.start(session.rank, clock, step):
            return None
        return self._values(step)

    def _values(self, step: int | None) -> Answer:
        if self.previous is not None and self.previous[0] == step:
            return Answer("values", version=step or 0, parts=self.previous[1])
        return Answer("values", version=self.policy.version, parts=self.parts)
