"""How long the last files of a job are tried for, its last checkpoint and its model, and how the process ends that cannot write them.

Any other checkpoint may be abandoned: the training goes on, and the next one has all that was in it. After the last one comes nothing,
so a job without it is not done.
"""

import time
from collections.abc import Callable
from typing import ClassVar

from disttrain_trainer.errors import CRASHED, TrainerError

RETRY_SECONDS = 5.0
"""Seconds between two tries."""
GIVE_UP_SECONDS = 120.0
"""Seconds from the first failure on in which room may be made on the volume."""


class Unsaved(TrainerError):
    """The last checkpoint, or the model, cannot be written. Retryable, and counted, so that a full volume fails the job in the end."""

    exit_code: ClassVar = CRASHED  # type: ignore[assignment]

    def __init__(self, step: int, why: str, what: str = "last checkpoint") -> None:
        super().__init__(f"the {what}, of step {step}, cannot be written: {why}; tried for {GIVE_UP_SECONDS:g} s")


def insist(what: str, step: int, attempt: Callable[[], str | None], *, over: Callable[[float], bool]) -> bool:
    """Calls `attempt` until it returns no error: True. Raises Unsaved when it fails for too long.

    over: waits so many seconds, and says whether the file is no longer wanted; then False.
    """
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while (error := attempt()) is not None:
        if time.monotonic() > deadline:
            raise Unsaved(step, error, what)
        if over(RETRY_SECONDS):
            return False
    return True
