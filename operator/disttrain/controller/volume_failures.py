"""Reads why a pod's volumes cannot be mounted, such as a Secret that does not exist. Only Events say it: the pod stays ContainerCreating.

While a pod of a namespace waits so, a task reads the Events about all pods of that namespace, with two requests. A pod with a sandbox does
not wait for volumes: the kubelet mounts them first. When a request fails, the job says that it waits for the pod, as before.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from disttrain.controller.cache import Key
from disttrain.kube.api import EVENTS, ApiError, Body, KubeApi
from disttrain.plan.model import Phase, PodView

log = logging.getLogger(__name__)

MOUNT_SECONDS = 5.0
"""For a pod to mount its volumes before the reader looks for what prevents it."""
QUESTION_SECONDS = 15.0
"""Between two readings of a namespace's Events."""
MOUNTED = "PodReadyToStartContainers"
"""Condition of a pod that has its sandbox. Clusters before 1.29 do not have it: there a pod that pulls its image counts as waiting, too."""
MOST_EVENTS = 2000
"""Events of one reason that are read of a namespace: who may create Events there decides how many there are."""
LONGEST = 1024
"""Characters of a message that are kept."""
_SUMMARY = "Unable to attach or mount volumes"
"""Beginning of the Event that counts the volumes that are missing every two minutes, and does not say why."""
_REASONS = ("FailedMount", "FailedAttachVolume")
"""The kubelet's, and the attach-detach controller's: of a volume that another node has. A field selector knows no `or`."""


@dataclass(slots=True)
class _Namespace:
    """A namespace in which pods wait, or waited a moment ago."""

    task: asyncio.Task[None] | None = None
    waiting: dict[Key, float] = field(default_factory=dict)
    """Since when a pod of a job waits, by the loop's clock."""
    asked: float = float("-inf")


class VolumeFailures:
    """Reads while pods wait. `found` gets a job with such pods and, by uid, the messages about pods of its namespace."""

    def __init__(self, api: KubeApi, found: Callable[[Key, dict[str, str]], None]) -> None:
        self._api = api
        self._found = found
        self._namespaces: dict[str, _Namespace] = {}

    def follow(self, job: Key, since: float | None) -> None:
        """A pod of the job waits for its volumes since then, by the loop's clock; None: none of them waits."""
        if since is None:
            if (namespace := self._namespaces.get(job.namespace)) is not None:
                namespace.waiting.pop(job, None)
            return
        namespace = self._namespaces.setdefault(job.namespace, _Namespace())
        namespace.waiting[job] = since
        if namespace.task is None or namespace.task.done():
            reading = self._follow(job.namespace, namespace)
            namespace.task = asyncio.create_task(reading, name=f"volume failures of {job.namespace}")

    async def close(self) -> None:
        tasks = [namespace.task for namespace in self._namespaces.values() if namespace.task is not None]
        self._namespaces.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, name: str, namespace: _Namespace) -> None:
        """Reads as long as a pod waits, and ends when the next pod that waits may be looked at without a pause."""
        loop = asyncio.get_running_loop()
        while True:
            due = namespace.asked + QUESTION_SECONDS
            if namespace.waiting:
                due = max(due, min(namespace.waiting.values()) + MOUNT_SECONDS)
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            elif not namespace.waiting:
                del self._namespaces[name]
                return
            else:
                namespace.asked = loop.time()
                try:
                    messages = await self._read(name)
                except ApiError as error:
                    log.debug("cannot read the Events of namespace %s: %s", name, error)
                    continue
                for job in list(namespace.waiting):
                    self._found(job, messages)

    async def _read(self, namespace: str) -> dict[str, str]:
        events = [event for reason in _REASONS async for event in self._events(namespace, reason)]
        # The last one of a pod counts: the newest of those that say why, else the newest.
        events.sort(key=lambda event: (not event.get("message", "").startswith(_SUMMARY), _time(event)))
        return {event.get("involvedObject", {}).get("uid", ""): event.get("message", "")[:LONGEST] for event in events}

    async def _events(self, namespace: str, reason: str) -> AsyncIterator[Body]:
        read = 0
        async for page in self._api.list(EVENTS, namespace, fields=f"involvedObject.kind=Pod,reason={reason}"):
            for event in page.items:
                yield event
            read += len(page.items)
            if read >= MOST_EVENTS:
                return


def waits_for_volumes(pod: PodView) -> bool:
    """Whether the pod has a node and no container yet."""
    on_its_way = pod.phase is Phase.PENDING and not pod.deleting and bool(pod.node)
    return on_its_way and pod.reason in ("ContainerCreating", "PodInitializing") and MOUNTED not in pod.conditions


def _time(event: Body) -> str:
    """When it was last seen: RFC 3339 in UTC, so that the order of the texts is the order of time."""
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")
