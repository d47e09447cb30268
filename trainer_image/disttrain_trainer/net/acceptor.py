"""Accepts connections at a port, and verifies who is there. Each is served by a thread of its own.

Not here: the servers of asyncio (control_server.py, rendezvous.py), which one thread serves.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from disttrain_trainer.net.connection import Connection, Unverified
from disttrain_trainer.net.local_sockets import peer_of
from disttrain_trainer.net.transport import Refusals, Transport
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import Newcomers

log = logs.get_logger(__name__)

RETRY_SECONDS: Final = 0.1
"""Before the next try when no connection can be accepted, as when there are too many open files."""

PeerAddress = tuple[object, ...]
"""Address and port, as the socket has them."""


class Acceptor:
    """The connections of one port, until `close`. Any thread may call its methods."""

    def __init__(
        self,
        listener: socket.socket,
        serve: Callable[[Connection, PeerAddress], bool],
        *,
        who: str,
        transport: Transport,
        timeout: float,
        handshake_seconds: float,
        strangers: int,
        beside: socket.socket | None = None,
    ) -> None:
        """The listener is closed by this object. `start` comes next.

        beside: listens, too, at a Unix socket (local_sockets.py).

        serve: called with each verified connection, in its thread; calls `known` when the peer has said who it is. The connection is
            closed after it, unless it returns True. What it raises as OSError ends the connection alone.
        who: for messages. timeout: seconds of silence on a connection. strangers: the most connections that are not `known`.
        """
        self._serve, self._who = serve, who
        self._transport, self._timeout, self._handshake_seconds = transport, timeout, handshake_seconds
        self._newcomers: Newcomers[Connection] = Newcomers(strangers, Connection.abort)
        self._refusals = Refusals(who)
        self._lock = threading.Lock()
        self._served: dict[threading.Thread, Connection] = {}
        self._closed = False
        self._listeners = [listener] if beside is None else [listener, beside]
        self._accepting = [
            threading.Thread(target=self._accept, args=(each,), name=f"accept: {who}", daemon=True)
            for each in self._listeners
        ]

    def start(self) -> None:
        """Begins to accept."""
        for thread in self._accepting:
            thread.start()

    def known(self, connection: Connection) -> None:
        """The peer has said who it is."""
        self._newcomers.discard(connection)

    def refuse(self, peer: PeerAddress, why: str) -> None:
        """Logs once that a peer is not let in."""
        self._refusals.note(peer, Unverified(why))

    def close(self) -> None:
        """Accepts no more, and ends the connections that are being served. Does not block."""
        with self._lock:
            self._closed = True
            for connection in self._served.values():
                connection.abort()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not

    def join(self) -> None:
        """Blocks until no thread of it is left, after `close`."""
        for thread in self._accepting:
            thread.join()
        with self._lock:
            served = list(self._served)
        for thread in served:
            thread.join()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while not self._closed:
                try:
                    sock, peer = listener.accept()
                except OSError as error:
                    if not self._closed:
                        log.warning("%s cannot accept a connection: %s", self._who, error)
                        time.sleep(RETRY_SECONDS)
                    continue
                try:
                    if listener.family == socket.AF_UNIX:
                        peer = peer_of(sock)
                    connection = self._transport.accept(sock, timeout=self._timeout)
                except OSError:  # it was closed again already
                    sock.close()
                    continue
                self._begin(connection, peer)

    def _begin(self, connection: Connection, peer: PeerAddress) -> None:
        thread = threading.Thread(
            target=self._welcome, args=(connection, peer), name=f"{self._who}: {peer[1]}", daemon=True
        )
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._served[thread] = connection
        self._newcomers.add(connection)
        thread.start()

    def _welcome(self, connection: Connection, peer: PeerAddress) -> None:
        kept = False
        try:
            connection.handshake(within=self._handshake_seconds)
            kept = self._serve(connection, peer)
        except Unverified as error:
            self._refusals.note(peer, error)
        except OSError:
            pass  # the peer is gone, or silent
        finally:
            self._newcomers.discard(connection)
            with self._lock:
                del self._served[threading.current_thread()]
            if not kept:
                connection.close()
