"""How often a callback reports: reading a loss from a GPU waits for the GPU, and a step may take microseconds. Imports no torch."""

import time
from collections.abc import Callable
from typing import Any

from disttrain_trainer import session

REPORT_SECONDS = 0.5
"""Seconds between two reports, at least."""


class Pace:
    """Adds up what is trained between two reports. Used by one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = 0.0
        self._samples = 0

    def report(self, *, step: int, loss: Any, samples: int, total_steps: int | None, last: bool = False) -> None:
        """Reports if it is time. loss: of the newest batch, a number or a tensor, read only where it is reported. last: in any case."""
        self._samples += samples
        now = self._clock()
        if now < self._next and not last:
            return
        self._next = now + REPORT_SECONDS
        count, self._samples = self._samples, 0
        session.report(step=step, loss=loss, samples=count, total_steps=total_steps)


def batch_size(batch: Any) -> int:
    """Samples of a batch: the length of the first tensor in it; 0 where there is none."""
    if hasattr(batch, "shape"):
        return int(batch.shape[0]) if len(batch.shape) else 0
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, list | tuple) else ()
    return next((size for value in values if (size := batch_size(value))), 0)
