"""Finds the progress in what a program prints (trainer.progress), without a delay of what it prints.

The thread that hands the output on only leaves it here; another one searches it. A program that prints faster than its lines are searched
loses lines here, the oldest first, and no byte of its output.
"""

import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from disttrain.api.output_progress import GROUPS, compiled
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

LONGEST_LINE = 4096
"""Bytes of a line that are searched, from its beginning."""
MOST_PENDING = 1 << 20
"""Bytes that wait to be searched, at most."""
_ENDS = re.compile(rb"[\r\n]")
"""A progress bar ends no line, and writes a carriage return before each of its states."""
_LARGEST = 1 << 53
"""Below it a number is one that the master takes (net/incoming.py)."""


@dataclass(frozen=True, slots=True)
class Printed:
    """What one line says. step, samples, total: counts, done so far."""

    step: int
    loss: float | None = None
    samples: int | None = None
    total: int | None = None


class ProgressPattern:
    """The pattern of trainer.progress. Its time is linear in the length of a line. Raises ValueError for one that RE2 does not take."""

    def __init__(self, pattern: str) -> None:
        self._pattern = compiled(pattern)
        self._groups = [group for group in GROUPS if group in self._pattern.groupindex]

    def find(self, line: bytes) -> Printed | None:
        """What a line says; None where it does not match, or has no number for the step. Other groups without a number are left out."""
        found = self._pattern.search(line[:LONGEST_LINE].decode(errors="replace"))
        if found is None:
            return None
        numbers = {group: _number(found.group(group)) for group in self._groups}
        step = _count(numbers.get("step"))
        if step is None:
            return None
        return Printed(step, numbers.get("loss"), _count(numbers.get("samples")), _count(numbers.get("total")))


class Lines:
    """Cuts the output of one stream into lines, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._line = b""
        self._whole = True
        """Whether the beginning of the line is there."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that end in this piece, without empty ones; of a long one its beginning."""
        *ends, rest = _ENDS.split(data)
        for piece in ends:
            line, whole = self._line + piece[:LONGEST_LINE], self._whole
            self._line, self._whole = b"", True
            if line and whole:
                yield line
        self._line = (self._line + rest[:LONGEST_LINE])[:LONGEST_LINE]

    def skip(self) -> None:
        """Some bytes are missing: the line that they cut is left out."""
        self._line, self._whole = b"", False

    def end(self) -> bytes:
        """What is no whole line yet."""
        return self._line if self._whole else b""


class OutputReader:
    """Reads the output of one process. `feed` may be called by the threads of its streams."""

    def __init__(
        self,
        pattern: ProgressPattern,
        report: Callable[[Printed], None],
        on_end: Callable[[], None] = lambda: None,
        hurry: Callable[[], None] = lambda: None,
    ) -> None:
        """report: called in the reader's own thread for each line that matches, with steps that only grow. on_end: called by `end`.

        hurry: the process is to end, so that on_end must not take long. Any thread may call it.
        """
        self._pattern = pattern
        self._report = report
        self._on_end = on_end
        self.hurry = hurry
        self._lines: dict[int, Lines] = {}
        self._pending: deque[tuple[int, bytes]] = deque()
        self._size = 0
        self._cut: set[int] = set()
        """Streams of which pieces were left out."""
        self._step = -1
        self._fell = False
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def feed(self, stream: int, data: bytes) -> None:
        """Some bytes that the process wrote to this stream. Never blocks."""
        with self._changed:
            self._pending.append((stream, data))
            self._size += len(data)
            while self._size > MOST_PENDING:
                cut, oldest = self._pending.popleft()
                self._size -= len(oldest)
                self._cut.add(cut)
            self._changed.notify_all()

    def end(self) -> None:
        """The process has ended. Returns when all is searched, which is MOST_PENDING at most, and on_end is done."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        self._on_end()

    def _run(self) -> None:
        while piece := self._next():
            stream, data, after_gap = piece
            lines = self._lines.setdefault(stream, Lines())
            if after_gap:
                lines.skip()
            for line in lines.feed(data):
                self._search(line)
        for lines in self._lines.values():
            self._search(lines.end())

    def _next(self) -> tuple[int, bytes, bool] | None:
        """The next piece, and whether one before it was left out; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._ended)
            if not self._pending:
                return None
            stream, data = self._pending.popleft()
            self._size -= len(data)
            after_gap = stream in self._cut
            self._cut.discard(stream)
            return stream, data, after_gap

    def _search(self, line: bytes) -> None:
        printed = self._pattern.find(line)
        if printed is None:
            return
        if printed.step < self._step:
            if not self._fell:
                self._fell = True
                log.warning(
                    "trainer.progress: after step %d the output has step %d, which is left out: the step must be that of the whole job, "
                    "not of an epoch",
                    self._step,
                    printed.step,
                )
            return
        self._step = printed.step
        self._report(printed)


def _number(text: str | None) -> float | None:
    """A finite number, written as Python or people write it (1,024); None for anything else."""
    try:
        number = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) < _LARGEST else None


def _count(number: float | None) -> int | None:
    return int(number) if number is not None and number >= 0 else None
