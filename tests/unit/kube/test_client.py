"""What goes over the wire to the API server, and what becomes of an answer that is none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web
from kubernetes.aio.config import ConfigException

from disttrain.kube.api import EVENTS, PODS, Unavailable
from disttrain.kube.client import KubeClient, connect


@contextlib.asynccontextmanager
async def server(
    answer: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    refresh: Callable[[object], None] | None = None,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> AsyncIterator[tuple[KubeClient, list[web.Request]]]:
    """A client of a server that answers so, and what it was asked. refresh: called before each request, for a new token."""
    asked: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request)
        return web.Response(text=answer, status=status, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    try:
        async with connect(connections=2) as client:
            if refresh is not None:
                client.configuration.refresh_api_key_hook = refresh
            yield KubeClient(client, timeout_seconds=5), asked
    finally:
        await runner.cleanup()


async def test_creation_asks_the_server_to_refuse_fields_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server("{}", tmp_path, monkeypatch) as (client, asked):
        await client.create(PODS, "team", {"metadata": {"name": "x"}})
    assert asked[0].query["fieldValidation"] == "Strict"


async def test_list_chooses_by_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server('{"metadata": {"resourceVersion": "5"}, "items": []}', tmp_path, monkeypatch) as (client, asked):
        assert [page.items async for page in client.list(EVENTS, "team", fields="reason=FailedMount")] == [[]]
    assert (asked[0].path, dict(asked[0].query)) == (
        "/api/v1/namespaces/team/events",
        {"limit": "500", "fieldSelector": "reason=FailedMount"},
    )


async def test_answer_that_is_no_json_is_one_that_may_be_better_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server("<html>a proxy</html>", tmp_path, monkeypatch) as (client, _):
        with pytest.raises(Unavailable, match="is not JSON"):
            await client.get(PODS, "team", "x")


async def test_token_that_cannot_be_read_now_may_be_readable_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(_: object) -> None:
        raise ConfigException("Token file exists but empty.")

    async with server("{}", tmp_path, monkeypatch, refresh=unreadable) as (client, asked):
        with pytest.raises(Unavailable, match="Token file"):
            await client.get(PODS, "team", "x")
    assert asked == []


@pytest.mark.parametrize(
    "answer", ["[]", "7", "{}", '{"metadata": [], "items": []}', '{"metadata": {"resourceVersion": ""}, "items": []}']
)
async def test_list_that_is_none_is_one_that_may_be_better_next_time(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(answer, tmp_path, monkeypatch) as (client, _):
        with pytest.raises(Unavailable, match=r"is no (list|object)"):
            [page async for page in client.list(PODS, "team")]


@pytest.mark.parametrize("answer", ["7", '{"details": {"causes": 7}}', '{"details": ["x"]}', "[" * 20_000, "<html>"])
async def test_refusal_whose_text_is_no_status_is_an_error_as_any_other(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(answer, tmp_path, monkeypatch, status=503, headers={"Retry-After": "²"}) as (client, _):
        with pytest.raises(Unavailable) as error:
            await client.get(PODS, "team", "x")
    assert (error.value.status, error.value.retry_after) == (503, None)
