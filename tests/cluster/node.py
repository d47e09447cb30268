"""A complete Kubernetes cluster of one node for tests: etcd, API server, controllers, scheduler, kubelet, containerd, runc, pod network,
kube-proxy, DNS; all real, in namespaces of its own (see `machine.py`), up in some eight seconds, gone in two. Needs root.

    from cluster.node import Node
    from cluster.programs import require

    @pytest.fixture(scope="session")
    def node():
        require("cluster")
        with Node(images=built()) as node:   # cluster.images; without it only the pause image is there
            yield node

    def test_something(node):
        with node.namespace("team") as ns:                      # PodSecurity: restricted
            folder = node.volume("data", namespace=ns)            # a claim `data`, bound to this folder of the host
            node.kubectl("apply", "-n", ns, "-f", "-", input=pod)
            node.kill_pod(ns, "digits-worker-0")                 # SIGKILL to the container's first process
            node.run(".venv/bin/disttrain", "ls", user="jane")   # a program of the test's, in the node's network

Several can run side by side: each has its own network, so that all have the same addresses. `add_node` makes a cluster of more nodes,
and `lose_node` switches one off. When a block ends with an exception
the logs are kept in a folder that is named on standard error.

What it does not have: a way out, dynamic volumes (see `volume`), NetworkPolicy (the bridge plugin ignores them), host ports.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster import apiserver, kubelet, runs
from cluster.image_store import Store
from cluster.kubectl import Kubectl
from cluster.machine import NODE_IP, Machine, cgroup_of, remove_cgroups
from cluster.processes import Program, wait_for
from cluster.programs import program
from cluster.worker import Worker, connect

NODE_NAME = "node-1"


class Node(Kubectl):
    """A cluster of one node, or with `add_node` more; a context manager.

    `images`: a store of images, see `cluster.images`. `memory` ("4Gi") and `cpu` ("4") are what the node offers to
    pods, less than the machine has; memory is a real limit too. `resources` are offered as well and exist on paper only
    ({"nvidia.com/gpu": "8"})."""

    def __init__(
        self,
        *,
        images: Store | None = None,
        memory: str | None = None,
        cpu: str | None = None,
        resources: Mapping[str, str] | None = None,
        api_server_flags: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._images = images
        self._limits = kubelet.Limits(memory=memory, cpu=cpu)
        self._resources = dict(resources or {})
        self._flags = list(api_server_flags)
        self.workers: dict[str, Worker] = {}
        """The nodes by name, at first `node-1`, where the control plane runs too."""
        self.programs: dict[str, Program] = {}
        """By name: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, coredns; a worker has containerd, kubelet and
        kube-proxy. `.stop()` and `.start()` are for tests of what happens when one is away."""

    # -- life

    def up(self) -> Self:
        runs.sweep("node", lambda folder: remove_cgroups(cgroup_of(folder)))
        self.folder = runs.new_run("node")
        self.machine = Machine(self.folder)
        try:
            self._up()
        except BaseException:
            runs.keep_logs(self.folder, "The node did not come up")
            self.down()
            raise
        return self

    def _up(self) -> None:
        self.machine.up()
        layout = apiserver.Layout(folder=self.folder, ip=NODE_IP, prefix=self.machine.prefix, forks=True)
        self.layout = layout
        self.kubeconfig = self.kubeconfig_for("admin", groups=["system:masters"])
        admin = (self.folder / "pki" / "admin.crt", self.folder / "pki" / "admin.key")
        # All that does not need the API server starts beside it.
        self._add(apiserver.etcd(layout)).start()
        self._add(apiserver.kube_apiserver(layout, admin=admin, flags=self._flags)).start()
        first = self._worker(NODE_NAME, self.machine)
        first.start_runtime()
        self.wait_for_api_server()
        self._add(
            apiserver.controller_manager(
                layout,
                f"--cluster-cidr={kubelet.POD_RANGE}",
                "--allocate-node-cidrs=true",
                "--node-monitor-grace-period=20s",  # after which a silent node is NotReady; the default is 50 s
                "--node-monitor-period=2s",
            )
        ).start()
        self._add(apiserver.scheduler(layout)).start()
        first.start()
        self._add(kubelet.coredns(layout, self.kubeconfig)).start()
        self._wait_for_node(NODE_NAME)
        self.wait_for(
            "the default service account", lambda: self.kubectl("get", "serviceaccount", "default", "-o", "name"), 30
        )
        if self._resources:
            self.offer(self._resources)

    def down(self) -> None:
        for worker in reversed(
            self.workers.values()
        ):  # the first one's cgroups are named like the beginning of the others'
            worker.down()
        self.workers.clear()
        self.machine.down()  # again, should it have come to no worker yet
        for one in self.programs.values():
            one.stop(signal.SIGKILL)
        self.programs.clear()
        runs.remove_run(self.folder)

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind not in (None, GeneratorExit):  # pytest.fail and its time-out are no Exceptions
            self.keep_logs("The test failed")
        self.down()

    def _add(self, one: Program) -> Program:
        self.programs[one.name] = one
        return one

    # -- further nodes

    def add_node(self) -> str:
        """Another node of this cluster, on a machine of its own; returns its name. It has the same limits and images."""
        number = max(int(name.removeprefix("node-")) for name in self.workers) + 1
        name = f"node-{number}"
        folder = self.folder / name
        folder.mkdir()
        address = NODE_IP.rpartition(".")[0] + f".{number}"
        machine = Machine(folder, ip=address, cgroup=f"{cgroup_of(self.folder)}-{name}")
        others = dict(self.workers)
        worker = self._worker(name, machine)
        machine.up()
        connect(others[NODE_NAME], others, worker)
        worker.start_runtime()
        worker.start()
        self._wait_for_node(name)
        return name

    def lose_node(self, name: str) -> None:
        """Switches a further node's machine off, as a power cut would. The API server notices after some 20 seconds."""
        if name == NODE_NAME:
            raise ValueError("the control plane runs on node-1")
        self.workers.pop(name).down()

    def _worker(self, name: str, machine: Machine) -> Worker:
        index = int(name.removeprefix("node-")) - 1
        self.workers[name] = Worker(
            name, index, machine=machine, layout=self.layout, limits=self._limits, images=self._images
        )
        return self.workers[name]

    def _wait_for_node(self, name: str) -> None:
        self.wait_for(f"{name} to be registered", lambda: self.kubectl("get", "node", name, "-o", "name"), 60)
        self.kubectl("wait", "--for=condition=Ready", f"node/{name}", "--timeout=60s", timeout=70)

    # -- waiting, and the traces of a failure

    def wait_for_api_server(self) -> None:
        """For the time after a restart of it."""
        pki = self.folder / "pki"

        def answers() -> bool:
            with self.network():
                return apiserver.answers(self.layout, (pki / "admin.crt", pki / "admin.key"))

        self.wait_for("the API server to be ready", answers, 60)

    def wait_for(self, what: str, condition: Any, seconds: float = 60, *, every: float = 0.1) -> Any:
        """Looks until the condition returns something true; a program of the node that ended meanwhile is an error."""
        running = [
            *self.programs.values(),
            *(one for worker in self.workers.values() for one in worker.programs.values()),
        ]
        started = [one for one in running if one.started]
        return wait_for(what, condition, seconds, programs=started, every=every)

    def keep_logs(self, why: str) -> Path:
        """Keeps the programs' and pods' logs, and what the cluster looked like, in a folder that it returns and names."""
        with contextlib.suppress(Exception):  # the API server may be the very thing that failed
            state = self.kubectl("get", "pods,jobs,services,pvc,nodes", "-A", "-o", "wide", check=False, timeout=10)
            events = self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp", check=False, timeout=10)
            jobs = self.kubectl("get", "dtj", "-A", "-o", "yaml", check=False, timeout=10)
            (self.folder / "log" / "objects.txt").write_text("\n".join((state, events, jobs)))
        for worker in self.workers.values():
            source, log = worker.machine.folder, self.folder / "log"
            if (source / "pod-logs").exists():
                shutil.copytree(source / "pod-logs", log / f"pods-{worker.name}", dirs_exist_ok=True)
            if source != self.folder:
                shutil.copytree(source / "log", log / worker.name, dirs_exist_ok=True)
        return runs.keep_logs(self.folder, why)

    def how_it_is(self) -> str:
        """Jobs and pods in a few lines, and what keeps the machine busy: pods have small shares of its processors."""
        objects = ""
        with contextlib.suppress(Exception):  # the API server may be the very thing that failed
            objects = self.kubectl("get", "dtj,pods", "-A", check=False, timeout=10)
        busy = subprocess.run(
            ["ps", "-eo", "pcpu,etimes,stat,args", "--sort=-pcpu"], capture_output=True, text=True, check=False
        ).stdout.splitlines()[:9]
        return "\n".join((objects, f"load {os.getloadavg()}", *(line[:140] for line in busy)))

    # -- the API

    @property
    def _kubectl_prefix(self) -> Sequence[str]:
        return self.machine.network_prefix

    def user(self, name: str, *, namespace: str, role: str = "edit") -> Path:
        """A user with the rights of a ClusterRole (view, edit, admin) in one namespace and none elsewhere: its kubeconfig."""
        config = self.kubeconfig_for(name, namespace=namespace)
        self.kubectl(
            "create", "rolebinding", f"{name}-{role}", f"--clusterrole={role}", f"--user={name}", "-n", namespace
        )
        return config

    @contextlib.contextmanager
    def namespace(self, name: str, *, security: str = "restricted") -> Iterator[str]:
        """A namespace for a block, whose pods have to fit a Pod Security Standard. It is deleted at the end, not waited for."""
        labels = {"pod-security.kubernetes.io/enforce": security}
        self.kubectl(
            "create",
            "-f",
            "-",
            input={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}},
        )
        self.wait_for(
            f"namespace {name} to have its service account",
            lambda: self.kubectl("get", "serviceaccount", "default", "-n", name, "-o", "name"),
        )
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def volume(
        self,
        claim: str,
        *,
        namespace: str = "default",
        size: str = "1Gi",
        access: str = "ReadWriteMany",
        make_claim: bool = True,
    ) -> Path:
        """A PersistentVolume for a claim, and with `make_claim` the claim: a folder of this machine, which is returned.
        (There is no dynamic provisioner.)"""
        folder = self.folder / "volumes" / f"{namespace}-{claim}"
        folder.mkdir(parents=True)
        folder.chmod(0o777)  # hostPath knows no fsGroup, and the pods run as any user
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"{namespace}-{claim}"},
            "spec": {
                "capacity": {"storage": size},
                "accessModes": [access],
                "hostPath": {"path": str(folder)},
                "claimRef": {"namespace": namespace, "name": claim},
                "persistentVolumeReclaimPolicy": "Retain",
            },
        }
        pvc = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace},
            "spec": {"accessModes": [access], "storageClassName": "", "resources": {"requests": {"storage": size}}},
        }
        self.kubectl("create", "-f", "-", input=[volume, pvc] if make_claim else [volume])
        return folder

    def offer(self, resources: Mapping[str, str]) -> None:
        """Lets the node offer extended resources (`nvidia.com/gpu`) that the scheduler counts and the machine does not have."""
        patch = {"status": {"capacity": dict(resources)}}
        self.kubectl("patch", "node", NODE_NAME, "--subresource=status", "--type=merge", "-p", json.dumps(patch))
        self.wait_for(
            "the kubelet to offer them",
            lambda: resources.keys() <= self.get("node", NODE_NAME)["status"]["allocatable"].keys(),
        )

    # -- pods

    def container(self, namespace: str, pod: str, container: str | None = None) -> str:
        """The id of a pod's running container (the first one, if none is named)."""
        for status in self.get("pod", pod, namespace=namespace)["status"].get("containerStatuses", []):
            if container in (None, status["name"]) and "running" in status["state"]:
                return str(status["containerID"]).removeprefix("containerd://")
        raise LookupError(f"pod {namespace}/{pod} has no running container{f' {container}' if container else ''}")

    def kill_pod(
        self, namespace: str, pod: str, sig: signal.Signals = signal.SIGKILL, *, container: str | None = None
    ) -> None:
        """A signal to the first process of a pod's container, as a crash or the OOM killer would; the API server is not notified."""
        self._worker_of(namespace, pod).containerd.kill(self.container(namespace, pod, container), sig)

    def kill_child(self, namespace: str, pod: str) -> None:
        """SIGKILL to the one process that this first process has started, which goes on itself."""
        machine, first = self._first_process(namespace, pod)
        (child,) = machine.run(["cat", f"/proc/{first}/task/{first}/children"]).split()
        machine.run(["kill", "-KILL", child])

    def program_of(self, namespace: str, pod: str) -> str:
        """The name of the program that this first process runs now. LookupError as long as there is none."""
        machine, first = self._first_process(namespace, pod)
        return machine.run(["cat", f"/proc/{first}/comm"]).strip()

    def _first_process(self, namespace: str, pod: str) -> tuple[Machine, str]:
        """The machine of a pod, and there the number of its container's first process."""
        id = self.container(namespace, pod)
        containerd = self._worker_of(namespace, pod).containerd
        for line in containerd.ctr("tasks", "ls").splitlines()[1:]:
            if line.split()[0] == id:
                return containerd.machine, line.split()[1]
        raise LookupError(f"containerd has no task {id}")

    def _worker_of(self, namespace: str, pod: str) -> Worker:
        return self.workers[self.get("pod", pod, namespace=namespace)["spec"]["nodeName"]]

    # -- the network

    def run(
        self,
        *argv: str | Path,
        user: str = "admin",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        input: str | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program of the test's in the node's network, with KUBECONFIG set for a user. It is not checked."""
        return subprocess.run(
            [*self.machine.network_prefix, *map(str, argv)],
            env=self.environment(user, env),
            cwd=cwd,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def popen(
        self, *argv: str | Path, user: str = "admin", env: Mapping[str, str] | None = None, **kwargs: Any
    ) -> subprocess.Popen[str]:
        """Like `run`, for what goes on running; it is the caller's to end (the pid is the program's)."""
        command = ["setpriv", "--pdeathsig", "KILL", *self.machine.network_prefix, *map(str, argv)]
        return subprocess.Popen(command, env=self.environment(user, env), text=True, **kwargs)

    def environment(self, user: str = "admin", env: Mapping[str, str] | None = None) -> dict[str, str]:
        proxies = {"http_proxy", "https_proxy", "all_proxy"}
        own = {key: value for key, value in os.environ.items() if key.lower() not in proxies}
        path = f"{program('kubectl').parent}:{own.get('PATH', os.defpath)}"
        return {**own, "PATH": path, "KUBECONFIG": str(self.kubeconfig_for(user)), **(env or {})}

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """For the block, this thread opens its sockets in the node's network: a pod's or service's address can be dialled."""
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self.machine.first.pid}/ns/net") as theirs:
            _setns(theirs.fileno())
            try:
                yield
            finally:
                _setns(own.fileno())


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns comes with Python 3.12
    if libc.setns(fd, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
