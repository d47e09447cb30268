"""The worker's side: one connection to each server, asked in parallel.

A call returns when every shard has answered. When one of them fails, the call aborts the others at once and raises, and the client cannot
be used any more: the worker asks the master for a round and makes a new client. No call waits for a silent server longer than the
time-out; a server that waits for other workers says so, and `waiting_for` repeats it.
"""

import select
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from disttrain.api.runtime import JobConfig
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.errors import PeerLost, RoundOver
from disttrain_trainer.model.flat import Layout, Vectors, norm
from disttrain_trainer.model.parameter_groups import Groups
from disttrain_trainer.net.connection import Closed, Silent
from disttrain_trainer.net.frames import LATE, NORM, OWN_WEIGHT, PARTIAL, PATIENT, RUN, Header, Op, ProtocolError
from disttrain_trainer.net.transport import PLAIN, Transport
from disttrain_trainer.parameter_server.compression import Compression
from disttrain_trainer.parameter_server.connection import ServerConnection
from disttrain_trainer.parameter_server.identity import Hello, HelloVector, config_digest
from disttrain_trainer.parameter_server.participation import within
from disttrain_trainer.parameter_server.shares import RankShare, packed_spans

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientInfo:
    """The weight of a gradient, and the elements that it covers."""

    weight: float | None = None
    """The weight that the loss returned with its mean; None: the number of samples."""
    runs: Sequence[tuple[int, int, int]] | None = None
    """(vector, start, stop) of the elements that had a gradient; None: all."""
    clips: bool = False
    """The gradient is an update of its own, which the servers clip by its norm; its weight does not matter there."""
    norm: float | None = None
    """Of the whole gradient, where this is a share of it."""
    encoded: bool = False
    """It is pushed again: the compression, if there is one, has it already."""


WHOLE = GradientInfo()

IN_TURN_BYTES = 64 << 10
"""Up to so many bytes of each shard one thread asks all servers. Less than the buffers of a socket hold, so that to send does not block: a
thread for each server takes longer to wake than such a request takes."""


class Tried(Enum):
    """How many shards had the version that was asked for."""

    NONE = 0
    SOME = 1
    ALL = 2


class ShardedClient:
    """A worker's connections to all servers of a round. For one thread at a time; `close` may come from another.

    timeout: seconds after which a server that is silent is taken for lost.
    clock: iterations that this worker has completed in the round, with an earlier client.

    Calls raise PeerLost (a server was lost, or a wait ran out), RoundOver (the servers have begun another one), Refused (a newer
    process replaced this one), or WrongInput (this worker's model is not the servers').
    """

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        config: JobConfig,
        rank: int,
        incarnation: str,
        round_number: int,
        timeout: float,
        clock: int = 0,
        compression: Compression | None = None,
        total_steps: int | None = None,
        groups: Groups = (),
        primaries: Sequence[int] = (),
        transport: Transport = PLAIN,
        share: RankShare | None = None,
    ) -> None:
        """addresses: of each server. total_steps: of the job, which the servers need for a learning rate that changes. groups: of
        the parameters, which the servers know no names of. primaries: the server that serves each shard; none: each server its own. share:
        of a rank of a group, whose vectors are packed ones."""
        self._config = config
        self._rank = rank
        self._incarnation = incarnation
        self._round_number = round_number
        self._timeout = timeout
        self._compression = compression
        self._total_steps = total_steps
        self._groups = groups
        self._share = share
        self.connections = tuple(
            ServerConnection(shard, server, addresses[server], timeout, transport)
            for shard, server in enumerate(primaries or range(len(addresses)))
        )
        """One for each shard, in their order."""
        self._in_turn = False
        self._is_plain = transport.context is None
        self._threads = ThreadPoolExecutor(len(addresses), thread_name_prefix="shard")
        self._calls = threading.Lock()  # held by a call
        self._closed = False
        self._clock = clock
        self.versions: tuple[int, ...] = ()
        """Version of each shard's parameters as of the last pull."""
        self.initialized = False
        """Whether every shard had parameters when this client connected."""

    @property
    def clock(self) -> int:
        """Iterations that this worker has completed, counted from where it joined first."""
        return self._clock

    @property
    def waiting_for(self) -> str:
        """What the servers wait for, as their WAIT frames say; "" while they do not wait."""
        return "; ".join(dict.fromkeys(shard.waiting_for for shard in self.connections if shard.waiting_for))

    @property
    def bytes_sent(self) -> int:
        return sum(shard.link.sent for shard in self.connections if shard.link is not None)

    @property
    def bytes_received(self) -> int:
        return sum(shard.link.received for shard in self.connections if shard.link is not None)

    def connect(self, layout: Layout) -> None:
        """Connects to every server; blocks until all listen and the round begins."""

        def one(shard: ServerConnection) -> Header:
            shard.spans = shard.bounds = layout.spans(server=shard.number, servers=len(self.connections))
            hello = Hello(
                job_uid=self._config.uid,
                config_digest=config_digest(self._config),
                attempt=self._config.attempt,
                round_number=self._round_number,
                shard=shard.number,
                shards=len(self.connections),
                rank=self._rank,
                incarnation=self._incarnation,
                timeout_seconds=self._timeout,
                layout_digest=layout.digest,
                total_steps=self._total_steps,
                groups=self._groups,
                vectors=tuple(
                    HelloVector.model_validate({"dtype": v.dtype, "length": v.length}) for v in layout.vectors
                ),
            )
            return shard.open(hello, self._config.startup_timeout_seconds)

        welcomes = self._all("to be welcomed", one)
        self._in_turn = self._is_plain and all(shard.nbytes <= IN_TURN_BYTES for shard in self.connections)
        self.versions = tuple(welcome.version for welcome in welcomes)
        self.initialized = all(welcome.code for welcome in welcomes)
        if self._share is not None:
            self._tell_share(self._share)

    def see_all(self) -> None:
        """A rank with a share pulls the whole model from here on, and pushes no more."""
        self._all("its share to be taken", lambda shard: shard.ask(Header(op=Op.SHARE), Op.DONE))
        for shard in self.connections:
            shard.spans = shard.bounds

    def _tell_share(self, share: RankShare) -> None:
        own = [share.of_shard(shard.bounds) for shard in self.connections]
        for shard, spans in zip(self.connections, packed_spans(own, self.connections[0].bounds), strict=True):
            shard.spans = spans

        def one(shard: ServerConnection) -> Header:
            data = own[shard.number].encode()
            shard.send(Header(op=Op.SHARE, nbytes=len(data)), [memoryview(data)])
            return shard.receive(Op.DONE)

        self._all("its share to be taken", one)

    def initialize(self, flat: Vectors) -> bool:
        """Offers the first parameters, a vector for each dtype. False when some shard had parameters already: `pull` then."""

        def one(shard: ServerConnection) -> bool:
            shard.send(Header(op=Op.INIT, nbytes=shard.nbytes), shard.views(flat))
            return bool(shard.receive(Op.DONE).code)

        return all(self._all("to take the first parameters", one))

    def join(self) -> int:
        """Takes part from now on; returns the clock. Call it before the first pull, and after `leave`.

        A new worker starts at the slowest worker's clock. A worker that comes back keeps its own lead: a fast worker that is idle for a
        moment must not gain s + 1 iterations on the slow one each time (Ho et al., 2013).
        Two passes over the shards: the first makes this worker a live one everywhere, so that no minimum can pass it; the second sets all
        shards to the latest clock.
        """
        at = self._clock
        for _ in range(2):
            at = max(self._all("to join", lambda shard: shard.ask(Header(op=Op.JOIN, clock=at), Op.DONE).clock))  # noqa: B023
        self._clock = at
        return at

    def leave(self) -> None:
        """Takes no part any more (no work, or the end), so that no other worker waits for this one."""
        self._all("to leave", lambda shard: shard.ask(Header(op=Op.LEAVE), Op.DONE))

    def pull(self, into: Vectors, *, step: int | None = None) -> tuple[int, ...]:
        """Reads the parameters into these vectors, in place (one-dimensional, contiguous, on the CPU); returns each shard's version.

        Sync: waits for the version `step`. A version that differs says that the step is over: its parts are all applied.
        BoundedStaleness: waits at the gate. Async: does not wait.
        """

        def send(shard: ServerConnection) -> None:
            shard.send(Header(op=Op.PULL, clock=self._clock, step=-1 if step is None else step))

        return self._pulled(self._ask("the parameters", send, lambda shard: shard.receive_values(into)))

    def try_pull(self, into: Vectors, *, step: int, patience_seconds: float) -> Tried:
        """`pull` of a synchronous step, which waits no longer than this for it. `into` has values of the step only where all shards have
        the step; where some have it, it is a mixture."""

        def one(shard: ServerConnection) -> int | None:
            shard.send(Header(op=Op.PULL, code=PATIENT, weight=patience_seconds, clock=self._clock, step=step))
            return shard.receive_values_if_there(into)

        found = self._all("the parameters", one)
        self.versions = tuple(
            before if version is None else version for before, version in zip(self.versions, found, strict=True)
        )
        missing = found.count(None)
        return Tried.NONE if missing == len(found) else Tried.SOME if missing else Tried.ALL

    def _encode(
        self, part: BatchPart, gradient: Vectors | None, info: GradientInfo
    ) -> tuple[Compression | None, GradientInfo]:
        """What is sent of a gradient, and its norm where that is asked for; once for all shards."""
        if gradient is None or not part.samples:
            return None, info
        encoded = self._compression
        if encoded is not None and not info.encoded:
            encoded.encode(gradient, () if info.weight == 0 else info.runs)
        if info.clips and info.norm is None:
            info = replace(info, norm=encoded.norm if encoded is not None else norm(gradient))
        return encoded, info

    def push(self, part: BatchPart, gradient: Vectors | None, info: GradientInfo = WHOLE) -> bool:
        """Hands in the gradient of the part's mean loss, vectors as in `pull` (None for an empty part); blocks until every shard has it.

        Shards that have the part already, from any worker, ignore it. Returns whether it counts on the first shard.
        """

        encoded, info = self._encode(part, gradient, info)

        def send(shard: ServerConnection) -> None:
            shard.send(*self._push(shard, Op.PUSH, part, gradient, info, encoded))

        taken = self._ask(f"part {part.index} to be taken", send, lambda shard: shard.receive(Op.DONE))
        self._clock += 1
        return not taken[0].code & LATE

    def push_pull(
        self,
        part: BatchPart,
        gradient: Vectors | None,
        into: Vectors,
        next_step: int | None = None,
        info: GradientInfo = WHOLE,
    ) -> tuple[int, ...]:
        """`push`, then `pull` of `next_step`, in one round trip. `gradient` and `into` must not overlap."""

        encoded, info = self._encode(part, gradient, info)

        def send(shard: ServerConnection) -> None:
            shard.send(*self._push(shard, Op.PUSH_PULL, part, gradient, info, encoded, next_step))

        what = f"the parameters after part {part.index}"
        versions = self._ask(what, send, lambda shard: shard.receive_values(into))
        self._clock += 1
        return self._pulled(versions)

    def keep_buffers(self, step: int, buffers: bytes) -> None:
        """Sync: hands in the buffers that part 0 of a step left, as the bytes of a safetensors file; call it before that part is pushed."""

        def one(shard: ServerConnection) -> Header:
            shard.send(Header(op=Op.KEEP, step=step, nbytes=len(buffers)), [memoryview(buffers)])
            return shard.receive(Op.DONE)

        self._all(f"the buffers after step {step} to be taken", one, self.connections[:1])

    def fetch_buffers(self, step: int) -> bytes | None:
        """Sync: the buffers of a step, as the bytes of a safetensors file; empty at the beginning of the round. None when the servers
        do not have them any more."""

        def one(shard: ServerConnection) -> bytes | None:
            shard.send(Header(op=Op.FETCH, step=step))
            return shard.receive_buffers()

        return self._all(f"the buffers of step {step}", one, self.connections[:1])[0]

    def close(self, *, goodbye: bool = True) -> None:
        """Ends the connections. `goodbye`: on purpose, so that no server reports this worker as lost.

        From another thread than the one that calls: the call in progress raises PeerLost, and its thread must close, too.
        """
        if not self._calls.acquire(blocking=False):
            for shard in self.connections:
                shard.abort()
            return
        try:
            self._closed = True
            for shard in self.connections:
                shard.close(goodbye=goodbye)
            self._threads.shutdown(wait=False)
        finally:
            self._calls.release()

    def _push(
        self,
        shard: ServerConnection,
        op: Op,
        part: BatchPart,
        gradient: Vectors | None,
        info: GradientInfo,
        encoded: Compression | None,
        step: int | None = None,
    ) -> tuple[Header, list[memoryview]]:
        if part.samples and gradient is None:
            raise ValueError(f"part {part.index} has {part.samples} samples, but no gradient")
        code, runs, values = 0, b"", list[memoryview]()
        if encoded is not None:
            code |= encoded.flag
            values = encoded.payload(shard.spans)
        elif gradient is not None and part.samples:
            values = shard.views(gradient)
        weight = info.weight or 0.0
        if info.clips and gradient is not None and part.samples:
            code |= NORM
            weight = info.norm or 0.0
        elif info.weight is not None:
            code |= OWN_WEIGHT
        if info.runs is not None and part.samples:
            code |= PARTIAL
            ours = within(info.runs, [(span.start, span.stop) for span in shard.bounds])
            runs = b"".join(RUN.pack(*run) for run in ours)
        header = Header(
            op=op,
            code=code,
            weight=weight,
            runs=len(runs) // RUN.size,
            samples=part.samples,
            batch_samples=part.batch_samples,
            index=part.index,
            step=-1 if step is None else step,
            clock=self._clock,
            version=self.versions[shard.number],
            nbytes=len(runs) + sum(len(view) for view in values),
        )
        return header, [memoryview(runs), *values]

    def _pulled(self, versions: list[int]) -> tuple[int, ...]:
        self.versions = tuple(versions)
        return self.versions

    def _ask(
        self, what: str, send: Callable[[ServerConnection], None], receive: Callable[[ServerConnection], T]
    ) -> list[T]:
        """Sends every shard its request, and takes the answers."""

        def one(shard: ServerConnection) -> T:
            send(shard)
            return receive(shard)

        if not self._in_turn or len(self.connections) == 1:
            return self._all(what, one)
        with self._calls:
            self._require_open(what)
            try:
                for shard in self.connections:
                    self._one(shard, what, send)
                return self._answers(what, receive)
            except BaseException:  # also what the handler of a signal raises
                for shard in self.connections:
                    shard.abort()
                raise

    def _answers(self, what: str, receive: Callable[[ServerConnection], T]) -> list[T]:
        """In the order of the shards, read as they come: a lost server is noticed while another one waits for workers."""
        answers: dict[int, T] = {}
        poll, waiting, began = select.poll(), dict[int, ServerConnection](), time.monotonic()
        for shard in self.connections:
            number = self._one(shard, what, ServerConnection.fileno)
            waiting[number] = shard
            poll.register(number, select.POLLIN)
        heard = dict.fromkeys(waiting, began)
        while waiting:
            left = min(heard[number] for number in waiting) + self._timeout - time.monotonic()
            for number, _ in poll.poll(max(0.0, left) * 1000):
                shard = waiting[number]
                heard[number] = time.monotonic()
                if self._one(shard, what, ServerConnection.has_answer):
                    answers[shard.number] = self._one(shard, what, receive)
                    poll.unregister(number)
                    del waiting[number]
            for number, shard in waiting.items():
                if time.monotonic() - heard[number] >= self._timeout:
                    raise self._silent(shard, what)
        return [answers[shard.number] for shard in self.connections]

    def _require_open(self, what: str) -> None:
        if self._closed:
            raise PeerLost("the parameter servers", f"this client was closed before it asked for {what}")

    def _all(
        self, what: str, ask: Callable[[ServerConnection], T], shards: Sequence[ServerConnection] | None = None
    ) -> list[T]:
        """Asks every shard, or these, in parallel."""
        shards = self.connections if shards is None else shards
        with self._calls:
            self._require_open(what)
            futures: list[Future[T]] = []
            try:
                if len(shards) == 1:
                    return [self._one(shards[0], what, ask)]
                futures = [self._threads.submit(self._one, shard, what, ask) for shard in shards]
                wait(futures, return_when=FIRST_EXCEPTION)
                errors = [error for future in futures if future.done() and (error := future.exception())]
                if errors:
                    raise next((error for error in errors if isinstance(error, RoundOver)), errors[0])
                return [future.result() for future in futures]
            except BaseException:  # also what the handler of a signal raises
                for shard in self.connections:
                    shard.abort()
                wait(futures)
                raise

    def _one(self, shard: ServerConnection, what: str, ask: Callable[[ServerConnection], T]) -> T:
        try:
            return ask(shard)
        except Silent:
            raise self._silent(shard, what) from None
        except (Closed, ProtocolError) as error:
            raise PeerLost(shard.name, f"{error}; waited for {what}") from error

    def _silent(self, shard: ServerConnection, what: str) -> PeerLost:
        last = f" (it last waited for {shard.waiting_for})" if shard.waiting_for else ""
        return PeerLost(shard.name, f"silent for {self._timeout:g} s; waited for {what}{last}")
