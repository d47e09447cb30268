"""A real Kubernetes control plane for tests, on loopback: no root, no containers, up in about four seconds.

    from cluster.controlplane import ControlPlane
    from cluster.programs import require

    @pytest.fixture(scope="session")
    def control_plane():
        require("apiserver")  # skips with one line when the programs were not built; fails in CI
        with ControlPlane() as cp:
            yield cp

    def test_something(control_plane):
        control_plane.kubectl("apply", "--server-side", "-f", "crds/")
        control_plane.kubectl("apply", "-f", "-", input={"apiVersion": ..., "kind": "DistTrainJob", ...})
        job = control_plane.get("disttrainjob", "digits", namespace="default")
        config = control_plane.kubeconfig  # a Path, for KUBECONFIG and kubernetes.config.load_kube_config

By default etcd and the API server alone: what is written stays as it is, no pod is ever scheduled, nothing is collected and no
namespace ends. `ControlPlane(controllers=True)` adds kube-controller-manager (garbage collection, namespaces, service
accounts), `scheduler=True` the scheduler, and `fake_nodes=N` N nodes of kwok, on which scheduled pods "run" (implies the
other two). A pod of a fake node ends when a test says so: `end_pod(namespace, name, exit_code=137)`.
`api_server.stop()` and `start_api_server()` make an outage; `kubeconfig_for(user)` makes another user.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import apiserver, runs
from cluster.kubectl import Kubectl
from cluster.processes import Program, wait_for
from cluster.programs import program

STAGES = Path(__file__).with_name("stages.yaml")


def _free_ports(count: int) -> list[int]:
    """Ports of loopback on which no process listens, below the range from which the kernel draws: between this look and the
    program's own bind, no outgoing connection can get one of them."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            port = random.randrange(20000, 32000)
            sock = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


class ControlPlane(Kubectl):
    """etcd and kube-apiserver, and if wanted controllers, a scheduler and fake nodes; a context manager."""

    def __init__(
        self,
        *,
        controllers: bool = False,
        scheduler: bool = False,
        fake_nodes: int = 0,
        api_server_flags: Sequence[str] = (),
        keep: bool = False,
    ) -> None:
        super().__init__()
        self._controllers = controllers or fake_nodes > 0
        self._scheduler = scheduler or fake_nodes > 0
        self._fake_nodes = fake_nodes
        self._flags = list(api_server_flags)
        self._keep = keep
        self.programs: list[Program] = []
        self.opened = contextlib.ExitStack()
        """Connections to it, which end with it."""

    # -- life

    def up(self) -> Self:
        runs.sweep("controlplane", lambda _: None)
        self.folder = runs.new_run("controlplane")
        try:
            self._up()
        except BaseException:
            runs.keep_logs(self.folder, "The control plane did not come up")
            self.down()
            raise
        return self

    def _up(self) -> None:
        port, etcd_port, peer_port = _free_ports(3)
        self.layout = apiserver.Layout(
            folder=self.folder, ip="127.0.0.1", port=port, etcd_port=etcd_port, etcd_peer_port=peer_port
        )
        self.kubeconfig = self.kubeconfig_for("admin", groups=["system:masters"])
        self._admin = (self.folder / "pki" / "admin.crt", self.folder / "pki" / "admin.key")
        self.etcd = self._start(apiserver.etcd(self.layout))
        flags = [
            "--endpoint-reconciler-type=none"
        ]  # the address of the API server is loopback, which no endpoint may have
        if not self._controllers:
            # Without the controller manager no process makes the service account that every pod would be given.
            flags.append("--disable-admission-plugins=ServiceAccount")
        self.api_server = apiserver.kube_apiserver(self.layout, admin=self._admin, flags=[*flags, *self._flags])
        self.programs.append(self.api_server)
        self.start_api_server()
        if self._controllers:
            self.controller_manager = self._start(apiserver.controller_manager(self.layout))
            wait_for(
                "the default service account",
                lambda: self.kubectl("get", "serviceaccount", "default", "-o", "name", "-n", "default"),
                30,
                programs=self.programs,
                every=0.2,
            )
        if self._scheduler:
            self.scheduler = self._start(apiserver.scheduler(self.layout))
        if self._fake_nodes:
            self.add_fake_nodes(self._fake_nodes)

    def down(self) -> None:
        self.opened.close()
        # All at once and without ceremony: what they keep is thrown away.
        for one in reversed(self.programs):
            one.stop(signal.SIGKILL)
        self.programs.clear()
        if not self._keep:
            runs.remove_run(self.folder)

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind not in (None, GeneratorExit):  # pytest.fail and its time-out are no Exceptions
            runs.keep_logs(self.folder, "The test failed")
        self.down()

    def _start(self, one: Program) -> Program:
        self.programs.append(one)
        return one.start()

    def start_api_server(self) -> None:
        """Starts it (again), at the same address and with all it had stored, and waits until it is ready."""
        self.api_server.start()
        wait_for(
            "the API server to be ready",
            lambda: apiserver.answers(self.layout, self._admin),
            60,
            programs=[self.etcd, self.api_server],
        )

    # -- use

    @property
    def server(self) -> str:
        """Its URL."""
        return self.layout.server

    @contextlib.contextmanager
    def namespace(self, name: str, labels: Mapping[str, str] | None = None) -> Iterator[str]:
        """A namespace for a block. Without controllers it does not really end: take a new name for every test."""
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels or {})}}
        self.kubectl("create", "-f", "-", input=body)
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def add_fake_nodes(
        self,
        count: int,
        *,
        cpu: str = "64",
        memory: str = "512Gi",
        pods: int = 1000,
        resources: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Nodes that exist on paper: kwok says of them that they are ready, and of every pod on them that it runs."""
        if not hasattr(self, "kwok"):
            config = self.kubeconfig_for("kwok", groups=["system:masters"])
            self.kwok = self._start(
                self.layout.program(
                    "kwok",
                    f"--kubeconfig={config}",
                    f"--config={STAGES}",
                    "--manage-all-nodes=true",
                    # Loopback: a request to one of these pods gets no answer, and no other machine is asked.
                    "--cidr=127.1.0.0/16",
                    "--node-ip=127.0.0.1",
                    "--node-lease-duration-seconds=0",
                    "--server-address=127.0.0.1:0",
                )
            )
        first = len(json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"])
        names = [f"fake-{first + i}" for i in range(count)]
        capacity = {"cpu": cpu, "memory": memory, "pods": str(pods), **(resources or {})}
        nodes = [
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {
                    "name": name,
                    "labels": {"kubernetes.io/hostname": name, "type": "kwok", **(labels or {})},
                },
                "status": {"capacity": capacity, "allocatable": capacity},
            }
            for name in names
        ]
        self.kubectl("create", "-f", "-", input=nodes)
        self.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "node", *names, timeout=70)
        return names

    def end_pod(self, namespace: str, name: str, *, exit_code: int, message: str = "", reason: str = "") -> None:
        """Lets the containers of a pod on a fake node end with this termination message (see stages.yaml), and waits for that."""
        notes = {
            "exit-code": str(exit_code),
            "message": message,
            "reason": reason or ("Error" if exit_code else "Completed"),
        }
        annotations = [f"test.disttrain.dev/{key}={value}" for key, value in notes.items()]
        self.kubectl("annotate", "--overwrite", "pod", name, "-n", namespace, *annotations)
        phase = "Failed" if exit_code else "Succeeded"
        self.kubectl("wait", f"--for=jsonpath={{.status.phase}}={phase}", "pod", name, "-n", namespace, "--timeout=30s")


def _main() -> None:
    """A control plane by hand: `PYTHONPATH=tests python -m cluster.controlplane [fake nodes]`, until Enter."""
    import sys

    with ControlPlane(fake_nodes=int(sys.argv[1]) if len(sys.argv) > 1 else 0) as cp:
        print(f"export KUBECONFIG={cp.kubeconfig}\nexport PATH={program('kubectl').parent}:$PATH")
        input("Enter ends it. ")


if __name__ == "__main__":
    _main()
