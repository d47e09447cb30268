"""Reads how far the trainings are: the master's /progress, every few seconds, beside the reconciling.

A report goes to a callback; a failed reading goes nowhere, since the plan sees from the age of the last one that the master is silent.
What a pod answers is not trusted: bounded in size and time, no redirect followed, parsed by the model; under network.tls Mutual it is
signed (docs/design/0007). The last report of all does
not come from here but from the master's termination message.

Masters that are silent must not delay the reading of those that answer. A master that answered last time is read in the quick lane, with
a short time-out. One that did not moves to the slow lane, with a longer time-out and longer and longer pauses, until it answers.
"""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

import aiohttp

from disttrain import certificates
from disttrain.api import Progress
from disttrain.controller.cache import Key
from disttrain.controller.settings import ProgressPath
from disttrain.controller.turns import Slots
from disttrain.kube.api import ApiError, KubeApi
from disttrain.kube.client import beginning

log = logging.getLogger(__name__)

CONNECT_SECONDS = 1.0
"""Until a connection to a pod stands. Within a cluster that takes milliseconds; an address that nothing answers at costs all of it."""
QUICK_SECONDS = 1.0
"""For a report in the quick lane. 900 of 1,000 masters that are cut off at once cost the others 900 x 1 s / 256 = 4 s, and that once."""
TIMEOUT_SECONDS = 3.0
"""For a report in the slow lane: a master may be busy."""
MOST_BYTES = 65_536
QUICK_SLOTS = 256
SLOW_SLOTS = 64
AT_ONCE = QUICK_SLOTS + SLOW_SLOTS
LONGEST_PAUSE_SECONDS = 30.0
"""Seconds between two readings of a silent master: half of the time after which the plan takes a master for silent."""


@dataclass(frozen=True, slots=True)
class Master:
    """Where a job's report is found, and how often it is wanted."""

    namespace: str
    pod: str
    uid: str
    ip: str
    port: int
    interval: float
    public_key: str | None = None
    """Of the attempt's certificate: a report that its key has not signed is none. None where network.tls is Disabled."""
    path: str = "progress"


Fetch = Callable[[Master], Awaitable[bytes]]


class Unreadable(Exception):
    """The master gave no report, and said so at once: nothing listens there yet, or it answers something else."""


@contextlib.asynccontextmanager
async def fetcher(path: ProgressPath, api: KubeApi) -> AsyncIterator[Fetch]:
    """How reports are got: straight from the pods, or through the API server."""
    inside = "KUBERNETES_SERVICE_HOST" in os.environ
    if path is ProgressPath.API_SERVER or (path is ProgressPath.AUTO and not inside):

        async def through_api_server(master: Master) -> bytes:
            try:
                return await api.proxy(master.namespace, master.pod, master.port, master.path, most=MOST_BYTES)
            except ApiError as error:
                raise Unreadable(str(error)) from error

        yield through_api_server
        return
    limits = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS, sock_connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(limit=AT_ONCE)
    async with aiohttp.ClientSession(timeout=limits, connector=connector, trust_env=False) as session:

        async def from_pod(master: Master) -> bytes:
            host = f"[{master.ip}]" if ":" in master.ip else master.ip
            try:
                async with session.get(f"http://{host}:{master.port}/{master.path}", allow_redirects=False) as answer:
                    if answer.status != 200:
                        raise Unreadable(f"status {answer.status}")
                    return await beginning(answer.content, MOST_BYTES)
            except TimeoutError:
                raise
            except (aiohttp.ClientError, OSError) as error:
                raise Unreadable(str(error)) from error

        yield from_pod


class Outcome(Enum):
    """What came of a reading."""

    REPORTED = auto()
    REFUSED = auto()
    """No report, but it cost no time: a master that starts does not listen yet."""
    SILENT = auto()
    """No report, and it cost time."""


def pause(interval: float, silences: int) -> float:
    """Seconds until the next reading, after so many silent ones in a row: with an interval of 5 s these are 5, 5, 10, 20, 30, 30 …"""
    return min(interval * 2.0 ** min(max(silences - 1, 0), 16), max(interval, LONGEST_PAUSE_SECONDS))


class ProgressReader:
    """Follows the masters of running jobs, one small task each."""

    def __init__(self, fetch: Fetch, report: Callable[[Key, Master, Progress], None]) -> None:
        self._fetch = fetch
        self._report = report
        self._quick = Slots(QUICK_SLOTS)
        self._slow = Slots(SLOW_SLOTS)
        self._followed: dict[Key, tuple[Master, asyncio.Task[None]]] = {}
        self._silent: set[Key] = set()
        """Jobs whose master gave no report last time."""

    def follow(self, job: Key, master: Master | None) -> None:
        """Reads this master's reports from now on, and no other's of this job; None: reads none."""
        followed = self._followed.get(job)
        if followed and followed[0] == master:
            return
        if followed:
            followed[1].cancel()
            del self._followed[job]
            self._silent.discard(job)
        if master:
            self._followed[job] = (master, asyncio.create_task(self._loop(job, master), name=f"progress of {job}"))

    async def look(self, job: Key) -> None:
        """Reads the report of the job's master now, with a short time-out, unless it was silent last time: the job is about to end, and
        nothing is read after that."""
        if job in self._followed and job not in self._silent:
            master, _ = self._followed[job]
            async with self._quick.of(master.namespace):
                await self.read(job, master, QUICK_SECONDS)

    async def close(self) -> None:
        tasks = [task for _, task in self._followed.values()]
        self._followed.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _loop(self, job: Key, master: Master) -> None:
        silences = 0
        while True:
            lane, seconds = (self._slow, TIMEOUT_SECONDS) if silences else (self._quick, QUICK_SECONDS)
            async with lane.of(master.namespace):
                outcome = await self.read(job, master, seconds)
            silences = silences + 1 if outcome is Outcome.SILENT else 0
            (self._silent.add if silences else self._silent.discard)(job)
            await asyncio.sleep(pause(master.interval, silences))

    async def _ask(self, master: Master) -> Progress:
        if master.public_key is None:
            return Progress.decode(await self._fetch(master))
        nonce = secrets.token_hex(16)
        answer = await self._fetch(replace(master, path=f"{master.path}/{nonce}"))
        return certificates.read_progress(answer, nonce=nonce, public_key=master.public_key)

    async def read(self, job: Key, master: Master, timeout_seconds: float = TIMEOUT_SECONDS) -> Outcome:
        """Reads one report and hands it on."""
        try:
            async with asyncio.timeout(timeout_seconds):
                progress = await self._ask(master)
        except Unreadable as error:
            log.debug("no report from %s of %s: %s", master.pod, job, error)
            return Outcome.REFUSED
        except TimeoutError:
            log.debug("no report from %s of %s in time", master.pod, job)
            return Outcome.SILENT
        except ValueError as error:  # to read on and on what is no report costs time as well
            log.debug("what %s of %s answers is no report: %s", master.pod, job, error)
            return Outcome.SILENT
        self._report(job, master, progress)
        return Outcome.REPORTED
