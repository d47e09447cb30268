"""An HTTP server of a folder, for packed data at a URL: it gives ranges of files, and fails as a test asks."""

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server:
    """An HTTP server of a folder, which gives ranges."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.token: str | None = None
        self.ranges = True
        self.failures = 0
        """Requests that it still answers with 503."""
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/pack"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Ends it; a second time does nothing."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = self.root / request.path.lstrip("/")
        self.asked[f"{request.command} {path.name}"] += 1
        code, content, headers = 200, b"", {}
        if self.failures > 0:
            self.failures -= 1
            code = 503
        elif self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            code = 403
        elif not path.is_file():
            code = 404
        else:
            content = path.read_bytes()
            wanted = request.headers.get("Range", "")
            if self.ranges and wanted.startswith("bytes="):
                first, last = wanted.removeprefix("bytes=").split("-")
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, code = content[int(first) : int(last) + 1], 206
        request.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)
