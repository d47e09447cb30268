"""Simulated time, threads as generators, and connections of which messages come late or never. One seed decides all of it."""

import heapq
from collections.abc import Callable, Generator
from functools import partial
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

Call = Callable[[], object]
PEER_TIMEOUT = 30.0
"""Seconds after which an end of a connection notices at the latest that the network between them is broken."""


class Timeline:
    """Calls in the order of their time; those of the same time in the order of asking."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.now = 0.0
        self._calls: list[tuple[float, int, Call]] = []
        self._count = 0

    def at(self, time: float, call: Call) -> None:
        self._count += 1
        heapq.heappush(self._calls, (time, self._count, call))

    def after(self, seconds: float, call: Call) -> None:
        self.at(self.now + seconds, call)

    def soon(self, scale: float, call: Call) -> None:
        """After a random time: mostly about `scale` seconds, seldom ten times as long."""
        self.at(self.now + self.delay(scale), call)

    def delay(self, scale: float) -> float:
        return self.chance.random() * scale * (10 if self.chance.random() < 0.1 else 1)

    def step(self) -> bool:
        """Makes the next call; False when there is none."""
        if not self._calls:
            return False
        self.now, _, call = heapq.heappop(self._calls)
        call()
        return True


class Wait:
    """What a thread yields: it goes on with True once `ready` says so, with False after `timeout` seconds."""

    __slots__ = ("ready", "timeout")

    def __init__(self, ready: Callable[[], object], timeout: float | None = None) -> None:
        self.ready = ready
        self.timeout = timeout


def never() -> bool:
    return False


Steps = Generator[Wait, bool, T]


class Thread:
    """A thread of a simulated process. Code that changes what it may wait for calls `poke`."""

    def __init__(self, timeline: Timeline, steps: Steps[None]) -> None:
        self._timeline = timeline
        self._steps: Steps[None] | None = steps
        self._wait: Wait | None = None
        self._running = False

    def start(self) -> None:
        self._go_on(None)

    def poke(self) -> None:
        if not self._running:
            while self._wait is not None and self._wait.ready():
                self._go_on(True)

    def stop(self) -> None:
        """It makes no further step; unlike an exception, that is noticed by nothing in it."""
        self._steps = self._wait = None

    def _go_on(self, value: bool | None) -> None:
        if self._steps is None:
            return
        self._wait, self._running = None, True
        try:
            wait = self._steps.send(value)  # type: ignore[arg-type]  # None starts it
        except StopIteration:
            self._steps = None
            return
        finally:
            self._running = False
        if self._steps is None:  # it ended its own process
            return
        self._wait = wait
        if wait.timeout is not None:
            self._timeline.after(wait.timeout, partial(self._time_out, wait))
        if wait.ready():
            self._timeline.after(0, self.poke)

    def _time_out(self, wait: Wait) -> None:
        if self._wait is wait:
            self._go_on(bool(wait.ready()))


class Connection:
    """Two ends, 0 and 1, in order in each direction, as TCP.

    receive: what each end does with a message. ended: what it does once the other end is closed or the network broke; not called
    for an end that was closed itself.
    """

    def __init__(self, timeline: Timeline, scale: float) -> None:
        """scale: the usual delay of a message in seconds; one connection may be much slower than another."""
        self._timeline = timeline
        self._scale = scale * timeline.chance.choice((0.05, 0.3, 1, 3))
        self.open = [True, True]
        self.receive: list[Callable[[Any], object]] = [_ignore, _ignore]
        self.ended: list[Call] = [_nothing, _nothing]
        self._lost = [False, False]
        """Toward this end nothing arrives any more."""
        self._newest = [0.0, 0.0]
        """When the last message that is under way arrives at this end."""

    def send(self, end: int, message: Any) -> bool:
        """From this end; False when it is closed."""
        if self.open[end]:
            self._deliver(1 - end, partial(self._arrive, 1 - end, message))
        return self.open[end]

    def close(self, end: int) -> None:
        """This end is closed. What it sent still arrives, or is lost as after a reset."""
        if not self.open[end]:
            return
        self.open[end] = False
        if self._timeline.chance.random() < 0.3:
            self._lost[1 - end] = True
        self._deliver(1 - end, partial(self._end, 1 - end))

    def cut(self) -> None:
        """The network breaks: what is under way is lost, and each end notices for itself."""
        self._lost = [True, True]
        for end in (0, 1):
            self._timeline.after(self._timeline.delay(PEER_TIMEOUT / 10), partial(self._end, end))

    def _deliver(self, end: int, call: Call) -> None:
        self._newest[end] = time = max(self._newest[end], self._timeline.now + self._timeline.delay(self._scale))
        self._timeline.at(time, call)

    def _arrive(self, end: int, message: Any) -> None:
        if self.open[end] and not self._lost[end]:
            self.receive[end](message)

    def _end(self, end: int) -> None:
        if self.open[end]:
            self.open[end] = False
            self.ended[end]()


def _ignore(message: Any) -> None:
    pass


def _nothing() -> None:
    pass
