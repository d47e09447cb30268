"""What a user sees of a run on a terminal: the lines of the processes in colours of their own, above a bar with the progress.

Where there is no terminal it is screen.py, whose thread also calls what is here. rich obeys NO_COLOR by itself. Imported only when there is
a terminal.
"""

import time
from collections.abc import Iterator
from typing import Final, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from disttrain.api.job import DistTrainJob
from disttrain.api.runtime import Progress
from disttrain.cli import words
from disttrain.cli.lines import Lines, segments
from disttrain.cli.output import Line
from disttrain.cli.screen import Screen

_BAR_COLUMNS: Final = range(10, 31)
"""A shorter bar says nothing, a longer one nothing more."""
_LEAST_NAME: Final = 8
"""Columns of a name before numbers are left out for it."""
_BETWEEN_SECONDS: Final = 0.03
"""Between two writes: what comes meanwhile is written together."""


class TerminalScreen(Screen):
    """Colours, and a bar that stays at the bottom."""

    def __init__(self, stream: TextIO, job: DistTrainJob, *, quiet: bool) -> None:
        super().__init__(stream, job, quiet=quiet)
        self._console = Console(file=cast("TextIO", self._sink), highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._newest: RenderableType | None = None

    def changed(self, job: DistTrainJob, progress: Progress | None) -> None:
        """Draws the bar again."""
        self._newest = Bar(job, progress)
        self._backlog.wake()

    def _begin(self) -> None:
        self._live.start()

    def _end(self) -> None:
        self._live.stop()

    def _show(self, lines: list[Line]) -> None:
        newest, self._newest = self._newest, None
        if newest is not None:
            self._live.update(newest, refresh=True)
        if lines:
            # All in one: the bar is taken away and drawn again once for all of them, not once for each.
            self._console.print(Lines([segment for line in lines for segment in self._segments(line)]), end="")
        time.sleep(_BETWEEN_SECONDS)

    def _segments(self, line: Line) -> Iterator[Segment]:
        if line.process is None:
            yield Segment(f"{line.text}\n", Style.parse("yellow") if line.warning else None)
            return
        process = line.process
        yield from segments(self._console, process.label, process.role, process.index, line.text, self._width)


class Bar:
    """The name of the job, a bar, and the numbers, in one line whatever the width: the numbers have theirs first."""

    def __init__(self, job: DistTrainJob, progress: Progress | None) -> None:
        self._name = job.metadata.name
        self._state = str(job.status.state or "")
        self._parts = words.parts(job, progress)
        self._done, self._total = words.steps(job, progress)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        room = options.max_width
        parts = self._parts[:]
        while len(parts) > 1 and len("  ".join(parts)) + 1 + min(len(self._name), _LEAST_NAME) > room:
            parts.pop()
        numbers = "  ".join(parts)
        name = self._name
        if (left := room - len(numbers) - 1) >= len(name) + 1 + len(self._state):
            heading = Text.assemble((name, "bold"), " ", self._state)
        else:
            heading = Text(name, "bold")
        heading.no_wrap, heading.overflow = True, "ellipsis"
        heading.truncate(max(left, _LEAST_NAME), overflow="ellipsis")
        grid = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        cells: list[RenderableType] = [heading]
        if self._total and (width := min(left - heading.cell_len - 1, _BAR_COLUMNS[-1])) in _BAR_COLUMNS:
            cells.append(ProgressBar(total=self._total, completed=self._done, width=width))
        cells.append(Text(numbers, overflow="ellipsis", no_wrap=True))
        grid.add_row(*cells)
        yield grid
