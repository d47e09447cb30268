"""The log endpoint of a kubelet, to be played: a test says what containers print and when, by a clock of its own, and cuts connections."""

from __future__ import annotations

import contextlib
import random
import ssl
import subprocess
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Thread
from typing import Any
from urllib.parse import parse_qs, urlparse

from apiserver.operating import Rest

SECOND = 1_000_000_000


class KubeletLogs:
    """A node whose containers print what `print` says. A context manager."""

    def __init__(self, rest: Rest, folder: Path, node: str) -> None:
        self._rest, self._folder, self.node = rest, folder, node
        self._condition = Condition()
        self._logs: dict[str, list[tuple[int, str]]] = {}
        self._ended: set[str] = set()
        self._cuts = 0
        self._open: dict[str, int] = {}
        self.now = int(datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()) * SECOND
        """Nanoseconds; the time of the next line."""

    def __enter__(self) -> KubeletLogs:
        certificate, key = self._folder / "kubelet.crt", self._folder / "kubelet.key"
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        options = ["-subj", "/CN=kubelet", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*made, *options], check=True, capture_output=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, daemon=True).start()
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node}}
        self._rest.create("api/v1/nodes", node)
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_address[1]}},
        }
        self._rest.merge(f"api/v1/nodes/{self.node}/status", {"status": status})
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._ended.update(self._logs)
            self._condition.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._rest.delete("api/v1/nodes", self.node)

    def begin(self, pod: str) -> None:
        """A pod of that name has a container, whose log is empty."""
        with self._condition:
            self._logs[pod] = []
            self._ended.discard(pod)

    def print(self, pod: str, text: str, *, after: int = 1) -> None:
        """The container prints a line, so many nanoseconds after the last line of any."""
        with self._condition:
            self.now += after
            self._logs[pod].append((self.now, text))
            self._condition.notify_all()

    def end(self, pod: str) -> None:
        """The container has ended: who follows its log reads it to its end."""
        with self._condition:
            self._ended.add(pod)
            self._condition.notify_all()

    def cut(self) -> None:
        """Every connection is lost, in the middle of what it sends."""
        with self._condition:
            self._cuts += 1
            self._open.clear()
            self._condition.notify_all()

    def followers(self, pod: str) -> int:
        """How many follow the log of a pod now."""
        return self._open.get(pod, 0)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        logs = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urlparse(self.path)
                _, kind, _, pod, _ = url.path.split("/")
                asked = {name: values[0] for name, values in parse_qs(url.query).items()}
                if kind != "containerLogs" or asked.get("timestamps") != "true" or pod not in logs._logs:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with contextlib.suppress(OSError):
                    logs._send(self, pod, asked)
                self.close_connection = True

            def log_message(self, *_: Any) -> None: ...

        return Handler

    def _send(self, handler: BaseHTTPRequestHandler, pod: str, asked: dict[str, str]) -> None:
        log, cuts = self._logs[pod], self._cuts
        since = datetime.fromisoformat(asked["sinceTime"]).timestamp() * SECOND if "sinceTime" in asked else 0
        at = max(0, len(log) - int(asked["tailLines"])) if "tailLines" in asked else 0
        with self._condition:
            self._open[pod] = self._open.get(pod, 0) + ("follow" in asked)
        try:
            while True:
                with self._condition:
                    if at >= len(log) and "follow" in asked and pod not in self._ended and cuts == self._cuts:
                        self._condition.wait(1)
                    lines, at = log[at:], len(log)
                    over = "follow" not in asked or pod in self._ended
                    is_cut = cuts != self._cuts
                data = b"".join(_line(time, text) for time, text in lines if time >= since)
                if is_cut:
                    handler.wfile.write(b"%x\r\n" % (len(data) or 9) + data[: random.randrange(len(data) + 1)])
                    return
                if data:
                    handler.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
                if over:
                    handler.wfile.write(b"0\r\n\r\n")
                    return
        finally:
            with self._condition:
                if cuts == self._cuts:
                    self._open[pod] -= "follow" in asked


def _line(time: int, text: str) -> bytes:
    second, rest = divmod(time, SECOND)
    return f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z {text}\n".encode()
