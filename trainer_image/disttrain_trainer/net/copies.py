"""The workers' copies of a packed data set (data.replication): who keeps what, how it gets there, and where this process reads it."""

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from disttrain.api.names import Role
from disttrain_trainer.data.copy_folder import FULL, CopyFolder, Filled
from disttrain_trainer.data.first_answer import first_answer
from disttrain_trainer.data.opening import Opened, Reading, Source, open_store, verified
from disttrain_trainer.data.pack_index import INDEX, file_name
from disttrain_trainer.data.placement import holders
from disttrain_trainer.data.store import Folder, Store
from disttrain_trainer.errors import DataUnreadable, WrongInput
from disttrain_trainer.net import copy_peers
from disttrain_trainer.net.copy_peers import SPLITS, CopyServer, Peer, Request, hello_of
from disttrain_trainer.net.transport import Transport
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import listening_host, split_address

log = logs.get_logger(__name__)

CHECK_SECONDS = 5.0
"""Between two looks at the copies of this disk; after which one that could not be made is tried again."""
_ASKED: Final = 8
"""Workers that are asked for an index at most: each has it."""
_HEDGE_SECONDS: Final = 0.25
_INDEX_SECONDS: Final = 1.0
"""How long the others are asked for an index. At the start of a job none has one, and all refuse the connection at once."""
PATIENCE_SECONDS = 60.0
"""How long an index is waited for where neither a worker nor the volume gives it."""
_RETRY_SECONDS: Final = 0.5


class Held(NamedTuple):
    """A split, and what this worker keeps of it."""

    opened: Opened
    store: Store
    folder: CopyFolder
    wanted: list[int]
    """Its partitions; none in another process of the pod than the first, which keeps the copies for all."""


class _OfPeer:
    """The copies of another worker, of one split, as a `Source`."""

    local = False

    def __init__(self, peer: Peer, split: str, on_broken: Callable[[Peer, str, int], None]) -> None:
        self._peer, self._split, self._on_broken = peer, split, on_broken

    @property
    def slow(self) -> bool:
        return self._peer.slow

    def read(self, partition: int, offset: int, length: int) -> bytes | None:
        return self._peer.read(self._split, partition, offset, length)

    def refuse(self, partition: int) -> None:
        self._on_broken(self._peer, self._split, partition)


class WorkerCopies:
    """The copies of a job, as one of its workers sees them: `data.opening.Copies`. Any thread may read."""

    def __init__(self, process: Process, transport: Transport) -> None:
        """Of a job with data.replication, in a worker that has a folder for copies."""
        config = process.config
        assert config.data is not None
        assert process.copies_dir is not None
        self._process, self._transport, self._root = process, transport, process.copies_dir
        self._workers, self._copies = config.workers, min(config.data.replication, config.workers)
        self._addresses = config.addresses.copies
        self._peers = {
            number: Peer(f"{Role.WORKER.value}-{number}", address, transport, hello_of(config))
            for number, address in enumerate(self._addresses)
            if number != process.index
        }
        self._held: dict[str, Held] = {}
        self._server: CopyServer | None = None
        self._suspects: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        """Copies of this disk that are perhaps broken or gone; None: the end."""
        self._broken = 0
        self._failures: list[str] = []
        """Copies that could not be made in this pass, each with the reason."""
        self._said = ""

    def open(self, store: Store, key: bytes | None) -> Opened:
        """The split of a store: from this disk, from another worker, or from the store. Raises WrongInput, DataUnreadable."""
        split = store.split
        if split in self._held:
            return self._held[split].opened
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (opened := self._copy_of_index(split, key)) is None:
            try:
                opened = open_store(store, key)
                break
            except DataUnreadable as error:
                if time.monotonic() >= deadline:
                    raise
                log.warning("%s; the other workers are asked for their copies", error)
            time.sleep(_RETRY_SECONDS)
        index = opened.index
        numbers = range(0 if self._process.local_rank else len(index.partitions))
        wanted = [p for p in numbers if self._process.index in self._holders(index.id, p)]
        folder = CopyFolder(self._root / split, index, on_missing=lambda p: self._suspects.put((split, p)))
        self._held[split] = Held(opened, store, folder, wanted)
        return opened

    def of(self, split: str, partition: int) -> Sequence[Source]:
        """The copies of a partition: that of this disk, then those of the other workers, not the same one first for all readers."""
        held = self._held[split]
        return [held.folder, *self._others(split, held, partition)]

    def keep(self) -> None:
        """Takes the room of this worker's copies, makes them in the background, and serves them.

        The first process of a pod does so for all of them. Raises WrongInput when the disk is too small, PeerLost when the port is taken.
        """
        if not self._held:
            return
        if not self._process.local_rank:
            self._reserve()
            self._serve()
        threading.Thread(target=self._tend, name="copies-fill", daemon=True).start()

    def _serve(self) -> None:
        host, port = split_address(self._addresses[self._process.index])
        hello = hello_of(self._process.config)
        self._server = CopyServer(
            self._answer, host=listening_host(host), port=port, transport=self._transport, hello=hello
        )

    def close(self) -> None:
        """Ends the server, the connections and the thread. The copies stay."""
        self._suspects.put(None)
        if self._server is not None:
            self._server.close()
        for peer in self._peers.values():
            peer.close()

    def _holders(self, data_set: bytes, partition: int) -> list[int]:
        return holders(data_set, partition, workers=self._workers, copies=self._copies)

    def _others(self, split: str, held: Held, partition: int) -> list[Source]:
        names = self._holders(held.opened.index.id, partition)
        others = [name for name in names if name != self._process.index]
        first = self._process.index % len(others) if others else 0
        return [_OfPeer(self._peers[name], split, self._note_broken) for name in others[first:] + others[:first]]

    def _copy_of_index(self, split: str, key: bytes | None) -> Opened | None:
        """The split by the index of this disk, or of another worker."""

        def checked(where: str, read: Callable[[], bytes | None]) -> Opened | None:
            content = read()
            try:
                return verified(content, where, key, split=split) if content is not None else None
            except WrongInput as error:
                log.warning("%s; it is read elsewhere", error)
                return None

        own = Folder(self._root / split)
        with contextlib.suppress(OSError):
            if (found := checked(own.where(INDEX), own.index)) is not None:
                return found
        numbers = sorted(self._peers, key=lambda number: (number - self._process.index) % self._workers)[:_ASKED]
        calls = [
            partial(checked, f"the index of {self._peers[n].name}", partial(self._peers[n].index, split))
            for n in numbers
        ]
        try:
            return first_answer(calls, after=_HEDGE_SECONDS, within=_INDEX_SECONDS)
        except TimeoutError:
            return None

    def _note_broken(self, peer: Peer, split: str, partition: int) -> None:
        self._broken += 1
        log.warning(
            "the copy of %s/%s on %s is broken (broken copy number %d that this process met): it is read elsewhere, and %s makes it again",
            split,
            file_name(partition),
            peer.name,
            self._broken,
            peer.name,
        )
        peer.report_broken(split, partition)

    def _answer(self, request: Request) -> bytes | None:
        held = self._held.get(split := SPLITS[request.split])
        if held is None:
            return None
        if request.operation == copy_peers.INDEX:
            return held.opened.content[request.offset : request.offset + request.length]
        if request.operation == copy_peers.READ:
            return held.folder.read(request.partition, request.offset, request.length)
        if request.partition in held.wanted:
            self._suspects.put((split, request.partition))
        return None

    def _reserve(self) -> None:
        sizes = {
            split: sum(held.opened.index.partitions[p].size for p in held.wanted) for split, held in self._held.items()
        }
        limit, problem = self._process.copies_limit, None
        if limit is not None and sum(sizes.values()) > limit:
            raise self._too_small(
                sizes, f"more than the {limit} bytes of limits.ephemeral-storage, beyond which it is evicted"
            )
        try:
            for split, held in self._held.items():
                held.folder.keep_index(held.opened.content)
                needed, free = held.folder.missing_bytes(held.wanted), held.folder.free_bytes()
                if needed > free:
                    problem = f"{needed} bytes for {split} where {free} are free"
                    break
                held.folder.reserve(held.wanted)
        except OSError as error:
            if error.errno not in FULL:
                raise WrongInput(
                    f"data.replication: no copy can be written to {self._root}: {error.strerror or error}; "
                    "let the trainer's user write there, or leave data.replication out"
                ) from None
            problem = f"more than is free: {error.strerror}"
        if problem is not None:
            raise self._too_small(sizes, f"{problem} (workers of one disk share its room)")

    def _too_small(self, sizes: dict[str, int], problem: str) -> WrongInput:
        parts = " + ".join(
            f"{len(held.wanted)} of {len(held.opened.index.partitions)} partitions of {split}, {sizes[split]} bytes"
            for split, held in self._held.items()
        )
        return WrongInput(
            f"data.replication is {self._copies} for {self._workers} workers: this one keeps {parts}, in {self._root}, and needs "
            f"{problem}: lower it, take more workers, or request and allow more ephemeral-storage in worker.template"
        )

    def _tend(self) -> None:
        """Makes the copies of this worker, and those again that are lost, until the end."""
        came: Counter[str] = Counter()
        copies = {(split, partition) for split, held in self._held.items() for partition in held.wanted}
        made: set[tuple[str, int]] = set()
        while True:
            for split, partition in sorted(copies):
                self._held[split].folder.refresh(partition)  # a disk may be wiped while its files are open
                if (split, partition) in made:
                    self._again(split, partition)
                elif (source := self._made(split, partition)) is not None:
                    made.add((split, partition))
                    came[source] += 1
                    if made == copies:
                        log.info(
                            "copies of %d partitions are on this disk: %d were here, %d came from other workers, %d from the %s",
                            *(len(made), came["disk"], came["workers"], came["store"], self._held[split].store.kind),
                        )
            self._say_failures()
            if not self._process.local_rank:  # one process of a pod writes the file
                for held in self._held.values():
                    with contextlib.suppress(OSError):
                        held.folder.keep_index(held.opened.content)
            for peer in self._peers.values():
                peer.look_again()
            if self._ended(CHECK_SECONDS):
                return

    def _say_failures(self) -> None:
        """One line for all copies that could not be made, and no second one while the reason is the same."""
        if self._failures and self._failures[0] != self._said:
            log.warning(
                "%d copies cannot be made, such as %s; they are read elsewhere, and tried again every %.0f s",
                *(len(self._failures), self._failures[0], CHECK_SECONDS),
            )
        self._said = self._failures[0] if self._failures else ""
        self._failures.clear()

    def _ended(self, seconds: float) -> bool:
        """Looks at suspected copies for so long; whether `close` was called."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                suspect = self._suspects.get(timeout=left)
            except queue.Empty:
                return False
            if suspect is None:
                return True
            split, partition = suspect
            folder = self._held[split].folder
            if folder.has(partition) and not folder.is_intact(partition):
                log.warning("the copy of %s/%s on this disk is broken", split, file_name(partition))
                folder.refuse(partition)
            self._again(split, partition)
        return False

    def _again(self, split: str, partition: int) -> None:
        """Makes a copy that was there and is not."""
        held = self._held[split]
        if partition in held.wanted and not held.folder.has(partition):
            source = self._made(split, partition)
            if source is not None:
                log.warning(
                    "the copy of %s/%s was lost, and came again from %s",
                    *(
                        split,
                        file_name(partition),
                        "another worker" if source == "workers" else f"the {held.store.kind}",
                    ),
                )

    def _made(self, split: str, partition: int) -> str | None:
        """Tries to make a copy. Where it is from: the disk, workers or store; None when it could not be made."""
        held = self._held[split]
        if held.folder.has(partition):
            return "disk"
        try:
            for other in self._others(split, held, partition):
                match held.folder.fill(partition, other.read):
                    case Filled.WHOLE:
                        return "workers"
                    case Filled.BROKEN:
                        other.refuse(partition)
            if held.folder.fill(partition, held.store.read) is Filled.WHOLE:
                return "store"
            why = f"{held.store.where(file_name(partition))} is damaged"
        except OSError as error:
            why = error.strerror or str(error)
        except WrongInput as error:  # a place that cannot be read in parts: the copies of the others may return
            why = str(error)
        self._failures.append(f"{split}/{file_name(partition)}: {why}")
        return None


@contextlib.contextmanager
def kept(process: Process, transport: Transport) -> Iterator[WorkerCopies | None]:
    """Around the making of a worker's task, in which the data sets are opened: they are read through the copies, which are kept then.

    None where the job has none. Raises WrongInput, PeerLost: see WorkerCopies.keep.
    """
    data = process.config.data
    copies = None
    if data is not None and data.replication > 1 and process.copies_dir is not None:
        copies = WorkerCopies(process, transport)
    Reading.copies = copies
    yield copies
    if copies is not None:
        copies.keep()
