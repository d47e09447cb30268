"""Carries a plan's actions out: in their order, like ones together, and so that doing it twice does no harm.

When a name is taken (409), the executor reads that object: one that the job owns (by uid) counts as created; any other is left alone, and
the plan sees it in `name_conflicts`. A delete names the uid, so that it never hits a successor of the same name. Every answer goes into
the cache.
What the API server refuses becomes a Refusal for the plan; what it cannot do now is raised, and the queue tries again.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import groupby

from disttrain import certificates
from disttrain.api import DistTrainJob
from disttrain.api.names import CERTIFICATE, KIND, POD_GROUPS, Role, pod_name
from disttrain.controller.cache import Cache, Key
from disttrain.controller.expectations import Expectations
from disttrain.controller.record import Child, JobRecord
from disttrain.controller.turns import Slots
from disttrain.kube.api import (
    CHILDREN,
    JOBS,
    PODS,
    SECRETS,
    Body,
    Conflict,
    KubeApi,
    NotFound,
    Refused,
    Resource,
    Unavailable,
)
from disttrain.manifests import CHILDREN as MANIFESTS
from disttrain.manifests import build_pod, build_secret
from disttrain.manifests.secret import name_of_secret
from disttrain.plan.model import (
    Action,
    Create,
    CreatePod,
    CreateSecret,
    Delete,
    DeleteJob,
    DeletePod,
    DeleteSecret,
    MadeSecret,
    Refusal,
    SuspendJob,
)

SLOW_START = 4
"""Size of the first batch of creations; each next one is twice as large. A quota that is full is met by few requests, not by thousands."""
SERVER_ERROR_SECONDS = 5.0
"""After so long an error of the server at a creation becomes a Refusal: an admission webhook may be down for hours."""
FINAL = frozenset({400, 422})
"""Codes for an object that is wrong in itself: a field that does not exist or is of another type, a value that is not allowed."""
UNSEEN = "it exists without the labels that the operator gave it; the operator deletes it, and creates it again when it is gone"


class Executor:
    """Does what plans say."""

    def __init__(
        self,
        api: KubeApi,
        cache: Cache,
        expectations: Expectations,
        *,
        trainer_image: str,
        concurrency: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._api = api
        self._cache = cache
        self._expectations = expectations
        self._trainer_image = trainer_image
        self._slots = Slots(concurrency)
        self._clock = clock

    async def carry_out(self, job: DistTrainJob, record: JobRecord, actions: Iterable[Action]) -> bool:
        """Does it all, or raises ApiError with a part of it done.

        Returns True when another pass is needed and no watch event may cause it: a child was not created, or was gone at once.
        """
        changed = False
        for (creating, _), group in groupby(actions, key=_stage):
            left = list(group)
            size = SLOW_START if creating else len(left)
            while left:
                batch, left = left[:size], left[size:]
                results = await asyncio.gather(
                    *(self._bounded(job, record, action) for action in batch), return_exceptions=True
                )
                size *= 2
                if failures := [result for result in results if isinstance(result, BaseException)]:
                    return _judge(failures)
                changed |= any(results)
        return changed

    async def _bounded(self, job: DistTrainJob, record: JobRecord, action: Action) -> bool:
        async with self._slots.of(job.metadata.namespace):
            return await self._do(job, record, action)

    async def _do(self, job: DistTrainJob, record: JobRecord, action: Action) -> bool:
        """True when a child went at once."""
        namespace, name = job.metadata.namespace, job.metadata.name
        match action:
            case Create(kind=kind):
                child = Child(CHILDREN[kind], Key(namespace, name))
                return await self._create(job, record, child, lambda: MANIFESTS[kind](job))
            case Delete(kind=kind):
                return await self._delete_child(job, CHILDREN[kind], Key(namespace, name))
            case CreateSecret():
                return await self._create_secret(job, record)
            case DeleteSecret():
                return await self._delete_secret(job)
            case CreatePod(role=role, index=index, attempt=attempt, trainer_image=kept, pod_group=group):
                child = Child(PODS, Key(namespace, pod_name(name, role, index)))
                image = kept or self._trainer_image
                return await self._create(
                    job,
                    record,
                    child,
                    lambda: build_pod(job, role, index, attempt, trainer_image=image, pod_group=group),
                )
            case DeletePod(name=pod, uid=uid, grace_seconds=grace):
                return await self._delete(job, PODS, Key(namespace, pod), uid, grace)
            case DeleteJob():
                return await self._delete(job, JOBS, Key(namespace, name), job.metadata.uid, None)
            case SuspendJob():
                return await self._suspend(job, record)

    async def _create(self, job: DistTrainJob, record: JobRecord, child: Child, build: Callable[[], Body]) -> bool:
        """Makes a child. True when there was a useless one in its place, which went at once."""
        resource, key = child
        now = asyncio.get_running_loop().time()
        try:
            body = build()
        except Exception as error:  # a template that cannot be merged fails in as many ways as there are templates
            words = f"the operator cannot build it from its template: {type(error).__name__}: {' '.join(str(error).split())}"
            raise self._refuse(record, child, words, retryable=False) from error
        found = None
        try:
            made = await self._send(record, child, body)
        except Conflict as error:
            if error.reason != "AlreadyExists":
                raise
            try:
                made = found = await self._api.get(resource, key.namespace, key.name)
            except NotFound:
                raise error from None  # gone in between: try again
            if not owned(found, job.metadata.uid):
                record.name_taken(child, former=of_a_former_job(found, job.metadata.name), moment=now)
                raise ChildNotCreated from error
        record.resolved(child)
        self._expectations.created(Key(key.namespace, job.metadata.name), resource, made, now)
        if found is None or self._cache.shows(resource, key, job.metadata.uid):
            return False
        # It is ours and alive, but no watch shows it: a user took the labels off by which the operator knows it, and a plan without
        # it would make it for ever. There is no right to put labels back; nothing of it is worth more than a new one.
        metadata = found["metadata"]
        if "deletionTimestamp" not in metadata and await self._delete(job, resource, key, metadata["uid"], None):
            return True
        raise self._refuse(record, child, UNSEEN, retryable=True)

    async def _send(self, record: JobRecord, child: Child, body: Body) -> Body:
        """The answer to the creation of a child; what the API server does not take is a Refusal. Raises Conflict."""
        try:
            return await self._api.create(child.resource, child.key.namespace, body)
        except Refused as error:
            raise self._refuse(record, child, error.message, retryable=error.status not in FINAL) from error
        except Unavailable as error:
            now = asyncio.get_running_loop().time()
            failed_for = record.server_failed(child, now) if error.status >= 500 else 0.0
            if error.retry_after is None and failed_for >= SERVER_ERROR_SECONDS:
                raise self._refuse(record, child, error.message, retryable=True) from error
            raise

    async def _create_secret(self, job: DistTrainJob, record: JobRecord) -> bool:
        """Makes the Secret of the attempt's certificate. True: the plan has to see what became of it, which no watch reports."""
        # By the name of the job: that of the Secret changes, and what a refusal is about must not.
        child = Child(SECRETS, Key(job.metadata.namespace, job.metadata.name))
        files = certificates.of_attempt(job.metadata, job.status.attempt or 1, now=self._clock())
        body = build_secret(job, files | certificates.join_secrets(_joining(job)))
        try:
            made = await self._send(record, child, body)
        except Conflict as error:
            if error.reason != "AlreadyExists":
                raise
            made = {"metadata": {"uid": ""}}
        record.resolved(child)
        public_key = certificates.public_key(files[CERTIFICATE])
        record.secret_made(body["metadata"]["name"], MadeSecret(uid=made["metadata"]["uid"], public_key=public_key))
        return True

    async def _delete_secret(self, job: DistTrainJob) -> bool:
        kept = job.status.certificate
        if kept is not None:
            with contextlib.suppress(NotFound, Conflict):  # Conflict: another object has the name by now
                await self._api.delete(SECRETS, job.metadata.namespace, name_of_secret(job), uid=kept.uid or "")
        return False

    async def _suspend(self, job: DistTrainJob, record: JobRecord) -> bool:
        """Sets spec.suspend, or stores why not. A Conflict: the job has changed since, and the next pass decides again."""
        about = {"uid": job.metadata.uid, "resourceVersion": job.metadata.resource_version}
        change = {"metadata": about, "spec": {"suspend": True}}
        try:
            self._cache.jobs.put(await self._api.patch(JOBS, job.metadata.namespace, job.metadata.name, change))
        except Refused as error:
            retryable = error.status not in FINAL
            record.suspension_refused(
                Refusal(name="spec.suspend", message=error.message, retryable=retryable, time=self._clock())
            )
        return True

    def _refuse(self, record: JobRecord, child: Child, message: str, *, retryable: bool) -> "ChildNotCreated":
        name = f"{child.resource.kind} {child.key.name}"
        record.refused(child, Refusal(name=name, message=message, retryable=retryable, time=self._clock()))
        return ChildNotCreated()

    async def _delete_child(self, job: DistTrainJob, resource: Resource, key: Key) -> bool:
        """Deletes the job's object of this name, if there is one."""
        known = self._cache.stores[resource].get(key)
        uid = known.uid if known is not None and known.owner == job.metadata.uid else ""
        return bool(uid) and await self._delete(job, resource, key, uid, None)

    async def _delete(self, job: DistTrainJob, resource: Resource, key: Key, uid: str, grace: int | None) -> bool:
        """Deletes a child. True when it is gone with the answer, False when it has yet to end."""
        owner = Key(key.namespace, job.metadata.name)
        try:
            left = await self._api.delete(resource, key.namespace, key.name, uid=uid, grace_seconds=grace)
        except (NotFound, Conflict) as error:
            if isinstance(error, Conflict) and await self._is_there(resource, key, uid):
                raise  # an admission webhook, or a lock: to take it for gone would be to forget it for ever
            self._expectations.gone(owner, resource, key, uid)
            return True
        metadata = left.get("metadata", {})
        if metadata.get("uid") != uid or not (metadata.get("deletionGracePeriodSeconds") or metadata.get("finalizers")):
            # A Status, or the last state of a pod that had nothing left to end. To wait for the watch to say so would be to wait in
            # vain when it began after this; and when it does say so, it is no news.
            self._expectations.gone(owner, resource, key, uid)
            return True
        self._expectations.deleted(owner, resource, left, asyncio.get_running_loop().time())
        return False

    async def _is_there(self, resource: Resource, key: Key, uid: str) -> bool:
        """Whether the object of that uid still has the name, and not another one."""
        try:
            found = await self._api.get(resource, key.namespace, key.name)
        except NotFound:
            return False
        return bool(found["metadata"]["uid"] == uid)


CREATIONS = (Create, CreateSecret, CreatePod)


def _stage(action: Action) -> tuple[bool, bool]:
    """What is carried out together: deletions; creations; and before other creations a PodGroup, since a scheduler that sees pods without
    their group lets them wait for minutes."""
    return isinstance(action, CREATIONS), isinstance(action, Create) and action.kind in POD_GROUPS


class ChildNotCreated(Exception):
    """A child could not be made, and the job's JobRecord says why."""


def _judge(failures: list[BaseException]) -> bool:
    """Raises what has to be tried again. Returns True when there are only children that were not created, which the plan handles."""
    for failure in failures:
        if not isinstance(failure, ChildNotCreated):
            raise failure
    return True


def of_a_former_job(child: Body, name: str) -> bool:
    """Whether the controller of an object that is not ours was a job of that name. Names are unique, so that job is gone, and the
    garbage collector deletes what it leaves."""
    return any(
        reference.get("controller") and (reference.get("kind"), reference.get("name")) == (KIND, name)
        for reference in child["metadata"].get("ownerReferences", ())
    )


def _joining(job: DistTrainJob) -> list[tuple[Role, int]]:
    """The processes that may join the master in this attempt."""
    elastic = job.spec.worker.elastic
    workers = elastic.max_replicas if elastic is not None else job.spec.worker.replicas
    counts = {Role.PARAMETER_SERVER: job.spec.servers, Role.WORKER: workers}
    return [(role, index) for role, count in counts.items() for index in range(count)]


def owned(child: Body, uid: str) -> bool:
    """Whether the job of that uid controls the object."""
    return any(
        reference.get("controller") and reference["uid"] == uid
        for reference in child["metadata"].get("ownerReferences", ())
    )
