"""What the operator's tests on a real API server share: the operator as a process, and a plain REST client. What happens in a cluster
besides, tests play themselves (playing.py).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cluster.controlplane import ControlPlane
from cluster.processes import Program, ProgramDied

T = TypeVar("T")
JOBS = "apis/disttrain.dev/v1alpha1/{}/disttrainjobs"
PODS = "api/v1/{}/pods"
SERVICES = "api/v1/{}/services"
POLICIES = "apis/networking.k8s.io/v1/{}/networkpolicies"
SECRETS = "api/v1/{}/secrets"
EVENTS = "api/v1/{}/events"


class Refusal(Exception):
    """The API server answered with an error."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body[:500]}")
        self.status = status
        self.body = body


def eventually(check: Callable[[], T], *, seconds: float = 15, every: float = 0.1) -> T:
    """The first true result of the check; raises its last failure at the deadline. An observer has to poll."""
    deadline = time.monotonic() + seconds
    while True:
        problem: BaseException | None = None
        try:
            if result := check():
                return result
        except (AssertionError, Refusal, KeyError, OSError) as error:
            problem = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {problem or 'it stayed false'}") from problem
        time.sleep(every)


class Rest:
    """The API server of a control plane, raw, in one namespace; as the admin, or as a user whom the admin plays."""

    def __init__(self, control_plane: ControlPlane, namespace: str = "default", *, user: str = "") -> None:
        folder = control_plane.folder / "pki"
        self._context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        self._context.load_cert_chain(folder / "admin.crt", folder / "admin.key")
        self._address = control_plane.server.removeprefix("https://")
        self._connection: http.client.HTTPSConnection | None = None
        self.namespace = namespace
        self._headers = {"Impersonate-User": user} if user else {}
        control_plane.opened.callback(self.close)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __call__(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Any:
        return json.loads(self.text(method, path, body, kind=kind))

    def text(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> str:
        """The answer as it is, such as the lines of a watch."""
        path = "/" + path.format(f"namespaces/{self.namespace}")
        text = None if body is None else json.dumps(body)
        for attempt in (1, 2):
            if self._connection is None:
                self._connection = http.client.HTTPSConnection(self._address, context=self._context, timeout=30)
            try:
                self._connection.request(method, path, text, {"Content-Type": kind, **self._headers})
                answer = self._connection.getresponse()
                data = answer.read().decode()
                break
            except (http.client.HTTPException, OSError):
                self.close()
                if attempt == 2:
                    raise
        if answer.status >= 400:
            raise Refusal(answer.status, data)
        return data

    def get(self, path: str, name: str) -> Any:
        return self("GET", f"{path}/{name}")

    def find(self, path: str, name: str) -> Any | None:
        try:
            return self.get(path, name)
        except Refusal as refusal:
            if refusal.status == 404:
                return None
            raise

    def list(self, path: str, selector: str = "") -> list[Any]:
        items: list[Any] = self("GET", path + (f"?labelSelector={selector}" if selector else ""))["items"]
        return items

    def pods_of(self, name: str) -> dict[str, str]:
        """Names and uids of a job's pods, but for those that end."""
        metadata = [pod["metadata"] for pod in self.list(PODS, f"disttrain.dev/job-name={name}")]
        return {pod["name"]: pod["uid"] for pod in metadata if "deletionTimestamp" not in pod}

    def create(self, path: str, body: Any) -> Any:
        return self("POST", path, body)

    def merge(self, path: str, patch: Any) -> Any:
        return self("PATCH", path, patch, kind="application/merge-patch+json")

    def delete(self, path: str, name: str, **options: Any) -> Any:
        return self("DELETE", f"{path}/{name}", {"propagationPolicy": "Background", **options})


class Operator:
    """disttrain-operator as a process of its own, as users run it."""

    def __init__(
        self, control_plane: ControlPlane, *flags: str, kubeconfig: Path | None = None, name: str = "operator"
    ) -> None:
        control_plane.folder.mkdir(exist_ok=True)
        self._folder = control_plane.folder
        self._kubeconfig = kubeconfig or control_plane.kubeconfig
        self._flags = flags
        self._name = name
        self._starts = 0
        self.program: Program | None = None

    def __enter__(self) -> Operator:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> Operator:
        self._starts += 1
        environment = {"KUBECONFIG": str(self._kubeconfig)}
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        self.program = Program(
            f"{self._name}-{self._starts}",
            [str(Path(sys.executable).with_name("disttrain-operator")), "--host=127.0.0.1", "--port=0", *self._flags],
            self._folder,
            env=environment,
        ).start()
        self.port = eventually(self._port, seconds=30)
        eventually(lambda: self.answer("/readyz")[0] == 200, seconds=30)
        return self

    def kill(self) -> None:
        """SIGKILL: nothing is put in order."""
        if self.program:
            self.program.stop(signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP for the length of a block."""
        assert self.program
        self.program.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.program.send(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.program
        code = self.program.stop(signal.SIGTERM, seconds=20)
        assert code is not None
        return code

    def answer(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def requests(self, *, writes: bool = True) -> dict[tuple[str, str, str], float]:
        """Requests that this process sent, by (verb, resource, code)."""
        found = {}
        for line in self.answer("/metrics")[1].splitlines():
            if line.startswith("disttrain_operator_api_requests_total{"):
                labels, _, value = line.partition("{")[2].rpartition("} ")
                given = dict(part.split("=", 1) for part in labels.replace('"', "").split(","))
                if not writes or given["verb"] in ("create", "patch", "delete"):
                    found[given["verb"], given["resource"], given["code"]] = float(value)
        return found

    @property
    def log(self) -> str:
        assert self.program
        return self.program.log.read_text()

    def _port(self) -> int:
        assert self.program
        if not self.program.alive:
            raise ProgramDied(self.log)
        for line in self.log.splitlines():
            if "/metrics on port " in line:
                return int(line.rpartition(" ")[2])
        return 0


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(name: str, **spec: Any) -> Any:
    """A DistTrainJob with a master, one parameter server and two workers."""
    return {
        "apiVersion": "disttrain.dev/v1alpha1",
        "kind": "DistTrainJob",
        "metadata": {"name": name},
        "spec": {
            "image": "example.org/trainer:1",
            "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Async"}},
            "trainer": {
                "model": "mine.net:model",
                "dataset": "mine.net:dataset",
                "optimizer": {"name": "SGD", "learningRate": 0.1},
                "epochs": 1,
                "batchSize": 64,
            },
            "parameterServer": {"replicas": 1},
            "worker": {"replicas": 2},
            **spec,
        },
    }


def pod_names(name: str, *, servers: int = 1, workers: int = 2) -> list[str]:
    return sorted(
        [
            f"{name}-master-0",
            *(f"{name}-ps-{i}" for i in range(servers)),
            *(f"{name}-worker-{i}" for i in range(workers)),
        ]
    )
