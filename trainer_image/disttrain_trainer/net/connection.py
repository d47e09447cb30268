"""One end of a connection between two processes of a job, and the plain one. That under TLS: tls.py.

Two implementations, since one cannot wrap the other: under TLS the kernel's time-outs (SO_RCVTIMEO) are not honoured, and the flags with
which the plain one saves system calls (MSG_WAITALL, MSG_MORE) are refused.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from typing import Final

CHUNK: Final = 4 << 20
"""Bytes that must move within the time-out."""
LOCAL_BUFFER: Final = 256 << 10
"""Bytes of a socket's buffers when both ends are on one machine. Left alone, the kernel lets them grow to megabytes, for networks with
a delay; here a small one keeps what is in flight in the processor's cache, which doubles the throughput."""
UNIX_BUFFER: Final = 4 << 20
"""Bytes of a Unix socket's buffers, where the system allows it: as many as are sent at a time, so that a thread seldom waits."""


class Silent(TimeoutError):
    """The peer has neither sent nor taken anything for the time-out."""

    def __init__(self) -> None:
        super().__init__("silent")


class Closed(ConnectionError):
    """The peer has closed the connection, or its end was lost."""


class Unverified(Closed):
    """One end does not accept the certificate of the other, or has none. The text says why, of the peer: "it has no certificate"."""


class Ended(Closed):
    """The peer has closed its end."""

    def __init__(self) -> None:
        super().__init__("closed by the peer")


class Connection(ABC):
    """One end of a connection. One thread may read while another one writes; `abort`, `stop_reading` and `close` may come from any.

    timeout: seconds; a call raises Silent when the peer has not moved the next CHUNK for so long. A lost connection raises Closed,
    and so does one that another thread has aborted.
    """

    def __init__(self, sock: socket.socket, *, timeout: float) -> None:
        _set_up(sock)
        self._socket = sock
        self._timeout = timeout
        self._ending = threading.Condition(threading.Lock())
        self._in_use = _Use(self._ending)
        """Around each call that reads or writes."""

    @abstractmethod
    def handshake(self, *, within: float) -> None:
        """Verifies the peer, before anything else is sent or received; in so many seconds. Raises Unverified, Silent, Closed."""

    @property
    def spent(self) -> bool:
        """Whether its keys have encrypted so much that `renew` is due."""
        return False

    def renew(self, *, within: float) -> None:
        """Verifies the peer again, and goes on with other keys. Both ends call it at one place of what they say to one another, while no
        other thread reads or writes. Raises as `handshake`."""
        return

    @abstractmethod
    def send(self, view: memoryview, *, more: bool = False) -> None:
        """Sends all of it; blocks until the kernel has it. more: the next call follows at once. Raises Silent, Closed."""

    @abstractmethod
    def receive_into(self, view: memoryview, *, patient: bool = False) -> None:
        """Fills the view. Raises Silent, Closed.

        patient: waits for the first byte without a limit, since a worker that computes is silent.
        """

    @abstractmethod
    def receive_some(self, most: int) -> bytes:
        """What has come, at least one byte and at most so many; b"" at the end. Raises Silent, Closed."""

    def abort(self) -> None:
        """Ends the connection; a thread that uses it gets Closed. Any thread may call this."""
        self._shut(socket.SHUT_RDWR)

    def stop_reading(self) -> None:
        """A thread that reads gets Closed, but may still send a last frame. Any thread may call this."""
        self._shut(socket.SHUT_RD)

    def _shut(self, how: int) -> None:
        with self._ending:
            self._shut_now(how)

    def _shut_now(self, how: int) -> None:
        with contextlib.suppress(OSError):
            # Not the method of ssl's socket: after that one it would go on without TLS.
            socket.socket.shutdown(self._socket, how)

    def fileno(self) -> int:
        """Of the socket, to wait for what comes on several connections."""
        return self._socket.fileno()

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its end. For the thread that uses the connection, while it reads nothing."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Closes the socket. A thread that reads or writes gets Closed, and is waited for. Any thread may call this, several times."""
        with self._ending:
            use = self._in_use
            use.closed = True
            if use.users:
                self._shut_now(socket.SHUT_RDWR)
                self._ending.wait_for(lambda: not use.users)
            self._socket.close()


class _Use:
    """A context of every thread that reads or writes. No generator: a small model's step has several of these."""

    def __init__(self, ending: threading.Condition) -> None:
        self._ending = ending
        self.users = 0
        """Threads inside. The file number is given back when there is none: another file may get it at once."""
        self.closed = False

    def __enter__(self) -> None:
        with self._ending:
            if self.closed:
                raise Closed("this side closed the connection")
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self._ending:
            self.users -= 1
            if self.closed:
                self._ending.notify_all()


class PlainConnection(Connection):
    def __init__(self, sock: socket.socket, *, timeout: float) -> None:
        # Time-outs of the kernel: a socket with a time-out of Python is non-blocking, and costs a poll() with every call.
        sock.settimeout(None)
        interval = struct.pack("@ll", int(timeout), max(1, int(timeout % 1 * 1e6)))  # 0 would be for ever
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
        super().__init__(sock, timeout=timeout)

    def handshake(self, *, within: float) -> None:
        pass

    def send(self, view: memoryview, *, more: bool = False) -> None:
        sent, size = 0, len(view)
        with self._in_use:
            while sent < size:
                chunk = view[sent : sent + CHUNK]
                begin = time.monotonic()
                try:
                    count = self._socket.send(chunk, socket.MSG_MORE if more else 0)
                except BlockingIOError:
                    raise Silent from None
                except OSError as error:
                    raise Closed(describe(error)) from None
                self._require_progress(count, len(chunk), begin)
                sent += count

    def receive_into(self, view: memoryview, *, patient: bool = False) -> None:
        filled, size = 0, len(view)
        with self._in_use:
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
                    raise Closed(describe(error)) from None
                if not count:
                    raise Closed("closed by the peer")
                self._require_progress(count, chunk, begin)
                filled += count

    def receive_some(self, most: int) -> bytes:
        try:
            with self._in_use:
                return self._socket.recv(most)
        except BlockingIOError:
            raise Silent from None
        except OSError as error:
            raise Closed(describe(error)) from None

    def _require_progress(self, moved: int, wanted: int, begin: float) -> None:
        # Less than was wanted is the end of the connection or a signal, and then the next call tells; or the time-out.
        if moved < wanted and time.monotonic() - begin >= self._timeout:
            raise Silent


def _set_up(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        _set_buffers(sock, UNIX_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A machine that vanishes says nothing; a worker that computes does not either. The kernel asks.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    if sock.getsockname()[0] == sock.getpeername()[0]:
        _set_buffers(sock, LOCAL_BUFFER)


def _set_buffers(sock: socket.socket, size: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def describe(error: Exception) -> str:
    """An error of the system, in words."""
    return getattr(error, "strerror", None) or str(error)
