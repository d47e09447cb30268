"""The harness itself: a node comes up with the project's images, pods find one another, and nothing stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import images as images_
from cluster.image_store import Store
from cluster.node import Node
from cluster.processes import wait_for
from cluster.programs import require

pytestmark = pytest.mark.timeout(900)  # for the first of them, when the images are still to be built

RESTRICTED = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
LOCKED_DOWN = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def make_pod(name: str, image: str, *command: str, **spec: Any) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": images_.image(image),
        "command": list(command),
        "securityContext": LOCKED_DOWN,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "peers"}},
        "spec": {"restartPolicy": "Never", "securityContext": RESTRICTED, "containers": [container], **spec},
    }


def phase(node: Node, namespace: str, pod: str) -> str:
    return str(node.get("pod", pod, namespace=namespace)["status"]["phase"])


def end_of(node: Node, namespace: str, pod: str) -> str:
    """The pod's output, once it has succeeded."""

    def done() -> bool:
        return phase(node, namespace, pod) in {"Succeeded", "Failed"}

    node.wait_for(f"pod {pod} to end", done, 90)
    output = node.kubectl("logs", pod, "-n", namespace)
    assert phase(node, namespace, pod) == "Succeeded", output
    return output


# That a user has a name, modules come with bytecode (a read-only root could never keep it), and no compiler is there.
_CHECKS = """
import getpass, importlib, os, shutil, sys
modules = [importlib.import_module(name) for name in sys.argv[1:]]
compilers = [tool for tool in "cc gcc g++ c++ cpp clang ld as make go rustc nvcc".split() if shutil.which(tool)]
print(getpass.getuser(), os.getuid(), all(os.path.exists(m.__cached__) for m in modules), compilers)
"""


def test_trainer_image_runs_restricted(node: Node) -> None:
    modules = ["torch", "numpy", "disttrain_trainer", "json"]
    with node.namespace("trainer-image") as ns:
        pod = make_pod("imports", "trainer", "python", "-c", _CHECKS, *modules)
        node.kubectl("apply", "-n", ns, "-f", "-", input=pod)
        assert end_of(node, ns, "imports").split() == ["disttrain", "65532", "True", "[]"]


def test_operator_image_runs_restricted_and_holds_no_torch(node: Node) -> None:
    find_torch = "import importlib.util as u; print(u.find_spec('torch'))"
    with node.namespace("operator-image") as ns:
        pods = [
            make_pod("imports", "operator", "python", "-c", _CHECKS, "disttrain.controller.process", "json"),
            make_pod("torch", "operator", "python", "-c", find_torch),
            make_pod("helps", "operator", "disttrain-operator", "--help"),
        ]
        node.kubectl("apply", "-n", ns, "-f", "-", input=pods)
        assert end_of(node, ns, "imports").split() == ["disttrain", "65532", "True", "[]"]
        assert end_of(node, ns, "torch").split() == ["None"]
        assert "usage" in end_of(node, ns, "helps").lower()


def test_operator_image_is_small(node: Node) -> None:
    [size] = [
        image["sizeBytes"]
        for image in node.get("node", "node-1")["status"]["images"]
        if images_.image("operator") in image["names"]
    ]
    assert size < 250e6


def test_pod_security_refuses_root(node: Node) -> None:
    with node.namespace("security") as ns:
        pod = make_pod("root", "trainer", "id", securityContext={})
        pod["spec"]["securityContext"] = {"runAsUser": 0}
        with pytest.raises(RuntimeError) as refused:
            node.kubectl("apply", "-n", ns, "-f", "-", input=pod)
        assert "restricted" in str(refused.value)


def test_pods_find_one_another_by_headless_service(node: Node) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "peers"},
        "spec": {"clusterIP": "None", "selector": {"app": "peers"}, "publishNotReadyAddresses": True},
    }
    lookup = """
import socket, sys, time
deadline = time.monotonic() + 30
while True:
    try:
        print(socket.gethostbyname("first.peers")); break
    except OSError as error:
        if time.monotonic() > deadline: sys.exit(f"waited 30 s for first.peers: {error}")
        time.sleep(0.1)
"""
    with node.namespace("peers") as ns:
        first = make_pod("first", "operator", "sleep", "1000", hostname="first", subdomain="peers")
        second = make_pod("second", "operator", "python", "-c", lookup, hostname="second", subdomain="peers")
        node.kubectl("apply", "-n", ns, "-f", "-", input=[service, first, second])
        assert end_of(node, ns, "second").strip() == node.get("pod", "first", namespace=ns)["status"]["podIP"]


def test_claim_is_bound_to_a_folder_of_this_machine(node: Node) -> None:
    with node.namespace("volumes") as ns:
        folder = node.volume("data", namespace=ns)
        pod = make_pod("writes", "operator", "sh", "-c", "echo hello > /data/file")
        pod["spec"]["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
        pod["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        node.kubectl("apply", "-n", ns, "-f", "-", input=pod)
        end_of(node, ns, "writes")
        assert (folder / "file").read_text() == "hello\n"


def test_killed_container_ends_as_if_it_had_crashed(node: Node) -> None:
    with node.namespace("kill") as ns:
        node.kubectl("apply", "-n", ns, "-f", "-", input=make_pod("victim", "operator", "sleep", "1000"))
        node.wait_for("the pod to run", lambda: phase(node, ns, "victim") == "Running")
        node.kill_pod(ns, "victim", signal.SIGKILL)
        node.wait_for("the pod to fail", lambda: phase(node, ns, "victim") == "Failed")
        [status] = node.get("pod", "victim", namespace=ns)["status"]["containerStatuses"]
        assert status["state"]["terminated"]["exitCode"] == 137


def test_user_may_do_nothing_outside_the_own_namespace(node: Node) -> None:
    with node.namespace("team-a") as ns:
        node.user("jane", namespace=ns, role="view")
        node.kubectl("get", "pods", "-n", ns, user="jane")
        with pytest.raises(RuntimeError) as refused:
            node.kubectl("get", "pods", "-n", "default", user="jane")
        assert "forbidden" in str(refused.value)


def test_second_node_joins_and_is_lost(images: Store) -> None:
    with Node(images=images) as cluster:
        second = cluster.add_node()
        reach = "import urllib.request as r; print(r.urlopen('http://10.244.0.' + '%s:8000', timeout=5).status)"
        server = make_pod("server", "operator", "python", "-m", "http.server", "8000", nodeName="node-1")
        server["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": 8000}, "periodSeconds": 1}
        cluster.kubectl("create", "-f", "-", input=server)
        cluster.kubectl("wait", "--for=condition=Ready", "pod/server", "--timeout=60s")
        host = cluster.get("pod", "server")["status"]["podIP"].rpartition(".")[2]
        client = make_pod("client", "operator", "python", "-c", reach % host, nodeName=second)
        sleeper = make_pod("sleeper", "operator", "sleep", "1000", nodeName=second)
        cluster.kubectl("create", "-f", "-", input=[client, sleeper])
        assert end_of(cluster, "default", "client").strip() == "200"
        cluster.lose_node(second)
        cluster.kubectl("wait", "--for=condition=Ready=Unknown", f"node/{second}", "--timeout=60s", timeout=70)


def _traces(folder: Path) -> list[str]:
    """What there still is of a node: its processes, mounts, cgroups, and its folder."""
    name = folder.name
    processes = [
        f"process {p.name}: {command[:100]}"
        for p in Path("/proc").glob("[0-9]*")
        if (command := _command(p)) and (name in command or f"disttrain-{name}" in _read(p / "cgroup"))
    ]
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if name in line]
    cgroups = [str(p) for p in Path("/sys/fs/cgroup").glob(f"**/disttrain-{name}")]
    return processes + mounts + cgroups + ([str(folder)] if folder.exists() else [])


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _command(process: Path) -> str:
    return _read(process / "cmdline").replace("\0", " ")


def _network_namespaces() -> set[str]:
    """Those that any process is in: a namespace without one, and without a name, is gone."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue
    named = Path("/run/netns")
    return found | ({str(p) for p in named.iterdir()} if named.exists() else set())


def _kernel_settings() -> dict[Path, str]:
    """What a kubelet sets for the whole machine."""
    names = (
        "vm/overcommit_memory",
        "vm/panic_on_oom",
        "kernel/panic",
        "kernel/panic_on_oops",
        "kernel/keys/root_maxkeys",
    )
    return {file: file.read_text() for name in names for file in [Path("/proc/sys") / name]}


def test_nothing_stays_behind(images: Store) -> None:
    before, settings = _network_namespaces(), _kernel_settings()
    with Node(images=images) as node:
        folder = node.folder
        node.kubectl("apply", "-f", "-", input=make_pod("sleeps", "operator", "sleep", "1000"))
        node.wait_for("the pod to run", lambda: phase(node, "default", "sleeps") == "Running")
        assert _traces(folder), "while it runs there are traces"
    assert _traces(folder) == []
    assert _network_namespaces() <= before
    assert _kernel_settings() == settings


_UP_AND_WAIT = """
import sys, time
from cluster.image_store import Store
from cluster.node import Node
node = Node().up()
print(node.folder, flush=True)
time.sleep(1000)
"""


def test_killed_test_process_takes_its_node_along() -> None:
    require("cluster")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", _UP_AND_WAIT], env=env, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout
        folder = Path(victim.stdout.readline().strip())
        victim.kill()

    def died() -> bool:
        return not any(trace.startswith("process") for trace in _traces(folder))

    wait_for("the killed test's node to die with it", died, 10)
    with Node():  # the next one that starts removes the folders of the dead one
        assert _traces(folder) == []
