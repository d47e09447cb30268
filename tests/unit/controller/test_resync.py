"""When the cache is compared with the API server, and what that brings."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from disttrain.controller import resync
from disttrain.controller.cache import Cache, Entry, Key
from disttrain.controller.metrics import DRIFT
from disttrain.controller.resync import Restored, Resync, WatchHealth
from disttrain.kube.api import COSCHEDULING_GROUPS, PODS, SERVICES, ApiError, NotFound, Page, Refused, Resource

NEVER = 3600.0


class Server:
    """An API server that has few things or nothing, or does not answer."""

    def __init__(self) -> None:
        self.lists = 0
        self.failures = 0
        self.version = 100
        self.services: list[dict[str, Any]] = []
        self.absent: dict[Resource, ApiError] = {}
        self.meanwhile: Callable[[], object] = lambda: None
        """What happens while the list of Services is on its way."""

    async def list(self, resource: Resource, namespace: str | None, *, selector: str) -> AsyncIterator[Page]:
        self.lists += resource is PODS
        if self.failures:
            self.failures -= 1
            raise ApiError(503, "ServiceUnavailable", "no")
        if resource in self.absent:
            raise self.absent[resource]
        if resource is SERVICES:
            self.meanwhile()
        yield Page(self.services if resource is SERVICES else [], self.version)


class Parts:
    def __init__(self) -> None:
        self.server, self.cache, self.gone = Server(), Cache(), asyncio.Queue[str]()
        self.restored: list[Restored] = []
        self.compared: list[float] = []
        self.watch_health = WatchHealth(asyncio.get_running_loop().time)
        self.resync = Resync(
            self.server,  # type: ignore[arg-type]
            self.cache,
            self.watch_health,
            namespaces=[],
            changed=self.changed,
            compared=self.compared.append,
            restored=self.restored.append,
        )

    def changed(self, resource: Resource, entry: Entry[Any], gone: bool) -> None:
        if gone:
            self.gone.put_nowait(entry.key.name)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.resync.run(NEVER))
        await asyncio.sleep(0)
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def service(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": "5"}}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "SOON_SECONDS", 0.0)


async def test_what_vanished_while_a_watch_was_broken_is_found_when_the_watch_lists_again() -> None:
    parts = Parts()
    parts.cache.stores[SERVICES].put(service("digits"))
    async with parts.running():
        assert parts.server.lists == 0
        parts.watch_health.broken.set()
        assert await asyncio.wait_for(parts.gone.get(), 5) == "digits"


async def test_comparison_that_fails_is_made_again_soon() -> None:
    parts = Parts()
    parts.server.failures = 3
    parts.cache.stores[SERVICES].put(service("digits"))
    async with parts.running():
        parts.watch_health.broken.set()
        assert await asyncio.wait_for(parts.gone.get(), 5) == "digits"
    assert parts.server.lists == 4


async def test_object_that_is_newer_than_the_list_has_not_vanished() -> None:
    parts = Parts()
    newer = service("digits")
    newer["metadata"]["resourceVersion"] = "101"
    parts.server.meanwhile = lambda: parts.cache.stores[SERVICES].put(newer)
    await parts.resync.once()
    assert parts.gone.empty()
    assert len(parts.cache.stores[SERVICES]) == 1
    assert parts.restored == []


async def test_list_that_is_older_than_what_is_known_tells_of_an_api_server_restored_from_a_backup() -> None:
    parts = Parts()
    await parts.resync.once()
    known = service("digits")
    known["metadata"]["resourceVersion"] = "200"
    parts.cache.stores[SERVICES].put(known)
    parts.server.services = [service("digits"), service("letters")]
    await parts.resync.once()
    assert [str(error) for error in parts.restored] == [
        "the API server was restored from a backup: "
        "its list of services has version 100, and version 200 was seen before"
    ]
    assert [entry.key.name for entry in parts.cache.stores[SERVICES]] == ["digits"], (
        "nothing is mixed into an old cache"
    )


async def test_an_object_that_is_there_again_as_it_was_before_its_deletion_tells_so_too() -> None:
    parts = Parts()
    store = parts.cache.stores[SERVICES]
    for version, restored in (("50", 1), ("51", 0)):
        parts.restored.clear()
        body = service("digits")
        body["metadata"]["resourceVersion"] = "50"
        store.put(body)
        store.drop(Key("default", "digits"), body["metadata"]["uid"])
        parts.server.version = 300
        parts.server.services = [service("digits")]
        parts.server.services[0]["metadata"]["resourceVersion"] = version
        await parts.resync.once()
        assert len(parts.restored) == restored, "one that was changed since may have lost its label for a while"


async def test_a_deletion_during_a_list_is_none_before_it() -> None:
    parts = Parts()
    store = parts.cache.stores[SERVICES]
    body = service("digits")
    store.put(body)
    before = store.known
    store.drop(Key("default", "digits"), body["metadata"]["uid"])
    assert not store.contradicts(body, 300, before)
    assert store.contradicts(body, 300, store.known)


async def test_older_state_of_an_object_in_a_newer_list_tells_so_too() -> None:
    parts = Parts()
    known = service("digits")
    known["metadata"]["resourceVersion"] = "200"
    parts.cache.stores[SERVICES].put(known)
    parts.server.version = 300
    parts.server.services = [service("digits")]
    await parts.resync.once()
    assert len(parts.restored) == 1


async def test_older_state_in_a_list_that_was_overtaken_by_the_watch_is_nothing_special() -> None:
    parts = Parts()
    changed = service("digits")
    changed["metadata"]["resourceVersion"] = "200"
    parts.cache.stores[SERVICES].put(service("digits"))
    parts.server.services = [service("digits")]
    parts.server.meanwhile = lambda: parts.cache.stores[SERVICES].put(changed)
    await parts.resync.once()
    assert parts.restored == []


@pytest.mark.parametrize("error", [NotFound(404, "NotFound", "no"), Refused(403, "Forbidden", "no")])
async def test_kind_that_a_cluster_need_not_have_may_be_absent(error: ApiError) -> None:
    parts = Parts()
    parts.server.absent = {COSCHEDULING_GROUPS: error}
    await parts.resync.once()
    assert (parts.watch_health.synced, parts.cache.absent) == (True, {COSCHEDULING_GROUPS})
    await parts.resync.once()
    assert parts.restored == []


async def test_kind_that_every_cluster_has_may_not_be_absent() -> None:
    parts = Parts()
    parts.server.absent = {SERVICES: NotFound(404, "NotFound", "no")}
    with pytest.raises(NotFound):
        await parts.resync.once()
    assert not parts.watch_health.synced


@pytest.mark.parametrize(
    ("added", "words"),
    [(True, "can be read now"), (False, "can no longer be read (its CRD or the right to it is gone)")],
)
async def test_kind_that_two_comparisons_in_a_row_find_added_or_removed_ends_the_process(
    added: bool, words: str
) -> None:
    parts = Parts()
    absent: dict[Resource, ApiError] = {COSCHEDULING_GROUPS: NotFound(404, "NotFound", "no")}
    parts.server.absent = absent if added else {}
    await parts.resync.once()
    for answer in ({}, absent, {}) if added else (absent, {}, absent):
        parts.server.absent = answer
        await parts.resync.once()
        assert parts.restored == [], "one answer may be wrong"
    await parts.resync.once()
    assert [str(error) for error in parts.restored] == [f"podgroups.scheduling.x-k8s.io {words}"]


async def test_pod_groups_that_a_watch_missed_are_counted_by_the_full_name_of_their_kind() -> None:
    parts = Parts()
    await parts.resync.once()
    parts.cache.stores[COSCHEDULING_GROUPS].put(service("digits"))
    await parts.resync.once()
    labels = [sample.labels["resource"] for metric in DRIFT.collect() for sample in metric.samples]
    assert ("podgroups.scheduling.x-k8s.io" in labels, "podgroups" in labels) == (True, False)
