"""The curves of a history for a picture: loss and throughput over the steps, with no more values than it has columns.

Not here: what a line of a history is (api/history.py), how a picture looks (chart.py, drawing.py).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final, TypeAlias

from disttrain.api.history import Event, Point, decode, kept

WHOLE_BYTES: Final = 14 << 20
"""Of a file that is read whole: every history of a trainer, which stays below 13 MB."""
_THINNED_BYTES: Final = 4 << 20
"""Of a larger one every n-th point is read, of about so many bytes: some ten thousand, for the thousand columns of a picture."""
_POINT: Final = b'{"step"'
"""How the line of a point begins. An event is always read: it may undo points."""

Curve: TypeAlias = Sequence[tuple[int, float]]
"""Steps, ascending, and values."""
Columns: TypeAlias = Mapping[int, tuple[float, float]]
"""The lowest and the highest value of each column that has one, ascending."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is drawn of one run."""

    name: str
    loss: Curve
    throughput: Curve
    """Samples/s of all workers."""

    def __str__(self) -> str:
        """Where it is, in a line."""
        steps = max((curve[-1][0] for curve in (self.loss, self.throughput) if curve), default=0)
        parts = [self.name, f"step {steps}"]
        parts += [f"loss {self.loss[-1][1]:.4g}"] if self.loss else []
        parts += [f"{self.throughput[-1][1]:.4g} samples/s"] if self.throughput else []
        return "   ".join(parts)


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram, in which the curves of all runs lie over one another."""

    title: str
    curves: tuple[Curve, ...]
    lowest: float | None = None
    """What the axis begins with; None: the lowest value."""

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last."""
        there = [curve for curve in self.curves if curve]
        return min(curve[0][0] for curve in there), max(curve[-1][0] for curve in there)

    @property
    def values(self) -> tuple[float, float]:
        """The ends of the axis; never the same number."""
        found = [value for curve in self.curves for _, value in curve]
        low, high = min(found) if self.lowest is None else self.lowest, max(found)
        return (low, high) if high > low else (low - (abs(low) / 10 or 1), low + (abs(low) / 10 or 1))

    def columns(self, count: int) -> list[Columns]:
        """The curves in so many columns."""
        first, last = self.steps
        scale = (count - 1) / (last - first) if last > first else 0.0
        return [_columns(curve, first, scale) for curve in self.curves]


def read(file: IO[bytes], name: str) -> Run:
    """The curves of a file, without the points that a fall back undid. Raises OSError."""
    return of_points([line for line in kept(lines_of(file)) if isinstance(line, Point)], name)


def lines_of(file: IO[bytes]) -> list[Point | Event]:
    """The points and events of a file; of one that is larger than a trainer writes only every n-th point. Raises OSError."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    every = 1 if size <= WHOLE_BYTES else size // _THINNED_BYTES
    lines: list[Point | Event] = []
    for number, text in enumerate(file):
        if number % every and text.startswith(_POINT):
            continue
        if isinstance(line := decode(text), Point | Event):
            lines.append(line)
    return lines


def of_points(points: Sequence[Point], name: str) -> Run:
    """The curves of points that are left."""
    return Run(
        name,
        [(point.step, point.loss) for point in points if point.loss is not None],
        [(point.step, point.samples_per_second) for point in points if point.samples_per_second is not None],
    )


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The diagrams that these runs have values for."""
    both = (
        Panel("loss", tuple(run.loss for run in runs)),
        Panel("samples/s", tuple(run.throughput for run in runs), lowest=0.0),
    )
    return [panel for panel in both if any(panel.curves)]


def _columns(curve: Curve, first: int, scale: float) -> Columns:
    found: dict[int, tuple[float, float]] = {}
    for step, value in curve:
        column = round((step - first) * scale)
        low, high = found.get(column, (value, value))
        found[column] = (min(low, value), max(high, value))
    return found
