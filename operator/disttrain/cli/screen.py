"""What a user sees of a run where there is no terminal: plain lines, each with the name of its process, and the progress now and then.

On a terminal it is terminal.py. Not here: where the news come from (disttrain.local), what is said at the end (summary.py).
"""

import os
import time
from types import TracebackType
from typing import Final, Protocol, Self, TextIO

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.reasons import FINAL
from disttrain.api.runtime import Progress
from disttrain.cli import words
from disttrain.local.processes import Process
from disttrain.local.runner import Observer
from disttrain.plan.model import Event

PLAIN_SECONDS: Final = 5.0
"""Between two lines of progress."""


class Screen(Observer, Protocol):
    """An Observer that shows what it is told, and a context manager that puts the terminal back."""

    def say(self, text: str) -> None:
        """Shows a text of our own."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def screen_for(stream: TextIO, job: DistTrainJob, *, quiet: bool) -> Screen:
    """The display that suits the stream."""
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        from disttrain.cli.terminal import TerminalScreen  # rich takes longer to import than all the rest

        return TerminalScreen(stream, job, quiet=quiet)
    return PlainScreen(stream, job, quiet=quiet)


def prefix_width(job: DistTrainJob) -> int:
    """Columns of the longest [name]."""
    servers = job.spec.parameter_server
    last = {Role.MASTER: 0, Role.WORKER: job.spec.worker.replicas - 1} | (
        {Role.PARAMETER_SERVER: servers.replicas - 1} if servers else {}
    )
    return max(len(f"[{role.short}-{index}]") for role, index in last.items())


class PlainScreen:
    """Lines, for a pipe, a file or a CI log."""

    def __init__(self, stream: TextIO, job: DistTrainJob, *, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet
        self._width = prefix_width(job)
        self._state = ""
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def line(self, process: Process, text: str) -> None:
        """A process printed a line."""
        if not self._quiet:
            self.say(f"{f'[{process.label}]':{self._width}} {text}")

    def changed(self, job: DistTrainJob, progress: Progress | None) -> None:
        """A new state is told at once, a new number every few seconds, and the end by the summary."""
        now, state = time.monotonic(), str(job.status.state)
        if state in FINAL:
            return
        if state != self._state or now - self._said_at >= PLAIN_SECONDS:
            self._state, self._said_at = state, now
            self.say(f"{job.metadata.name}: {state}  {words.numbers(job, progress)}".rstrip())

    def event(self, event: Event) -> None:
        """Something happened to the job."""
        self.say(f"{'warning: ' if event.warning else ''}{event.message}")

    def say(self, text: str) -> None:
        """Shows a text of our own."""
        self._stream.write(f"{text}\n")
        self._stream.flush()
