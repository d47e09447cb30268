"""The scrape configuration on a real Prometheus: which pods it finds, and which labels their series get."""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml

from monitoring.grafana import MONITORING
from monitoring.server import Prometheus, free_port, prometheus

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
    port: int = field(default_factory=free_port)

    def discovered(self) -> dict[str, str]:
        """The labels that Prometheus' discovery of role pod gives."""
        found = {
            "__meta_kubernetes_namespace": self.namespace,
            "__meta_kubernetes_pod_name": self.name,
            "__meta_kubernetes_pod_node_name": "node-a",
            "__meta_kubernetes_pod_phase": self.phase,
            "__meta_kubernetes_pod_container_name": self.container,
            "__meta_kubernetes_pod_container_port_name": self.port_name,
        }
        for name, value in self.labels.items():
            found["__meta_kubernetes_pod_label_" + name.translate(str.maketrans("./-", "___"))] = value
        return found

    def manifest(self) -> dict:
        return {
            "metadata": {
                "namespace": self.namespace,
                "name": self.name,
                "uid": self.name,
                "labels": self.labels,
                "resourceVersion": "1",
            },
            "spec": {
                "nodeName": "node-a",
                "containers": [
                    {
                        "name": self.container,
                        "image": "x",
                        "ports": [{"name": self.port_name, "containerPort": self.port}],
                    }
                ],
            },
            "status": {"phase": self.phase, "podIP": "127.0.0.1", "hostIP": "127.0.0.1"},
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
            '# TYPE disttrain_operator_restarts_total counter\ndisttrain_operator_restarts_total{role="Worker",reason="Error"} 1\n',
            container="operator",
        ),
        Pod(
            "evil", "not-the-operator", {"app.kubernetes.io/name": "disttrain-operator"}, step(1), container="operator"
        ),
    ]


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler], port: int) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


def exporter(pod: Pod) -> type[Quiet]:
    class Handler(Quiet):
        def do_GET(self) -> None:
            self.answer(pod.text, "text/plain; version=0.0.4")

    return Handler


def api_server(all_pods: list[Pod], ended: threading.Event) -> type[Quiet]:
    """Lists and watches pods by namespace and label, which is all that Prometheus asks."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            words = {name: values[0] for name, values in parse_qs(url.query).items()}
            parts = url.path.strip("/").split("/")
            namespace = parts[3] if parts[2] == "namespaces" else None
            name, _, value = words.get("labelSelector", "").partition("=")
            if words.get("watch"):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                ended.wait()
                return
            found = [
                pod.manifest()
                for pod in all_pods
                if namespace in (None, pod.namespace)
                and (not name or (name in pod.labels and value in ("", pod.labels[name])))
            ]
            body = {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": found}
            self.answer(json.dumps(body), "application/json")

    return Handler


def quick(config: dict) -> dict:
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG.with_name("rules.yml"))]
    config["scrape_configs"] = [each for each in config["scrape_configs"] if each["job_name"] != "prometheus"]
    return config


def check_series(server: Prometheus) -> None:
    deadline = time.monotonic() + 20
    expected = {
        "digits-master-0",
        "digits-worker-0",
        "two-gpus-worker-1",
        "script-worker-5",
        "liar-worker-0",
        "disttrain-operator-1",
    }
    while True:
        now = int(time.time()) + 1
        up = {series["metric"].get("pod") for series in server.query("up == 1", time=now)}
        if up >= expected:
            break
        assert time.monotonic() < deadline, f"{expected - up} not scraped; targets: {server.targets()}"
        time.sleep(0.2)
    assert {series["metric"]["pod"] for series in server.query("up", time=now)} == expected

    def labels(query: str) -> list[dict[str, str]]:
        result = [series["metric"] for series in server.query(query, time=now)]
        return [{name: word for name, word in each.items() if name not in ("__name__", "instance")} for each in result]

    common = {"job": "disttrain-trainer", "namespace": "demo", "node": "node-a"}
    assert labels('disttrain_step{job_name="digits",role="worker"}') == [
        common | {"job_name": "digits", "role": "worker", "rank": "0", "pod": "digits-worker-0"}
    ]
    assert labels('disttrain_step{role="master"}') == [
        common | {"job_name": "digits", "role": "master", "rank": "0", "pod": "digits-master-0"}
    ]
    assert sorted(each["rank"] for each in labels('disttrain_step{job_name="two-gpus"}')) == ["2", "3"]
    assert labels("my_own") == [
        common | {"job_name": "script", "role": "worker", "rank": "5", "pod": "script-worker-5"}
    ]
    assert labels("disttrain_step == 666") == [
        common | {"namespace": "evil", "job_name": "liar", "role": "worker", "rank": "0", "pod": "liar-worker-0"}
    ], "a pod cannot pose as another namespace's job"
    assert labels("disttrain_operator_restarts_total") == [
        {
            "job": "disttrain-operator",
            "namespace": "disttrain-system",
            "pod": "disttrain-operator-1",
            "node": "node-a",
            "role": "Worker",
            "reason": "Error",
        }
    ]
    assert not [name for each in labels('{job=~"disttrain.*"}') for name in each if name.startswith("exported_")]


def selected(pod: Pod, discovery: dict) -> bool:
    name, _, value = discovery["selectors"][0]["label"].partition("=")
    namespaces = discovery.get("namespaces", {}).get("names", [pod.namespace])
    return pod.namespace in namespaces and name in pod.labels and value in ("", pod.labels[name])


def test_pods_get_the_labels_of_the_contract(tmp_path: Path) -> None:
    """The discovery's answers are handed in as files, since Debian's Prometheus is built without Kubernetes discovery."""
    config, all_pods = quick(yaml.safe_load(CONFIG.read_text())), pods()
    for scrape in config["scrape_configs"]:
        (discovery,) = scrape.pop("kubernetes_sd_configs")
        file = tmp_path / f"{scrape['job_name']}.json"
        found = [pod for pod in all_pods if selected(pod, discovery)]
        file.write_text(
            json.dumps([{"targets": [f"127.0.0.1:{pod.port}"], "labels": pod.discovered()} for pod in found])
        )
        scrape["file_sd_configs"] = [{"files": [str(file)]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with contextlib.ExitStack() as stack:
        for pod in all_pods:
            stack.enter_context(serving(exporter(pod), pod.port))
        check_series(stack.enter_context(prometheus(tmp_path, tmp_path / "prometheus.yml")))


def _discovers(binary: str | None) -> bool:
    """Whether a Prometheus was built with Kubernetes' discovery. Debian's was not; DISTTRAIN_PROMETHEUS names another."""
    return binary is not None and b"__meta_kubernetes_pod_node_name" in Path(binary).read_bytes()


if _discovers(os.environ.get("DISTTRAIN_PROMETHEUS") or shutil.which("prometheus")):

    def test_pods_are_found_through_the_api_server(tmp_path: Path) -> None:
        config, all_pods, port, ended = (
            quick(yaml.safe_load(CONFIG.read_text())),
            pods(),
            free_port(),
            threading.Event(),
        )
        for scrape in config["scrape_configs"]:
            scrape["kubernetes_sd_configs"][0]["api_server"] = f"http://127.0.0.1:{port}"
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        with contextlib.ExitStack() as stack:
            stack.enter_context(serving(api_server(all_pods, ended), port))
            stack.callback(ended.set)
            for pod in all_pods:
                stack.enter_context(serving(exporter(pod), pod.port))
            check_series(stack.enter_context(prometheus(tmp_path, tmp_path / "prometheus.yml")))
