"""containerd for a node and for building images: its configuration, its start, and what a test asks of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path

from cluster.machine import Machine
from cluster.processes import Program, wait_for
from cluster.programs import program

SOCKET = "/run/containerd/containerd.sock"  # in the machine, whose /run is its own
PAUSE_IMAGE = "localhost/pause:1"
NAMESPACE = "k8s.io"  # the one namespace of containerd in which the kubelet looks

_CONFIG = """\
version = 2
root = "{root}"
state = "/run/containerd"
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
# Without CAP_SYS_RESOURCE (a container, some virtual machines) an OOM score below one's own is refused, and runc then
# fails with "can't get final child's PID from pipe: EOF".
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{cni}"
"""


class Containerd:
    """containerd in a machine, with a root folder that holds the images."""

    def __init__(self, machine: Machine, root: Path) -> None:
        self.machine = machine
        self.root = root
        self.cni = machine.folder / "cni"

    def start(self) -> Program:
        self.cni.mkdir(parents=True, exist_ok=True)
        config = self.machine.folder / "containerd.toml"
        config.write_text(_CONFIG.format(root=self.root, socket=SOCKET, pause=PAUSE_IMAGE, cni=self.cni))
        argv = ["containerd", "--config", str(config), "--log-level", "warn"]
        self.program = Program("containerd", argv, self.machine.folder, self.machine.prefix, forks=True).start()
        wait_for("containerd to answer", lambda: self.ctr("version"), 30, programs=[self.program])
        if PAUSE_IMAGE not in self.images():
            self._import_pause()
        return self.program

    def ctr(self, *args: str, timeout: float = 60) -> str:
        return self.machine.run(["ctr", "--address", SOCKET, "--namespace", NAMESPACE, *args], timeout=timeout)

    def images(self) -> set[str]:
        return set(self.ctr("images", "ls", "-q").split())

    def import_image(self, archive: Path, *, timeout: float = 600) -> None:
        """Takes in an image from an archive of `docker save` or `buildctl … type=docker`."""
        self.ctr("images", "import", str(archive), timeout=timeout)

    def kill(self, container: str, sig: signal.Signals) -> None:
        """A signal to a container's first process."""
        self.ctr("tasks", "kill", "--signal", sig.name, container.removeprefix("containerd://"))

    def _import_pause(self) -> None:
        archive = self.machine.folder / "pause.tar"
        docker_archive(archive, PAUSE_IMAGE, {"pause": program("pause")}, entrypoint=["/pause"])
        self.import_image(archive)
        archive.unlink()


def docker_archive(archive: Path, tag: str, files: dict[str, Path], *, entrypoint: Sequence[str]) -> None:
    """An image of one layer with a few files, as `docker save` would write it."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, file in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = file.stat().st_size, 0o755
            with file.open("rb") as data:
                tar.addfile(entry, data)
    write_docker_archive(
        archive, tag, layer, hashlib.sha256(layer.getbuffer()).hexdigest(), {"Entrypoint": list(entrypoint)}
    )


def write_docker_archive(
    archive: Path, tag: str, layer: io.BytesIO | Path, digest: str, config: dict[str, object]
) -> None:
    image = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        for name, text in (("manifest.json", json.dumps(manifest)), ("config.json", json.dumps(image))):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
        if isinstance(layer, Path):
            tar.add(layer, "layer.tar")
        else:
            entry = tarfile.TarInfo("layer.tar")
            entry.size = layer.getbuffer().nbytes
            layer.seek(0)
            tar.addfile(entry, layer)
