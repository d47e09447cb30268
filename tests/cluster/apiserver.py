"""etcd, the API server and the programs beside it: how each is started. A node and a control plane of its own share these."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.pki import Authority
from cluster.processes import Program
from cluster.programs import program

SERVICE_RANGE = "10.96.0.0/16"
SERVICE_IP = "10.96.0.1"


@dataclass(kw_only=True)
class Layout:
    """Where one cluster's API server lives."""

    folder: Path
    ip: str
    port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380
    prefix: Sequence[str] = ()
    forks: bool = False
    authority: Authority = field(init=False)

    def __post_init__(self) -> None:
        self.authority = Authority(self.folder / "pki")

    @property
    def server(self) -> str:
        return f"https://{self.ip}:{self.port}"

    def program(self, name: str, *args: str) -> Program:
        return Program(name, [str(program(name)), *args], self.folder, self.prefix, forks=self.forks)


def etcd(layout: Layout) -> Program:
    client, peer = (f"http://127.0.0.1:{port}" for port in (layout.etcd_port, layout.etcd_peer_port))
    return layout.program(
        "etcd",
        f"--data-dir={layout.folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",  # the data is thrown away: no reason to wait for the disk
        "--log-level=warn",
    )


def kube_apiserver(layout: Layout, *, admin: Sequence[Path], flags: Sequence[str] = ()) -> Program:
    pki = layout.authority
    crt, key = pki.issue(
        "apiserver",
        "kube-apiserver",
        hosts=[
            *(f"IP:{ip}" for ip in dict.fromkeys((layout.ip, "127.0.0.1", SERVICE_IP))),
            *(
                f"DNS:{name}"
                for name in ("localhost", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
            ),
        ],
    )
    return layout.program(
        "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{layout.etcd_port}",
        f"--bind-address={layout.ip}",
        f"--advertise-address={layout.ip}",
        f"--secure-port={layout.port}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--client-ca-file={pki.ca}",
        f"--tls-cert-file={crt}",
        f"--tls-private-key-file={key}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki.account_public}",
        f"--service-account-signing-key-file={pki.account_key}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",  # whether a pod may be privileged is for PodSecurity to decide, which is on by default
        f"--kubelet-client-certificate={admin[0]}",
        f"--kubelet-client-key={admin[1]}",
        "--kubelet-preferred-address-types=InternalIP",
        *flags,
    )


def controller_manager(layout: Layout, *flags: str) -> Program:
    kubeconfig = layout.authority.kubeconfig("controller-manager", layout.server, "system:kube-controller-manager")
    return layout.program(
        "kube-controller-manager",
        f"--kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={layout.authority.account_key}",
        f"--root-ca-file={layout.authority.ca}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        *_serve_nowhere(layout),
        *flags,
    )


def scheduler(layout: Layout, *flags: str) -> Program:
    kubeconfig = layout.authority.kubeconfig("scheduler", layout.server, "system:kube-scheduler")
    return layout.program(
        "kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false", *_serve_nowhere(layout), *flags
    )


def _serve_nowhere(layout: Layout) -> list[str]:
    """No port for health and metrics: two control planes side by side would want the same one."""
    return [] if layout.prefix else ["--secure-port=0"]


def answers(layout: Layout, client: Sequence[Path], path: str = "/readyz") -> bool:
    """Whether the API server answers 200. The calling thread has to be in its network."""
    context = ssl.create_default_context(cafile=str(layout.authority.ca))
    context.load_cert_chain(client[0], client[1])
    connection = http.client.HTTPSConnection(layout.ip, layout.port, context=context, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    finally:
        connection.close()
