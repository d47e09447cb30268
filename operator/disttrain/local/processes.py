"""One process of a local run, in the place of a pod: started in a session of its own, its lines kept, its end noticed at once.

Not here: which process runs (plan), what it gets (programs.py), and what happens if we are killed (guard.py).
"""

import asyncio
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, BinaryIO

from disttrain.api.environment import POD_UID
from disttrain.api.names import Role, label
from disttrain.api.termination import Termination
from disttrain.local.guard import kill_all
from disttrain.logs import last_state

_LINE_LIMIT = 64 * 1024


@dataclass(kw_only=True, eq=False)
class Process:
    """A replica that was started. `exit_code` is None while it runs."""

    name: str
    uid: str
    role: Role
    index: int
    attempt: int
    metrics_port: int
    log: Path
    termination_log: Path
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished: datetime | None = None
    exit_code: int | None = None
    not_started: str = ""
    """Why the program could not be started at all."""
    deleting: bool = False
    _child: subprocess.Popen[bytes] | None = None
    _over: bool = False
    """The program has ended; what it started may not have."""
    _last_line: str = ""
    _grace_seconds: float | None = None
    """Grace period of a stop that was asked for; it may be asked for before the program is there."""
    _kill_timer: asyncio.TimerHandle | None = None

    @property
    def label(self) -> str:
        """The short name before each line: worker-1, ps-0, master."""
        return label(self.role, self.index)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.finished is None

    @property
    def running(self) -> bool:
        """Whether the program was started and still runs."""
        return self._child is not None and self.alive

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._child.pid if self._child is not None and self.running else None

    @property
    def reason(self) -> str:
        """Why it failed, in the words that Kubernetes has for a container."""
        if self.not_started:
            return "StartError"
        return "Error" if self.exit_code else ""

    def termination(self) -> Termination:
        """Its termination message; empty when it left none."""
        if self.not_started:
            return Termination(message=self.not_started)
        try:
            return Termination.decode(self.termination_log.read_text(errors="replace"))
        except OSError:
            # As terminationMessagePolicy FallbackToLogsOnError: the end of the log says most.
            return Termination(message=self._last_line if self.exit_code else "")

    async def run(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[["Process", str], None],
        tell_guard: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Starts the program and returns when it, and all that it started, has ended. The guard gets its session (guard.py)."""
        try:
            child = self._child = subprocess.Popen(  # noqa: ASYNC220 - it blocks until exec alone, a millisecond
                [_encoded(word) for word in arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={name: _encoded(value) for name, value in {**environment, POD_UID: self.uid}.items()},
                start_new_session=True,  # Ctrl-C is for us; we then end our processes in order
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL among the arguments
            # What a shell answers: 127 not found, 126 found but not runnable.
            why = error.strerror if isinstance(error, OSError) else None
            self.not_started = f"cannot start {arguments[0]!r}: {why or error}"
            self._ended(127 if isinstance(error, FileNotFoundError) else 126)
            on_line(self, self.not_started)
            return
        tell_guard(f"+{child.pid}")
        if self._grace_seconds is not None:
            self.stop(self._grace_seconds)

        def keep(line: str) -> None:
            self._last_line = line.strip() or self._last_line
            on_line(self, line)

        assert child.stdout is not None
        output = _Output(child.stdout, self.log, keep)
        try:
            await _end_of(child)
            self._over = True
            # The end of a container's first process is the end of all of them.
            await asyncio.to_thread(kill_all, POD_UID, self.uid, frozenset({child.pid}))
            child.wait()  # only now: until then no other process gets its number, which is that of its session
            tell_guard(f"-{child.pid}")
        finally:
            output.finish()
        self._ended(child.returncode if child.returncode >= 0 else 128 - child.returncode)

    def stop(self, grace_seconds: float) -> None:
        """SIGTERM, once, and SIGKILL if it still runs after the grace period. Returns at once; a later call can only shorten the period."""
        if self._grace_seconds is None or grace_seconds < self._grace_seconds:
            self._grace_seconds = grace_seconds
        if self._child is None or self._over:
            return
        if grace_seconds <= 0:
            self._kill()
            return
        loop = asyncio.get_running_loop()
        kill_at = loop.time() + grace_seconds
        if self._kill_timer is None:
            # Not Popen's own method, which would wait for a child that has just ended, and free its number.
            os.kill(self._child.pid, signal.SIGTERM)
        elif self._kill_timer.when() <= kill_at:
            return
        else:
            self._kill_timer.cancel()
        self._kill_timer = loop.call_at(kill_at, self._kill)

    def _kill(self) -> None:
        if self._child is not None and not self._over:
            os.kill(self._child.pid, signal.SIGKILL)

    def _ended(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.finished = datetime.now(UTC)
        if self._kill_timer is not None:
            self._kill_timer.cancel()


async def _end_of(child: subprocess.Popen[bytes]) -> None:
    """Waits for the end of the process itself. asyncio's own `wait` also waits for the pipe, which a grandchild may hold."""
    ended = asyncio.Event()
    descriptor = os.pidfd_open(child.pid)
    asyncio.get_running_loop().add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


class _Output:
    """What a process prints: copied to its log as it comes, and handed on line by line; a line without an end is cut at 64 KiB."""

    def __init__(self, pipe: IO[bytes], log: Path, on_line: Callable[[str], None]) -> None:
        self._pipe = pipe
        self._on_line = on_line
        self._log = _Log(log, on_line)
        self._rest = b""
        os.set_blocking(pipe.fileno(), False)
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._read)

    def finish(self) -> None:
        """All that could print has ended: reads what is in the pipe. A process that got away may hold the pipe open, and print for ever:
        no more is read than a pipe holds."""
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        left = fcntl.fcntl(self._pipe, fcntl.F_GETPIPE_SZ)
        while left > 0 and (size := self._read()):
            left -= size
        self._pipe.close()
        self._log.close()
        if self._rest:
            self._on_line(last_state(self._rest))

    def _read(self) -> int:
        """Takes what is there, at most 64 KiB; how much that was: 0 where the pipe is empty, or at its end."""
        try:
            chunk = os.read(self._pipe.fileno(), _LINE_LIMIT)
        except BlockingIOError:
            return 0
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            return 0
        self._log.write(chunk)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LINE_LIMIT:
            whole, self._rest = [*whole, self._rest], b""
        for line in whole:
            self._on_line(last_state(line))
        return len(chunk)


class _Log:
    """The log of a replica. A disk that is full costs the log, and not the training."""

    def __init__(self, path: Path, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)

    def write(self, chunk: bytes) -> None:
        if self._file is not None:
            try:
                self._file.write(chunk)
            except OSError as error:
                self.close()
                self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        self._on_line(f"its log ends here: {error.strerror}")


def _encoded(text: str) -> bytes:
    """As a program gets it: as it was inherited, or what the locale has no bytes for as UTF-8, which is what a file of a job is in."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode(errors="surrogateescape")
