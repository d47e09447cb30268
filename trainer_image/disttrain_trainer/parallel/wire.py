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
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from disttrain_trainer.net.acceptor import Acceptor, PeerAddress
from disttrain_trainer.net.connection import Closed, Connection
from disttrain_trainer.net.transport import Interrupt, Transport
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.operation import Operation
from disttrain_trainer.runtime.sockets import listen

SMALL: Final = 16 << 10
"""Bytes that are copied and sent at once, with their head in one record of TLS; more are sent by a thread, from the tensor's memory."""
DIAL_SECONDS: Final = 30.0
"""Within which a connection stands, or is given up."""
STRANGERS: Final = 64
"""Connections that have not said yet who they are, beside those of the peers."""
HEAD: Final = struct.Struct("<qqQ")
"""Before each message: two numbers that say which one it is, and its bytes."""
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

    def __init__(self, peer: int, dial: Callable[[int], Connection]) -> None:
        """dial: makes a connection with this number; the first when it is needed, and another one when the keys of that are spent."""
        self._peer = peer
        self._number = 0
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
        elif self._connection.spent:
            self._number += 1
            last, self._connection = self._connection, self._dial(self._number)
            last.send(memoryview(_MOVED))
            last.close()
        self._connection.send(memoryview(head), more=view is not None)
        if view is not None:
            self._connection.send(view)


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
    ) -> None:
        """host: the address of this machine that the peers reach. timeout: seconds without a byte in the middle of a message.
        on_messages: called in a thread of its own when a peer brings messages; returns when they are over."""
        self._transport = transport
        self._rank, self._size = rank, size
        self._timeout = timeout
        self._on_messages = on_messages
        self._interrupt = Interrupt()
        self._changed = threading.Condition()
        self._closed = False
        self._connections: list[Connection] = []
        self._places: list[str] = []
        self.incoming: dict[int, Receiver] = {}
        """From each peer, for the one thread that carries out collectives."""
        self._arrived: dict[tuple[int, int, int], Connection] = {}
        """By use, peer and number."""
        self.outgoing: dict[int, Sender] = {}
        self._token = secrets.token_bytes(16)
        listener = listen(host, 0)
        bracketed = f"[{host}]" if ":" in host else host
        self.place = f"{bracketed}:{listener.getsockname()[1]} {self._token.hex()}"
        """Where the peers find this rank."""
        self._acceptor = Acceptor(
            listener,
            self._welcome,
            who=f"rank {rank}",
            transport=transport,
            timeout=timeout,
            handshake_seconds=DIAL_SECONDS,
            strangers=STRANGERS + 2 * size,
        )
        self._acceptor.start()

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
            dialled = self._transport.dial(
                address, timeout=self._timeout, within=DIAL_SECONDS, interrupt=self._interrupt
            )
            connection = self._keep(dialled)
            connection.send(memoryview(_HELLO.pack(bytes.fromhex(token), use, self._rank, number)))
            return connection

        return Sender(peer, dial)

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
        self._interrupt.end()
        self._acceptor.close()

    def release(self) -> None:
        """Sends what is left, then closes the sockets, and ends the threads. Blocks until then."""
        for sender in self.outgoing.values():
            sender.finish()
        self.close()
        self._acceptor.join()
        for connection in self._connections:
            connection.close()

    def _welcome(self, connection: Connection, peer: PeerAddress) -> bool:
        hello = bytearray(_HELLO.size)
        connection.receive_into(memoryview(hello))
        token, use, rank, number = _HELLO.unpack(hello)
        if not secrets.compare_digest(token, self._token) or not 0 <= rank < self._size:
            self._acceptor.refuse(peer, "it is not of this round")
            return False
        self._acceptor.known(connection)
        self._keep(connection)
        with self._changed:
            self._arrived[use, rank, number] = connection
            self._changed.notify_all()
        if use == Use.MESSAGES and not number:
            with contextlib.suppress(Closed):  # the round ended meanwhile
                self._on_messages(rank, self._receiver(rank, Use.MESSAGES))
        return True

    def _keep(self, connection: Connection) -> Connection:
        with self._changed:
            self._connections.append(connection)
            if self._closed:
                connection.abort()
                raise Closed("the round ended")
        return connection
