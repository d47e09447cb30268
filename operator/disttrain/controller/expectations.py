"""What we did and no watch has told us yet. While that is so the cache rests on our own answer, and nothing acts on the name again.

Our writes go into the cache with the answer of the API server (a created pod, a pod with its deletionTimestamp), so decisions see them at
once. What that cannot heal is an event that never comes: a name still awaited at its deadline is asked for with a live GET.
As ReplicaSet's expectations, https://github.com/kubernetes/kubernetes/blob/master/pkg/controller/controller_utils.go.
"""

from dataclasses import dataclass
from datetime import timedelta

from disttrain.controller.api import Resource
from disttrain.controller.cache import Key

DEADLINE = timedelta(seconds=15)
"""For an event to come that follows from a write at once."""


@dataclass(slots=True)
class _Awaited:
    resource: Resource
    child: Key
    uid: str
    gone: bool
    deadline: float


class Expectations:
    """Awaited events by job. All times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._by_job: dict[Key, dict[str, _Awaited]] = {}

    def created(self, job: Key, resource: Resource, child: Key, uid: str, now: float) -> None:
        self._await(job, _Awaited(resource, child, uid, False, now + DEADLINE.total_seconds()))

    def deleted(self, job: Key, resource: Resource, child: Key, uid: str, now: float, grace: float = 0.0) -> None:
        """A pod takes up to its grace period to be gone."""
        self._await(job, _Awaited(resource, child, uid, True, now + grace + DEADLINE.total_seconds()))

    def seen(self, job: Key, uid: str, *, gone: bool) -> None:
        """A watch or a list told of the object: that it is there, or that it is gone."""
        awaited = self._by_job.get(job)
        if awaited and uid in awaited and (gone or not awaited[uid].gone):
            del awaited[uid]
            if not awaited:
                del self._by_job[job]

    def overdue(self, job: Key, now: float) -> list[tuple[Resource, Key]]:
        """The children to ask for; each is awaited anew, for as long again."""
        late = [one for one in self._by_job.get(job, {}).values() if one.deadline <= now]
        for one in late:
            one.deadline = now + DEADLINE.total_seconds()
        return [(one.resource, one.child) for one in late]

    def next_deadline(self, job: Key) -> float | None:
        return min((one.deadline for one in self._by_job.get(job, {}).values()), default=None)

    def forget(self, job: Key) -> None:
        self._by_job.pop(job, None)

    def _await(self, job: Key, awaited: _Awaited) -> None:
        self._by_job.setdefault(job, {})[awaited.uid] = awaited
