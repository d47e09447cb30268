"""How bytes travel between the processes of a job: plain, or under TLS 1.3 with both ends verified (network.tls). One interface.

A certificate is that of a job's attempt, and every process of the attempt has the same one: who a peer is, its role and number, it says
itself in its HELLO. The certificate authority signed nothing else, and its key is gone. A dialer verifies the job's name, whatever address
it dials. An expired certificate is refused.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from disttrain.api.policies import Tls
from disttrain.api.runtime import JobConfig
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.connection import Closed, Connection, PlainConnection, Unverified, describe
from disttrain_trainer.net.local_sockets import connect_beside, listen_beside
from disttrain_trainer.net.tls import RECORDS, TlsConnection, why
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import split_address

log = logs.get_logger(__name__)

MOST_REFUSALS_LOGGED: Final = 256


class Transport(ABC):
    """How the processes of a job reach one another."""

    context: ssl.SSLContext | None = None
    """Of an end that accepts, for asyncio; None: plain."""

    @abstractmethod
    def accept(self, sock: socket.socket, *, timeout: float) -> Connection:
        """The connection of an accepted socket; its user calls `handshake` first. Raises Closed, OSError."""

    def dial(
        self, address: str, *, timeout: float, within: float | None = None, interrupt: "Interrupt | None" = None
    ) -> Connection:
        """Connects to host:port, and verifies who is there. Raises Closed, Silent, or OSError when no process is.

        timeout: seconds of silence, on the connection; within: seconds until it stands, the same if None. interrupt: ends it with Closed,
        except while the name is looked up.
        """
        within = timeout if within is None else within
        interrupt = interrupt or Interrupt()
        sock = self._beside(address) or _connected(address, within, interrupt)
        try:
            if sock.getsockname() == sock.getpeername():
                # No process listens on this port of this machine, and the kernel chose it for our own end: it is connected to itself.
                raise Closed("no process listens")
            connection = self._dialed(sock, timeout=timeout)
        except BaseException:
            sock.close()
            raise
        try:
            with interrupt.ends(connection.abort):
                connection.handshake(within=within)
        except BaseException:
            connection.close()
            raise
        return connection

    def listen_beside(self, listener: socket.socket) -> socket.socket | None:
        """Another listening socket, which `dial` prefers for the address of this one; None for none."""
        return None

    def _beside(self, address: str) -> socket.socket | None:
        """A socket that is connected to what `listen_beside` made."""
        return None

    @abstractmethod
    def _dialed(self, sock: socket.socket, *, timeout: float) -> Connection: ...


class Interrupt:
    """Ends what other threads wait for, for good. Any thread may call `end`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False
        self._ends: dict[object, Callable[[], object]] = {}

    def end(self) -> None:
        """Ends all that waits, and all that would begin to."""
        with self._lock:
            self._over = True
            for end in self._ends.values():
                end()

    @contextlib.contextmanager
    def ends(self, end: Callable[[], object]) -> Iterator[None]:
        """What waits inside is ended by this function, which does not block. Raises Closed when that has come."""
        key = object()
        with self._lock:
            self._check()
            self._ends[key] = end
        try:
            yield
        except OSError:
            self._check()
            raise
        finally:
            with self._lock:
                del self._ends[key]
        self._check()

    def _check(self) -> None:
        if self._over:
            raise Closed("this side closed the connection") from None


def _connected(address: str, within: float, interrupt: Interrupt) -> socket.socket:
    """A socket that is connected, at the first address of the name that answers. Raises OSError."""
    host, port = split_address(address)
    failed = OSError(f"{host} has no address")
    for family, kind, protocol, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            with interrupt.ends(partial(_shut, sock)):
                sock.settimeout(within)
                sock.connect(target)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Plain(Transport):
    def __init__(self, *, unix: bool) -> None:
        self._unix = unix

    def listen_beside(self, listener: socket.socket) -> socket.socket | None:
        return listen_beside(listener) if self._unix else None

    def _beside(self, address: str) -> socket.socket | None:
        return connect_beside(address) if self._unix else None

    def accept(self, sock: socket.socket, *, timeout: float) -> Connection:
        return PlainConnection(sock, timeout=timeout)

    def _dialed(self, sock: socket.socket, *, timeout: float) -> Connection:
        return self.accept(sock, timeout=timeout)


class _Tls(Transport):
    def __init__(self, folder: Path, name: str, records: int) -> None:
        self._name = name
        self._records = records
        self.context = accepting = _context(ssl.PROTOCOL_TLS_SERVER, folder)
        accepting.num_tickets = 0  # each connection is verified again
        self._accepting = accepting
        self._dialing = _context(ssl.PROTOCOL_TLS_CLIENT, folder)

    def accept(self, sock: socket.socket, *, timeout: float) -> Connection:
        return TlsConnection(sock, self._accepting, name=None, timeout=timeout, records=self._records)

    def _dialed(self, sock: socket.socket, *, timeout: float) -> Connection:
        return TlsConnection(sock, self._dialing, name=self._name, timeout=timeout, records=self._records)


PLAIN: Final[Transport] = _Plain(unix=True)
"""Over Unix sockets between processes of one machine (local_sockets.py), else over TCP."""
PLAIN_TCP: Final[Transport] = _Plain(unix=False)
"""To compare with."""


def of(config: JobConfig, folder: Path | None, *, records: int = RECORDS) -> Transport:
    """The transport of a job. folder: of the attempt's certificate: ca.crt, tls.crt, tls.key. records: of TLS, that one key encrypts.
    Raises WrongInput without a certificate."""
    if config.tls is Tls.DISABLED:
        return PLAIN
    if folder is None:
        raise WrongInput(
            "network.tls is Mutual, and this process was given no certificate; the operator or `disttrain run` gives it"
        )
    try:
        return _Tls(folder, peer_name(config), records)
    except OSError as error:  # of ssl, too
        raise WrongInput(f"{folder}: the certificate of the attempt cannot be read: {describe(error)}") from None


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
        raise Unverified(why(error)) from None


def _context(protocol: int, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    context.load_verify_locations(folder / "ca.crt")
    return context
