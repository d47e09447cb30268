"""The workers' copies of a packed data set: who keeps what, how it gets there, and how workers read from one another (data.replication).

A connection: the reader sends HELLO, a length in 4 bytes and JSON [job, attempt, data: the data set's id], and gets one byte, 1 for yes.
Then READs: partition, offset and length, answered by a length, 0 where the copy is not there, and the bytes as they are stored. Nobody
sees more than the volume shows: what is encrypted stays so.
"""

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Final

from disttrain.api.runtime import JobConfig
from disttrain_trainer.data.copy_folder import CopyFolder
from disttrain_trainer.data.packed_dataset import PackedDataset, Source
from disttrain_trainer.data.placement import holders
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.transport import Closed, Connection, Refusals, Silent, Transport, Unverified
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import Newcomers, listen, listening_host, split_address

log = logs.get_logger(__name__)

_LENGTH: Final = struct.Struct("<I")
_READ: Final = struct.Struct("<IQI")
_YES: Final = b"\x01"
PIECE: Final = 4 << 20
"""Most bytes of a READ."""
_MOST_HELLO: Final = 4096
_STRANGERS: Final = 64
DIAL_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 5.0
"""How long a peer is waited for: the volume has the same."""
AWAY_SECONDS: Final = 0.5
"""Before a peer that could not be reached is asked again; twice as long each time, up to a minute."""
_MOST_AWAY_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 10.0
"""Before a copy that could not be made is tried again."""
IDLE_SECONDS: Final = 3600.0
"""How long a reader may ask for nothing."""


def hello_of(config: JobConfig, data_set: bytes) -> bytes:
    """The first message of a reader."""
    text = json.dumps({"job": config.uid, "attempt": config.attempt, "data": data_set.hex()}, sort_keys=True)
    return _LENGTH.pack(len(text)) + text.encode()


class Peer:
    """Another worker, as a `Source` of what it keeps. Safe to share between threads."""

    def __init__(self, address: str, transport: Transport, hello: bytes) -> None:
        self._address, self._transport, self._hello = address, transport, hello
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._away, self._away_until = AWAY_SECONDS, 0.0

    def read(self, partition: int, offset: int, length: int) -> bytes | None:
        """Bytes of its copy; None where it has none, or cannot be reached."""
        with self._lock:
            if time.monotonic() < self._away_until:
                return None
            try:
                found = self._read(partition, offset, length)
                self._away = AWAY_SECONDS
                return found
            except (Closed, Silent, OSError) as error:
                log.info("no copy is read from the worker at %s for %.0f s: %s", self._address, self._away, error)
                self._away_until = time.monotonic() + self._away
                self._away = min(2 * self._away, _MOST_AWAY_SECONDS)
                self._hang_up()
                return None

    def close(self) -> None:
        """Ends the connection; it is made again when it is needed."""
        with self._lock:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, partition: int, offset: int, length: int) -> bytes | None:
        connection = self._connection
        if connection is None:
            connection = self._transport.dial(self._address, timeout=SILENT_SECONDS, within=DIAL_SECONDS)
            self._connection = connection
            connection.send(memoryview(self._hello))
            if bytes(_received(connection, len(_YES))) != _YES:
                raise Closed("it is of another job, attempt or data set")
        found = bytearray()
        while len(found) < length:
            piece = min(PIECE, length - len(found))
            connection.send(memoryview(_READ.pack(partition, offset + len(found), piece)))
            (count,) = _LENGTH.unpack(_received(connection, _LENGTH.size))
            if count != piece:
                if count:
                    raise Closed("it does not speak this protocol")
                return None
            found += _received(connection, piece)
        return bytes(found)


def _received(connection: Connection, length: int) -> bytearray:
    data = bytearray(length)
    connection.receive_into(memoryview(data))
    return data


class CopyServer:
    """Serves a worker's copies to the others, in threads."""

    def __init__(self, copies: CopyFolder, *, host: str | None, port: int, transport: Transport, hello: bytes) -> None:
        """Raises OSError when the port is taken."""
        self._copies, self._transport, self._hello = copies, transport, hello
        self._listener = listen(host, port)
        self._newcomers: Newcomers[Connection] = Newcomers(_STRANGERS, Connection.abort)
        self._refusals = Refusals("the copies of the data")
        self._readers: dict[threading.Thread, Connection] = {}
        self._accepting = threading.Thread(target=self._accept, name="copies", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Ends all connections, and accepts no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
        self._listener.close()
        self._accepting.join()
        for reader, connection in list(self._readers.items()):
            connection.abort()
            reader.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # too many open files
                continue
            try:
                connection = self._transport.accept(sock, timeout=IDLE_SECONDS)
            except (Closed, OSError):
                sock.close()
                continue
            self._newcomers.add(connection)
            reader = threading.Thread(target=self._serve, args=(connection, peer), name="copies-reader", daemon=True)
            self._readers[reader] = connection
            reader.start()

    def _serve(self, connection: Connection, peer: tuple[object, ...]) -> None:
        try:
            connection.handshake(within=SILENT_SECONDS)
            (length,) = _LENGTH.unpack(_received(connection, _LENGTH.size))
            if length > _MOST_HELLO or bytes(_received(connection, length)) != self._hello[_LENGTH.size :]:
                return
            self._newcomers.discard(connection)
            connection.send(memoryview(_YES))
            while True:
                partition, offset, length = _READ.unpack(_received(connection, _READ.size))
                data = self._copies.read(partition, offset, length) if length <= PIECE else None
                connection.send(memoryview(_LENGTH.pack(len(data) if data else 0) + (data or b"")))
        except Unverified as error:
            self._refusals.note(peer, error)
        except (Closed, Silent, OSError):
            pass
        finally:
            self._newcomers.discard(connection)
            self._readers.pop(threading.current_thread())
            connection.close()


class _Others:
    """The other holders of a partition, as one `Source`."""

    def __init__(self, peers: dict[int, Peer], data_set: bytes, *, own: int, workers: int, copies: int) -> None:
        self._peers, self._data_set = peers, data_set
        self._own, self._workers, self._copies = own, workers, copies

    def read(self, partition: int, offset: int, length: int) -> bytes | None:
        names = holders(self._data_set, partition, workers=self._workers, copies=self._copies)
        others = [name for name in names if name != self._own]
        first = self._own % len(others) if others else 0  # not all readers ask the same one
        for name in others[first:] + others[:first]:
            found = self._peers[name].read(partition, offset, length)
            if found is not None:
                return found
        return None

    def refuse(self, partition: int) -> None:
        """A copy of another worker is broken: that worker sees it itself as it reads it; here the next source is asked."""


class Kept:
    """What keeps the copies of a worker: its server, its connections, and the thread that makes them."""

    def __init__(self, server: CopyServer, peers: Iterable[Peer], missing: "queue.SimpleQueue[int | None]") -> None:
        self._server, self._peers, self._missing = server, peers, missing

    def close(self) -> None:
        """Ends them. The copies stay."""
        self._missing.put(None)
        self._server.close()
        for peer in self._peers:
            peer.close()


def keep(process: Process, packed: PackedDataset | None, transport: Transport) -> Kept | None:
    """Where the job asks for copies: keeps those of this worker, serves them, and has the data set read from copies first.

    None where this process serves none. Raises WrongInput when the disk is too small for them.
    """
    config = process.config
    if packed is None or config.data is None or config.data.replication <= 1 or process.copies_dir is None:
        return None
    index, hello = packed.index, hello_of(config, packed.index.id)
    workers, copies = config.workers, min(config.data.replication, config.workers)
    numbers = range(len(index.partitions))
    wanted = [p for p in numbers if process.index in holders(index.id, p, workers=workers, copies=copies)]
    missing: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    try:
        own = CopyFolder(process.copies_dir, index, on_missing=missing.put)
        needed, free = own.missing_bytes(wanted), own.free_bytes()
    except OSError as error:
        raise WrongInput(f"data.replication: {process.copies_dir}: {error.strerror or error}") from None
    if needed > free:
        raise WrongInput(
            f"data.replication is {copies}: the copies of this worker need {needed} bytes in {process.copies_dir}, which has {free} free: "
            "lower it, take more workers, or request ephemeral-storage in worker.template"
        )
    addresses = config.addresses.copies
    peers = {n: Peer(address, transport, hello) for n, address in enumerate(addresses) if n != process.index}
    others = _Others(peers, index.id, own=process.index, workers=workers, copies=copies)
    packed.use([own, others])
    if process.local_rank:
        return None  # the first process of the pod keeps the copies for all
    host, port = split_address(addresses[process.index])
    server = CopyServer(own, host=listening_host(host), port=port, transport=transport, hello=hello)
    threading.Thread(target=_fill, args=(own, packed, others, wanted, missing), name="copies-fill", daemon=True).start()
    return Kept(server, peers.values(), missing)


def _fill(
    own: CopyFolder, packed: PackedDataset, others: Source, wanted: list[int], missing: "queue.SimpleQueue[int | None]"
) -> None:
    """Makes the copies of this worker, and for ever those again that are lost: from the other workers, or from the volume."""
    came = {"workers": 0, "volume": 0, "disk": 0}
    for number in wanted:
        came[_made(own, packed, others, number)] += 1
    log.info(
        "copies of %d partitions are on this disk: %d were here, %d came from other workers, %d from the volume",
        len(wanted),
        came["disk"],
        came["workers"],
        came["volume"],
    )
    while (partition := missing.get()) is not None:
        if partition in wanted and not own.has(partition):
            source = _made(own, packed, others, partition)
            log.warning("the copy of partition %d was lost, and came again from %s", partition, _WORDS[source])


_WORDS: Final = {"workers": "another worker", "volume": "the volume", "disk": "this disk"}


def _made(own: CopyFolder, packed: PackedDataset, others: Source, partition: int) -> str:
    """Makes a copy, however long it takes; where it came from."""
    while True:
        if own.has(partition):
            return "disk"
        try:
            if own.fill(partition, others.read):
                return "workers"
            if own.fill(partition, packed.volume.read):
                return "volume"
            why = "the volume's is damaged"
        except OSError as error:
            why = error.strerror or str(error)
        log.warning("no copy of partition %d for %.0f s: %s; it is read elsewhere", partition, _RETRY_SECONDS, why)
        time.sleep(_RETRY_SECONDS)
