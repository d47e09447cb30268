"""Unix sockets beside the ports of loopback, for processes of one machine: the same bytes for about two thirds of the processor's time.

A server that listens at a port of loopback listens at an abstract name, too, which holds that address. Who dials the address tries the name
first. Abstract names and loopback are those of one network namespace, so that both lead to the same process; a process that was killed
leaves neither. A peer of another user is not believed: anybody of the machine may take a name.
"""

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from typing import Final

from disttrain_trainer.runtime.sockets import BACKLOG, split_address

_CREDENTIALS: Final = struct.Struct("3i")
"""Process, user and group of a peer (unix(7))."""


def listen_beside(listener: socket.socket) -> socket.socket | None:
    """A listening Unix socket beside this one. None where it does not listen at loopback, the system has no abstract names (Linux has), or
    another process has the name: then there is the port."""
    name = _name(*listener.getsockname()[:2])
    if name is None:
        return None
    beside = socket.socket(socket.AF_UNIX)
    try:
        beside.bind(name)
        beside.listen(BACKLOG)
    except OSError:
        beside.close()
        return None
    return beside


def connect_beside(address: str) -> socket.socket | None:
    """A connected Unix socket of the process that listens at host:port. None where `listen_beside` made none."""
    name = _name(*split_address(address))
    if name is None:
        return None
    sock = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        sock.setblocking(False)  # a queue that is full is an error at once
        sock.connect(name)
        if _credentials(sock)[1] == os.getuid():
            return sock
    sock.close()
    return None


def peer_of(sock: socket.socket) -> tuple[object, ...]:
    """What stands in place of address and port of an accepted connection's peer, for messages."""
    return "process", _credentials(sock)[0]


def _name(host: str, port: int) -> bytes | None:
    try:
        is_local = sys.platform == "linux" and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return None
    return f"\0disttrain/[{host}]:{port}".encode() if is_local else None


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    return _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
