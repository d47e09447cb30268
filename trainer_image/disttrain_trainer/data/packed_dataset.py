"""A packed data set, read block by block: larger than memory, the blocks in use in a cache, those that come next read in the background."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from disttrain_trainer.data import pack_index
from disttrain_trainer.data.block_order import BlockOrder
from disttrain_trainer.data.pack_index import INDEX, Index, file_name
from disttrain_trainer.data.sample_format import Block, Column, as_tensor, decode, grown
from disttrain_trainer.data.sealing import Broken, Seal, seal_of
from disttrain_trainer.errors import WrongInput

CACHE_BYTES: Final = 128 << 20
"""Of a process, for blocks that were read."""
AHEAD_BYTES: Final = 32 << 20
"""Of samples that are read before they are used."""
WITHOUT_VOLUME_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 0.1
_OPEN_FILES: Final = 256


class Source(Protocol):
    """Where sealed blocks come from, beside the volume. Safe to share between threads."""

    def read(self, partition: int, offset: int, length: int) -> bytes | None:
        """Bytes of a partition's file; None when this source does not have them."""

    def refuse(self, partition: int) -> None:
        """What it gave of this partition was broken."""


class Folder:
    """Partition files in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, partition: int, offset: int, length: int) -> bytes:
        """Bytes of a partition's file, fewer where it ends. Raises OSError."""
        with self._lock:
            descriptor = self._open.get(partition)
            if descriptor is None:
                if len(self._open) >= _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                descriptor = self._open[partition] = os.open(self._path / file_name(partition), os.O_RDONLY)
            # Within the lock: another thread could close the file. Blocks are small, and most of them are in the page cache.
            return os.pread(descriptor, length, offset)

    def forget(self, partition: int) -> None:
        """Closes a file: what has its name now may be another one."""
        with self._lock:
            descriptor = self._open.pop(partition, None)
            if descriptor is not None:
                os.close(descriptor)


class PackedDataset:
    """The map-style data set of `disttrain data pack`. Samples that it returns are copies."""

    def __init__(self, folder: Path, key: bytes | None = None, *, cache: int = CACHE_BYTES) -> None:
        """folder: that of a split. key: of an encrypted data set, 32 bytes. cache: bytes. Raises WrongInput, which names the file."""
        self.folder = folder
        self.index, self._seal = _open(folder, key)
        self.volume = Folder(folder)
        self._sources: Sequence[Source] = ()
        self._cache: OrderedDict[int, Block] = OrderedDict()
        self._cached, self._most = 0, cache
        self._coming: dict[int, Future[Block]] = {}
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

    def use(self, sources: Sequence[Source]) -> None:
        """Reads from these from now on, and from the volume what none of them has."""
        self._sources = sources

    def batch(self, numbers: NDArray[np.int64]) -> Any:
        """These samples as torch's default_collate puts them together; None where they are not alike, or hold what it does not take."""
        blocks = self._blocks_of(numbers)
        rows = numbers - self.index.firsts[blocks]
        distinct, inverse = np.unique(blocks if len(blocks) else np.zeros(1, np.int64), return_inverse=True)
        read = [self._block(block) for block in distinct.tolist()]
        places = [np.flatnonzero(inverse == i) for i in range(len(read))] if len(read) > 1 else []
        columns: list[Any] = []
        for i, leaf in enumerate(self.index.structure.leaves()):
            of_leaf = [block.columns[i] for block in read]
            if leaf.kind in ("str", "bytes"):
                columns.append([of_leaf[j].value(row) for j, row in zip(inverse.tolist(), rows.tolist(), strict=True)])
                continue
            gathered = _gather(of_leaf, places, rows)
            if gathered is None or gathered.dtype.kind not in "biufc" or not gathered.dtype.isnative:
                return None
            columns.append(as_tensor(leaf, gathered))
        return grown(self.index.structure, iter(columns), collated=True)

    def read_ahead(self, numbers: NDArray[np.int64]) -> None:
        """Reads the blocks of these samples in the background."""
        for block in np.unique(self._blocks_of(numbers)).tolist():
            with self._lock:
                if block not in self._cache and block not in self._coming:
                    self._coming[block] = self._executor().submit(self._read, block)

    @property
    def ahead(self) -> int:
        """Samples whose blocks are worth reading before they are used."""
        mean = max(1, sum(part.size for part in self.index.partitions) // len(self))
        return max(1, min(4096, AHEAD_BYTES // mean))

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
            found = self._cache.get(block)
            if found is not None:
                self._cache.move_to_end(block)
                return found
            coming = self._coming.get(block)
        # What is in the queue only is read at once.
        return coming.result() if coming is not None and not coming.cancel() else self._read(block)

    def _read(self, block: int) -> Block:
        """Reads a block into the cache. Raises WrongInput, OSError."""
        try:
            found = self._opened(block)
            with self._lock:
                if block not in self._cache:
                    self._cached += found.size
                self._cache[block] = found
                while self._cached > self._most and len(self._cache) > 1:
                    self._cached -= self._cache.popitem(last=False)[1].size
            return found
        finally:
            with self._lock:
                self._coming.pop(block, None)

    def _opened(self, block: int) -> Block:
        """A block from where it can be had. Where there are copies, a volume that cannot be read is waited for, and so are they."""
        deadline = time.monotonic() + (WITHOUT_VOLUME_SECONDS if self._sources else 0)
        while True:
            try:
                return self._tried(block)
            except OSError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_RETRY_SECONDS)

    def _tried(self, block: int) -> Block:
        file, number, offset, length = self.index.place(block)
        samples = int(self.index.counts[block])
        for source in self._sources:
            sealed = source.read(file, offset, length)
            if sealed is None:
                continue
            try:
                return decode(self.index.structure, self._seal.open(file, number, samples, sealed), samples)
            except ValueError:
                source.refuse(file)
        path = self.folder / file_name(file)
        sealed = self.volume.read(file, offset, length)
        if len(sealed) < length:
            raise WrongInput(f"{path} is cut short: it ends in block {number}; {_REMEDY}")
        try:
            return decode(self.index.structure, self._seal.open(file, number, samples, sealed), samples)
        except Broken:
            raise WrongInput(f"{path} is damaged: block {number} is not what was packed there; {_REMEDY}") from None
        except ValueError as error:
            raise WrongInput(f"{path} is damaged: block {number}: {error}; {_REMEDY}") from None


_REMEDY: Final = "copy it again from where it was packed, or pack the data set anew"


def _gather(columns: list[Column], places: list[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[Any] | None:
    """The values of a leaf as one new array; None where they have no one shape. places: of each block, the positions in the batch."""
    first = columns[0].rows
    if first is None:
        return None
    if len(columns) == 1:
        return first[rows]
    found = np.empty((len(rows), *first.shape[1:]), first.dtype)
    for column, place in zip(columns, places, strict=True):
        if column.rows is None or column.rows.shape[1:] != first.shape[1:]:
            return None
        found[place] = column.rows[rows[place]]
    return found


def _open(folder: Path, key: bytes | None) -> tuple[Index, Seal]:
    """The index of a folder, checked, and the seal of its blocks. Raises WrongInput."""
    path = folder / INDEX
    try:
        text = path.read_text()
    except FileNotFoundError:
        there = sorted(entry.parent.name for entry in folder.parent.glob(f"*/{INDEX}"))
        has = (
            f"it has {', '.join(there)}"
            if there
            else "write one there: disttrain data pack package.module:dataset FOLDER"
        )
        raise WrongInput(
            f"there is no packed data set in {folder.parent} with the split {folder.name!r}; {has}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WrongInput(f"{path}: {error}") from None
    try:
        index, signed, signature = pack_index.read(text)
    except pack_index.OtherFormat as error:
        raise WrongInput(
            f"{path} has {error}, and this trainer reads format {pack_index.FORMAT}: pack the data set with the release of the trainer"
        ) from None
    except pack_index.Damaged as error:
        raise WrongInput(f"{path} is damaged: {error}; {_REMEDY}") from None
    if index.encryption is not None and key is None:
        raise WrongInput(
            f"{path}: the data set is encrypted; set data.encryption.secretName to the Secret with its key"
        )
    if index.encryption is None and key is not None:
        raise WrongInput(f"{path}: the data set is not encrypted; pack it with --key, or leave data.encryption out")
    seal = seal_of(index.id, key)
    if seal.sign(signed) != signature:
        wrong = "the key is another one than that of the data set" if key is not None else "its signature is wrong"
        raise WrongInput(
            f"{path}: {wrong}" + ("; correct the Secret of data.encryption.secretName" if key is not None else "")
        )
    _check_files(folder, index)
    return index, seal


def _check_files(folder: Path, index: Index) -> None:
    """Every partition is there in its full length. Raises WrongInput."""
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except OSError as error:
        raise WrongInput(f"{folder}: {error.strerror or error}") from None
    for number, partition in enumerate(index.partitions):
        size = sizes.get(file_name(number))
        if size is None:
            raise WrongInput(f"{folder / file_name(number)} is missing: {_REMEDY}")
        if size != partition.size:
            raise WrongInput(f"{folder / file_name(number)} has {size} bytes, {partition.size} were packed: {_REMEDY}")
