"""Where the time of a step goes."""

import time


class Stopwatch:
    """Counts the time between two calls to a phase of the step. For one thread; times are of time.perf_counter."""

    __slots__ = ("_seconds", "began", "now")

    def __init__(self, seconds: dict[str, float]) -> None:
        """seconds: of each phase, to be added to."""
        self._seconds = seconds
        self.began = self.now = time.perf_counter()

    def start(self) -> float:
        """A step begins; what was since the last lap counts to no phase."""
        self.began = self.now = now = time.perf_counter()
        return now

    def lap(self, phase: str, *, until: float | None = None) -> None:
        """What was since the last lap, until now or until that time, counts to this phase."""
        now = time.perf_counter() if until is None else until
        self._seconds[phase] += now - self.now
        self.now = now
