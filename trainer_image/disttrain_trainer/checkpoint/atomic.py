"""The one way in which a file of a checkpoint is written: whole or not at all, durable, digested in the same pass."""

import contextlib
import fcntl
import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np

from disttrain.api import digests
from disttrain.api.digests import Digest

_BLOCK = 1 << 20
"""Bytes that are digested and written at a time: they are still in the core's cache from when they were gathered."""
PAGE = 4096
"""Bytes: O_DIRECT wants memory and places in the file at multiples of it."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class Sink:
    """Where the bytes of a file go: in whole blocks, past the page cache where the file system can. To put every byte there as well would
    take several times the processor's time, and push out what is read."""

    def __init__(self, descriptor: int, digest: Digest) -> None:
        self._descriptor = descriptor
        self._digest = digest
        self._block = memoryview(mmap.mmap(-1, _BLOCK))
        """What does not lie on a page's border already."""
        self._filled = 0
        with contextlib.suppress(OSError):  # a file system without it
            self._set_direct(True)

    def write(self, data: bytes | memoryview) -> None:
        """Appends the bytes. Raises OSError."""
        rest = memoryview(data)
        while rest:
            if not self._filled and len(rest) >= _BLOCK and np.frombuffer(rest, np.uint8).ctypes.data % PAGE == 0:
                self._put(rest[:_BLOCK])
                rest = rest[_BLOCK:]
                continue
            part = rest[: _BLOCK - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == _BLOCK:
                self.flush()

    def flush(self) -> None:
        """Writes what was gathered. Raises OSError."""
        block, self._filled = self._block[: self._filled], 0
        self._put(block)

    def _put(self, rest: memoryview) -> None:
        self._digest.update(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                if not self._direct:
                    raise
                # Refused is what is no multiple of the device's block, such as the end of the file, and on some systems more. A disk that
                # is full or broken refuses again, at the latest in fsync.
                self._set_direct(False)

    def _set_direct(self, direct: bool) -> None:
        self._direct = False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        self._direct = direct


def write(path: Path, fill: Callable[[Sink], None], algorithm: str = digests.XXH3) -> str:
    """Has `fill` write a temporary file, then renames it to `path`; the digest of the file.

    When it returns, the file survives a crash of the machine. Raises OSError; then `path` is as it was. Several processes may write the
    same path at once: each has a temporary file of its own, and the last rename holds.
    """
    temporary, digest = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), Digest(algorithm)
    try:
        with temporary.open("xb", buffering=0) as file:
            sink = Sink(file.fileno(), digest)
            fill(sink)
            sink.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return str(digest)


def sync_folder(folder: Path) -> None:
    """Puts the folder's entries on the disk; without it a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
