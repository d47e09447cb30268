"""How long the last checkpoint of a job is tried for, and how the process ends that cannot write it.

Any other checkpoint may be given up: the training goes on, and the next one has all that was in it. After the last one comes nothing,
so a job without it is not done.
"""

from typing import ClassVar

from disttrain_trainer.errors import CRASHED, TrainerError

PAUSE = 5.0
"""Seconds between two tries."""
PATIENCE = 120.0
"""Seconds from the first failure on in which somebody may make room on the volume."""


class Unsaved(TrainerError):
    """The last checkpoint cannot be written. Retryable, and counted, so that a volume that stays full fails the job in the end."""

    exit_code: ClassVar = CRASHED  # type: ignore[assignment]

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"the last checkpoint, of step {step}, cannot be written: {why}; tried for {PATIENCE:g} s")
