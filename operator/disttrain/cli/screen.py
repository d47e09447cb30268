"""What a user sees of a run where there is no terminal: plain lines, each with the name of its process, and the progress now and then.

On a terminal it is terminal.py. Not here: where the news come from (disttrain.local), what is said at the end (summary.py), how it is
written without anybody waiting for it (output.py).
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.reasons import FINAL
from disttrain.api.runtime import Progress
from disttrain.cli import words
from disttrain.cli.lines import is_terminal
from disttrain.cli.output import Backlog, Line, Sink
from disttrain.local.processes import Process
from disttrain.local.runner import Observer
from disttrain.plan.model import Event

PLAIN_SECONDS: Final = 5.0
"""Between two lines of progress."""
_STUCK_READER_SECONDS: Final = 2.0
"""How long a reader may take nothing before the end of an interrupted run leaves the rest unsaid."""


class Screen(Observer, ABC):
    """An Observer that shows what it gets, and a context manager that shows all of it and puts the terminal back."""

    def __init__(self, stream: TextIO, job: DistTrainJob, *, quiet: bool) -> None:
        self._sink = Sink(stream)
        self._width = prefix_width(job)
        self._quiet = quiet
        self._backlog = Backlog()
        self._join_seconds: float | None = None
        self._thread = threading.Thread(target=self._show_all, name="screen", daemon=True)

    @property
    def lost(self) -> OSError | None:
        """Why nothing can be shown any more."""
        return self._sink.lost

    def when_lost(self, tell: Callable[[OSError], None]) -> None:
        """`tell` is called, in whatever thread, when nothing can be shown any more."""
        self._sink.when_lost = tell

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backlog.close()
        while self._thread.is_alive():
            before = self._sink.written
            # With a timeout always: a join without one would not let Ctrl-C in.
            self._thread.join(self._join_seconds or 1.0)
            if self._join_seconds is not None and self._thread.is_alive() and self._sink.written == before:
                self._sink.lost = TimeoutError("its reader does not read")
                return

    def hurry(self) -> None:
        """The run was interrupted: at its end a reader that takes nothing is not waited for."""
        self._join_seconds = _STUCK_READER_SECONDS

    def line(self, process: Process, text: str) -> None:
        """A process printed a line."""
        if not self._quiet:
            self._backlog.add(Line(text, process, optional=True))

    def started(self, process: Process, text: str) -> None:
        """A process is started."""
        self._backlog.add(Line(text, process))

    def event(self, event: Event) -> None:
        """Something happened to the job."""
        self._backlog.add(Line(event.message, warning=event.warning))

    def print_line(self, text: str) -> None:
        """Shows a text of our own. After the end of the context it is written at once."""
        if self._thread.ident is None or self._thread.is_alive():
            self._backlog.add(Line(text))
        else:
            self._show([Line(text)])

    def _show_all(self) -> None:
        self._begin()
        while (lines := self._backlog.take()) is not None:
            self._show(lines)
        self._end()

    def _begin(self) -> None:
        """Before the first line."""

    def _end(self) -> None:
        """After the last one."""

    @abstractmethod
    def _show(self, lines: list[Line]) -> None:
        """Writes lines, in the thread of the screen."""


def screen_for(stream: TextIO, job: DistTrainJob, *, quiet: bool) -> Screen:
    """The display that suits the stream."""
    if is_terminal(stream):
        from disttrain.cli.terminal import TerminalScreen  # rich takes longer to import than all the rest

        return TerminalScreen(stream, job, quiet=quiet)
    return PlainScreen(stream, job, quiet=quiet)


def prefix_width(job: DistTrainJob) -> int:
    """Columns of the longest [name]."""
    last = {Role.MASTER: 0, Role.WORKER: job.spec.worker.most - 1} | (
        {Role.PARAMETER_SERVER: job.spec.servers - 1} if job.spec.servers else {}
    )
    return max(len(f"[{role.short}-{index}]") for role, index in last.items())


class PlainScreen(Screen):
    """Lines, for a pipe, a file or a CI log."""

    def __init__(self, stream: TextIO, job: DistTrainJob, *, quiet: bool) -> None:
        super().__init__(stream, job, quiet=quiet)
        self._state = ""
        self._said_at = 0.0

    def changed(self, job: DistTrainJob, progress: Progress | None) -> None:
        """A new state is printed at once, a new number every few seconds, and the end by the summary."""
        now, state = time.monotonic(), str(job.status.state)
        if state in FINAL:
            return
        if state != self._state or now - self._said_at >= PLAIN_SECONDS:
            self._state, self._said_at = state, now
            self.print_line(f"{job.metadata.name}: {state}  {words.numbers(job, progress)}".rstrip())

    def _show(self, lines: list[Line]) -> None:
        self._sink.write("".join(map(self._shown, lines)))
        self._sink.flush()

    def _shown(self, line: Line) -> str:
        if line.process is not None:
            return f"{f'[{line.process.label}]':{self._width}} {line.text}\n"
        return f"{'warning: ' if line.warning else ''}{line.text}\n"
