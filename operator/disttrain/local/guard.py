"""Sees to it that a local run leaves nothing behind, even when it is killed with SIGKILL.

Every process of a run carries `DISTTRAIN_RUN_ID` in its environment, and so does all that it starts, in whatever session or group.
What is started with an environment of its own has lost the mark, but not the session: each replica leads one, and the run sends the guard
of it, `+PID` when it begins and `-PID` when it is over. The guard is a small program that waits for the end of its standard input, which
only the run itself holds open, and then kills what carries the mark or is in such a session. Our trainer also asks the kernel for a
parent-death signal: the two are independent of each other. Not here: the orderly end of a run (runner.py), who starts this (guarded.py).

It runs as a file of its own and imports the standard library alone, so that it costs a few milliseconds and little memory.
"""

import contextlib
import os
import signal
import sys
import time

MARK = "DISTTRAIN_RUN_ID"


def belonging(mark: str, value: str, sessions: frozenset[int] = frozenset()) -> list[int]:
    """The processes in whose environment `mark` has this value, or that are in one of the sessions. Empty where there is no /proc."""
    entry = f"{mark}={value}".encode()
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit() and int(name) != os.getpid() and _belongs(int(name), entry, sessions):
            found.append(int(name))
    return found


def _belongs(pid: int, entry: bytes, sessions: frozenset[int]) -> bool:
    try:
        state, session, _ = _stat(pid)
        if state == "Z":  # it has ended; its parent has not looked yet
            return False
        if session in sessions:
            return True
        with open(f"/proc/{pid}/environ", "rb") as environment:
            return entry in environment.read().split(b"\0")
    except OSError:  # it is gone, or another user's
        return False


def kill_all(mark: str, value: str, sessions: frozenset[int] = frozenset()) -> int:
    """Kills all that belongs together, what it starts meanwhile included; says how many it were."""
    killed: set[int] = set()
    quiet = 0
    # A process between fork and exec does not carry the mark yet, hence the second look.
    for _ in range(100):
        alive = belonging(mark, value, sessions)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        quiet = 0 if alive else quiet + 1
        if quiet == 2:
            break
        time.sleep(0.02)
    return len(killed)


def _stat(pid: int) -> tuple[str, int, str]:
    """State, session and start time of a process. Raises OSError."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return fields[0], int(fields[3]), fields[19]


def _started(pid: int) -> str:
    try:
        return _stat(pid)[2]
    except OSError:
        return ""


def is_same_session(session: int, leader_started: str) -> bool:
    """Whether a session is the one that the run sent. Its number is taken while it has members: another one has a leader."""
    now = _started(session)
    return now in ("", leader_started)


def main() -> None:
    """Waits for the run to end, whichever way, and clears up."""
    leaders: dict[int, str] = {}
    for line in sys.stdin:
        sign, pid = line[:1], line[1:].strip()
        if sign == "+" and pid.isdigit():
            leaders[int(pid)] = _started(int(pid))
        elif sign == "-" and pid.isdigit():
            leaders.pop(int(pid), None)
    kill_all(MARK, sys.argv[1], frozenset(pid for pid, started in leaders.items() if is_same_session(pid, started)))


if __name__ == "__main__":
    main()
