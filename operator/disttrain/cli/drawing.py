"""Curves as an SVG, and as a page of HTML around it: one file, which needs no network and no script, in light and dark."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from disttrain.cli.curves import Columns, Panel, Run

_WIDTH, _HEIGHT = 900, 280
"""Of a diagram."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 30, 40
"""Around its curves."""
_STYLE: Final = """
  .ground { fill: #ffffff } text { font-family: "DejaVu Sans", Arial, sans-serif; font-size: 12px; fill: #24292f }
  .grid { stroke: #d0d7de; stroke-width: 1 } .curve { fill: none; stroke-width: 1.5; stroke-linejoin: round }
  .run-0 { stroke: #0969da } .run-1 { stroke: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #30363d } .run-0 { stroke: #58a6ff } .run-1 { stroke: #f0883e }
  }
"""


def svg(runs: Sequence[Run], panels: Sequence[Panel]) -> str:
    """The runs, a line each, and the diagrams below one another."""
    head = 24 * len(runs) + 16
    height = head + _HEIGHT * len(panels)
    about = escape("loss and throughput of " + ", ".join(run.name for run in runs))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">',
        f"<title>{about}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}"/>',
    ]
    for number, run in enumerate(runs):
        y = 24 * number + 26
        lines.append(
            f'<path class="curve run-{number}" d="M20 {y - 4}H44"/><text x="54" y="{y}">{escape(str(run))}</text>'
        )
    for number, panel in enumerate(panels):
        lines += [f'<g transform="translate(0 {head + number * _HEIGHT})">', *_panel(panel), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def html(runs: Sequence[Run], panels: Sequence[Panel]) -> str:
    """The same as a page."""
    title = escape(" and ".join(run.name for run in runs))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="color-scheme" content="light dark"><style>body { margin: 2em auto; max-width: 900px } svg { max-width: 100%; '
        f"height: auto }}</style></head>\n<body>\n{svg(runs, panels)}</body></html>\n"
    )


def _panel(panel: Panel) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    (low, high), (first, last) = panel.values, panel.steps
    across, down = right - _LEFT, bottom - _TOP
    yield f'<text x="{_LEFT}" y="{_TOP - 10}">{escape(panel.title)}</text>'
    for value in _ticks(low, high):
        y = bottom - (value - low) / (high - low) * down
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
    for step in _ticks(first, last) if last > first else [first]:
        x = _LEFT + (step - first) / max(1, last - first) * across
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{step:.9g}</text>'
    yield f'<text x="{right}" y="{_HEIGHT - 4}" text-anchor="end">step</text>'
    for number, columns in enumerate(panel.columns(across + 1)):
        if columns:
            yield f'<path class="curve run-{number}" d="{_path(columns, low, down / (high - low), bottom)}"/>'


def _path(columns: Columns, low: float, scale: float, bottom: int) -> str:
    """A line through the lowest and the highest value of each column."""
    values = ((x, value) for x, (least, most) in columns.items() for value in dict.fromkeys((least, most)))
    found = " ".join(f"{_LEFT + x} {bottom - (value - low) * scale:.1f}" for x, value in values)
    return f"M{found} h0.1"  # of a single value a dot


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers between both."""
    rough = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
