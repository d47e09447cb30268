"""The parts of an operator that know jobs and act on them, put together: from a watch event to the requests that follow from it.

Client, clock and event loop are those of the caller, so that whole operators run on a virtual clock in front of an API server in memory
(tests/simulation/controller). Not here: the watches themselves (kopf, handlers.py), the Lease, the port, the signals (process.py).
"""

import asyncio
import random
from collections.abc import Callable
from datetime import datetime

from disttrain.api import Progress
from disttrain.controller.apply import Executor
from disttrain.controller.cache import Cache, Key
from disttrain.controller.events import EventPoster
from disttrain.controller.expectations import Expectations
from disttrain.controller.intake import Intake
from disttrain.controller.progress import Fetch, Master, ProgressReader
from disttrain.controller.queue import WorkQueue
from disttrain.controller.reconcile import Reconciler
from disttrain.controller.record import JobRecords
from disttrain.controller.resync import Restored, Resync, WatchHealth
from disttrain.controller.settings import Settings
from disttrain.controller.status import StatusWriter
from disttrain.controller.turns import share
from disttrain.controller.volume_failures import VolumeFailures
from disttrain.kube.api import KubeApi


class Parts:
    """Made inside a running event loop. `clock`: the time of day; `restored`: gets why the cache cannot be trusted any more;
    `jitter`: draws from [0, 1)."""

    def __init__(
        self,
        settings: Settings,
        api: KubeApi,
        fetch: Fetch,
        *,
        clock: Callable[[], datetime],
        restored: Callable[[Restored], None],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._number_of_workers = settings.workers
        self.cache = Cache()
        self.queue: WorkQueue[Key] = WorkQueue(
            namespace=lambda key: key.namespace, most_each=share(settings.workers), jitter=jitter
        )
        self.workers: list[asyncio.Task[None]] = []
        self.watch_health = WatchHealth(asyncio.get_running_loop().time)
        self.events = EventPoster(api, clock=clock)
        self.expectations, self.records = Expectations(self.cache), JobRecords()
        self.intake = Intake(self.cache, self.queue, self.expectations, self.records, self.watch_health)
        self.resync = Resync(
            api,
            self.cache,
            self.watch_health,
            namespaces=settings.namespaces,
            changed=self.intake.changed,
            compared=self.intake.compared,
            restored=restored,
            jitter=jitter,
        )
        self.progress = ProgressReader(fetch, self._reported)
        self.volume_failures = VolumeFailures(api, self._volumes_failed)
        self.reconciler = Reconciler(
            api=api,
            cache=self.cache,
            queue=self.queue,
            expectations=self.expectations,
            records=self.records,
            executor=Executor(
                api,
                self.cache,
                self.expectations,
                trainer_image=settings.trainer_image,
                concurrency=settings.requests,
                clock=clock,
            ),
            statuses=StatusWriter(api, self.cache, interval=settings.status_write_seconds),
            events=self.events,
            progress=self.progress,
            volume_failures=self.volume_failures,
            clock=clock,
            restored=restored,
            allows_host_access=settings.allow_host_access,
        )

    def begin_passes(self) -> None:
        self.workers = [
            asyncio.create_task(self.reconciler.run(), name=f"worker {number}")
            for number in range(self._number_of_workers)
        ]

    def cancel_passes(self) -> None:
        """Ends passes in flight where they are, and starts no new ones."""
        self.queue.shut_down()
        for worker in self.workers:
            worker.cancel()

    async def end(self, seconds: float) -> None:
        """Lets passes in flight come to their end for so many seconds, and starts no new ones."""
        self.queue.shut_down()
        if self.workers:
            await asyncio.wait(self.workers, timeout=seconds)
        self.cancel_passes()
        await self.progress.close()
        await self.volume_failures.close()

    def _reported(self, key: Key, master: Master, progress: Progress) -> None:
        self.reconciler.reported(key, master, progress)

    def _volumes_failed(self, key: Key, messages: dict[str, str]) -> None:
        self.reconciler.volumes_failed(key, messages)
