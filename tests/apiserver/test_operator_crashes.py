"""The operator dies at every write of a job's life, once before the API server has it and once before its answer arrives.

After Sieve (OSDI '22): a reference run counts the writes; then the same life is lived once for each of them with a death there, and has to
come to the same end. The parts of the operator run here in one process without kopf, so that a death is an exception at an exact
place and a restart costs nothing; what they know they learn by listing, as a new process does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from apiserver.operating import JOBS as JOBS_PATH
from apiserver.operating import PODS as PODS_PATH
from apiserver.operating import Rest, job, pod_names
from apiserver.playing import Kubelet
from cluster.controlplane import ControlPlane
from disttrain.controller.apply import Executor
from disttrain.controller.cache import Cache, Key
from disttrain.controller.events import EventPoster
from disttrain.controller.expectations import Expectations
from disttrain.controller.intake import Intake
from disttrain.controller.progress import ProgressReader
from disttrain.controller.queue import WorkQueue
from disttrain.controller.reconcile import Reconciler
from disttrain.controller.record import JobRecords
from disttrain.controller.resync import Resync, WatchHealth
from disttrain.controller.status import StatusWriter
from disttrain.controller.volume_failures import VolumeFailures
from disttrain.kube.api import Body, Resource
from disttrain.kube.client import KubeClient, connect


class Death(BaseException):
    """The process is gone: nothing in it may catch this."""


class Mortal:
    """A KubeApi whose process dies at the n-th write."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self.writes = 0
        self.die_at: int | None = None
        self.after = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return self._mortal(method) if name in ("create", "patch_status", "delete") else method

    def _mortal(self, method: Callable[..., Awaitable[Body]]) -> Callable[..., Awaitable[Body]]:
        async def write(resource: Resource, *args: Any, **more: Any) -> Body:
            self.writes += 1
            last = self.writes == self.die_at
            if last and not self.after:
                raise Death
            answer = await method(resource, *args, **more)
            if last:
                raise Death
            return answer

        return write


class Clock:
    """Time that passes when the test says so: the pauses of a restart need not be waited for."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


class Process:
    """One life of the operator."""

    def __init__(self, api: Any, clock: Clock, namespace: str) -> None:
        cache, records = Cache(), JobRecords()
        expectations = Expectations(cache)
        self.queue: WorkQueue[Key] = WorkQueue()
        watch_health = WatchHealth(asyncio.get_running_loop().time)
        intake = Intake(cache, self.queue, expectations, records, watch_health)
        self._resync = Resync(
            api, cache, watch_health, namespaces=[namespace], changed=intake.changed, compared=intake.compared
        )

        async def unreachable(_: object) -> bytes:
            raise TimeoutError

        self.progress = ProgressReader(unreachable, lambda *_: None)
        self.volume_failures = VolumeFailures(api, lambda *_: None)
        self._reconciler = Reconciler(
            api=api,
            cache=cache,
            queue=self.queue,
            expectations=expectations,
            records=records,
            executor=Executor(api, cache, expectations, trainer_image="x", concurrency=1, clock=clock),
            statuses=StatusWriter(api, cache, interval=0),
            events=EventPoster(api),
            progress=self.progress,
            volume_failures=self.volume_failures,
            clock=clock,
            restored=lambda _: None,
        )

    async def look(self, key: Key) -> None:
        await self._resync.once()
        await self._reconciler.reconcile(key)


async def live(control_plane: ControlPlane, api: Mortal, name: str) -> tuple[Any, int]:
    """A job's life in a namespace of its own, with a failure in it, to its end. What it came to, and how often the operator died."""
    rest = Rest(control_plane, name)
    rest.create("api/v1/namespaces", {"metadata": {"name": name}})
    kubelet, clock, key = Kubelet(rest), Clock(), Key(name, name)
    process, deaths = Process(api, clock, name), 0

    async def until_idle() -> None:
        """Looks again and again, in a new life after a death, until there is nothing left to do."""
        nonlocal process, deaths
        quiet = 0
        while quiet < 2:
            before = api.writes
            try:
                await process.look(key)
            except Death:
                deaths += 1
                await process.progress.close()
                await process.volume_failures.close()
                process = Process(api, clock, name)
            clock.now += timedelta(seconds=5)
            quiet = quiet + 1 if api.writes == before else 0

    rest.create(JOBS_PATH, job(name))
    await until_idle()
    for pod in pod_names(name):
        kubelet.run(pod)
    await until_idle()
    kubelet.fail(f"{name}-worker-0", code=137)
    await until_idle()
    clock.now += timedelta(seconds=30)  # the pause before a restart
    await until_idle()
    kubelet.run(f"{name}-worker-0")
    await until_idle()
    for pod in sorted(pod_names(name), reverse=True):
        kubelet.succeed(pod)
    await until_idle()
    await process.progress.close()
    await process.volume_failures.close()
    process.queue.shut_down()
    status = rest.get(JOBS_PATH, name)["status"]
    pods = {
        pod["metadata"]["name"].removeprefix(name) for pod in rest.list(PODS_PATH, f"disttrain.dev/job-name={name}")
    }
    end = {
        "state": status["state"],
        "attempt": status["attempt"],
        "restarts": (
            status["restarts"]["total"],
            status["restarts"]["countedTowardsLimit"],
            status["restarts"]["accounted"],
        ),
        "pods": pods,
    }
    return end, deaths


@pytest.mark.timeout(300)
async def test_every_death_comes_to_the_same_end(control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    async with connect(connections=4) as client:
        # Not a time-out's test: all lives share a loop, which stands still while one of them plays the kubelet.
        kube = KubeClient(client, timeout_seconds=120)
        reference = Mortal(kube)
        wanted, deaths = await live(control_plane, reference, "lives-reference")
        assert deaths == 0
        assert (wanted["state"], wanted["restarts"]) == ("Complete", (1, 1, []))

        async def die(number: int, *, after: bool) -> None:
            mortal = Mortal(kube)
            mortal.die_at, mortal.after = number, after
            name = f"lives-{number}-{'after' if after else 'before'}"
            end, deaths = await live(control_plane, mortal, name)
            assert deaths == 1, name
            assert end == wanted, name
            assert mortal.writes <= reference.writes + 3, name

        async with asyncio.TaskGroup() as lives:
            for number in range(1, reference.writes + 1):
                for after in (False, True):
                    lives.create_task(die(number, after=after))
