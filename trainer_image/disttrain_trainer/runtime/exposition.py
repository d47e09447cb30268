"""The port that serves a process's metrics, and the master's progress.

Requests are small and answered at once. How many are served together, and for how long, is bounded: any process that reaches the port may
connect.
"""

import contextlib
import errno
import hmac
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import Newcomers, listen

log = logs.get_logger(__name__)

MOST_CLIENTS = 32
"""Requests that are served at one time."""
REQUEST_SECONDS = 10.0
"""From a connection to the end of its answer. Prometheus gives up sooner."""
MOST_POSTED = 64 << 10
"""Bytes of the body of a request."""
_RETRY_SECONDS = 0.1
"""Seconds before the next try when no connection can be accepted, as when there are too many open files."""


@dataclass(frozen=True, slots=True)
class Inbox:
    """What may be posted at a path, by who has the bearer token."""

    path: str
    token: str
    take: Callable[[bytes], None]
    """Called by any thread with the body. Raises ValueError for one that it does not understand."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, handler: type[BaseHTTPRequestHandler]) -> None:
        # Not bound here: HTTPServer asks DNS for its own name then, which can take seconds.
        super().__init__(listener.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self._slots = threading.Semaphore(MOST_CLIENTS)
        self._clients: Newcomers[socket.socket] = Newcomers(MOST_CLIENTS, _shut)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(_RETRY_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        free = self._slots.acquire(blocking=False)
        while not free:
            self._clients.close_oldest()  # its thread notices, and gives the place back
            free = self._slots.acquire(timeout=_RETRY_SECONDS)
        self._clients.add(request, time.monotonic())
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def shutdown_request(self, request: Any) -> None:
        self._clients.discard(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self._clients.close_older(time.monotonic() - REQUEST_SECONDS)

    def handle_error(self, request: object, client_address: object) -> None:
        # Prometheus gave up: nothing for a user to read.
        log.debug("a scrape was not answered", exc_info=True)  # noqa: LOG014 - called while the exception is handled


def serve(
    metrics: Collector,
    *,
    host: str,
    port: int,
    progress: Callable[[str], str | None] | None = None,
    history: Callable[[], bytes | None] | None = None,
    inbox: Inbox | None = None,
) -> None:
    """Serves /metrics, and /progress where there is one, in a thread. A port that is taken is said once, and nothing else.

    progress: called with what follows "/progress/", "" for nothing; its None is "not found".
    history: what /history answers. inbox: takes what is posted.
    """
    registry = CollectorRegistry()
    registry.register(metrics)

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(CONTENT_TYPE_LATEST, generate_latest(registry))
            elif (report := self._report(path)) is not None:
                self._answer("application/json", report.encode())
            elif path == "/history" and history is not None and (lines := history()) is not None:
                self._answer("application/jsonl", lines)
            else:
                self.send_error(404)

        def _report(self, path: str) -> str | None:
            _, name, *more = path.split("/")
            return progress("/".join(more)) if name == "progress" and progress is not None else None

        do_HEAD = do_GET

        def _refuse(self) -> None:
            self.send_response(405)
            self.send_header("Allow", "GET, HEAD")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            if inbox is None or self.path.partition("?")[0] != inbox.path:
                self._refuse()
                return
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(errors="replace"), f"Bearer {inbox.token}".encode()):
                self.send_error(401)
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MOST_POSTED:
                self.send_error(413)
                return
            try:
                inbox.take(self.rfile.read(int(length)))
            except ValueError as error:
                self.send_error(400, explain=str(error))
                return
            self._answer("application/json", b"{}")

        do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

        def _answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = _Server(listen(host or None, port), Handler)
    except OSError as error:
        remedy = "set observability.metricsPort to a free one" if error.errno == errno.EADDRINUSE else ""
        log.warning(
            "metrics cannot be served on port %d: %s; the training goes on without them. %s",
            port,
            error.strerror,
            remedy,
        )
        return
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _shut(connection: socket.socket) -> None:
    """Ends a connection, so that the thread that serves it closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
