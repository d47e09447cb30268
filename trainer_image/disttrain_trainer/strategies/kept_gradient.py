"""A gradient whose push was cut off: its worker pushes it again, and no worker computes it again.

Some servers may have it, and the worker does not know which. A script's `ps.step()` is about to return for its batch, so that no script
may get this batch again. The worker names the part in its HELLO and READY, and the master assigns it to this worker first
(docs/design/0015).
"""

from dataclasses import dataclass

from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.model.flat import Vectors
from disttrain_trainer.parameter_server.client import GradientInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Unconfirmed:
    """What `complete` was to push."""

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

    def take(self, index: int, *, resumes: bool) -> Unconfirmed | None:
        """What is kept, when it is of this part; it is kept no more. resumes: the part was in work before in this round; of another round
        its step is lost. When the master assigns another part first, the servers have this one."""
        kept, self._kept = self._kept, None
        return kept if kept is not None and resumes and kept.part.index == index else None
