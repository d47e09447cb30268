"""The index of a packed data set: which samples are in which block of which file. Pure.

`index.json` beside the partition files (docs/design/0008). A block's first sample and its place in the file are the sums of those before
it, so that the table has two numbers a block and none a sample.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from disttrain.api.digested import verified, with_digest
from disttrain_trainer.data.sample_format import Structure
from disttrain_trainer.data.sealing import AES, Seal

INDEX: Final = "index.json"
FORMAT: Final = 1


class Damaged(ValueError):
    """The text is no index, or not the one that was written."""


class OtherFormat(ValueError):
    """The index has a format that this version does not read."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One file."""

    blocks: tuple[tuple[int, int], ...]
    """Samples and bytes of each block, in the order of the file."""
    sha256: str
    """Of the file."""

    @property
    def samples(self) -> int:
        return sum(samples for samples, _ in self.blocks)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(size for _, size in self.blocks)


@dataclass(frozen=True)
class Index:
    """A packed data set, but for its samples."""

    id: bytes
    """16 random bytes."""
    split: str
    structure: Structure
    partitions: tuple[Partition, ...]
    window: int
    """Blocks that are mixed with one another in the order of an epoch."""
    encryption: str | None = None
    """AES-256-GCM, or None."""

    @property
    def samples(self) -> int:
        return int(self.firsts[-1])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each block, through all files."""
        return np.array([samples for part in self.partitions for samples, _ in part.blocks], np.int64)

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The number of each block's first sample, and after the last one that of all samples: shape (blocks + 1,)."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    @cached_property
    def borders(self) -> NDArray[np.int64]:
        """The number of each file's first block, and after the last one that of all blocks: shape (partitions + 1,)."""
        return np.cumsum([0, *(len(part.blocks) for part in self.partitions)])

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each block begins in its file, in bytes."""
        return np.concatenate(
            [
                np.zeros(0, np.int64),
                *(np.cumsum([0, *(size for _, size in part.blocks)])[:-1] for part in self.partitions),
            ]
        )

    def place(self, block: int) -> tuple[int, int, int, int]:
        """Of a block, numbered through all files: file, number in the file, offset and length in bytes."""
        file = int(np.searchsorted(self.borders, block, "right")) - 1
        number = block - int(self.borders[file])
        return file, number, int(self.offsets[block]), self.partitions[file].blocks[number][1]

    def write(self, signer: Seal) -> str:
        """The text of the index, which ends with its own digest."""
        content = {
            "format": FORMAT,
            "id": self.id.hex(),
            "split": self.split,
            "samples": self.samples,
            "encryption": self.encryption,
            "window": self.window,
            "structure": self.structure.to_json(),
            "partitions": [
                {"file": file_name(number), "sha256": part.sha256, "blocks": [list(block) for block in part.blocks]}
                for number, part in enumerate(self.partitions)
            ],
        }
        return with_digest(
            json.dumps({**content, "signature": signer.sign(_canonical(content))}, separators=(",", ":"))
        )


def file_name(partition: int) -> str:
    """The name of a partition's file."""
    return f"part-{partition:06d}.blocks"


def read(text: str) -> tuple[Index, str, str]:
    """The index of a text, what is signed of it, and the signature. Raises Damaged or OtherFormat."""
    try:
        content = verified(text)
        number = content["format"]
        if number != FORMAT:
            raise OtherFormat(f"format {number}")
        signature = str(content.pop("signature"))
        content.pop("digest")
        encryption = content["encryption"]
        if encryption not in (None, AES):
            raise OtherFormat(f"encryption {encryption}")
        index = Index(
            id=bytes.fromhex(content["id"]),
            split=str(content["split"]),
            structure=Structure.from_json(content["structure"]),
            partitions=tuple(_partition(number, part) for number, part in enumerate(content["partitions"])),
            window=int(content["window"]),
            encryption=encryption,
        )
        if len(index.id) != 16 or index.window < 1 or index.samples != content["samples"]:
            raise ValueError("its numbers do not fit together")
    except OtherFormat:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"it has no {error}" if isinstance(error, KeyError) else str(error)) from None
    return index, _canonical(content), signature


def _partition(number: int, described: dict[str, Any]) -> Partition:
    blocks = tuple((int(samples), int(size)) for samples, size in described["blocks"])
    digest = str(described["sha256"])
    if described["file"] != file_name(number) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"partition {number} has no file of its name and digest")
    if any(samples < 1 or size < 1 for samples, size in blocks):
        raise ValueError(f"partition {number} has an empty block")
    return Partition(blocks, digest)


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
