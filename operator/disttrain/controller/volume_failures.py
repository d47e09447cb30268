"""Reads why a pod's volumes cannot be mounted, such as a Secret that does not exist. Only Events say it: the pod stays ContainerCreating.

Where a pod waits so for long, two requests read the Events about all pods of its namespace. A pod with a sandbox does not wait for
volumes: the kubelet mounts them first. When the request fails, the job says that it waits for the pod, as before.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from disttrain.controller.record import JobRecord
from disttrain.kube.api import EVENTS, ApiError, Body, KubeApi
from disttrain.plan.model import Phase, PodView

log = logging.getLogger(__name__)

MOUNT_SECONDS = 5.0
"""Seconds that a pod has for its volumes before anybody asks what keeps it."""
QUESTION_SECONDS = 15.0
"""Seconds between two questions about a namespace."""
MOUNTED = "PodReadyToStartContainers"
"""Condition of a pod that has its sandbox. A cluster before 1.29 does not know it: there a slow pull of an image is asked about too."""
FORGET_SECONDS = 300.0
"""Seconds after the last question about a namespace in which what is known of it is kept."""
MOST_EVENTS = 2000
"""Of one reason and namespace that are read: whoever may create Events there decides how many there are."""
LONGEST = 1024
"""Characters of a message that are kept."""
_SUMMARY = "Unable to attach or mount volumes"
"""Beginning of the Event that counts the volumes that are missing every two minutes, and does not say why."""
_REASONS = ("FailedMount", "FailedAttachVolume")
"""The kubelet's, and the attach-detach controller's: of a volume that another node has. A field selector knows no `or`."""


@dataclass(slots=True)
class _Answers:
    """What is known of one namespace."""

    asked: float = float("-inf")
    words: dict[str, str] = field(default_factory=dict)
    """The message of the newest Event that says why, by the uid of the pod."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class VolumeFailures:
    """Asks, and remembers the answers by namespace."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._answers: dict[str, _Answers] = {}

    async def look(self, namespace: str, record: JobRecord, pods: Iterable[PodView]) -> float | None:
        """Records what Events say of these pods of a job. Returns the seconds until the next look, None when none of them waits."""
        now = asyncio.get_running_loop().time()
        record.wait_for_volumes((pod.uid for pod in pods if _waits(pod)), now)
        if not record.waiting_for_volumes:
            return None
        answers = self._of(namespace)
        wait = await self._ask(namespace, answers, min(record.waiting_for_volumes.values()) + MOUNT_SECONDS)
        record.found_volume_failures(answers.words)
        return wait

    def _of(self, namespace: str) -> _Answers:
        """The answers about a namespace; those that were not asked for lately are forgotten."""
        now = asyncio.get_running_loop().time()
        old = [
            name for name, one in self._answers.items() if one.asked + FORGET_SECONDS < now and not one.asking.locked()
        ]
        for name in old:
            if name != namespace:
                del self._answers[name]
        return self._answers.setdefault(namespace, _Answers())

    async def _ask(self, namespace: str, answers: _Answers, due: float) -> float:
        """Asks if it is time. Seconds until the next time."""
        loop = asyncio.get_running_loop()
        async with answers.asking:  # a second job waits for the answer to the first
            due = max(due, answers.asked + QUESTION_SECONDS)
            if due <= loop.time():
                answers.asked = loop.time()
                due = loop.time() + QUESTION_SECONDS
                try:
                    answers.words = await self._read(namespace)
                except ApiError as error:
                    log.debug("what the pods of %s wait for is not known: %s", namespace, error)
            return due - loop.time()

    async def _read(self, namespace: str) -> dict[str, str]:
        events = [event for reason in _REASONS async for event in self._events(namespace, reason)]
        # The newest counts, and one that says why counts more than any that does not.
        events.sort(key=lambda event: (not event.get("message", "").startswith(_SUMMARY), _time(event)))
        return {event["involvedObject"].get("uid", ""): event.get("message", "")[:LONGEST] for event in events}

    async def _events(self, namespace: str, reason: str) -> AsyncIterator[Body]:
        read = 0
        async for page in self._api.list(EVENTS, namespace, fields=f"involvedObject.kind=Pod,reason={reason}"):
            for event in page.items:
                yield event
            read += len(page.items)
            if read >= MOST_EVENTS:
                return


def _waits(pod: PodView) -> bool:
    on_its_way = pod.phase is Phase.PENDING and not pod.deleting and bool(pod.node)
    return on_its_way and pod.reason in ("ContainerCreating", "PodInitializing") and MOUNTED not in pod.conditions


def _time(event: Body) -> str:
    """When it was told of last: RFC 3339 in UTC, in which order of text is order of time."""
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")
