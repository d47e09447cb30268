"""Curves on a terminal or in a text: dots of braille, two by four to a character, or stars where the text cannot hold them.

Ours, since what it takes is a hundred lines: a package for it would be one more that every installation of the command has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from disttrain.cli.curves import Columns, Panel, Run

_BRAILLE: Final = 0x2800
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit of each dot of a character, by column and row."""
_COLOURS: Final = ("36", "33")
"""Of the first and the second run: cyan, yellow."""
_ROWS: Final = 10
_LABEL: Final = 9
"""Columns of the numbers beside the axis."""


@dataclass(frozen=True, slots=True)
class Style:
    """What the reader of the text can see."""

    width: int
    colour: bool = False
    braille: bool = True

    def mark(self, masks: Sequence[int]) -> str:
        """The character where the runs have these dots. Without colour the second run has a sign of its own."""
        there = [number for number, mask in enumerate(masks) if mask]
        if not there:
            return " "
        if self.colour:
            dots = masks[0] | masks[-1]
            sign = chr(_BRAILLE + dots) if self.braille else "*"
            return f"\x1b[{_COLOURS[there[-1]]}m{sign}\x1b[0m"
        if there == [0]:
            return chr(_BRAILLE + masks[0]) if self.braille else "*"
        return "o" if there == [1] else "#"


def chart(runs: Sequence[Run], panels: Sequence[Panel], style: Style) -> str:
    """The runs, a line each, and the diagrams."""
    lines = []
    for number, run in enumerate(runs):
        sign = style.mark([0xFF * (number == other) for other in range(len(runs))])
        lines.append(f"{sign} {run}" if len(runs) > 1 else str(run))
    for panel in panels:
        lines += ["", *_panel(panel, style)]
    return "\n".join(line.rstrip() for line in lines)


def _panel(panel: Panel, style: Style) -> Iterator[str]:
    room = style.width - _LABEL - 2
    low, high = panel.values
    scale = (4 * _ROWS - 1) / (high - low)
    canvases = [_canvas(columns, low, scale, room) for columns in panel.columns(2 * room)]
    corner, bar, tick, line = "└│┤─" if style.braille else "+||-"
    yield f"{panel.title:>{_LABEL}}"
    for row in range(_ROWS):
        at = {0: high, _ROWS // 2: (low + high) / 2, _ROWS - 1: low}.get(row)
        label = f"{at:>{_LABEL}.4g} {tick}" if at is not None else f"{'':{_LABEL}} {bar}"
        yield label + "".join(style.mark([canvas[row * room + x] for canvas in canvases]) for x in range(room))
    first, last = map(str, panel.steps)
    yield f"{'':{_LABEL}} {corner}{line * room}"
    yield f"{'':{_LABEL}}  {first}{'step':^{max(4, room - len(first) - len(last))}}{last}"


def _canvas(columns: Columns, low: float, scale: float, room: int) -> bytearray:
    """The dots of a curve: a mask for each character, row by row from the top."""
    canvas = bytearray(room * _ROWS)
    for x, bottom, top in _line(
        {x: (round((a - low) * scale), round((b - low) * scale)) for x, (a, b) in columns.items()}
    ):
        for y in range(bottom, top + 1):
            row = 4 * _ROWS - 1 - y
            canvas[row // 4 * room + x // 2] |= _DOTS[x % 2][row % 4]
    return canvas


def _line(columns: dict[int, tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Each column with its lowest and highest dot; columns between two that have values are on the line that connects them."""
    before: tuple[int, int, int] | None = None
    for x, (low, high) in columns.items():
        if before is not None:
            x0, low0, high0 = before
            start, rise = (low0 + high0) / 2, ((low + high) - (low0 + high0)) / 2 / (x - x0)
            for between in range(x0 + 1, x):
                y = round(start + rise * (between - x0))
                yield between, min(y, before[2]), max(y, before[1])
                before = between, y, y
            yield x, min(low, before[2]), max(high, before[1])
        else:
            yield x, low, high
        before = x, low, high
