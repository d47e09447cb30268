"""The logs of a local run as one: what its processes have printed, and on wish what they print until the run ends.

Logs of a run have the lines of the processes as they are. A line's time is the clock that the trainer's own lines begin with; others have
that of the line before, or of the file where no line has one.
"""

import json
import re
import time
from collections.abc import Generator, Iterator
from datetime import datetime, timedelta
from datetime import time as clock_time
from pathlib import Path
from typing import Final

from disttrain.api.names import Role
from disttrain.local.runs import is_running
from disttrain.logs import SECOND, LogLine, Selection, last_state

_CLOCK: Final = re.compile(rb"(\d\d):(\d\d):(\d\d)[.,](\d{3}) ")
_NAME: Final = re.compile(r".*-(master|ps|worker)-(\d+)")
_ROLES: Final = {role.short: role for role in Role}
_HALF_A_DAY: Final = timedelta(hours=12)
_LOOK_SECONDS: Final = 0.2
"""Between two looks at the files."""


def of_run(
    folder: Path, selection: Selection, *, since: float | None = None, tail: int | None = None, follow: bool = False
) -> Generator[list[LogLine], None, None]:
    """The lines of a run in the order of time, some at once. since: seconds since 1970. tail: the last lines of each process.

    follow: to the end of the run, without an end of the iterator before that; what comes meanwhile is in the order in which it came.
    """
    processes = _processes_per_worker(folder) if selection.ranks else 1
    read: dict[Path, _File] = {}

    def files() -> Iterator[_File]:
        for path in sorted((folder / "logs").glob("*.log")):
            found = _NAME.fullmatch(path.stem)
            if found is not None and selection.takes(role := _ROLES[found[1]], int(found[2]), processes):
                yield read.setdefault(path, _File(path, role, int(found[2])))

    lines: list[LogLine] = []
    for file in files():
        present = [line for line in file.present() if since is None or line.time >= since * SECOND]
        lines += present if tail is None else present[max(0, len(present) - tail) :]
    yield sorted(lines, key=lambda line: line.time)  # stable: lines of one process stay as they are
    while follow:
        goes_on = is_running(folder)  # asked first: what was printed before the end is then in the files
        if news := [line for file in files() for line in file.more(last=not goes_on)]:
            yield news
        if not goes_on:
            return
        time.sleep(_LOOK_SECONDS)


def _processes_per_worker(folder: Path) -> int:
    from disttrain.local.folders import stored_job  # imports the models, which takes half a second

    job = stored_job(folder)
    return job.spec.processes_per_worker if job is not None else 1


class _File:
    """The log of one process and of its successors."""

    def __init__(self, path: Path, role: Role, index: int) -> None:
        self._path, self._role, self._index = path, role, index
        self._offset = 0

    def present(self) -> list[LogLine]:
        """The whole lines that are there."""
        lines = self._whole(last=False)
        try:
            changed = datetime.fromtimestamp(self._path.stat().st_mtime)
        except OSError:
            return []
        return [
            LogLine(self._role, self._index, int(moment.timestamp() * 1000) * (SECOND // 1000), last_state(line))
            for line, moment in zip(lines, _moments(lines, changed), strict=True)
        ]

    def more(self, *, last: bool) -> list[LogLine]:
        """Those that came since. last: also one without an end."""
        now = time.time_ns()
        return [LogLine(self._role, self._index, now, last_state(line)) for line in self._whole(last=last)]

    def _whole(self, *, last: bool) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        if not last:
            data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        lines = data.split(b"\n")
        return lines if lines[-1] else lines[:-1]


def _moments(lines: list[bytes], changed: datetime) -> list[datetime]:
    """When each line was printed. A clock that goes back is that of the next day; the last line is of the day of the file's last change."""
    clocks = [_clock(line) for line in lines]
    last = next((clock for clock in clocks if clock is not None), None)
    if last is None:
        return [changed] * len(lines)
    days, since_first_midnight = 0, []
    for clock in clocks:
        if clock is not None:
            days += last - clock > _HALF_A_DAY  # a little back is the line of another thread
            last = clock
        since_first_midnight.append(timedelta(days=days) + last)
    midnight = datetime.combine(changed, clock_time.min)
    if midnight + last - changed > _HALF_A_DAY:
        days += 1
    return [midnight - timedelta(days=days) + moment for moment in since_first_midnight]


def _clock(line: bytes) -> timedelta | None:
    """The time of day that a line of the trainer begins with, or that its JSON has."""
    try:
        if (found := _CLOCK.match(line)) is not None:
            hours, minutes, seconds, milliseconds = map(int, found.groups())
            return timedelta(hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds)
        if line.startswith(b'{"time": "'):
            moment = datetime.fromisoformat(str(json.loads(line)["time"])).astimezone().replace(tzinfo=None)
            return moment - datetime.combine(moment, clock_time.min)
    except (ValueError, KeyError):
        pass
    return None
