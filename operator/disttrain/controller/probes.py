"""The operator's own port: /healthz, /readyz and /metrics.

/healthz asserts progress, not that a socket answers: a stalled watch or a blocked loop has to end in a restart by the kubelet
(nolar/kopf#1276, dask/dask-kubernetes#620). Each check is a named function; the answer lists those that fail.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

MOST_CLIENTS = 64
"""Connections at one time. The oldest is closed when one more comes: a probe or a scrape speaks at once."""
REQUEST_SECONDS = 10.0
"""From a connection to its end; a kubelet and a Prometheus connect again."""


class NoPort(Exception):
    """The address cannot be listened on."""


Check = Callable[[], str | None]
"""What is wrong, None when nothing is."""


class LoopLag:
    """How late the event loop is, measured once a second."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 1.0
            await asyncio.sleep(1.0)
            self.seconds = max(0.0, loop.time() - due)


@contextlib.asynccontextmanager
async def serve(
    host: str,
    port: int,
    *,
    live: Mapping[str, Check],
    ready: Mapping[str, Check],
    registry: CollectorRegistry,
    before_scrape: Callable[[], None],
) -> AsyncIterator[int]:
    """Serves for a block; gives the port."""

    async def metrics(_: web.Request) -> web.Response:
        before_scrape()
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", _probe(live))
    app.router.add_get("/readyz", _probe(ready))
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, keepalive_timeout=1)
    await runner.setup()
    try:
        clients = _Clients(runner)
        try:
            server = await asyncio.get_running_loop().create_server(clients.connect, host, port)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise NoPort(
                f"cannot listen on {host}:{port}: {why}; choose another with --port or --host, 0 for any free port"
            ) from error
        sweeping = asyncio.create_task(clients.sweep())
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            sweeping.cancel()
            server.close()
    finally:
        await runner.cleanup()


class _Clients:
    """Bounds who connects: any client can reach the port, and the operator needs file descriptors for the API server."""

    def __init__(self, runner: web.AppRunner) -> None:
        assert runner.server is not None, "it was set up"
        self._server = runner.server
        self._since: dict[web.RequestHandler, float] = {}

    def connect(self) -> web.RequestHandler:
        """What aiohttp does with the next connection."""
        handler = self._server()
        self._since[handler] = asyncio.get_running_loop().time()
        if len(self._since) > MOST_CLIENTS:
            connected = (
                one for one in self._since if one.transport is not None
            )  # a new one has its transport a moment later
            if (oldest := next(connected, None)) is not None:
                self._end(oldest)
        return handler

    async def sweep(self) -> None:
        """Ends connections that have had their time, and forgets those that are over."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1.0)
            for handler, since in list(self._since.items()):
                age = loop.time() - since
                if age > REQUEST_SECONDS or (handler.transport is None and age > 1.0):
                    self._end(handler)

    def _end(self, handler: web.RequestHandler) -> None:
        del self._since[handler]
        if handler.transport is not None:
            handler.transport.abort()


def _probe(checks: Mapping[str, Check]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        wrong = [f"{name}: {problem}" for name, check in checks.items() if (problem := check())]
        return web.Response(status=500 if wrong else 200, text="\n".join(wrong or ["ok"]) + "\n")

    return answer
