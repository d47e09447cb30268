"""The file of a job's history: appended to line by line, thinned when it has grown too long, never a reason for the training to stop.

A line is in the file whole or, after a kill -9 or on a full disk, as a cut last line, behind which the next line begins. The file
that is thinned takes the place of the one before at once. A disk that is full costs lines, and is said once. The folder may be on a
network and hang: all of this happens in a thread of its own, for which nothing waits longer than `END_SECONDS`.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from disttrain.api.history import FILE, Event, Header, Line, Point, decode, kept, thinned
from disttrain_trainer.coordinator.history import INTERVAL_SECONDS
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

MOST_BYTES_OF_POINTS: Final = 8 << 20
"""More are thinned to half of that: 16,000 to 60,000 points."""
MOST_BYTES_OF_EVENTS: Final = 4 << 20
"""Some 40,000 events. Of more every second one is left out."""
_MOST_SECONDS: Final = 3600.0
"""Between two points, however long the training."""
_LINES_BETWEEN_TRIES: Final = 1000
"""A file that is too long and cannot be replaced must not be read at each line."""
END_SECONDS: Final = 5.0
"""How long the end of the master waits for the last lines."""


class HistoryFile:
    """The file in `folder`, which is made. Raises OSError, as `append` does. header: of a new file."""

    def __init__(
        self,
        folder: Path,
        header: Header,
        *,
        most_points: int = MOST_BYTES_OF_POINTS,
        most_events: int = MOST_BYTES_OF_EVENTS,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._header = header
        self._most_points = most_points
        self._most_events = most_events
        self.interval = header.interval_seconds
        self.last_step: int | None = None
        """Of the last point in the file that counts."""
        self._bytes = {Point: 0, Event: 0}
        self._whole = True
        """Whether the file ends with a whole line."""
        self._left_out = 0
        """Lines that are left out before the next try to thin the file; 0 where the last one did not fail."""
        with contextlib.suppress(FileNotFoundError):
            self._read()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(self._file).st_size == 0:
            self._write(header.encode() + "\n")

    def append(self, lines: Iterable[Line]) -> None:
        """Writes lines at the end, and thins the file when it is too long. While that fails, lines are left out."""
        for line in lines:
            if self._left_out:
                self._left_out -= 1
                continue
            text = line.encode() + "\n"
            if isinstance(line, Point | Event):
                self._bytes[type(line)] += len(text)
            self._write(text)
        if not self._left_out and (self._bytes[Point] > self._most_points or self._bytes[Event] > self._most_events):
            self._left_out = _LINES_BETWEEN_TRIES
            self._thin()
            self._left_out = 0

    def close(self) -> None:
        os.close(self._file)

    def _write(self, text: str) -> None:
        data = (text if self._whole else f"\n{text}").encode()
        self._whole = False
        while data:
            data = data[os.write(self._file, data) :]
        self._whole = True

    def _read(self) -> list[Point | Event]:
        content = self.path.read_bytes()
        lines: list[Point | Event] = []
        self._bytes = {Point: 0, Event: 0}
        for text in content.splitlines(keepends=True):
            line = decode(text)
            if isinstance(line, Header):
                # A file of another version, or one that a user edited, must not stop the lines.
                self.interval = min(max(self.interval, line.interval_seconds), _MOST_SECONDS)
            elif line is not None:
                lines.append(line)
                self._bytes[type(line)] += len(text)
        self._whole = not content or content.endswith(b"\n")
        lines = kept(lines)
        self.last_step = next((line.step for line in reversed(lines) if isinstance(line, Point)), None)
        return lines

    def _thin(self) -> None:
        """Points to half of what they may take, events by half where they are too many."""
        lines = self._read()
        events = sum(len(line.encode()) + 1 for line in lines if isinstance(line, Event))
        if events > self._most_events:
            every_second = {id(line) for line in [line for line in lines if isinstance(line, Event)][1::2]}
            lines = [line for line in lines if id(line) not in every_second]
        while _bytes_of_points(lines) > self._most_points // 2:
            fewer = thinned(lines)
            if len(fewer) == len(lines):
                break
            lines, self.interval = fewer, min(self.interval * 2, _MOST_SECONDS)
        header = Header(self._header.job, self._header.namespace, self._header.uid, self.interval)
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", encoding="ascii") as file:
            file.writelines(f"{line.encode()}\n" for line in (header, *lines))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._read()


def _bytes_of_points(lines: Iterable[Point | Event]) -> int:
    return sum(len(line.encode()) + 1 for line in lines if isinstance(line, Point))


class HistoryWriter:
    """The thread that looks at the training and writes what it finds.

    open_file: called in the thread. look(file): the lines of one look, with the file for its interval and last step; end(file): the last.
    """

    def __init__(
        self,
        open_file: Callable[[], HistoryFile],
        look: Callable[[HistoryFile], list[Line]],
        end: Callable[[HistoryFile], list[Line]],
    ) -> None:
        self._open = open_file
        self._look = look
        self._end = end
        self._over = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Writes the last lines, for `END_SECONDS` at most. What `end` looks at is final."""
        self._over.set()
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        file: HistoryFile | None = None
        while True:
            over = self._over.is_set()
            try:
                file = file or self._open()
                file.append(self._end(file) if over else self._look(file))
            except OSError as error:
                self._say(error)
            except Exception:  # a mistake of ours here is no reason to lose what is trained
                log.exception("the history is not written any more; the training goes on")
                return
            if over:
                break
            self._over.wait(INTERVAL_SECONDS)
        if file is not None:
            file.close()

    def _say(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            where = f" {error.filename}" if error.filename else ""
            log.warning("the history cannot be written:%s %s; the training goes on without", where, error.strerror)
