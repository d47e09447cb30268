"""The abort of the groups that end no wait by themselves: NCCL's, of which a mesh has one for each axis.

Torch's own order of aborts is one after the other within a NCCL group call (github.com/pytorch/pytorch/issues/119797): an abort of one
communicator may wait for the peers' abort of the same one, so that two processes with two orders wait for one another. Here each has its
own thread.
"""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from torch.distributed import distributed_c10d

from disttrain_trainer.parallel import backend

LIMIT_SECONDS: Final = 30.0
"""For all aborts together, before the round is left; what is left of them goes on in its thread."""


class Abortable(Protocol):
    """A torch.distributed.ProcessGroup."""

    def abort(self) -> object:
        """Ends its operations. May block, until the peers abort, too."""


def foreign(groups: Mapping[Any, tuple[str, Any]]) -> list[Any]:
    """Of groups with the name of their backend, the newest first, those that are not of ours, whose connections end every wait."""
    return [group for group, (name, _) in reversed([*groups.items()]) if name != backend.NAME]


def of_this_process() -> list[Any]:
    """The groups of this process that have to be aborted. Torch has no public list of them."""
    return foreign(dict(distributed_c10d._world.pg_map))


def start(groups: Sequence[Abortable]) -> list[threading.Thread]:
    """Begins the aborts of all groups. Does not block."""
    threads = [threading.Thread(target=_abort, args=(group,), name="abort", daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    return threads


def finish(threads: Sequence[threading.Thread], *, seconds: float = LIMIT_SECONDS) -> bool:
    """Waits for them, so long at most. Returns whether all are done."""
    last = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, last - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _abort(group: Abortable) -> None:
    with contextlib.suppress(RuntimeError):  # it is aborted already
        group.abort()
