"""The body of FOLLOW: a primary introduces itself and the snapshot that it sends to the copy of its shard."""

from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from disttrain.api.base import Model
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.model.flat import DTYPES, Layout, Vector
from disttrain_trainer.net.frames import ProtocolError
from disttrain_trainer.parameter_server.identity import HelloVector, WireGroups
from disttrain_trainer.parameter_server.shard_file import ShardFile

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Missed = tuple[Count, Count, Count]


class SnapshotTensor(Model, extra="ignore"):
    """One of the tensors that follow, in this order."""

    name: Annotated[str, Field(max_length=64)]
    dtype: Literal["float32", "float64", "bfloat16", "float16"]
    length: Annotated[int, Field(ge=0, le=1 << 40)]


class Follow(Model, extra="ignore"):
    """The fields have bounds because any process may send one."""

    job_uid: Annotated[str, Field(max_length=256)]
    config_digest: Annotated[str, Field(max_length=64)]
    attempt: int
    round_number: Count
    shard: Annotated[int, Field(ge=0, le=1 << 20)]
    shards: Count
    server: Annotated[int, Field(ge=0, le=1 << 20)]
    """The primary."""
    term: Count
    layout_digest: Annotated[str, Field(max_length=64)]
    vectors: Annotated[tuple[HelloVector, ...], Field(min_length=1, max_length=4)]
    version: Count
    first: Count
    """The version with which the round began."""
    norm: float | None = None
    """Of the gradient that led to the version, before the clip; None where the master does not know it."""
    applied: tuple[tuple[Count, Count], ...]
    groups: WireGroups = ()
    optimizer: Annotated[str, Field(max_length=64)]
    updates: Count
    missed: tuple[tuple[Missed, ...], ...]
    tensors: Annotated[tuple[SnapshotTensor, ...], Field(max_length=64)]
    kept: Annotated[int, Field(ge=0, le=16)]
    """How many buffers of steps come after the tensors."""

    @classmethod
    def decode(cls, data: bytes | bytearray) -> "Follow":
        """The FOLLOW in this body, or ProtocolError."""
        try:
            return cls.model_validate_json(bytes(data))
        except ValidationError as error:
            raise ProtocolError(f"a FOLLOW is malformed: {error.errors()[0]['msg']}") from None

    @property
    def layout(self) -> Layout:
        vectors = tuple(Vector(dtype=v.dtype, length=v.length) for v in self.vectors)
        return Layout(vectors=vectors, digest=self.layout_digest)

    def file(self, tensors: dict[str, torch.Tensor]) -> ShardFile:
        """The snapshot as a file holds it."""
        return ShardFile(
            layout=self.layout,
            server=self.shard,
            servers=self.shards,
            version=self.version,
            applied=IndexSet.from_intervals(self.applied),
            optimizer=self.optimizer,
            updates=self.updates,
            missed=self.missed,
            tensors=tensors,
        )

    def empty(self) -> dict[str, torch.Tensor]:
        """Memory for the tensors, with any content. ProtocolError when they are no part of this layout: of a stranger."""
        most = 12 * sum(vector.length * DTYPES[vector.dtype].itemsize for vector in self.vectors)
        if sum(tensor.length * DTYPES[tensor.dtype].itemsize for tensor in self.tensors) > most:
            raise ProtocolError("a FOLLOW has more tensors than a shard of its layout")
        return {one.name: torch.empty(one.length, dtype=DTYPES[one.dtype]) for one in self.tensors}
