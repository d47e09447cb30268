"""Virtual time, and processes in it: each process is an event loop of its own, which can be frozen (SIGSTOP) and killed (SIGKILL).

One thread runs everything, in the order of time and of registration: the same inputs give the same run to the last callback.
"""

import asyncio
import contextlib
import heapq
import itertools
from asyncio.events import _set_running_loop as set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any

BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Timer:
    """A callback that is due at a moment, or at once."""

    __slots__ = ("_arguments", "_callback", "_context", "_when", "process")

    def __init__(
        self,
        when: float,
        process: "Process | None",
        callback: Callable[..., object],
        arguments: tuple[Any, ...],
        context: Context | None = None,
    ) -> None:
        self._when, self.process, self._callback, self._arguments = when, process, callback, arguments
        self._context = context
        """None: that of the one who runs it."""

    def when(self) -> float:
        return self._when

    def cancel(self) -> None:
        self._callback = _nothing

    def cancelled(self) -> bool:
        return self._callback is _nothing

    def run(self) -> None:
        if self._context is None:
            self._callback(*self._arguments)
        else:
            self._context.run(self._callback, *self._arguments)


def _nothing(*_: object) -> None:
    pass


class World:
    """The clock, and what is due when. Moments are seconds since the beginning."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Timer]] = []
        self._ready: deque[Timer] = deque()
        self._numbers = itertools.count()
        self.errors: list[str] = []
        """What no task of a process handled."""
        self.coroutines: list[Coroutine[Any, Any, Any]] = []
        """Of all tasks that ever were."""

    def clock(self) -> datetime:
        return BEGIN + timedelta(seconds=self.now)

    def stamp(self) -> str:
        """The time of day as Kubernetes writes it."""
        return self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    def after(self, seconds: float, callback: Callable[..., object], *arguments: Any) -> Timer:
        """Something outside of all processes happens later."""
        return self.add(Timer(self.now + seconds, None, callback, arguments))

    def dispose(self) -> None:
        """Closes what was left in the middle; Python would do so at any time, and complain."""
        for coroutine in self.coroutines:
            with contextlib.suppress(BaseException):
                coroutine.close()
        self.coroutines.clear()
        self._due.clear()
        self._ready.clear()

    def add(self, timer: Timer) -> Timer:
        if timer.when() <= self.now:
            self._ready.append(timer)
        else:
            heapq.heappush(self._due, (timer.when(), next(self._numbers), timer))
        return timer

    def run(self, until: Callable[[], bool], *, most: float) -> bool:
        """Runs until a condition holds, which is looked at whenever time advances; False when it did not by the moment `most`."""
        ready, due = self._ready, self._due
        running: Process | None = None
        try:
            while True:
                while ready:
                    timer = ready.popleft()
                    process = timer.process
                    if process is not None:
                        if process.frozen or not process.alive:
                            process.keep(timer)
                            continue
                        if process is not running:
                            set_running_loop(process)
                            running = process
                    elif running is not None:
                        set_running_loop(None)
                        running = None
                    timer.run()
                if until():
                    return True
                if not due or due[0][0] > most:
                    return False
                self.now = due[0][0]
                while due and due[0][0] <= self.now:
                    ready.append(heapq.heappop(due)[2])
        finally:
            set_running_loop(None)


class Process(asyncio.AbstractEventLoop):
    """The event loop of one process; what asyncio, and the operator, ask of a loop, and no sockets."""

    def __init__(self, world: World, name: str, *, ahead: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.frozen = False
        self._ahead = timedelta(seconds=ahead)
        """Of its time of day."""
        self._kept: list[Timer] = []
        """What became due while it was frozen."""

    def clock(self) -> datetime:
        return self.world.clock() + self._ahead

    def kill(self) -> None:
        """Nothing of it runs any more, not even to put something in order."""
        self.alive = False
        self._kept.clear()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        kept, self._kept = self._kept, []
        for timer in kept:
            self.world.add(timer)

    def keep(self, timer: Timer) -> None:
        if self.alive:
            self._kept.append(timer)

    # What asyncio asks for

    def time(self) -> float:
        return self.world.now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Timer:  # type: ignore[override]
        return self.world.add(Timer(self.world.now, self, callback, args, context))

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Timer:
        return self.world.add(Timer(self.world.now + delay, self, callback, args, context))

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Timer:
        return self.world.add(Timer(when, self, callback, args, context))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:  # type: ignore[override]
        self.world.coroutines.append(coro)
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self.alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.alive and error is not None:
            self.world.errors.append(f"{self.name}: {context['message']}: {type(error).__name__}: {error}")
