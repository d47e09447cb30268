"""The lines of many processes as one log: which of them are wanted, in which order, and which were shown already. No clock, no I/O."""

import heapq
import re
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from disttrain.api.names import Role, label

SECOND: Final = 1_000_000_000
"""Nanoseconds."""
_STAMP: Final = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?")


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that a process printed."""

    role: Role
    index: int
    """Of its pod."""
    time: int
    """Nanoseconds since 1970, UTC."""
    text: str

    @property
    def label(self) -> str:
        """The short name before each line: worker-1, ps-0, master."""
        return label(self.role, self.index)


@dataclass(frozen=True, slots=True)
class Selection:
    """The processes whose lines are wanted."""

    roles: Collection[Role] = ()
    """Empty: all."""
    ranks: Collection[int] = ()
    """Of the training processes, which workers hold, and of parameter servers; empty: all."""

    def takes(self, role: Role, index: int, processes_per_worker: int = 1) -> bool:
        """Whether a pod has one of them."""
        if self.roles and role not in self.roles:
            return False
        if not self.ranks:
            return True
        size = processes_per_worker if role is Role.WORKER else 1
        wanted = bool(self.roles) or role is Role.WORKER  # ranks without a role are those of the training
        return wanted and any(rank // size == index for rank in self.ranks)


ALL: Final = Selection()


def stamped(line: bytes) -> tuple[int | None, bytes]:
    """The time and the text of a line as a kubelet sends it with timestamps; no time where it begins with none.

    RFC 3339 with nanoseconds, which a datetime cannot hold.
    """
    found = _STAMP.match(line)
    if found is None:
        return None, line
    try:
        moment = datetime.fromisoformat((found[1] + found[3].replace(b"Z", b"+00:00")).decode())
    except ValueError:
        return None, line
    return int(moment.timestamp()) * SECOND + int((found[2] or b"0").ljust(9, b"0")), line[found.end() :]


def last_state(line: bytes) -> str:
    """A line as text. Of one that a progress bar rewrote with carriage returns, the last state counts."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


class Shown:
    """What was shown of the log of one container, so that it can be asked for again from there without a loss or a repetition.

    A kubelet is asked for the lines since a whole second, so those of that second come once more.
    """

    def __init__(self) -> None:
        self._second: int | None = None
        self._lines: list[bytes] = []
        self._again: Counter[bytes] = Counter()

    @property
    def since(self) -> str:
        """The second to ask from, RFC 3339; "" before the first line."""
        return "" if self._second is None else f"{datetime.fromtimestamp(self._second, UTC):%Y-%m-%dT%H:%M:%SZ}"

    def ask_again(self) -> None:
        """The log is read once more, since that second."""
        self._again = Counter(self._lines)

    def is_new(self, line: bytes, time: int) -> bool:
        """Whether this line, with its time, was not shown yet; from now on it was."""
        if self._again[line] > 0:
            self._again[line] -= 1
            return False
        second = time // SECOND
        # A clock that was set back leaves later seconds above: they are kept, since they will come again.
        if self._second is None or second > self._second:
            self._lines.clear()
        self._second = second
        self._lines.append(line)
        return True


class TimeOrder:
    """Merges sources whose lines are each in order. A line waits for the other sources at most `patience` seconds from when it came.

    So a log that is caught up is in order throughout, and a live one is never held up by a process that prints nothing.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._sources: dict[str, deque[tuple[LogLine, float]]] = {}
        self._open: set[str] = set()

    def open(self, source: str) -> None:
        """Another source begins."""
        self._sources.setdefault(source, deque())
        self._open.add(source)

    def close(self, source: str) -> None:
        """A source has ended; what it left is still taken."""
        self._open.discard(source)

    def put(self, source: str, line: LogLine, now: float) -> None:
        """The next line of a source. now: seconds of any clock."""
        self._sources[source].append((line, now))

    def waiting(self, source: str) -> int:
        """Lines of a source that were not taken yet."""
        return len(self._sources[source])

    def take(self, now: float) -> list[LogLine]:
        """The lines whose turn has come, in the order of time."""
        heads = [(lines[0][0].time, source) for source, lines in self._sources.items() if lines]
        heapq.heapify(heads)
        missing = {source for source in self._open if not self._sources[source]}
        taken = []
        while heads:
            _, source = heads[0]
            lines = self._sources[source]
            line, came = lines[0]
            if missing and now - came < self._patience:
                break
            lines.popleft()
            taken.append(line)
            if lines:
                heapq.heapreplace(heads, (lines[0][0].time, source))
            else:
                heapq.heappop(heads)
                if source in self._open:
                    missing.add(source)
        for source in [source for source, lines in self._sources.items() if not lines and source not in self._open]:
            del self._sources[source]
        return taken

    def due(self) -> float | None:
        """When a line that waits for other sources is taken in any case; None where none waits."""
        heads = [lines[0] for lines in self._sources.values() if lines]
        return min(heads, key=lambda head: head[0].time)[1] + self._patience if heads else None
