"""One pass over one job: freeze what is known, ask the plan, do what it says, write the status, say when to look again.

Level-triggered: a pass knows nothing of the event that caused it, so a lost, repeated or late event changes nothing but the moment.
Whatever fails is raised to `run`, which puts the key back with a pause. Not here: decisions
(`disttrain.plan`), requests (`apply`, `status`).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import datetime

from disttrain.api import DistTrainJob, Progress
from disttrain.api.policies import Tls
from disttrain.api.stored import ReadJob
from disttrain.controller.apply import Executor, of_a_former_job, owned
from disttrain.controller.cache import Cache, Entry, Key, StoredJob
from disttrain.controller.events import EventPoster
from disttrain.controller.expectations import Expectations
from disttrain.controller.metrics import RECONCILE_ERRORS, RECONCILE_SECONDS, observe
from disttrain.controller.progress import Master, ProgressReader
from disttrain.controller.progress_turns import ProgressTurns
from disttrain.controller.queue import ShutDown, WorkQueue
from disttrain.controller.record import LONG_AGO, Child, JobRecord, JobRecords
from disttrain.controller.resync import Restored, look_at_pods
from disttrain.controller.snapshot import running_master, take_snapshot
from disttrain.controller.status import StatusWriter, Wait, Written
from disttrain.controller.volume_failures import VolumeFailures, waits_for_volumes
from disttrain.kube.api import JOBS, PODS, ApiError, Body, Conflict, KubeApi, NotFound, Unavailable
from disttrain.plan import Plan, Snapshot, decide, look_again
from disttrain.plan.model import DeleteJob, Write
from disttrain.plan.progress import pass_after, read_interval
from disttrain.plan.urgency import not_carried_out

log = logging.getLogger(__name__)

NAME_CHECK_SECONDS = 5.0
"""How long a name is taken to be another owner's before it is looked at again."""

MOST_LOGGED = 1000
"""Sets of unknown fields that are remembered, so that each is logged once."""


class Reconciler:
    """Takes jobs from the queue and brings each where its plan wants it."""

    def __init__(
        self,
        *,
        api: KubeApi,
        cache: Cache,
        queue: WorkQueue[Key],
        expectations: Expectations,
        records: JobRecords,
        executor: Executor,
        statuses: StatusWriter,
        events: EventPoster,
        progress: ProgressReader,
        volume_failures: VolumeFailures,
        clock: Callable[[], datetime],
        restored: Callable[[Restored], None],
        allows_host_access: bool = False,
    ) -> None:
        self._api = api
        self._cache = cache
        self._queue = queue
        self._expectations = expectations
        self._records = records
        self._executor = executor
        self._statuses = statuses
        self._events = events
        self._progress = progress
        self._volume_failures = volume_failures
        self._clock = clock
        self._restored = restored
        self._allows_host_access = allows_host_access
        self._progress_turns = ProgressTurns()
        self._logged: set[tuple[str, ...]] = set()

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
            except Conflict as error:  # another write came first: the decision is old, and the cache is now up to date
                log.debug("%s: %s", key, error)
                self._queue.add_rate_limited(key)
            except Restored as error:
                self._restored(error)
            except Unavailable as error:
                log.warning("%s: a request failed; the next attempt follows: %s", key, error)
                self._again(key, error.retry_after)
            except ApiError as error:
                log.error("%s: the API server refused a request; the next attempt follows: %s", key, error)
                self._again(key)
            except Exception:  # the top of the worker's loop: one job's trouble must not end the others' service
                log.exception("%s: the pass failed; the next attempt follows", key)
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
        record = self._records.of(key, stored.uid)
        record.begin_pass(
            stored.value.generation,
            has_status=bool(stored.value.status),
            now=self._clock(),
            moment=asyncio.get_running_loop().time(),
        )
        await self._recheck(key, stored.uid, record)
        await self._carry_on(stored, record, stored.value.read)

    async def _carry_on(self, stored: Entry[StoredJob], record: JobRecord, read: ReadJob) -> None:
        key, job = stored.key, read.job
        self._tell_unknown(key, read)
        self._follow_volumes(key, stored.uid, record)
        snapshot, plan = self._decide(record, read)
        if plan.asks:
            await self._progress.look(key)
            snapshot, plan = self._decide(record, read)
        if plan.irreversible:
            # The watch may have been mute for a minute. What nothing takes back is decided a second time, on what is true now.
            await self._look_live(stored, record, plan)
            if plan.status.completion_time is not None and job.status.completion_time is None:
                await self._progress.look(
                    key
                )  # a status that is final has the last checkpoint, and not that of some seconds ago
            snapshot, plan = self._decide(record, read)
        trouble: ApiError | None = None
        changed = False
        try:
            changed = await self._executor.carry_out(job, record, plan.actions)
        except ApiError as error:
            if error.retry_after is not None and job.status.start_time is not None:
                raise  # the server wants to be left alone; but every deadline counts from the start, which is written first
            # The status is written all the same: what cannot be done may stay so for hours, in which deadlines run and a user looks.
            trouble = error
            plan = not_carried_out(plan, job.status)
        if written := await self._write(stored, record, plan):
            for event in plan.events:
                self._events.post(key, stored.uid, event)
        ended = plan.status.completion_time is not None or bool(read.not_understood)
        self._follow(key, stored.uid, job, ended=ended)
        if trouble:
            raise trouble
        if changed:
            self._queue.add(key)  # the plan has to see it
        pause = look_again(snapshot, plan) if written else plan.look_again
        if pause is not None and (written or pause):  # at once only after what was written down
            self._queue.add_after(key, pause.total_seconds())
        if (deadline := self._expectations.next_deadline(key)) is not None:
            self._queue.add_after(key, deadline - asyncio.get_running_loop().time())

    def _decide(self, record: JobRecord, read: ReadJob) -> tuple[Snapshot, Plan]:
        now = self._clock()
        snapshot = take_snapshot(
            self._cache,
            record,
            read.job,
            now,
            not_understood=read.not_understood,
            allows_host_access=self._allows_host_access,
        )
        return snapshot, decide(snapshot)

    def _tell_unknown(self, key: Key, read: ReadJob) -> None:
        """Logs fields of another version, once for all jobs that have them: the API server gives its defaults to every one."""
        if read.unknown and read.unknown not in self._logged:
            if len(self._logged) >= MOST_LOGGED:
                self._logged.clear()
            self._logged.add(read.unknown)
            log.warning("%s: fields that this version does not know are ignored: %s", key, ", ".join(read.unknown))

    async def _look_live(self, stored: Entry[StoredJob], record: JobRecord, plan: Plan) -> None:
        """Puts the cache right about the pods of a job, and about the job itself where no write would find that it moved on."""
        key = stored.key
        if any(isinstance(action, DeleteJob) for action in plan.actions):
            try:
                newest = await self._api.get(JOBS, *key)
            except NotFound:
                self._cache.jobs.drop(key, stored.uid)
                raise Conflict(409, "Conflict", "the job is gone") from None
            if newest["metadata"]["resourceVersion"] != stored.value.version:
                self._cache.jobs.put(newest)
                raise Conflict(409, "Conflict", "the job moved on")
        for pod, gone in await look_at_pods(self._api, self._cache, key, stored.uid):
            self._expectations.seen(key, pod.uid, gone=gone)
            if gone:
                record.resolved(Child(PODS, pod.key))

    async def _write(self, stored: Entry[StoredJob], record: JobRecord, plan: Plan) -> bool:
        """Returns False when the write has to wait: the next pass will see the same change, and write it then."""
        before = stored.value.read.job.status
        turn = self._progress_turns.of(record) if plan.write is Write.PROGRESS else LONG_AGO
        result = await self._statuses.write(stored, plan, last=record.status_written, turn=turn)
        record.small_writes_wait()
        if isinstance(result, Wait):
            record.small_writes_wait(asyncio.get_running_loop().time() + result.larger)
            self._queue.add_after(stored.key, result.seconds)
            return False
        if result is Written.YES:
            record.wrote_status(asyncio.get_running_loop().time())
            observe(before, plan.status, self._clock())
        else:
            record.progress_waits(None)  # a turn of the past would let a later report through at once
        return True

    async def _recheck(self, key: Key, uid: str, record: JobRecord) -> None:
        """Reads children from the API server: those whose watch event is overdue, and those whose name another object has."""
        now = asyncio.get_running_loop().time()
        for late in self._expectations.overdue(key, now):
            await self._look_at(key, Child(late.resource, late.child), late.uid)
        for child in record.name_checks_due(now, NAME_CHECK_SECONDS):
            newest = await self._look_at(key, child)
            if newest is None or owned(newest, uid):
                record.name_free(child)
            else:
                record.name_taken(child, former=of_a_former_job(newest, key.name), moment=now)
        for child in record.not_created():
            if self._cache.shows(*child, uid):
                record.resolved(child)  # the creation succeeded despite the error, or another client created it

    async def _look_at(self, job: Key, child: Child, awaited: str = "") -> Body | None:
        """Puts the cache right about one child, of which this uid was awaited. The child as it is, None when there is none."""
        resource, key = child
        known = self._cache.stores[resource].get(key)
        former = {awaited, known.uid if known else ""} - {""}
        newest: Body | None = None
        with contextlib.suppress(NotFound):
            newest = await self._api.get(resource, key.namespace, key.name)
        if newest:
            former.discard(newest["metadata"]["uid"])
            self._expectations.there(job, resource, newest)
        for uid in former:
            self._expectations.gone(job, resource, key, uid)
        return newest

    def _follow(self, key: Key, uid: str, job: DistTrainJob, *, ended: bool) -> None:
        kept = job.status.certificate
        public_key = kept.public_key if kept is not None else None
        unknown = job.spec.network.tls is Tls.MUTUAL and public_key is None
        master = None if ended or unknown else running_master(self._cache, key.namespace, uid)
        self._progress.follow(
            key,
            Master(
                namespace=key.namespace,
                pod=master.key.name,
                uid=master.uid,
                ip=master.value.ip,
                port=job.spec.observability.metrics_port,
                interval=read_interval(job.spec).total_seconds(),
                public_key=public_key,
            )
            if master
            else None,
        )

    def _follow_volumes(self, key: Key, uid: str, record: JobRecord) -> None:
        views = (entry.value.view for entry in self._cache.pods.owned_by(key.namespace, uid))
        waiting = (view.uid for view in views if view is not None and waits_for_volumes(view))
        record.wait_for_volumes(waiting, asyncio.get_running_loop().time())
        self._volume_failures.follow(key, min(record.waiting_for_volumes.values(), default=None))

    def volumes_failed(self, key: Key, messages: dict[str, str]) -> None:
        """Events say why volumes of pods of the job's namespace cannot be mounted, by the uid of the pod."""
        record = self._records.find(key)
        if record is not None and record.found_volume_failures(messages):
            self._queue.add(key)

    def reported(self, key: Key, master: Master, progress: Progress) -> None:
        """The master of a job reported."""
        record, pod = self._records.find(key), self._cache.pods.get(Key(master.namespace, master.pod))
        if record is None or pod is None or (pod.uid, pod.owner) != (master.uid, record.uid):
            return  # a late report of a master that is gone
        before, now = record.progress, self._clock()
        if not record.report(progress, now):
            return
        stored = self._cache.jobs.get(key)
        wait = pass_after(stored.value.read.job, before, progress, now) if stored is not None else None
        if wait is None:
            self._queue.add(key)
        elif wait:
            self._queue.add_after(key, wait.total_seconds())
        else:
            self._queue.add_after(key, self._progress_turns.of(record) - asyncio.get_running_loop().time())

    def _forget(self, key: Key) -> None:
        self._progress.follow(key, None)
        self._volume_failures.follow(key, None)
        self._expectations.forget(key)
        self._records.forget(key)
