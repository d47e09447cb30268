"""How workers read packed data from one another's disks (data.replication): the two ends of a connection.

A reader sends HELLO, a length in 4 bytes and JSON [job, attempt, protocol], and gets one byte, 1 for yes. Then requests of
one form, (operation, split, partition, offset, length), each answered by a length in 4 bytes and as many bytes:

| operation | answer |
|---|---|
| READ | the bytes of a partition as they are stored; none where the copy is not there |
| INDEX | bytes of index.json from the offset, fewer at its end |
| BROKEN | none: the reader found the copy broken, and its owner looks at it |

A peer sees no more than the store shows: what is encrypted stays so.
"""

import json
import struct
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from disttrain.api.runtime import JobConfig
from disttrain_trainer.net.acceptor import Acceptor, PeerAddress
from disttrain_trainer.net.connection import Closed, Connection, Silent
from disttrain_trainer.net.transport import Transport
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import own_port

log = logs.get_logger(__name__)

READ: Final = 0
INDEX: Final = 1
BROKEN: Final = 2
PIECE: Final = 4 << 20
"""Most bytes of an answer."""
SPLITS: Final = ("train", "test")
_PROTOCOL: Final = 2
_LENGTH: Final = struct.Struct("<I")
_REQUEST: Final = struct.Struct("<BBIQI")
_YES: Final = b"\x01"
_MOST_HELLO: Final = 4096
_STRANGERS: Final = 64
DIAL_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 5.0
"""How long a peer is waited for; a reader asks elsewhere long before."""
SLOW_SECONDS: Final = 0.25
"""A peer that is silent for so long is slow, until it answers."""
AWAY_SECONDS: Final = 0.5
"""Before a peer that could not be reached is asked again; twice as long each time, up to a minute."""
_MOST_AWAY_SECONDS: Final = 60.0
IDLE_SECONDS: Final = 3600.0
"""How long a reader may ask for nothing."""


class Request(NamedTuple):
    """What a reader asks for."""

    operation: int
    split: int
    """Its number in SPLITS."""
    partition: int
    offset: int
    length: int
    """Of the answer, in bytes."""


def hello_of(config: JobConfig) -> bytes:
    """The first message of a reader."""
    text = json.dumps({"job": config.uid, "attempt": config.attempt, "protocol": _PROTOCOL}, sort_keys=True)
    return _LENGTH.pack(len(text)) + text.encode()


class Peer:
    """Another worker. Safe to share between threads."""

    def __init__(self, name: str, address: str, transport: Transport, hello: bytes) -> None:
        """name: for messages, such as worker-1."""
        self.name = name
        self._address, self._transport, self._hello = address, transport, hello
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._away, self._away_until = AWAY_SECONDS, 0.0
        self._silent, self._asked_at = False, 0.0

    @property
    def slow(self) -> bool:
        """It has not answered its last request, or not for a while."""
        asked_at = self._asked_at
        return self._silent or (asked_at > 0 and time.monotonic() - asked_at > SLOW_SECONDS)

    def read(self, split: str, partition: int, offset: int, length: int) -> bytes | None:
        """Bytes of its copy; None where it has none, or cannot be reached."""
        found = bytearray()
        while len(found) < length:
            piece = min(PIECE, length - len(found))
            answer = self._ask(Request(READ, SPLITS.index(split), partition, offset + len(found), piece))
            if answer is None or len(answer) < piece:
                return None
            found += answer
        return bytes(found)

    def index(self, split: str) -> bytes | None:
        """Its index of a split; None where it has none, or cannot be reached."""
        found = bytearray()
        while True:
            answer = self._ask(Request(INDEX, SPLITS.index(split), 0, len(found), PIECE))
            if answer is None:
                return None
            found += answer
            if len(answer) < PIECE:
                return bytes(found) or None

    def report_broken(self, split: str, partition: int) -> None:
        """Has it look at its copy."""
        self._ask(Request(BROKEN, SPLITS.index(split), partition, 0, 0))

    def look_again(self) -> None:
        """Asks a slow one for nothing, so that it is read from again once it answers. Blocks as long as it is silent."""
        if self.slow:
            self._ask(Request(INDEX, 0, 0, 0, 0))

    def close(self) -> None:
        """Ends the connection; it is made again when it is needed."""
        with self._lock:
            self._hang_up()

    def _ask(self, request: Request) -> bytes | None:
        with self._lock:
            if time.monotonic() < self._away_until:
                return None
            self._asked_at = time.monotonic()
            try:
                answer = self._answer(request)
            except (Closed, Silent, OSError) as error:
                log.info("no copy is read from %s for %.1f s: %s", self.name, self._away, error)
                self._away_until = time.monotonic() + self._away
                self._away = min(2 * self._away, _MOST_AWAY_SECONDS)
                self._silent = True
                self._hang_up()
                return None
            finally:
                self._asked_at = 0.0
            self._away, self._silent = AWAY_SECONDS, False
            return answer

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _answer(self, request: Request) -> bytes:
        if self._connection is not None and self._connection.spent:
            self._hang_up()
        connection = self._connection
        if connection is None:
            connection = self._transport.dial(self._address, timeout=SILENT_SECONDS, within=DIAL_SECONDS)
            self._connection = connection
            connection.send(memoryview(self._hello))
            if bytes(_received(connection, len(_YES))) != _YES:
                raise Closed("it is of another job or attempt")
        connection.send(memoryview(_REQUEST.pack(*request)))
        (count,) = _LENGTH.unpack(_received(connection, _LENGTH.size))
        if count > request.length:
            raise Closed("it does not speak this protocol")
        return bytes(_received(connection, count))


def _received(connection: Connection, length: int) -> bytearray:
    data = bytearray(length)
    if length:
        connection.receive_into(memoryview(data))
    return data


class CopyServer:
    """Answers the other workers, in threads."""

    def __init__(
        self,
        answer: Callable[[Request], bytes | None],
        *,
        host: str | None,
        port: int,
        transport: Transport,
        hello: bytes,
    ) -> None:
        """answer: the bytes that are asked for; called by several threads. Raises PeerLost when the port is taken."""
        self._answer, self._transport, self._hello = answer, transport, hello
        self._acceptor = Acceptor(
            own_port("the copies of the data", host, port),
            self._serve,
            who="the copies of the data",
            transport=transport,
            timeout=IDLE_SECONDS,
            handshake_seconds=SILENT_SECONDS,
            strangers=_STRANGERS,
        )
        self._acceptor.start()

    def close(self) -> None:
        """Ends all connections, and accepts no more."""
        self._acceptor.close()
        self._acceptor.join()

    def _serve(self, connection: Connection, peer: PeerAddress) -> bool:
        (length,) = _LENGTH.unpack(_received(connection, _LENGTH.size))
        if length > _MOST_HELLO or bytes(_received(connection, length)) != self._hello[_LENGTH.size :]:
            self._acceptor.refuse(peer, "it is of another job or attempt")
            return False
        self._acceptor.known(connection)
        connection.send(memoryview(_YES))
        while True:
            request = Request(*_REQUEST.unpack(_received(connection, _REQUEST.size)))
            known = request.length <= PIECE and request.split < len(SPLITS)
            data = (self._answer(request) if known else None) or b""
            connection.send(memoryview(_LENGTH.pack(len(data)) + data))
