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
from disttrain.kube.api import JOBS
from unit.controller.fake_api import JOB, ApiServer, job
from unit.controller.hand_turned import hand_turned, now


async def nobody(_: object) -> bytes:
    raise TimeoutError


def operator(server: ApiServer, **settings: Any) -> Operator:
    return Operator(Settings(host="127.0.0.1", port=0, **settings), server, nobody)


async def in_the_middle_of_a_pass(seconds: float) -> tuple[ApiServer, Operator]:
    """An operator with a pass in flight whose next request takes so long."""
    server = ApiServer()
    one = operator(server)
    create = server.create

    async def slow(*args: Any) -> Any:
        await asyncio.sleep(seconds)
        return await create(*args)

    server.create = slow  # type: ignore[method-assign]
    one._cache.jobs.put(server.put(JOBS, job()))
    one._workers = [asyncio.create_task(one._reconciler.run())]
    one._queue.add(JOB)
    await asyncio.sleep(0.1)
    return server, one


@hand_turned
async def test_passes_in_flight_end_at_once_when_the_lease_is_lost() -> None:
    server, one = await in_the_middle_of_a_pass(3)
    began = now()
    one._fail()
    await one._end()
    assert now() - began < 1
    await asyncio.sleep(60)
    assert server.names() == []


@hand_turned
async def test_passes_in_flight_come_to_their_end_when_it_is_asked_to_end() -> None:
    server, one = await in_the_middle_of_a_pass(3)
    await one._end()
    assert len(server.names()) == 3


@hand_turned
async def test_process_ends_with_one_line_when_the_api_server_was_restored(caplog: pytest.LogCaptureFixture) -> None:
    one = operator(ApiServer())
    known = ApiServer()
    for _ in range(50):
        body = known.put(JOBS, job())
    one._cache.jobs.put(body)
    server = one._api
    assert isinstance(server, ApiServer)
    await one._resync.once()
    await one._resync.once()  # whoever finds it later, while the process ends, has nothing to add
    assert one._stop.is_set()
    assert one._exit_code == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("the API server was restored from a backup: its list of disttrainjobs has version")
    assert line.endswith("the operator ends, so that its next process starts from what the API server has now")


def stuck_loop(one: Operator) -> None:
    one._lag.seconds = MOST_LAG_SECONDS + 1


def silent_watch(one: Operator) -> None:
    one._watch_health.complete()
    late = asyncio.get_running_loop().time() + STALE_RESYNCS * one._settings.resync_seconds + 1
    one._watch_health._clock = lambda: late


async def answer(one: Operator, path: str, caplog: pytest.LogCaptureFixture) -> tuple[int, str]:
    with caplog.at_level(logging.INFO, "disttrain"):
        async with one._port(), aiohttp.ClientSession() as session:
            port = caplog.records[-1].args
            assert port
            async with session.get(f"http://127.0.0.1:{port[0]}{path}") as response:  # type: ignore[index]
                return response.status, await response.text()


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        pytest.param(stuck_loop, "event loop: 6 s late, at most 5 s", id="stuck loop"),
        pytest.param(silent_watch, "watch of pods: 601 s without news, at most 600 s", id="silent watch"),
    ],
)
async def test_liveness_probe_fails_and_names_what_is_wrong(
    trouble: Callable[[Operator], None], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = operator(ApiServer())
    assert await answer(one, "/healthz", caplog) == (200, "ok\n")
    trouble(one)
    status, text = await answer(one, "/healthz", caplog)
    assert status == 500
    assert line in text.splitlines()


async def test_it_is_not_ready_before_the_first_list_unless_it_waits_for_the_lease(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert await answer(operator(ApiServer()), "/readyz", caplog) == (500, "first list: not yet read\n")
    assert await answer(operator(ApiServer(), leader_elect=True), "/readyz", caplog) == (200, "ok\n")
    listed = operator(ApiServer())
    listed._watch_health.complete()
    assert await answer(listed, "/readyz", caplog) == (200, "ok\n")


async def test_one_that_watches_nothing_yet_tells_no_age_of_its_watches() -> None:
    def told() -> float | None:
        return metrics.REGISTRY.get_sample_value("disttrain_operator_watch_age_seconds", {"resource": "pods"})

    metrics.WATCH_AGE.clear()
    standby = operator(ApiServer(), leader_elect=True)
    standby._measure()
    assert told() is None
    standby._watch_health.complete()
    standby._measure()
    assert told() is not None
