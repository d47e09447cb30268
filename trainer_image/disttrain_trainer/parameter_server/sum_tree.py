"""The order in which the gradients of a step are added up: a fixed binary tree over the numbers of its parts. Pure.

A sum of floating-point numbers depends on the order of the additions. In this tree the order follows from the number of parts alone, so
that it is bitwise the same for any number of workers and any order of arrival. Node (level, n) is the sum of the parts
[n * 2^level, (n + 1) * 2^level): 6 parts make ((0 + 1) + (2 + 3)) + (4 + 5). A node is added to its sibling as soon as both are there, so
that few gradients wait in memory, and when the last part comes, at most log2(parts) additions are left. It is also pairwise summation,
whose rounding error grows with log2(parts) (Higham, "The accuracy of floating point summation", 1993).
"""


class SumTree:
    """The sum of one step."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._complete: set[tuple[int, int]] = set()
        """Nodes (level, number) whose parts are all there and whose siblings are not."""

    def arrive(self, part: int) -> list[tuple[int, int]]:
        """Part `part` of the step is there. Returns the additions that it allows: (a, b) for "add b to a", in this order.

        A node is named by its first part. So the whole sum is that of part 0.
        """
        additions = []
        level, number = 0, part
        while 1 << level < self._parts:
            sibling = number ^ 1
            if sibling << level < self._parts:  # else the sum passes up as it is
                if (level, sibling) not in self._complete:
                    self._complete.add((level, number))
                    break
                self._complete.remove((level, sibling))
                left = min(number, sibling)
                additions.append((left << level, (left + 1) << level))
            level, number = level + 1, number >> 1
        return additions
