"""Debian's Prometheus in the node's network, with the scrape and relabel rules that `deploy/monitoring` ships.

Debian builds it without Kubernetes' service discovery. So a thread looks at the pods each second and writes them to a file
(file_sd) with the labels that discovery of role `pod` would give; the rules then see what they see in a cluster. It also
scrapes each second, because the tests' jobs are short.
"""

import contextlib
import json
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.node import Node

ROOT = Path(__file__).parents[2]
PORT = 9090
_WORD = str.maketrans("./-", "___")


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
    discoveries: list[tuple[Path, str, Any]] = []
    for job in config["scrape_configs"]:
        if "kubernetes_sd_configs" in job:
            own = folder / f"{job['job_name']}.json"
            own.write_text("[]")
            [discovery] = job.pop("kubernetes_sd_configs")
            [selector] = discovery["selectors"]
            job["file_sd_configs"] = [{"files": [str(own)], "refresh_interval": "1s"}]
            discoveries.append((own, selector["label"], discovery.get("namespaces")))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    ended = threading.Event()
    discoverer = threading.Thread(target=_discover, args=(node, discoveries, ended), daemon=True)
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
            discoverer.start()
            ready = ["curl", "-sf", "--max-time", "5", f"http://127.0.0.1:{PORT}/-/ready"]
            node.wait_for("Prometheus to be ready", lambda: node.run(*ready).returncode == 0, 30)
            yield Prometheus(node)
        finally:
            ended.set()
            process.terminate()
            process.wait(timeout=30)
            discoverer.join(timeout=30)


def _discover(node: Node, discoveries: list[tuple[Path, str, Any]], ended: threading.Event) -> None:
    while not ended.wait(1):
        for path, label, namespaces in discoveries:
            where = [word for name in (namespaces or {}).get("names", []) for word in ("-n", name)] or ["-A"]
            pods = json.loads(node.kubectl("get", "pods", *where, "-l", label, "-o", "json"))["items"]
            new = path.with_suffix(".new")
            new.write_text(json.dumps([target for pod in pods for target in _targets(pod)]))
            new.rename(path)  # Prometheus must never read half a file


def _targets(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A pod as discovery of role `pod` sees it: a target for each port of each container."""
    ip = pod["status"].get("podIP")
    if not ip:
        return
    meta = pod["metadata"]
    labels = {f"__meta_kubernetes_pod_label_{key.translate(_WORD)}": value for key, value in meta["labels"].items()}
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            yield {
                "targets": [f"{ip}:{port['containerPort']}"],
                "labels": labels
                | {
                    "__meta_kubernetes_namespace": meta["namespace"],
                    "__meta_kubernetes_pod_name": meta["name"],
                    "__meta_kubernetes_pod_node_name": pod["spec"].get("nodeName", ""),
                    "__meta_kubernetes_pod_phase": pod["status"]["phase"],
                    "__meta_kubernetes_pod_container_name": container["name"],
                    "__meta_kubernetes_pod_container_port_name": port.get("name", ""),
                },
            }
