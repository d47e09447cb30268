"""A proxy in front of a real API server that meddles: it refuses writes as a server under load does, and cuts or mutes watches.

Plain HTTP on loopback, and to the server behind it the user that a test names, by default an administrator. What a test tells it to leave
alone it passes on as it is, and it keeps a list of what was allowed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType

from cluster.controlplane import ControlPlane

WRITES = ("POST", "PATCH", "PUT", "DELETE")


class Watches(Enum):
    """What becomes of watches."""

    PASSED = auto()
    CUT = auto()
    """Those that are open are closed, new ones are hung up on."""
    MUTED = auto()
    """They stay open, open again, and report nothing."""


@dataclass
class Write:
    """A write that was asked for."""

    time: float
    method: str
    path: str


class Meddler:
    """The proxy; a context manager."""

    def __init__(self, control_plane: ControlPlane, *, user: str = "") -> None:
        pki = control_plane.folder / "pki"
        self._context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._behind = control_plane.server.removeprefix("https://")
        self._folder = control_plane.folder
        self._lock = Lock()
        self._open: set[socket.socket] = set()
        self._left = 0
        self._retry_after = 0
        self._user = {"Impersonate-User": user} if user else {}
        self.watches = Watches.PASSED
        self.meddled_with = ""
        """A part of the path of the watches that are meddled with."""
        self.allowed: set[tuple[str, str, str]] = set()
        """What was asked for and not refused: (API group, resource with its subresource, verb)."""
        self.refused: list[Write] = []
        self.writes: list[Write] = []
        """Every write that was asked for, refused or not."""

    def __enter__(self) -> Meddler:
        meddler = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):  # a client that goes away is none of our business
                    super().handle_one_request()
                    return
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            def _pass(self) -> None:
                meddler.pass_on(self)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def kubeconfig(self) -> Path:
        """For a client that is to be meddled with."""
        file = self._folder / f"meddled-{self._server.server_port}.kubeconfig"  # there may be several of us
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}],
            "users": [{"name": "anybody", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "anybody"}}],
            "current-context": "test",
        }
        file.write_text(json.dumps(config))
        return file

    def refuse_writes(self, number: int, *, retry_after: int) -> None:
        """The next writes are answered with 429 and not passed on."""
        with self._lock:
            self._left, self._retry_after = number, retry_after

    def cut_watches(self) -> None:
        with self._lock:
            self.watches = Watches.CUT
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def pass_on(self, client: BaseHTTPRequestHandler) -> None:
        body = client.rfile.read(int(client.headers.get("Content-Length") or 0))
        if client.command in WRITES and self._refuses(client):
            return
        watch = "watch=true" in client.path
        if watch and self._meddles(client.path, Watches.CUT):
            client.close_connection = True
            return
        headers = {name: value for name, value in client.headers.items() if name.lower() not in ("host", "connection")}
        headers |= self._user
        server = http.client.HTTPSConnection(self._behind, context=self._context, timeout=60)
        try:
            server.request(client.command, client.path, body or None, headers)
            answer = server.getresponse()
            if answer.status < 400 or answer.status in (404, 409):  # judged after it was allowed
                self.allowed |= right(client.command, client.path)
            client.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    client.send_header(name, value)
            if watch and answer.status == 200:
                client.send_header("Transfer-Encoding", "chunked")
                client.end_headers()
                self._stream(client, answer)
                return
            data = answer.read()
            client.send_header("Content-Length", str(len(data)))
            client.end_headers()
            client.wfile.write(data)
        finally:
            server.close()

    def _stream(self, client: BaseHTTPRequestHandler, answer: http.client.HTTPResponse) -> None:
        client.wfile.flush()
        with self._watching(client.connection):
            while data := answer.read1():
                if not self._meddles(client.path, Watches.MUTED):
                    client.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            client.wfile.write(b"0\r\n\r\n")

    def _meddles(self, path: str, how: Watches) -> bool:
        return self.watches is how and self.meddled_with in path

    @contextlib.contextmanager
    def _watching(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)

    def _refuses(self, client: BaseHTTPRequestHandler) -> bool:
        write = Write(time.monotonic(), client.command, client.path.partition("?")[0])
        with self._lock:
            self.writes.append(write)
            refuses, self._left = self._left > 0, max(0, self._left - 1)
        if refuses:
            self.refused.append(write)
            data = json.dumps(
                {"kind": "Status", "reason": "TooManyRequests", "message": "too many", "code": 429}
            ).encode()
            client.send_response_only(429)
            client.send_header("Retry-After", str(self._retry_after))
            client.send_header("Content-Type", "application/json")
            client.send_header("Content-Length", str(len(data)))
            client.end_headers()
            client.wfile.write(data)
        return refuses


def right(method: str, path: str) -> set[tuple[str, str, str]]:
    """What a request about namespaced objects needs to be allowed; nothing for any other, such as discovery."""
    path, _, query = path.partition("?")
    parts = path.strip("/").split("/")
    group, parts = ("", parts[2:]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[3:])
    if len(parts) < 3 or parts[0] != "namespaces":
        return set()
    resource, name, subresource = parts[2], parts[3:4], parts[4:5]
    verbs = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete", "GET": "get" if name else "list"}
    verb = "watch" if "watch=true" in query else verbs[method]
    return {(group, "/".join((resource, *subresource)), verb)}
