"""One operator at a time, by a Lease: its holder acts, the others wait. Off unless --leader-elect is given.

client-go's rules: a Lease that was not renewed for its duration, by the clock of its watcher, is free; the holder gives it up before
that. A holder that loses it ends its process rather than resume: what it knows may be old. One that ends in order lets it go at once.
Our own, since kubernetes.aio 37's LeaseLock cannot create a Lease (it passes pretty=True where a string is wanted).
"""

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from disttrain.controller.metrics import LEADER
from disttrain.controller.settings import Settings
from disttrain.kube.api import LEASES, ApiError, Body, Conflict, KubeApi, NotFound

log = logging.getLogger(__name__)

LEASE_SECONDS = 15
RENEW_SECONDS = 10
RETRY_SECONDS = 2
RELEASE_SECONDS = 1
"""For the API server to answer at the end; if it does not, the Lease runs out by itself."""


class Lease:
    """A Lease that this process would like to hold."""

    def __init__(self, api: KubeApi, namespace: str, name: str, identity: str) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self.identity = identity
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = 0.0

    async def acquire(self) -> None:
        """Comes back when it is held."""
        while True:
            if await self.take():
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def keep(self) -> None:
        """Comes back when it could not be renewed in time, also while the API server keeps it waiting for an answer."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout_at(renewed + RENEW_SECONDS):
                    await asyncio.sleep(RETRY_SECONDS)
                    asked = loop.time()
                    if await self.take():
                        renewed = asked  # others count from when it was written, which was not before

    async def release(self) -> None:
        """Releases it, so that no other process has to wait for its end. If that fails, it expires by itself."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(RELEASE_SECONDS):
                lease = await self._api.get(LEASES, self._namespace, self._name)
                if _spec(lease).get("holderIdentity") == self.identity:
                    await self._patch(lease, {"holderIdentity": ""})

    async def take(self) -> bool:
        """Takes or renews it; False when another holds it, or the API server does not answer."""
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = {"holderIdentity": self.identity, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": stamp}
        try:
            lease = await self._api.get(LEASES, self._namespace, self._name)
            spec = _spec(lease)
            holder = spec.get("holderIdentity") or ""
            if holder != self.identity:
                if not self._expired(holder, spec.get("renewTime") or ""):
                    return False
                mine |= {"acquireTime": stamp, "leaseTransitions": (spec.get("leaseTransitions") or 0) + 1}
            await self._patch(lease, mine)
        except NotFound:
            return await self._create(mine | {"acquireTime": stamp})
        except Conflict:  # another was faster
            return False
        except ApiError as error:
            log.warning("cannot take the Lease now: %s", error)
            return False
        return True

    def _expired(self, holder: str, renewed: str) -> bool:
        now = asyncio.get_running_loop().time()
        if (holder, renewed) != self._seen:
            self._seen, self._seen_at = (holder, renewed), now
        return not holder or now - self._seen_at >= LEASE_SECONDS

    async def _create(self, spec: Body) -> bool:
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}, "spec": spec}
        try:
            await self._api.create(LEASES, self._namespace, body)
        except ApiError as error:
            log.warning("cannot create the Lease now: %s", error)
            return False
        return True

    async def _patch(self, lease: Body, spec: Body) -> None:
        version = {"resourceVersion": lease["metadata"]["resourceVersion"]}
        await self._api.patch(LEASES, self._namespace, self._name, {"metadata": version, "spec": spec})


def _spec(lease: Body) -> Body:
    """Its spec; one that was made by hand or by another tool may have none."""
    return lease.get("spec") or {}


@contextlib.asynccontextmanager
async def leadership(settings: Settings, api: KubeApi, *, lost: Callable[[], None]) -> AsyncIterator[None]:
    """Waits for the Lease, holds it for the block, and calls `lost` when it could not be renewed."""
    if not settings.leader_elect:
        LEADER.set(1)
        yield
        return
    lease = Lease(api, settings.lease_namespace, settings.lease_name, f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}")
    log.info("waiting for the Lease %s/%s as %s", settings.lease_namespace, settings.lease_name, lease.identity)
    await lease.acquire()
    LEADER.set(1)

    async def keep() -> None:
        try:
            await lease.keep()
        except Exception:  # whatever it is, this process does not renew the Lease any more, and another one takes it
            log.exception("keeping the Lease failed")
        log.error("lost the Lease %s/%s, ending", settings.lease_namespace, settings.lease_name)
        LEADER.set(0)
        lost()

    task = asyncio.create_task(keep(), name="lease")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        LEADER.set(0)
        await lease.release()
