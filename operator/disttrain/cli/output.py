"""Writing to a stream that may be slow, full, closed or gone: no writer waits for it, or fails because of it.

A run must react to Ctrl-C and see the ends of its processes while its reader is paused. So what is to be shown goes into a backlog,
a thread writes it, and of a backlog that grows too long one line remains that says how much was left out. Not here: how
things look (screen.py).
"""

import contextlib
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TextIO

from disttrain.local.processes import Process

MOST_CHARACTERS: Final = 4 << 20
"""Of a backlog. A line counts some more than it has: it also takes memory."""
_PER_LINE: Final = 100
_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Line:
    """A line to be shown: of a process, or our own."""

    text: str
    process: Process | None = None
    warning: bool = False
    optional: bool = False
    """May be left out: it is in a log."""


class Backlog:
    """Lines that are still to be shown, from the thread that has them to the thread that writes."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._size = 0
        self._left_out = 0
        self._closed = False
        self._something = threading.Condition()

    def add(self, line: Line) -> None:
        """One more. Never blocks: of a backlog that is too long, what may be left out is."""
        with self._something:
            self._lines.append(line)
            self._size += len(line.text) + _PER_LINE
            if self._size > MOST_CHARACTERS:
                kept = [line for line in self._lines if not line.optional]
                self._left_out += len(self._lines) - len(kept)
                self._lines, self._size = kept, sum(len(line.text) + _PER_LINE for line in kept)
            self._something.notify()

    def wake(self) -> None:
        """There is something other than lines to show."""
        with self._something:
            self._something.notify()

    def close(self) -> None:
        """Nothing more will come."""
        with self._something:
            self._closed = True
            self._something.notify()

    def take(self) -> list[Line] | None:
        """All that is there, [] after `wake`; waits for it. None when it is closed and empty."""
        with self._something:
            if not self._lines and not self._closed:
                self._something.wait()
            if not self._lines and not self._left_out and self._closed:
                return None
            lines, self._lines, self._size = self._lines, [], 0
            if self._left_out:
                lines.insert(0, Line(f"({self._left_out} lines are left out here; they are in the logs)", warning=True))
                self._left_out = 0
            return lines


class Sink:
    """The stream itself, as a file for rich too. Its first failure is remembered and reported; from then on it is silent."""

    def __init__(self, stream: TextIO) -> None:
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"
        self.lost: OSError | None = None
        self.when_lost: Callable[[OSError], None] = lambda error: None
        self.written = 0
        self._stream = stream
        self._parts: list[str] = []
        self._descriptor: int | None = None
        # Not through the stream's own buffer: its lock would be held by a thread that is stuck, and Python wants it when it ends.
        with contextlib.suppress(OSError, ValueError):
            self._descriptor = stream.fileno()
            stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """For who asks a terminal for its size."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Takes a text; `flush` writes it."""
        self._parts.append(text)
        return len(text)

    def flush(self) -> None:
        """Writes what it has, as long as that takes."""
        text = "".join(self._parts)
        self._parts.clear()
        if self.lost is not None or not text:
            return
        try:
            if self._descriptor is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                self._write(self._descriptor, text.encode(self.encoding, "replace"))
        except OSError as error:
            self.lost = error
            self.when_lost(error)

    def _write(self, descriptor: int, data: bytes) -> None:
        while data:
            try:
                count = os.write(descriptor, data[:_CHUNK])
            except BlockingIOError:  # another program, which has the same terminal or pipe, made it so
                select.select([], [descriptor], [])
                continue
            data = data[count:]
            self.written += count
