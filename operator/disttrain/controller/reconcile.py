"""One pass over one job: freeze what is known, ask the plan, do what it says, write the status, say when to look again.

Level-triggered: a pass knows nothing of the event that caused it, so a lost, repeated or late event changes nothing but the moment.
Whatever fails is raised to `run`, which puts the key back with a pause. Not here: decisions
(`disttrain.plan`), requests (`apply`, `status`).
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime

from pydantic import ValidationError

from disttrain.api import DistTrainJob, DistTrainJobStatus, Progress
from disttrain.controller.api import ApiError, Conflict, KubeApi, NotFound, Resource, Unavailable
from disttrain.controller.apply import Executor, owned
from disttrain.controller.cache import Cache, Entry, Key, StoredJob
from disttrain.controller.events import EventPoster
from disttrain.controller.expectations import Expectations
from disttrain.controller.metrics import RECONCILE_ERRORS, RECONCILE_SECONDS, observe
from disttrain.controller.progress import Master, ProgressReader
from disttrain.controller.queue import ShutDown, WorkQueue
from disttrain.controller.snapshot import Memories, Memory, running_master, take_snapshot
from disttrain.controller.status import StatusWriter, Wait, Written, invalid
from disttrain.plan import decide

log = logging.getLogger(__name__)

FOREIGN_SECONDS = 5.0
"""How long a name is taken to be another owner's before it is looked at again."""


class Reconciler:
    """Takes jobs from the queue and brings each where its plan wants it."""

    def __init__(
        self,
        *,
        api: KubeApi,
        cache: Cache,
        queue: WorkQueue[Key],
        expectations: Expectations,
        memories: Memories,
        executor: Executor,
        statuses: StatusWriter,
        events: EventPoster,
        progress: ProgressReader,
        clock: Callable[[], datetime],
    ) -> None:
        self._api = api
        self._cache = cache
        self._queue = queue
        self._expectations = expectations
        self._memories = memories
        self._executor = executor
        self._statuses = statuses
        self._events = events
        self._progress = progress
        self._clock = clock

    async def run(self) -> None:
        """Makes passes until the queue is shut down. Several may run; the queue keeps them off the same job."""
        while True:
            try:
                key = await self._queue.get()
            except ShutDown:
                return
            try:
                with RECONCILE_SECONDS.time():
                    await self.reconcile(key)
            except Conflict as error:  # somebody was faster: what we decided on is old, and the cache is not any more
                log.debug("%s: %s", key, error)
                self._queue.add_rate_limited(key)
            except Unavailable as error:
                log.warning("%s: will try again: %s", key, error)
                self._again(key, error.retry_after)
            except ApiError as error:
                log.error("%s: the API server does not let it be, will try again: %s", key, error)
                self._again(key)
            except Exception:  # the top of the worker's loop: one job's trouble must not end the others' service
                log.exception("%s: the pass failed, will try again", key)
                self._again(key)
            else:
                self._queue.forget(key)
            finally:
                self._queue.done(key)

    def _again(self, key: Key, seconds: float | None = None) -> None:
        RECONCILE_ERRORS.inc()
        if seconds is None:
            self._queue.add_rate_limited(key)
        else:
            self._queue.hold(key, seconds)

    async def reconcile(self, key: Key) -> None:
        """One pass."""
        stored = self._cache.jobs.get(key)
        if stored is None or stored.value.deleting or not stored.value.ours:
            # A job on its way out is the garbage collector's: everything of it has an owner reference.
            self._forget(key)
            return
        memory = self._memories.of(key, stored.uid)
        if memory.generation != stored.value.generation:
            memory.generation = stored.value.generation
            memory.refusals.clear()  # the spec changed, and may be what mends it
        await self._recheck(key, stored.uid, memory)
        match stored.value.parsed:
            case ValidationError() as error:
                await self._write(stored, memory, invalid(stored.value, error, self._clock()))
            case job:
                await self._carry_on(stored, memory, job)

    async def _carry_on(self, stored: Entry[StoredJob], memory: Memory, job: DistTrainJob) -> None:
        key = stored.key
        plan = decide(take_snapshot(self._cache, memory, job, self._clock()))
        obstacle = await self._executor.carry_out(job, memory, plan.actions)
        if written := await self._write(stored, memory, plan.status):
            for event in plan.events:
                self._events.post(key, stored.uid, event)
        self._follow(key, stored.uid, job, ended=plan.status.completion_time is not None)
        if obstacle:
            self._queue.add(key)  # the plan has to hear of it
        if plan.look_again is not None and written:  # else the pass that writes looks at the clock anew
            self._queue.add_after(key, plan.look_again.total_seconds())
        if (deadline := self._expectations.next_deadline(key)) is not None:
            self._queue.add_after(key, deadline - asyncio.get_running_loop().time())

    async def _write(self, stored: Entry[StoredJob], memory: Memory, status: DistTrainJobStatus) -> bool:
        """False when the write has to wait: the next pass will find the same news, and tell it then."""
        before = stored.value.parsed
        quiet_for = asyncio.get_running_loop().time() - memory.status_written
        result = await self._statuses.write(stored, status, quiet_for=quiet_for)
        memory.rests_until = float("-inf")
        if isinstance(result, Wait):
            memory.rests_until = asyncio.get_running_loop().time() + result.at_most
            self._queue.add_after(stored.key, result.seconds)
            return False
        if result is Written.YES:
            memory.status_written = asyncio.get_running_loop().time()
            if isinstance(before, DistTrainJob):
                observe(before.status, status, self._clock())
        return True

    async def _recheck(self, key: Key, uid: str, memory: Memory) -> None:
        """Asks the API server itself about children of which the watch should have told, and about names that others hold."""
        now = asyncio.get_running_loop().time()
        for resource, child in self._expectations.overdue(key, now):
            await self._look_at(key, resource, child)
        for child, (resource, looked) in list(memory.foreign.items()):
            if now - looked >= FOREIGN_SECONDS:
                memory.foreign[child] = (resource, now)
                if await self._look_at(key, resource, child, uid):
                    del memory.foreign[child]

    async def _look_at(self, job: Key, resource: Resource, child: Key, uid: str = "") -> bool:
        """Puts the cache right about one child. Whether the name is free or ours."""
        store = self._cache.stores[resource]
        try:
            body = await self._api.get(resource, child.namespace, child.name)
        except NotFound:
            if known := store.get(child):
                store.drop(child, known.uid)
                self._expectations.seen(job, known.uid, gone=True)
            return True
        known = store.get(child)
        if known and known.uid != body["metadata"]["uid"]:
            self._expectations.seen(job, known.uid, gone=True)
        store.put(body)
        self._expectations.seen(job, body["metadata"]["uid"], gone=False)
        return owned(body, uid)

    def _follow(self, key: Key, uid: str, job: DistTrainJob, *, ended: bool) -> None:
        master = None if ended else running_master(self._cache, uid)
        self._progress.follow(
            key,
            Master(
                namespace=key.namespace,
                pod=master.key.name,
                uid=master.uid,
                ip=master.value.ip,
                port=job.spec.observability.metrics_port,
                interval=job.spec.observability.status_interval_seconds,
            )
            if master
            else None,
        )

    def heard(self, key: Key, master: Master, progress: Progress) -> None:
        """A master reported."""
        memory, pod = self._memories.find(key), self._cache.pods.get(Key(master.namespace, master.pod))
        if memory is None or pod is None or (pod.uid, pod.owner) != (master.uid, memory.uid):
            return  # a last word of a master that is no more
        news = memory.progress != progress
        memory.progress, memory.progress_read = progress, self._clock()
        if news:
            self._queue.add(key)

    def _forget(self, key: Key) -> None:
        self._progress.follow(key, None)
        self._expectations.forget(key)
        self._memories.forget(key)
