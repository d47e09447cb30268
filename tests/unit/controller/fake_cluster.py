"""The operator's parts and its workers in front of an API server in memory, without kopf and without a process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from disttrain.controller.apply import Executor
from disttrain.controller.cache import Cache, Key
from disttrain.controller.events import EventPoster
from disttrain.controller.expectations import Expectations
from disttrain.controller.intake import Intake
from disttrain.controller.progress import Fetch, ProgressReader
from disttrain.controller.queue import WorkQueue
from disttrain.controller.reconcile import Reconciler
from disttrain.controller.record import JobRecords
from disttrain.controller.resync import Restored, WatchHealth
from disttrain.controller.status import StatusWriter
from disttrain.controller.volume_failures import VolumeFailures
from disttrain.kube.api import JOBS, Body
from unit.controller.fake_api import PODS_OF_JOB, ApiServer, clock, job
from unit.controller.hand_turned import now


async def silence(_: object) -> bytes:
    raise TimeoutError


class Operator:
    """The operator's parts and its workers."""

    def __init__(
        self,
        server: ApiServer,
        *,
        status_interval: float = 2.0,
        workers: int = 1,
        trainer_image: str = "example.org/trainer:0",
        fetch: Fetch = silence,
    ) -> None:
        self._workers = workers
        self.restored: list[Restored] = []
        self.cache = Cache()
        self.queue: WorkQueue[Key] = WorkQueue(jitter=lambda: 0.5)
        self.expectations = Expectations(self.cache)
        self.records = JobRecords()
        self.intake = Intake(self.cache, self.queue, self.expectations, self.records, WatchHealth(now))
        self.server = server
        self.progress = ProgressReader(fetch, lambda *_: None)
        self.volume_failures = VolumeFailures(server, lambda key, found: self.reconciler.volumes_failed(key, found))
        self.events = EventPoster(server)
        self.executor = Executor(
            server, self.cache, self.expectations, trainer_image=trainer_image, concurrency=8, clock=clock
        )
        self.reconciler = Reconciler(
            api=server,
            cache=self.cache,
            queue=self.queue,
            expectations=self.expectations,
            records=self.records,
            executor=self.executor,
            statuses=StatusWriter(server, self.cache, interval=status_interval),
            events=self.events,
            progress=self.progress,
            volume_failures=self.volume_failures,
            clock=clock,
            restored=self.restored.append,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.server.tell = self.intake.take  # type: ignore[assignment]
        workers = [asyncio.create_task(self.reconciler.run()) for _ in range(self._workers)]
        try:
            yield
        finally:
            self.queue.shut_down()
            await asyncio.gather(*workers)
            await self.progress.close()
            await self.volume_failures.close()


async def eventually(check: Callable[[], Any], *, seconds: float = 30.0) -> float:
    """The seconds until the check holds, of a clock that only jumps when everything else has been done."""
    began = now()
    while not check():
        assert now() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.01)
    return now() - began


@contextlib.asynccontextmanager
async def operated(
    body: Body | None = None, *, started: bool = True, server: ApiServer | None = None, **options: Any
) -> AsyncIterator[tuple[ApiServer, Operator]]:
    """A job under the operator's care; `started`: with all its pods made."""
    server = server or ApiServer()
    operator = Operator(server, **options)
    async with operator.running():
        if started:
            server.put(JOBS, body or job())
            await eventually(lambda: server.names() == PODS_OF_JOB and server.status.get("startTime"))
        yield server, operator
