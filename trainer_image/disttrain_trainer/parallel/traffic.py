"""Bytes that the operations of a group move through this rank: the least that each of them needs, whatever gloo's algorithm adds.

An all-reduce of B bytes over n ranks sends and receives 2 B (n - 1) / n on each of them, as a ring does; an all-gather, a reduce-scatter
and an all-to-all half of that. What frames the data, and what a tree passes on for others, is not counted.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch

_WAYS_ROUND: Final = {
    "allreduce": 2,
    "allreduce_coalesced": 2,
    "all_gather_single": 1,
    "all_gather_single_coalesced": 1,
    "allgather": 1,
    "allgather_coalesced": 1,
    "reduce_scatter": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_single_coalesced": 1,
    "all_to_all_single": 1,
    "alltoall": 1,
}
"""How often the whole goes round the ranks: every rank sends and receives its share of (n - 1) / n."""
_TO_ROOT, _FROM_ROOT = frozenset({"reduce", "gather"}), frozenset({"broadcast", "scatter"})


class Traffic:
    """Bytes that operations send and receive, counted when they start; they only grow."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0

    def count(self, operation: str, rank: int, size: int, arguments: Sequence[Any]) -> None:
        """Adds an operation of this rank: the name and the arguments are those of c10d's Backend."""
        moved = _bytes_of(arguments[0])
        if len(arguments) > 2:  # an output and an input: the larger one is the whole
            moved = max(moved, _bytes_of(arguments[1]))
        if ways := _WAYS_ROUND.get(operation):
            share = ways * moved * (size - 1) // size
            self.sent += share
            self.received += share
        elif operation == "send":
            self.sent += moved
        elif operation == "recv":
            self.received += moved
        elif operation in _TO_ROOT | _FROM_ROOT:
            is_root = rank == arguments[-1].rootRank
            if is_root and operation in ("gather", "scatter"):
                moved = moved * (size - 1) // size  # its own part stays
            if is_root == (operation in _FROM_ROOT):
                self.sent += moved
            else:
                self.received += moved


def _bytes_of(argument: Any) -> int:
    """Of a tensor, or of lists of tensors; 0 for what is neither."""
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    if isinstance(argument, list | tuple):
        return sum(_bytes_of(item) for item in argument)
    return 0
