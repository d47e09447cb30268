"""Which workers keep a copy of a partition. Pure: every process computes the same, and no process is asked.

Rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM ToN 1998): a partition is kept by
the workers whose hashes with it are the highest. With one worker more or less only the copies move that it holds.
"""

import numpy as np
from numpy.typing import NDArray

_STEP = 0x9E3779B97F4A7C15


def holders(data_set: bytes, partition: int, *, workers: int, copies: int) -> list[int]:
    """The workers that keep a partition, the first choice first: `copies` of them, or all. data_set: its id, 16 bytes."""
    of_partition = _mixed(np.array([int.from_bytes(data_set[:8], "little")], np.uint64), partition)
    scores = _mixed(_mixed(np.arange(workers, dtype=np.uint64), 0) ^ of_partition, 0)
    found: list[int] = np.argsort(~scores, kind="stable")[:copies].tolist()
    return found


def _mixed(numbers: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    found = numbers + np.uint64(_STEP * (salt + 1) & (1 << 64) - 1)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))
