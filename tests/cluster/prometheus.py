"""Debian's Prometheus in the node's network, with the configuration that `deploy/monitoring` ships.

Two differences: it is no pod, so its service discovery is told a kubeconfig; and it scrapes each second, because the tests' jobs
are short.
"""

import contextlib
import json
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.node import Node

ROOT = Path(__file__).parents[2]
PORT = 9090


@dataclass(frozen=True)
class Prometheus:
    """One that runs; `query` is an instant query."""

    node: Node

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that answer, [] for none."""
        url = f"http://127.0.0.1:{PORT}/api/v1/query?query={urllib.parse.quote(expression)}"
        answer = self.node.run("curl", "-sS", "--max-time", "10", url)
        data = json.loads(answer.stdout or "{}")
        if data.get("status") != "success":
            raise LookupError(f"{expression}: {data or answer.stderr}")
        result: list[dict[str, Any]] = data["data"]["result"]
        return result

    def labels(self, expression: str) -> list[dict[str, str]]:
        """The labels of the series that answer."""
        return [series["metric"] for series in self.query(expression)]


@contextlib.contextmanager
def prometheus(node: Node) -> Iterator[Prometheus]:
    """Runs it for a block."""
    folder = node.folder / "prometheus"
    folder.mkdir()
    shutil.copy(ROOT / "deploy/monitoring/prometheus/rules.yml", folder)
    config = yaml.safe_load((ROOT / "deploy/monitoring/prometheus/prometheus.yml").read_text())
    config["global"].update(scrape_interval="1s", scrape_timeout="1s")
    for job in config["scrape_configs"]:
        for discovery in job.get("kubernetes_sd_configs", []):
            discovery["kubeconfig_file"] = str(node.kubeconfig)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (node.folder / "log" / "prometheus.log").open("w") as log:
        process = node.popen(
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{PORT}",
            stdout=log,
            stderr=log,
        )
        try:
            ready = ["curl", "-sf", "--max-time", "5", f"http://127.0.0.1:{PORT}/-/ready"]
            node.wait_for("Prometheus to be ready", lambda: node.run(*ready).returncode == 0, 30)
            yield Prometheus(node)
        finally:
            process.terminate()
            process.wait(timeout=30)
