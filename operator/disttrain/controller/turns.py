"""Fair order between namespaces: within one the first comes first, and the namespaces take turns.

So a namespace with thousands of jobs, or one whose requests are slow, delays the others by one turn and not by its whole queue.
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue of items of several namespaces."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[T]] = {}
        """By namespace; the first of the dict has the next turn. No line is empty."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def length(self, namespace: str) -> int:
        """Items of one namespace."""
        return len(self._lines.get(namespace, ()))

    def heads(self) -> Iterator[T]:
        """The oldest item of each namespace."""
        return (line[0] for line in self._lines.values())

    def append(self, namespace: str, item: T) -> None:
        self._lines.setdefault(namespace, deque()).append(item)
        self._length += 1

    def pop(self, allowed: Callable[[str], bool] = lambda _: True) -> tuple[str, T] | None:
        """The next item of the next namespace that is allowed, with its namespace; None when there is none."""
        namespace = next(filter(allowed, self._lines), None)
        if namespace is None:
            return None
        line = self._lines.pop(namespace)
        item = line.popleft()
        self._length -= 1
        if line:
            self._lines[namespace] = line  # behind all others
        return namespace, item

    def clear(self) -> None:
        self._lines.clear()
        self._length = 0


def share(total: int) -> int:
    """How many of so many places one namespace may hold at a time: all but an eighth, which is left for the others."""
    return total - max(1, total // 8) if total > 1 else total


class Slots:
    """So many may be inside at a time, of one namespace at most its share; who waits enters in the order of Turns."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._share = share(total)
        self._inside: Counter[str] = Counter()
        self._waiting: Turns[asyncio.Future[None]] = Turns()

    @contextlib.asynccontextmanager
    async def of(self, namespace: str) -> AsyncIterator[None]:
        """Waits for a slot, and holds it for the block."""
        await self._enter(namespace)
        try:
            yield
        finally:
            self._leave(namespace)

    async def _enter(self, namespace: str) -> None:
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(namespace, entered)
        self._admit()
        try:
            await entered
        except asyncio.CancelledError:
            if entered.done() and not entered.cancelled():
                self._leave(namespace)  # the slot was given and the task cancelled in the same moment
            raise

    def _admit(self) -> None:
        while self._free and (turn := self._waiting.pop(self._may_enter)):
            namespace, entered = turn
            if not entered.done():  # done: the waiter was cancelled
                self._free -= 1
                self._inside[namespace] += 1
                entered.set_result(None)

    def _may_enter(self, namespace: str) -> bool:
        return self._inside[namespace] < self._share

    def _leave(self, namespace: str) -> None:
        self._free += 1
        self._inside[namespace] -= 1
        if not self._inside[namespace]:
            del self._inside[namespace]
        self._admit()
