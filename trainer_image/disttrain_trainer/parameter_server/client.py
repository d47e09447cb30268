"""The worker's side: one connection to each server, asked in parallel.

A call returns when every shard has answered. When one of them fails, the others are given up at once, the call raises, and the
client is done with: a worker that goes on asks the master for the generation and makes a new client. No call waits for a silent
server for more than the time-out; a server that waits for other workers says so, and `waiting_for` repeats it.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from disttrain.api.runtime import JobConfig
from disttrain_trainer.data.slices import Slice
from disttrain_trainer.errors import GenerationOver, PeerLost, Refused, WrongInput
from disttrain_trainer.parameter_server.identity import config_digest
from disttrain_trainer.parameter_server.layout import Layout, Span, Vectors, bytes_of
from disttrain_trainer.parameter_server.wire import (
    Closed,
    Header,
    Hello,
    HelloVector,
    Link,
    Op,
    ProtocolError,
    Reason,
    Silent,
)

T = TypeVar("T")

_PAUSE = 0.05
"""Seconds before a refused connection is tried again; twice as long each time, up to a second."""


class ShardedClient:
    """A worker's connections to all servers of a generation. For one thread at a time; `close` may come from another.

    timeout: seconds after which a server that is silent is taken for lost.

    Calls raise PeerLost (a server was lost, or a wait ran out), GenerationOver (the servers have begun another one), Refused (this
    process is not wanted any more), or WrongInput (this worker's model is not the servers').
    """

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        config: JobConfig,
        rank: int,
        incarnation: str,
        generation: int,
        timeout: float,
    ) -> None:
        self._config = config
        self._rank = rank
        self._incarnation = incarnation
        self._generation = generation
        self._timeout = timeout
        self._shards = [_Connection(number, address, timeout) for number, address in enumerate(addresses)]
        self._threads = ThreadPoolExecutor(len(addresses), thread_name_prefix="shard")
        self._clock = 0
        self.versions: tuple[int, ...] = ()
        """Version of each shard's parameters as of the last pull."""
        self.initialized = False
        """Whether every shard had parameters when this client connected."""

    @property
    def clock(self) -> int:
        """Iterations that this worker has completed, counted from where it joined."""
        return self._clock

    @property
    def waiting_for(self) -> str:
        """What the servers wait for, as they say; "" while they do not."""
        return "; ".join(dict.fromkeys(shard.waiting_for for shard in self._shards if shard.waiting_for))

    @property
    def bytes_sent(self) -> int:
        return sum(shard.link.sent for shard in self._shards if shard.link is not None)

    @property
    def bytes_received(self) -> int:
        return sum(shard.link.received for shard in self._shards if shard.link is not None)

    def connect(self, layout: Layout) -> None:
        """Connects to every server; waits for those that do not listen yet, and for the generation to begin."""
        self._layout = layout

        def one(shard: "_Connection") -> Header:
            shard.spans = layout.spans(server=shard.number, servers=len(self._shards))
            hello = Hello(
                job_uid=self._config.uid,
                config_digest=config_digest(self._config),
                attempt=self._config.attempt,
                generation=self._generation,
                server=shard.number,
                servers=len(self._shards),
                rank=self._rank,
                incarnation=self._incarnation,
                timeout_seconds=self._timeout,
                layout_digest=layout.digest,
                vectors=tuple(
                    HelloVector.model_validate({"dtype": v.dtype, "length": v.length}) for v in layout.vectors
                ),
            )
            return shard.open(hello, self._config.startup_timeout_seconds)

        welcomes = self._all("to be welcomed", one)
        self.versions = tuple(welcome.version for welcome in welcomes)
        self.initialized = all(welcome.code for welcome in welcomes)

    def initialize(self, flat: Vectors) -> bool:
        """Offers the first parameters. False when some shard had parameters already: `pull` then."""

        def one(shard: "_Connection") -> bool:
            views = shard.views(flat)
            shard.send(Header(op=Op.INIT, nbytes=_nbytes(views)), views)
            return bool(shard.receive(Op.DONE).code)

        return all(self._all("to take the first parameters", one))

    def join(self) -> int:
        """Takes part from now on; returns the clock, at the slowest worker's. Call it before the first pull, and after `leave`.

        The first round makes this worker a live one on every shard, so that no minimum can pass it; the second sets all to the latest.
        """
        at = 0
        for _ in range(2):
            at = max(self._all("to join", lambda shard: shard.ask(Header(op=Op.JOIN, clock=at), Op.DONE).clock))  # noqa: B023
        self._clock = at
        return at

    def leave(self) -> None:
        """Takes no part any more (nothing to do, or the end), so that nobody waits for this worker."""
        self._all("to leave", lambda shard: shard.ask(Header(op=Op.LEAVE), Op.DONE))

    def pull(self, into: Vectors, *, step: int | None = None) -> tuple[int, ...]:
        """Reads the parameters into these vectors; returns each shard's version.

        Sync: waits for the version `step`. A version that differs says that the step is over: its slices are all applied.
        BoundedStaleness: waits at the gate. Async: does not wait.
        """

        def one(shard: "_Connection") -> int:
            shard.send(Header(op=Op.PULL, clock=self._clock, step=-1 if step is None else step))
            return shard.receive_values(into)

        return self._pulled(self._all("the parameters", one))

    def push(self, slice: Slice, gradient: Vectors | None) -> None:
        """Hands in the gradient of the slice's mean loss (None for an empty slice); returns when every shard has it.

        A slice that was pushed before, by anybody, is ignored by the shards that have it.
        """

        def one(shard: "_Connection") -> Header:
            shard.push(self._push_header(shard, Op.PUSH, slice), slice, gradient)
            return shard.receive(Op.DONE)

        self._all(f"slice {slice.index} to be taken", one)
        self._clock += 1

    def push_pull(
        self, slice: Slice, gradient: Vectors | None, into: Vectors, next_step: int | None = None
    ) -> tuple[int, ...]:
        """`push`, then `pull` of `next_step`, in one round trip. `gradient` and `into` must not overlap."""

        def one(shard: "_Connection") -> int:
            shard.push(self._push_header(shard, Op.PUSH_PULL, slice, next_step), slice, gradient)
            return shard.receive_values(into)

        versions = self._all(f"the parameters after slice {slice.index}", one)
        self._clock += 1
        return self._pulled(versions)

    def close(self, *, goodbye: bool = True) -> None:
        """Ends the connections. `goodbye`: on purpose, so that no server reports this worker as lost."""
        for shard in self._shards:
            shard.close(goodbye)
        self._threads.shutdown(wait=False)

    def _push_header(self, shard: "_Connection", op: Op, slice: Slice, step: int | None = None) -> Header:
        return Header(
            op=op,
            samples=slice.samples,
            batch_samples=slice.batch_samples,
            index=slice.index,
            step=-1 if step is None else step,
            clock=self._clock,
            version=self.versions[shard.number],
            nbytes=shard.nbytes if slice.samples else 0,
        )

    def _pulled(self, versions: list[int]) -> tuple[int, ...]:
        self.versions = tuple(versions)
        return self.versions

    def _all(self, what: str, ask: Callable[["_Connection"], T]) -> list[T]:
        """Asks every shard in parallel."""
        if len(self._shards) == 1:
            return [self._one(self._shards[0], what, ask)]
        futures: list[Future[T]] = [self._threads.submit(self._one, shard, what, ask) for shard in self._shards]
        wait(futures, return_when=FIRST_EXCEPTION)
        failed = [error for future in futures if future.done() and (error := future.exception())]
        if failed:
            for shard in self._shards:
                shard.abort()
            wait(futures)
            raise next((error for error in failed if isinstance(error, GenerationOver)), failed[0])
        return [future.result() for future in futures]

    def _one(self, shard: "_Connection", what: str, ask: Callable[["_Connection"], T]) -> T:
        shard.waiting_for = ""
        try:
            return ask(shard)
        except Silent:
            told = f" (it last waited for {shard.waiting_for})" if shard.waiting_for else ""
            raise PeerLost(shard.name, f"silent for {self._timeout:g} s; waited for {what}{told}") from None
        except Closed as error:
            raise PeerLost(shard.name, f"{error}; waited for {what}") from None
        except ProtocolError as error:
            raise PeerLost(shard.name, f"{error}; waited for {what}") from error


class _Connection:
    """One server, as this worker sees it."""

    def __init__(self, number: int, address: str, timeout: float) -> None:
        self.number = number
        self.name = f"parameter-server-{number} ({address})"
        self.link: Link | None = None
        self.spans: tuple[Span, ...] = ()
        self.waiting_for = ""
        self._address = address
        self._timeout = timeout
        self._closed = threading.Event()

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)

    def open(self, hello: Hello, patience: float) -> Header:
        """Connects, introduces this worker, and returns the welcome."""
        self.link = Link(self._dial(patience), timeout=self._timeout)
        data = hello.model_dump_json().encode()
        self.link.send(Header(op=Op.HELLO, nbytes=len(data)), [memoryview(data)])
        return self.receive(Op.WELCOME)

    def ask(self, header: Header, answer: Op) -> Header:
        """One request without payload."""
        self.send(header)
        return self.receive(answer)

    def push(self, header: Header, slice: Slice, gradient: Vectors | None) -> None:
        """Sends a gradient."""
        if not slice.samples:
            self.send(header)
        elif gradient is None:
            raise ValueError(f"slice {slice.index} has {slice.samples} samples, but no gradient")
        else:
            self.send(header, self.views(gradient))

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        link = self._open_link()
        try:
            link.send(header, payload)
        except Closed:
            # The server may have said why before it closed the connection.
            self.receive(Op.DONE)
            raise

    def receive(self, op: Op) -> Header:
        """The answer, after any number of WAITs. What REFUSED says is raised."""
        link = self._open_link()
        while True:
            header = link.receive()
            if header.op is Op.WAIT:
                self.waiting_for = link.receive_text(header).decode(errors="replace")
            elif header.op is Op.REFUSED:
                raise self._refusal(header.code, link.receive_text(header).decode(errors="replace"))
            elif header.op is op:
                return header
            else:
                raise ProtocolError(f"answered {header.op.name}, not {op.name}")

    def receive_values(self, into: Vectors) -> int:
        """The parameters of this shard, into their place; returns their version."""
        header = self.receive(Op.VALUES)
        self._open_link().receive_into(header, self.views(into))
        return header.version

    def views(self, vectors: Vectors) -> list[memoryview]:
        """The bytes of this shard's part of the vectors. ValueError when they are not of the layout."""
        if len(vectors) != len(self.spans):
            raise ValueError(f"the layout has {len(self.spans)} vectors, not {len(vectors)}")
        return [_bytes_of(vector, span) for vector, span in zip(vectors, self.spans, strict=True)]

    def abort(self) -> None:
        """Ends the connection under the hands of the thread that uses it."""
        self._closed.set()
        if self.link is not None:
            self.link.abort()

    def close(self, goodbye: bool) -> None:
        if self.link is not None and goodbye and not self._closed.is_set():
            with contextlib.suppress(Closed, Silent):
                self.link.send(Header(op=Op.BYE))
        self.abort()
        if self.link is not None:
            self.link.close()

    def _open_link(self) -> Link:
        if self.link is None or self._closed.is_set():
            raise Closed("the connection was given up")
        return self.link

    def _dial(self, patience: float) -> socket.socket:
        """Tries until the server listens and its name resolves, which in a cluster takes up to half a minute."""
        host, _, port = self._address.rpartition(":")
        deadline = time.monotonic() + patience
        pause = _PAUSE
        while True:
            try:
                return socket.create_connection((host.strip("[]"), int(port)), timeout=self._timeout)
            except OSError as error:
                if time.monotonic() + pause > deadline:
                    raise PeerLost(
                        self.name, f"{error.strerror or error}; tried to connect for {patience:g} s"
                    ) from None
            if self._closed.wait(pause):
                raise Closed("the connection was given up")
            pause = min(2 * pause, 1.0)

    def _refusal(self, code: int, text: str) -> Exception:
        match code:
            case Reason.GENERATION:
                return GenerationOver(self.name, text)
            case Reason.LAYOUT:
                return WrongInput(f"{self.name}: {text}")
            case Reason.TIMEOUT:
                return PeerLost(self.name, text)
            case _:
                return Refused(self.name, text)


def _bytes_of(vector: torch.Tensor, span: Span) -> memoryview:
    if vector.dtype != span.dtype or vector.dim() != 1 or not vector.is_contiguous() or vector.device.type != "cpu":
        raise ValueError(
            f"a vector must be one-dimensional, contiguous, {span.dtype} and on the CPU; this is {vector.dtype} on {vector.device}"
        )
    size = span.dtype.itemsize
    return bytes_of(vector)[span.start * size : span.stop * size]


def _nbytes(views: Sequence[memoryview]) -> int:
    return sum(len(view) for view in views)
