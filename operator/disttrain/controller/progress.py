"""Reads how far the trainings are: the master's /progress, every few seconds, beside the reconciling.

A report goes to a callback; a failed reading goes nowhere, since the plan sees from the age of the last one that the master is silent.
What a pod answers is not trusted: bounded in size and time, no redirect followed, parsed by the model. The last report of all does
not come from here but from the master's termination message.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError

from disttrain.api import Progress
from disttrain.controller.api import ApiError, KubeApi, beginning
from disttrain.controller.cache import Key
from disttrain.controller.settings import ProgressPath

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3.0
MOST_BYTES = 65_536
AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Master:
    """Where a job's report is found, and how often it is wanted."""

    namespace: str
    pod: str
    uid: str
    ip: str
    port: int
    interval: float


Fetch = Callable[[Master], Awaitable[bytes]]


class Unreadable(Exception):
    """The master gave no report."""


@contextlib.asynccontextmanager
async def fetcher(path: ProgressPath, api: KubeApi) -> AsyncIterator[Fetch]:
    """How reports are got: straight from the pods, or through the API server."""
    inside = "KUBERNETES_SERVICE_HOST" in os.environ
    if path is ProgressPath.API_SERVER or (path is ProgressPath.AUTO and not inside):

        async def through_api_server(master: Master) -> bytes:
            try:
                return await api.proxy(master.namespace, master.pod, master.port, "progress", most=MOST_BYTES)
            except ApiError as error:
                raise Unreadable(str(error)) from error

        yield through_api_server
        return
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)) as session:

        async def from_pod(master: Master) -> bytes:
            host = f"[{master.ip}]" if ":" in master.ip else master.ip
            try:
                async with session.get(f"http://{host}:{master.port}/progress", allow_redirects=False) as answer:
                    if answer.status != 200:
                        raise Unreadable(f"status {answer.status}")
                    return await beginning(answer.content, MOST_BYTES)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise Unreadable(str(error)) from error

        yield from_pod


class ProgressReader:
    """Follows the masters of running jobs, one small task each."""

    def __init__(self, fetch: Fetch, report: Callable[[Key, Master, Progress], None]) -> None:
        self._fetch = fetch
        self._report = report
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._followed: dict[Key, tuple[Master, asyncio.Task[None]]] = {}

    def follow(self, job: Key, master: Master | None) -> None:
        """Reads this master's reports from now on, and no other's of this job; None: nobody's."""
        followed = self._followed.get(job)
        if followed and followed[0] == master:
            return
        if followed:
            followed[1].cancel()
            del self._followed[job]
        if master:
            self._followed[job] = (master, asyncio.create_task(self._loop(job, master), name=f"progress of {job}"))

    async def close(self) -> None:
        tasks = [task for _, task in self._followed.values()]
        self._followed.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _loop(self, job: Key, master: Master) -> None:
        while True:
            async with self._slots:
                await self._read(job, master)
            await asyncio.sleep(master.interval)

    async def _read(self, job: Key, master: Master) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                progress = Progress.model_validate_json(await self._fetch(master))
        except (Unreadable, TimeoutError, ValidationError) as error:
            log.debug("no report from %s of %s: %s", master.pod, job, error)
        else:
            self._report(job, master, progress)
