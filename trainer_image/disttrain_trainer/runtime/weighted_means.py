"""Means of named values, each with a weight: over the parts of a report, over reports, over workers."""

import math
from collections.abc import Iterable, Mapping

Sums = Mapping[str, tuple[float, float]]
"""By name: value x weight, and the weight."""


class WeightedMeans:
    """Sums of values by name. What is not finite, or weighs nothing, is left out."""

    def __init__(self, every: Iterable[Sums] = ()) -> None:
        """every: to begin with, in this order."""
        self.sums: dict[str, tuple[float, float]] = {}
        for sums in every:
            self.merge(sums)

    def add(self, values: Mapping[str, float], weight: float) -> None:
        """Means that weigh so much."""
        self.merge({name: (value * weight, weight) for name, value in values.items()})

    def merge(self, sums: Sums) -> None:
        """Adds other sums."""
        for name, (weighted, weight) in sums.items():
            if math.isfinite(weighted) and weight > 0:
                before, total = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = before + weighted, total + weight

    @property
    def means(self) -> dict[str, float]:
        """By name, in its order."""
        return {name: weighted / weight for name, (weighted, weight) in sorted(self.sums.items())}
