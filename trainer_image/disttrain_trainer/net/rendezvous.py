"""The rendezvous store under TLS, where torch's TCPStore has none: the master's end of it, and what both ends say.

A request and its answer are lists of byte strings, each list as one message. A request is the name of an operation and its arguments; the
answer is `ok` and the results, or `error` and the reason. No request waits at the master longer than it asks for, and never longer
than WAIT_SECONDS: a client that waits on asks again, so that a master that is silent is noticed. torch is not imported here.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from typing import Final

from disttrain_trainer.net.connection import Unverified
from disttrain_trainer.net.transport import Refusals, hold_back, verify
from disttrain_trainer.runtime.sockets import BACKLOG, Newcomers

WAIT_SECONDS: Final = 5.0
"""The longest that one request waits for keys."""
MAX_BYTES: Final = 16 << 20
"""Of a message. What torch puts into a store are addresses and counts."""
HANDSHAKE_SECONDS: Final = 30.0
STRANGERS: Final = 64
"""Connections without a request yet, beside two for each process of the job."""
SIZE: Final = struct.Struct("<I")
"""Bytes of the message that follows; and of each of its parts."""


def encode(parts: Sequence[bytes]) -> bytes:
    """A message, with its size before it. Raises ValueError when it is longer than the other end takes."""
    message = b"".join(piece for part in parts for piece in (SIZE.pack(len(part)), part))
    if len(message) > MAX_BYTES:
        raise ValueError(f"a message of {len(message)} bytes to the rendezvous store; at most {MAX_BYTES} are sent")
    return SIZE.pack(len(message)) + message


def decode(message: bytes) -> list[bytes]:
    """The parts of a message, which comes without its size. Raises ValueError when it is none."""
    parts, at = [], 0
    while at < len(message):
        if len(message) - at < SIZE.size:
            raise ValueError("not a message of the rendezvous store")
        (size,) = SIZE.unpack_from(message, at)
        at += SIZE.size + size
        if at > len(message):
            raise ValueError("not a message of the rendezvous store")
        parts.append(message[at - size : at])
    return parts


class RendezvousServer:
    """Keys and values of one round after the other. All of it runs in one event loop."""

    def __init__(self, *, context: ssl.SSLContext | None, processes: int) -> None:
        """context: of TLS; None: plain. processes: of the job, each of which may connect several times."""
        self._context = context
        self._refusals = Refusals("the rendezvous store")
        self._newcomers: Newcomers[asyncio.StreamWriter] = Newcomers(
            # Not by abort(): asyncio takes a connection that is aborted in its handshake for one that is made.
            STRANGERS + 2 * processes,
            lambda writer: self._connections[writer].cancel(),
        )
        self._values: dict[bytes, bytes] = {}
        self._changed = asyncio.Condition()
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._operations: dict[bytes, Callable[..., list[bytes]]] = {
            b"set": self._set,
            b"add": self._add,
            b"append": self._append,
            b"compare_set": self._compare_set,
            b"delete": self._delete,
            b"check": self._check,
            b"get": lambda *keys: [self._values[key] for key in keys],
            b"count": lambda: [b"%d" % len(self._values)],
            b"list": lambda: list(self._values),
        }

    async def serve(self, listener: socket.socket) -> None:
        """Serves on a socket that listens already, until cancelled."""
        server = await asyncio.start_server(self._accept, sock=listener)
        listener.listen(BACKLOG)
        async with server:
            try:
                await server.serve_forever()
            finally:
                self.renew()

    def renew(self) -> None:
        """Forgets every key, and ends the connections: those who wait are of a round that is over."""
        self._values.clear()
        for writer, task in list(self._connections.items()):
            writer.transport.abort()
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hold_back(writer)
        task = self._connections[writer] = asyncio.create_task(self._converse(reader, writer))
        self._newcomers.add(writer)
        task.add_done_callback(lambda _: self._close(writer))

    def _close(self, writer: asyncio.StreamWriter) -> None:
        self._newcomers.discard(writer)
        del self._connections[writer]
        writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await verify(writer, self._context, within=HANDSHAKE_SECONDS)
            while True:
                (size,) = SIZE.unpack(await reader.readexactly(SIZE.size))
                self._newcomers.discard(writer)
                if size > MAX_BYTES:
                    break
                writer.write(encode(await self._answer(await reader.readexactly(size))))
                await writer.drain()
        except Unverified as error:
            self._refusals.note(writer.get_extra_info("peername"), error)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the peer is gone, or its round is over

    async def _answer(self, message: bytes) -> list[bytes]:
        try:
            name, *arguments = decode(message)
            if name == b"wait":
                return [b"ok", await self._wait(*arguments)]
            found = self._operations[name](*arguments)
        except (ValueError, KeyError, TypeError) as error:
            return [b"error", f"the rendezvous store cannot do this: {error!r}".encode()]
        async with self._changed:
            self._changed.notify_all()
        return [b"ok", *found]

    async def _wait(self, seconds: bytes, *keys: bytes) -> bytes:
        """Whether all of them are there, at the end of the time at the latest."""

        def complete() -> bool:
            return all(key in self._values for key in keys)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(float(seconds), WAIT_SECONDS)), self._changed:
                await self._changed.wait_for(complete)
        return b"1" if complete() else b"0"

    def _set(self, *pairs: bytes) -> list[bytes]:
        self._values.update(zip(pairs[::2], pairs[1::2], strict=True))
        return []

    def _add(self, key: bytes, amount: bytes) -> list[bytes]:
        self._values[key] = b"%d" % (int(self._values.get(key, b"0")) + int(amount))
        return [self._values[key]]

    def _append(self, key: bytes, value: bytes) -> list[bytes]:
        self._values[key] = self._values.get(key, b"") + value
        return []

    def _compare_set(self, key: bytes, expected: bytes, desired: bytes) -> list[bytes]:
        """As torch's: the value that holds now; `expected`, where there is none and one was expected."""
        value = self._values.get(key, b"")
        if value == expected:
            value = self._values[key] = desired
        return [value if key in self._values else expected]

    def _delete(self, key: bytes) -> list[bytes]:
        return [b"0" if self._values.pop(key, None) is None else b"1"]

    def _check(self, *keys: bytes) -> list[bytes]:
        return [b"1" if all(key in self._values for key in keys) else b"0"]
