"""What kopf calls: one handler a kind. A handler takes the news into the cache and queues the job; it never acts.

Only `on.event`: kopf's other handlers are edge-triggered and write annotations and finalizers on the objects. No lost event matters, since
`resync` finds what no event reported.
"""

from collections.abc import Awaitable, Callable, Collection
from typing import Any

import kopf

from disttrain.controller.intake import Intake
from disttrain.controller.resync import SELECTORS
from disttrain.kube.api import Resource


def register(
    intake: Intake, end: Callable[[], Awaitable[None]], *, absent: Collection[Resource] = ()
) -> kopf.OperatorRegistry:
    """The handlers of an operator. They hand watch events to `intake`; kopf awaits `end` before it ends. absent: kinds that the API server
    does not have."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> Any:
        return kopf.login_via_client(**kwargs)

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await end()

    for resource in SELECTORS.keys() - set(absent):
        _watch(resource, intake, registry)
    return registry


def _watch(resource: Resource, intake: Intake, registry: kopf.OperatorRegistry) -> None:
    @kopf.on.event(resource.group, resource.version, resource.plural, id=resource.full_name, registry=registry)
    async def take(event: kopf.RawEvent, **_: Any) -> None:
        intake.take(resource, event)


class _NoLastState(kopf.DiffBaseStorage):
    """kopf compares an object with what it last handled; our handlers know no last, and the copies were half the cost of an event."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    """Nor do they have a progress that would have to be kept on the object."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf as we use it: watches, and nothing else."""
    settings.scanning.disabled = True  # else it lists and watches CRDs and namespaces, which a namespaced Role may not
    settings.peering.standalone = True  # the Lease is our lock
    settings.posting.enabled = False  # our Events are our own
    for resource, selector in SELECTORS.items():
        if selector:
            settings.watching.label_selectors[resource.plural] = selector
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = 600  # stalled watches: nolar/kopf#585, #698
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    settings.networking.request_timeout = 30
    settings.networking.enforce_retry_after = True
    settings.queueing.idle_timeout = 1.0  # a task and a queue for each object with a recent event
    settings.persistence.diffbase_storage = _NoLastState()
    settings.persistence.progress_storage = _NoProgress()
