"""The copy of a shard becomes a checkpoint's file."""

from dataclasses import dataclass
from pathlib import Path

from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.parameter_server.shard_file import ShardFile


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedShard:
    """What a checkpoint's manifest says of a shard."""

    digest: str
    """Of the file."""
    version: int
    applied: IndexSet
    """The parts in it."""


class NotFinite(Exception):
    """A parameter is NaN or infinite."""


def write(file: ShardFile, path: Path) -> SavedShard:
    """Writes a copy, durable when this returns.

    Raises OSError when the file cannot be written, NotFinite when there is nothing worth writing: a finite loss may have a gradient that
    is not.
    """
    if not file.is_finite():
        raise NotFinite("a parameter is not finite")
    return SavedShard(digest=file.save(path), version=file.version, applied=file.applied)
