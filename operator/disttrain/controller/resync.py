"""Compares the cache with the API server, after each new list of a watch and every minute or so: the cure for whatever a watch missed.

kopf's watch reports no objects that vanished while it was away (410 Gone, a new list), and a stalled watch reports nothing at all.
Lists are read page by page as raw JSON, projected and dropped. What differs is queued, and some of the jobs that nothing happens to.

A list shows everything that was written before it was asked for. One that is older than what we know comes from an API server that was
restored from a backup: there the newest version of an object is not the one of the highest number, and nothing in the cache can be
trusted. The process ends with one line, and the next one begins with a cache that is right.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from disttrain.api.names import LABEL_JOB_NAME
from disttrain.controller.cache import Cache, CachedPod, Entry, Key, Known, Store
from disttrain.controller.metrics import DRIFT, watched
from disttrain.kube.api import CHILDREN, JOBS, OPTIONAL, PODS, ApiError, KubeApi, NotFound, Page, Refused, Resource

log = logging.getLogger(__name__)

SOON_SECONDS = 2.0
"""From a watch's new list to a comparison: the watches of all kinds break and restart within moments of one another."""

SELECTORS = {PODS: LABEL_JOB_NAME, **dict.fromkeys(CHILDREN.values(), LABEL_JOB_NAME), JOBS: ""}
"""What is watched and listed of each kind; jobs last, so that a new job is never judged without its children. No Secrets: the right to
read those of jobs is the right to read all of them."""


class WatchHealth:
    """How long ago each watch last reported something. A list without news counts as a report: there was nothing to report."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._reported = dict.fromkeys(SELECTORS, clock())
        self.synced = False
        """Whether everything was listed once."""
        self.broken = asyncio.Event()
        """Set when a watch has listed again: it does not report what vanished before that."""

    def reported(self, resource: Resource) -> None:
        self._reported[resource] = self.clock()

    def complete(self) -> None:
        self.synced = True

    def age(self, resource: Resource) -> float:
        return self.clock() - self._reported[resource]


class Restored(Exception):
    """The API server knows less than it did."""


def check(store: Store[Any], resource: Resource, page: Page, before: Known) -> None:
    """Raises Restored when a list is older than what we knew when we asked for it; `before` is the store's of that moment."""
    if page.version < before.newest:
        seen = f"has version {page.version}, and version {before.newest} was seen before"
    elif any(store.contradicts(body, page.version, before) for body in page.items):
        seen = f"has version {page.version}, and shows what was changed or deleted before"
    else:
        return
    raise Restored(f"the API server was restored from a backup: its list of {resource.plural} {seen}")


async def look_at_pods(api: KubeApi, cache: Cache, job: Key, uid: str) -> list[tuple[Entry[CachedPod], bool]]:
    """One live look at the pods of a job, before a step that nothing takes back. What that changed in the cache; True: it is gone."""
    store, uids, version = cache.pods, set[str](), 0
    before, changed = store.known, list[tuple[Entry[CachedPod], bool]]()
    async for page in api.list(PODS, job.namespace, selector=f"{LABEL_JOB_NAME}={job.name}"):
        check(store, PODS, page, before)
        version = page.version
        for body in page.items:
            uids.add(body["metadata"]["uid"])
            if entry := store.put(body):
                changed.append((entry, False))
    for entry in list(store.owned_by(job.namespace, uid)):
        if entry.uid not in uids and entry.version <= version:
            store.drop(entry.key, entry.uid)
            changed.append((entry, True))
    return changed


class KindsChanged(Restored):
    """Kinds that a cluster need not have can be read now, or no longer: this process watches too few or too many."""

    def __init__(self, added: Iterable[Resource], removed: Iterable[Resource]) -> None:
        can = [f"{resource.full_name} can be read now" for resource in added]
        cannot = [
            f"{resource.full_name} can no longer be read (its CRD or the right to it is gone)" for resource in removed
        ]
        super().__init__(", ".join(sorted(can + cannot)))


class Resync:
    """Lists everything and puts the cache right; `changed` gets every object that this changed, `compared` the seconds since the comparison
    before (inf: it is the first), `restored` the reason why the cache cannot be trusted any more."""

    def __init__(
        self,
        api: KubeApi,
        cache: Cache,
        watch_health: WatchHealth,
        *,
        namespaces: Sequence[str],
        changed: "Callable[[Resource, Entry[object], bool], None]",
        compared: Callable[[float], None],
        restored: Callable[[Restored], None] = lambda _: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._api = api
        self._cache = cache
        self._watch_health = watch_health
        self._namespaces: Sequence[str | None] = namespaces or [None]
        self._changed = changed
        self._compared = compared
        self._restored = restored
        self._jitter = jitter
        self._last = float("-inf")
        """When the last comparison began, by the clock of the watches."""
        self._absent = set[Resource]()
        """Optional kinds that could not be read in the last comparison."""

    async def run(self, interval: float) -> None:
        """Compares until cancelled. A failed one is repeated after a pause that doubles; the probes report how old the last one is."""
        broken, failures = self._watch_health.broken, 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval * (0.9 + 0.2 * self._jitter())):
                    await broken.wait()
                await asyncio.sleep(SOON_SECONDS)
            broken.clear()  # before the lists: a watch that breaks during them is looked at again
            try:
                await self.once()
            except ApiError as error:
                pause = max(error.retry_after or 0.0, min(interval, SOON_SECONDS * 2**failures))
                log.warning("the comparison with the API server failed, the next is in %.0f s: %s", pause, error)
                failures += 1
                await asyncio.sleep(pause)
                broken.set()
            else:
                failures = 0

    async def first(self) -> None:
        """The first comparison, tried until it succeeds: before it nothing can be decided."""
        while True:
            try:
                return await self.once()
            except NotFound:
                log.warning("the cluster has no DistTrainJob CRD yet; run: kubectl apply -f crds/")
            except ApiError as error:
                log.warning("cannot read from the API server yet: %s", error)
            await asyncio.sleep(2)

    async def once(self) -> None:
        began, absent = self._watch_health.clock(), set[Resource]()
        for resource, selector in SELECTORS.items():
            try:
                differences = sum(
                    [await self._compare(resource, namespace, selector) for namespace in self._namespaces]
                )
            except Restored as error:
                self._restored(error)
                return
            except (NotFound, Refused) as error:
                if resource not in OPTIONAL or error.status not in (403, 404):
                    raise
                absent.add(resource)
                differences = 0
            if not differences:
                self._watch_health.reported(resource)
            elif self._watch_health.synced:
                DRIFT.labels(watched(resource)).inc(differences)
        known, before, self._absent = self._cache.absent, self._absent, absent
        if not self._watch_health.synced:
            self._cache.absent = frozenset(absent)
        elif before == absent != known:  # twice: a single answer may be that of an API server that starts
            self._restored(KindsChanged(known - absent, absent - known))
            return
        self._watch_health.complete()
        self._compared(began - self._last)
        self._last = began

    async def _compare(self, resource: Resource, namespace: str | None, selector: str) -> int:
        store = self._cache.stores[resource]
        uids: set[str] = set()
        version = differences = 0
        before = store.known
        async for page in self._api.list(resource, namespace, selector=selector):
            check(store, resource, page, before)
            version = page.version
            for body in page.items:
                uids.add(body["metadata"]["uid"])
                if entry := store.put(body):
                    differences += 1
                    self._changed(resource, entry, False)
        for entry in store.vanished(uids, version):
            if namespace in (None, entry.key.namespace):
                store.drop(entry.key, entry.uid)
                differences += 1
                self._changed(resource, entry, True)
        return differences
