"""The order of an epoch of a packed data set. Pure: no torch, no I/O, no clock.

Samples are stored in blocks, and a block is read, decrypted and kept as a whole. So the samples of some hundred steps must lie in few
blocks: partitions are permuted; the blocks of neighbouring partitions are; and then the samples of a *window*, some consecutive blocks of
that sequence. Who holds a partition has no part in it.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from disttrain_trainer.data.order import KeyedPermutation

MIXED = 16
"""Partitions whose blocks are permuted together."""


class _Sequence(NamedTuple):
    """An epoch's blocks in their order, and the positions at which each begins, shape (blocks + 1,)."""

    blocks: NDArray[np.int64]
    starts: NDArray[np.int64]


class BlockOrder:
    """An `Order` (order.py) for samples in blocks. An epoch costs some memory and time for each block, and none for each sample."""

    name = f"blocks-{KeyedPermutation.name}"

    def __init__(self, counts: NDArray[np.int64], borders: NDArray[np.int64], *, window: int, seed: int) -> None:
        """counts: samples of each block. borders: the first block of each partition, and the number of all blocks."""
        self._counts, self._borders = counts, borders
        self._firsts = np.concatenate(([0], np.cumsum(counts)))
        self._window, self._seed = window, seed
        self._sequence = lru_cache(maxsize=2)(self._sequence_of)

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        blocks, starts = self._sequence(epoch)
        edges = np.append(starts[: len(blocks) : self._window], starts[-1])
        windows = np.searchsorted(edges, positions, "right") - 1
        mixed = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            inside = windows == window
            low, size = int(edges[window]), int(edges[window + 1] - edges[window])
            permuted = KeyedPermutation(size, self._seed, use=(window, 3))
            mixed[inside] = low + permuted(epoch, positions[inside] - low)
        at = np.searchsorted(starts, mixed, "right") - 1
        found: NDArray[np.int64] = self._firsts[blocks[at]] + mixed - starts[at]
        return found

    def _sequence_of(self, epoch: int) -> _Sequence:
        partitions = len(self._borders) - 1
        order = KeyedPermutation(partitions, self._seed, use=(1,))(epoch, np.arange(partitions))
        groups = []
        for at in range(0, partitions, MIXED):
            together = [np.arange(self._borders[p], self._borders[p + 1]) for p in order[at : at + MIXED]]
            blocks = np.concatenate(together)
            if len(blocks):
                permuted = KeyedPermutation(len(blocks), self._seed, use=(at, 2))
                groups.append(blocks[permuted(epoch, np.arange(len(blocks)))])
        sequence = np.concatenate(groups)
        return _Sequence(sequence, np.concatenate(([0], np.cumsum(self._counts[sequence]))))
