"""The order of an epoch's samples, computed for any positions of it and kept nowhere. Pure: no torch, no I/O, no clock.

A data set's layout decides which orders it can serve quickly, so each layout has its own. Map-style data has `KeyedPermutation`.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

TABLE = "table"
"""The name of numpy's shuffled table, by which checkpoints that name no order were written."""
_ROUNDS = 8
"""Of the Feistel network; an even number: the halves come back to their sides. With 6, neighbours are seen to depend on one another."""
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_HALF = np.uint64(32)


class Order(Protocol):
    """Which sample is at which position of an epoch: a bijection of [0, samples), the same in every process and after every restart."""

    @property
    def name(self) -> str:
        """What a checkpoint records, and compares: another order under the same name would repeat some samples, and skip others."""

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at these positions of an epoch, all counted from 0: two vectors of one length."""


class KeyedPermutation:
    """A pseudo-random permutation of [0, samples) for each seed and epoch. The work is linear in the positions; there is no table.

    A Feistel network on pairs (left, right) of [0, a) x [0, b), with a and b near the square root of the number of samples. What falls
    outside of [0, samples), which fewer than a of the a b pairs do, is permuted again until it falls inside: Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains" (CT-RSA 2002), their generalized Feistel cipher with cycle walking. The round function is the
    finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), keyed by a word of numpy's SeedSequence of (seed, epoch).
    """

    name = f"feistel-{_ROUNDS}"

    def __init__(self, samples: int, seed: int, *, use: tuple[int, ...] = ()) -> None:
        """samples: from 1 to 2^62. seed: 0 or more. use: of an order that has several permutations, which; the last number above 0."""
        self._seed, self._use = seed, use
        left = math.isqrt(samples - 1) + 1
        right = -(-samples // left)
        self._samples, self._pairs = samples, left * right
        self._right = np.uint64(right)
        self._sizes = (np.uint64(left), self._right) * (_ROUNDS // 2)

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        keys = (
            np.random.SeedSequence((self._seed, epoch, *self._use)).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
        )
        count = len(positions)
        # Few pairs beyond the samples are permuted along, so that a walk finds its next number and needs no pass of its own.
        beyond = np.arange(self._samples, self._pairs if self._pairs - self._samples <= count else self._samples)
        found = self._permute(np.concatenate((positions, beyond)).astype(np.uint64), keys)
        numbers, after = found[:count], found[count:]
        while (outside := np.flatnonzero(numbers >= self._samples)).size:
            walking = numbers[outside]
            numbers[outside] = after[walking - np.uint64(self._samples)] if len(after) else self._permute(walking, keys)
        return numbers.view(np.int64)

    def _permute(self, numbers: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The Feistel network on [0, a b). Each round adds a hash of the one half to the other, modulo the size of that."""
        left = numbers // self._right
        right = numbers - left * self._right
        for size, key in zip(self._sizes, keys, strict=True):
            hashed = right ^ key
            hashed *= _FACTORS[0]
            hashed ^= hashed >> _HALF
            hashed *= _FACTORS[1]
            hashed >>= _HALF
            hashed *= size  # of a hash of 32 bits the upper half of this product is even over [0, size)
            hashed >>= _HALF
            hashed += left
            np.minimum(hashed, hashed - size, out=hashed)  # modulo size: below it the difference wraps to a huge number
            left, right = right, hashed
        left *= self._right
        left += right
        return left
