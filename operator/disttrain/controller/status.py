"""The status of a job: at most one write a pass, only of what changed, and never over somebody's newer state.

The write is a merge patch that carries the resource version that the decision was made on: when the job moved on meanwhile, the API server
refuses it, and the next pass decides anew. The answer goes into the cache, so that the next pass sees our own write however late the watch.
Not here: what the status shall say.
"""

import asyncio
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto

from pydantic import ValidationError

from disttrain.api import DistTrainJobStatus
from disttrain.api.reasons import ConditionType, Reason, State
from disttrain.api.status import Condition
from disttrain.controller.api import JOBS, Body, Conflict, KubeApi, NotFound
from disttrain.controller.cache import Cache, Entry, StoredJob

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

    async def write(self, stored: Entry[StoredJob], status: DistTrainJobStatus, *, last: float) -> "Written | Wait":
        """Writes the status if it differs; what can wait does so for a while after the last write, by the loop's clock.

        Raises Conflict when the job moved on; the cache has its newest state then.
        """
        job = stored.value
        new = status.to_dict()
        patch = merge_patch(job.status, new)
        if not patch:
            return Written.NO
        due = last + resting(self._rest, rests(job.status, new, patch), latency=self._latency)
        began = asyncio.get_running_loop().time()
        # Moments are compared, not spans: what is left of a span may be too little for any clock to show that it has passed.
        if due > began:
            return Wait(due - began, at_most=last + resting(self._rest, 1, latency=self._latency) - began)
        namespace, name = stored.key
        try:
            answer = await self._api.patch_status(
                JOBS, namespace, name, {"metadata": {"uid": job.uid, "resourceVersion": job.version}, "status": patch}
            )
        except NotFound:
            return Written.NO  # deleted meanwhile; the watch tells
        except Conflict:
            self._cache.jobs.put(await self._api.get(JOBS, namespace, name))
            raise
        self._latency += 0.1 * (asyncio.get_running_loop().time() - began - self._latency)
        self._cache.jobs.put(answer)
        return Written.YES


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


def invalid(stored: StoredJob, error: ValidationError, now: datetime) -> DistTrainJobStatus:
    """The status of a job that this operator cannot read: what it said before, and why nothing happens."""
    try:
        status = DistTrainJobStatus.model_validate(stored.status)
    except ValidationError:
        status = DistTrainJobStatus()
    problems = "; ".join(
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors(include_url=False)[:5]
    )
    message = f"The job cannot be read by this version of the operator and is left as it is: {problems}"[:4096]
    before = status.condition(ConditionType.VALID)
    condition = Condition(
        type=ConditionType.VALID,
        status="False",
        reason=Reason.INVALID_SPEC,
        message=message,
        last_transition_time=before.last_transition_time
        if before and before.status == "False"
        else now.replace(microsecond=0),
        observed_generation=stored.generation,
    )
    others = tuple(c for c in status.conditions if c.type != ConditionType.VALID)
    return status.model_copy(
        update={
            "observed_generation": stored.generation,
            "state": status.state or State.PENDING,
            "conditions": (condition, *others),
        }
    )
