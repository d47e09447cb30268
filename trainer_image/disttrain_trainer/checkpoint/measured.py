"""The numbers of an evaluation, and how those of slices of the data set are put together. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Evaluation = dict[str, float]
"""Numbers by the names that the user's `evaluate` gives them."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one call of `evaluate` found."""

    numbers: Evaluation
    weights: Evaluation | None = None
    """What each number is the mean of; None unless each came as (mean, weight)."""


def combined(slices: Iterable[Measured]) -> Measured:
    """The means over all slices, each with the sum of its weights: what one call on the whole data set finds, within rounding."""
    totals: dict[str, tuple[float, float]] = {}
    for one in slices:
        for key, value in one.numbers.items():
            weight = (one.weights or {}).get(key, 0.0)
            total, weights = totals.get(key, (0.0, 0.0))
            totals[key] = total + (value * weight if weight else 0.0), weights + weight
    return Measured(
        {key: total / weight if weight else math.nan for key, (total, weight) in totals.items()},
        {key: weight for key, (_, weight) in totals.items()},
    )
