"""When a job may write its progress: all jobs share one rate, and take turns.

A thousand trainings with an interval of 5 s would cost 200 writes a second, for as long as they last. Where more jobs train than the rate
allows, the interval between two writes of a job stretches; Prometheus has every figure. Not here: what is progress alone (plan/urgency.py).
"""

import asyncio

from disttrain.controller.record import LONG_AGO, JobRecord

PROGRESS_WRITES_PER_SECOND = 20.0
"""Status writes for progress alone, of the whole operator."""


class ProgressTurns:
    """The turns, in the order in which the jobs had something to write."""

    def __init__(self) -> None:
        self._last = LONG_AGO

    def of(self, record: JobRecord) -> float:
        """The moment of the job's turn, by the loop's clock; the same until its status is written."""
        if record.progress_turn is None:
            self._last = max(self._last + 1 / PROGRESS_WRITES_PER_SECOND, asyncio.get_running_loop().time())
            record.progress_waits(self._last)
            return self._last
        return record.progress_turn
