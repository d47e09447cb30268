"""What a connection tells its shard: who the worker is, the head of a gradient, and how long it may wait."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disttrain_trainer.parameter_server.participation import Took

if TYPE_CHECKING:
    from disttrain_trainer.parameter_server.shares import PackedShare


@dataclass(eq=False, slots=True)
class Session:
    """A worker as one connection knows it: another connection of the same worker is another session."""

    rank: int
    incarnation: str
    share: "PackedShare | None" = None
    """Of a rank of a group; None: the worker has the whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The header of a pushed gradient."""

    index: int
    """Number of the part."""
    samples: int
    batch_samples: int
    clock: int
    """The worker's iteration."""
    version: int
    """Version of the parameters that it is of."""
    weight: float | None = None
    """The weight that the loss returned with its mean; None: the number of samples."""
    norm: float | None = None
    """Async with a clip: that of the whole gradient."""
    took: Took = None
    """The elements of the shard that it is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How a request waits for others."""

    timeout_seconds: float
    """After these it is refused."""
    heartbeat_seconds: float
    still_waiting: Callable[[str], None]
    """Called with the reason every `heartbeat_seconds`, without a lock."""
