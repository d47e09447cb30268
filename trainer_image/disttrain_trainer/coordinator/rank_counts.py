"""What each rank reported since the master began: of whom a table tells who is slow, and where its time goes. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MOST_RANKS: Final = 1024
"""Of a table: the lowest."""


@dataclass(slots=True)
class _Count:
    samples: int = 0
    loss: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


class RankCounts:
    """Samples, newest loss and seconds by phase of each rank."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Count] = {}
        self.phases: dict[str, float] = {}
        """Seconds of all ranks together, by phase; they only grow."""
        self.gradient_norm: float | None = None
        """Of the newest report that had one."""

    def take(
        self,
        rank: int,
        *,
        samples: int,
        loss: float | None,
        phases: Mapping[str, float] | None,
        gradient_norm: float | None,
    ) -> None:
        """A report. loss: a mean. phases: seconds since the last report."""
        count = self._ranks.setdefault(rank, _Count())
        count.samples += samples
        count.loss = loss if loss is not None else count.loss
        for name, seconds in (phases or {}).items():
            count.phases[name] = count.phases.get(name, 0.0) + seconds
            self.phases[name] = self.phases.get(name, 0.0) + seconds
        if gradient_norm is not None:
            self.gradient_norm = gradient_norm

    def table(self) -> list[dict[str, Any]]:
        """A row for each rank, as it stands in the history."""
        return [
            {
                "rank": rank,
                "samples": count.samples,
                "loss": count.loss,
                "phases": {name: round(seconds, 3) for name, seconds in count.phases.items()},
            }
            for rank, count in sorted(dict(self._ranks).items())[:MOST_RANKS]
        ]
