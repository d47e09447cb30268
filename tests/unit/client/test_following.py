"""A log that is followed ends when that is asked for, whatever comes in the same moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from disttrain.client import logs
from disttrain.kube.api import PODS, Resource

PODS_OF_JOB: dict[str, dict[str, Any]] = {
    f"a-worker-{index}": {
        "metadata": {
            "name": f"a-worker-{index}",
            "uid": f"{index}",
            "labels": {"disttrain.dev/role": "worker", "disttrain.dev/index": f"{index}"},
            "ownerReferences": [{"uid": "a", "controller": True}],
        },
        "spec": {"restartPolicy": "Never"},
        "status": {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"running": {}}}]},
    }
    for index in range(2)
}
JOB: dict[str, Any] = {"metadata": {"name": "a", "uid": "a"}}


class Cluster:
    """Pods, of which the first has a log. Its pieces, and changes, come when the test says so. Lines wait for those of the second pod."""

    namespace = "team"

    def __init__(self, pods: int) -> None:
        self._pods = list(PODS_OF_JOB.values())[:pods]
        self.log_pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self.changes: asyncio.Queue[None] = asyncio.Queue()

    async def pods(self, _: object) -> list[Any]:
        return self._pods

    async def get(self, _: Resource, __: str, name: str) -> Any:
        return PODS_OF_JOB[name]

    async def log(self, _: str, name: str, *__: object, **___: object) -> AsyncIterator[bytes]:
        while piece := await (self.log_pieces if name == "a-worker-0" else asyncio.Queue()).get():
            yield piece

    async def current(self, _: object, resource: Resource, *__: object, **___: object) -> AsyncIterator[Any]:
        while True:
            await (self.changes.get() if resource is PODS else asyncio.Event().wait())
            yield {pod["metadata"]["name"]: pod for pod in self._pods}


@pytest.mark.parametrize("what", ["a line", "a change of a pod"])
def test_a_log_that_is_followed_ends_also_when_something_comes_in_the_same_moment(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio.wait_for of Python 3.11 drops a cancellation in that moment."""

    async def ends(turns: int) -> bool:
        cluster = Cluster(2 if what == "a line" else 1)
        monkeypatch.setattr(logs, "current", cluster.current)

        async def follow() -> None:
            read: Any = cluster
            async with contextlib.aclosing(logs.of_job(read, read, JOB, logs.Wanted(), follow=True)) as lines:
                async for _ in lines:
                    pass

        task = asyncio.create_task(follow())
        cluster.log_pieces.put_nowait(b"2026-11-30T12:00:00.000000001Z first\n")
        if what != "a line":
            cluster.log_pieces.put_nowait(b"")  # the stream is cut off
        await asyncio.sleep(0.02)
        if what == "a line":
            cluster.log_pieces.put_nowait(b"2026-11-30T12:00:00.000000002Z second\n")
        else:
            cluster.changes.put_nowait(None)
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        task.cancel()
        done, late = await asyncio.wait({task}, timeout=2)
        for one in asyncio.all_tasks() - {asyncio.current_task()}:
            one.cancel()
        await asyncio.wait(done | late)
        return bool(done)

    assert all([asyncio.run(ends(turns)) for turns in range(9)])
