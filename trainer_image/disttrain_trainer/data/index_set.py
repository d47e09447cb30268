"""Sets of part numbers. Pure: no torch, no I/O, no clock."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IndexSet:
    """A set of part numbers, kept as merged half-open intervals: small and fast while parts come nearly in order. Not thread-safe."""

    __slots__ = ("_length", "_starts", "_stops")

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._length = 0
        for number in numbers:
            self.add(number)

    @classmethod
    def from_intervals(cls, intervals: Iterable[tuple[int, int]]) -> "IndexSet":
        """The set of these [start, stop), which must be ascending and apart; ValueError otherwise."""
        result = cls()
        last = -1
        for start, stop in intervals:
            if not last < start < stop:
                raise ValueError(f"[{start}, {stop}) is empty, or not after the interval before it")
            result._starts.append(start)
            result._stops.append(stop)
            result._length += stop - start
            last = stop
        return result

    def intervals(self) -> list[tuple[int, int]]:
        """The maximal [start, stop), ascending."""
        return list(zip(self._starts, self._stops, strict=True))

    def copy(self) -> "IndexSet":
        return IndexSet.from_intervals(self.intervals())

    def add(self, number: int) -> bool:
        """Adds the number; False when it was in the set already."""
        if number < 0:
            raise ValueError(f"part numbers begin at 0, not {number}")
        at = bisect_right(self._starts, number)
        # The interval before `at` begins at or before the number, the one at `at` after it.
        if at and number < self._stops[at - 1]:
            return False
        extends_left = at > 0 and self._stops[at - 1] == number
        extends_right = at < len(self._starts) and self._starts[at] == number + 1
        if extends_left and extends_right:
            self._stops[at - 1] = self._stops.pop(at)
            del self._starts[at]
        elif extends_left:
            self._stops[at - 1] = number + 1
        elif extends_right:
            self._starts[at] = number
        else:
            self._starts.insert(at, number)
            self._stops.insert(at, number + 1)
        self._length += 1
        return True

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._starts, number)
        return at > 0 and number < self._stops[at - 1]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield from range(start, stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexSet) and self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"IndexSet({', '.join(f'[{start}, {stop})' for start, stop in self.intervals())})"

    @property
    def floor(self) -> int:
        """The first number that is not in the set: all below are."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0

    def missing(self, upto: int) -> Iterator[int]:
        """The numbers of [0, upto) that are not in the set, ascending."""
        at = 0
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield from range(at, min(start, upto))
            at = stop
        yield from range(at, upto)

    def intersection(self, other: "IndexSet") -> "IndexSet":
        """The numbers in both."""
        both: list[tuple[int, int]] = []
        for start, stop in zip(self._starts, self._stops, strict=True):
            for i in range(bisect_right(other._stops, start), bisect_left(other._starts, stop)):
                both.append((max(start, other._starts[i]), min(stop, other._stops[i])))
        return IndexSet.from_intervals(both)
