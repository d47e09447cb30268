"""Time that jumps to the next timer when there is nothing else to do: for tests of what waits for long."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any


class HandTurnedLoop(asyncio.SelectorEventLoop):
    """A loop that jumps to the next timer when nothing else is left to do."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        if not self._ready and timers:  # type: ignore[attr-defined]
            self.now = max(self.now, min(timers))
        super()._run_once()  # type: ignore[misc]


def hand_turned(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test on such a loop."""

    @functools.wraps(test)
    def run(*args: Any, **more: Any) -> None:
        with asyncio.Runner(loop_factory=HandTurnedLoop) as runner:
            runner.run(test(*args, **more))

    # pytest-asyncio takes a function that wraps a coroutine for one, and pytest finds the arguments of a test on the wrapped one.
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    del run.__wrapped__  # type: ignore[attr-defined]
    return run


def now() -> float:
    return asyncio.get_running_loop().time()
