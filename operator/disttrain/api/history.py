"""The history of a job, `history.jsonl` beside its checkpoints: a line of JSON for each point of its curves, and for each event.

    {"history": 1, "job": "digits", "namespace": "default", "uid": "…", "intervalSeconds": 0.25}     the first line
    {"step": 12, "time": 1764487200.25, "seconds": 0.25, "epoch": 1, "loss": 0.41, "samplesPerSecond": 5120, …}
    {"event": "checkpoint", "step": 12, "time": 1764487200.5}

A point is the mean over its `seconds`. A file that has grown too long is thinned: neighbouring points become one, events stay. After an
event fallBack the steps behind its `step` were done again: `kept` leaves out the points that it undid. A writer that was killed leaves a
cut line, and a claim may hold anything: a line that is none of these is passed over. The trainer writes, the command line reads it. Pure.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

FILE: Final = "history.jsonl"
FORMAT: Final = 1
_LARGEST: Final = 1 << 53
_MOST_NAMED: Final = 256
"""Named numbers of a line that are read."""


class EventType(StrEnum):
    """What happened."""

    START = "start"
    """A master began, and with it an attempt: `attempt`; `message`: where the training goes on."""
    ROUND = "round"
    """The processes formed: `round`, `workers` (training processes)."""
    FALL_BACK = "fallBack"
    """The steps after `step` were lost, and are done again."""
    RESTART = "restart"
    """A process was started again in its pod: `pod`, `exitCode`, `message`."""
    CHECKPOINT = "checkpoint"
    """A checkpoint of `step` is complete."""
    EVALUATION = "evaluation"
    """The parameters of `step` were evaluated: `values`."""
    ROLL_BACK = "rollBack"
    """trainer.nanPolicy went back to a checkpoint: `message`."""
    RANKS = "ranks"
    """`ranks`: what each rank has computed since the last start."""
    END = "end"
    """The master ended: `finished`, `message`, `goodput` (seconds by bucket)."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first line."""

    job: str
    namespace: str
    uid: str
    interval_seconds: float
    """Least time between two points."""

    def encode(self) -> str:
        fields = {"history": FORMAT, "job": self.job, "namespace": self.namespace, "uid": self.uid}
        return _json({**fields, "intervalSeconds": self.interval_seconds})


@dataclass(frozen=True, slots=True)
class Point:
    """The training at one moment, and the mean over the time before it."""

    step: int
    time: float
    """Seconds since 1970, by the master's clock."""
    seconds: float
    """Of the training that it stands for."""
    epoch: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    gradient_norm: float | None = None
    staleness: int | None = None
    """The largest so far."""
    workers: int | None = None
    """Training processes."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Named values of the loss."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the ranks together spent in each phase of their steps."""

    def encode(self) -> str:
        return _json(
            {
                "step": self.step,
                "time": round(self.time, 3),
                "seconds": round(self.seconds, 3),
                "epoch": self.epoch,
                "loss": _short(self.loss),
                "samplesPerSecond": _short(self.samples_per_second, 6),
                "gradientNorm": _short(self.gradient_norm, 6),
                "staleness": self.staleness,
                "workers": self.workers,
                "values": {name: _short(value) for name, value in self.values.items() if math.isfinite(value)},
                "phases": {name: round(value, 4) for name, value in self.phases.items() if value >= 0.00005},
            }
        )


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened once."""

    type: str
    """An EventType, or one of a later version."""
    time: float
    step: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> str:
        return _json({"event": self.type, "step": self.step, "time": round(self.time, 3), **self.details})


Line: TypeAlias = Header | Point | Event


def decode(line: bytes | str) -> Line | None:
    """What a line says; None of one that is cut or no line of a history."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    if "history" in data:
        job, namespace, uid = (str(data.get(name) or "") for name in ("job", "namespace", "uid"))
        return Header(job, namespace, uid, _number(data.get("intervalSeconds")) or 0.0)
    time, step = _number(data.get("time")), _count(data.get("step"))
    if time is None:
        return None
    if isinstance(kind := data.get("event"), str):
        return Event(kind, time, step, {name: v for name, v in data.items() if name not in ("event", "step", "time")})
    if step is None:
        return None
    return Point(
        step=step,
        time=time,
        seconds=max(0.0, _number(data.get("seconds")) or 0.0),
        epoch=_count(data.get("epoch")),
        loss=_number(data.get("loss")),
        samples_per_second=_number(data.get("samplesPerSecond")),
        gradient_norm=_number(data.get("gradientNorm")),
        staleness=_count(data.get("staleness")),
        workers=_count(data.get("workers")),
        values=numbers(data.get("values")),
        phases=numbers(data.get("phases")),
    )


def numbers(value: object) -> dict[str, float]:
    """The finite numbers of an object of a line, by name."""
    if not isinstance(value, Mapping):
        return {}
    found = {str(name): _number(one) for name, one in list(value.items())[:_MOST_NAMED]}
    return {name: one for name, one in found.items() if one is not None}


def kept(lines: Iterable[Point | Event]) -> list[Point | Event]:
    """The lines without the points that a fall back undid, those of steps that were done again. Events stay, undone or not."""
    result: list[Point | Event | None] = []
    points: list[int] = []
    """Where the points are that count, by their steps."""
    for line in lines:
        until = None
        if isinstance(line, Point):
            until = line.step - 1
        elif line.type == EventType.FALL_BACK:
            until = line.step
        while points and until is not None and _step(result[points[-1]]) > until:
            # The same step twice is the newer line about it, as at the end of a training.
            result[points.pop()] = None
        if isinstance(line, Point):
            points.append(len(result))
        result.append(line)
    return [line for line in result if line is not None]


def merged(first: Point, second: Point) -> Point:
    """One point for two neighbours: means, weighted by the time that each stands for; what is no mean is the second's."""
    weights = first.seconds, second.seconds
    return Point(
        step=second.step,
        time=second.time,
        seconds=sum(weights),
        epoch=second.epoch,
        loss=_mean(first.loss, second.loss, weights),
        samples_per_second=_mean(first.samples_per_second, second.samples_per_second, weights),
        gradient_norm=_mean(first.gradient_norm, second.gradient_norm, weights),
        staleness=second.staleness if second.staleness is not None else first.staleness,
        workers=second.workers,
        values=_named(first.values, second.values, lambda a, b: _mean(a, b, weights)),
        phases=_named(first.phases, second.phases, lambda a, b: (a or 0.0) + (b or 0.0)),
    )


def thinned(lines: Iterable[Point | Event]) -> list[Point | Event]:
    """Each two neighbouring points as one, which stands where the second stood; none across a start or a fall back."""
    result: list[Point | Event] = []
    first: int | None = None
    """Where a point is that has no partner yet."""
    for line in lines:
        if isinstance(line, Event):
            first = None if line.type in (EventType.START, EventType.FALL_BACK) else first
        elif first is None:
            first = len(result)
        else:
            before = result.pop(first)
            assert isinstance(before, Point), "an event is no partner"
            result.append(merged(before, line))
            first = None
            continue
        result.append(line)
    return result


def _step(line: Point | Event | None) -> int:
    return line.step if isinstance(line, Point) else -1


def _named(first: Mapping[str, float], second: Mapping[str, float], of: Any) -> dict[str, float]:
    return {name: of(first.get(name), second.get(name)) for name in [*first, *(n for n in second if n not in first)]}


def _mean(first: float | None, second: float | None, weights: tuple[float, float]) -> float | None:
    if first is None or second is None:
        return second if first is None else first
    total = sum(weights)
    return (first * weights[0] + second * weights[1]) / total if total > 0 else (first + second) / 2


def _json(fields: Mapping[str, Any]) -> str:
    present = {name: value for name, value in fields.items() if value is not None and value != {}}
    return json.dumps(present, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _short(value: float | None, digits: int = 9) -> float | None:
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _count(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number < _LARGEST else None
