"""A gradient whose push was cut off: its worker pushes it again, and nobody computes it again.

Some servers may have it, and the worker does not know which. A script's `ps.step()` is about to return for its batch, so that no script
may get this batch again. The worker names the part in its READY, and the master assigns it to this worker first (docs/design/0015).
"""

from dataclasses import dataclass

from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.model.flat import Vectors
from disttrain_trainer.net.messages import Message
from disttrain_trainer.parameter_server.client import GradientInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Unconfirmed:
    """What `complete` was to push."""

    round_number: int
    part: BatchPart
    gradients: Vectors | None
    """A copy: the model's vectors are zeroed before the next part. None: the part has no samples."""
    info: GradientInfo
    versions: tuple[int, ...]
    """Of the parameters that it is of, for each shard."""
    learns: bool
    """What `complete` returns."""


class KeptGradient:
    """Of one worker, from round to round. For the training thread."""

    def __init__(self) -> None:
        self._kept: Unconfirmed | None = None

    def keep(self, unconfirmed: Unconfirmed) -> None:
        """The push was cut off."""
        self._kept = unconfirmed

    def take(self, index: int, round_number: int) -> Unconfirmed | None:
        """What is kept, when it is of this part and round; it is kept no more. Of another round its step is lost; when the master assigns
        another part first, the servers have this one."""
        if (kept := self._kept) is None:
            return None
        self._kept = None
        return kept if (kept.part.index, kept.round_number) == (index, round_number) else None

    def describe(self) -> Message:
        """The field of READY."""
        return {} if (kept := self._kept) is None else {"begun": [kept.round_number, kept.part.index]}
