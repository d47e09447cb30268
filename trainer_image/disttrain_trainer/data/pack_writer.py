"""Writing a packed data set: one sample after the other, one block in memory, all files or none."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from disttrain_trainer.data.pack_index import INDEX, Index, Partition, file_name
from disttrain_trainer.data.sample_format import Structure, Unstorable, bytes_of, encode, structure_of
from disttrain_trainer.data.sealing import Seal, seal_of
from disttrain_trainer.errors import WrongInput

BLOCK: Final = 256 << 10
"""Bytes of a block: as many samples as fit, or one. From 64 KiB on AES has its full speed; a larger block is more to read for a sample."""
WINDOW: Final = 32
"""Blocks that are mixed in the order of an epoch."""
_MOST_BYTES: Final = (1 << 31) - 64
"""Of a block: what AES-GCM seals at once."""


def write(
    dataset: Any,
    folder: Path,
    *,
    split: str,
    partitions: int,
    key: bytes | None,
    what: str,
    on_sample: Callable[[int], None] = lambda done: None,
) -> Index:
    """Packs a map-style data set into a folder, which must not be there yet; it appears when it is complete. Raises WrongInput, OSError,
    and what the data set raises.

    what: the data set's name, for messages. on_sample: called with the number of samples that are done.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        index, seal = _write(
            dataset, temporary, split=split, partitions=partitions, key=key, what=what, on_sample=on_sample
        )
        _durable(temporary / INDEX, index.write(seal).encode())
        _sync(temporary)
        os.rename(temporary, folder)  # fails where another one has come there meanwhile
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def _write(
    dataset: Any,
    folder: Path,
    *,
    split: str,
    partitions: int,
    key: bytes | None,
    what: str,
    on_sample: Callable[[int], None],
) -> tuple[Index, Seal]:
    data_set, samples = secrets.token_bytes(16), len(dataset)
    seal = seal_of(data_set, key)
    structure: Structure | None = None
    written = []
    for number in range(partitions):
        with (folder / file_name(number)).open("xb") as file:
            writer = _PartitionWriter(file, number, seal)
            for i in range(samples * number // partitions, samples * (number + 1) // partitions):
                try:
                    sample = dataset[i]
                    found = structure_of(sample)
                    if structure is not None and found != structure:
                        raise Unstorable(f"sample is {found}, those before it are {structure}: all must be alike")
                    structure = found
                    writer.add(structure, sample)
                except Unstorable as error:
                    raise WrongInput(f"{what}: {str(error).replace('sample', f'sample {i}', 1)}; {_STORABLE}") from None
                on_sample(i + 1)
            written.append(writer.finish(structure))
            file.flush()
            os.fsync(file.fileno())
    assert structure is not None  # there is a sample
    return Index(data_set, split, structure, tuple(written), WINDOW, seal.name), seal


_STORABLE: Final = (
    "what can be stored: tensors, numpy arrays, numbers, text, bytes, None, and tuples, lists and dicts of these"
)


class _PartitionWriter:
    """One file."""

    def __init__(self, file: Any, number: int, seal: Seal) -> None:
        self._file, self._number, self._seal = file, number, seal
        self._digest = hashlib.sha256()
        self._blocks: list[tuple[int, int]] = []
        self._samples: list[Any] = []
        self._size = 0

    def add(self, structure: Structure, sample: Any) -> None:
        size = bytes_of(sample)
        if size > _MOST_BYTES:
            raise Unstorable(f"sample has {size} bytes, and a block at most {_MOST_BYTES}")
        if self._samples and self._size + size > BLOCK:
            self._flush(structure)
        self._samples.append(sample)
        self._size += size

    def finish(self, structure: Structure | None) -> Partition:
        if self._samples and structure is not None:
            self._flush(structure)
        return Partition(tuple(self._blocks), self._digest.hexdigest())

    def _flush(self, structure: Structure) -> None:
        count = len(self._samples)
        sealed = self._seal.close(self._number, len(self._blocks), count, encode(structure, self._samples))
        self._file.write(sealed)
        self._digest.update(sealed)
        self._blocks.append((count, len(sealed)))
        self._samples, self._size = [], 0


def _durable(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
