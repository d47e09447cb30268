"""The body of HELLO: a worker's identity, and what it must agree on with a server before they exchange parameters."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationError

from disttrain.api.base import Model
from disttrain.api.runtime import JobConfig
from disttrain_trainer.model.flat import Layout, Vector
from disttrain_trainer.net.frames import ProtocolError

ROUND_FIELD = "generation"
SHARD_FIELD, SHARDS_FIELD = "server", "servers"
"""How the number of the round, the shard and the number of shards are named on the wire, where release 0.1.0 named them so: there a
server held one shard, of its own number."""


MAX_HELLO = 1 << 22
"""Bytes of a HELLO: a model of many layers changes its group several times in each."""
Run = tuple[Annotated[int, Field(ge=1, le=1 << 40)], Annotated[int, Field(ge=0, le=64)]]
WireGroups = Annotated[tuple[tuple[Run, ...], ...], Field(max_length=4)]


class HelloVector(Model, extra="ignore"):  # of a worker whose image may be of a later release; so Hello
    """A vector of the worker's layout."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"]
    length: Annotated[int, Field(ge=1, le=1 << 40)]


class Hello(Model, extra="ignore"):
    """A worker introduces itself. The fields have bounds because any process may send one."""

    job_uid: Annotated[str, Field(max_length=256)]
    config_digest: Annotated[str, Field(max_length=64)]
    attempt: int
    round_number: int = Field(validation_alias=AliasChoices(ROUND_FIELD, "round_number"))
    shard: int = Field(validation_alias=AliasChoices(SHARD_FIELD, "shard"))
    """The shard that the worker asks for, and of how many."""
    shards: int = Field(validation_alias=AliasChoices(SHARDS_FIELD, "shards"))
    rank: Annotated[int, Field(ge=0, le=1 << 20)]
    incarnation: Annotated[str, Field(min_length=1, max_length=64)]
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)]
    """The server is taken for lost when it is silent for so long."""
    layout_digest: Annotated[str, Field(max_length=64)]
    vectors: Annotated[tuple[HelloVector, ...], Field(min_length=1, max_length=4)]
    total_steps: Annotated[int, Field(ge=1, lt=1 << 62)] | None = None
    """Steps of the job: a server knows no data set, and the learning rate of a step depends on them. None from an earlier release."""
    groups: WireGroups = ()
    """See parameter_groups.Groups: a server knows no names."""

    @property
    def layout(self) -> Layout:
        """The worker's model."""
        return Layout(
            vectors=tuple(Vector(dtype=v.dtype, length=v.length) for v in self.vectors), digest=self.layout_digest
        )

    def encode(self) -> bytes:
        """The body of the frame."""
        named = {ROUND_FIELD: self.round_number, SHARD_FIELD: self.shard, SHARDS_FIELD: self.shards}
        return json.dumps(self.model_dump(mode="json", exclude={"round_number", "shard", "shards"}) | named).encode()

    @classmethod
    def decode(cls, data: bytes | bytearray) -> "Hello":
        """The HELLO in this body, or ProtocolError."""
        try:
            return cls.model_validate_json(bytes(data))
        except ValidationError as error:
            raise ProtocolError(f"a HELLO is malformed: {error.errors()[0]['msg']}") from None


def config_digest(config: JobConfig) -> str:
    """sha256 over what decides the result of the training; addresses and time-outs may differ between processes."""
    decisive = config.model_dump(
        mode="json",
        exclude_defaults=True,  # a pod that was made again may have an image of a later release, which knows more fields
        include={"strategy", "trainer", "data", "workers", "processes_per_worker", "parameter_servers"},
    )
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
