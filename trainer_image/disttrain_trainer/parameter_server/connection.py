"""A worker's connection to one server: dialling, frames, and the errors that refusals become."""

import contextlib
import threading
import time
from collections.abc import Sequence

import torch

from disttrain_trainer.errors import PeerLost, Refused, RoundOver, WrongInput
from disttrain_trainer.model.flat import Span, Vectors, bytes_of
from disttrain_trainer.net.connection import Closed, Connection, Silent
from disttrain_trainer.net.frames import MAX_BUFFERS, NOT_YET, Header, Link, Op, ProtocolError, Reason
from disttrain_trainer.net.transport import Interrupt, Transport
from disttrain_trainer.parameter_server.identity import Hello

_RETRY_SECONDS = 0.05
"""Seconds before a refused connection is tried again; twice as long each time, up to a second."""


class ServerConnection:
    """One shard, as this worker sees it, on the server that is its primary."""

    def __init__(self, number: int, server: int, address: str, timeout: float, transport: Transport) -> None:
        self.number = number
        """Of the shard."""
        self.name = f"parameter-server-{server} ({address})"
        self.link: Link | None = None
        self.spans: tuple[Span, ...] = ()
        """What of the vectors that are sent and received is this shard's: of packed ones where the worker has a share."""
        self.bounds: tuple[Span, ...] = ()
        """What of the model's vectors is this shard's."""
        self.waiting_for = ""
        self._address = address
        self._timeout = timeout
        self._transport = transport
        self._closed = threading.Event()
        self._interrupt = Interrupt()
        self._answer: Header | None = None
        """Read by `has_answer`, and not taken by `receive` yet."""
        self._views: list[tuple[Vectors, list[memoryview]]] = []
        """Of the vectors that were used last, a worker's gradients and its parameters: to make views costs as much as to read a header."""

    @property
    def nbytes(self) -> int:
        """Bytes of this shard's parameters, and of a gradient."""
        return sum(span.nbytes for span in self.spans)

    def open(self, hello: Hello, timeout_seconds: float) -> Header:
        """Connects, introduces this worker, and returns the welcome."""
        self.link = Link(self._dial(timeout_seconds))
        data = hello.encode()
        self.link.send(Header(op=Op.HELLO, nbytes=len(data)), [memoryview(data)])
        return self.receive(Op.WELCOME)

    def ask(self, header: Header, answer: Op) -> Header:
        """One request without payload."""
        self.send(header)
        return self.receive(answer)

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """Sends a request. Raises Silent, Closed, or the Refusal that the server sent before it closed the connection."""
        link = self._open_link()
        try:
            if link.spent:  # between two requests nothing is on its way
                link.send(Header(op=Op.RENEW))
                self.receive(Op.DONE)
                link.renew(within=self._timeout)
            link.send(header, payload)
        except Closed:
            # The server may have said why before it closed the connection.
            self.receive(Op.DONE)
            raise

    def fileno(self) -> int:
        """Of the socket, to wait for answers of several servers."""
        return self._open_link().fileno()

    def has_answer(self) -> bool:
        """Reads the next frame's head, which has come. False for a WAIT; else `receive` does not block for it."""
        link = self._open_link()
        header = link.receive()
        if header.op is Op.WAIT:
            self.waiting_for = link.receive_text(header).decode(errors="replace")
            return False
        self._answer = header
        return True

    def receive(self, op: Op) -> Header:
        """The answer, after any number of WAITs. What REFUSED says is raised."""
        link = self._open_link()
        while True:
            header, self._answer = self._answer or link.receive(), None
            if header.op is Op.WAIT:
                self.waiting_for = link.receive_text(header).decode(errors="replace")
                continue
            self.waiting_for = ""
            if header.op is Op.REFUSED:
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

    def receive_values_if_there(self, into: Vectors) -> int | None:
        """As `receive_values`; None where the server says that the version is not there yet."""
        header = self.receive(Op.VALUES)
        if header.code == NOT_YET:
            return None
        self._open_link().receive_into(header, self.views(into))
        return header.version

    def receive_buffers(self) -> bytes | None:
        """The answer to FETCH; None when the server has none for this step."""
        header = self.receive(Op.KEPT)
        data = self._open_link().receive_bytes(header, most=MAX_BUFFERS)
        return bytes(data) if header.code else None

    def views(self, vectors: Vectors) -> list[memoryview]:
        """The bytes of this shard's part of the vectors. ValueError when they are not of the layout."""
        for known, views in self._views:
            if known is vectors:
                return views
        if len(vectors) != len(self.spans):
            raise ValueError(f"the layout has {len(self.spans)} vectors, not {len(vectors)}")
        views = [_bytes_of(vector, span) for vector, span in zip(vectors, self.spans, strict=True)]
        if isinstance(vectors, tuple):
            self._views = [*self._views[-1:], (vectors, views)]
        return views

    def abort(self) -> None:
        """Ends the connection while another thread uses it; that thread gets Closed."""
        self._closed.set()
        self._interrupt.end()
        if self.link is not None:
            self.link.abort()

    def close(self, *, goodbye: bool) -> None:
        """Ends the connection; for when no thread uses it."""
        if self.link is not None and goodbye and not self._closed.is_set():
            with contextlib.suppress(Closed, Silent):
                self.link.send(Header(op=Op.BYE))
        self.abort()
        if self.link is not None:
            self.link.close()

    def _open_link(self) -> Link:
        if self.link is None or self._closed.is_set():
            raise Closed("this side closed the connection")
        return self.link

    def _dial(self, timeout_seconds: float) -> Connection:
        """Tries until the server listens and its name resolves, which in a cluster takes up to half a minute."""
        deadline = time.monotonic() + timeout_seconds
        pause = _RETRY_SECONDS
        while True:
            try:
                return self._transport.dial(self._address, timeout=self._timeout, interrupt=self._interrupt)
            except OSError as error:
                why = error.strerror or str(error)
            if time.monotonic() + pause > deadline:
                raise PeerLost(self.name, f"{why}; tried to connect for {timeout_seconds:g} s")
            if self._closed.wait(pause):
                raise Closed("this side closed the connection")
            pause = min(2 * pause, 1.0)

    def _refusal(self, code: int, text: str) -> Exception:
        match code:
            case Reason.ROUND:
                return RoundOver(self.name, text)
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
