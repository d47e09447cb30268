"""The scrape configuration on a real Prometheus, with the rights of its account on a real API server: which pods it finds, and which
labels their series get.

The pods are objects of the API server alone; in their place, servers on loopback answer the scrape.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.controlplane import ControlPlane
from cluster.programs import require
from monitoring.grafana import MONITORING
from monitoring.server import Prometheus, prometheus, promtool

CONFIG = MONITORING / "prometheus" / "prometheus.yml"


@dataclass
class Pod:
    namespace: str
    name: str
    labels: dict[str, str]
    text: str
    """What its metrics port answers."""
    container: str = "trainer"
    port_name: str = "metrics"
    phase: str = "Running"
    port: int = field(default=0, init=False)
    """The kernel's choice, while it is served."""

    def manifest(self) -> dict[str, Any]:
        port = {"name": self.port_name, "containerPort": self.port}
        restricted = {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        container = {"name": self.container, "image": "none", "ports": [port], "securityContext": restricted}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": self.namespace, "name": self.name, "labels": self.labels},
            "spec": {"nodeName": "node-a", "containers": [container]},
            "status": {"phase": self.phase, "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]},
        }


def trainer(namespace: str, job: str, role: str, short: str, index: int, text: str, **more: str) -> Pod:
    labels = {"disttrain.dev/job-name": job, "disttrain.dev/role": role, "disttrain.dev/index": str(index)}
    return Pod(namespace, f"{job}-{short}-{index}", labels, text, **more)


def step(value: int, **labels: str) -> str:
    text = ",".join(f'{name}="{word}"' for name, word in labels.items())
    return f"# TYPE disttrain_step gauge\ndisttrain_step{{{text}}} {value}\n"


def own(job: str, rank: int, role: str = "worker") -> dict[str, str]:
    return {"namespace": "demo", "job_name": job, "role": role, "rank": str(rank)}


def pods() -> list[Pod]:
    return [
        trainer("demo", "digits", "master", "master", 0, step(10, **own("digits", 0, "master"))),
        trainer("demo", "digits", "worker", "worker", 0, step(11, **own("digits", 0))),
        trainer(
            "demo",
            "two-gpus",
            "worker",
            "worker",
            1,
            step(22, **own("two-gpus", 2)) + step(23, **own("two-gpus", 3)).split("\n")[1] + "\n",
        ),
        trainer("demo", "script", "worker", "worker", 5, "# TYPE my_own gauge\nmy_own 5\n"),
        trainer("evil", "liar", "worker", "worker", 0, step(666, **own("digits", 0))),
        trainer("demo", "sidecar", "worker", "worker", 0, step(1), port_name="http"),
        trainer("demo", "other-container", "worker", "worker", 0, step(1), container="exporter"),
        trainer("demo", "done", "worker", "worker", 0, step(1), phase="Succeeded"),
        Pod("demo", "unrelated", {"app": "x"}, step(1)),
        Pod(
            "disttrain-system",
            "disttrain-operator-1",
            {"app.kubernetes.io/name": "disttrain-operator"},
            '# TYPE disttrain_operator_restarts_total counter\ndisttrain_operator_restarts_total{role="worker",reason="Error"} 1\n',
            container="operator",
        ),
        Pod(
            "evil", "not-the-operator", {"app.kubernetes.io/name": "disttrain-operator"}, step(1), container="operator"
        ),
    ]


@contextlib.contextmanager
def serving(pod: Pod) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(pod.text.encode())))
            self.end_headers()
            self.wfile.write(pod.text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    pod.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[ControlPlane]:
    """With what `kubectl apply` makes: the account of Prometheus and its rights."""
    require("monitoring")
    with ControlPlane() as control_plane:
        control_plane.kubectl("apply", "-k", str(MONITORING.parent / "overlays" / "monitoring"))
        for namespace in ("demo", "evil"):
            control_plane.kubectl("create", "namespace", namespace)
        yield control_plane


@pytest.fixture(scope="module")
def scraped(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus with the shipped file. Three things differ: how often it looks, itself, which it does not scrape, and where the API
    server is, since it runs in no pod, where it would find that by itself."""
    folder, all_pods = tmp_path_factory.mktemp("scraped"), pods()
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG.with_name("rules.yml"))]
    config["scrape_configs"] = [each for each in config["scrape_configs"] if each["job_name"] != "prometheus"]
    for scrape in config["scrape_configs"]:
        (discovery,) = scrape["kubernetes_sd_configs"]
        discovery["kubeconfig_file"] = str(folder / "kubeconfig")
    (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig(cluster)))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with contextlib.ExitStack() as stack:
        for pod in all_pods:
            stack.enter_context(serving(pod))
        objects = [pod.manifest() for pod in all_pods]
        cluster.kubectl("create", "-f", "-", input=objects)
        cluster.kubectl("replace", "--subresource=status", "-f", "-", input=objects)
        yield stack.enter_context(prometheus(folder, folder / "prometheus.yml"))


def kubeconfig(cluster: ControlPlane) -> dict[str, Any]:
    """Of the account of Prometheus."""
    token = cluster.kubectl("create", "token", "prometheus", "-n", "disttrain-monitoring").strip()
    server = {"server": cluster.server, "certificate-authority": str(cluster.layout.authority.ca)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": server}],
        "users": [{"name": "prometheus", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "prometheus"}}],
        "current-context": "test",
    }


def labels(server: Prometheus, query: str) -> list[dict[str, str]]:
    result = [series["metric"] for series in server.query(query, time=int(time.time()) + 1)]
    return [{name: word for name, word in each.items() if name not in ("__name__", "instance")} for each in result]


def test_promtool_accepts_the_file_as_it_is_shipped() -> None:
    assert "SUCCESS" in promtool("check", "config", "--lint=all", "--lint-fatal", CONFIG)


def test_pods_of_jobs_and_of_the_operator_are_found_and_no_others(scraped: Prometheus) -> None:
    expected = {
        "digits-master-0",
        "digits-worker-0",
        "two-gpus-worker-1",
        "script-worker-5",
        "liar-worker-0",
        "disttrain-operator-1",
    }
    deadline = time.monotonic() + 30
    while not (up := {each["pod"] for each in labels(scraped, "up == 1")}) >= expected:
        assert time.monotonic() < deadline, f"{expected - up} not scraped; targets: {scraped.targets()}"
        time.sleep(0.2)
    assert {each["pod"] for each in labels(scraped, "up")} == expected


def test_series_have_the_labels_of_the_contract(scraped: Prometheus) -> None:
    common = {"job": "disttrain-trainer", "namespace": "demo", "node": "node-a"}
    assert labels(scraped, 'disttrain_step{job_name="digits",role="worker"}') == [
        common | {"job_name": "digits", "role": "worker", "rank": "0", "pod": "digits-worker-0"}
    ]
    assert labels(scraped, 'disttrain_step{role="master"}') == [
        common | {"job_name": "digits", "role": "master", "rank": "0", "pod": "digits-master-0"}
    ]
    assert sorted(each["rank"] for each in labels(scraped, 'disttrain_step{job_name="two-gpus"}')) == ["2", "3"]
    assert labels(scraped, "my_own") == [
        common | {"job_name": "script", "role": "worker", "rank": "5", "pod": "script-worker-5"}
    ]
    assert labels(scraped, "disttrain_operator_restarts_total") == [
        {
            "job": "disttrain-operator",
            "namespace": "disttrain-system",
            "pod": "disttrain-operator-1",
            "node": "node-a",
            "role": "worker",
            "reason": "Error",
        }
    ]
    everything = labels(scraped, '{job=~"disttrain.*"}')
    assert not [name for each in everything for name in each if name.startswith("exported_")]


def test_a_pod_cannot_pose_as_another_namespaces_job(scraped: Prometheus) -> None:
    assert labels(scraped, "disttrain_step == 666") == [
        {
            "job": "disttrain-trainer",
            "namespace": "evil",
            "node": "node-a",
            "job_name": "liar",
            "role": "worker",
            "rank": "0",
            "pod": "liar-worker-0",
        }
    ]


def test_without_its_role_prometheus_would_find_nothing(cluster: ControlPlane, tmp_path: Path) -> None:
    """So that the tests above stand on the rights that are shipped, and not on some of the test's own."""
    account = "system:serviceaccount:disttrain-monitoring:prometheus"
    can_i = ("auth", "can-i", "watch", "pods", "-A", f"--as={account}")
    assert cluster.kubectl(*can_i).strip() == "yes"
    cluster.kubectl("delete", "clusterrolebinding", "disttrain-prometheus")
    assert cluster.kubectl(*can_i, check=False).strip() == "no"
