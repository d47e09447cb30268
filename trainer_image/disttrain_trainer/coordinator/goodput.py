"""Where the time of an attempt went, in seconds that only grow: starting, productive, redone, stalled.

Pure: the time between two looks (scrapes) goes to what the job is seen doing. While the step does not change it is held back: a step may
last longer than the time between two looks, and only its end, or its loss, tells what it was. Prometheus and the operator get the same
numbers; the operator adds those of all masters and the time without one (plan/goodput.py).
"""

from datetime import UTC, datetime

from disttrain.api.runtime import Progress, TimeSpent

PATIENCE = 60.0
"""Seconds without a step, and without anybody to wait for, after which a job counts as stalled, at least ..."""
MANY_STEPS = 10
"""... and so many of its mean steps."""


class Goodput:
    """The work queue of one master."""

    def __init__(self, now: float, *, steps_done: int = 0) -> None:
        """steps_done: those of the attempts before; up to there steps are done again."""
        self._began = datetime.now(UTC).replace(microsecond=0)
        self.seconds = dict.fromkeys(("starting", "productive", "redone", "stalled"), 0.0)
        self._looked = now
        self._started = self._finished = False
        self._held = 0.0
        """Seconds since the step changed that are in no bucket yet."""
        self._stalling = False
        self._step = 0
        self._highest = steps_done
        self._moved = False
        """Whether a step of this attempt was seen."""
        self._done = 0
        """Steps behind the productive seconds."""

    def look(self, progress: Progress, now: float) -> None:
        """The progress at a moment; `now` is of a monotonic clock."""
        if self._finished:
            return
        self._held += max(0.0, now - self._looked)
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
        elif self._stalling or progress.waiting_for is not None or self._held > self._patience():
            self._book("stalled")
            self._stalling = True
        if step != self._step:
            self._stalling = False
        self._step, self._highest = step, max(self._highest, step)

    @property
    def spent(self) -> TimeSpent:
        """All of it, for the operator."""
        seconds = {f"{bucket}_seconds": value for bucket, value in self.seconds.items()}
        return TimeSpent(began=self._began, undecided_seconds=self._held, **seconds)

    def _book(self, bucket: str) -> None:
        self.seconds[bucket] += self._held
        self._held = 0.0

    def _patience(self) -> float:
        mean = self.seconds["productive"] / self._done if self._done else 0.0
        return max(PATIENCE, MANY_STEPS * mean)
