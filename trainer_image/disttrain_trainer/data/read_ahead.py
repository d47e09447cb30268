"""Which parts a process will compute next, so that their samples are read before they are used. Pure, but for what it is called with."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from disttrain_trainer.data.schedule import Schedule


class ReadAhead:
    """Asks for the samples of the coming steps. It takes for granted that a process computes the same part of each step: then nothing is
    read for nothing, and otherwise something is read that is not used."""

    def __init__(self, schedule: Schedule, steps: int, read: Callable[[NDArray[np.int64]], None]) -> None:
        """schedule: one of its own, whose memory of the last positions no other disturbs. steps: how many steps ahead, at least 1."""
        self._schedule, self._steps, self._read = schedule, steps, read
        self._asked: dict[int, int] = {}
        """Of each part of a step, the last step that was asked for."""

    def __call__(self, index: int) -> None:
        """A process begins part `index`."""
        schedule = self._schedule
        step, part = divmod(index, schedule.parts_per_step)
        last = min(step + self._steps, schedule.total_steps - 1)
        asked = self._asked.get(part, step)
        for coming in range(max(step, asked if asked <= last else step) + 1, last + 1):
            self._read(schedule.part(coming * schedule.parts_per_step + part).indices)
        self._asked[part] = last
