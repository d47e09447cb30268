"""What this machine has for a local run, and what it lacks. Imports none of what it looks for: torch alone takes seconds."""

import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from disttrain.client.findings import Finding, Level
from disttrain.local.machine import gpus

_EXTRAS: Final = {"trainer": "to train here", "cli": "for the verbs of a cluster"}
_GIB: Final = 1 << 30
_LEAST_SHARED: Final = _GIB
"""Of /dev/shm: loader processes hand their batches over there. Docker gives 64 MiB."""
_LEAST_DISK: Final = 2 * _GIB
_LEAST_MEMORY: Final = 2 * _GIB
_LEAST_FILES: Final = 1024
_REQUIREMENT: Final = re.compile(r"([\w.-]+)(?:\[[^\]]*\])?\s*(?:>=\s*([\d.]+))?")


def checks(folder: Path = Path()) -> list[Finding]:
    """All findings about this machine and the current folder."""
    return [*_python(), *_packages(), *_machine(), *_shared_memory(), *_disk(folder), _loopback()]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", Level.OK, f"{version}, {sys.executable}")
    if sys.platform != "linux":
        yield Finding(
            "system",
            Level.MISSING,
            f"a local run needs Linux, this is {sys.platform}",
            "run in a container, or submit to a cluster",
        )


def _packages() -> Iterator[Finding]:
    for extra, use in _EXTRAS.items():
        wanted = requirements(metadata.requires("disttrain") or (), extra)
        lacking, found = [], []
        for name, least in wanted:
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                lacking.append(name)
                continue
            found.append(f"{name} {version}")
            if least and _numbers(version) < _numbers(least):
                lacking.append(f"{name} {least} or newer (here is {version})")
        if lacking:
            level = Level.MISSING if extra == "trainer" else Level.WARNING
            yield Finding(
                "packages", level, f"{use} there is no {', '.join(lacking)}", f"pip install 'disttrain[{extra}]'"
            )
        elif wanted:
            yield Finding("packages", Level.OK, f"{use}: {', '.join(found)}")


def requirements(listed: list[str] | tuple[str, ...], extra: str) -> list[tuple[str, str]]:
    """The packages of an extra, and the least version of each, from what a distribution says that it requires."""
    of_extra = [text for text in listed if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", text)]
    parsed = [found for text in of_extra if (found := _REQUIREMENT.match(text))]
    return [(found[1], found[2] or "") for found in parsed]


def _machine() -> Iterator[Finding]:
    cores, memory = len(os.sched_getaffinity(0)), _memory()
    text = f"{cores} cores, {memory / _GIB:.1f} GiB of memory free"
    if memory < _LEAST_MEMORY:
        yield Finding("machine", Level.WARNING, text, "end other programs: a process of torch takes 0.3 to 0.5 GiB")
    else:
        yield Finding("machine", Level.OK, text)
    found = gpus()
    if found and "+cpu" in _version("torch"):
        mend = "install PyTorch for CUDA: pip install torch"
        yield Finding("GPUs", Level.WARNING, f"{len(found)}, but torch {_version('torch')} cannot use them", mend)
    else:
        yield Finding(
            "GPUs", Level.OK if found else Level.NOTE, str(len(found)) if found else "none: gpusPerWorker must stay 0"
        )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < _LEAST_FILES:
        yield Finding("open files", Level.WARNING, f"at most {files}", f"ulimit -n {_LEAST_FILES}")


def _shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        yield Finding("/dev/shm", Level.WARNING, str(error.strerror), "mount -t tmpfs tmpfs /dev/shm")
        return
    text = f"{usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB free"
    small = usage.free < _LEAST_SHARED
    mend = "docker run --shm-size=2g, or mount -o remount,size=2g /dev/shm" if small else ""
    yield Finding("/dev/shm", Level.WARNING if small else Level.OK, text, mend)


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    text = f"{free / _GIB:.1f} GiB free in {folder.resolve()}"
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(
            "folder",
            Level.MISSING,
            f"{folder.resolve()} cannot be written: a run keeps its logs and checkpoints there",
            "cd to another",
        )
    elif free < _LEAST_DISK:
        yield Finding(
            "folder", Level.WARNING, text, "rm -r what is no longer needed of .disttrain/runs and .disttrain/claims"
        )
    else:
        yield Finding("folder", Level.OK, text)


def _loopback() -> Finding:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            return Finding("network", Level.OK, "processes reach one another on 127.0.0.1")
    except OSError as error:
        return Finding(
            "network", Level.MISSING, f"127.0.0.1 cannot be reached: {error.strerror or error}", "ip link set lo up"
        )


def _memory() -> float:
    """Bytes that programs can still have: of the machine, or of our cgroup where that has less."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    free = float(found[1]) * 1024 if found else 0.0
    try:
        most, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return min(free, float(most) - float(used)) if most.isdecimal() else free


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
