"""What a report says of a run: its curves, its time line, where its time went, its ranks, its job. From the history and the job. Pure.

Both may come from another version, or from a claim that anybody writes to: what is not of the type that this version knows is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import IO, Any, Final, TypeAlias

from disttrain.api.history import Event, EventType, Point, kept, numbers
from disttrain.cli.curves import Curve, Panel, Run, lines_of, of_points
from disttrain.cli.redaction import redacted
from disttrain.client.text import one_line

Body: TypeAlias = Mapping[str, Any]

_BUCKETS: Final = ("productive", "queued", "starting", "redone", "stalled", "undecided")
_TOLD: Final = {
    EventType.START: "start",
    EventType.RESTART: "restart",
    EventType.FALL_BACK: "fall back",
    EventType.ROLL_BACK: "roll back",
    EventType.END: "end",
}
"""The events that are told one by one."""
_MOST_TOLD: Final = 200
_MOST_VALUES: Final = 6
"""Named values, and results of evaluations, that get a diagram."""


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which steps were made. Seconds since 1970."""

    begin: float
    end: float
    lost: bool
    """A fall back undid the steps."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened once."""

    time: float
    kind: str
    """restart, fall back, roll back, start, end, checkpoint."""
    text: str


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank computed since the last start."""

    rank: int
    samples: float | None
    loss: float | None
    phases: Mapping[str, float]
    """Seconds by phase."""


@dataclass(frozen=True, slots=True)
class Story:
    """One run."""

    run: Run
    named: Mapping[str, Curve]
    """Curves beside loss and throughput, by their titles."""
    facts: Sequence[tuple[str, str]]
    spans: Sequence[Span]
    moments: Sequence[Moment]
    """All but checkpoints."""
    checkpoints: Sequence[float]
    goodput: Mapping[str, float]
    """Seconds by bucket."""
    ranks: Sequence[Rank]
    spec: Body
    """Of the job, without its secrets; empty where the job is not known."""

    @property
    def time(self) -> tuple[float, float] | None:
        """When the history begins and ends; None of one that holds nothing."""
        times = [t for span in self.spans for t in (span.begin, span.end)] + [moment.time for moment in self.moments]
        return (min(times), max(times)) if times else None


def read(file: IO[bytes], name: str, job: Body) -> Story:
    """The story of a history and of its job, {} where it is not known. Raises OSError."""
    return of_lines(lines_of(file), name, job)


def of_lines(lines: Sequence[Point | Event], name: str, job: Body) -> Story:
    """The same of lines that are read."""
    remaining = kept(lines)
    points = [line for line in remaining if isinstance(line, Point)]
    events = [line for line in lines if isinstance(line, Event)]
    moments = [Moment(one.time, _TOLD[EventType(one.type)], _said(one)) for one in events if one.type in _TOLD]
    run = of_points(points, name)
    return Story(
        run=run,
        named={title: curve for title, curve in _named(points, events).items() if curve},
        facts=_facts(run, points, moments, job),
        spans=_spans(lines),
        moments=moments[-_MOST_TOLD:],
        checkpoints=[one.time for one in events if one.type == EventType.CHECKPOINT],
        goodput=_goodput(events, job),
        ranks=_ranks(events),
        spec=redacted(_object(job, "spec")),
    )


def panels(stories: Sequence[Story]) -> list[Panel]:
    """The diagrams that these runs have values for, each with the curves of all."""
    titles = dict.fromkeys(title for story in stories for title in story.named)
    found = [
        Panel("loss", tuple(story.run.loss for story in stories)),
        Panel("samples/s", tuple(story.run.throughput for story in stories), lowest=0.0),
        *(Panel(title, tuple(story.named.get(title, ()) for story in stories)) for title in titles),
    ]
    # Of a single value, as of the evaluation at the end, the numbers above the diagrams say all.
    return [panel for panel in found if any(len(curve) > 1 for curve in panel.curves)]


def flat(value: Any, path: str = "") -> dict[str, str]:
    """The fields of an object by their paths, to be compared with another one's."""
    if isinstance(value, Mapping) and value:
        parts = [flat(one, f"{path}.{name}" if path else str(name)) for name, one in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    return {path: one_line(value)} if path else {}


def differences(first: Body, second: Body) -> list[tuple[str, str, str]]:
    """The fields that differ: their path, and both values; "" of one that is not set."""
    one, other = flat(first), flat(second)
    return [
        (name, one.get(name, ""), other.get(name, "")) for name in {**one, **other} if one.get(name) != other.get(name)
    ]


def _spans(lines: Sequence[Point | Event]) -> list[Span]:
    """When steps were made. Neighbours are one, so that a week has no more spans than it had interruptions."""
    spans: list[Span] = []
    points = [line for line in lines if isinstance(line, Point)]
    # Of a file of which only every n-th point was read, what was left out lies between two of them.
    left_out = median([b.time - b.seconds - a.time for a, b in pairwise(points)] or [0.0])
    for line, lost in zip(lines, _lost(lines), strict=True):
        if not isinstance(line, Point):
            continue
        begin = line.time - line.seconds
        # Of two points that follow one another the second begins where the first ends, but for the rounding and a quiet moment.
        if spans and spans[-1].lost == lost and begin - spans[-1].end <= max(0.1, line.seconds / 2, 2 * left_out):
            spans[-1] = Span(spans[-1].begin, max(line.time, spans[-1].end), lost)
        else:
            spans.append(Span(begin, line.time, lost))
    return spans


def _lost(lines: Sequence[Point | Event]) -> list[bool]:
    """Of each line, whether a later one says that the training went on from an earlier step."""
    found, lowest = [], float("inf")
    for line in reversed(lines):
        found.append(line.step is not None and line.step > lowest)
        if line.step is not None and (isinstance(line, Point) or line.type == EventType.FALL_BACK):
            lowest = min(lowest, line.step)
    return found[::-1]


def _named(points: Sequence[Point], events: Sequence[Event]) -> dict[str, Curve]:
    curves: dict[str, list[tuple[int, float]]] = {"gradient norm": [], "staleness (steps)": []}
    for point in points:
        if point.gradient_norm is not None:
            curves["gradient norm"].append((point.step, point.gradient_norm))
        if point.staleness is not None:
            curves["staleness (steps)"].append((point.step, float(point.staleness)))
        for name, value in point.values.items():
            if name in curves or len(curves) < 2 + _MOST_VALUES:
                curves.setdefault(name, []).append((point.step, value))
    if not any(value for _, value in curves["staleness (steps)"]):
        del curves["staleness (steps)"]
    for event in events:
        if event.type == EventType.EVALUATION and event.step is not None:
            for name, value in numbers(event.details.get("values")).items():
                title = f"{name} (evaluation)"
                if title in curves or len(curves) < 2 + 2 * _MOST_VALUES:
                    curves.setdefault(title, []).append((event.step, value))
    # An evaluation of steps that were done again comes twice; a curve has ascending steps, and the last one counts.
    return {one_line(name): sorted(dict(curve).items()) for name, curve in curves.items()}


def _facts(run: Run, points: Sequence[Point], moments: Sequence[Moment], job: Body) -> list[tuple[str, str]]:
    status, strategy = _object(job, "status"), _object(job, "spec", "strategy")
    training = _object(status, "training")
    facts = [("state", status.get("state")), ("strategy", strategy.get("type"))]
    if points:
        total = training.get("totalSteps")
        epoch = f", epoch {points[-1].epoch}" if points[-1].epoch is not None else ""
        facts.append(("steps", f"{points[-1].step}{f' of {total}' if total else ''}{epoch}"))
        facts.append(("workers", str(points[-1].workers) if points[-1].workers is not None else None))
    if run.loss:
        lowest = min(value for _, value in run.loss)
        facts.append(("loss", f"{run.loss[-1][1]:.6g}, lowest {lowest:.6g}"))
    if run.throughput:
        facts.append(("samples/s", f"{run.throughput[-1][1]:.6g}, highest {max(v for _, v in run.throughput):.6g}"))
    if evaluation := numbers(training.get("evaluation")):
        facts.append(("evaluation", ", ".join(f"{name} {value:.6g}" for name, value in evaluation.items())))
    facts.append(("restarts", str(sum(moment.kind == "restart" for moment in moments))))
    if checkpoint := _object(training, "lastCheckpoint"):
        facts.append(("checkpoint", f"step {checkpoint.get('step')}"))
    facts.append(("model", _object(training, "model").get("path")))
    return [(name, one_line(text)) for name, text in facts if text]


def _said(event: Event) -> str:
    """An event in words."""
    details = event.details
    message = details.get("message") or ""
    match event.type:
        case EventType.START:
            return one_line(f"attempt {details.get('attempt', '?')}{f': {message}' if message else ''}")
        case EventType.RESTART:
            return one_line(f"exit code {details.get('exitCode', '?')}{f': {message}' if message else ''}")
        case EventType.FALL_BACK:
            return f"the steps after {event.step} were lost and done again"
        case EventType.END:
            how = "finished" if details.get("finished") is True else "not finished"
            return one_line(f"{how} at step {event.step}{f': {message}' if message else ''}")
        case _:
            return one_line(message)


def _goodput(events: Sequence[Event], job: Body) -> dict[str, float]:
    """Seconds by bucket: the job's own account, or without one the sum of what its masters left."""
    accounts = [_object(_object(job, "status"), "goodput")]
    if not numbers(accounts[0]):
        accounts = [one.details.get("goodput") or {} for one in events if one.type == EventType.END]
    found = dict.fromkeys(_BUCKETS, 0.0)
    for account in accounts:
        for name, seconds in numbers(account).items():
            if (bucket := name.removesuffix("Seconds")) in found:
                found[bucket] += max(0.0, seconds)
    return {bucket: seconds for bucket, seconds in found.items() if seconds}


def _ranks(events: Sequence[Event]) -> list[Rank]:
    table = next((one.details.get("ranks") for one in reversed(events) if one.type == EventType.RANKS), None)
    found = []
    for row in table if isinstance(table, list) else ():
        if isinstance(row, Mapping) and isinstance(rank := row.get("rank"), int):
            values = numbers({name: row.get(name) for name in ("samples", "loss")})
            found.append(Rank(rank, values.get("samples"), values.get("loss"), numbers(row.get("phases"))))
    return sorted(found, key=lambda one: one.rank)


def _object(body: Body, *path: str) -> Body:
    for name in path:
        part = body.get(name)
        if not isinstance(part, Mapping):
            return {}
        body = part
    return body
