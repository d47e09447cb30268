"""What the order of an epoch costs a part, computed beside kept as a table: both by `Schedule.part`, in turns, in one process.

    python benchmarks/order.py           # a table; a ratio of 1.00 is an order that costs as much as the table

The table is numpy's permutation, made once an epoch, which each part of it pays for. Both include the rest of `Schedule.part`.
"""

import time

import numpy as np
from numpy.typing import NDArray

from disttrain_trainer.data.schedule import Schedule

SETS = (("digits", 1797, 64, 1), ("digits, 2 parts", 1797, 64, 2), ("large", 10**8, 64, 1))
PARTS = 3000
TURNS = 3


class Table:
    """The order as it would be kept: 8 bytes a sample."""

    name = "table"

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng(epoch).permutation(self._samples)
        return self._order[positions]


def microseconds(schedule: Schedule) -> float:
    """Processor time of a part. Of an epoch that is longer than the measurement, each part pays its share of the first one's time."""
    of_epoch = schedule.steps_per_epoch * schedule.parts_per_step
    began = time.thread_time()
    schedule.part(0)
    first = time.thread_time()
    for index in range(1, PARTS):
        schedule.part(index)
    share = (first - began) / of_epoch if of_epoch > PARTS else 0.0
    return ((time.thread_time() - first) / (PARTS - 1) + share) * 1e6


def main() -> None:
    print(f"{'data set':<18}{'samples':>12}{'batch':>7}{'table us':>10}{'computed us':>13}{'ratio':>7}")
    for name, samples, batch, parts in SETS:
        numbers = {"samples": samples, "batch_size": batch, "parts_per_step": parts, "seed": 0, "epochs": 200}
        best = [
            min(microseconds(Schedule(**numbers, order=order)) for _ in range(TURNS))
            for order in (Table(samples), None)
        ]
        print(f"{name:<18}{samples:>12}{batch:>7}{best[0]:>10.2f}{best[1]:>13.2f}{best[0] / best[1]:>7.2f}")


if __name__ == "__main__":
    main()
