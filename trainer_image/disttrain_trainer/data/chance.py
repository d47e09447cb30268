"""What a data set draws as it loads a sample is a function of (seed, epoch, sample): not of who loads it, nor of what was loaded before."""

import random

import numpy as np
import torch

_SAMPLES = (1 << 63) - 1
"""No part has this number: samples draw other numbers than the model does."""


def mix(seed: int, number: int) -> int:
    """A seed of 64 bits for each pair of numbers below 2^63: another one for each number, and seemingly unrelated (splitmix64)."""
    mask = (1 << 64) - 1
    seed = (seed * 0x9E3779B97F4A7C15 + number) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        seed = (seed ^ (seed >> shift)) * factor & mask
    return seed ^ (seed >> 31)


def seed_all(seed: int) -> None:
    """Seeds the generators of torch (that of the CPU), Python and numpy by 64 bits, numpy's by 32 of them.

    It takes some 10 us: 1 for torch, 2 for numpy, the rest for Python's. Numpy would take 30 us for 64 bits.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


class SampleSeeds:
    """The seeds of a data set's samples. For one thread."""

    def __init__(self, seed: int) -> None:
        self._seed = mix(seed, _SAMPLES)
        self._epoch = 0
        self._of_epoch = 0

    def begin(self, epoch: int) -> None:
        """The samples that follow are of this epoch, from 1."""
        if epoch != self._epoch:
            self._epoch, self._of_epoch = epoch, mix(self._seed, epoch)

    def set(self, sample: int) -> None:
        """Before the sample of this number is loaded."""
        seed_all(mix(self._of_epoch, sample))
