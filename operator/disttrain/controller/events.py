"""Events about jobs: what `kubectl describe` shows. Posted in the background, best effort; the same again counts up the first one.

An Event is news, not state: when the API server does not take it, it is dropped.
"""

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime

from disttrain.api.names import API_VERSION, FIELD_MANAGER, KIND
from disttrain.controller.cache import Key
from disttrain.controller.turns import Turns, share
from disttrain.kube.api import EVENTS, ApiError, Body, KubeApi, NotFound
from disttrain.plan.model import Event

log = logging.getLogger(__name__)

WAITING = 1000
"""Events that may wait to be posted; more are dropped rather than kept in memory."""
WAITING_EACH = share(WAITING)
"""Of these the most about jobs of one namespace: one that makes a flood of them loses its own, and not those of the others."""
REMEMBERED = 4000
"""Newest different events whose repetition counts up instead of making another object."""


class EventPoster:
    """Takes Events at once and posts them when there is time."""

    def __init__(self, api: KubeApi, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._api = api
        self._clock = clock
        self._waiting: Turns[tuple[Key, str, Event, datetime]] = Turns()
        self._arrived = asyncio.Event()
        self._posted: OrderedDict[tuple[str, str, str], tuple[str, int]] = OrderedDict()

    def post(self, job: Key, uid: str, event: Event) -> None:
        if len(self._waiting) >= WAITING or self._waiting.length(job.namespace) >= WAITING_EACH:
            log.debug("too many Events are waiting; dropped one about %s: %s", job, event.message)
            return
        self._waiting.append(job.namespace, (job, uid, event, self._clock()))
        self._arrived.set()

    async def run(self) -> None:
        """Posts until cancelled."""
        while True:
            await self.post_next()

    async def post_next(self) -> None:
        while (turn := self._waiting.pop()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        job, uid, event, time = turn[1]
        try:
            await self._post(job, uid, event, time)
        except ApiError as error:
            log.debug("cannot post an Event about %s: %s", job, error)

    async def drain(self) -> None:
        """Posts what waits; for the end."""
        while self._waiting:
            await self.post_next()

    async def _post(self, job: Key, uid: str, event: Event, time: datetime) -> None:
        same = (uid, event.reason, event.message)
        known = self._posted.get(same)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ")
        if known:
            name, count = known[0], known[1] + 1
            try:
                await self._api.patch(EVENTS, job.namespace, name, {"count": count, "lastTimestamp": stamp})
            except NotFound:  # events live for an hour
                del self._posted[same]
            else:
                self._posted[same] = (name, count)
                return
        name = f"{job.name}.{uuid.uuid4().hex[:16]}"
        await self._api.create(EVENTS, job.namespace, _body(job, uid, event, name, stamp))
        self._posted[same] = (name, 1)
        if len(self._posted) > REMEMBERED:
            self._posted.popitem(last=False)


def _body(job: Key, uid: str, event: Event, name: str, stamp: str) -> Body:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": job.namespace,
            "name": job.name,
            "uid": uid,
        },
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message[:1024],
        "count": 1,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "reportingInstance": FIELD_MANAGER,
    }
