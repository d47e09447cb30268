"""One operator at a time, by a Lease: whoever holds it acts, the others wait. Off unless --leader-elect is given.

A holder that loses its Lease ends its process rather than resume: what it knows may be old. Restarted, it waits like any other.
"""

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Callable

from disttrain.controller.api import connect
from disttrain.controller.metrics import LEADER
from disttrain.controller.settings import Settings

log = logging.getLogger(__name__)

LEASE_SECONDS = 15
RENEW_SECONDS = 10
RETRY_SECONDS = 2


@contextlib.asynccontextmanager
async def leadership(settings: Settings, *, lost: Callable[[], None]) -> AsyncIterator[None]:
    """Waits for the Lease, holds it for the block, and calls `lost` when it could not be renewed."""
    if not settings.leader_elect:
        LEADER.set(1)
        yield
        return
    # Imported only here: the typed models of the Lease cost memory that a single replica need not spend.
    from kubernetes.aio.leaderelection.electionconfig import Config
    from kubernetes.aio.leaderelection.leaderelection import LeaderElection
    from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

    won = asyncio.Event()

    async def started() -> None:
        won.set()

    async def stopped() -> None:
        log.error("lost the Lease %s/%s, ending", settings.lease_namespace, settings.lease_name)
        LEADER.set(0)
        lost()

    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    async with connect(connections=2) as client:
        lock = LeaseLock(settings.lease_name, settings.lease_namespace, identity, client)
        election = LeaderElection(Config(lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, started, stopped))
        task = asyncio.create_task(election.run(), name="leader election")
        try:
            log.info("waiting for the Lease %s/%s as %s", settings.lease_namespace, settings.lease_name, identity)
            await won.wait()
            LEADER.set(1)
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
