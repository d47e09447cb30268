"""The operator's own port answers a probe, independent of the other connections to it."""

import asyncio
import os
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from disttrain.controller import probes


@pytest.fixture
async def port() -> AsyncIterator[int]:
    checks = {"always": lambda: None}
    async with probes.serve(
        "127.0.0.1", 0, live=checks, ready=checks, registry=CollectorRegistry(), before_scrape=lambda: None
    ) as found:
        yield found


async def test_idle_connections_keep_no_probe_away_and_take_a_bounded_number_of_files(port: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/healthz") as answer:
        assert answer.status == 200
    oldest, _ = idle[0]
    async with asyncio.timeout(5):
        assert await oldest.read() == b"", "it is closed"
    assert len(os.listdir("/proc/self/fd")) - before - len(idle) <= probes.MOST_CLIENTS + 10
    for _, writer in idle:
        writer.close()


async def test_a_connection_has_its_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "REQUEST_SECONDS", 0.5)
    answers, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\n")
    async with asyncio.timeout(10):
        assert await answers.read() == b""
    writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("HEAD", "/metrics", 200), ("GET", "/nothing", 404), ("POST", "/healthz", 405)]
)
async def test_the_port_answers_as_http_has_it(port: int, method: str, path: str, status: int) -> None:
    async with aiohttp.ClientSession() as session, session.request(method, f"http://127.0.0.1:{port}{path}") as answer:
        assert answer.status == status
