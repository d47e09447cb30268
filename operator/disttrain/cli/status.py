"""Jobs of a cluster in text: a table of all, one with its pods as a tree, its Events. From what is stored, also by another version.

Text from a cluster may hold anything: control characters would reach the terminal, and are replaced. A field that is not of the type that
this version knows counts as one that is not there.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from disttrain.api.crd import COLUMNS
from disttrain.api.names import LABEL_INDEX, LABEL_ROLE, TRAINER_CONTAINER
from disttrain.cli.durations import clock
from disttrain.client.jobs import moment_of
from disttrain.client.text import one_line

Body: TypeAlias = Mapping[str, Any]

_COLUMNS: Final = ("NAME", *(name for name, _, _, priority, _ in COLUMNS if not priority))
"""As `kubectl get dtj` has them."""
_WAITING: Final = ("Valid", "Suspended", "Scheduled", "Ready", "Progressing")


def table(jobs: Sequence[Body], *, with_namespace: bool = False, now: datetime | None = None) -> str:
    """One line a job, and one with the names of the columns."""
    moment = now or datetime.now(UTC)
    rows = [[*(["NAMESPACE"] if with_namespace else []), *_COLUMNS]]
    for job in jobs:
        metadata, status = job["metadata"], _object(job, "status")
        training, worker = _object(status, "training"), _object(status, "worker")
        total, percent = training.get("totalSteps"), training.get("progressPercent")
        wanted = worker.get("targetReplicas", _object(job, "spec", "worker").get("replicas", 1))
        rows.append(
            [
                *([metadata["namespace"]] if with_namespace else []),
                metadata["name"],
                status.get("state", "-"),
                _object(job, "spec", "strategy").get("type", "-"),
                f"{worker.get('readyReplicas', 0)}/{wanted}",
                f"{training.get('step', 0)}/{total}" if total else str(training.get("step", "-")),
                f"{percent}%" if percent is not None else "-",
                _number(training.get("loss")),
                _number(training.get("samplesPerSecond")),
                str(_object(status, "restarts").get("total", 0)),
                _clock(training.get("etaSeconds")),
                _age(metadata.get("creationTimestamp"), moment),
            ]
        )
    return _aligned(rows)


def tree(job: Body, pods: Sequence[Body], *, now: datetime | None = None) -> str:
    """A job: its state, why it waits, where it is, what it lost, its pods by role."""
    moment = now or datetime.now(UTC)
    metadata = job["metadata"]
    head = (
        f"{metadata['namespace']}/{metadata['name']}",
        state(job),
        _object(job, "spec", "strategy").get("type", ""),
        _age(metadata.get("creationTimestamp"), moment),
    )
    lines = ["  ".join(map(one_line, head))]
    lines += [f"├─ {name:<11} {one_line(text)}" for name, text in _facts(job, moment)]
    rows = [_pod(pod, moment) for pod in sorted(pods, key=_place)]
    pod_lines = _aligned(rows).splitlines() if rows else ["no pods"]
    lines += [f"{'└─' if number == len(pod_lines) - 1 else '├─'} {line}" for number, line in enumerate(pod_lines)]
    return "\n".join(lines)


def events(found: Iterable[Body], *, now: datetime | None = None) -> str:
    """The Events about a job, the oldest first."""
    moment = now or datetime.now(UTC)
    rows = [["AGE", "TYPE", "OBJECT", "REASON", "MESSAGE"]]
    for event in found:
        of, count = _object(event, "involvedObject"), event.get("count")
        times = f" (x{count})" if isinstance(count, int) and count > 1 else ""
        object_ = f"{of.get('kind', '')}/{of.get('name', '')}".lower()
        rows.append(
            [
                _age(moment_of(event), moment),
                event.get("type", ""),
                object_,
                event.get("reason", ""),
                f"{event.get('message', '')}{times}",
            ]
        )
    return _aligned(rows)


def state(job: Body) -> str:
    """Its status.state."""
    return str(_object(job, "status").get("state", "not seen by an operator yet"))


def line(job: Body) -> str:
    """A job in one line: its state, and where it is, or why it waits."""
    wanted = ("step",) if state(job) == "Training" else ("waits", "restarting")
    about = next((text for name, text in _facts(job, datetime.now(UTC)) if name in wanted), "")
    return one_line(f"{job['metadata']['name']}: {state(job)}  {about}").rstrip()


def outcome(job: Body) -> str:
    """How a job ended, in a line, and one each for what it lost and left."""
    facts = _facts(job, datetime.now(UTC))
    how = next((text for name, text in facts if name in ("failed", "complete")), "")
    head = f"{job['metadata']['name']}: {state(job)}  {how}".rstrip()
    rest = [
        f"  {name:<11} {text}" for name, text in facts if name in ("step", "values", "restarts", "checkpoint", "model")
    ]
    return "\n".join(map(one_line, [head, *rest]))


def what_follows(job: Body, *, suspended: bool) -> str:
    """What becomes of a job that was just suspended, or resumed: nothing of one that has ended."""
    state = _object(job, "status").get("state")
    if state in ("Complete", "Failed"):
        return f"it is {state}, and stays so"
    return "it takes a checkpoint, and its pods end" if suspended else "it goes on where it was"


def _facts(job: Body, now: datetime) -> list[tuple[str, str]]:
    status = _object(job, "status")
    conditions = {str(one.get("type")): one for one in _objects(status, "conditions")}
    facts = []
    for type_ in ("Failed", "Complete"):
        if conditions.get(type_, {}).get("status") == "True":
            facts.append((type_.lower(), _reason(conditions[type_])))
    if not facts and status.get("state") != "Training":
        facts += [("waits", _reason(one)) for type_ in _WAITING if (one := conditions.get(type_)) and _waits(one)][:1]
    if conditions.get("Restarting", {}).get("status") == "True":
        facts.append(("restarting", _reason(conditions["Restarting"])))
    training = _object(status, "training")
    if training:
        facts.append(("step", _steps(training)))
    if named := {**_object(training, "values"), **_object(training, "evaluation")}:
        facts.append(("values", ", ".join(f"{name} {_number(value)}" for name, value in named.items())))
    if room := _object(status, "worker", "room"):
        facts.append(
            (
                "room",
                f"nodes for {room.get('workers')} workers{'; one more is tried now' if room.get('probing') else ''}",
            )
        )
    restarts = _object(status, "restarts")
    if restarts.get("total"):
        last = _object(restarts, "last")
        code = f", exit code {last['exitCode']}" if last.get("exitCode") is not None else ""
        who = f"{last.get('role', '')} {last.get('index', '')}".strip()
        why = f"; {_age(last.get('time'), now)} ago {who}: {last.get('reason', '')}{code}" if last else ""
        facts.append(("restarts", f"{restarts['total']}{why}"))
    if last := _object(training, "lastCheckpoint"):
        facts.append(("checkpoint", f"step {last.get('step')}, {_age(last.get('time'), now)} ago"))
    elif not _object(job, "spec", "checkpoint"):
        facts.append(("checkpoint", "none: checkpoint.volume is not set, so that a restart begins at step 0"))
    if model := _object(training, "model"):
        claim = _object(job, "spec", "checkpoint", "volume").get("persistentVolumeClaim", "")
        facts.append(("model", f"{model.get('path')}{f' on claim {claim}' if claim else ''}"))
    return facts


def _waits(condition: Body) -> bool:
    return bool(condition.get("status") == ("True" if condition.get("type") == "Suspended" else "False"))


def _reason(condition: Body) -> str:
    message = condition.get("message", "")
    return f"{condition.get('reason', '')}: {message}" if message else str(condition.get("reason", ""))


def _steps(training: Body) -> str:
    step, total = training.get("step", 0), training.get("totalSteps")
    parts = [f"{step} of {total} ({training.get('progressPercent', 0)}%)" if total else str(step)]
    if training.get("epoch") is not None:
        parts.append(f"epoch {training['epoch']}")
    if training.get("loss") is not None:
        parts.append(f"loss {_number(training['loss'])}")
    if training.get("samplesPerSecond") is not None:
        parts.append(f"{_number(training['samplesPerSecond'])} samples/s")
    if training.get("etaSeconds") is not None:
        parts.append(f"ETA {_clock(training['etaSeconds'])}")
    return ", ".join(parts)


def _pod(pod: Body, now: datetime) -> list[str]:
    metadata, status = pod["metadata"], _object(pod, "status")
    trainer: Body = next(
        (one for one in _objects(status, "containerStatuses") if one.get("name") == TRAINER_CONTAINER), {}
    )
    waiting = _object(trainer, "state", "waiting")
    unplaced: Body = next(
        (
            one
            for one in _objects(status, "conditions")
            if one.get("type") == "PodScheduled" and one.get("status") == "False"
        ),
        {},
    )
    phase = "Terminating" if "deletionTimestamp" in metadata else waiting.get("reason") or status.get("phase", "")
    why = waiting.get("message") or unplaced.get("message") or status.get("message") or ""
    ready = "ready" if trainer.get("ready") else ""
    return [
        metadata["name"],
        phase,
        ready,
        _object(pod, "spec").get("nodeName", ""),
        _age(metadata.get("creationTimestamp"), now),
        why,
    ]


def _place(pod: Body) -> tuple[int, int]:
    """The master, the servers, the workers; by index."""
    labels = _object(pod, "metadata", "labels")
    order = {"master": 0, "parameter-server": 1, "worker": 2}
    index = str(labels.get(LABEL_INDEX, ""))
    return order.get(str(labels.get(LABEL_ROLE)), 3), int(index) if index.isdecimal() else 0


def _object(body: Body, *path: str) -> Body:
    """The object at a path of fields; an empty one where there is none."""
    for name in path:
        part = body.get(name)
        if not isinstance(part, Mapping):
            return {}
        body = part
    return body


def _objects(body: Body, name: str) -> list[Body]:
    """The objects of a list."""
    found = body.get(name)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list | tuple) else []


def _clock(seconds: object) -> str:
    return clock(seconds) if isinstance(seconds, int | float) else "-"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _age(time: object, now: datetime) -> str:
    """Such as 5s, 3m, 2h, 4d: the largest unit that is at least 2 of it, or 1 of days."""
    try:
        seconds = max(0, int((now - datetime.fromisoformat(str(time))).total_seconds()))
    except (TypeError, ValueError):
        return "-"
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    cleaned = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cleaned, strict=True)]
    # The last column is not padded: lines of messages would all be as long as the longest.
    return "\n".join(
        "   ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]).rstrip()
        for row in cleaned
    )
