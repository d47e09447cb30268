"""How bytes travel between the processes of a job: plain, or under TLS 1.3 with both ends verified (network.tls). One interface.

Two transports, since one cannot wrap the other: under TLS the kernel's time-outs (SO_RCVTIMEO) are not honoured, and the flags with which
the plain one saves system calls (MSG_WAITALL, MSG_MORE) are refused.

A certificate is that of a job's attempt, and every process of the attempt has the same one: who a peer is, its role and number, it says
itself in its HELLO. The certificate authority signed nothing else, and its key is gone. A dialer verifies the job's name, whatever address
it dials. An expired certificate is refused.
"""

import asyncio
import contextlib
import math
import select
import socket
import ssl
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from disttrain.api.policies import Tls
from disttrain.api.runtime import JobConfig
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import split_address

log = logs.get_logger(__name__)

T = TypeVar("T")

CHUNK: Final = 4 << 20
"""Bytes that must move within the time-out."""
LOCAL_BUFFER: Final = 256 << 10
"""Bytes of a socket's buffers when both ends are on one machine. Left alone, the kernel lets them grow to megabytes, for networks with
a delay; here a small one keeps what is in flight in the processor's cache, which doubles the throughput."""
RECORD: Final = 16 << 10
"""Most bytes of a TLS record (RFC 8446, 5.1)."""
MOST_REFUSALS_LOGGED: Final = 256


class Silent(TimeoutError):
    """The peer has neither sent nor taken anything for the time-out."""

    def __init__(self) -> None:
        super().__init__("silent")


class Closed(ConnectionError):
    """The peer has closed the connection, or its end was lost."""


class Unverified(Closed):
    """One end does not accept the certificate of the other, or has none. The text says why, of the peer: "it has no certificate"."""


class Connection(ABC):
    """One end of a connection. One thread may read while another one writes; `abort` and `stop_reading` may come from any.

    timeout: seconds; a call raises Silent when the peer has not moved the next CHUNK for so long. A lost connection raises Closed,
    and so does one that another thread has aborted.
    """

    def __init__(self, sock: socket.socket, *, timeout: float) -> None:
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

    @abstractmethod
    def handshake(self, *, within: float) -> None:
        """Verifies the peer, before anything else is sent or received; in so many seconds. Raises Unverified, Silent, Closed."""

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
        with contextlib.suppress(OSError):
            # Not the method of ssl's socket: after that one it would go on without TLS.
            socket.socket.shutdown(self._socket, how)

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its end. For the thread that uses the connection, while it reads nothing."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Closes the socket. For the thread that uses the connection, which must not use it afterwards."""
        self._socket.close()


class _PlainConnection(Connection):
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
        while sent < size:
            chunk = view[sent : sent + CHUNK]
            begin = time.monotonic()
            try:
                count = self._socket.send(chunk, socket.MSG_MORE if more else 0)
            except BlockingIOError:
                raise Silent from None
            except OSError as error:
                raise Closed(_describe(error)) from None
            self._require_progress(count, len(chunk), begin)
            sent += count

    def receive_into(self, view: memoryview, *, patient: bool = False) -> None:
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

    def receive_some(self, most: int) -> bytes:
        try:
            return self._socket.recv(most)
        except BlockingIOError:
            raise Silent from None
        except OSError as error:
            raise Closed(_describe(error)) from None

    def _require_progress(self, moved: int, wanted: int, begin: float) -> None:
        # Less than was wanted is the end of the connection or a signal, and then the next call tells; or the time-out.
        if moved < wanted and time.monotonic() - begin >= self._timeout:
            raise Silent


class _TlsConnection(Connection):
    """Non-blocking, with poll() beside it: OpenSSL lets only one thread at a time into a connection, and no thread may keep it while it
    waits."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, name: str | None, timeout: float) -> None:
        """name: that the peer's certificate must have, for the end that dials; None at the other end."""
        sock.setblocking(False)
        super().__init__(sock, timeout=timeout)
        try:
            self._tls = context.wrap_socket(
                sock,
                server_side=name is None,
                server_hostname=name,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
        except OSError as error:
            raise Closed(_describe(error)) from None
        self._socket = self._tls
        self._inside = threading.Lock()
        self._deaf = False

    def handshake(self, *, within: float) -> None:
        try:
            self._step(self._tls.do_handshake, time.monotonic() + within)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            raise _Ended from None
        except ssl.SSLError as error:
            raise Unverified(_why(error)) from None

    def send(self, view: memoryview, *, more: bool = False) -> None:
        sent, size = 0, len(view)
        while sent < size:
            chunk = view[sent : sent + CHUNK]
            try:
                # Tried again with the same bytes as long as the kernel takes less than a record of them.
                sent += self._step(lambda chunk=chunk: self._tls.send(chunk), time.monotonic() + self._timeout)  # type: ignore[misc]
            except ssl.SSLError as error:
                raise _lost(error) from None

    def receive_into(self, view: memoryview, *, patient: bool = False) -> None:
        for start in range(0, len(view), CHUNK):
            chunk, filled = view[start : start + CHUNK], 0
            deadline = math.inf if patient and not start else time.monotonic() + self._timeout
            while filled < len(chunk):
                filled += self._read(chunk[filled : filled + RECORD], deadline)
                if deadline == math.inf:
                    deadline = time.monotonic() + self._timeout

    def receive_some(self, most: int) -> bytes:
        buffer = bytearray(min(most, RECORD))
        try:
            count = self._read(memoryview(buffer), time.monotonic() + self._timeout)
        except _Ended:
            return b""
        return bytes(buffer[:count])

    def stop_reading(self) -> None:
        with self._inside:  # no thread asks OpenSSL for more after this: an end without a goodbye is an error to it, and ends writing, too
            self._deaf = True
            super().stop_reading()

    def _read(self, view: memoryview, deadline: float) -> int:
        def read() -> int:
            if self._deaf:
                raise Closed("this side reads no more")
            return self._tls.recv_into(view)

        try:
            count = self._step(read, deadline)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            raise _Ended from None
        except ssl.SSLError as error:
            raise _lost(error) from None
        if not count:
            raise _Ended
        return count

    def _step(self, operation: Callable[[], T], deadline: float) -> T:
        """Does it as soon as the socket lets it, before the deadline. Raises Silent, Closed, SSLError."""
        while True:
            try:
                with self._inside:
                    return operation()
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            except (ssl.SSLError, Closed):
                raise
            except (OSError, ValueError) as error:  # ValueError: of a socket that was lost before the handshake
                raise Closed(_describe(error)) from None
            self._await(event, deadline)

    def _await(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(None if left == math.inf else math.ceil(left * 1000)):
                return
        raise Silent


class _Ended(Closed):
    """The peer has closed its end."""

    def __init__(self) -> None:
        super().__init__("closed by the peer")


class Transport(ABC):
    """How the processes of a job reach one another."""

    context: ssl.SSLContext | None = None
    """Of an end that accepts, for asyncio; None: plain."""

    @abstractmethod
    def accept(self, sock: socket.socket, *, timeout: float) -> Connection:
        """The connection of an accepted socket; its user calls `handshake` first. Raises Closed, OSError."""

    def dial(self, address: str, *, timeout: float, within: float | None = None) -> Connection:
        """Connects to host:port, and verifies who is there. Raises Closed, Silent, or OSError when nobody is.

        timeout: seconds of silence, on the connection; within: seconds until it stands, the same if None.
        """
        within = timeout if within is None else within
        sock = socket.create_connection(split_address(address), timeout=within)
        try:
            if sock.getsockname() == sock.getpeername():
                # No process listens on this port of this machine, and the kernel chose it for our own end: it is connected to itself.
                raise Closed("no process listens")
            connection = self._dialed(sock, timeout=timeout)
        except BaseException:
            sock.close()
            raise
        try:
            connection.handshake(within=within)
        except BaseException:
            connection.close()
            raise
        return connection

    @abstractmethod
    def _dialed(self, sock: socket.socket, *, timeout: float) -> Connection: ...


class _Plain(Transport):
    def accept(self, sock: socket.socket, *, timeout: float) -> Connection:
        return _PlainConnection(sock, timeout=timeout)

    def _dialed(self, sock: socket.socket, *, timeout: float) -> Connection:
        return self.accept(sock, timeout=timeout)


class _Tls(Transport):
    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self.context = accepting = _context(ssl.PROTOCOL_TLS_SERVER, folder)
        accepting.num_tickets = 0  # each connection is verified anew
        self._accepting = accepting
        self._dialing = _context(ssl.PROTOCOL_TLS_CLIENT, folder)

    def accept(self, sock: socket.socket, *, timeout: float) -> Connection:
        return _TlsConnection(sock, self._accepting, name=None, timeout=timeout)

    def _dialed(self, sock: socket.socket, *, timeout: float) -> Connection:
        return _TlsConnection(sock, self._dialing, name=self._name, timeout=timeout)


PLAIN: Final[Transport] = _Plain()


def of(config: JobConfig, folder: Path | None) -> Transport:
    """The transport of a job. folder: of the attempt's certificate: ca.crt, tls.crt, tls.key. Raises WrongInput without one."""
    if config.tls is Tls.DISABLED:
        return PLAIN
    if folder is None:
        raise WrongInput(
            "network.tls is Mutual, and this process was given no certificate; the operator or `disttrain run` gives it"
        )
    try:
        return _Tls(folder, peer_name(config))
    except OSError as error:  # of ssl, too
        raise WrongInput(f"{folder}: the certificate of the attempt cannot be read: {_describe(error)}") from None


def peer_name(config: JobConfig) -> str:
    """A name that the certificate of the job's attempt stands for, as that of any pod."""
    return f"peer.{config.name}.{config.namespace}.svc"


class Refusals:
    """Says once of each peer why it is not let in; a peer tries again and again."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._said: set[tuple[str, str]] = set()

    def note(self, peer: tuple[object, ...], error: Unverified) -> None:
        """peer: its address and port."""
        said = (str(peer[0]), str(error))
        if said not in self._said and len(self._said) < MOST_REFUSALS_LOGGED:
            self._said.add(said)
            log.warning("%s refuses %s:%s: %s", self._who, *peer[:2], error)


def hold_back(writer: asyncio.StreamWriter) -> None:
    """Nothing is read before it is clear who reads: the handshake of TLS, or we. Called when asyncio has accepted; `verify` follows."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket


async def verify(writer: asyncio.StreamWriter, context: ssl.SSLContext | None, *, within: float) -> None:
    """Reads on, after the peer has shown the certificate of this attempt where the job has one. Raises Unverified, OSError."""
    if context is None:
        writer.transport.resume_reading()  # type: ignore[attr-defined]  # of a socket
        return
    try:
        await writer.start_tls(context, ssl_handshake_timeout=within)
    except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
        raise ConnectionError("closed by the peer") from None
    except ssl.SSLError as error:
        raise Unverified(_why(error)) from None


def _context(protocol: int, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    context.load_verify_locations(folder / "ca.crt")
    return context


def _why(error: ssl.SSLError) -> str:
    """What is wrong with the peer, in words."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        match error.verify_code:
            case 10:  # X509_V_ERR_CERT_HAS_EXPIRED
                return "its certificate has expired"
            case 9:  # X509_V_ERR_CERT_NOT_YET_VALID
                return "its certificate is not valid yet; compare the clocks of the machines"
            case _:
                return f"its certificate is not that of this attempt of the job ({error.verify_message})"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it has no certificate"
    if "ALERT" in reason:
        return f"it does not accept the certificate of this process ({_words(reason)})"
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL"):
        return "it does not speak TLS 1.3"
    return f"no TLS connection could be made ({_words(reason) or error})"


def _lost(error: ssl.SSLError) -> Closed:
    # Under TLS 1.3 a dialer is connected before the other end has looked at its certificate, and reads later that it was refused.
    return (
        Unverified(_why(error))
        if "ALERT" in (error.reason or "")
        else Closed(f"the connection is damaged: {_words(error.reason or '') or error}")
    )


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()


def _describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
