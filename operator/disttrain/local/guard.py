"""Sees to it that a local run leaves nothing behind, even when it is killed with SIGKILL.

Every process of a run carries `DISTTRAIN_RUN_ID` in its environment, and so does all that it starts, in whatever session or group. The
guard is a small program that waits for the end of its standard input, which only the run itself holds open, and then kills
all that carries the mark. Our trainer also asks the kernel for a parent-death signal: the two are independent of each other.
Not here: the orderly end of a run (runner.py).

It runs as a file of its own and imports the standard library alone, so that it costs a few milliseconds and little memory.
"""

import os
import signal
import sys
import time

MARK = "DISTTRAIN_RUN_ID"


def marked(mark: str, value: str) -> list[int]:
    """The processes in whose environment `mark` has this value. Empty where there is no /proc."""
    entry = f"{mark}={value}".encode()
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environment:
                if entry in environment.read().split(b"\0"):
                    found.append(int(name))
        except OSError:  # it ended, or it is another user's
            continue
    return found


def kill_marked(mark: str, value: str) -> int:
    """Kills all that carries the mark, what they start meanwhile included; says how many it were."""
    killed: set[int] = set()
    quiet = 0
    # A process between fork and exec does not carry the mark yet, hence the second look.
    for _ in range(100):
        alive = marked(mark, value)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                continue
        quiet = 0 if alive else quiet + 1
        if quiet == 2:
            break
        time.sleep(0.02)
    return len(killed)


def main() -> None:
    """Waits for the run to end, whichever way, and clears up."""
    while os.read(0, 4096):
        pass
    kill_marked(MARK, sys.argv[1])


if __name__ == "__main__":
    main()
