"""A packed data set, read block by block: larger than memory, the blocks in use in a cache, those that come next read in the background."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttrain_trainer.data.block_order import BlockOrder
from disttrain_trainer.data.first_answer import first_answer
from disttrain_trainer.data.opening import REMEDY, Copies, Source, open_store, unreadable
from disttrain_trainer.data.pack_index import file_name
from disttrain_trainer.data.sample_format import Block, Column, as_tensor, decode, grown
from disttrain_trainer.data.sealing import Broken
from disttrain_trainer.data.store import Folder, Store
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

CACHE_BYTES: Final = 128 << 20
"""Of a process, for blocks that were read."""
AHEAD_BYTES: Final = 32 << 20
"""Of samples that are read before they are used."""
PATIENCE_SECONDS = 60.0
"""How long a block is waited for that can be read nowhere: a volume comes back, and so does a worker that has a copy."""
HEDGE_SECONDS: Final = 0.25
"""After which a block is also read from the next place; longer for a large one."""
_SLOW_BYTES: Final = 20e6
"""A second: what is slower than this is read elsewhere, too."""
_RETRY_SECONDS: Final = 0.1


class _Place(NamedTuple):
    """Where a block lies."""

    partition: int
    number: int
    """Of the block in its file."""
    offset: int
    length: int
    samples: int


class PackedDataset:
    """The map-style data set of `disttrain data pack`. Samples that it returns are copies."""

    def __init__(
        self, store: Path | Store, key: bytes | None = None, *, cache: int = CACHE_BYTES, copies: Copies | None = None
    ) -> None:
        """store: of a split, or its folder. key: of an encrypted data set, 32 bytes. cache: bytes. copies: asked before the store.

        Raises WrongInput, DataUnreadable: a line that names the file.
        """
        self.store: Store = Folder(store) if isinstance(store, Path) else store
        opened = open_store(self.store, key) if copies is None else copies.open(self.store, key)
        self.index, self._seal = opened.index, opened.seal
        self._copies = copies
        self._cache: OrderedDict[int, Block] = OrderedDict()
        self._cached, self._most = 0, cache
        self._coming: dict[int, Future[Block]] = {}
        self._unused: dict[int, tuple[int, int]] = {}
        """Blocks that are read ahead and were not used yet: what `_asked` was then, and their bytes."""
        self._asked = 0
        """Samples that `read_ahead` was called with."""
        self._lock = threading.Lock()
        self._reader: tuple[int, ThreadPoolExecutor] | None = None

    def __len__(self) -> int:
        return self.index.samples

    def __getitem__(self, number: int) -> Any:
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """Several samples, as torch's DataLoader asks for them."""
        found = np.asarray(numbers, np.int64)
        blocks = self._blocks_of(found)
        rows = found - self.index.firsts[blocks]
        return [self._block(block).sample(row) for block, row in zip(blocks.tolist(), rows.tolist(), strict=True)]

    def fingerprint(self) -> str:
        """The id of the pack: another one has its samples in other places."""
        return self.index.id.hex()

    def order(self, seed: int) -> BlockOrder:
        """The order of its epochs."""
        return BlockOrder(self.index.counts, self.index.borders, window=self.index.window, seed=seed)

    def batch(self, numbers: NDArray[np.int64]) -> Any:
        """These samples as torch's default_collate puts them together; None where they are not alike, or hold what it does not take."""
        chosen = self._rows_of(numbers)
        columns: list[Any] = []
        for i, leaf in enumerate(self.index.structure.leaves()):
            if leaf.kind in ("str", "bytes"):
                values = dict(
                    zip(
                        (at for _, places, _ in chosen for at in places.tolist()),
                        (block.columns[i].value(row) for block, _, rows in chosen for row in rows.tolist()),
                        strict=True,
                    )
                )
                columns.append([values[at] for at in range(len(numbers))])
                continue
            gathered = _gather([(block.columns[i], places, rows) for block, places, rows in chosen], len(numbers))
            if gathered is None or gathered.dtype.kind not in "biufc" or not gathered.dtype.isnative:
                return None
            columns.append(as_tensor(leaf, gathered))
        return grown(self.index.structure, iter(columns), collated=True)

    def _rows_of(self, numbers: NDArray[np.int64]) -> list[tuple[Block, NDArray[np.int64], NDArray[np.int64]]]:
        """The blocks of these samples, each with their places in `numbers` and their rows in it; one block where there are none."""
        blocks = self._blocks_of(numbers)
        rows = numbers - self.index.firsts[blocks]
        if not len(numbers):
            return [(self._block(0), rows, rows)]
        order = np.argsort(blocks, kind="stable")
        sorted_blocks, sorted_rows = blocks[order], rows[order]
        edges = [0, *(np.flatnonzero(sorted_blocks[1:] != sorted_blocks[:-1]) + 1).tolist(), len(numbers)]
        return [
            (self._block(int(sorted_blocks[start])), order[start:stop], sorted_rows[start:stop])
            for start, stop in pairwise(edges)
        ]

    def read_ahead(self, numbers: NDArray[np.int64]) -> None:
        """Reads the blocks of these samples in the background, as far as the cache holds them until they are used."""
        if len(self._cache) == len(self.index.counts):
            return  # all of a small data set
        self._asked += len(numbers)
        horizon = self._asked - 4 * (self.ahead + len(numbers))
        for block in np.unique(self._blocks_of(numbers)).tolist():
            with self._lock:
                if block in self._cache or block in self._coming:
                    continue
                length = self.index.place(block)[3]
                if self._unused and self._unused_bytes(horizon) + length > self._most:
                    return  # it is read when it is needed: read now, it would be read twice
                self._unused[block] = (self._asked, length)
                self._coming[block] = self._executor().submit(self._read, block)

    def _unused_bytes(self, horizon: int) -> int:
        """Of blocks that were read ahead and are still to be used: one that was asked for before `horizon` is of a part that another
        process computes."""
        for block in [b for b, (asked, _) in self._unused.items() if asked < horizon]:
            del self._unused[block]
        return sum(length for _, length in self._unused.values())

    @property
    def ahead(self) -> int:
        """Samples whose blocks are worth reading before they are used."""
        mean = max(1, sum(part.size for part in self.index.partitions) // len(self))
        return max(1, min(4096, min(AHEAD_BYTES, self._most // 4) // mean))

    def _executor(self) -> ThreadPoolExecutor:
        if (
            self._reader is None or self._reader[0] != os.getpid()
        ):  # the threads of a parent are not those of its forked child
            self._reader = os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        return self._reader[1]

    def _blocks_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.searchsorted(self.index.firsts, numbers, "right") - 1
        return found

    def _block(self, block: int) -> Block:
        with self._lock:
            self._unused.pop(block, None)
            found = self._cache.get(block)
            if found is not None:
                self._cache.move_to_end(block)
                return found
            coming = self._coming.get(block)
        # What is in the queue only is read at once.
        return coming.result() if coming is not None and not coming.cancel() else self._read(block)

    def _read(self, block: int) -> Block:
        """Reads a block into the cache. Raises WrongInput, DataUnreadable."""
        try:
            found = self._opened(block)
            with self._lock:
                if block not in self._cache:
                    self._cached += found.size
                self._cache[block] = found
                while self._cached > self._most and len(self._cache) > 1:
                    # The oldest, of those that were used.
                    oldest = next((b for b in self._cache if b not in self._unused), next(iter(self._cache)))
                    self._cached -= self._cache.pop(oldest).size
            return found
        finally:
            with self._lock:
                self._coming.pop(block, None)

    def _opened(self, block: int) -> Block:
        """A block from where it can be had. What cannot be read at all is waited for. Raises WrongInput, DataUnreadable."""
        partition, number, offset, length = self.index.place(block)
        place = _Place(partition, number, offset, length, int(self.index.counts[block]))
        deadline, said = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                return self._tried(place)
            except OSError as error:
                failure = unreadable(self.store, file_name(partition), error)
            except WrongInput as error:
                if self._copies is None:
                    raise
                failure = error  # a worker with a copy may be on its way back
            if time.monotonic() >= deadline:
                raise failure
            if not said:
                log.warning("%s; waiting for %.0f s", failure, PATIENCE_SECONDS)
                said = True
            time.sleep(_RETRY_SECONDS)

    def _tried(self, place: _Place) -> Block:
        copies = self._copies.of(self.store.split, place.partition) if self._copies is not None else ()
        for source in copies:
            if source.local and (found := self._of_copy(source, place)) is not None:
                return found
        away = [source for source in copies if not source.local]
        if not away:
            return self._of_store(place)
        calls: list[Callable[[], Block | None]] = [
            *(partial(self._of_copy, source, place) for source in away if not source.slow),
            partial(self._of_store, place),
            *(partial(self._of_copy, source, place) for source in away if source.slow),
        ]
        found = first_answer(calls, after=HEDGE_SECONDS + place.length / _SLOW_BYTES, within=PATIENCE_SECONDS)
        assert found is not None  # the store answers, or raises
        return found

    def _of_copy(self, source: Source, place: _Place) -> Block | None:
        sealed = source.read(place.partition, place.offset, place.length)
        if sealed is None:
            return None
        try:
            return self._unsealed(place, sealed)
        except ValueError:
            source.refuse(place.partition)
            return None

    def _of_store(self, place: _Place) -> Block:
        """Raises WrongInput, OSError."""
        path, number = self.store.where(file_name(place.partition)), place.number
        sealed = self.store.read(place.partition, place.offset, place.length)
        if len(sealed) < place.length:
            raise WrongInput(f"{path} is cut short: it ends in block {number}; {REMEDY}")
        try:
            return self._unsealed(place, sealed)
        except Broken:
            raise WrongInput(f"{path} is damaged: block {number} is not what was packed there; {REMEDY}") from None
        except ValueError as error:
            raise WrongInput(f"{path} is damaged: block {number}: {error}; {REMEDY}") from None

    def _unsealed(self, place: _Place, sealed: bytes) -> Block:
        content = self._seal.open(place.partition, place.number, place.samples, sealed)
        return decode(self.index.structure, content, place.samples)


def _gather(parts: list[tuple[Column, NDArray[np.int64], NDArray[np.int64]]], count: int) -> NDArray[Any] | None:
    """The values of a leaf as one new array; None where they have no one shape. parts: columns, places in the result and rows."""
    first = parts[0][0].rows
    if first is None:
        return None
    found = np.empty((count, *first.shape[1:]), first.dtype)
    for column, places, rows in parts:
        if column.rows is None or column.rows.shape[1:] != first.shape[1:]:
            return None
        found[places] = column.rows[rows]
    return found
