"""The messages that a process may send to the master, and their check before the coordinator gets them, so that it need not check.

A peer that sends anything else loses its connection, without an effect on others. The fields have bounds because any process may connect.
"""

from datetime import datetime
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from disttrain.api.runtime import ProgressModel, RestartsInPlace
from disttrain.api.values import MOST_VALUES
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Index = Annotated[int, Field(ge=0, le=1 << 20)]
Name = Annotated[str, Field(max_length=256)]
Digest = Annotated[str, Field(max_length=64)]
Evaluation = dict[Name, float]
Samples = Annotated[int, Field(ge=1, lt=1 << 62)]
Number = Annotated[float, Field(allow_inf_nan=False, gt=-(1 << 53), lt=1 << 53)]
"""A count as a user's script may report it. The bound is that of a count in a report of the master (api.runtime.NonNegative)."""


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
Sums = Annotated[
    dict[Name, Annotated[list[float], Field(min_length=2, max_length=2)]],
    Field(max_length=MOST_VALUES),
]
"""By name: value x weight, and weight."""
FinalValues = Annotated[
    list[Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], Sums], Field(strict=False)]],  # JSON has lists
    Field(max_length=1 << 16),
]
"""Number of a part, and the sums of its values."""


class _Incoming(BaseModel):
    """Unknown fields may hold anything. Strict, so that a check here holds for the message as it came: the coordinator gets the dict."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


Shape = TypeVar("Shape", bound=_Incoming)


Shards = Annotated[
    list[Annotated[list[Count | bool], Field(min_length=4, max_length=4)]] | None,
    Field(max_length=1 << 12),
]
"""What a server holds: shard, term, whether it serves it, whether it has all of it. None of an earlier release."""


Node = Annotated[list[Count | float], Field(min_length=3, max_length=3)]
"""Level, number, sum of squares: see model/square_tree.py."""


class _Norm(_Incoming):
    shard: Index
    term: Count
    version: Count
    norm: float | None = None
    scale: float = 1.0
    nodes: Annotated[list[Annotated[list[Node], Field(max_length=256)]], Field(max_length=8)] = []


class _Norms(_Incoming):
    round_number: Count = Field(alias="generation")
    norms: Annotated[list[_Norm], Field(max_length=1 << 12)]


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


class _Nan(_Incoming):
    step: Count
    round_number: Count | None = Field(None, alias="generation")
    lease: Name | None = Field(None, alias="stay")
    parts: Annotated[list[Count], Field(max_length=1 << 17)] = []


class _Found(_Incoming):
    """What a rank found in an evaluation between two steps."""

    round_number: Count = Field(alias="generation")
    step: Count
    number: Index = Field(alias="slice")
    of: Annotated[int, Field(ge=1, le=1 << 20)]
    evaluation: Evaluation
    weights: Evaluation | None = None


class _Begun(_Incoming):
    """The parts that a worker of parameter servers may have begun."""

    round_number: Count = Field(alias="generation")
    lease: Name = Field(alias="stay")
    servers: Annotated[list[Name], Field(max_length=1 << 12)]
    parts: Annotated[list[Count], Field(min_length=1, max_length=1 << 13, alias="slices")]


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
    course: Course | None = None
    found: _Found | None = None
    nan: _Nan | None = None
    evaluation: Evaluation | None = None
    model: ProgressModel | None = None
    samples: Samples | None = None
    fingerprint: Digest | None = None
    order: Digest | None = None
    layout: Digest | None = None
    repeats_data: bool = False
    members: Count = 0
    buffers: bool = False
    keeps_model: bool = False
    begun: _Begun | None = None
    applied: Parts = []
    ahead: Count = 0
    shards: Shards = None
    norms: Annotated[list[_Norm], Field(max_length=1 << 12)] = []
    restarts: _Restarts | None = None
    formation: Name | None = None
    awaits_group: bool = False


class _Ready(_Incoming):
    step: Annotated[int, Field(ge=-1, lt=1 << 62)] = -1
    checkpoint: Count | None = None
    course: Course | None = None
    samples: Samples | None = None
    fingerprint: Digest | None = None
    order: Digest | None = None
    layout: Digest | None = None
    repeats_data: bool = False
    buffers: bool = False
    keeps_model: bool = False
    begun: _Begun | None = None
    round_number: Count = Field(0, alias="generation")
    formation: Name | None = None


class _Failed(_Incoming):
    message: str = ""


class _Report(_Incoming):
    step: Number | None = None
    samples: Number | None = None
    loss: float | None = None
    weight: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None
    epoch: Count | None = None
    total_steps: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None
    final: FinalLosses = []
    values: Sums | None = None
    final_values: FinalValues = []
    phases: Annotated[dict[Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(max_length=16)] | None = (
        None
    )
    gradient_norm: float | None = None
    round_number: Count | None = Field(None, alias="generation")
    world: Count | None = None
    output: bool = False


class _Evaluated(_Incoming):
    lease: str | None = Field(None, alias="stay")
    evaluation: Evaluation | None = None
    model: ProgressModel | None = None
    round_number: Count | None = Field(None, alias="generation")
    step: Count | None = None
    number: Index | None = Field(None, alias="slice")
    of: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    weights: Evaluation | None = None
    course: Course | None = None
    begun: bool = False
    missing: bool = False
    stop: Name | None = None


class _Saved(_Incoming):
    step: Count | None = None
    time: Annotated[str, AfterValidator(_is_time)] | None = None
    asked: bool = False
    best: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
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
    norms: Annotated[list[_Norm], Field(max_length=1 << 12)] = []


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
    MessageType.AWAITS_GROUP: _Nothing,
    MessageType.DONE: _Evaluated,
    MessageType.COPIED: _Copied,
    MessageType.SAVED: _Saved,
    MessageType.STATE: _State,
    MessageType.COPY: _Copy,
    MessageType.NORM: _Norms,
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
