"""From the cache to what `decide` sees: a frozen Snapshot of one job. And `Memory`, what only this process knows of a job.

Not here: any judgement of what it means.
"""

from dataclasses import dataclass, field
from datetime import datetime

from disttrain.api import DistTrainJob, Progress
from disttrain.api.names import Role
from disttrain.controller.api import Resource
from disttrain.controller.cache import Cache, CachedPod, Entry, Key
from disttrain.plan.model import Phase, Refusal, Snapshot


@dataclass(slots=True)
class Memory:
    """What the API server does not keep about a job. It is lost with the process, and found out anew by the next one."""

    uid: str
    refusals: dict[str, Refusal] = field(default_factory=dict)
    """What the API server refused to make, by name; of the spec of `generation` only."""
    generation: int = 0
    foreign: dict[Key, tuple[Resource, float]] = field(default_factory=dict)
    """Names that another owner's object holds, and when that was last looked at, by the loop's clock."""
    progress: Progress | None = None
    progress_read: datetime | None = None
    status_written: float = float("-inf")
    """When our last write of the status was answered, by the loop's clock."""
    rests_until: float = float("-inf")
    """Before that nothing that can wait is written, so that news of it needs no pass."""


class Memories:
    """The Memory of every job; a job of the same name and another uid begins with a blank one."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Memory] = {}

    def of(self, key: Key, uid: str) -> Memory:
        memory = self._by_key.get(key)
        if memory is None or memory.uid != uid:
            memory = self._by_key[key] = Memory(uid)
        return memory

    def find(self, key: Key) -> Memory | None:
        return self._by_key.get(key)

    def forget(self, key: Key) -> None:
        self._by_key.pop(key, None)


def take_snapshot(cache: Cache, memory: Memory, job: DistTrainJob, now: datetime) -> Snapshot:
    """The job and its children, by owner uid, as the cache has them now."""
    uid = job.metadata.uid
    pods = (entry.value.view for entry in cache.pods.owned_by(uid))
    return Snapshot(
        job=job,
        now=now,
        pods=tuple(sorted((view for view in pods if view), key=lambda view: (view.role, view.index, view.name))),
        service_exists=any(cache.services.owned_by(uid)),
        network_policy_exists=any(cache.network_policies.owned_by(uid)),
        progress=memory.progress,
        progress_read=memory.progress_read,
        refusals=tuple(memory.refusals.values()),
        foreign=tuple(sorted(key.name for key in memory.foreign)),
    )


def running_master(cache: Cache, uid: str) -> Entry[CachedPod] | None:
    """The pod whose /progress can be read."""
    for entry in cache.pods.owned_by(uid):
        view = entry.value.view
        if view and view.role is Role.MASTER and view.phase is Phase.RUNNING and not view.deleting and entry.value.ip:
            return entry
    return None
