"""What the history of a job gets (api/history.py): points of its curves, and events, from one look at the progress after another.

Pure: the caller has the clock and the file.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from disttrain.api.history import Event, EventType, Line, Point, merged
from disttrain.api.runtime import Progress

INTERVAL_SECONDS: Final = 0.25
"""Between two looks, and at first between two points; each time that the file is thinned, it doubles."""
_FIRST_TABLE_SECONDS: Final = 60.0
"""The table of the ranks is written after this time, and then whenever the time has doubled, and at the end."""
_LONGEST: Final = 400
"""Characters of a message."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is known at one moment, beside the progress."""

    time: float
    """Seconds since 1970."""
    progress: Progress
    samples: int = 0
    """That were reported so far."""
    gradient_norm: float | None = None
    phases: Mapping[str, float] | None = None
    """Seconds by phase, which only grow."""
    fell_back_to: int | None = None
    """The lowest step that the training fell back to since the last look."""
    began_at: int | None = None
    """The step that this master's training began at; None before its first report."""


class Recorder:
    """The lines of one master. last_step: of the last point that the file has."""

    def __init__(self, *, attempt: int, last_step: int | None) -> None:
        self._attempt = attempt
        self._last_step = last_step
        self._before: Look | None = None
        self._pending: Point | None = None
        self._pending_since = 0.0
        self._next_table = _FIRST_TABLE_SECONDS
        self._began = 0.0
        self._begun = False

    def look(self, now: Look, *, interval: float, ranks: Callable[[], list[dict[str, Any]]]) -> list[Line]:
        """The lines that a look adds. interval: seconds between two points. ranks: the table as it is now."""
        lines: list[Line] = []
        before = self._before
        if before is None:
            self._began = now.time
            message = _text(now.progress.resumed)
            lines.append(Event(EventType.START, now.time, details=_present(attempt=self._attempt, message=message)))
        back = self._fell_back(now)
        if back is not None:
            if self._pending is not None and self._pending.step > back:
                self._pending = None
            lines += [*self._flush(), Event(EventType.FALL_BACK, now.time, back)]
        lines += self._events(now, before.progress if before else Progress(attempt=self._attempt))
        if before is not None and (now.progress.step, now.samples) != (before.progress.step, before.samples):
            self._add(now, before)
        if self._pending is not None and now.time - self._pending_since >= interval:
            lines += self._flush()
        if now.time - self._began >= self._next_table:
            self._next_table *= 2
            lines += _table(now, ranks)
        self._before = now
        return lines

    def end(self, now: Look, *, interval: float, ranks: Callable[[], list[dict[str, Any]]]) -> list[Line]:
        """The last lines: the training as it ends, and its end."""
        lines = [*self.look(now, interval=interval, ranks=list), *self._flush()]
        progress = now.progress
        if progress.finished and self._begun:
            # A mean over the last steps, as everything else shows it.
            lines.append(_point(now, seconds=0.0, phases={}))
        lines += _table(now, ranks)
        spent = progress.goodput
        goodput = spent.model_dump(by_alias=True, exclude={"began"}) if spent is not None else None
        message = _text(progress.nan_loss or progress.stopped or progress.warning)
        details = _present(attempt=self._attempt, finished=progress.finished, message=message, goodput=goodput)
        lines.append(Event(EventType.END, now.time, progress.step, details))
        return lines

    def _fell_back(self, now: Look) -> int | None:
        """The step behind which the file's points do not count any more."""
        if self._begun or now.began_at is None:
            return now.fell_back_to
        self._begun = True
        last = self._last_step
        back = [step for step in (now.fell_back_to, now.began_at if last is not None else None) if step is not None]
        return min(back) if last is not None and back and min(back) < last else None

    def _add(self, now: Look, before: Look) -> None:
        phases = {name: seconds - (before.phases or {}).get(name, 0.0) for name, seconds in (now.phases or {}).items()}
        point = _point(now, seconds=max(0.0, now.time - before.time), phases=phases)
        if self._pending is None:
            self._pending, self._pending_since = point, before.time
        else:
            self._pending = merged(self._pending, point)

    def _flush(self) -> list[Line]:
        pending, self._pending = self._pending, None
        return [] if pending is None else [pending]

    def _events(self, now: Look, before: Progress) -> Iterator[Event]:
        progress, time = now.progress, now.time
        if progress.generation != before.generation or progress.world_size != before.world_size:
            details = {"round": progress.generation, "workers": progress.world_size}
            yield Event(EventType.ROUND, time, progress.step, details)
        known = {one.pod: one.restarts for one in before.restarts_in_place}
        for one in progress.restarts_in_place:
            if one.restarts > known.get(one.pod, 0):
                details = _present(pod=one.pod, exitCode=one.exit_code, message=_text(one.message))
                yield Event(EventType.RESTART, one.time.timestamp(), progress.step, details)
        if (rolled := progress.roll_backs) is not None and rolled.count > (before.roll_backs or rolled).count:
            yield Event(EventType.ROLL_BACK, time, progress.step, _present(message=_text(rolled.reason)))
        if (saved := progress.last_checkpoint) is not None and saved != before.last_checkpoint:
            yield Event(EventType.CHECKPOINT, saved.time.timestamp(), saved.step)
        if progress.evaluation and progress.evaluation_step != before.evaluation_step:
            yield Event(EventType.EVALUATION, time, progress.evaluation_step, {"values": progress.evaluation})


def _point(now: Look, *, seconds: float, phases: Mapping[str, float]) -> Point:
    progress = now.progress
    speed, norm = progress.samples_per_second, now.gradient_norm
    return Point(
        step=progress.step,
        time=now.time,
        seconds=seconds,
        epoch=progress.epoch,
        loss=progress.loss,
        samples_per_second=speed,
        gradient_norm=norm if norm is not None and math.isfinite(norm) else None,
        staleness=progress.max_staleness_seen,
        workers=progress.world_size or None,
        values=progress.values or {},
        phases=phases,
    )


def _table(now: Look, ranks: Callable[[], list[dict[str, Any]]]) -> list[Line]:
    table = ranks()
    return [Event(EventType.RANKS, now.time, details={"ranks": table})] if table else []


def _text(message: str | None) -> str | None:
    return message[:_LONGEST] if message else None


def _present(**details: Any) -> dict[str, Any]:
    return {name: value for name, value in details.items() if value is not None}
