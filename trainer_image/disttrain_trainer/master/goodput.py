"""Where the time of an attempt went, in seconds that only grow: starting, productive, redone, stalled.

Pure: each look gives the time since the last one to what the job is seen doing now, so it is as fine as the looks are frequent (a scrape).
Not here: the operator's ledger in the status, which knows of queues and of earlier attempts.
"""

from disttrain.api.runtime import Progress


class Goodput:
    """The ledger of one master."""

    def __init__(self, now: float) -> None:
        self.seconds = dict.fromkeys(("starting", "productive", "redone", "stalled"), 0.0)
        self._looked = now
        self._step: int | None = None
        self._highest = 0

    def look(self, progress: Progress, now: float) -> None:
        """The progress at a moment; `now` is of a monotonic clock."""
        if not progress.finished:
            self.seconds[self._bucket(progress)] += max(0.0, now - self._looked)
        self._looked, self._step = now, progress.step
        self._highest = max(self._highest, progress.step)

    def _bucket(self, progress: Progress) -> str:
        if self._highest == 0 and progress.step == 0:
            return "starting"
        if progress.waiting_for is not None or progress.step == self._step:
            return "stalled"
        return "redone" if progress.step <= self._highest else "productive"
