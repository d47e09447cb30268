"""`disttrain plot`: loss and throughput of a run, or of two over one another, on the terminal or in a file.

Not here: how it is drawn (chart.py, drawing.py).
"""

import os
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from disttrain.cli import history
from disttrain.cli.chart import Style, chart
from disttrain.cli.curves import Panel, Run, panels, read
from disttrain.cli.lines import is_terminal
from disttrain.client.errors import ClusterError
from disttrain.client.text import one_line

_WIDTHS: Final = (40, 240)
"""Of a chart, at least and at most."""
_FILES: Final = (".svg", ".html", ".png")


class CannotPlot(Exception):
    """Why, and what to do."""


def plot(names: Sequence[str], output: str | None, where: history.Where) -> int:
    """Draws the runs. 0, or 2 where there is nothing to draw; of a cluster its codes. Raises OSError where the file cannot be written."""
    try:
        if output is not None and Path(output).suffix not in _FILES:
            raise CannotPlot(f"-o {one_line(output)}: name a file that ends with {', '.join(_FILES)}")
        runs = [_run(name, where) for name in names]
        found = panels(runs)
        if not found:
            raise CannotPlot(
                f"{' and '.join(run.name for run in runs)}: no step is in the history yet; try again later"
            )
        if output is not None:
            _write(Path(output), runs, found)
    except (CannotPlot, history.NoHistory, ClusterError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, ClusterError) else 2
    if output is None:
        print(chart(runs, found, _style()))
    return 0


def _run(name: str, where: history.Where) -> Run:
    try:
        with history.opened(name, where) as file:
            folder = Path(getattr(file, "name", "")).resolve().parent.name  # that of a run has its time in its name
            return read(file, one_line(name if where != (None, None) else folder))
    except OSError as error:
        raise CannotPlot(f"{name}: {error.strerror or error}") from error


def _style() -> Style:
    least, most = _WIDTHS
    width = min(max(shutil.get_terminal_size((80, 24)).columns, least), most)
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    colour = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    return Style(width, colour=colour, braille=encoding.startswith("utf"))


def _write(path: Path, runs: Sequence[Run], found: Sequence[Panel]) -> None:
    from disttrain.cli.drawing import html, svg

    if path.suffix != ".png":
        path.write_text(html(runs, found) if path.suffix == ".html" else svg(runs, found), encoding="utf-8")
        return
    try:
        resvg = import_module("resvg_py")
    except ImportError:
        raise CannotPlot("a PNG needs resvg (pip install resvg-py); .svg and .html need nothing") from None
    path.write_bytes(bytes(resvg.svg_to_bytes(svg_string=svg(runs, found))))
