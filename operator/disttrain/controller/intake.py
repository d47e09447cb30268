"""Where news of the cluster comes in, from the watch and from the resync: into the cache, and the job's key into the queue.

Old news and our own echo change nothing in the cache and queue nothing. Not here: requests, decisions.
"""

import asyncio
import heapq
from collections.abc import Mapping
from typing import Any

from disttrain.controller.cache import Cache, CachedPod, Entry, Key, belongs_to
from disttrain.controller.expectations import Expectations
from disttrain.controller.queue import WorkQueue
from disttrain.controller.record import LONG_AGO, Child, JobRecord, JobRecords
from disttrain.controller.resync import WatchHealth
from disttrain.kube.api import JOBS, Resource

POD_CHANGES_TOGETHER_SECONDS = 0.5
"""The pods of a job find nodes, start and get ready within moments of one another: one pass is enough for them all."""
LONGEST_REST_SECONDS = 600.0
"""In so long every job gets a pass, though nothing happens to it: a timer that was lost cannot stop one for ever."""

ON_ITS_WAY = frozenset({"", "ContainerCreating", "PodInitializing"})
"""Reasons of a pod that waits which are none: every pod passes through them."""


class Intake:
    """Takes news in."""

    def __init__(
        self,
        cache: Cache,
        queue: WorkQueue[Key],
        expectations: Expectations,
        records: JobRecords,
        watch_health: WatchHealth,
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._expectations = expectations
        self._records = records
        self._watch_health = watch_health
        self._turns = 0.0
        """The part of a job that has come to its turn in `compared`."""

    def take(self, resource: Resource, event: Mapping[str, Any]) -> None:
        """A watch event; its type is None when it comes from the list with which a watch starts or restarts."""
        body, gone = event["object"], event["type"] == "DELETED"
        key, uid = Key(body["metadata"]["namespace"], body["metadata"]["name"]), body["metadata"]["uid"]
        store = self._cache.stores[resource]
        self._watch_health.reported(resource)
        if event["type"] is None:
            self._watch_health.broken.set()
        changed = store.drop(key, uid) if gone else store.put(body)
        job = key if resource is JOBS else belongs_to(body["metadata"])[0]
        self._take_in(job, Child(resource, key), uid, gone, changed)

    def changed(self, resource: Resource, entry: Entry[Any], gone: bool) -> None:
        """The resync found an object as the cache did not have it, or gone."""
        self._take_in(entry.key if resource is JOBS else entry.job, Child(resource, entry.key), entry.uid, gone, entry)

    def _take_in(self, job: Key | None, child: Child, uid: str, gone: bool, changed: Entry[Any] | None) -> None:
        if job is None:
            return
        self._expectations.seen(job, uid, gone=gone)
        record = self._records.find(job)
        if gone and record:
            record.resolved(child)
        if changed:
            urgent = gone or _urgent(changed.value)
            self._queue.add_after(job, 0.0 if urgent else max(POD_CHANGES_TOGETHER_SECONDS, _rest(record)))

    def queue_all(self) -> None:
        for job in self._cache.jobs:
            self._queue.add(job.key)

    def compared(self, seconds: float) -> None:
        """The cache was put right, so many seconds after the last time. Of the jobs those are queued that no pass has looked at for the
        longest, as many as come to their turn in that time."""
        ours = [job.key for job in self._cache.jobs if job.value.ours and not job.value.deleting]
        self._turns += len(ours) * min(1.0, seconds / LONGEST_REST_SECONDS)
        turns, self._turns = divmod(self._turns, 1)
        for key in heapq.nsmallest(int(turns), ours, key=self._looked_at):
            self._queue.add(key)

    def _looked_at(self, job: Key) -> float:
        record = self._records.find(job)
        return record.looked_at if record is not None else LONG_AGO


def _urgent(value: object) -> bool:
    """Whether something has to be done about it or known of it, rather than only counted."""
    if not isinstance(value, CachedPod) or value.view is None:
        return True
    return value.view.done or value.view.deleting or value.view.reason not in ON_ITS_WAY


def _rest(record: JobRecord | None) -> float:
    return record.small_writes_from - asyncio.get_running_loop().time() if record else 0.0
