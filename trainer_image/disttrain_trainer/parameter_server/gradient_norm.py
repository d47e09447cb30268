"""The norm of the gradient that a synchronous step was made of, from the parts of it that the servers hold.

No worker has that gradient: it is summed on the servers, a part on each. Each server measures its part now and then, and the master
adds the squares up (coordinator/servers.py). All servers measure at multiples of a power of two of the version, so that they have versions
in common, however often each measures.
"""

import math
import time
from collections import deque
from collections.abc import Callable

INTERVAL_SECONDS = 0.5
"""Between two measurements, about: each reads the whole gradient once more."""
_KEPT = 2
"""Measurements that a server tells: one of them is of a version that the slowest server has, too."""


class NormSamples:
    """The measurements of one server. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._every = 1
        self._last = clock()
        self._samples: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def due(self, version: int) -> bool:
        """Whether the update that leads to this version is to be measured."""
        return version % self._every == 0

    def add(self, version: int, squared: float) -> None:
        """The squared norm of this server's part."""
        now = self._clock()
        if now - self._last < INTERVAL_SECONDS:
            self._every *= 2
        elif now - self._last > 4 * INTERVAL_SECONDS and self._every > 1:
            self._every //= 2
        self._last = now
        if math.isfinite(squared):  # JSON has no infinity
            self._samples.append((version, squared))

    @property
    def newest(self) -> tuple[tuple[int, float], ...]:
        """Versions and squared norms, the newest last."""
        return tuple(self._samples)
