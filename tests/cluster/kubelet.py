"""The programs of a node: kubelet, kube-proxy, the pod network and DNS. How each is configured."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.apiserver import Layout
from cluster.machine import Machine
from cluster.processes import Program
from cluster.programs import program

POD_RANGE = "10.244.0.0/16"
DOMAIN = "cluster.local"
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


@dataclass(frozen=True)
class Limits:
    """What the node offers of the machine's memory and processors; None for all of it."""

    memory: str | None = None
    cpu: str | None = None

    @property
    def memory_bytes(self) -> int | None:
        if self.memory is None:
            return None
        match = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", self.memory)
        if not match:
            raise ValueError(f"memory={self.memory!r}: expected something like 4Gi")
        return int(match[1]) * _UNITS[match[2]]

    def reserved(self) -> dict[str, str]:
        """What to withhold: the kubelet offers what the machine has, less this."""
        withheld = {}
        if self.memory_bytes is not None:
            have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            withheld["memory"] = str(max(0, have - self.memory_bytes))
        if self.cpu is not None:
            withheld["cpu"] = f"{max(0, (os.cpu_count() or 1) * 1000 - int(float(self.cpu) * 1000))}m"
        return withheld


def limit_memory(cgroup: str, limits: Limits) -> None:
    """Makes the memory limit a real one for all pods together: the OOM killer, not the machine, ends what takes more."""
    if limits.memory_bytes is None:
        return
    for file in (
        Path(f"/sys/fs/cgroup/memory{cgroup}/memory.limit_in_bytes"),  # version 1
        Path(f"/sys/fs/cgroup{cgroup}/memory.max"),
    ):
        if file.exists():
            file.write_text(str(limits.memory_bytes))


def kubelet(layout: Layout, machine: Machine, name: str, limits: Limits) -> Program:
    folder, pki = machine.folder, layout.authority
    kubeconfig = pki.kubeconfig(f"kubelet-{name}", layout.server, f"system:node:{name}", ["system:nodes"])
    crt, key = pki.issue(f"kubelet-{name}-serving", f"system:node:{name}", hosts=[f"IP:{machine.ip}", f"DNS:{name}"])
    (folder / "resolv.conf").write_text(f"nameserver {layout.ip}\n")
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "x509": {"clientCAFile": str(pki.ca)},
            "webhook": {"enabled": True},
            "anonymous": {"enabled": False},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(crt),
        "tlsPrivateKeyFile": str(key),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": machine.cgroup,
        "failCgroupV1": False,  # many a machine still mounts cgroup version 1, which Kubernetes 1.35 refuses by default
        "failSwapOn": False,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [layout.ip],
        "clusterDomain": DOMAIN,
        "resolvConf": str(folder / "resolv.conf"),
        # A full disk is the machine's affair; a test node evicts no pod for it and keeps the images that were put there.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "enforceNodeAllocatable": [],
        "systemReserved": limits.reserved(),
        "podLogsDir": str(folder / "pod-logs"),
        "volumePluginDir": str(folder / "volume-plugins"),
        "shutdownGracePeriod": "0s",
        # Tests wait for what a node says: the defaults are for clusters of thousands. (The lease is renewed after a quarter.)
        "nodeStatusUpdateFrequency": "4s",
        "nodeLeaseDurationSeconds": 12,
        "syncFrequency": "10s",
        "fileCheckFrequency": "1h",
        "registerNode": True,
    }
    file = folder / "kubelet.json"
    file.write_text(json.dumps(config, indent=1))
    return machine.program(
        "kubelet",
        str(program("kubelet")),
        f"--kubeconfig={kubeconfig}",
        f"--config={file}",
        f"--root-dir={folder / 'kubelet'}",
        f"--hostname-override={name}",
        f"--node-ip={machine.ip}",
    )


def kube_proxy(layout: Layout, machine: Machine, name: str) -> Program:
    kubeconfig = layout.authority.kubeconfig(f"kube-proxy-{name}", layout.server, "system:kube-proxy")
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "mode": "nftables",
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": name,
        "conntrack": {"maxPerCore": 0},  # a setting of the whole machine: not ours to change
    }
    file = machine.folder / "kube-proxy.json"
    file.write_text(json.dumps(config, indent=1))
    return machine.program("kube-proxy", str(program("kube-proxy")), f"--config={file}")


def write_cni(folder: Path, pods: str) -> None:
    """The network of the pods with these addresses: a bridge. No masquerading, as there is no way out, and so no iptables."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(folder / "cni-addresses"),
        },
    }
    (folder / "cni").mkdir(exist_ok=True)
    file = folder / "cni" / "10-bridge.conflist"
    file.write_text(json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}))


def coredns(layout: Layout, kubeconfig: Path) -> Program:
    """The cluster's DNS, on the node itself; answers live a second, so that a test sees a new pod at once."""
    file = layout.folder / "Corefile"
    file.write_text(
        f""".:53 {{
    bind {layout.ip}
    errors
    kubernetes {DOMAIN} in-addr.arpa {{
        endpoint {layout.server}
        kubeconfig {kubeconfig} test
        pods insecure
        ttl 1
    }}
    cache 1
}}
"""
    )
    return layout.program("coredns", "-conf", str(file))
