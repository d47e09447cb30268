"""The squared norm of a vector as a sum by a fixed binary tree over its elements: the same bits however the vector is cut. Pure.

Node (level, n) is the sum of the squares of the elements [n * 2^level, (n + 1) * 2^level), in float64: the sum of its two children. An
element that is not there counts 0, which changes no sum. A server that owns a range of the vector computes the largest nodes which lie in
its range, at most two of a level (parameter_server/squares.py); the master has those of all ranges, and completes the tree. No addition
depends on the cuts. It is the order of sum_tree.py, over elements and not over parts.
"""

from collections.abc import Iterable

Node = tuple[int, int, float]
"""Level, number, sum of squares."""


def merged(nodes: Iterable[Node]) -> list[Node]:
    """The largest nodes of neighbouring ones, given in their order: siblings become their parent."""
    found: list[Node] = []
    for node in nodes:
        found.append(node)
        while len(found) > 1 and _are_siblings(found[-2], found[-1]):
            (level, number, one), (_, _, other) = found[-2:]
            found[-2:] = [(level + 1, number >> 1, one + other)]
    return found


def total(nodes: Iterable[Node]) -> float:
    """The root of the tree, of the nodes of the whole vector in any order."""
    levels: dict[int, dict[int, float]] = {}
    for level, number, square in nodes:
        levels.setdefault(level, {})[number] = square
    if not levels:
        return 0.0
    level, highest = min(levels), max(levels)
    current: dict[int, float] = {}
    while level <= highest or len(current) > 1:
        current |= levels.get(level, {})
        above: dict[int, float] = {}
        for number in sorted(current):  # the left child first
            parent = number >> 1
            above[parent] = above[parent] + current[number] if parent in above else current[number]
        level, current = level + 1, above
    return next(iter(current.values()))


def _are_siblings(one: Node, other: Node) -> bool:
    return one[0] == other[0] and not one[1] & 1 and other[1] == one[1] + 1
