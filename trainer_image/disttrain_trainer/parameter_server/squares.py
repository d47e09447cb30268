"""A shard's nodes of the tree by which the squared norm of a gradient is added up (model/square_tree.py).

Each addition is one of torch's on pairs of elements, so that no vector unit and no number of threads decides about the order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from disttrain_trainer.model.square_tree import Node, merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Squares:
    """A shard's part of the squared norm of a sum of gradients."""

    nodes: list[list[Node]]
    """For each vector, of the values of the sum."""
    scale: float
    """What the values are multiplied by to be the sum; the same on all shards."""


def nodes_of(blocks: Iterable[torch.Tensor], start: int) -> list[Node]:
    """The largest nodes of neighbouring elements, the first of which is element `start` of the vector. Blocks may have any lengths, which
    change no node."""
    found: list[Node] = []
    for block in blocks:
        found = merged(found + _in_order(block, start))
        start += block.numel()
    return found


def _in_order(values: torch.Tensor, start: int) -> list[Node]:
    """The largest nodes of one block, by their elements."""
    squares = values.double()
    squares = squares * squares
    left: list[Node] = []
    right: list[Node] = []
    level = 0
    while squares.numel():
        if start & 1:
            left.append((level, start, float(squares[0])))
            squares, start = squares[1:], start + 1
        if squares.numel() & 1:
            right.append((level, start + squares.numel() - 1, float(squares[-1])))
            squares = squares[:-1]
        squares = squares[0::2] + squares[1::2]
        level, start = level + 1, start >> 1
    return left + right[::-1]
