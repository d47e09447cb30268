"""Sets of pod indexes as short text, such as "0-2,5" (as Job's completedIndexes). Not for anything but indexes."""

from collections.abc import Iterable


def format_indexes(indexes: Iterable[int]) -> str:
    """The ranges of the indexes, in order; "" for none."""
    ranges: list[tuple[int, int]] = []
    for index in sorted(set(indexes)):
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def parse_indexes(text: str) -> frozenset[int]:
    """The indexes of `format_indexes`."""
    indexes: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        indexes.update(range(int(first), int(last or first) + 1))
    return frozenset(indexes)
