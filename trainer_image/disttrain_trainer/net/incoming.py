"""The messages that a process may send to the master, and their check before the coordinator gets them, so that it need not check.

A peer that sends anything else loses its connection, without an effect on others. The fields have bounds because any process may connect.
"""

from datetime import datetime
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from disttrain.api.runtime import ProgressModel, RestartsInPlace
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Index = Annotated[int, Field(ge=0, le=1 << 20)]
Name = Annotated[str, Field(max_length=256)]
Digest = Annotated[str, Field(max_length=64)]
Evaluation = dict[Name, float]
Samples = Annotated[int, Field(ge=1, lt=1 << 62)]
Number = Annotated[float, Field(allow_inf_nan=False, gt=-(1 << 62), lt=1 << 62)]
"""A count as a user's script may report it."""


def _in_order(intervals: list[list[int]]) -> list[list[int]]:
    IndexSet.from_intervals((start, stop) for start, stop in intervals)
    return intervals


def _is_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Parts = Annotated[list[Annotated[list[Count], Field(min_length=2, max_length=2)]], AfterValidator(_in_order)]


NormSamples = Annotated[
    list[Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=2, max_length=2)]],
    Field(max_length=8),
]
"""Versions and squared norms."""
FinalLosses = Annotated[
    list[Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]],
    Field(max_length=1 << 16),
]
"""Number, weighted loss and weight of parts."""


class _Incoming(BaseModel):
    """Unknown fields may hold anything. Strict, so that a check here holds for the message as it came: the coordinator gets the dict."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


Shape = TypeVar("Shape", bound=_Incoming)


Shards = Annotated[
    list[Annotated[list[Count | bool], Field(min_length=4, max_length=4)]] | None,
    Field(max_length=1 << 12),
]
"""What a server holds: shard, term, whether it serves it, whether it has all of it. None of an earlier release."""


class _Restarts(_Incoming):
    """A disttrain.api.runtime.RestartsInPlace, also of a later version."""

    pod: Annotated[str, Field(min_length=1, max_length=64)]
    restarts: Count
    failures: Count
    exit_code: Annotated[int, Field(ge=0, le=255)]
    message: Name
    time: Annotated[str, AfterValidator(_is_time)]

    @property
    def value(self) -> RestartsInPlace:
        return RestartsInPlace.model_validate(self.model_dump())


class Hello(_Incoming):
    """The first message of a process."""

    type: Literal["hello"]
    job: Name
    attempt: Count
    role: Name
    rank: Annotated[int, Field(ge=0, le=1 << 20)]
    incarnation: Annotated[str, Field(min_length=1, max_length=64)]
    agent: bool = False
    code: Digest | None = None
    code_admitted: bool = False
    session: bool = False
    token: Annotated[str, Field(max_length=64)] = ""
    state: Literal["starting", "ready", "running", "done"] = "ready"
    round_number: Count = Field(0, alias="generation")
    step: Annotated[int, Field(ge=-1, lt=1 << 62)] = -1
    checkpoint: Count | None = None
    evaluation: Evaluation | None = None
    model: ProgressModel | None = None
    samples: Samples | None = None
    fingerprint: Digest | None = None
    order: Digest | None = None
    layout: Digest | None = None
    members: Count = 0
    buffers: bool = False
    keeps_model: bool = False
    applied: Parts = []
    ahead: Count = 0
    shards: Shards = None
    restarts: _Restarts | None = None


class _Ready(_Incoming):
    step: Annotated[int, Field(ge=-1, lt=1 << 62)] = -1
    checkpoint: Count | None = None
    samples: Samples | None = None
    fingerprint: Digest | None = None
    order: Digest | None = None
    layout: Digest | None = None
    buffers: bool = False
    keeps_model: bool = False


class _Failed(_Incoming):
    message: str = ""


class _Nan(_Incoming):
    step: Count


class _Report(_Incoming):
    step: Number | None = None
    samples: Number | None = None
    loss: float | None = None
    weight: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None
    epoch: Count | None = None
    total_steps: Count | None = None
    final: FinalLosses = []
    round_number: Count | None = Field(None, alias="generation")
    world: Count | None = None


class _Evaluated(_Incoming):
    lease: str | None = Field(None, alias="stay")
    evaluation: Evaluation | None = None
    model: ProgressModel | None = None


class _Saved(_Incoming):
    step: Count | None = None
    time: Annotated[str, AfterValidator(_is_time)] | None = None
    asked: bool = False
    error: str | None = None
    id: Name = ""
    file: Name = ""
    digest: Digest = ""
    shard: Index | None = None
    applied: Parts = []


class _Copied(_Incoming):
    id: Name
    shard: Index | None = None


class _State(_Incoming):
    id: Count | None = None
    round_number: Count = Field(alias="generation")
    applied: Parts
    ahead: Count = 0
    shards: Shards = None
    max_staleness_seen: Count | None = None
    gradient_norms: NormSamples = []


class _Copy(_Incoming):
    round_number: Count = Field(alias="generation")
    shard: Index
    term: Count
    server: Index
    complete: bool


class _Request(_Incoming):
    lease: Name = Field(alias="stay")
    count: Count
    done: list[Count]


class _Nothing(_Incoming):
    pass


_SHAPES: dict[str, type[_Incoming]] = {
    MessageType.BEAT: _Nothing,
    MessageType.LEAVING: _Nothing,
    MessageType.FAILED: _Failed,
    MessageType.NAN: _Nan,
    MessageType.REPORT: _Report,
    MessageType.READY: _Ready,
    MessageType.DONE: _Evaluated,
    MessageType.COPIED: _Copied,
    MessageType.SAVED: _Saved,
    MessageType.STATE: _State,
    MessageType.COPY: _Copy,
    MessageType.REQUEST: _Request,
    MessageType.EVALUATED: _Evaluated,
}


def parse_hello(message: Message) -> Hello:
    """The HELLO of a connection. Raises ValueError that says what is wrong with it."""
    return _shaped(Hello, message)


def parse(message: Message) -> Message:
    """The message, when it is one that a process says to the master. Raises ValueError that says what is wrong with it."""
    shape = _SHAPES.get(message["type"])
    if shape is None:
        raise ValueError(f"a master takes no message of type {message['type']!r:.40}")
    _shaped(shape, message)
    return message


def _shaped(shape: type[Shape], message: Message) -> Shape:
    try:
        return shape.model_validate(message)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{message['type']!r:.40}: {where}: {first['msg']}") from None
