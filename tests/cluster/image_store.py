"""Where built images are kept from run to run, and how a node takes them over.

A store is a folder with the root of a containerd. Two containerds cannot share a root, and the trainer's image is too big to copy
and has too many files to link one by one. But what an image consists of, blobs and committed snapshots, is never written again:
a node gets links to these and a copy of the databases alone. The builder may add to a store meanwhile; what is in use it keeps.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_SNAPSHOTS = "io.containerd.snapshotter.v1.overlayfs"


class Store:
    """A folder of images. `root` is containerd's, `buildkit` BuildKit's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "containerd"
        self.buildkit = folder / "buildkit"

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """One builder at a time, and none while a node copies the databases. Waits for its turn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock("build", fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def unused(self) -> Iterator[bool]:
        """Whether no node uses it, and none can begin to for the block: only then may anything be deleted."""
        try:
            with self._lock("use", fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield True
        except BlockingIOError:
            yield False

    def take_over(self, root: Path) -> IO[str]:
        """Makes a containerd root with all the images. The file that it returns is to be held open while that root is in use."""
        with self._lock("build", fcntl.LOCK_SH):
            lease = self._lock("use", fcntl.LOCK_SH)
            root.mkdir(parents=True)
            for part in self.root.iterdir():
                if part.name == _SNAPSHOTS:
                    snapshots = root / part.name / "snapshots"
                    snapshots.mkdir(parents=True, mode=0o700)
                    for snapshot in (part / "snapshots").iterdir():
                        (snapshots / snapshot.name).symlink_to(snapshot)
                    shutil.copy2(part / "metadata.db", root / part.name / "metadata.db")
                    continue
                subprocess.run(["cp", "--archive", "--link", str(part), str(root)], check=True, timeout=60)
                for database in (root / part.name).glob("*.db"):
                    copy = database.with_suffix(".copy")
                    shutil.copy2(database, copy)
                    copy.rename(database)
            return lease

    def delete_if_unused(self) -> None:
        with self.unused() as unused:
            if unused:
                shutil.rmtree(self.folder, ignore_errors=True)
                for lock in self.folder.parent.glob(f"{self.folder.name}.*.lock"):
                    lock.unlink()

    def _lock(self, name: str, how: int) -> IO[str]:
        """A lock that its open file holds: closing it, or the death of the process, lets go."""
        file = self.folder.with_suffix(f".{name}.lock").open("w")
        try:
            fcntl.flock(file, how)
        except OSError:
            file.close()
            raise
        return file
