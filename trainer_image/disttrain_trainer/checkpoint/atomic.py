"""The one way in which a file of a checkpoint is written: whole or not at all, durable, digested in the same pass."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class Sink:
    """Where the bytes of a file go."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Appends the bytes. Raises OSError."""
        self._file.write(data)
        self._digest.update(data)

    @property
    def sha256(self) -> str:
        """The digest of all bytes up to now, in hex."""
        return self._digest.hexdigest()


def write(path: Path, fill: Callable[[Sink], None]) -> str:
    """Has `fill` write a temporary file, then renames it to `path`; the sha256 of the file in hex.

    When it returns, the file survives a crash of the machine. Raises OSError; then `path` is as it was. Several processes may write the
    same path at once: each has a temporary file of its own, and the last rename holds.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            sink = Sink(file)
            fill(sink)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return sink.sha256


def sync_folder(folder: Path) -> None:
    """Puts the folder's entries on the disk; without it a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
