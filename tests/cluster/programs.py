"""The programs that tests with real servers need: `python tests/cluster/programs.py [apiserver|monitoring|schedulers|cluster]`.

Four sets: `apiserver` (the API server, etcd, kubectl, controllers, scheduler, kwok), `monitoring` (these, Prometheus and promtool),
`schedulers` (those of `apiserver`, and the gang schedulers of others), all without root, and `cluster` (all but those schedulers, and the
Debian packages of a node). What is there already is left as it is, so the second
run takes a second. They are built from source with the Go module proxy, at the versions and checksums in `kube/`: that takes no more
than Go, and go.sum vouches for every module. About a quarter of an hour on two cores the first time, and with `cluster` three minutes
for the images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NoReturn

HERE = Path(__file__).resolve().parent
KUBERNETES = "v1.34.4"
_KUBE_LDFLAGS = (
    f"-s -w -X k8s.io/component-base/version.gitVersion={KUBERNETES}"
    " -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=34"
)

# Of Prometheus' thirty service discoveries, Kubernetes' alone: the others' clients take longer to build than all the rest.
_PROMETHEUS_TAGS = "remove_all_sd,enable_kubernetes_sd"

Set = Literal["apiserver", "monitoring", "schedulers", "cluster"]


@dataclass(frozen=True)
class GoProgram:
    """A program to build: the module in `kube/` that pins it, or one of `PROJECTS`, and its package."""

    name: str
    module: str
    package: str
    ldflags: str = "-s -w"
    tags: str = ""


COSCHEDULING = "sigs.k8s.io/scheduler-plugins@v0.33.5"
VOLCANO = "volcano.sh/volcano@v1.10.0"
PROJECTS = {
    COSCHEDULING: "h1:9u4QAYbuoxa59aStrJKP4Bii2EQrZmGPN2tzvfs2gL0=",
    VOLCANO: "h1:+GzQinGgeV0j58WpWpxByOXgF+YfUPW55zghM8GqjF0=",
}
"""Modules that are built as their projects build them, with the checksum of each: by their own go.mod, whose replacements would not hold in
a module of ours, and their own go.sum. Each has its own Kubernetes."""

GO_PROGRAMS: dict[Set, list[GoProgram]] = {
    "apiserver": [
        GoProgram("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
        *(
            GoProgram(name, ".", f"k8s.io/kubernetes/cmd/{name}", _KUBE_LDFLAGS)
            for name in ("kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler")
        ),
        GoProgram("kwok", "kwok", "sigs.k8s.io/kwok/cmd/kwok"),
    ],
    "monitoring": [
        GoProgram(name, "prometheus", f"github.com/prometheus/prometheus/cmd/{name}", tags=_PROMETHEUS_TAGS)
        for name in ("prometheus", "promtool")
    ],
    "cluster": [
        *(GoProgram(name, ".", f"k8s.io/kubernetes/cmd/{name}", _KUBE_LDFLAGS) for name in ("kubelet", "kube-proxy")),
        GoProgram("coredns", "dns", "."),
        GoProgram("pause", "pause", "."),
        GoProgram("buildkitd", "buildkit", "github.com/moby/buildkit/cmd/buildkitd"),
        GoProgram("buildctl", "buildkit", "github.com/moby/buildkit/cmd/buildctl"),
    ],
}
GO_PROGRAMS["monitoring"] = GO_PROGRAMS["apiserver"] + GO_PROGRAMS["monitoring"]
GO_PROGRAMS["cluster"] = GO_PROGRAMS["monitoring"] + GO_PROGRAMS["cluster"]
GO_PROGRAMS["schedulers"] = [
    *GO_PROGRAMS["apiserver"],
    GoProgram("coscheduling-scheduler", COSCHEDULING, "./cmd/scheduler"),
    GoProgram("coscheduling-controller", COSCHEDULING, "./cmd/controller"),
    GoProgram("volcano-scheduler", VOLCANO, "./cmd/scheduler"),
    GoProgram("volcano-controllers", VOLCANO, "./cmd/controller-manager"),
]
_PROJECT_OF = {one.name: one.module for one in GO_PROGRAMS["schedulers"] if one.module in PROJECTS}

# Debian package -> a file that shows it is there. Other distributions: the same programs from their own packages.
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iproute2": "ip",
    "nftables": "nft",
    "conntrack": "conntrack",
    "curl": "curl",
    "openssl": "openssl",
    "debootstrap": "debootstrap",
}
_ADMIN_PATH = (
    os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
)  # where a user's PATH lacks the administrator's folders


def cache_folder() -> Path:
    """What is kept from one run to the next: programs, wheels, images."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "disttrain"


@cache
def _folder() -> Path:
    # The key holds all that decides what is built, so a new version lands beside the old one and a cache never lies.
    digest = hashlib.sha256("|".join(map(repr, GO_PROGRAMS["cluster"])).encode())
    for file in sorted(f for f in (HERE / "kube").rglob("*") if f.suffix in {".go", ".mod", ".sum"}):
        digest.update(file.relative_to(HERE).as_posix().encode() + b"\0" + file.read_bytes())
    return cache_folder() / f"bin-{digest.hexdigest()[:12]}"


def program(name: str) -> Path:
    """Where a program of the sets lies (or would lie)."""
    if project := _PROJECT_OF.get(name):
        return cache_folder() / "projects" / project.replace("/", "-") / name
    return _folder() / name


@cache
def source_of(project: str) -> Path:
    """The folder with the source of one of `PROJECTS`, unpacked once from the Go module proxy."""
    argv = [_go_that_builds(project), "mod", "download", "-json", project]
    # As in a folder without a go.mod: only the module itself is asked for, none that it requires.
    done = subprocess.run(argv, cwd="/", env={**os.environ, "GOWORK": "off"}, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        _fail(f"`{' '.join(argv)}` failed: {done.stderr.strip()[-600:]}")
    if found.get("Sum") != PROJECTS[project]:
        got = found.get("Sum") or found.get("Error")
        _fail(f"{project} is not what it was: expected {PROJECTS[project]}, got {got}. Was the version replaced?")
    return Path(found["Dir"])


def missing(which: Set) -> str | None:
    """One line that says what is missing and what to do, or None when everything is there."""
    if sys.platform != "linux":
        return "Kubernetes' own programs run on Linux only: use a container or a virtual machine for these tests"
    lacking = [p.name for p in GO_PROGRAMS[which] if not program(p.name).exists()]
    if not _present("openssl"):
        lacking.append("openssl")
    if which == "cluster":
        if os.geteuid() != 0:
            return "a real node needs root (network namespaces, containers): run the tests as root"
        lacking += [name for name, file in PACKAGES.items() if not _present(file) and name not in lacking]
    if lacking:
        return f"missing: {', '.join(lacking)}. Run `python tests/cluster/programs.py {which}` first"
    return None


def require(which: Set) -> None:
    """Skips the test when something of the set is missing, with the line that says what."""
    if line := missing(which):
        skip(line)


def skip(line: str) -> NoReturn:
    """Skips the test with this line. In CI (CI=true), where a skipped test would hide a hole, it fails."""
    import pytest  # not at the top: this file also runs as a program, before there is any environment

    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(line, pytrace=False)
    pytest.skip(line)


def _present(file: str) -> bool:
    return Path(file).exists() if file.startswith("/") else shutil.which(file, path=_ADMIN_PATH) is not None


def _fail(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(1)


def _install_packages() -> None:
    lacking = [name for name, file in PACKAGES.items() if not _present(file)]
    for name in PACKAGES:
        if name not in lacking:
            print(f"  {name:28} present", flush=True)
    if not lacking:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        _fail(f"install these Debian packages (or their like) as root: {' '.join(lacking)}")
    # RUNLEVEL=1 tells Debian's maintainer scripts that services are not to be started: containerd would be.
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *lacking],
    ):
        print(f"  {' '.join(command)}", flush=True)
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            _fail(f"`{' '.join(command)}` failed: {done.stderr.strip()[-600:]}")


def _build(program_: GoProgram, go: str) -> None:
    target = program(program_.name)
    if target.exists():
        print(f"  {program_.name:28} present", flush=True)
        return
    print(f"  {program_.name:28} building …", end="", flush=True)
    begun = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(
        f"{target.name}.{os.getpid()}.partial"
    )  # renamed when whole: a program that exists is complete
    argv = [
        go,
        "build",
        "-trimpath",
        "-mod=readonly",
        "-tags",
        program_.tags,
        "-ldflags",
        program_.ldflags,
        "-o",
        str(partial),
        program_.package,
    ]
    # No C: no compiler needed, and the programs are static. GOTOOLCHAIN=auto lets a Go from 1.21 on fetch the one that go.mod names.
    env = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": os.environ.get("GOTOOLCHAIN", "auto")}
    folder = source_of(program_.module) if program_.module in PROJECTS else HERE / "kube" / program_.module
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        _fail(f" failed\n{done.stderr.strip()[-2000:]}")
    partial.rename(target)
    print(f" {time.monotonic() - begun:.0f} s, {target.stat().st_size >> 20} MB", flush=True)


def _go_that_builds(name: str) -> str:
    """Its path. Debian 12's Go 1.19 is too old to fetch the one that go.mod names, and fails with a parse error."""
    go = shutil.which("go")
    found = subprocess.run([go, "version"], capture_output=True, text=True).stdout.strip() if go else "no Go"
    version = re.search(r"\bgo(\d+)\.(\d+)", found)
    if not go or not version or tuple(map(int, version.groups())) < (1, 21):
        where = f" at {go}" if go else ""
        _fail(
            f"{name} is missing. To build it Go 1.21 or later is needed; found: {found}{where}."
            " Install it from https://go.dev/dl and put it first in PATH"
        )
    return go


def _build_all(programs: list[GoProgram]) -> None:
    lacking = [one.name for one in programs if not program(one.name).exists()]
    go = _go_that_builds(lacking[0]) if lacking else ""
    for one in programs:
        _build(one, go)


def main() -> None:
    without_root: list[Set] = ["apiserver", "monitoring", "schedulers"]
    which: Set = next((one for one in without_root if one in sys.argv[1:]), "cluster")
    print(f"Programs, in {_folder()}:", flush=True)
    _build_all(GO_PROGRAMS["monitoring" if which == "cluster" else which])
    if which == "cluster":
        if os.geteuid() != 0:
            _fail(missing(which) or "")
        _build_all([one for one in GO_PROGRAMS["cluster"] if one not in GO_PROGRAMS["monitoring"]])
        print("Debian packages:", flush=True)
        _install_packages()
    if line := missing(which):
        _fail(line)
    if which == "cluster":
        print("Images:", flush=True)
        sys.path.insert(0, str(HERE.parent))  # as a program, this file is outside the package that the tests see
        from cluster import images

        if line := images.missing():
            _fail(line)
        images.built()
    print("Everything is there.")


if __name__ == "__main__":
    main()
