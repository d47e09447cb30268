"""Where the files of a split of a packed data set lie: the index and the partitions. A folder here; a URL is in url_store.py."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from disttrain_trainer.data.pack_index import INDEX, file_name

_OPEN_FILES: Final = 256


class Store(Protocol):
    """The files of one split. Its methods raise OSError, and are safe to share between threads."""

    split: str
    """train or test."""
    kind: str
    """volume or URL: what it is called."""

    def where(self, name: str = "") -> str:
        """How messages call a file, or all of them: a path or a URL."""

    def index(self) -> bytes:
        """The content of index.json. Raises FileNotFoundError when there is none."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """The bytes of those of these files that are there."""

    def neighbours(self) -> list[str]:
        """The splits that lie beside this one, for a message."""

    def read(self, partition: int, offset: int, length: int) -> bytes:
        """Bytes of a partition's file, fewer where it ends."""


class Folder:
    """A `Store` of the volume, or of the copies on a worker's own disk. Keeps files open; they are closed with this object."""

    kind = "volume"

    def __init__(self, path: Path) -> None:
        self.path, self.split = path, path.name
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    def where(self, name: str = "") -> str:
        return str(self.path / name)

    def index(self) -> bytes:
        return (self.path / INDEX).read_bytes()

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path)}

    def neighbours(self) -> list[str]:
        return sorted(entry.parent.name for entry in self.path.parent.glob(f"*/{INDEX}"))

    def read(self, partition: int, offset: int, length: int) -> bytes:
        with self._lock:
            descriptor = self._open.get(partition)
            if descriptor is None:
                if len(self._open) >= _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                descriptor = self._open[partition] = os.open(self.path / file_name(partition), os.O_RDONLY)
            # Within the lock: another thread could close the file. Blocks are small, and most of them are in the page cache.
            try:
                return os.pread(descriptor, length, offset)
            except OSError:
                # A stale handle stays stale: the next try opens the file again.
                os.close(self._open.pop(partition))
                raise

    def forget(self, partition: int) -> None:
        """Closes a file: what has its name now may be another one."""
        with self._lock:
            descriptor = self._open.pop(partition, None)
            if descriptor is not None:
                os.close(descriptor)

    def replaced(self, partition: int) -> bool:
        """Whether a file that is open is no longer the one that has its name: it was removed, or another one took its place."""
        with self._lock:
            descriptor = self._open.get(partition)
            if descriptor is None:
                return False
            try:
                return not os.path.samestat(os.fstat(descriptor), os.stat(self.path / file_name(partition)))
            except OSError:
                return True


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
