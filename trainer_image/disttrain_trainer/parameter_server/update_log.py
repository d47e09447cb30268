"""The log of a shard's updates on its way to the copy of the shard on another server (docs/design/0011).

A record is what the copy does after the primary: one optimiser step with a sum of gradients, parts that count without one, or the
buffers of a step. A log begins with a snapshot of the shard. It is *complete* once the copy has the snapshot and all that came
meanwhile; from then on the primary tells no worker of an update that the copy does not have.
"""

import threading
from collections import deque
from dataclasses import dataclass

from disttrain_trainer.parameter_server.participation import Took
from disttrain_trainer.parameter_server.shard import Buffers

MOST_WAITING = 8
"""Records that may wait while the snapshot is sent; then pushes wait, so that memory is bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One change of a shard. Exactly one of `parts`, `kept` and `complete` is given."""

    parts: tuple[int, int] | None = None
    """The parts [first, stop) that count from now on."""
    gradient: Buffers | None = None
    """Their sum, in the dtypes in which gradients are summed; None for parts without samples."""
    scale: float = 1.0
    """What the sum is multiplied by in the optimiser's step."""
    rate: float = 1.0
    """What the learning rate is multiplied by."""
    norm: float | None = None
    """Of the gradient before the clip, where that is known to the master: a copy that is promoted says it to the next one."""
    took: Took = None
    """The elements that the step changes."""
    kept: tuple[int, bytes | bytearray] | None = None
    """The buffers of a step."""
    complete: bool = False
    """From here on the copy is complete."""


class UpdateLog:
    """Records that the copy does not have yet. Guarded by the lock of `changed`, the condition of the shard's host."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._waiting: deque[Record] = deque()
        self.made = 0
        """Records so far."""
        self._copied = 0
        self._complete = False
        self.over = False
        """The copy was lost, or is not wanted any more."""

    def add(self, record: Record) -> None:
        """A change of the shard, in the order of the changes."""
        self._waiting.append(record)
        self.made += 1
        self._changed.notify_all()

    def has(self, made: int) -> bool:
        """Whether workers may hear of the first `made` records."""
        return self.over or (self._copied >= made if self._complete else len(self._waiting) <= MOST_WAITING)

    def next(self) -> Record | None:
        """The oldest record that the copy does not have; None when there is none. Makes the log complete when the copy has all."""
        if not self._waiting and not self._complete:
            self._complete = True
            self.add(Record(complete=True))
        return self._waiting[0] if self._waiting else None

    def copied(self) -> Record:
        """The copy has the oldest record, which is returned."""
        self._copied += 1
        self._changed.notify_all()
        return self._waiting.popleft()

    def end(self) -> None:
        """Nothing more goes to the copy, and no worker waits for it."""
        self.over = True
        self._waiting.clear()
        self._changed.notify_all()
