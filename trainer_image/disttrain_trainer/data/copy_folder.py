"""The copies of partitions on a worker's own disk: files as they are on the volume, encrypted where those are.

A file with its name is whole: it was digested before it was renamed. What happens to it later is seen block by block, by the seals.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from disttrain_trainer.data.pack_index import Index, file_name
from disttrain_trainer.data.packed_dataset import Folder

PIECE = 1 << 20
"""Bytes that are copied at once."""

Reader = Callable[[int, int, int], bytes | None]
"""Reads (partition, offset, length); None, or fewer bytes, where it cannot."""


class CopyFolder:
    """A `Source` of the partitions that this worker has. Safe to share between threads; several processes of a pod share the folder."""

    def __init__(self, root: Path, index: Index, *, on_missing: Callable[[int], None] = lambda partition: None) -> None:
        """root: this worker's own. on_missing: called with a partition whose copy turned out to be gone or broken. Raises OSError."""
        self.path = root / index.id.hex()
        self.path.mkdir(parents=True, exist_ok=True)
        self._index = index
        self._on_missing = on_missing
        self._folder = Folder(self.path)
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
        """The copy is gone or broken: it is removed, and made anew."""
        with self._lock:
            self._had.discard(partition)
        self._folder.forget(partition)
        with contextlib.suppress(OSError):
            (self.path / file_name(partition)).unlink()
        self._on_missing(partition)

    def missing_bytes(self, partitions: list[int]) -> int:
        """How much these copies would still take."""
        return sum(self._index.partitions[p].size for p in partitions if not self.has(p))

    def free_bytes(self) -> int:
        """What the disk has room for."""
        return shutil.disk_usage(self.path).free

    def fill(self, partition: int, read: Reader) -> bool:
        """Copies a partition from elsewhere; whether it is whole. Raises OSError when it cannot be written."""
        wanted = self._index.partitions[partition]
        temporary = self.path / f".{file_name(partition)}.{secrets.token_hex(4)}.tmp"
        digest = hashlib.sha256()
        try:
            self.path.mkdir(parents=True, exist_ok=True)  # a disk that was wiped
            with temporary.open("xb") as file:
                for offset in range(0, wanted.size, PIECE):
                    length = min(PIECE, wanted.size - offset)
                    data = read(partition, offset, length)
                    if data is None or len(data) != length:
                        return False
                    file.write(data)
                    digest.update(data)
            if digest.hexdigest() != wanted.sha256:
                return False
            os.replace(temporary, self.path / file_name(partition))
            return True
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
