"""What a user sees of a run on a terminal: the lines of the processes in colours of their own, above a bar with the progress.

Where there is no terminal it is screen.py. rich obeys NO_COLOR by itself. Imported only when there is a terminal.
"""

from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.runtime import Progress
from disttrain.cli import words
from disttrain.cli.screen import prefix_width
from disttrain.local.processes import Process
from disttrain.plan.model import Event

_COLOURS: Final = {
    Role.MASTER: ("bright_white",),
    Role.PARAMETER_SERVER: ("magenta", "bright_magenta", "red", "bright_red"),
    Role.WORKER: ("cyan", "green", "yellow", "blue", "bright_cyan", "bright_green", "bright_yellow", "bright_blue"),
}
_BAR_COLUMNS: Final = 30


class TerminalScreen:
    """Colours, and a bar that stays at the bottom."""

    def __init__(self, stream: TextIO, job: DistTrainJob, *, quiet: bool) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._quiet = quiet
        self._width = prefix_width(job)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def line(self, process: Process, text: str) -> None:
        """A process printed a line."""
        if not self._quiet:
            colours = _COLOURS[process.role]
            name = f"[{process.label}]".ljust(self._width)
            # Text, not markup: what a program prints in brackets is its own. Its colours are kept.
            self._console.print(Text.assemble((name, colours[process.index % len(colours)]), " ", Text.from_ansi(text)))

    def changed(self, job: DistTrainJob, progress: Progress | None) -> None:
        """Draws the bar anew."""
        self._live.update(_bar(job, progress))

    def event(self, event: Event) -> None:
        """Something happened to the job."""
        self._console.print(Text(event.message, "yellow" if event.warning else "bold"))

    def say(self, text: str) -> None:
        """Shows a text of our own."""
        self._console.print(Text(text))


def _bar(job: DistTrainJob, progress: Progress | None) -> RenderableType:
    done, total = words.steps(job, progress)
    cells: list[RenderableType] = [Text.assemble((job.metadata.name, "bold"), f" {job.status.state or ''}")]
    if total:
        cells.append(ProgressBar(total=total, completed=done, width=_BAR_COLUMNS))
    cells.append(Text(words.numbers(job, progress), overflow="ellipsis", no_wrap=True))
    grid = Table.grid(padding=(0, 1))
    grid.add_row(*cells)
    return grid
