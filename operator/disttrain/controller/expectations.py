"""Our own writes that no watch has reported yet. Until then the cache has the answer to our request, and no pass acts on the name again.

Our writes go into the cache with the answer of the API server (a created pod, a pod with its deletionTimestamp), so decisions see them at
once. What that cannot heal is an event that never comes: a name still awaited at its deadline is asked for with a live GET.
As ReplicaSet's expectations, https://github.com/kubernetes/kubernetes/blob/master/pkg/controller/controller_utils.go.
"""

from dataclasses import dataclass
from datetime import timedelta

from disttrain.controller.cache import Cache, Key
from disttrain.kube.api import Body, Resource

EVENT_DEADLINE = timedelta(seconds=15)
"""For an event to come that follows from a write at once."""


@dataclass(slots=True)
class Awaited:
    """A child, and whether the watch is expected to report it as existing or as gone."""

    resource: Resource
    child: Key
    uid: str
    gone: bool
    deadline: float


class Expectations:
    """Awaited events by job, and what answers of the API server say; both go into the cache here. Times are of the loop's clock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._by_job: dict[Key, dict[str, Awaited]] = {}

    def created(self, job: Key, resource: Resource, body: Body, now: float) -> None:
        """We made this object."""
        if self._cache.stores[resource].put(body) is None:
            return  # the watch reported it before the answer came, and will not report it again
        metadata = body["metadata"]
        child = Key(metadata["namespace"], metadata["name"])
        self._await(job, Awaited(resource, child, metadata["uid"], False, now + EVENT_DEADLINE.total_seconds()))

    def deleted(self, job: Key, resource: Resource, body: Body, now: float) -> None:
        """We deleted this object, and it is still there: a pod takes up to its grace period to be gone."""
        self._cache.stores[resource].put(body)
        metadata = body["metadata"]
        child, grace = Key(metadata["namespace"], metadata["name"]), metadata.get("deletionGracePeriodSeconds") or 0
        self._await(job, Awaited(resource, child, metadata["uid"], True, now + grace + EVENT_DEADLINE.total_seconds()))

    def there(self, job: Key, resource: Resource, body: Body) -> None:
        """We asked for it, and this is its newest state."""
        self._cache.stores[resource].put(body)
        self.seen(job, body["metadata"]["uid"], gone=False)

    def gone(self, job: Key, resource: Resource, child: Key, uid: str) -> None:
        """An answer said that it is gone. Perhaps no watch reports it: one that started after that does not know the object."""
        self._cache.stores[resource].drop(child, uid)
        self.seen(job, uid, gone=True)

    def seen(self, job: Key, uid: str, *, gone: bool) -> None:
        """A watch or a list reported the object: as existing, or as gone."""
        awaited = self._by_job.get(job)
        if awaited and uid in awaited and (gone or not awaited[uid].gone):
            del awaited[uid]
            if not awaited:
                del self._by_job[job]

    def overdue(self, job: Key, now: float) -> list[Awaited]:
        """The children to read from the API server; each is awaited for as long again."""
        late = [one for one in self._by_job.get(job, {}).values() if one.deadline <= now]
        for one in late:
            one.deadline = now + EVENT_DEADLINE.total_seconds()
        return late

    def next_deadline(self, job: Key) -> float | None:
        return min((one.deadline for one in self._by_job.get(job, {}).values()), default=None)

    def forget(self, job: Key) -> None:
        self._by_job.pop(job, None)

    def _await(self, job: Key, awaited: Awaited) -> None:
        self._by_job.setdefault(job, {})[awaited.uid] = awaited
