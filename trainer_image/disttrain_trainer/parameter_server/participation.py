"""Which elements of a shard took part in an update, and how many updates the others have missed. Pure: sorted, disjoint intervals.

torch.optim leaves a parameter alone whose gradient is None: no decay, no momentum, no step counted. A server knows no parameters, only
vectors, so a worker names the elements that had a gradient; what no worker's gradient of a step names is left as it is.
"""

from collections.abc import Sequence
from itertools import pairwise

Interval = tuple[int, int]
"""Elements [start, stop)."""
Took = tuple[tuple[Interval, ...], ...] | None
"""For each vector of a shard the elements that took part; None: all of them."""
Missed = tuple[tuple[int, int, int], ...]
"""For elements [start, stop) the updates that they have missed; 0 elsewhere."""


def union(one: Took, other: Took, lengths: Sequence[int]) -> Took:
    """What took part in one or the other, for vectors of these lengths."""
    if one is None or other is None:
        return None
    merged = tuple(_merged([*a, *b]) for a, b in zip(one, other, strict=True))
    whole = all(part == ((0, length),) or not length for part, length in zip(merged, lengths, strict=True))
    return None if whole else merged


def within(runs: Sequence[tuple[int, int, int]], spans: Sequence[Interval]) -> tuple[tuple[int, int, int], ...]:
    """The runs (vector, start, stop) of a model as those of a shard, which owns these spans of the vectors; counted from their start."""
    found = []
    for vector, start, stop in runs:
        first, last = spans[vector]
        if (low := max(start, first)) < (high := min(stop, last)):
            found.append((vector, low - first, high - first))
    return tuple(found)


def took_of(runs: Sequence[tuple[int, int, int]], lengths: Sequence[int]) -> Took:
    """What these runs of a shard say. Raises ValueError for elements that are not there."""
    parts: list[list[Interval]] = [[] for _ in lengths]
    for vector, start, stop in runs:
        if not (vector < len(lengths) and start < stop <= lengths[vector]):
            raise ValueError(f"elements {start} to {stop} of vector {vector} are not of this shard")
        parts[vector].append((start, stop))
    return union(tuple(() for _ in lengths), tuple(map(tuple, parts)), lengths)


def after(missed: Missed, took: Sequence[Interval], length: int) -> Missed:
    """The misses after an update in which these elements of a vector took part."""
    result: list[tuple[int, int, int]] = []
    for start, stop, before, part in _cut(missed, took, length):
        count = before + (not part)
        if count and result and result[-1][1:] == (start, count):
            result[-1] = (result[-1][0], stop, count)
        elif count:
            result.append((start, stop, count))
    return tuple(result)


def to_update(missed: Missed, took: Sequence[Interval], length: int) -> list[tuple[int, int, int]]:
    """(start, stop, misses so far) of the elements that take part in an update."""
    return [(start, stop, count) for start, stop, count, part in _cut(missed, took, length) if part]


def _merged(intervals: list[Interval]) -> tuple[Interval, ...]:
    result: list[Interval] = []
    for start, stop in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


def _cut(missed: Missed, took: Sequence[Interval], length: int) -> list[tuple[int, int, int, bool]]:
    """A vector in pieces (start, stop, misses, whether it takes part)."""
    edges = sorted(
        {0, length, *(edge for start, stop, _ in missed for edge in (start, stop)), *(e for i in took for e in i)}
    )
    segments, misses, parts = [], list(missed), list(took)
    for start, stop in pairwise(edges):
        while misses and misses[0][1] <= start:
            misses.pop(0)
        while parts and parts[0][1] <= start:
            parts.pop(0)
        count = misses[0][2] if misses and misses[0][0] <= start else 0
        segments.append((start, stop, count, bool(parts) and parts[0][0] <= start))
    return segments
