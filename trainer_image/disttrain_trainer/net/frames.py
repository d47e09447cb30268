"""The binary protocol between workers and parameter servers: frames on a connection (transport.py).

A frame is a header of 72 bytes (`Header`, little-endian, with a CRC of itself) and `nbytes` of payload: raw parameters or gradients
in the order of the layout, JSON for HELLO, text for the reason of REFUSED and WAIT. A PUSH whose gradient is one of some parameters only
begins with `runs` runs, each of RUN: which elements of the shard had a gradient. Payload goes from and into tensor memory without a copy.

    worker                          server
    HELLO identity, layout      ->  WELCOME version, whether initialized     once, first; or REFUSED, and the connection ends
    SHARE strips                ->  DONE                                     of a rank of a group: what it sends and gets of the vectors
    INIT values                 ->  DONE
    JOIN clock                  ->  DONE clock
    LEAVE                       ->  DONE
    PUSH part, gradient        ->  DONE version, whether it came late
    PULL clock, step, patience  ->  VALUES version, parameters; or, with a patience, that the version is not there yet
    PUSH_PULL part, gradient   ->  VALUES version, parameters               push and pull in one round trip
    KEEP step, buffers         ->  DONE                                     shard 0, Sync: what part 0 of a step left
    FETCH step                 ->  KEPT buffers                             shard 0, Sync: the buffers of a step
    RENEW                      ->  DONE                                     under TLS: both ends change the keys
    BYE                         ->                                           the end, on purpose

A server that has a copy of its shard on another one speaks there, instead of HELLO and what follows (docs/design/0011):

    primary                         copy
    FOLLOW identity, snapshot   ->                                           once, first; or REFUSED
    INIT parameters and state   ->
    KEEP step, buffers          ->                                           of each step that it has, as many as FOLLOW says; then DONE
    UPDATE parts, sum           ->  DONE                                     the copy has all of it
    KEEP step, buffers          ->  DONE
    COMPLETE                    ->  DONE                                     from here on the copy may be promoted
    RENEW                       ->  DONE

One request at a time. While a request waits for others, the server sends WAIT with the reason, several times within the worker's
time-out: a silent server counts as lost. No input is trusted: sizes are known before a payload is read, nothing is unpickled, and a frame
that does not fit is a `ProtocolError`, which costs its sender the connection and has no other effect.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from disttrain_trainer.net.connection import Connection

MAGIC = b"DTPS"
PROTOCOL = 2
JOINED_BYTES = 16 << 10
"""Payloads up to this are copied behind their head, and sent by one system call."""
MAX_TEXT = 64 * 1024
"""Bytes of a HELLO or of a text."""
MAX_BUFFERS = 1 << 32
"""Bytes of the buffers of a step."""
MAX_RUNS = 1 << 20
RUN = struct.Struct("<IQQ")
"""Number of the vector, first element, element behind the last, counted in the shard."""
SCALES = struct.Struct("<dd")
"""At the head of an UPDATE with a sum: what it and the learning rate are multiplied by."""
MAX_SHARE = 1 << 24
"""Bytes of the text of SHARE: a strip or three for each parameter."""
MAX_SNAPSHOT_TEXT = 1 << 24
"""Bytes of the text of FOLLOW: which elements missed which steps is in it."""

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
    RENEW = 11
    FOLLOW = 12
    UPDATE = 13
    COMPLETE = 14
    SHARE = 15
    WELCOME = 65
    DONE = 66
    VALUES = 67
    WAIT = 68
    REFUSED = 69
    KEPT = 70


OWN_WEIGHT, PARTIAL, BFLOAT16, SPARSE, NORM = 1, 2, 4, 8, 16
"""Bits of the code of PUSH: the loss names its weight; only some parameters had a gradient; the gradient is rounded to bfloat16, or its
largest elements alone are sent (parameter_server/compression.py); `weight` is the norm of what is sent to all shards together."""
PATIENT = 1
"""The code of PULL: answer within `weight` seconds, with VALUES of NOT_YET where the version is not there."""
NOT_YET = 1
"""The code of VALUES without a payload."""
LATE = 1
"""The code of DONE after PUSH: the part counted already."""


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
    PUSH: bits, OWN_WEIGHT, PARTIAL, BFLOAT16, SPARSE and NORM. PULL: PATIENT or 0. VALUES: NOT_YET or 0. DONE after PUSH: LATE or 0.
    KEPT: 0 when the buffers of the step are gone."""
    samples: int = 0
    """PUSH: samples of the part; 0 means no gradient. UPDATE: the number of parts."""
    batch_samples: int = 0
    """PUSH: samples of the part's step."""
    index: int = 0
    """PUSH: number of the part. UPDATE: of the first one."""
    step: int = -1
    """PULL: the step whose version is wanted, -1 for the current one. KEEP, FETCH: the step."""
    clock: int = 0
    """The worker's iteration."""
    version: int = 0
    """PUSH: version of the parameters that the gradient is of. From the server: version of the shard."""
    nbytes: int = 0
    """Bytes of payload that follow."""
    weight: float = 0.0
    """PUSH with OWN_WEIGHT: what the loss says that its mean weighs; with NORM, as UPDATE: that of the gradient.
    PULL with PATIENT: seconds."""
    runs: int = 0
    """PUSH and UPDATE with PARTIAL: runs before the gradient."""

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
    """Frames on one end of a connection; for one thread at a time. Calls raise Silent and Closed, as the connection's do."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._head = bytearray(SIZE)
        self.received = 0
        """Bytes so far."""
        self.sent = 0
        self.abort = connection.abort
        self.stop_reading = connection.stop_reading
        self.close = connection.close
        self.fileno = connection.fileno

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """Sends a frame; blocks until the kernel has it. header.nbytes: the size of the payload."""
        head = header.encode()
        if header.nbytes <= JOINED_BYTES:
            self._connection.send(memoryview(b"".join((head, *payload))))
        else:
            self._connection.send(memoryview(head), more=True)
            for view in payload:
                self._connection.send(view)
        self.sent += SIZE + header.nbytes

    def send_text(self, header: Header, text: str) -> None:
        """Sends a frame with this text, cut to what a frame may hold; `header.nbytes` is set here."""
        data = text.encode()[:MAX_TEXT]
        self.send(Header(op=header.op, code=header.code, version=header.version, nbytes=len(data)), [memoryview(data)])

    def receive(self, *, patient: bool = False) -> Header:
        """The next header, or ProtocolError. patient: waits for its first byte without a limit."""
        self._fill(memoryview(self._head), patient=patient)
        return Header.decode(self._head)

    def receive_into(self, header: Header, views: Sequence[memoryview]) -> None:
        """Reads the payload of this header into the views, which are as long together, or raises ProtocolError."""
        expected = sum(len(view) for view in views)
        if header.nbytes != expected:
            raise ProtocolError(
                f"{header.op.name} has {header.nbytes} bytes of payload, not the {expected} of this shard"
            )
        for view in views:
            self._fill(view)

    def receive_some_of(self, view: memoryview) -> None:
        """Reads the next bytes of a payload, of which the caller knows that so many are left."""
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

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its end. For the thread that uses the connection, while it reads nothing."""
        return self._connection.hung_up

    @property
    def spent(self) -> bool:
        """Whether the connection wants other keys before the next request."""
        return self._connection.spent

    def renew(self, *, within: float) -> None:
        """Changes the keys, after RENEW and its answer."""
        self._connection.renew(within=within)

    def _fill(self, view: memoryview, *, patient: bool = False) -> None:
        self._connection.receive_into(view, patient=patient)
        self.received += len(view)
