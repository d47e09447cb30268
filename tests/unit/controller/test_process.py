"""One operator process from the inside: how its passes end, and what its port says when something is wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from disttrain.controller import metrics
from disttrain.controller.process import MOST_LAG_SECONDS, STALE_RESYNCS, Operator
from disttrain.controller.settings import Settings
from disttrain.kube.api import COSCHEDULING_GROUPS, JOBS
from unit.controller.fake_api import JOB, ApiServer, job
from unit.controller.hand_turned import hand_turned, now

RESYNC_SECONDS = 60


async def unreachable(_: object) -> bytes:
    raise TimeoutError


def operator(server: ApiServer, **settings: Any) -> Operator:
    return Operator(Settings(host="127.0.0.1", port=0, resync_seconds=RESYNC_SECONDS, **settings), server, unreachable)


async def in_the_middle_of_a_pass(seconds: float) -> tuple[ApiServer, Operator]:
    """An operator with a pass in flight whose next request takes so long."""
    server = ApiServer()
    one = operator(server)
    create = server.create

    async def slow(*args: Any) -> Any:
        await asyncio.sleep(seconds)
        return await create(*args)

    server.create = slow  # type: ignore[method-assign]
    one.cache.jobs.put(server.put(JOBS, job()))
    one.begin_passes()
    one.queue.add(JOB)
    await asyncio.sleep(0.1)
    return server, one


@hand_turned
async def test_passes_in_flight_end_at_once_when_the_lease_is_lost() -> None:
    server, one = await in_the_middle_of_a_pass(3)
    began = now()
    one.fail()
    await one.end()
    assert now() - began < 1
    await asyncio.sleep(60)
    assert server.names() == []


@hand_turned
async def test_passes_in_flight_come_to_their_end_when_it_is_asked_to_end() -> None:
    server, one = await in_the_middle_of_a_pass(3)
    await one.end()
    assert len(server.names()) == 3


@hand_turned
async def test_pod_groups_that_are_installed_end_the_process_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    one = operator(ApiServer())
    one.watch_health.complete()
    one.cache.absent = frozenset({COSCHEDULING_GROUPS})
    assert await one.run() == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("podgroups.scheduling.x-k8s.io can be read now; the operator ends")


@hand_turned
async def test_process_ends_with_one_line_when_the_api_server_was_restored(caplog: pytest.LogCaptureFixture) -> None:
    one = operator(ApiServer())
    known = ApiServer()
    for _ in range(50):
        body = known.put(JOBS, job())
    one.cache.jobs.put(body)
    assert await one.run() == 1
    assert await one.run() == 1  # what finds it later, while the process ends, has nothing to add
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("the API server was restored from a backup: its list of disttrainjobs has version")
    assert line.endswith("the operator ends, so that its next process starts from what the API server has now")


def stuck_loop(one: Operator) -> None:
    one.lag.seconds = MOST_LAG_SECONDS + 1


def silent_watch(one: Operator) -> None:
    one.watch_health.complete()
    late = asyncio.get_running_loop().time() + STALE_RESYNCS * RESYNC_SECONDS + 1
    one.watch_health.clock = lambda: late


async def answer(one: Operator, path: str) -> tuple[int, str]:
    async with (
        one.port() as port,
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return response.status, await response.text()


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        pytest.param(stuck_loop, "event loop: 6 s late, at most 5 s", id="stuck loop"),
        pytest.param(silent_watch, "watch of pods: 601 s without news, at most 600 s", id="silent watch"),
    ],
)
async def test_liveness_probe_fails_and_names_what_is_wrong(trouble: Callable[[Operator], None], line: str) -> None:
    one = operator(ApiServer())
    assert await answer(one, "/healthz") == (200, "ok\n")
    trouble(one)
    status, text = await answer(one, "/healthz")
    assert status == 500
    assert line in text.splitlines()


async def test_it_is_not_ready_before_the_first_list_unless_it_waits_for_the_lease() -> None:
    assert await answer(operator(ApiServer()), "/readyz") == (500, "first list: not yet read\n")
    assert await answer(operator(ApiServer(), leader_elect=True), "/readyz") == (200, "ok\n")
    listed = operator(ApiServer())
    listed.watch_health.complete()
    assert await answer(listed, "/readyz") == (200, "ok\n")


async def test_one_that_watches_nothing_yet_tells_no_age_of_its_watches() -> None:
    metrics.WATCH_AGE.clear()
    standby = operator(ApiServer(), leader_elect=True)
    age = 'disttrain_operator_watch_age_seconds{resource="pods"}'
    assert age not in (await answer(standby, "/metrics"))[1]
    standby.watch_health.complete()
    assert age in (await answer(standby, "/metrics"))[1]


async def test_watches_of_both_kinds_of_pod_groups_have_an_age() -> None:
    metrics.WATCH_AGE.clear()
    one = operator(ApiServer())
    one.watch_health.complete()
    text = (await answer(one, "/metrics"))[1]
    for group in ("scheduling.x-k8s.io", "scheduling.volcano.sh"):
        assert f'disttrain_operator_watch_age_seconds{{resource="podgroups.{group}"}}' in text
