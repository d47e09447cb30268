"""One node of a test cluster: a machine with containerd, kubelet and kube-proxy, and the pod network's end on it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from typing import IO

from cluster import kubelet
from cluster.apiserver import Layout
from cluster.containers import Containerd
from cluster.image_store import Store
from cluster.machine import Machine
from cluster.processes import CLEAN_ENV, Program


class Worker:
    """The machine is up already; `start_runtime` needs nothing, `start` the API server."""

    def __init__(
        self, name: str, index: int, *, machine: Machine, layout: Layout, limits: kubelet.Limits, images: Store | None
    ) -> None:
        self.name = name
        self.pods = f"10.244.{index}.0/24"
        self.machine = machine
        self.containerd = Containerd(machine, machine.folder / "containerd")
        self.programs: dict[str, Program] = {}
        self._layout = layout
        self._limits = limits
        self._images = images
        self._lease: IO[str] | None = None

    def start_runtime(self) -> None:
        if self._images is not None:
            self._lease = self._images.take_over(self.containerd.root)
        kubelet.write_cni(self.machine.folder, self.pods)
        self.programs["containerd"] = self.containerd.start()

    def start(self) -> None:
        for one in (
            kubelet.kubelet(self._layout, self.machine, self.name, self._limits),
            kubelet.kube_proxy(self._layout, self.machine, self.name),
        ):
            self.programs[one.name] = one.start()
        kubelet.limit_memory(self.machine.cgroup, self._limits)

    def down(self) -> None:
        """Like a power cut: no process is notified."""
        self.machine.down()  # the kernel ends every process in it, at once
        for one in self.programs.values():
            one.stop(signal.SIGKILL)
        self.programs.clear()
        if self._lease is not None:
            self._lease.close()


def connect(first: Worker, others: Mapping[str, Worker], new: Worker) -> None:
    """A cable from the new worker's bridge to the first one's, and routes between its pods and all others."""
    cable = f"to-{new.name}"[:15]  # the kernel's limit for a name
    ends = [
        cable,
        "netns",
        str(first.machine.first.pid),
        "type",
        "veth",
        "peer",
        "uplink",
        "netns",
        str(new.machine.first.pid),
    ]
    # Made right in the two namespaces, so that the host never has an end of it. The kernel takes it away with either of them.
    subprocess.run(["ip", "link", "add", *ends], env=CLEAN_ENV, check=True, timeout=10)
    first.machine.shell('ip link set "$1" master node0; ip link set "$1" up', cable)
    new.machine.shell("ip link set uplink master node0; ip link set uplink up")
    for old in others.values():
        old.machine.shell('ip route replace "$1" via "$2"', new.pods, new.machine.ip)
        new.machine.shell('ip route replace "$1" via "$2"', old.pods, old.machine.ip)
