"""A process on its machine: it dies with its parent, handles signals in time, and uses the CPUs that it was given.

Linux only where Linux has the means (prctl, cgroups, /proc); elsewhere these functions do nothing.
"""

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import FrameType

BACKGROUND = 10
"""Niceness of a thread that does not hurry."""
_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process as soon as `parent` is gone, however that came about."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before prctl took effect; then the kernel sends no signal.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def dying_with_parent() -> Callable[[], None]:
    """What a child of this process calls between fork and exec, so that it dies with the thread that starts it."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    parent = os.getpid()

    def call() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return call


MOST_FILES = 65536
"""Open files that a process may need. More would be no use: some programs that a process starts close every number below the limit."""


def raise_file_limit() -> None:
    """Raises the soft limit of open files toward the hard one: connections of others must not take the numbers that checkpoints need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # not every system lets a process have what it promises
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_wakeup: list[int] = []
"""The descriptor that signals are written to, after `on_sigterm` was called."""


def restore_sigterm() -> bool:
    """Takes SIGTERM back from user code that has put its own handler in place of ours; whether it had. Call it from the main thread.

    Without it a worker would not save, or would fail, when its pod has to end.
    """
    if not _wakeup:
        return False
    changed = signal.getsignal(signal.SIGTERM) is not _ignore
    if changed:
        signal.signal(signal.SIGTERM, _ignore)
    return signal.set_wakeup_fd(_wakeup[-1], warn_on_full_buffer=False) != _wakeup[-1] or changed


def on_sigterm(callback: Callable[[], None]) -> Callable[[], None]:
    """Calls `callback` in a thread of its own for each SIGTERM, also while the main thread waits inside torch or a socket. Returns what
    ends that.

    Python runs its own handlers only between two bytecodes of the main thread; the wake-up descriptor is written by the C handler.
    Call it from the main thread.
    """
    reading_end, writing_end = socket.socketpair()
    writing_end.setblocking(False)
    os.register_at_fork(after_in_child=_detach_from_parent)
    before = signal.signal(signal.SIGTERM, _ignore)
    signal.set_wakeup_fd(writing_end.fileno(), warn_on_full_buffer=False)
    _wakeup.append(writing_end.fileno())

    def listen() -> None:
        with writing_end, reading_end:
            while data := reading_end.recv(64):
                if signal.SIGTERM in data:
                    callback()

    thread = threading.Thread(target=listen, name="sigterm", daemon=True)
    thread.start()

    def end() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)
        _wakeup.remove(writing_end.fileno())
        writing_end.shutdown(socket.SHUT_WR)
        thread.join()

    return end


def lower_priority() -> None:
    """The calling thread gets a tenth of the weight of others: it takes the processor mostly when no other thread wants it."""
    if sys.platform != "linux":  # elsewhere a thread has no priority of its own
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND)


_interrupts: list[int] = []
"""SIGINTs that came."""


def note_interrupts() -> None:
    """From now on `interrupted` tells a KeyboardInterrupt that a SIGINT raised from one that user code raises. Call it from the main
    thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupts.append(number)
        signal.default_int_handler(number, frame)

    _interrupts.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def interrupted() -> bool:
    """Whether this process got a SIGINT."""
    return bool(_interrupts)


_forked: list[int] = []
"""Not empty in a child that was forked from the process of a role."""
os.register_at_fork(after_in_child=lambda: _forked.append(os.getpid()))


def take_role() -> None:
    """This process runs a role, though it may itself be forked: from the launcher of its pod. What it forks from now on does not."""
    _forked.clear()


def leave_forked_child(error: BaseException | None = None) -> None:
    """Where user code comes back to ours: ends a child that it forked, which would otherwise leave our frames one by one and close its
    parent's connections on the way, or train on beside it. error: what the child raised. Does nothing in any other process."""
    if not _forked:
        return
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    with contextlib.suppress(BaseException):
        if error is None:
            print("a child process that user code forked returned from that code; DistTrain ends it", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exception(error)
        elif error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    os._exit(code & 0xFF)


def _ignore(_signal: int, _frame: FrameType | None) -> None:
    pass


def _detach_from_parent() -> None:
    """A child that the user's code forks: SIGTERM ends it, as it would have otherwise, and does not reach its parent, whose pipe it has."""
    if signal.getsignal(signal.SIGTERM) is _ignore:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def cpu_limit(root: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: the cgroup's quota rounded up, at most those of its affinity."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return available
    if not quota.isdecimal() or not period.isdecimal():  # "max", or -1 in version 1: no limit
        return available
    return max(1, min(available, -(-int(quota) // int(period))))


def memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may use with the others of its container: the cgroup's limit, at most what the machine has."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            text = file.read_text().strip()
            return min(there, int(text)) if text.isdecimal() else there  # "max": no limit
    return there


def oom_kills(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Processes that the memory limit of this process's cgroup has killed so far; 0 where that is not known.

    root: where the cgroups are mounted. own: the file that names those of this process.
    """
    try:
        entries = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except (OSError, IndexError):
        entries = []
    files = []
    for controllers, path in entries:  # a container may see its own cgroup as the root of all, or its path on the node
        folder = path.lstrip("/")
        if not controllers:
            files += [root / folder / "memory.events"]
        elif "memory" in controllers.split(","):
            files += [root / "memory" / folder / "memory.oom_control", root / "memory" / "memory.oom_control"]
    for file in (*files, root / "memory.events"):
        try:
            counts = dict(line.split() for line in file.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if counts.get("oom_kill", "").isdecimal():
            return int(counts["oom_kill"])
    return 0


def set_threads(environ: MutableMapping[str, str], *, processes: int) -> None:
    """Shares the CPU limit between the `processes` of the pod, unless the user chose; must run before torch is imported.

    Otherwise OpenMP starts a thread per core of the host and the cgroup throttles them (pytorch#193859).
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environ.setdefault(name, environ.get("OMP_NUM_THREADS") or str(max(1, cpu_limit() // processes)))


def set_interface(environ: MutableMapping[str, str], *, toward: str) -> None:
    """Has gloo and NCCL listen where `toward` is reached from, unless the user chose.

    gloo takes the address of the hostname, which in many images is loopback (gloo#223). Does nothing while `toward` has no address.
    """
    interface = interface_toward(toward)
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environ.setdefault(name, interface)


def interface_toward(host: str) -> str | None:
    """Name of the network interface whose address the route to `host` begins at; None when it is unknown."""
    own = address_toward(host)
    if own is None:
        return None
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    return next((name for _, name in socket.if_nameindex() if own in _addresses(name, family)), None)


def address_toward(host: str) -> str | None:
    """The address of this machine at which the route to `host` begins; None when it is unknown."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: only asks for the route
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _addresses(interface: str, family: int) -> list[str]:
    """The addresses of an interface: by ioctl for IPv4, from /proc for IPv6."""
    if family == socket.AF_INET6:
        try:
            rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        except OSError:
            return []
        return [socket.inet_ntop(family, bytes.fromhex(row[0])) for row in rows if row[5] == interface]
    import fcntl

    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, siocgifaddr, interface.encode().ljust(256, b"\0"))
        except OSError:  # the interface has no IPv4 address
            return []
    return [socket.inet_ntoa(answer[20:24])]
