"""The copies of a split on a worker's own disk: files as they are in the store, encrypted where those are.

A file with its name is whole: it was digested before it was renamed. What happens to it later is seen block by block, by the seals. A copy
that is being made has its whole room from the start, so that a disk that is too small is seen before the first step, also by workers that
share one.
"""

import contextlib
import enum
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from disttrain_trainer.data.pack_index import INDEX, Index, file_name
from disttrain_trainer.data.store import Folder

PIECE: Final = 1 << 20
"""Bytes that are copied at once."""
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk that has no room."""

Reader = Callable[[int, int, int], bytes | None]
"""Reads (partition, offset, length); None, or fewer bytes, where it cannot."""


class Filled(enum.Enum):
    """What became of a copy."""

    WHOLE = enum.auto()
    ABSENT = enum.auto()
    """The other place does not have it, or not all of it."""
    BROKEN = enum.auto()
    """The other place has something else."""


class CopyFolder:
    """A `Source` of the partitions that this worker has. Safe to share between threads; several processes of a pod share the folder."""

    local = True
    slow = False

    def __init__(self, path: Path, index: Index, *, on_missing: Callable[[int], None] = lambda partition: None) -> None:
        """path: of this split. on_missing: called with a partition whose copy turned out to be gone or broken."""
        self.path = path
        self._index = index
        self._on_missing = on_missing
        self._folder = Folder(path)
        self._had: set[int] = set()
        self._lock = threading.Lock()

    def has(self, partition: int) -> bool:
        """Whether the copy is there in its full length."""
        try:
            return (self.path / file_name(partition)).stat().st_size == self._index.partitions[partition].size
        except OSError:
            return False

    def read(self, partition: int, offset: int, length: int) -> bytes | None:
        """Bytes of a copy, None where there is none, or not so many."""
        if partition >= len(self._index.partitions) or offset + length > self._index.partitions[partition].size:
            return None  # another worker may ask for anything
        try:
            found = self._folder.read(partition, offset, length)
        except OSError:
            found = b""
        if len(found) == length:
            with self._lock:
                self._had.add(partition)
            return found
        with self._lock:
            lost = partition in self._had
        if lost:
            self.refuse(partition)
        return None

    def refuse(self, partition: int) -> None:
        """The copy is gone or broken: it is removed, and made again."""
        with self._lock:
            self._had.discard(partition)
        self._folder.forget(partition)
        with contextlib.suppress(OSError):
            (self.path / file_name(partition)).unlink()
        self._on_missing(partition)

    def refresh(self, partition: int) -> None:
        """Reads the file that has the name now. A file that was removed, or replaced, is otherwise read as long as it is open."""
        if self._folder.replaced(partition):
            self._folder.forget(partition)

    def is_intact(self, partition: int) -> bool:
        """Whether the copy is what was packed: reads all of it."""
        try:
            with (self.path / file_name(partition)).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self._index.partitions[partition].sha256
        except OSError:
            return False

    def missing_bytes(self, partitions: Iterable[int]) -> int:
        """How much these copies would still take: of what is reserved for them nothing."""
        return sum(self._room_of(p) for p in partitions)

    def free_bytes(self) -> int:
        """What the disk has room for. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.path).free

    def reserve(self, partitions: Iterable[int]) -> None:
        """Takes the room of these copies. Raises OSError, when the disk is full with an errno of FULL; then nothing is reserved."""
        self.path.mkdir(parents=True, exist_ok=True)
        reserved = []
        try:
            for partition in partitions:
                size = self._index.partitions[partition].size
                if size and not self.has(partition):
                    reserved.append(self._temporary(partition))
                    descriptor = os.open(reserved[-1], os.O_RDWR | os.O_CREAT, 0o600)
                    try:
                        os.posix_fallocate(descriptor, 0, size)
                    finally:
                        os.close(descriptor)
        except OSError:
            for path in reserved:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise

    def fill(self, partition: int, read: Reader) -> Filled:
        """Copies a partition from elsewhere. Raises OSError when it cannot be written, or what `read` raises."""
        wanted = self._index.partitions[partition]
        temporary, digest = self._temporary(partition), hashlib.sha256()
        self.path.mkdir(parents=True, exist_ok=True)  # a disk that was wiped
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            for offset in range(0, wanted.size, PIECE):
                length = min(PIECE, wanted.size - offset)
                data = read(partition, offset, length)
                if data is None or len(data) != length:
                    return Filled.ABSENT
                file.write(data)
                digest.update(data)
            file.truncate()
        if digest.hexdigest() != wanted.sha256:
            return Filled.BROKEN
        os.replace(temporary, self.path / file_name(partition))
        return Filled.WHOLE

    def keep_index(self, content: bytes) -> None:
        """Has the index beside the copies, too: a process that is started again needs no other place. Raises OSError."""
        path, before = self.path / INDEX, None
        with contextlib.suppress(OSError):
            before = path.read_bytes()
        if before == content:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if before is not None:  # the copies are of another data set
            for other in self.path.glob("*.blocks*"):
                other.unlink()
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def _room_of(self, partition: int) -> int:
        size = self._index.partitions[partition].size
        try:
            taken = self._temporary(partition).stat().st_blocks * 512
        except OSError:
            taken = 0
        return 0 if self.has(partition) else max(0, size - taken)

    def _temporary(self, partition: int) -> Path:
        return self.path / f"{file_name(partition)}.tmp"
