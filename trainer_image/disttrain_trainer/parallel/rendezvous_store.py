"""A rank's end of the rendezvous store under TLS: what gloo, DeviceMesh and torch's groups ask of a `torch.distributed.Store`."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # missing in its __all__

from disttrain_trainer.net import rendezvous
from disttrain_trainer.net.connection import Connection
from disttrain_trainer.net.rendezvous import SIZE
from disttrain_trainer.net.transport import Interrupt, Transport

ANSWER_SECONDS: Final = 30.0
"""How long the master may take for an answer, beyond what it waits for."""


class RendezvousStore(Store):
    """A client of `net.rendezvous`. Any thread may use it; a thread that waits holds up no other one.

    `close` ends every wait. Operations raise DistStoreError when a key does not come in time, and DistNetworkError when the master is lost.
    """

    def __init__(self, transport: Transport, address: str, *, prefix: str, timeout: timedelta) -> None:
        """address: host:port. prefix: of every key. timeout: how long `wait` and `get` wait for a key, unless they are told.

        It connects when it is first used.
        """
        super().__init__()
        self._timeout = timeout
        self._transport = transport
        self._address = address
        self._prefix = f"{prefix}/"
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._used: set[Connection] = set()
        self._closed = False
        self._interrupt = Interrupt()

    def close(self) -> None:
        """Ends every wait and every later operation. Any thread may call this; it does not block."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._used:
                connection.abort()
        self._interrupt.end()
        for connection in idle:
            connection.close()

    def set(self, key: str, value: str | bytes) -> None:
        self.multi_set([key], [value])

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        self._ask(
            b"set", *(item for key, value in zip(keys, values, strict=True) for item in (self._prefix + key, value))
        )

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.wait(keys)
        return self._ask(b"get", *self._full(keys))

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(b"add", self._prefix + key, str(amount))[0])

    def append(self, key: str, value: str | bytes) -> None:
        self._ask(b"append", self._prefix + key, value)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._ask(b"compare_set", self._prefix + key, expected, desired)[0]

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(b"check", *self._full(keys))[0] == b"1"

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit = (self._timeout if timeout is None else timeout).total_seconds()
        last = time.monotonic() + limit
        while self._ask(b"wait", str(max(0.0, last - time.monotonic())), *self._full(keys))[0] != b"1":
            if time.monotonic() >= last:
                raise dist.DistStoreError(f"wait timeout after {limit:g} s, keys: {', '.join(keys)}")

    def delete_key(self, key: str) -> bool:
        return self._ask(b"delete", self._prefix + key)[0] == b"1"

    def num_keys(self) -> int:
        return int(self._ask(b"count")[0])

    def list_keys(self) -> list[str]:
        """Those with its prefix, without it."""
        found = [key.decode() for key in self._ask(b"list")]
        return [key.removeprefix(self._prefix) for key in found if key.startswith(self._prefix)]

    # By these names torch's C++ asks.
    deleteKey, getNumKeys, listKeys = delete_key, num_keys, list_keys

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    @property
    def timeout(self) -> timedelta:
        return self._timeout

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> "RendezvousStore":
        return self

    def _full(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]

    def _ask(self, name: bytes, *arguments: Any) -> list[bytes]:
        parts = [argument.encode() if isinstance(argument, str) else bytes(argument) for argument in arguments]
        try:
            with self._connection() as connection:
                connection.send(memoryview(rendezvous.encode([name, *parts])))
                head = bytearray(SIZE.size)
                connection.receive_into(memoryview(head))
                answer = bytearray(min(SIZE.unpack(head)[0], rendezvous.MAX_BYTES))
                connection.receive_into(memoryview(answer))
        except OSError as error:
            raise dist.DistNetworkError(f"the rendezvous store at {self._address}: {error}") from None
        kind, *found = rendezvous.decode(bytes(answer))
        if kind != b"ok":
            raise dist.DistStoreError(found[0].decode())
        return found

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection that no other thread uses meanwhile."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._transport.dial(
                self._address, timeout=rendezvous.WAIT_SECONDS + ANSWER_SECONDS, interrupt=self._interrupt
            )
        with self._lock:
            self._used.add(connection)
            if self._closed:
                connection.abort()
        whole = False
        try:
            yield connection
            whole = True
        finally:
            with self._lock:
                self._used.discard(connection)
                whole = whole and not self._closed
                if whole:
                    self._idle.append(connection)
            if not whole:
                connection.close()
