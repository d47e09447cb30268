"""From the cache to what `decide` sees: a frozen Snapshot of one job. And `Memory`, what only this process knows of a job.

Not here: any judgement of what it means.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple

from disttrain.api import DistTrainJob, Progress
from disttrain.api.names import Role
from disttrain.controller.cache import Cache, CachedPod, Entry, Key
from disttrain.kube.api import Resource
from disttrain.plan.model import Phase, PodView, Refusal, Snapshot
from disttrain.plan.progress import is_another_step

CANNOT_START = "CreateContainerConfigError"
"""What the kubelet itself says of a container that cannot be made for want of a Secret, when an environment variable names it."""


class Child(NamedTuple):
    """A child of a job, which need not exist. Kinds share names: the Service and the NetworkPolicy have that of the job."""

    resource: Resource
    key: Key


@dataclass(slots=True)
class Memory:
    """What the API server does not keep about a job. It is lost with the process, and found out anew by the next one."""

    uid: str
    refusals: dict[Child, Refusal] = field(default_factory=dict)
    """What the API server refused to make; of the spec of `generation` only."""
    generation: int = 0
    failing: dict[Child, float] = field(default_factory=dict)
    """Children of which no creation succeeds, for an error of the server's, and since when, by the loop's clock."""
    foreign: dict[Child, float] = field(default_factory=dict)
    """Children whose name another owner's object holds, and when that was last looked at, by the loop's clock."""
    former: set[Child] = field(default_factory=set)
    """Of these, the ones whose name an object of a former job of the same name holds."""
    mounting: dict[str, float] = field(default_factory=dict)
    """Uids of pods that have a node and no container yet, and since when, by the loop's clock."""
    unmounted: dict[str, str] = field(default_factory=dict)
    """Of these, what is said of the volumes that cannot be mounted."""
    known_since: datetime | None = None
    """When this process made its first pass over the job."""
    progress: Progress | None = None
    progress_read: datetime | None = None
    step_seen: datetime | None = None
    """When the step of `progress` was first read."""
    status_written: float = float("-inf")
    """When our last write of the status was answered, by the loop's clock; of a job that had none, when it was first seen."""
    rests_until: float = float("-inf")
    """Before that nothing that can wait is written, so that news of it needs no pass."""

    def heard(self, progress: Progress, now: datetime) -> bool:
        """Takes a report of the master in. Whether it says something new."""
        before = self.progress
        if is_another_step(progress, before):
            self.step_seen = now
        self.progress, self.progress_read = progress, now
        return before != progress

    def taken(self, child: Child, *, former: bool, now: float) -> None:
        """Another owner's object holds the name of a child. `former`: that of a former job of this name, on its way out."""
        self.foreign[child] = now
        if former:
            self.former.add(child)
        else:
            self.former.discard(child)

    def free(self, child: Child) -> None:
        """The name is free, or the child is there: whatever stood in its way does not any more."""
        self.refusals.pop(child, None)
        self.failing.pop(child, None)
        self.foreign.pop(child, None)
        self.former.discard(child)


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


def take_snapshot(
    cache: Cache, memory: Memory, job: DistTrainJob, now: datetime, *, not_understood: tuple[str, ...] = ()
) -> Snapshot:
    """The job and its children, by namespace and owner uid, as the cache has them now."""
    owner = job.metadata.namespace, job.metadata.uid
    views = [told(view, memory) for entry in cache.pods.owned_by(*owner) if (view := entry.value.view)]
    return Snapshot(
        job=job,
        now=now,
        pods=tuple(sorted(views, key=lambda view: (view.role, view.index, view.name))),
        service_exists=any(cache.services.owned_by(*owner)),
        network_policy_exists=any(cache.network_policies.owned_by(*owner)),
        progress=memory.progress,
        progress_read=memory.progress_read,
        step_seen=memory.step_seen,
        listening_since=memory.known_since,
        not_understood=not_understood,
        # Answers come in any order; the first of these is the one that the status names, and shall stay it.
        refusals=tuple(sorted(memory.refusals.values(), key=lambda refusal: refusal.name)),
        foreign=tuple(sorted({child.key.name for child in memory.foreign.keys() - memory.former})),
        former=tuple(sorted({child.key.name for child in memory.foreign.keys() & memory.former})),
    )


def told(view: PodView, memory: Memory) -> PodView:
    """A pod with what is told of it by Events alone."""
    words = memory.unmounted.get(view.uid)
    return replace(view, reason=CANNOT_START, message=words) if words else view


def running_master(cache: Cache, namespace: str, uid: str) -> Entry[CachedPod] | None:
    """The pod whose /progress can be read."""
    for entry in cache.pods.owned_by(namespace, uid):
        view = entry.value.view
        if view and view.role is Role.MASTER and view.phase is Phase.RUNNING and not view.deleting and entry.value.ip:
            return entry
    return None
