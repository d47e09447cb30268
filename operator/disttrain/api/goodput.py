"""Where the time of a training goes: one rule, for Prometheus and for status.goodput.

The master counts by it, second by second (`MasterGoodput`). Prometheus reads these numbers, and the report at /progress has them as
`TimeSpent`. The operator books each report into the status (`booked`): the seconds that the status does not have yet, in the same buckets.
Only the time without a master is the operator's own count (plan/goodput.py). Pure: the caller has the clocks.
"""

from datetime import datetime
from typing import Final

from disttrain.api.runtime import Progress, TimeSpent
from disttrain.api.status import MasterTime

BUCKETS: Final = ("starting", "stalled", "redone", "productive")
"""The buckets of a master, as Prometheus names them; a field of TimeSpent and of status.goodput ends in _seconds. In this order `booked`
leaves out what the status had already given to the job's state while no report came."""
STALL_SECONDS: Final = 60.0
"""Without a step, and with no process to wait for, a job counts as stalled after this time, at least ..."""
STALL_STEPS: Final = 10
"""... and after as many of its mean steps."""


class MasterGoodput:
    """The count of one master, from its start. While the step does not change, the time since is in no bucket: a step may last longer
    than the time between two looks, and only its end, or its loss, shows what the time was."""

    def __init__(self, now: float, *, began: datetime, steps_done: int = 0) -> None:
        """`now`: of the monotonic clock of `look`; `began`: the same moment of the wall clock. `steps_done`: steps of the attempts before;
        up to there steps are done again."""
        self._began = began
        self.seconds = dict.fromkeys(("starting", "productive", "redone", "stalled"), 0.0)
        """Seconds in each bucket; they only grow."""
        self._looked = now
        self._started = self._finished = False
        self._undecided = 0.0
        """Seconds since the step changed that are in no bucket yet."""
        self._stalling = False
        self._step = 0
        self._highest = steps_done
        self._moved = False
        """Whether a step of this attempt was seen."""
        self._done = 0
        """Steps behind the productive seconds."""

    def look(self, progress: Progress, now: float) -> None:
        """Counts the time since the last look, by the progress at `now`. After a finished progress nothing counts."""
        if self._finished:
            return
        self._undecided += max(0.0, now - self._looked)
        self._looked, self._finished = now, progress.finished
        step = progress.step
        # A checkpoint that was found is no step of this attempt.
        self._started = self._started or progress.samples_per_second is not None
        self._moved = self._moved or (self._started and step > self._step)
        if not self._moved:
            self._book("starting")
        elif step > self._highest:
            self._done += step - self._highest
            self._book("productive")
        elif step != self._step:
            self._book("redone")
        elif progress.finished:
            self._book("productive")  # the evaluation, the last checkpoint
        elif self._stalling or progress.waiting_for is not None or self._undecided > self._stalls_after():
            self._book("stalled")
            self._stalling = True
        if step != self._step:
            self._stalling = False
        self._step, self._highest = step, max(self._highest, step)

    @property
    def spent(self) -> TimeSpent:
        """The count as the master reports it."""
        seconds = {f"{bucket}_seconds": value for bucket, value in self.seconds.items()}
        return TimeSpent(began=self._began, undecided_seconds=self._undecided, **seconds)

    def _book(self, bucket: str) -> None:
        self.seconds[bucket] += self._undecided
        self._undecided = 0.0

    def _stalls_after(self) -> float:
        mean = self.seconds["productive"] / self._done if self._done else 0.0
        return max(STALL_SECONDS, STALL_STEPS * mean)


def whole(spent: TimeSpent) -> MasterTime:
    """The whole seconds of a report, as the status keeps them."""
    return MasterTime(
        began=spent.began, **{f"{name}_seconds": int(getattr(spent, f"{name}_seconds")) for name in BUCKETS}
    )


def booked(spent: TimeSpent, known: MasterTime | None, *, most: int) -> dict[str, int]:
    """The whole seconds of a report that the status does not have yet, by the fields of status.goodput; `most` in all. `known`: the last
    report of this master that was booked."""
    now = whole(spent)
    added = {f"{name}_seconds": 0 for name in BUCKETS}
    for name in added:
        added[name] = max(0, getattr(now, name) - (getattr(known, name) if known is not None else 0))
    excess = sum(added.values()) - most
    for name in added:
        if excess > 0:
            cut = min(excess, added[name])
            added[name] -= cut
            excess -= cut
    return added


def redone(productive_seconds: int, *, reached: int, back_to: int) -> int:
    """Of the productive seconds those of steps that were lost: the training fell back from one step to another. Without a master's count
    they are taken at the mean speed."""
    return productive_seconds * (reached - back_to) // reached if back_to < reached else 0
