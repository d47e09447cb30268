"""Opening a split of a packed data set: its index, verified, and what is wrong with it in one line."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from disttrain_trainer.data import pack_index
from disttrain_trainer.data.pack_index import INDEX, Index, file_name
from disttrain_trainer.data.sealing import Seal, seal_of
from disttrain_trainer.data.store import Store
from disttrain_trainer.errors import DataUnreadable, TrainerError, WrongInput

REMEDY: Final = "copy it again from where it was packed, or pack the data set again"
_MISTAKES: Final = frozenset({errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""Errors that another try does not cure: what is there must be changed."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A split whose index was verified."""

    content: bytes
    """Of index.json."""
    index: Index
    seal: Seal
    """Of its blocks."""


class Source(Protocol):
    """A copy of a partition, on this worker's disk or another's. Safe to share between threads."""

    local: bool
    """On this worker's own disk."""

    @property
    def slow(self) -> bool:
        """It did not answer lately: it is asked after the others."""

    def read(self, partition: int, offset: int, length: int) -> bytes | None:
        """Bytes of a partition's file; None when this source does not have them."""

    def refuse(self, partition: int) -> None:
        """What it gave of this partition was broken."""


class Copies(Protocol):
    """The copies of the workers (net/copies.py)."""

    def open(self, store: Store, key: bytes | None) -> Opened:
        """The split of a store, from a copy of the index where there is one. Raises WrongInput, DataUnreadable."""

    def of(self, split: str, partition: int) -> Sequence[Source]:
        """The copies of a partition, in the order in which they are asked."""


class Reading:
    """What `disttrain_trainer.data:packed` reads from in this process."""

    url: str | None = None
    """data.url of the job."""
    copies: Copies | None = None


def open_store(store: Store, key: bytes | None) -> Opened:
    """The split of a store, whose partitions are there in full length. Raises WrongInput, DataUnreadable."""
    try:
        content = store.index()
    except FileNotFoundError:
        there = store.neighbours()
        folder = store.where().rstrip("/").rpartition("/")[0]
        has = (
            f"it has {', '.join(there)}; pack this one, too: disttrain data pack package.module:dataset FOLDER --split {store.split}"
            if there
            else "write one there: disttrain data pack package.module:dataset FOLDER"
        )
        raise WrongInput(f"there is no packed data set in {folder} with the split {store.split!r}; {has}") from None
    except OSError as error:
        raise unreadable(store, INDEX, error) from None
    opened = verified(content, store.where(INDEX), key, split=store.split)
    try:
        sizes = store.sizes([file_name(number) for number in range(len(opened.index.partitions))])
    except OSError as error:
        raise unreadable(store, "", error) from None
    for number, partition in enumerate(opened.index.partitions):
        size, path = sizes.get(file_name(number)), store.where(file_name(number))
        if size is None:
            raise WrongInput(f"{path} is missing: {REMEDY}")
        if size != partition.size:
            raise WrongInput(f"{path} has {size} bytes, {partition.size} were packed: {REMEDY}")
    return opened


def verified(content: bytes, where: str, key: bytes | None, *, split: str) -> Opened:
    """An index that is whole, signed with this key, and of this split. where: how messages call it. Raises WrongInput."""
    try:
        index, signed, signature = pack_index.read(content.decode())
    except pack_index.OtherFormat as error:
        raise WrongInput(
            f"{where} has {error}, and this trainer reads format {pack_index.FORMAT}: pack the data set with the release of the trainer"
        ) from None
    except (pack_index.Damaged, UnicodeDecodeError) as error:
        raise WrongInput(f"{where} is damaged: {error}; {REMEDY}") from None
    if index.encryption is not None and key is None:
        raise WrongInput(
            f"{where}: the data set is encrypted; set data.encryption.secretName to the Secret with its key"
        )
    if index.encryption is None and key is not None:
        raise WrongInput(f"{where}: the data set is not encrypted; pack it with --key, or leave data.encryption out")
    seal = seal_of(index.id, key)
    if seal.sign(signed) != signature:
        if key is None:
            raise WrongInput(f"{where}: its signature is not that of its content; {REMEDY}")
        raise WrongInput(
            f"{where}: the key is another one than that of the data set; correct the Secret of data.encryption.secretName"
        )
    if index.split != split:
        raise WrongInput(
            f"{where} is the index of the split {index.split!r}, in the folder of {split!r}: give each folder the name of its split"
        )
    return Opened(content, index, seal)


def unreadable(store: Store, name: str, error: OSError) -> TrainerError:
    """What to raise for a file that cannot be read: a mistake of the user's, or something that another try may cure."""
    why = error.strerror or str(error) or type(error).__name__
    if error.errno in _MISTAKES or isinstance(error, PermissionError):
        return WrongInput(
            f"{store.where(name)} cannot be read: {why}; let the user of the trainer read data.{store.kind.lower()}"
        )
    return DataUnreadable(
        f"{store.where(name)} cannot be read: {why}; it is tried again: look at data.{store.kind.lower()}"
    )
