"""The two ways to a master's report, against a real HTTP server: the address, and what happens when there is no good answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from disttrain.api import Progress
from disttrain.controller.cache import Key
from disttrain.controller.progress import MOST_BYTES, Fetch, Master, Outcome, ProgressReader, Unreadable, fetcher
from disttrain.controller.settings import ProgressPath
from disttrain.kube.client import KubeClient, connect

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
REPORT = {"attempt": 1, "step": 41, "totalSteps": 90, "loss": 0.5, "worldSize": 2}
THROUGH, STRAIGHT = ProgressPath.API_SERVER, ProgressPath.POD
BOTH = pytest.mark.parametrize("way", [THROUGH, STRAIGHT], ids=["through the API server", "straight"])


@contextlib.asynccontextmanager
async def fetching(
    way: ProgressPath, answer: Handler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Fetch, Master, list[str]]]:
    """A way to a server that answers so, as API server and as pod; and the paths that it was asked for."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return await answer(request)

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    master = Master(
        namespace="mine",
        pod="digits-master-0",
        uid="u",
        ip="127.0.0.1",
        port=port if way is STRAIGHT else 9400,
        interval=60,
    )
    try:
        async with connect(connections=2) as client, fetcher(way, KubeClient(client, timeout_seconds=5)) as fetch:
            yield fetch, master, asked
    finally:
        await runner.cleanup()


async def good(_: web.Request) -> web.StreamResponse:
    return web.json_response(REPORT)


@pytest.mark.parametrize(
    ("way", "path"),
    [
        pytest.param(THROUGH, "/api/v1/namespaces/mine/pods/digits-master-0:9400/proxy/progress", id="proxy"),
        pytest.param(STRAIGHT, "/progress", id="pod"),
    ],
)
async def test_report_is_read_where_it_is(
    way: ProgressPath, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fetching(way, good, tmp_path, monkeypatch) as (fetch, master, asked):
        reports: list[tuple[Key, Progress]] = []
        reader = ProgressReader(fetch, lambda key, _, progress: reports.append((key, progress)))
        await reader.read(Key("mine", "digits"), master)
    assert asked == [path]
    assert [(key.name, progress.step) for key, progress in reports] == [("digits", 41)]


async def test_outside_a_cluster_it_goes_through_the_api_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with fetching(ProgressPath.AUTO, good, tmp_path, monkeypatch) as (fetch, master, asked):
        await fetch(master)
    assert asked[0].endswith("/proxy/progress")


async def unavailable(_: web.Request) -> web.StreamResponse:
    return web.json_response({"kind": "Status", "reason": "ServiceUnavailable", "message": "no pod there"}, status=503)


async def elsewhere(request: web.Request) -> web.StreamResponse:
    if request.path == "/elsewhere":
        return await good(request)
    raise web.HTTPFound("/elsewhere")


@BOTH
@pytest.mark.parametrize("answer", [unavailable, elsewhere], ids=["error", "redirect"])
async def test_anything_but_a_report_is_no_report(
    way: ProgressPath, answer: Handler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fetching(way, answer, tmp_path, monkeypatch) as (fetch, master, asked):
        with pytest.raises(Unreadable):
            await fetch(master)
    assert len(asked) == 1


@BOTH
async def test_flood_is_not_read_to_its_end(way: ProgressPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def flood(_: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * (MOST_BYTES * 50))

    async with fetching(way, flood, tmp_path, monkeypatch) as (fetch, master, _):
        assert len(await fetch(master)) == MOST_BYTES


@BOTH
async def test_report_that_comes_in_several_reads_is_whole(
    way: ProgressPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drop_by_drop(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for byte in json.dumps(REPORT).encode():
            await answer.write(bytes([byte]))
        return answer

    async with fetching(way, drop_by_drop, tmp_path, monkeypatch) as (fetch, master, _):
        assert json.loads(await fetch(master)) == REPORT


@BOTH
async def test_compressed_flood_is_not_unpacked_to_its_end(
    way: ProgressPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = gzip.compress(b"0" * 200_000_000, 9)

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    async with fetching(way, answer, tmp_path, monkeypatch) as (fetch, master, _):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(await fetch(master)) == MOST_BYTES
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"


@BOTH
async def test_answer_that_never_ends_is_given_up_in_time(
    way: ProgressPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await answer.write(b" ")
                await asyncio.sleep(0.01)
        return answer

    async with fetching(way, endless, tmp_path, monkeypatch) as (fetch, master, _):
        reader = ProgressReader(fetch, lambda *_: None)
        assert await reader.read(Key("mine", "digits"), master, timeout_seconds=0.3) is Outcome.SILENT


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 60_000, id="nested"),
        pytest.param('{"attempt": 1, "step": "many"}', id="wrong type"),
        pytest.param("[]", id="no object"),
        pytest.param('{"attempt": 1, "step": 1e400}', id="number without a bound"),
        pytest.param("\x00\xff", id="no text"),
    ],
)
async def test_what_is_no_report_harms_nothing(text: str) -> None:
    async def fetch(_: Master) -> bytes:
        return text.encode("latin-1")

    reports: list[Progress] = []
    reader = ProgressReader(fetch, lambda _, __, progress: reports.append(progress))
    master = Master(namespace="mine", pod="m", uid="u", ip="", port=1, interval=5)
    assert await reader.read(Key("mine", "digits"), master) is Outcome.SILENT
    assert reports == []


async def test_a_master_is_looked_at_once_more_before_the_end_unless_it_is_silent() -> None:
    asked: list[str] = []

    async def fetch(master: Master) -> bytes:
        asked.append(master.pod)
        return b'{"attempt": 1, "step": 9}' if master.pod == "reports" else b"no report"

    reports: list[int] = []
    reader = ProgressReader(fetch, lambda _, __, progress: reports.append(progress.step))
    for pod in ("reports", "silent"):
        reader.follow(Key("mine", pod), Master(namespace="mine", pod=pod, uid=pod, ip="", port=1, interval=100))
    await asyncio.sleep(0.01)
    assert sorted(asked) == ["reports", "silent"]
    for job in ("reports", "silent", "another"):
        await reader.look(Key("mine", job))
    assert asked[2:] == ["reports"]
    assert reports == [9, 9]
    await reader.close()
