"""What we did and no watch has told us yet. While that is so the cache rests on our own answer, and nothing acts on the name again.

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
    """A child, and whether it shall be there or be gone."""

    resource: Resource
    child: Key
    uid: str
    gone: bool
    deadline: float


class Expectations:
    """Awaited events by job, and what we know to be so without them: the cache hears of both here. Times are of the loop's clock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._by_job: dict[Key, dict[str, Awaited]] = {}

    def created(self, job: Key, resource: Resource, body: Body, now: float) -> None:
        """We made this object."""
        if self._cache.stores[resource].put(body) is None:
            return  # the watch told of it before the answer came, and will not tell again
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
        """An answer said that it is there no more. No watch may ever tell so: one that began after that does not know of it."""
        self._cache.stores[resource].drop(child, uid)
        self.seen(job, uid, gone=True)

    def seen(self, job: Key, uid: str, *, gone: bool) -> None:
        """A watch or a list told of the object: that it is there, or that it is gone."""
        awaited = self._by_job.get(job)
        if awaited and uid in awaited and (gone or not awaited[uid].gone):
            del awaited[uid]
            if not awaited:
                del self._by_job[job]

    def overdue(self, job: Key, now: float) -> list[Awaited]:
        """The children to ask for; each is awaited anew, for as long again."""
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
