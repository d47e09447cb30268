"""The work queue: client-go's semantics in asyncio. Keys, not events; a burst of events for one job is one pass.

- A key is handed out to one worker at a time. Added again meanwhile, it is handed out once more when that worker is done with it.
- `add_after` keeps one timer a key, the earliest; a pass ends it, since the pass says again when to look.
- `add_rate_limited` waits longer with every failure in a row, until `forget`.
- `hold` keeps a key back for a while, whatever is added meanwhile.
- Namespaces take turns, and one namespace does not occupy all workers.
Not here: what a key means.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from disttrain.controller.turns import Turns

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 60.0


class ShutDown(Exception):
    """The queue hands out nothing any more."""


class WorkQueue(Generic[K]):
    """A queue of keys for one event loop; not thread-safe. `most_each`: keys of one namespace in work at a time, None for any number."""

    def __init__(
        self,
        *,
        namespace: Callable[[K], str] = lambda _: "",
        most_each: int | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._namespace = namespace
        self._most_each = most_each
        self._jitter = jitter
        self._ready: Turns[K] = Turns()
        self._since: dict[K, float] = {}
        """When each key that waits (in `_ready`, or for its worker to be done) was added."""
        self._processing: set[K] = set()
        self._in_work: Counter[str] = Counter()
        """How many of each namespace are processed."""
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._held: dict[K, float] = {}
        """Until when keys are kept back."""
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False

    def __len__(self) -> int:
        return len(self._since)

    def add(self, key: K) -> None:
        if self._closed or key in self._since:
            return
        if (held := self._held_for(key)) > 0:
            self.add_after(key, held)
            return
        self._since[key] = asyncio.get_running_loop().time()
        if key not in self._processing:
            self._hand_in(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Adds the key later, or when it was to be added anyway, whichever is sooner."""
        loop = asyncio.get_running_loop()
        if self._closed:
            return
        seconds = max(seconds, self._held_for(key))
        if seconds <= 0:
            self.add(key)
            return
        if timer := self._timers.get(key):
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._due, key)

    def add_rate_limited(self, key: K) -> None:
        """Adds the key after a pause that doubles with each failure, with jitter so that what failed together does not retry together."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        pause = min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 30), LONGEST_BACKOFF_SECONDS)
        self.add_after(key, pause * (0.75 + 0.5 * self._jitter()))

    def hold(self, key: K, seconds: float) -> None:
        """Adds the key after so many seconds, at most a minute, and in no case before; also what was added of it while in work."""
        self._held[key] = asyncio.get_running_loop().time() + min(seconds, LONGEST_BACKOFF_SECONDS)
        if key in self._processing:
            self._since.pop(key, None)
        if timer := self._timers.pop(key, None):
            timer.cancel()
        self.add_after(key, 0.0)

    def forget(self, key: K) -> None:
        """The key is well again: its next failure waits shortly."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key; `done` must follow. Raises ShutDown."""
        while (turn := self._ready.pop(self._may_work)) is None:
            if self._closed:
                raise ShutDown
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                waiter.cancel()
                self._wake()  # the wake-up may have been meant for us
                raise
        namespace, key = turn
        del self._since[key]
        self._processing.add(key)
        self._in_work[namespace] += 1
        if timer := self._timers.pop(key, None):
            timer.cancel()
        return key

    def done(self, key: K) -> None:
        self._processing.remove(key)
        namespace = self._namespace(key)
        self._in_work[namespace] -= 1
        if not self._in_work[namespace]:
            del self._in_work[namespace]
        if key in self._since:
            self._hand_in(key)
        elif self._ready:
            self._wake()  # another key of this namespace may have waited for its share

    def oldest(self) -> float:
        """Seconds that the key that came first has waited for a worker, 0 when none does."""
        now = asyncio.get_running_loop().time()
        return max((now - self._since[key] for key in self._ready.heads()), default=0.0)

    def shut_down(self) -> None:
        """What waits is dropped, what is in work may end."""
        self._closed = True
        self._ready.clear()
        self._since.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._held.clear()
        while self._waiters:
            self._wake()

    def _held_for(self, key: K) -> float:
        until = self._held.get(key)
        if until is None:
            return 0.0
        left = until - asyncio.get_running_loop().time()
        if left <= 0:
            del self._held[key]
        return left

    def _may_work(self, namespace: str) -> bool:
        return self._most_each is None or self._in_work[namespace] < self._most_each

    def _hand_in(self, key: K) -> None:
        self._ready.append(self._namespace(key), key)
        self._wake()

    def _due(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
