"""Sockets to listen on, for IPv4 and IPv6 alike: a pod may have addresses of one kind only; and a bound on who connects to them.

Anyone who reaches a port can open connections and say nothing, such as a scanner or a prober that died: they must not take the file numbers
that the training needs.
"""

import errno
import ipaddress
import os
import socket
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from disttrain_trainer.errors import PeerLost, WrongInput

C = TypeVar("C")

BACKLOG = 1024
SILENT_SECONDS = 3600
"""How long the kernel remembers a connection that says nothing."""


def listen(host: str | None, port: int) -> socket.socket:
    """A listening socket at this address; None: at every address of the machine. Raises OSError when the port is taken."""
    if host is not None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        except OSError as error:
            # The kernel knows IPv6, but no interface has it.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port), backlog=BACKLOG)


def own_port(what: str, host: str | None, port: int) -> socket.socket:
    """A listening socket at a port of ours; what: listens there. Raises PeerLost, which names the port: who has it may be gone soon."""
    try:
        return listen(host, port)
    except OSError as error:
        remedy = "; another process of this pod or machine has the port: give that another one" * (
            error.errno == errno.EADDRINUSE
        )
        raise PeerLost(
            f"port {port}", f"{what} cannot listen: {os.strerror(error.errno) if error.errno else error}{remedy}"
        ) from None


def defer_silent(listener: socket.socket) -> None:
    """Has the kernel accept a connection only when its peer has said something, for a server that we do not write: torch's store.

    A connection that stays silent takes no file number. Linux only (tcp(7)); elsewhere this does nothing.
    """
    if hasattr(socket, "TCP_DEFER_ACCEPT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SILENT_SECONDS)


class Newcomers(Generic[C]):
    """Connections that have not said yet who they are: at most `limit`. Beyond it the oldest is closed, since a peer speaks at once.

    close: ends a connection; what serves it then calls `discard`. Any thread may call.
    """

    def __init__(self, limit: int, close: Callable[[C], object]) -> None:
        self._limit = limit
        self._close = close
        self._lock = threading.Lock()
        self._waiting: dict[C, float] = {}

    def add(self, connection: C, now: float = 0.0) -> None:
        """A new connection, at a time of any clock."""
        with self._lock:
            self._waiting[connection] = now
            over = len(self._waiting) > self._limit
        if over:
            self.close_oldest()

    def discard(self, connection: C) -> None:
        """It said who it is, or has ended."""
        with self._lock:
            self._waiting.pop(connection, None)

    def close_oldest(self) -> None:
        """Makes room for another one."""
        with self._lock:
            oldest = next(iter(self._waiting), None)
            if oldest is not None:
                del self._waiting[oldest]
        if oldest is not None:
            self._close(oldest)

    def close_older(self, than: float) -> None:
        """Ends those that came before a moment."""
        with self._lock:
            old = [connection for connection, came in self._waiting.items() if came < than]
            for connection in old:
                del self._waiting[connection]
        for connection in old:
            self._close(connection)


def split_address(address: str) -> tuple[str, int]:
    """host and port of "host:port"; IPv6 hosts stand in brackets. Raises WrongInput."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise WrongInput(f"{address!r} is no address; expected host:port")
    return host.strip("[]"), int(port)


def listening_host(host: str) -> str | None:
    """Loopback stays loopback; any other name, such as a pod's, means all interfaces: None."""
    try:
        return host if ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return "127.0.0.1" if host == "localhost" else None
