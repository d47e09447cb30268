"""One operator process: puts the parts together, runs them until a signal, and ends in order.

The order of the start: the port (so that probes answer), the Lease, one full list, the workers, kopf's watches. A signal before the watches
cancels whatever is waited for; after that the end begins with kopf: no new passes, those in flight come to their end, what Events wait,
the connections.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import kopf
import uvloop

from disttrain import __version__
from disttrain.controller import handlers, metrics, probes
from disttrain.controller.leader import leadership
from disttrain.controller.parts import Parts
from disttrain.controller.progress import AT_ONCE, Fetch, fetcher
from disttrain.controller.resync import SELECTORS, KindsChanged, Restored
from disttrain.controller.settings import Settings
from disttrain.kube.api import KubeApi
from disttrain.kube.client import KubeClient, connect

log = logging.getLogger(__name__)

MOST_LAG_SECONDS = 5.0
MOST_WAIT_SECONDS = 300.0
STALE_RESYNCS = 10
"""Missed comparisons after which the operator is taken for stuck."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(settings: Settings) -> int:
    """Runs the operator until a signal. Returns the exit code."""
    return uvloop.run(_operate(settings))


async def _operate(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_report)
    task = asyncio.current_task()
    assert task, "inside a coroutine that runs as a task"
    _on_signal(task.cancel)
    try:
        # Masters that are read through the API server share the connections; silent ones must not take those of the passes.
        async with connect(connections=settings.requests + settings.workers + AT_ONCE) as client:
            api = KubeClient(client, timeout_seconds=settings.request_timeout_seconds, count=metrics.count_request)
            async with fetcher(settings.progress, api) as fetch:
                return await Operator(settings, api, fetch).run()
    except asyncio.CancelledError:
        log.info("received a signal before the start was complete; ending")
        return 0


def _on_signal(action: Callable[[], object]) -> None:
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, action)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What no task handled. kopf leaves its watches to the end of the loop, and one in the middle of a read then complains
    of being closed (1.45.2, infinite_watch): there is nothing to do about it."""
    if "asyncgen" in context:
        log.debug("%s", context["message"])
    else:
        loop.default_exception_handler(context)


class Operator:
    """All parts of one operator process."""

    def __init__(self, settings: Settings, api: KubeApi, fetch: Fetch) -> None:
        self._settings = settings
        self._api = api
        self._stop = asyncio.Event()
        self._exit_code = 0
        self._leading = not settings.leader_elect
        self.lag = probes.LoopLag()
        self._parts = Parts(settings, api, fetch, clock=_now, restored=self._is_restored)
        self.cache, self.queue = self._parts.cache, self._parts.queue
        self.watch_health = self._parts.watch_health

    async def run(self) -> int:
        """Serves until a signal, or until a part of it ends that must not: then 1."""
        with metrics.live(self._states):
            async with self.port(), leadership(self._settings, self._api, lost=self.fail):
                self._leading = True
                await self._parts.resync.first()
                if self._stop.is_set():
                    return self._exit_code  # the Lease was lost meanwhile
                log.info(
                    "disttrain-operator %s serves %s: %d jobs, %d pods",
                    __version__,
                    ", ".join(self._settings.namespaces) or "all namespaces",
                    len(self.cache.jobs),
                    len(self.cache.pods),
                )
                await self._serve()
        return self._exit_code

    def begin_passes(self) -> None:
        self._parts.begin_passes()

    async def _serve(self) -> None:
        self.begin_passes()
        self.watch_health.broken.set()  # no watch reports what vanishes before it starts
        resync = self._parts.resync.run(self._settings.resync_seconds)
        async with _background(self.fail, resync=resync, events=self._parts.events.run(), lag=self.lag.run()):
            try:
                await self._watch()
            finally:
                await self.end()

    def fail(self) -> None:
        """Half an operator is worse than none: ends the process, for the kubelet to start a whole one.

        Passes in flight are ended too: without the Lease another operator acts soon, and before those would have come to their end.
        """
        self._exit_code = 1
        self._parts.cancel_passes()
        self._stop.set()

    def _is_restored(self, error: Restored) -> None:
        if self._stop.is_set():
            return  # a pass or a comparison in flight found it too
        level = logging.WARNING if isinstance(error, KindsChanged) else logging.CRITICAL
        log.log(level, "%s; the operator ends, so that its next process starts from what the API server has now", error)
        self.fail()

    async def end(self) -> None:
        """Lets passes in flight come to their end, and starts no new ones."""
        self._stop.set()  # a task of kopf's waits for it, and it may be that kopf ended by itself
        await self._parts.end(self._settings.shutdown_seconds)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._parts.events.drain(), timeout=2)

    async def _watch(self) -> None:
        kopf_settings = kopf.OperatorSettings()
        handlers.configure(kopf_settings)
        others = asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=handlers.register(self._parts.intake, self.end, absent=self.cache.absent),
            settings=kopf_settings,
            standalone=True,
            clusterwide=not self._settings.namespaces,
            namespaces=self._settings.namespaces,
            stop_flag=self._stop,
        )
        # In the place of kopf's own, of which a second signal makes a traceback.
        _on_signal(self._stop.set)
        await kopf.run_tasks(tasks, ignored=others)

    @contextlib.asynccontextmanager
    async def port(self) -> AsyncIterator[int]:
        """Probes and metrics for a block; gives the port."""
        live = {
            "event loop": lambda: _above(self.lag.seconds, MOST_LAG_SECONDS, "late"),
            "queue": lambda: _above(self.queue.oldest(), MOST_WAIT_SECONDS, "waiting"),
        }
        most = STALE_RESYNCS * self._settings.resync_seconds
        for resource in SELECTORS:
            live[f"watch of {resource.full_name}"] = lambda resource=resource: (  # type: ignore[misc]
                _above(self.watch_health.age(resource), most, "without news") if self.watch_health.synced else None
            )
        # One that waits for the Lease is ready to take over.
        ready = {"first list": lambda: "not yet read" if self._leading and not self.watch_health.synced else None}
        async with probes.serve(
            self._settings.host,
            self._settings.port,
            live=live,
            ready=ready,
            registry=metrics.REGISTRY,
            before_scrape=self._measure,
        ) as port:
            log.info("/healthz, /readyz and /metrics on port %d", port)
            yield port

    def _measure(self) -> None:
        metrics.QUEUE_DEPTH.set(len(self.queue))
        if not self.watch_health.synced:
            return  # nothing is watched yet, and by one that waits for the Lease not for days
        for resource in SELECTORS:
            metrics.WATCH_AGE.labels(metrics.watched(resource)).set(self.watch_health.age(resource))

    def _states(self) -> list[str]:
        return [str(job.value.status.get("state", "Pending")) for job in self.cache.jobs if job.value.ours]


@contextlib.asynccontextmanager
async def _background(fail: Callable[[], None], **work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs endless tasks beside a block; `fail` is called when one ends all the same."""
    tasks = [asyncio.create_task(one, name=name) for name, one in work.items()]

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.critical("%s ended", task.get_name(), exc_info=task.exception())
            fail()

    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _above(value: float, most: float, what: str) -> str | None:
    return f"{value:.0f} s {what}, at most {most:.0f} s" if value > most else None


def _now() -> datetime:
    return datetime.now(UTC)
