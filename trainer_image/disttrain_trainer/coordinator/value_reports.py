"""The named values of a training, from the reports of its workers. Pure."""

import re
from collections.abc import Iterable

from disttrain.api.values import MOST_VALUES, NAME
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.weighted_means import Sums, WeightedMeans

log = logs.get_logger(__name__)


class ValueReports:
    """Which names the job has, and the values of its last steps. Each worker has MOST_VALUES names at most; so has the job."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._left_out = False
        self._final: dict[float, Sums] = {}
        """Of each part of the last steps, by its number. A part that is computed a second time counts once."""

    def take(self, values: Sums, final: Iterable[tuple[float, Sums]]) -> Sums:
        """A report: returns what is taken of its values."""
        self._final |= {index: self._known(sums) for index, sums in final}
        return self._known(values)

    def final(self) -> dict[str, float]:
        """The weighted means over the last steps, in the order of the parts: the same whichever worker computed which."""
        return WeightedMeans(self._final[index] for index in sorted(self._final)).means

    def _known(self, values: Sums) -> Sums:
        for name in values.keys() - self._names:
            if len(self._names) < MOST_VALUES and re.fullmatch(NAME, name):
                self._names.add(name)
            elif not self._left_out:
                self._left_out = True
                log.warning(
                    "trainer.loss returns values of more than %d names on all workers together: %r and others are left out",
                    MOST_VALUES,
                    name[:100],
                )
        return {name: sums for name, sums in values.items() if name in self._names}
