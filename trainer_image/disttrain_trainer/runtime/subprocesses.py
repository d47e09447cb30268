"""The processes of a user's program: started, their output read, ended, and their error found when they fail."""

import contextlib
import functools
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, BinaryIO

from disttrain_trainer.errors import ProgramFailed
from disttrain_trainer.runtime import machine
from disttrain_trainer.runtime.output_reader import OutputReader

LAST_LINES = 200
LONGEST_LINE = 4096
"""Characters that are kept of the end of a line."""
MOST_LEFT = 1 << 20
"""Bytes that are read of a pipe after the end of its process: more than it holds. A process that has left the group may write for ever."""
DRAIN_SECONDS = 30.0
"""Seconds that the end waits for a log that takes nothing."""

_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)')
_RANK = re.compile(r"^\[rank\d+\]: ?")
"""What torch puts before each line of a traceback once its process group is up."""
_TRACEBACK = "Traceback (most recent call last)"
_NOBODYS = "Exception ignored"
"""Before a traceback at the end of a program that did not end it."""
_FRAMEWORK = ("site-packages", "/lib/python", "<frozen", "<string>")


class Program:
    """One process for each training process of the pod."""

    def __init__(
        self,
        command: Sequence[str],
        environs: Sequence[Mapping[str, str]],
        *,
        changed: threading.Condition,
        readers: Sequence[OutputReader] = (),
        name: str = "script",
    ) -> None:
        """environs: of each process, beside our own. changed: notified when one ends.

        readers: of the output of each process; none where the output is not read. name: what messages call the program.
        Raises OSError when the program cannot be started.
        """
        self._changed = changed
        self._readers = readers
        self._name = name
        self._children: list[subprocess.Popen[bytes]] = []
        self._lines = [_Lines() for _ in environs]
        self._codes: dict[int, int] = {}
        self._signalled: set[signal.Signals] = set()
        self._alive: set[int] = set()
        """Those that are not reaped, so that no other process can have the number of their group. Changed with `_signalling` held."""
        self._signalling = threading.Lock()
        dies_with_agent = machine.dying_with_parent()
        for local_rank, environ in enumerate(environs):
            child = subprocess.Popen(
                command,
                env={**os.environ, **environ},
                stdout=subprocess.PIPE if readers else None,
                stderr=subprocess.PIPE,
                process_group=0,
                preexec_fn=dies_with_agent,  # noqa: PLW1509 - only a system call, whose code is loaded before the fork
            )
            self._children.append(child)
            self._alive.add(child.pid)
            threading.Thread(target=self._watch, args=(local_rank, child), daemon=True).start()

    def result(self) -> int | None:
        """None while it runs; then 0, or the code of the first of its processes that failed (128 + n for signal n)."""
        failed = [code for code in self._codes.values() if code]
        if failed:
            return failed[0]
        return 0 if self.ended() else None

    @property
    def pids(self) -> frozenset[int]:
        """Those of its processes that run; each leads a process group."""
        with self._signalling:
            return frozenset(self._alive)

    def ended(self) -> bool:
        """Whether all of its processes are gone."""
        return len(self._codes) == len(self._children)

    def stop(self, *, grace: float, patient: Callable[[], bool]) -> None:
        """Ends what still runs, and its children: SIGTERM, and SIGKILL after the grace. Returns when all are gone.

        patient: whether it may take its time, since another process (the kubelet) ends a program that takes too long.
        """
        self.signal(signal.SIGTERM)
        with self._changed:
            self._changed.wait_for(lambda: self.ended() or patient(), grace)
            if patient():
                self._changed.wait_for(self.ended)
        self.signal(signal.SIGKILL)
        with self._changed:
            self._changed.wait_for(self.ended)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to what still runs, once: the handler of a program that saves its state must not be entered twice."""
        for reader in self._readers:
            reader.hurry()
        with self._signalling:
            if number not in self._signalled:
                self._signalled.add(number)
                for pid in self._alive:
                    os.killpg(pid, number)

    def failure(self, code: int) -> ProgramFailed:
        """The error of a program that failed: the exception that ended it, and the last frame of its traceback that is the user's."""
        first = next((rank for rank, ended in self._codes.items() if ended == code), 0)
        return failure_of(code, self._lines[first].all(), name=self._name)

    def _watch(self, local_rank: int, child: subprocess.Popen[bytes]) -> None:
        """Tells when the process is gone; its children, which may hold its output for as long as they like, go with it."""
        assert child.stderr is not None
        reader = self._readers[local_rank] if self._readers else None
        ends, running = os.pipe()
        threads = [_hand_on(child.stderr, sys.stderr.buffer, ends, self._lines[local_rank].feed, *_takers(reader, 2))]
        if child.stdout is not None:
            threads.append(_hand_on(child.stdout, sys.stdout.buffer, ends, *_takers(reader, 1)))
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with self._signalling:
            self._alive.discard(child.pid)
            with contextlib.suppress(PermissionError):  # a child that changed its user
                os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        os.close(running)
        drained_by = time.monotonic() + DRAIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, drained_by - time.monotonic()))
        if not any(thread.is_alive() for thread in threads):
            os.close(ends)
        if reader is not None:
            reader.end()
        with self._changed:
            self._codes[local_rank] = 128 - code if code < 0 else code
            self._changed.notify_all()


def _hand_on(source: IO[bytes], sink: BinaryIO, ends: int, *takers: Callable[[bytes], None]) -> threading.Thread:
    """A thread that writes what comes to the sink as it comes, unchanged: a progress bar ends no line. Then the takers get it.

    ends: a descriptor that can be read once the process has ended. Then the thread reads what the source holds, and ends with it: a
    process that has left the group may hold the source open for ever.
    """

    def run() -> None:
        with source:
            for data in _pieces(source.fileno(), ends):
                sink.write(data)
                sink.flush()
                for take in takers:
                    take(data)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _pieces(source: int, ends: int) -> Iterator[bytes]:
    """What can be read of the source until its end; after the end of the process only what is there."""
    waiting = select.poll()
    for descriptor in (source, ends):
        waiting.register(descriptor, select.POLLIN)
    over, left = False, MOST_LEFT
    while left > 0:
        ready = {descriptor for descriptor, _ in waiting.poll(0 if over else None)}
        if source in ready:
            data = os.read(source, 65536)
            if not data:
                return
            yield data
            left -= len(data) if over else 0
        elif over:
            return
        else:
            over = True


def _takers(reader: OutputReader | None, stream: int) -> list[Callable[[bytes], None]]:
    return [functools.partial(reader.feed, stream)] if reader is not None else []


class _Lines:
    """The end of what a process writes to standard error."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._rest = ""

    def feed(self, data: bytes) -> None:
        """More of it."""
        *lines, self._rest = (self._rest + data.decode(errors="replace")).replace("\r", "\n").split("\n")
        self._lines.extend(line[-LONGEST_LINE:] for line in lines)
        self._rest = self._rest[-LONGEST_LINE:]

    def all(self) -> list[str]:
        """The last lines, without empty ones."""
        return [line for raw in [*self._lines, self._rest] if (line := _RANK.sub("", raw)).strip()]


def failure_of(code: int, lines: Sequence[str], *, name: str = "script") -> ProgramFailed:
    """What a program with this exit code and these last lines failed of. Only a traceback tells a reason, and only where no signal ended
    the program: what it printed last before it was killed, such as a progress line, is no reason."""
    how = f"the {name} ended with code {code}"
    if code > 128:
        with contextlib.suppress(ValueError):  # a program may answer with any code
            how = f"the {name} was killed by {signal.Signals(code - 128).name} ({code})"
    else:
        last_line, where = find_cause(lines)
        if where:
            return ProgramFailed(code, how, last_line=last_line, where=where)
    output = f"{how}; last output: {lines[-1].strip()}" if lines else how
    return ProgramFailed(code, how, last_line=output)


def find_cause(lines: Sequence[str]) -> tuple[str, str]:
    """The exception that ended a program, and file:line of the user's code in its traceback; without one, the last line.

    What is printed after it, such as a library's warning at exit, is not the cause.
    """
    begins = [
        number
        for number, line in enumerate(lines)
        if line.startswith(_TRACEBACK) and not (number and lines[number - 1].startswith(_NOBODYS))
    ]
    trace = lines[begins[-1] + 1 :] if begins else lines
    output = (
        next((number for number, line in enumerate(trace) if not line[0].isspace()), len(trace))
        if begins
        else len(trace)
    )
    frames = [match.groups() for line in trace[:output] if (match := _FRAME.match(line))]
    own = [frame for frame in frames if not any(part in frame[0] for part in _FRAMEWORK)] or frames
    cause = trace[output] if output < len(trace) else lines[-1] if lines else ""
    return cause.strip(), ":".join(own[-1]) if own else ""
