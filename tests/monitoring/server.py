"""A real Prometheus on loopback, for tests: over recorded data, or scraping. And promtool. Both are built by cluster/programs.py."""

import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.programs import program, require

Series = dict[str, Any]


def promtool(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Its output, which is part of a failure's message."""
    require("monitoring")
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        pytest.fail(f"promtool {arguments[0]} {arguments[1]}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class QueryError(Exception):
    """Prometheus refused the query."""


@dataclass
class Prometheus:
    url: str

    def _get(self, path: str, **parameters: str | int) -> Any:
        body = urllib.parse.urlencode(parameters).encode()
        request = urllib.request.Request(f"{self.url}/api/v1/{path}", data=body if parameters else None)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode()
            raise QueryError(f"HTTP {error.code}: {text}") from None

    def query(self, expr: str, *, time: int) -> list[Series]:
        return self._get("query", query=expr, time=time)["result"]

    def query_range(self, expr: str, *, start: int, end: int, step: int = 15) -> list[Series]:
        return self._get("query_range", query=expr, start=start, end=end, step=step)["result"]

    def label_values(self, label: str, matcher: str, *, start: int, end: int) -> list[str]:
        words = urllib.parse.urlencode({"match[]": matcher, "start": start, "end": end})
        return self._get(f"label/{label}/values?{words}")

    def targets(self) -> list[dict[str, Any]]:
        return self._get("targets?state=active")["activeTargets"]


@contextmanager
def prometheus(folder: Path, config: Path, *flags: str) -> Iterator[Prometheus]:
    """A Prometheus with its data in the folder, ready to answer; it ends with the block."""
    require("monitoring")
    log = folder / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--storage.tsdb.retention.time=100y",
                "--web.listen-address=127.0.0.1:0",
                *flags,
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Prometheus(_wait_ready(process, log))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Its URL: the kernel chooses the port, and the log names it."""
    deadline = time.monotonic() + 30
    while True:
        if process.poll() is not None:
            pytest.fail(f"prometheus ended with {process.returncode}:\n{log.read_text()}")
        if listening := re.search(r'msg="Listening on".* address=(127\.0\.0\.1:\d+)', log.read_text()):
            try:
                with urllib.request.urlopen(f"http://{listening[1]}/-/ready", timeout=2):
                    return f"http://{listening[1]}"
            except OSError:
                pass
        if time.monotonic() > deadline:
            pytest.fail(f"prometheus was not ready after 30 s:\n{log.read_text()}")
        time.sleep(0.1)


@contextmanager
def replay(folder: Path, openmetrics: str) -> Iterator[Prometheus]:
    """A Prometheus that holds a recording and scrapes nothing."""
    source, config = folder / "recording.txt", folder / "empty.yml"
    source.write_text(openmetrics)
    config.write_text("scrape_configs: []\n")
    promtool("tsdb", "create-blocks-from", "openmetrics", source, folder / "data")
    # Blocks hold no staleness markers: a short look-back lets the series of a lost pod end as they do in a scraped one.
    with prometheus(folder, config, "--query.lookback-delta=15s") as server:
        yield server
