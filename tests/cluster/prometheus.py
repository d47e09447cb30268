"""Prometheus as `deploy/monitoring` runs it: in the cluster, with the token of its account, the rights of its role and the shipped file.

It is no pod, for want of its image, and has what a pod would have: the node's network, the API server's address in its environment and
the account's token where every pod has it. One thing differs: it scrapes each second, because the tests' jobs are short.
"""

import contextlib
import json
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.apiserver import SERVICE_IP
from cluster.node import Node
from cluster.processes import wait_for
from cluster.programs import program

MONITORING = Path(__file__).parents[2] / "deploy/monitoring"
NAMESPACE = "disttrain-monitoring"
PORT = 9090

# The machine's /run is its own, and /var/run leads there.
_ACCOUNT = """
folder=/var/run/secrets/kubernetes.io/serviceaccount
mkdir -p "$folder"
cp "$1" "$folder/ca.crt"
printf %s "$2" > "$folder/token"
printf %s "$3" > "$folder/namespace"
"""


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
    _write_config(folder)
    node.kubectl("apply", "-f", str(MONITORING / "namespace.yaml"))
    node.kubectl("apply", "-n", NAMESPACE, "-f", str(MONITORING / "prometheus/rbac.yaml"))
    token = node.kubectl("create", "token", "prometheus", "-n", NAMESPACE, "--duration=24h").strip()
    node.machine.shell(_ACCOUNT, str(node.layout.authority.ca), token, NAMESPACE)
    started = node.machine.program(
        "prometheus",
        str(program("prometheus")),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{PORT}",
    )
    server = replace(started, env={"KUBERNETES_SERVICE_HOST": SERVICE_IP, "KUBERNETES_SERVICE_PORT": "443"}).start()
    try:
        ready = ["curl", "-sf", "--max-time", "5", f"http://127.0.0.1:{PORT}/-/ready"]
        wait_for("Prometheus to be ready", lambda: node.run(*ready).returncode == 0, 30, programs=[server])
        yield Prometheus(node)
    finally:
        server.stop(seconds=30)


def _write_config(folder: Path) -> None:
    shutil.copy(MONITORING / "prometheus/rules.yml", folder)
    shipped = (MONITORING / "prometheus/prometheus.yml").read_text()
    quicker = shipped.replace("scrape_interval: 5s", "scrape_interval: 1s").replace(
        "scrape_timeout: 4s", "scrape_timeout: 1s"
    )
    assert quicker.count(": 1s") == 2, "the intervals are not those that are replaced here"
    (folder / "prometheus.yml").write_text(quicker)
