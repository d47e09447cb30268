"""The stacks of the processes of a local run that goes on, from the processes themselves: each writes them to its log when it is asked to.

A signal asks (api.environment.STACKS_SIGNAL), for which every training process has a handler that works also where Python's own lock is
held. A program of the user's (trainer.command) has none: it would be ended by the signal, and is not asked. Reads /proc; Linux alone.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disttrain.api.environment import STACKS_SIGNAL, TERMINATION_LOG
from disttrain.local.guard import MARK, belonging

_WAIT_SECONDS: Final = 3.0
"""For the first line of a process that is asked. One that the kernel holds, as on a disk that does not answer, writes none."""
_QUIET_SECONDS: Final = 0.1
_LOOK_SECONDS: Final = 0.01
_MOST_BYTES: Final = 1 << 20
_BEGINS: Final = (b"Current thread 0x", b"Thread 0x", b"Stack (most recent call first)")


@dataclass(frozen=True, slots=True)
class Stacks:
    """Those of one process."""

    name: str
    """Of its pod, such as digits-worker-1."""
    pid: int
    command: str
    state: str
    """In a word, and where the kernel has it: sleeping in futex_wait_queue."""
    text: str
    """Of all its threads; "" where it gave none."""


def of_run(folder: Path, uid: str) -> Iterator[Stacks]:
    """The stacks of each process of the run with this uid, by their pods."""
    found = [(_pod(pid), pid) for pid in belonging(MARK, uid)]
    for name, pid in sorted(found):
        log = folder / "logs" / f"{name}.log"
        if log.is_file():
            yield Stacks(name, pid, _command(pid), _state(pid), _asked(pid, log) if _answers(pid) else "")


def _asked(pid: int, log: Path) -> str:
    """What the process writes to its log when it is asked."""
    try:
        began = log.stat().st_size
        os.kill(pid, STACKS_SIGNAL)
    except OSError:  # it has ended
        return ""
    size, until, quiet_since = began, time.monotonic() + _WAIT_SECONDS, time.monotonic()
    while (now := time.monotonic()) < until and not (_has_stack(log, began) and now - quiet_since > _QUIET_SECONDS):
        time.sleep(_LOOK_SECONDS)
        if (new := log.stat().st_size) != size:
            size, quiet_since = new, time.monotonic()
    return _stack(log, began)


def _has_stack(log: Path, begin: int) -> bool:
    return bool(_stack(log, begin))


def _stack(log: Path, begin: int) -> str:
    """The lines of a stack in a log; others may stand between them, as the training goes on."""
    with open(log, "rb") as file:
        file.seek(begin)
        lines = file.read(_MOST_BYTES).splitlines()
    kept = [line for line in lines if line.startswith((*_BEGINS, b'  File "', b"  <"))]
    return b"\n".join(kept).decode(errors="replace")


def _answers(pid: int) -> bool:
    """Whether the process has a handler for the signal, and is a Python of ours."""
    for line in _read(pid, "status").splitlines():
        name, _, mask = line.partition(":")
        if name == "SigCgt":
            return bool(int(mask, 16) >> (STACKS_SIGNAL - 1) & 1) and "disttrain_trainer" in _command(pid)
    return False


def _pod(pid: int) -> str:
    """The name of its pod, by its termination message (folders.py); "" of a process that has none."""
    variables = dict(part.partition("=")[::2] for part in _read(pid, "environ").split("\0"))
    return Path(variables.get(TERMINATION_LOG, "")).stem.rpartition("-")[0]


def _command(pid: int) -> str:
    return " ".join(_read(pid, "cmdline").split("\0")).strip()[:200]


def _state(pid: int) -> str:
    state = next((line for line in _read(pid, "status").splitlines() if line.startswith("State:")), "")
    where = _read(pid, "wchan").strip()
    return f"{state.partition('(')[2].rstrip(')') or 'gone'}{f' in {where}' if where not in ('', '0') else ''}"


def _read(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}", name).read_text(errors="replace")
    return ""
