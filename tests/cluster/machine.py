"""A machine of its own for a node, made of Linux namespaces and cgroups.

Everything that a node starts lives in one PID, one mount and one network namespace. When their first process dies, the kernel
ends every process in them, and with the last one go the mounts and the interfaces: there is nothing left to clean up, not
even after the test process was killed (the first process dies with it). Only the cgroups' folders remain; `remove_cgroups`.

The network namespace has no way out. `/run`, `/var/log` and `/var/lib` are the machine's own, since the kubelet, containerd and the
CNI plugins write to fixed places there.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.processes import CLEAN_ENV, Program, wait_for
from cluster.programs import program

NODE_IP = "10.200.0.1"  # of the first machine of every cluster: each cluster's network is its own

_NETWORK = """
ip link set lo up
# A bridge as the node's interface: some kernels have no dummy driver. It has no port, and the route to it leads nowhere, so that
# packets to the pods' and services' private ranges, which exist in many an office too, never leave.
ip link add node0 type bridge
ip addr add "$1/24" dev node0
ip link set node0 up
ip route add default dev node0
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
"""

_MOUNTS = """
mount --make-rshared /
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=755 log /var/log
mkdir -p "$1/var-lib" "$1/var-lib-work"
mount -t overlay -o lowerdir=/var/lib,upperdir="$1/var-lib",workdir="$1/var-lib-work" overlay /var/lib
mkdir -p /var/lib/cni /var/lib/kubelet
# The kubelet sets these for the whole kernel. Here it reads and writes files with the values that it wants.
for setting in vm/overcommit_memory:1 vm/panic_on_oom:0 kernel/panic:10 kernel/panic_on_oops:1 \
    kernel/keys/root_maxkeys:1000000 kernel/keys/root_maxbytes:25000000; do
  file="/run/sysctl-$(echo "${setting%:*}" | tr / -)"
  echo "${setting#*:}" > "$file"
  mount --bind "$file" "/proc/sys/${setting%:*}"
done
"""


class Machine:
    """Namespaces and cgroups with a folder, alive from `up` to `down`."""

    def __init__(self, folder: Path, *, ip: str = NODE_IP, cgroup: str | None = None) -> None:
        self.folder = folder
        self.ip = ip
        self.cgroup = cgroup or cgroup_of(folder)
        self.first = Program(
            "machine",
            [
                *(
                    "unshare",
                    "--net",
                    "--mount",
                    "--pid",
                    "--fork",
                    "--kill-child=KILL",
                    "--mount-proc",
                    "--propagation=private",
                ),
                str(program("pause")),
            ],
            folder,
            forks=True,
        )

    def up(self) -> None:
        self.first.start()
        first = self.first.pid
        # The child exists before unshare has mounted its /proc and become the program.
        wait_for(
            "the machine's first process",
            lambda: Path(f"/proc/{first}/exe").readlink().name == "pause",
            5,
            programs=[self.first],
            every=0.01,
        )
        self.shell(_NETWORK, self.ip)
        self.shell(_MOUNTS, str(self.folder))
        make_cgroups(self.cgroup)

    def down(self) -> None:
        self.first.stop()  # and with it every process of the machine
        remove_cgroups(self.cgroup)

    def program(self, name: str, *argv: str) -> Program:
        """One to be started in this machine."""
        return Program(name, argv, self.folder, self.prefix, forks=True)

    @property
    def prefix(self) -> list[str]:
        """What a command is started with to run in this machine. It forks, so that the program has the right PID namespace.

        Not `ip netns exec`: that mounts a new /sys, in which the kubelet finds no cgroups."""
        return ["nsenter", "--target", str(self.first.pid), "--net", "--mount", "--pid", "--"]

    @property
    def network_prefix(self) -> list[str]:
        """The machine's network alone, with the files and processes of the test."""
        return ["nsenter", "--target", str(self.first.pid), "--net", "--"]

    def shell(self, script: str, *args: str) -> None:
        done = subprocess.run(
            [*self.prefix, "sh", "-euc", script, "sh", *args], env=CLEAN_ENV, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"setting the machine up failed: {done.stderr.strip()}")

    def run(self, argv: Sequence[str], *, timeout: float = 60) -> str:
        """Standard output of a command that runs in the machine."""
        done = subprocess.run([*self.prefix, *argv], env=CLEAN_ENV, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout


def cgroup_of(run: Path) -> str:
    """The cgroup of a run's first machine; those of further ones begin with it."""
    return f"/disttrain-{run.name}"


def _hierarchies() -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(mount[1]) for mount in mounts if mount[2] in {"cgroup", "cgroup2"}]


def make_cgroups(name: str) -> None:
    """A cgroup in every hierarchy, under which the kubelet makes its own. (Version 1 has a hierarchy per controller.)"""
    for root in _hierarchies():
        folder = root / name.lstrip("/")
        folder.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (root / file).exists():  # version 1: a new cpuset is empty, and nothing may run in it
                (folder / file).write_text((root / file).read_text())
        if (root / "cgroup.subtree_control").exists():
            controllers = (root / "cgroup.controllers").read_text().split()
            for controller in controllers:
                try:
                    (root / "cgroup.subtree_control").write_text(f"+{controller}")
                except OSError:
                    continue  # some cannot be delegated while processes sit at the top; the kubelet says which it needs


def remove_cgroups(name: str) -> None:
    """Removes it and those whose names begin with its own, deepest first.

    It ends what still runs in them: a machine's processes are gone before, and if not, that is better than a leftover."""
    tops = [top for root in _hierarchies() for top in root.glob(f"{name.lstrip('/')}*")]
    for top in tops:
        if (top / "cgroup.kill").exists():
            (top / "cgroup.kill").write_text("1")
        for folder in [*sorted((p for p in top.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)), top]:
            wait_for(f"{folder} to be empty", partial(_removed, folder), 10)  # dying processes hold it a moment


def _removed(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another run that starts sweeps too
        folder.rmdir()  # EBUSY until the last process in it is gone
    return True
