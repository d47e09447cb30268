"""A connection under TLS 1.3, and what is wrong with a peer, in words."""

import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from disttrain_trainer.net.connection import CHUNK, Closed, Connection, Ended, Silent, Unverified, describe

T = TypeVar("T")

RECORD: Final = 16 << 10
"""Most bytes of a TLS record (RFC 8446, 5.1)."""
RECORDS: Final = 1 << 23
"""Records that one key encrypts, 128 GiB: AES-GCM is made for 2^24.5 (RFC 8446, 5.5), and OpenSSL does not change keys by itself. What is
sent between two looks at `spent` has the rest."""


class TlsConnection(Connection):
    """Non-blocking, with poll() beside it: OpenSSL lets only one thread at a time into a connection, and no thread may keep it while it
    waits."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, name: str | None, timeout: float, records: int
    ) -> None:
        """name: that the peer's certificate must have, for the end that dials; None at the other end. records: after which it is spent."""
        super().__init__(sock, timeout=timeout)
        self._context, self._name = context, name
        self._most_records = records
        self._inside = threading.Lock()
        self._deaf = False
        self._wrap(sock)

    def _wrap(self, sock: socket.socket) -> None:
        self._sent_records = self._received_records = 0
        sock.setblocking(False)  # a socket object that is made of a file number, as in `renew`, blocks
        try:
            self._tls = self._context.wrap_socket(
                sock,
                server_side=self._name is None,
                server_hostname=self._name,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
        except OSError as error:
            raise Closed(describe(error)) from None
        self._socket = self._tls

    @property
    def spent(self) -> bool:
        return max(self._sent_records, self._received_records) >= self._most_records

    def renew(self, *, within: float) -> None:
        # TLS 1.3 has KeyUpdate for this, which Python's ssl cannot ask for. OpenSSL reads no further than a record's end, and no ticket
        # follows a handshake, so that the next byte is the first of the new handshake.
        with self._ending:
            if self._in_use.closed:
                raise Closed("this side closed the connection")
            self._socket = socket.socket(fileno=self._tls.detach())
            self._wrap(self._socket)
        self.handshake(within=within)

    def handshake(self, *, within: float) -> None:
        try:
            with self._in_use:
                self._step(self._tls.do_handshake, time.monotonic() + within)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            raise Ended from None
        except ssl.SSLError as error:
            raise Unverified(why(error)) from None

    def send(self, view: memoryview, *, more: bool = False) -> None:
        sent, size = 0, len(view)
        with self._in_use:
            while sent < size:
                chunk = view[sent : sent + CHUNK]
                try:
                    # Tried again with the same bytes as long as the kernel takes less than a record of them.
                    count = self._step(lambda chunk=chunk: self._tls.send(chunk), time.monotonic() + self._timeout)  # type: ignore[misc]
                except ssl.SSLError as error:
                    raise lost(error) from None
                self._sent_records += -(-count // RECORD)
                sent += count

    def receive_into(self, view: memoryview, *, patient: bool = False) -> None:
        with self._in_use:
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
            with self._in_use:
                count = self._read(memoryview(buffer), time.monotonic() + self._timeout)
        except Ended:
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
            raise Ended from None
        except ssl.SSLError as error:
            raise lost(error) from None
        if not count:
            raise Ended
        self._received_records += 1
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
                raise Closed(describe(error)) from None
            self._await(event, deadline)

    def _await(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(None if left == math.inf else math.ceil(left * 1000)):
                return
        raise Silent


def why(error: ssl.SSLError) -> str:
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


def lost(error: ssl.SSLError) -> Closed:
    """What became of a connection that stood."""
    # Under TLS 1.3 a dialer is connected before the other end has looked at its certificate, and reads later that it was refused.
    return (
        Unverified(why(error))
        if "ALERT" in (error.reason or "")
        else Closed(f"the connection is damaged: {_words(error.reason or '') or error}")
    )


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()
