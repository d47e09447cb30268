"""A worker that computes nothing: strategies/parameter_server.py, strategies/push_pull.py and parameter_server/client.py, step by step.

The main thread is a generator: it waits where the real one does. The control thread is the trainer's own `ParameterServerMember`, which
handles a message between any two waits. Its parameters are, for each server, the set of parts in them.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from disttrain.api.names import Role
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.errors import PeerLost, Refused, RoundOver
from disttrain_trainer.net.members import ParameterServerMember, Round, Save
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member
from disttrain_trainer.strategies.push_pull import IDLE_SECONDS
from disttrain_trainer.strategies.served_rounds import RETRY_SECONDS
from simulation.training.control import ControlClient
from simulation.training.shard_host import Answer, Request
from simulation.training.timeline import Connection, Steps, Thread, Wait, never

if TYPE_CHECKING:
    from simulation.training.job import Job

SAMPLES = 1024
_LOST = "a parameter server"


class Client:
    """The connections of one lease to all servers (client.py)."""

    bytes_sent = bytes_received = 0

    def __init__(self, worker: "Worker", round_number: int, clock: int, primaries: tuple[int, ...]) -> None:
        self._primaries = primaries
        self._worker = worker
        self._job = worker.job
        self._round_number = round_number
        self._connections: dict[int, Connection] = {}
        self._answers: dict[int, Answer] = {}
        self._error: PeerLost | None = None
        self._calling = self._closed = False
        self._unreachable = False
        self.clock = clock
        self.versions: tuple[int, ...] = ()
        self.initialized = False

    def connect(self) -> Steps[None]:
        """To every server; waits for those that do not listen yet."""
        hello = Request(
            "hello",
            round_number=self._round_number,
            rank=self._worker.member.rank,
            incarnation=self._worker.incarnation,
        )
        welcomes = yield from self._all(lambda index: self._dial(index, hello._replace(shard=index)))
        self.versions = tuple(welcome.version for welcome in welcomes)
        self.initialized = all(welcome.initialized for welcome in welcomes)

    def initialize(self, parameters: tuple[int, ...]) -> Steps[None]:
        yield from self._ask(lambda index: Request("init", parts=parameters[index]))

    def join(self) -> Steps[None]:
        for _ in range(2):
            answers = yield from self._ask(lambda _: Request("join", clock=self.clock))
            self.clock = max(answer.clock for answer in answers)

    def leave(self) -> Steps[None]:
        yield from self._ask(lambda _: Request("leave"))

    def pull(self, step: int | None) -> Steps[tuple[int, ...]]:
        answers = yield from self._ask(lambda _: Request("pull", clock=self.clock, step=step))
        return self._pulled(answers)

    def push(self, index: int) -> Steps[None]:
        yield from self._ask(lambda _: Request("push", index=index, clock=self.clock))
        self.clock += 1

    def push_pull(self, index: int, step: int | None) -> Steps[tuple[int, ...]]:
        answers = yield from self._ask(lambda _: Request("push_pull", index=index, clock=self.clock, step=step))
        self.clock += 1
        return self._pulled(answers)

    def close(self, *, goodbye: bool = True) -> None:
        """From the control thread: a call that is made now raises, and its thread must close, too."""
        if self._calling:
            self._fail(PeerLost(_LOST, "this side closed the connection"))
            return
        self._closed = True
        if goodbye:
            for connection in self._connections.values():
                connection.send(0, Request("bye"))
        self._abort()

    def cut(self, index: int) -> None:
        """The network to this server breaks."""
        if index in self._connections:
            self._connections[index].cut()

    def kill(self) -> None:
        """With the process."""
        self._closed = True
        self._abort()

    def _pulled(self, answers: list[Answer]) -> tuple[int, ...]:
        self.versions = tuple(answer.version for answer in answers)
        self._worker.parameters = tuple(answer.parts for answer in answers)
        return self.versions

    def _ask(self, request: Callable[[int], Request]) -> Steps[list[Answer]]:
        def one(index: int) -> None:
            if not self._connections[index].send(0, request(index)):
                self._fail(PeerLost(_LOST, "closed"))

        return (yield from self._all(one))

    def _all(self, ask: Callable[[int], None]) -> Steps[list[Answer]]:
        """Asks every server in parallel; the first failure gives all of them up."""
        if self._closed:
            raise PeerLost(_LOST, "this client was closed")
        count = self._job.config.parameter_servers
        self._answers.clear()
        self._calling = True
        for index in range(count):
            ask(index)
        yield Wait(lambda: self._error is not None or len(self._answers) == count)
        self._calling = False
        if self._error is not None:
            self._abort()
            raise self._error
        return [self._answers[index] for index in range(count)]

    def _dial(self, index: int, hello: Request) -> None:
        if self._unreachable or self._closed:
            return
        server = self._job.server(self._primaries[index])
        if server is None:
            self._job.timeline.soon(RETRY_SECONDS, partial(self._dial, index, hello))
            return
        connection = self._connections[index] = Connection(self._job.timeline, self._job.pace.data)
        connection.receive[0] = partial(self._receive, index)
        connection.ended[0] = partial(self._fail, PeerLost(_LOST, "closed by the peer"))
        server.accept(connection)
        connection.send(0, hello)

    def _receive(self, index: int, answer: Answer) -> None:
        match answer.op:
            case "over":
                self._fail(RoundOver(_LOST, "the round is over"))
            case "refused":
                self._fail(Refused(_LOST, answer.text))
            case _:
                self._answers[index] = answer
                self._worker.poke()

    def _fail(self, error: PeerLost) -> None:
        if self._error is None:
            self._error = error
        self._worker.poke()

    def _abort(self) -> None:
        self._unreachable = True
        for connection in self._connections.values():
            connection.close(0)


class Worker:
    """The process of one worker."""

    def __init__(self, job: "Job", rank: int, incarnation: str) -> None:
        self.job = job
        self.member = Member(Role.WORKER, rank)
        self.incarnation = incarnation
        self.alive = True
        self.parameters: tuple[int, ...] = (0,) * job.config.parameter_servers
        self._member = ParameterServerMember()
        self.control = ControlClient(
            job=job,
            member=self.member,
            incarnation=incarnation,
            describe=self._member.describe,
            on_message=self._on_message,
            end=self.end,
        )
        self._thread = Thread(job.timeline, self._run())
        self._trained = False
        self._round_number = self._clock = 0
        self._done: list[int] = []
        self._kept: int | None = None
        """The part whose push was cut off (strategies/kept_gradient.py)."""
        self._resumes = False
        """Whether the part was in work before in this round (parameter_server/assignments.py)."""
        self._seconds = 0.0

    @property
    def client(self) -> Client | None:
        client = self._member.client
        return client if isinstance(client, Client) else None

    def start(self) -> None:
        self.control.connect()
        self._thread.start()

    def poke(self) -> None:
        self._thread.poke()

    def end(self) -> None:
        """The end of the process, whatever it is at."""
        self.job.ended(self)

    def kill(self) -> None:
        self.alive = False
        self._thread.stop()
        self.control.close()
        if (client := self.client) is not None:
            client.kill()

    def _on_message(self, message: Message) -> None:
        self._member.on_message(message)
        self.poke()

    def _pause(self, scale: float) -> Steps[None]:
        yield Wait(never, self.job.timeline.delay(scale))

    def _run(self) -> Steps[None]:
        member, control = self._member, self.control
        yield from self._pause(self.job.pace.start)  # it imports torch and makes the model
        member.data, member.buffers = DataSet(SAMPLES), self.job.buffers
        member.keeps_model = self.job.keeps_model
        while not control.finished:
            if member.round is None:
                member.begun = None
                control.send(MessageType.READY, **member.describe())
            yield Wait(lambda: control.finished or member.begun is not None)
            if not control.finished and member.begun is not None:
                try:
                    yield from self._take_part_in(member.begun)
                except Refused:
                    self.end()
                    return
        self.job.finished(self)

    def _take_part_in(self, this_round: Round) -> Steps[None]:
        clock = self._clock if this_round.number == self._round_number else 0
        client = Client(self, this_round.number, clock, this_round.primaries)
        yield from self._pause(self.job.pace.requests)
        if self._member.round is not this_round:
            return
        self._member.client = client
        self._done.clear()
        broken = False
        try:
            yield from client.connect()
            yield from self._begin(client, this_round)
            yield from self._work(client, this_round)
        except Refused:
            raise
        except PeerLost:
            broken = True
        if broken and self._member.round is this_round:
            yield Wait(lambda: self._member.round is not this_round, RETRY_SECONDS)
            if self._member.round is this_round:
                self._member.round = None
        self._member.client = None
        self._clock = client.clock
        client.close()

    def _begin(self, client: Client, this_round: Round) -> Steps[None]:
        another = this_round.number != self._round_number
        reset_buffers = another and this_round.from_scratch and self.job.buffers
        if self._trained and (reset_buffers or not client.initialized):
            self.parameters = (0,) * len(self.parameters)
            self._trained = False
        if not client.initialized:
            yield from client.initialize(self.parameters)
        self._round_number = this_round.number

    def _work(self, client: Client, this_round: Round) -> Steps[None]:
        job, member = self.job, self._member
        participates = current = False
        while (index := (yield from self._next_assignment(client, this_round, participates))) is not None:
            if index < 0:
                participates = current = False
                continue
            began, step = job.timeline.now, index // job.config.parts_per_step
            if not participates:
                self._trained = True
                yield from client.join()
                participates = True
            kept, self._kept = self._kept, None
            if kept != index or not self._resumes:
                if not current:
                    current = self._received((yield from client.pull(step if job.sync else None)), step)
                if not current:
                    self._finished(index, began)  # its step is over
                    continue
                job.oracle.computes(self, this_round.number, index, self.parameters)
                yield from self._pause(job.pace.compute)
                if index in job.poisoned and index not in member.course.left_out:
                    yield from self._go_back(this_round, index)
                    return
            self._kept = index
            following = member.assignments[0] if member.assignments else None
            if following is None:
                yield from client.push(index)
                current = False
            else:
                after = following // job.config.parts_per_step
                current = self._received((yield from client.push_pull(index, after if job.sync else None)), after)
            self._kept = None
            self._finished(index, began)
            if job.timeline.chance.random() < 0.2:  # a report is due
                self._report(index)
                self._request(this_round, force=True)
            elif job.every and (step + 1) % job.every == 0:
                self._request(this_round, force=True)

    def _go_back(self, this_round: Round, index: int) -> Steps[None]:
        """The loss of the part is not finite: the worker waits for the next round."""
        job, member = self.job, self._member
        step, each = index // job.config.parts_per_step, job.config.parts_per_step
        parts = list(range(step * each, (step + 1) * each)) if job.sync else [index]
        self.control.send(MessageType.NAN, step=step, stay=this_round.lease, parts=parts)
        yield Wait(lambda: member.round is not this_round)

    def _report(self, index: int) -> None:
        self.control.send(MessageType.REPORT, step=index, samples=1, loss=1.0)

    def _received(self, versions: tuple[int, ...], step: int) -> bool:
        return not self.job.sync or all(version == step for version in versions)

    def _take(self) -> int:
        member = self._member
        index = member.assignments.popleft()
        self._resumes, member.in_work = member.in_work == index, index
        return index

    def _finished(self, index: int, began: float) -> None:
        if self._member.in_work == index:
            self._member.in_work = None
        self._done.append(index)
        seconds = self.job.timeline.now - began
        self._seconds += (seconds - self._seconds) * 0.1 if self._seconds else seconds

    def _request(self, this_round: Round, *, force: bool = False) -> None:
        member = self._member
        count = member.parts_to_request(self._seconds)
        if count or (force and self._done):
            if member.round is not this_round:
                return
            member.asked = member.asked or count > 0
            done, self._done = self._done, []
            self.control.send(MessageType.REQUEST, stay=this_round.lease, count=count, done=done)

    def _next_assignment(self, client: Client, this_round: Round, participates: bool) -> Steps[int | None]:
        member = self._member
        if member.round is not this_round:
            return None
        if member.save is not None:
            self._save_buffers()
        self._request(this_round)
        if member.assignments:
            return self._take()
        self._request(this_round, force=True)

        def something_new() -> bool:
            called = member.evaluate or member.save is not None
            return called or bool(member.assignments) or member.round is not this_round

        idle = not (yield Wait(something_new, IDLE_SECONDS))
        if idle:
            if participates:
                yield from client.leave()
            yield Wait(something_new)
        if member.save is not None and not idle:
            return (yield from self._next_assignment(client, this_round, participates))
        if member.evaluate:
            yield from self._evaluate(client, this_round)
        return -1 if idle or not member.assignments else self._take()

    def _save_buffers(self) -> None:
        save, self._member.save = self._member.save, None
        if save is not None:
            self.control.send(MessageType.COPIED, id=save.id)
            self.job.timeline.soon(self.job.pace.disk, partial(self._buffers_written, save))

    def _buffers_written(self, save: Save) -> None:
        if not self.alive:
            return
        name = f"buffers-{save.id}"
        try:
            self.job.fault_of_the_volume()
            self.job.volume.write(save.folder, name, None)
        except OSError as error:
            self.control.send(MessageType.SAVED, id=save.id, error=str(error))
        else:
            self.control.send(MessageType.SAVED, id=save.id, file=name, digest="")

    def _evaluate(self, client: Client, this_round: Round) -> Steps[None]:
        job = self.job
        self._member.evaluate = False
        self._trained = True
        yield from client.join()
        yield from client.pull(job.steps if job.sync else None)
        yield from client.leave()
        job.oracle.evaluates(self.member, self.parameters)
        yield from self._pause(job.pace.disk)
        found: dict[str, object] = {"evaluation": {"accuracy": 1.0}} if job.evaluates else {}
        if job.keeps_model:
            found["model"] = {"path": "/model/model.safetensors", "sha256": "0" * 64}
        self.control.send(MessageType.EVALUATED, stay=this_round.lease, **found)
