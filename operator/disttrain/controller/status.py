"""The status of a job: at most one write a pass, only of what changed, and never over somebody's newer state.

The write is a merge patch that carries the resource version that the decision was made on: when the job moved on meanwhile, the API server
refuses it, and the next pass decides anew. The answer goes into the cache, so that the next pass sees our own write however late the watch.
Not here: what the status shall say.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto

from pydantic import ValidationError

from disttrain.api import DistTrainJobStatus
from disttrain.api.reasons import ConditionType, Reason, State
from disttrain.api.status import Condition
from disttrain.controller.api import JOBS, Body, Conflict, KubeApi, NotFound
from disttrain.controller.cache import Cache, Entry, StoredJob

URGENT = frozenset({"attempt", "restarts", "startTime", "completionTime"})
"""Fields that the next step waits for: a failed pod is deleted only once it is written down."""
URGENT_CONDITIONS = frozenset(
    {ConditionType.VALID, ConditionType.SUSPENDED, ConditionType.COMPLETE, ConditionType.FAILED}
)
"""Conditions whose change is told at once. The others follow one another in a starting job: several changes are one write."""


class Written(Enum):
    YES = auto()
    NO = auto()
    """Nothing had changed, or the job is gone."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The change is a small one and the last write is just past: in so many seconds."""

    seconds: float


class StatusWriter:
    """Writes statuses. `rest`: the least seconds between a write and a next one that can wait."""

    def __init__(self, api: KubeApi, cache: Cache, *, rest: float) -> None:
        self._api = api
        self._cache = cache
        self._rest = rest

    async def write(
        self, stored: Entry[StoredJob], status: DistTrainJobStatus, *, quiet_for: float
    ) -> "Written | Wait":
        """Writes the status if it differs; what can wait does so when the last write was only `quiet_for` seconds ago.

        Raises Conflict when the job moved on; the cache has its newest state then.
        """
        job = stored.value
        new = status.to_dict()
        patch = merge_patch(job.status, new)
        if not patch:
            return Written.NO
        if quiet_for < self._rest and not _urgent(job.status, new, patch):
            return Wait(self._rest - quiet_for)
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
        self._cache.jobs.put(answer)
        return Written.YES


def _urgent(old: Body, new: Body, patch: Body) -> bool:
    return not patch.keys().isdisjoint(URGENT) or _told_at_once(old) != _told_at_once(new)


def _told_at_once(status: Body) -> dict[str, tuple[str, str]]:
    conditions = status.get("conditions", ())
    return {c["type"]: (c["status"], c["reason"]) for c in conditions if c["type"] in URGENT_CONDITIONS}


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
