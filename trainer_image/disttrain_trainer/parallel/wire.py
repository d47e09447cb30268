"""The connections between the ranks of one group, under the transport of the job: to each peer one that takes data there, and one that
brings it. Over each of them data flow one way only: no two threads ever use one connection.

A rank publishes where it listens, with a token that a peer says first, so that a connection of another round finds no way in. What says
who a peer is beyond that is its certificate.
"""

import contextlib
import queue
import secrets
import struct
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Final

from disttrain_trainer.net.transport import RECORD, Closed, Connection, Refusals, Transport, Unverified
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.operation import Operation
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import Newcomers, listen

log = logs.get_logger(__name__)

SMALL: Final = 16 << 10
"""Bytes that are copied and sent at once, with their head in one record of TLS; more are sent by a thread, from the tensor's memory."""
DIAL_SECONDS: Final = 30.0
"""Within which a connection stands, or is given up."""
_RETRY_SECONDS: Final = 0.1
STRANGERS: Final = 64
"""Connections that have not said yet who they are, beside those of the peers."""
HEAD: Final = struct.Struct("<qqQ")
"""Before each message: two numbers that say which one it is, and its bytes."""
RECORDS: Final = 1 << 23
"""Records that a connection carries before the next one takes over, with other keys: AES-GCM is made for 2^24.5 (RFC 8446, 5.5), which
is 380 GiB, and OpenSSL does not change keys by itself."""
_MOVED: Final = HEAD.pack(-1, -1, 0)
"""The last head on a connection: what follows comes on the next one."""
_HELLO: Final = struct.Struct("<16sBII")
"""Token of the rank that is dialled, use, rank of the dialler, number of the connection among those that follow one another."""


class Use(IntEnum):
    """What a connection carries."""

    COLLECTIVES = 1
    MESSAGES = 2


class Sender:
    """Sends to one peer, in the order of the calls."""

    def __init__(self, peer: int, dial: Callable[[int], Connection], *, records: int) -> None:
        """dial: makes a connection with this number; the first when it is needed, and another one after so many records."""
        self._peer = peer
        self._most, self._records, self._number = records, 0, 0
        self._dial = dial
        self._connection: Connection | None = None
        self._queue: queue.SimpleQueue[tuple[bytes, memoryview | None, Operation] | None] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"to-{peer}", daemon=True)
        self._thread.start()

    def connect(self) -> None:
        """Makes the connection now, before anything is sent. Raises OSError."""
        self._connection = self._dial(0)

    def send(self, head: bytes, view: memoryview, operation: Operation, *, now: bool = False) -> None:
        """Does not block. `view` is a part of the operation until it is sent; a small one is copied.

        now: send a small one in this thread, which is the only one that calls, and whose messages the peer takes in order. Raises
        BrokenGroup.
        """
        small = len(view) <= SMALL
        if small and now and not self._waiting and self._connection is not None:
            try:
                self._send(head + view, None)
            except OSError as error:
                raise self._lost(error) from None
            return
        operation.begin_part()
        with self._lock:
            self._waiting += 1
        self._queue.put((head + view, None, operation) if small else (head, view, operation))

    def finish(self) -> None:
        """Sends what is left, and ends the thread; blocks until then."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            head, view, operation = item
            try:
                if self._error is None:
                    self._send(head, view)
            except Exception as error:
                self._error = self._lost(error)
            with self._lock:
                self._waiting -= 1
            operation.end_part(self._error)
            del item, view, operation  # the tensor lives no longer than needed

    def _lost(self, error: Exception) -> BrokenGroup:
        return BrokenGroup(f"the connection to rank {self._peer} is lost: {error}")

    def _send(self, head: bytes, view: memoryview | None) -> None:
        if self._connection is None:
            self._connection = self._dial(0)
        elif self._records >= self._most:
            self._number, self._records = self._number + 1, 0
            last, self._connection = self._connection, self._dial(self._number)
            last.send(memoryview(_MOVED))
            last.close()
        self._connection.send(memoryview(head), more=view is not None)
        if view is not None:
            self._connection.send(view)
        self._records += 1 + -(-(len(head) if view is None else len(view)) // RECORD)


class Receiver:
    """Brings what one peer sends, for one thread. Its methods raise OSError when the connection is lost."""

    def __init__(self, take: Callable[[int], Connection]) -> None:
        """take: the peer's connection of a number; blocks until it is there."""
        self._take = take
        self._number = 0
        self._connection = take(0)
        self._head = bytearray(HEAD.size)

    def head(self) -> tuple[int, int, int]:
        """The next head; waits for it without a limit."""
        self._connection.receive_into(memoryview(self._head), patient=True)
        while self._head == _MOVED:
            self._connection.close()
            self._number += 1
            self._connection = self._take(self._number)
            self._connection.receive_into(memoryview(self._head), patient=True)
        number, kind, size = HEAD.unpack(self._head)
        return number, kind, size

    def fill(self, view: memoryview) -> None:
        """The bytes that follow a head."""
        self._connection.receive_into(view)


class Wire:
    """This rank's connections in one group. `close` may be called by any thread, at any time: it ends whatever waits."""

    def __init__(
        self,
        *,
        transport: Transport,
        host: str,
        rank: int,
        size: int,
        timeout: float,
        on_messages: Callable[[int, Receiver], None],
        records: int = RECORDS,
    ) -> None:
        """host: the address of this machine that the peers reach. timeout: seconds without a byte in the middle of a message.
        on_messages: called in a thread of its own when a peer brings messages; returns when they are over. records: after which a
        connection is followed by another one."""
        self._transport = transport
        self._rank, self._size = rank, size
        self._timeout = timeout
        self._on_messages = on_messages
        self._records = records
        self._changed = threading.Condition()
        self._closed = False
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._places: list[str] = []
        self.incoming: dict[int, Receiver] = {}
        """From each peer, for the one thread that carries out collectives."""
        self._arrived: dict[tuple[int, int, int], Connection] = {}
        """By use, peer and number."""
        self.outgoing: dict[int, Sender] = {}
        self._newcomers: Newcomers[Connection] = Newcomers(STRANGERS + 2 * size, Connection.abort)
        self._refusals = Refusals(f"rank {rank}")
        self._token = secrets.token_bytes(16)
        self._listener = listen(host, 0)
        bracketed = f"[{host}]" if ":" in host else host
        self.place = f"{bracketed}:{self._listener.getsockname()[1]} {self._token.hex()}"
        """Where the peers find this rank."""
        self._start(self._accept, "accept")

    @property
    def peers(self) -> list[int]:
        """Each other rank, the next one first, so that not all begin with the same."""
        return [(self._rank + number) % self._size for number in range(1, self._size)]

    def connect(self, places: list[str]) -> None:
        """Connects with all peers, each of which does so. Raises OSError."""
        self._places = places
        self.outgoing = {peer: self.sender(peer, Use.COLLECTIVES) for peer in self.peers}
        for sender in self.outgoing.values():
            sender.connect()
        self.incoming = {peer: self._receiver(peer, Use.COLLECTIVES) for peer in self.peers}

    def sender(self, peer: int, use: Use) -> Sender:
        """What takes data to a peer."""

        def dial(number: int) -> Connection:
            address, token = self._places[peer].split()
            connection = self._keep(self._transport.dial(address, timeout=self._timeout, within=DIAL_SECONDS))
            connection.send(memoryview(_HELLO.pack(bytes.fromhex(token), use, self._rank, number)))
            return connection

        return Sender(peer, dial, records=self._records)

    def _receiver(self, peer: int, use: Use) -> Receiver:
        def take(number: int) -> Connection:
            key = (use, peer, number)
            with self._changed:
                if not self._changed.wait_for(lambda: self._closed or key in self._arrived, self._timeout):
                    raise Closed(f"rank {peer} did not connect within {self._timeout:g} s")
                if self._closed:
                    raise Closed("the round ended")
                return self._arrived.pop(key)

        return Receiver(take)

    def close(self) -> None:
        """Ends every connection. Does not block."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for connection in self._connections:
                connection.abort()
        with contextlib.suppress(OSError):
            self._listener.shutdown(2)  # wakes accept()

    def release(self) -> None:
        """Sends what is left, then closes the sockets, and ends the threads. Blocks until then."""
        for sender in self.outgoing.values():
            sender.finish()
        self.close()
        with self._changed:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                if not self._closed:
                    time.sleep(_RETRY_SECONDS)  # too many open files
                continue
            try:
                connection = self._keep(self._transport.accept(sock, timeout=self._timeout))
            except OSError:
                sock.close()
                continue
            self._newcomers.add(connection)
            self._start(partial(self._welcome, connection, peer), "incoming")

    def _welcome(self, connection: Connection, peer: tuple[object, ...]) -> None:
        hello = bytearray(_HELLO.size)
        try:
            connection.handshake(within=DIAL_SECONDS)
            connection.receive_into(memoryview(hello))
        except OSError as error:
            if isinstance(error, Unverified):
                self._refusals.note(peer, error)
            self._forget(connection)
            return
        finally:
            self._newcomers.discard(connection)
        token, use, rank, number = _HELLO.unpack(hello)
        if not secrets.compare_digest(token, self._token) or not 0 <= rank < self._size:
            self._refusals.note(peer, Unverified("it is not of this round"))
            self._forget(connection)
            return
        with self._changed:
            self._arrived[use, rank, number] = connection
            self._changed.notify_all()
        if use == Use.MESSAGES and not number:
            with contextlib.suppress(Closed):  # the round ended meanwhile
                self._on_messages(rank, self._receiver(rank, Use.MESSAGES))

    def _start(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        with self._changed:
            self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
            thread.start()

    def _keep(self, connection: Connection) -> Connection:
        with self._changed:
            self._connections.append(connection)
            if self._closed:
                connection.abort()
                raise Closed("the round ended")
        return connection

    def _forget(self, connection: Connection) -> None:
        """A connection without a use gives its file number back now: strangers may make many of them in a round."""
        with self._changed:
            self._connections.remove(connection)
        connection.close()
