"""The binary protocol between workers and parameter servers: frames on a blocking TCP socket.

A frame is a header of 72 bytes (`Header`, little-endian, with a CRC of itself) and `nbytes` of payload: raw parameters or gradients
in the order of the layout, JSON for HELLO, text for the reason of REFUSED and WAIT. A PUSH whose gradient is one of some parameters only
begins with
`runs` runs, each of RUN: which elements of the shard had a gradient. Payload goes from and into tensor memory without a copy.

    worker                          server
    HELLO identity, layout      ->  WELCOME version, whether initialized     once, first; or REFUSED, and the connection ends
    INIT values                 ->  DONE
    JOIN clock                  ->  DONE clock
    LEAVE                       ->  DONE
    PUSH part, gradient        ->  DONE version
    PULL clock, step            ->  VALUES version, parameters
    PUSH_PULL part, gradient   ->  VALUES version, parameters               push and pull in one round trip
    KEEP step, buffers         ->  DONE                                     server 0, Sync: what part 0 of a step left
    FETCH step                 ->  KEPT buffers                             server 0, Sync: the buffers of a step
    BYE                         ->                                           the end, on purpose

One request at a time. While a request waits for others, the server sends WAIT with the reason, several times within the worker's
time-out: a silent server counts as lost. No input is trusted: sizes are known before a payload is read, nothing is unpickled, and a frame
that does not fit is a `ProtocolError`, which costs its sender the connection and has no other effect.
"""

import contextlib
import select
import socket
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"DTPS"
PROTOCOL = 2
MAX_TEXT = 64 * 1024
"""Bytes of a HELLO or of a text."""
CHUNK = 4 << 20
"""Bytes of one system call, which must move within the time-out."""
LOCAL_BUFFER = 256 << 10
"""Bytes of a socket's buffers when both ends are on one machine. Left alone, the kernel lets them grow to megabytes, for networks with
a delay; here a small one keeps what is in flight in the processor's cache, which doubles the throughput."""

MAX_BUFFERS = 1 << 32
"""Bytes of the buffers of a step."""
MAX_RUNS = 1 << 20
RUN = struct.Struct("<IQQ")
"""Number of the vector, first element, element behind the last, counted in the shard."""

_HEADER = struct.Struct("<4sBBHIIQqQQQdII")
SIZE = _HEADER.size
"""Bytes of a header."""


class ProtocolError(Exception):
    """The peer does not speak this protocol, or breaks it."""


class Refusal(Exception):
    """A server's answer to a request that it does not fulfil."""

    def __init__(self, reason: "Reason", text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


class Silent(Exception):
    """The peer has neither sent nor taken anything for the time-out."""


class Closed(Exception):
    """The peer has closed the connection, or its end was lost."""


class Op(IntEnum):
    """What a frame is; see the table above."""

    HELLO = 1
    INIT = 2
    JOIN = 3
    LEAVE = 4
    PUSH = 5
    PULL = 6
    PUSH_PULL = 7
    BYE = 8
    KEEP = 9
    FETCH = 10
    WELCOME = 65
    DONE = 66
    VALUES = 67
    WAIT = 68
    REFUSED = 69
    KEPT = 70


OWN_WEIGHT, PARTIAL = 1, 2
"""Bits of the code of PUSH: the loss names its weight; only some parameters had a gradient."""


class Reason(IntEnum):
    """Why a server refuses, in the code of REFUSED."""

    NONE = 0
    ROUND = 1
    """The round is over."""
    STRANGER = 2
    """Another job, attempt, configuration or cut; or a replaced incarnation."""
    LAYOUT = 3
    """Another model than that of the first worker."""
    TIMEOUT = 4
    """The request has waited for too long."""
    MISTAKE = 5
    """What was asked makes no sense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The head of a frame. A field that an op does not use is 0."""

    op: Op
    code: int = 0
    """WELCOME: 1 when the parameters have values. DONE after INIT: 1 when these values were taken. REFUSED: a `Reason`.
    PUSH: bits, OWN_WEIGHT and PARTIAL. KEPT: 0 when the buffers of the step are gone."""
    samples: int = 0
    """PUSH: samples of the part; 0 means no gradient."""
    batch_samples: int = 0
    """PUSH: samples of the part's step."""
    index: int = 0
    """PUSH: number of the part."""
    step: int = -1
    """PULL: the step whose version is wanted, -1 for the current one. KEEP, FETCH: the step."""
    clock: int = 0
    """The worker's iteration."""
    version: int = 0
    """PUSH: version of the parameters that the gradient is of. From the server: version of the shard."""
    nbytes: int = 0
    """Bytes of payload that follow."""
    weight: float = 0.0
    """PUSH with OWN_WEIGHT: what the loss says that its mean weighs."""
    runs: int = 0
    """PUSH with PARTIAL: runs before the gradient."""

    def encode(self) -> bytes:
        """The 72 bytes."""
        head = _HEADER.pack(
            MAGIC,
            PROTOCOL,
            self.op,
            self.code,
            self.samples,
            self.batch_samples,
            self.index,
            self.step,
            self.clock,
            self.version,
            self.nbytes,
            self.weight,
            self.runs,
            0,
        )[:-4]
        return head + struct.pack("<I", zlib.crc32(head))

    @classmethod
    def decode(cls, data: bytes | bytearray) -> "Header":
        """The header in these 72 bytes, or ProtocolError."""
        if len(data) != SIZE:
            raise ProtocolError(f"a header has {SIZE} bytes, not {len(data)}")
        magic, protocol, op, *fields, crc = _HEADER.unpack(data)
        code, samples, batch_samples, index, step, clock, version, nbytes, weight, runs = fields
        if magic != MAGIC:
            raise ProtocolError(f"the peer does not speak DistTrain: it began with {bytes(data[:4])!r}")
        if protocol != PROTOCOL:
            raise ProtocolError(f"the peer speaks version {protocol} of the protocol, not {PROTOCOL}")
        if crc != zlib.crc32(data[:-4]):
            raise ProtocolError("a header is damaged: its CRC is wrong")
        try:
            known = Op(op)
        except ValueError:
            raise ProtocolError(f"there is no op {op}") from None
        return cls(
            op=known,
            code=code,
            samples=samples,
            batch_samples=batch_samples,
            index=index,
            step=step,
            clock=clock,
            version=version,
            nbytes=nbytes,
            weight=weight,
            runs=runs,
        )


class Link:
    """One end of a connection; for one thread at a time.

    timeout: seconds; a call raises Silent when the peer has not moved the next CHUNK for so long. A lost connection raises Closed,
    and so does one that another thread has aborted.
    """

    def __init__(self, sock: socket.socket, *, timeout: float) -> None:
        # Time-outs of the kernel: a socket with a time-out of Python is non-blocking, and costs a poll() with every call.
        sock.settimeout(None)
        interval = struct.pack("@ll", int(timeout), max(1, int(timeout % 1 * 1e6)))  # 0 would be for ever
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that vanishes says nothing; a worker that computes does not either. The kernel asks.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        if sock.getsockname()[0] == sock.getpeername()[0]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_BUFFER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOCAL_BUFFER)
        self._socket = sock
        self._timeout = timeout
        self._head = bytearray(SIZE)
        self.received = 0
        """Bytes so far."""
        self.sent = 0

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """Sends a frame; blocks until the kernel has it. header.nbytes: the size of the payload. Raises Silent, Closed."""
        self._drain(memoryview(header.encode()), socket.MSG_MORE if header.nbytes else 0)
        for view in payload:
            self._drain(view)
        self.sent += SIZE + header.nbytes

    def send_text(self, header: Header, text: str) -> None:
        """Sends a frame with this text, cut to what a frame may hold; `header.nbytes` is set here."""
        data = text.encode()[:MAX_TEXT]
        self.send(Header(op=header.op, code=header.code, version=header.version, nbytes=len(data)), [memoryview(data)])

    def receive(self, *, patient: bool = False) -> Header:
        """The next header. Raises Silent, Closed, ProtocolError.

        patient: waits for its first byte without a limit, since a worker that computes is silent.
        """
        self._fill(memoryview(self._head), patient=patient)
        return Header.decode(self._head)

    def receive_into(self, header: Header, views: Sequence[memoryview]) -> None:
        """Reads the payload of this header into the views, which are as long together. Raises Silent, Closed, ProtocolError."""
        expected = sum(len(view) for view in views)
        if header.nbytes != expected:
            raise ProtocolError(
                f"{header.op.name} has {header.nbytes} bytes of payload, not the {expected} of this shard"
            )
        for view in views:
            self._fill(view)

    def receive_text(self, header: Header) -> bytearray:
        """The payload of a frame that is not raw data."""
        return self.receive_bytes(header, most=MAX_TEXT)

    def receive_bytes(self, header: Header, *, most: int) -> bytearray:
        """The payload of this header, of at most so many bytes."""
        if header.nbytes > most:
            raise ProtocolError(f"{header.op.name} has {header.nbytes} bytes of payload, more than {most}")
        data = bytearray(header.nbytes)
        self._fill(memoryview(data))
        return data

    def abort(self) -> None:
        """Ends the connection; a thread that uses it gets Closed. Any thread may call this."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its end. For the thread that uses the connection, while it reads nothing."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def stop_reading(self) -> None:
        """A thread that reads gets Closed, but may still send a last frame. Any thread may call this."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Closes the socket. For the thread that uses the connection, which must not use it afterwards."""
        self._socket.close()

    def _drain(self, view: memoryview, flags: int = 0) -> None:
        sent, size = 0, len(view)
        while sent < size:
            chunk = view[sent : sent + CHUNK]
            begin = time.monotonic()
            try:
                count = self._socket.send(chunk, flags)
            except BlockingIOError:
                raise Silent from None
            except OSError as error:
                raise Closed(_describe(error)) from None
            self._require_progress(count, len(chunk), begin)
            sent += count

    def _fill(self, view: memoryview, *, patient: bool = False) -> None:
        filled, size = 0, len(view)
        while filled < size:
            chunk = min(CHUNK, size - filled)
            begin = time.monotonic()
            try:
                count = self._socket.recv_into(view[filled : filled + chunk], chunk, socket.MSG_WAITALL)
            except BlockingIOError:
                if patient and not filled:
                    continue
                raise Silent from None
            except OSError as error:
                raise Closed(_describe(error)) from None
            if not count:
                raise Closed("closed by the peer")
            self._require_progress(count, chunk, begin)
            filled += count
        self.received += size

    def _require_progress(self, moved: int, wanted: int, begin: float) -> None:
        # Less than was wanted is the end of the connection or a signal, and then the next call tells; or the time-out.
        if moved < wanted and time.monotonic() - begin >= self._timeout:
            raise Silent


def _describe(error: OSError) -> str:
    return error.strerror or str(error)
