"""Writes the status of a job: at most once a pass, only what changed, and never over a newer state.

The write is a merge patch with the resource version that the decision was made on: when the job has changed since, the API server refuses
it, and the next pass decides again. The answer goes into the cache, so that the next pass sees our own write however late the watch is.

Another version of the operator may have written a part of the status, or installed the schema that the API server has. The writer leaves
what this version does not understand as it is; when the schema refuses a part of a status, it writes the remaining part. What the status
says, and how urgent it is, the plan decides.
"""

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, TypeAlias

from disttrain.api import DistTrainJobStatus
from disttrain.api.types import list_keys
from disttrain.controller.cache import Cache, Entry, StoredJob
from disttrain.kube.api import JOBS, Body, Conflict, KubeApi, NotFound, Refused
from disttrain.plan.certificate import AWAITED
from disttrain.plan.model import Plan, Write

log = logging.getLogger(__name__)

INTERVALS: Mapping[Write, float] = MappingProxyType(
    {Write.BEGINNING: 0, Write.SOON: 1, Write.PROGRESS: 1, Write.WITH_NEXT: 3}
)
"""For how many intervals after the last write a change waits; Write.NOW does not wait."""
MOST_INTERVALS = 3
"""No change waits longer, however slow requests are."""
LATENCIES = 30.0
"""A change that can wait does so for at least this many latencies of a write: the slower the API server, the fewer writes it gets."""


LIST_KEYS = list_keys(DistTrainJobStatus)
"""The lists of the status whose entries have a key, as the CRD says, and that key."""
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
    """The change can wait, and the last write was a moment ago: it is written in `seconds`."""

    seconds: float
    larger: float
    """Seconds until a change that is written SOON could be written, should there be one."""


class StatusWriter:
    """Writes statuses. `interval`: seconds between the last write of a job's status and the next one that can wait."""

    def __init__(self, api: KubeApi, cache: Cache, *, interval: float) -> None:
        self._api = api
        self._cache = cache
        self._interval = interval
        self._latency = 0.0
        """Seconds that a write takes lately: a mean in which the newest counts a tenth."""
        self._refused: dict[Path, float] = {}
        """Fields that the schema of the API server does not take, and until when they are left out."""

    async def write(self, stored: Entry[StoredJob], plan: Plan, *, last: float, turn: float) -> "Written | Wait":
        """Writes the plan's status if it differs, when `plan.write` says. By the loop's clock: `last` is the moment of the last write, and
        this one is not made before `turn`.

        Raises Conflict when the job has changed since; the cache has its newest state then.
        Refused when the schema dropped a field that the plan waits for.
        """
        job = stored.value
        before = job.read.job.status
        # Nothing is serialised by a pass that does not write, and most do not.
        if plan.status is before:
            return Written.NO
        due = max(turn, last + delay(plan.write, self._interval, latency=self._latency))
        began = asyncio.get_running_loop().time()
        # Moments are compared, not spans: what is left of a span may be too little for any clock to show that it has passed.
        if due > began:
            return Wait(due - began, larger=last + delay(Write.SOON, self._interval, latency=self._latency) - began)
        patch = self._without_refused(status_patch(job.status, before.to_dict(), plan.status.to_dict()))
        if not patch:
            return Written.NO
        namespace, name = stored.key
        try:
            answer = await self._send(stored, patch)
        except NotFound:
            return Written.NO  # deleted meanwhile; the watch reports it
        except Conflict:
            self._cache.jobs.put(await self._api.get(JOBS, namespace, name))
            raise
        self._latency += 0.1 * (asyncio.get_running_loop().time() - began - self._latency)
        self._cache.jobs.put(answer)
        for field in AWAITED:
            if patch.get(field) is not None and field not in answer.get("status", {}):
                text = f"the CRD does not know status.{field}: apply that of this release"
                raise Refused(UNPROCESSABLE, "Invalid", text)  # tried again, each time later
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


def delay(write: Write, interval: float, *, latency: float) -> float:
    """Seconds from the last write to this one, where a write takes `latency` seconds."""
    if write is Write.NOW:
        return 0.0
    return min(interval * MOST_INTERVALS, max(interval * INTERVALS[write], latency * LATENCIES))


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
    """The patch without one field. An earlier CRD has decimal strings where this one has numbers: a number is written as a string then."""
    step, rest = path[0], path[1:]
    if isinstance(patch, list):
        if not isinstance(step, int) or step >= len(patch) or not rest:
            return patch
        return [trim(entry, rest) if index == step else entry for index, entry in enumerate(patch)]
    if not isinstance(patch, dict) or step not in patch:
        return patch
    inner = trim(patch[step], rest) if rest else _as_string(patch[step])
    left = {field: value for field, value in patch.items() if field != step}
    return left if inner is None or inner == {} else {**left, step: inner}


def _as_string(value: Any) -> str | None:
    return f"{value:.15g}" if isinstance(value, float) else None


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
