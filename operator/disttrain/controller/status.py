"""The status of a job: at most one write a pass, only of what changed, and never over somebody's newer state.

The write is a merge patch that carries the resource version that the decision was made on: when the job moved on meanwhile, the API server
refuses it, and the next pass decides anew. The answer goes into the cache, so that the next pass sees our own write however late the watch.

Another version may have written a part of the status, or the schema that the API server holds. What was not understood stays as it is, and
of a status that the schema refuses in part the rest is written. Not here: what the status says.
"""

import asyncio
import logging
import math
import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeAlias

from disttrain.api import DistTrainJobStatus
from disttrain.api.reasons import ConditionType, Reason
from disttrain.controller.cache import Cache, Entry, StoredJob
from disttrain.kube.api import JOBS, Body, Conflict, KubeApi, NotFound, Refused

log = logging.getLogger(__name__)

URGENT = frozenset({"attempt", "restarts", "disruptions", "startTime", "completionTime"})
"""Fields that the next step waits for: a failed pod is deleted only once it is written down."""
AT_FIRST = {
    ConditionType.VALID: "True",
    ConditionType.SUSPENDED: "False",
    ConditionType.COMPLETE: "False",
    ConditionType.FAILED: "False",
}
"""Conditions whose change is told at once, and how a job begins that has no trouble. The others follow one another in a starting job:
several changes are one write."""
OBSTACLES = frozenset({ConditionType.SCHEDULED, ConditionType.READY, ConditionType.PROGRESSING})
BEGINNING = frozenset({"startTime", "attempt"})
"""Of the urgent fields those of a job whose pods were just made. Should they be lost, the next operator sees the pods, and begins anew."""
WAITS = frozenset({Reason.SCHEDULING, Reason.STARTING, Reason.WAITING_FOR_PEERS})
"""Reasons of a False condition that pass by themselves. Of any other a user has to know: no node, no image, no Secret, no step for long."""
COUNTS = frozenset({"conditions", "replicaStatuses", "worker", "goodput"})
"""Fields whose change is a small one, as long as every condition stays what it is and only words it anew."""
MOST_RESTS = 3
"""So many rests long a small change waits for a larger one that takes it along; and anything that can wait, when requests are slow."""
LATENCIES_EACH = 30.0
"""A rest lasts so many times as long as a write took lately: who is asked by many at once is asked less often by each."""


LIST_KEYS = {"conditions": "type", "replicaStatuses": "role"}
"""Lists of the status whose entries a key tells apart, as the CRD has it."""
UNPROCESSABLE = 422
REFUSED_SECONDS = 300.0
"""After which a field that the API server refused is sent again: its schema may have changed."""
Path: TypeAlias = tuple[str | int, ...]


class Written(Enum):
    YES = auto()
    NO = auto()
    """Nothing had changed, or the job is gone."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The change is a small one and the last write is just past: in so many seconds."""

    seconds: float
    at_most: float
    """Seconds after which a larger change could be written, should there be one."""


class StatusWriter:
    """Writes statuses. `rest`: the least seconds between a write and a next one that can wait."""

    def __init__(self, api: KubeApi, cache: Cache, *, rest: float) -> None:
        self._api = api
        self._cache = cache
        self._rest = rest
        self._latency = 0.0
        """Seconds that a write takes lately: a mean in which the newest counts a tenth."""
        self._refused: dict[Path, float] = {}
        """Fields that the schema of the API server does not take, and until when they are left out."""

    async def write(self, stored: Entry[StoredJob], status: DistTrainJobStatus, *, last: float) -> "Written | Wait":
        """Writes the status if it differs; what can wait does so for a while after the last write, by the loop's clock.

        Raises Conflict when the job moved on; the cache has its newest state then.
        """
        job = stored.value
        old, new = job.read.job.status.to_dict(), status.to_dict()
        patch = self._without_refused(status_patch(job.status, old, new))
        if not patch:
            return Written.NO
        due = last + resting(self._rest, rests(old, new, patch), latency=self._latency)
        began = asyncio.get_running_loop().time()
        # Moments are compared, not spans: what is left of a span may be too little for any clock to show that it has passed.
        if due > began:
            return Wait(due - began, at_most=last + resting(self._rest, 1, latency=self._latency) - began)
        namespace, name = stored.key
        try:
            answer = await self._send(stored, patch)
        except NotFound:
            return Written.NO  # deleted meanwhile; the watch tells
        except Conflict:
            self._cache.jobs.put(await self._api.get(JOBS, namespace, name))
            raise
        self._latency += 0.1 * (asyncio.get_running_loop().time() - began - self._latency)
        self._cache.jobs.put(answer)
        return Written.YES

    async def _send(self, stored: Entry[StoredJob], patch: Body) -> Body:
        """Sends a patch. Of one that the API server calls wrong, whose schema is then of another version, it sends what is left."""
        job = stored.value
        about = {"uid": job.uid, "resourceVersion": job.version}
        while True:
            try:
                return await self._api.patch_status(JOBS, *stored.key, {"metadata": about, "status": patch})
            except Refused as error:
                fields = [field.removeprefix("status.") for field in error.fields if field.startswith("status.")]
                trimmed = patch
                for field in fields:
                    trimmed = trim(trimmed, steps(field))
                if error.status != UNPROCESSABLE or not trimmed or trimmed == patch:
                    raise
                log.warning(
                    "%s: the API server refuses a part of the status, the rest is written: %s", stored.key, error
                )
                now = asyncio.get_running_loop().time()
                self._refused |= {steps(field): now + REFUSED_SECONDS for field in fields if "[" not in field}
                patch = trimmed

    def _without_refused(self, patch: Body) -> Body:
        """The patch without fields that the API server refused lately."""
        now = asyncio.get_running_loop().time()
        self._refused = {path: until for path, until in self._refused.items() if until > now}
        for path in self._refused:
            patch = trim(patch, path)
        return patch


def resting(rest: float, number: int | None, *, latency: float) -> float:
    """Seconds of so many rests when a write takes so long; None is at once, 0 as long as the latency alone asks for."""
    if number is None:
        return 0.0
    return min(rest * MOST_RESTS, max(rest * number, latency * LATENCIES_EACH))


def rests(old: Body, new: Body, patch: Body) -> int | None:
    """How many rests after the last write a change is written: None for one that the next step waits for or that ends the job.

    A job's beginning has 0. Where writes are quick, it is written as good as at once. Of many jobs at once, all get their pods first, and
    the first status tells already how these fare: a write less for each.
    """
    before, after = _told(old), _told(new)
    changed = {type_ for type_ in before.keys() | after.keys() if before.get(type_) != after.get(type_)}
    trouble = any(
        after[type_][0] == "False" and after[type_][1] not in WAITS for type_ in changed & OBSTACLES & after.keys()
    )
    # Of a pod that is replaced and of a worker that succeeded the next pass may see nothing any more: it is told now or never.
    fleeting = after.get(ConditionType.RESTARTING, ("",))[0] == "True" and ConditionType.RESTARTING in changed
    fleeting |= "completedIndexes" in (patch.get("worker") or {})
    conditions, fields = changed & AT_FIRST.keys(), patch.keys() & URGENT
    if trouble or fleeting:
        return None
    begins = "startTime" not in old and "startTime" in new and fields <= BEGINNING
    if begins and all(t not in before and after[t][0] == AT_FIRST[ConditionType(t)] for t in conditions):
        return 0
    if conditions or fields:
        return None
    return MOST_RESTS if patch.keys() <= COUNTS and not changed else 1


def status_patch(stored: Body, old: Body, new: Body) -> Body:
    """The patch of a stored status of which we understood `old` and want `new`. What we did not understand stays in it as it is."""
    return _kept(merge_patch(old, new), stored, old)


def _kept(patch: Body, stored: Body, old: Body) -> Body:
    result: Body = {}
    for field, value in patch.items():
        before, understood = stored.get(field), old.get(field)
        if before is not None and _shape(before) is not _shape(value) and _shape(before) is not _shape(understood):
            continue  # another version has something else in this place
        if isinstance(before, dict):
            known = understood if isinstance(understood, dict) else {}
            if value is None and before.keys() - known.keys():
                result[field] = dict.fromkeys(known)
            elif not isinstance(value, dict):
                result[field] = value
            elif inner := _kept(value, before, known):
                result[field] = inner
        elif isinstance(before, list) and isinstance(value, list) and field in LIST_KEYS:
            result[field] = _kept_entries(value, before, understood or [], LIST_KEYS[field])
        else:
            result[field] = value
    return result


def _shape(value: Any) -> type | None:
    """An object, a list, or a scalar of any kind; None for nothing."""
    return None if value is None else next((shape for shape in (dict, list) if isinstance(value, shape)), object)


def _kept_entries(new: list[Any], stored: list[Any], old: list[Any], key: str) -> list[Any]:
    """The entries to write: each with the fields of the stored one that were not understood, and then the entries that were not."""
    before = {str(entry[key]): entry for entry in stored if isinstance(entry, dict) and key in entry}
    understood = {entry[key]: entry for entry in old}
    entries = []
    for entry in new:
        was, known = before.get(entry[key], {}), understood.get(entry[key], {})
        entries.append(was if entry == known else {**{f: was[f] for f in was.keys() - known.keys()}, **entry})
    ours = [before[name] for name in before.keys() & {entry[key] for entry in (*old, *new)}]
    return entries + [entry for entry in stored if entry not in ours]


def steps(field: str) -> Path:
    """The steps to a field as the API server names it, such as training.loss or conditions[0].reason."""
    return tuple(int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", field))


def trim(patch: Any, path: Path) -> Any:
    """The patch without one field. A later version has numbers where this one has decimal strings: such a one is written as a number."""
    step, rest = path[0], path[1:]
    if isinstance(patch, list):
        if not isinstance(step, int) or step >= len(patch) or not rest:
            return patch
        return [trim(entry, rest) if index == step else entry for index, entry in enumerate(patch)]
    if not isinstance(patch, dict) or step not in patch:
        return patch
    inner = trim(patch[step], rest) if rest else _as_number(patch[step])
    left = {field: value for field, value in patch.items() if field != step}
    return left if inner is None or inner == {} else {**left, step: inner}


def _as_number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _told(status: Body) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in status.get("conditions", ())}


def merge_patch(old: Body, new: Body) -> Body:
    """The RFC 7386 patch that makes `new` of `old`; empty when they are equal."""
    patch: Body = {key: None for key in old.keys() - new.keys()}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := merge_patch(before, value):
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch
