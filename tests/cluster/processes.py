"""Programs that a test starts, and the waiting for them.

A `Program` has a log, a pid file and a start that may be repeated, and it dies with the process that started it, even when that
one is killed with SIGKILL. What this is not: a supervisor. Nothing is ever restarted behind a test's back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
CLEAN_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"}


class ProgramDied(RuntimeError):
    """A program ended while a test waited for something that it should have done."""


def start_time(pid: int) -> str | None:
    """When the process started, in clock ticks since boot, or None if there is none: with the pid it names one process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    after_name = stat.rpartition(")")[2].split()  # the name may hold spaces and brackets
    return None if after_name[0] == "Z" else after_name[19]


def write_pid(file: Path, pid: int) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(f"{pid} {start_time(pid)}\n")
    partial.rename(file)  # a sweep would take half a file for a dead process


def read_pid(file: Path) -> int | None:
    """The pid in a file of `write_pid`, if that very process still runs."""
    try:
        pid, started = file.read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if start_time(int(pid)) == started else None


@dataclass
class Program:
    """A long-running program of the test's own."""

    name: str
    argv: Sequence[str]
    folder: Path
    prefix: Sequence[str] = ()  # what puts it somewhere, for example into a namespace; has to end in an exec
    env: Mapping[str, str] = field(default_factory=dict)
    forks: bool = (
        False  # the prefix does not exec but forks (nsenter into a PID namespace): the program is its only child
    )
    _popen: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "log" / f"{self.name}.log"

    @property
    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def started(self) -> bool:
        """Whether it is meant to run: it was started and not stopped since."""
        return self._popen is not None

    @property
    def pid(self) -> int:
        """The program's own pid, as this process sees it."""
        if self._popen is None or not self.alive:
            raise ProgramDied(f"{self.name} does not run; see {self.log}")
        if not self.forks:
            return self._popen.pid
        return wait_for(f"{self.name} to be started", self._children, 5)[0]

    def start(self) -> Program:
        if self.alive:
            return self
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # setpriv execs, so the parent-death signal holds for the program. It is sent when the *thread* that started it ends.
        argv = ["setpriv", "--pdeathsig", "KILL", *self.prefix, *self.argv]
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={
                    **CLEAN_ENV,
                    **self.env,
                },  # not the test's own: a proxy set there would catch the cluster's traffic
                start_new_session=True,  # Ctrl-C is for the test, which then stops its programs in order
            )
        write_pid(self.folder / f"{self.name}.pid", self._popen.pid)
        return self

    def send(self, sig: signal.Signals) -> None:
        os.kill(self.pid, sig)

    def stop(self, sig: signal.Signals = signal.SIGTERM, seconds: float = 5) -> int | None:
        """Ends it: with the signal, and with SIGKILL if it still runs after some seconds. The exit code; None when it was not started."""
        if self._popen is None:
            return None
        for one, timeout_seconds in ((sig, seconds), (signal.SIGKILL, 10.0)):
            # Without a child, what forked is about to end by itself: its machine was switched off.
            if self._popen.poll() is None and (pids := self._children() if self.forks else [self._popen.pid]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[0], one)
            try:
                code = self._popen.wait(timeout_seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            raise TimeoutError(f"{self.name} (pid {self._popen.pid}) outlived SIGKILL by 10 s")
        self._popen = None
        (self.folder / f"{self.name}.pid").unlink(missing_ok=True)
        return code

    def _children(self) -> list[int]:
        assert self._popen is not None, "only of a started program"
        try:
            return [
                int(pid) for pid in Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children").read_text().split()
            ]
        except OSError:
            return []

    def tail(self, lines: int = 15) -> str:
        try:
            text = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(line[:400] for line in text[-lines:])


def wait_for(
    what: str,
    condition: Callable[[], T | None],
    seconds: float,
    *,
    programs: Sequence[Program] = (),
    every: float = 0.05,
) -> T:
    """Looks until the condition holds and returns what it returned. At the deadline, or when a program that it needs has died,
    it says what it waited for; an exception of the condition counts as "not yet" and is part of the failure at the end."""
    deadline = time.monotonic() + seconds
    while True:
        why = ""
        try:
            if result := condition():
                return result
        except (OSError, subprocess.SubprocessError, LookupError, ValueError, RuntimeError) as error:
            why = f"; the last try said: {error}"
        for program in programs:
            if not program.alive:
                raise ProgramDied(
                    f"{program.name} ended while waiting for {what}. The end of its log ({program.log}):\n{program.tail()}"
                )
        if time.monotonic() > deadline:
            tails = "".join(f"\n--- {p.name} ({p.log}):\n{p.tail()}" for p in programs)
            raise TimeoutError(f"waited {seconds:g} s for {what}{why}{tails}")
        time.sleep(every)
