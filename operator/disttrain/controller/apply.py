"""Carries a plan's actions out: in their order, like ones together, and so that doing it twice does no harm.

A create that finds its name taken (409) looks whose it is: ours by the owner's uid is as good as made, anybody else's is left alone and
told to the plan as `foreign`. A delete names the uid, so that a successor of the same name is never hit. Every answer goes into the cache.
What the API server refuses becomes a Refusal for the plan; what it cannot do now is raised, and the queue tries again.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime
from itertools import groupby
from typing import Any

from disttrain.api import DistTrainJob
from disttrain.controller.api import (
    JOBS,
    NETWORK_POLICIES,
    PODS,
    SERVICES,
    Body,
    Conflict,
    KubeApi,
    NotFound,
    Refused,
    Resource,
)
from disttrain.controller.cache import Cache, Key
from disttrain.controller.expectations import Expectations
from disttrain.controller.snapshot import Memory
from disttrain.manifests import build_network_policy, build_pod, build_service
from disttrain.plan.model import (
    Action,
    CreateNetworkPolicy,
    CreatePod,
    CreateService,
    DeleteJob,
    DeleteNetworkPolicy,
    DeletePod,
    Refusal,
)

SLOW_START = 4
"""Size of the first batch of creations; each next one is twice as large. A quota that is full is met by few requests, not by thousands."""

Work = Coroutine[Any, Any, None]


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
        self._slots = asyncio.Semaphore(concurrency)
        self._clock = clock

    async def carry_out(self, job: DistTrainJob, memory: Memory, actions: Iterable[Action]) -> bool:
        """Does it all, or raises ApiError with a part of it done. True when the plan has to hear of an obstacle."""
        for creating, group in groupby(actions, key=lambda action: isinstance(action, CREATIONS)):
            work = [self._bounded(self._do(job, memory, action)) for action in group]
            size = SLOW_START if creating else len(work)
            while work:
                batch, work = work[:size], work[size:]
                results = await asyncio.gather(*batch, return_exceptions=True)
                size *= 2
                failures = [result for result in results if isinstance(result, BaseException)]
                if failures:
                    for left in work:
                        left.close()
                    return _judge(failures)
        return False

    async def _bounded(self, work: Work) -> None:
        try:
            async with self._slots:
                await work
        finally:
            work.close()

    async def _do(self, job: DistTrainJob, memory: Memory, action: Action) -> None:
        match action:
            case CreateService():
                await self._create(job, memory, SERVICES, build_service(job))
            case CreateNetworkPolicy():
                await self._create(job, memory, NETWORK_POLICIES, build_network_policy(job))
            case DeleteNetworkPolicy():
                for policy in list(self._cache.network_policies.owned_by(job.metadata.uid)):
                    await self._delete(job, NETWORK_POLICIES, policy.key, policy.uid, None)
            case CreatePod(role=role, index=index, attempt=attempt):
                await self._create(
                    job, memory, PODS, build_pod(job, role, index, attempt, trainer_image=self._trainer_image)
                )
            case DeletePod(name=name, uid=uid, grace_seconds=grace):
                await self._delete(job, PODS, Key(job.metadata.namespace, name), uid, grace)
            case DeleteJob():
                metadata = job.metadata
                await self._delete(job, JOBS, Key(metadata.namespace, metadata.name), metadata.uid, None)

    async def _create(self, job: DistTrainJob, memory: Memory, resource: Resource, body: Body) -> None:
        key = Key(job.metadata.namespace, body["metadata"]["name"])
        try:
            child = await self._api.create(resource, key.namespace, body)
        except Conflict as error:
            if error.reason != "AlreadyExists":
                raise
            try:
                child = await self._api.get(resource, key.namespace, key.name)
            except NotFound:
                raise error from None  # gone in between: try again
            if not owned(child, job.metadata.uid):
                memory.foreign[key] = (resource, asyncio.get_running_loop().time())
                raise _Obstacle from error
        except Refused as error:
            memory.refusals[key.name] = Refusal(
                name=key.name, message=error.message, retryable=error.status != 422, time=self._clock()
            )
            raise _Obstacle from error
        memory.refusals.pop(key.name, None)
        memory.foreign.pop(key, None)
        self._cache.stores[resource].put(child)
        owner = Key(key.namespace, job.metadata.name)
        self._expectations.created(owner, resource, key, child["metadata"]["uid"], asyncio.get_running_loop().time())

    async def _delete(self, job: DistTrainJob, resource: Resource, key: Key, uid: str, grace: int | None) -> None:
        store = self._cache.stores[resource]
        try:
            left = await self._api.delete(resource, key.namespace, key.name, uid=uid, grace_seconds=grace)
        except (NotFound, Conflict):  # Conflict: the name is another's by now, so this one is gone
            store.drop(key, uid)
            return
        metadata = left.get("metadata", {})
        grace_left, finalizers = metadata.get("deletionGracePeriodSeconds"), metadata.get("finalizers")
        if metadata.get("uid") != uid or (not grace_left and not finalizers):
            # Gone with this answer: a Status, or the last state of a pod that had nothing left to end. To wait for the watch to say
            # so would be to wait in vain when it began after this.
            store.drop(key, uid)
            return
        store.put(left)
        self._expectations.deleted(
            Key(key.namespace, job.metadata.name),
            resource,
            key,
            uid,
            asyncio.get_running_loop().time(),
            grace_left or 0,
        )


CREATIONS = (CreateService, CreateNetworkPolicy, CreatePod)


class _Obstacle(Exception):
    """A child could not be made, and the job's Memory says why."""


def _judge(failures: list[BaseException]) -> bool:
    """Raises what has to be tried again; True when there were only obstacles that the plan shall hear of."""
    for failure in failures:
        if not isinstance(failure, _Obstacle):
            raise failure
    return True


def owned(child: Body, uid: str) -> bool:
    """Whether the job of that uid controls the object."""
    return any(
        reference.get("controller") and reference["uid"] == uid
        for reference in child["metadata"].get("ownerReferences", ())
    )
