"""The first process of a pod of our own loop: loads what its processes need once, forks them, and starts one again that is lost.

It stays the parent, and has one thread: a thread of Python's that held a lock while the process forks would leave it locked in the child.
Here: processes and signals. Whether one is started again decides in_place.py; what a process does is the caller's.
"""

import contextlib
import ctypes
import gc
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, NoReturn

from disttrain.api import environment
from disttrain.api.environment import ExitCode
from disttrain.api.names import Role
from disttrain.api.runtime import RestartsInPlace
from disttrain.api.termination import Termination
from disttrain_trainer.errors import CRASHED, Terminated, TrainerError, WrongInput
from disttrain_trainer.runtime import in_place, logs, machine, script_runner
from disttrain_trainer.runtime.in_place import End, StepCell
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)

EXIT_SECONDS = 30.0
"""Seconds for threads, child processes and exit handlers of user code. A failed process that never ends would never be replaced."""


class CannotStart(TrainerError):
    """The machine has no room for another process, as after a fork bomb of user code. The pod ends, and its replacement is counted."""

    exit_code: ClassVar = CRASHED  # type: ignore[assignment]


_FORWARDED = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a process of the pod is started with."""

    local_rank: int
    metrics: Path | None
    """Socket file at which it answers with its metrics; None: it serves the port of the pod itself."""
    restarts: RestartsInPlace | None
    """Those of the pod so far."""


@dataclass(slots=True)
class _Rank:
    """One training process of the pod, and those before it."""

    number: int
    step: StepCell = field(default_factory=StepCell)
    pid: int | None = None
    oom_kills: int = 0
    """Processes of the pod that the memory limit had killed when it began."""
    due: float | None = None
    """When it is started again, by time.monotonic."""
    ends: list[End] = field(default_factory=list)
    done: bool = False


class Launcher:
    """The processes of one pod.

    run_rank: a training process to its end, in the child; its exit code. serve_metrics: answers for all of them at the pod's port, in a
    process of its own, from their socket files; it returns when it serves.
    """

    def __init__(
        self, process: Process, *, run_rank: Callable[[Place], int], serve_metrics: Callable[[list[Path]], None]
    ) -> None:
        self._process = process
        self._run_rank = run_rank
        self._serve_metrics = serve_metrics
        count = process.config.processes_per_worker if process.role is Role.WORKER else 1
        self._ranks = [_Rank(number) for number in range(count)]
        self._restarted: list[tuple[datetime, End]] = []
        self._metrics_pid: int | None = None
        self._terminated = False

    @property
    def restarts(self) -> RestartsInPlace | None:
        """The restarts in place so far; None where there are none."""
        return in_place.account(self._process.pod, self._restarted) if self._process.pod else None

    def run(self) -> tuple[int, Termination | None]:
        """Until all processes are done, or one ended that is not started again: its exit code, and the termination message of the pod.

        Raises WrongInput when there is no folder for temporary files, CannotStart when there is no room for a process.
        """
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="disttrain-"))
        except OSError as error:
            raise WrongInput(f"no temporary folder can be made: {error}; free space there, or set TMPDIR") from None
        try:
            with _signals() as signals:
                self._start_metrics()
                for rank in self._ranks:
                    self._start(rank)
                code, message = self._supervise(signals)
        finally:
            self._kill_all()
            shutil.rmtree(self._folder, ignore_errors=True)
        restarts = self.restarts
        if restarts is not None:
            message = (message or Termination()).model_copy(update={"restarts_in_place": restarts})
        return code, message

    def _supervise(self, signals: socket.socket) -> tuple[int, Termination | None]:
        while True:
            for pid, code, by_signal in self._ended():
                if pid == self._metrics_pid and by_signal:
                    self._start_metrics()
                rank = next((rank for rank in self._ranks if rank.pid == pid), None)
                if rank is not None and (result := self._judge(rank, code, by_signal)) is not None:
                    return result
            if all(rank.done for rank in self._ranks):
                return (
                    (Terminated.exit_code, _BY_SIGTERM)
                    if self._terminated and len(self._ranks) > 1
                    else (0, Termination(done=True))
                )
            now = time.monotonic()
            for rank in self._ranks:
                if rank.due is not None and rank.due <= now:
                    self._start(rank)
            moments = [rank.due for rank in self._ranks if rank.due is not None]
            select.select([signals], [], [], max(0.0, min(moments) - time.monotonic()) if moments else None)
            with contextlib.suppress(BlockingIOError):
                for number in signals.recv(64):
                    if number in _FORWARDED:
                        self._forward(signal.Signals(number))
            if self._terminated and all(rank.pid is None for rank in self._ranks):
                return Terminated.exit_code, _BY_SIGTERM  # in the pause before a restart

    def _ended(self) -> Iterator[tuple[int, int, bool]]:
        """The children that have ended, orphans that the kernel gave to the first process included: pid, exit code, whether by a signal.

        What a process started goes with it, as long as it is in its group, which is killed before the number of the group is free again.
        """
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            if info.si_pid in (rank.pid for rank in self._ranks):
                with contextlib.suppress(PermissionError):  # a child that changed its user
                    os.killpg(info.si_pid, signal.SIGKILL)
            os.waitpid(info.si_pid, 0)
            by_signal = info.si_code != os.CLD_EXITED
            yield info.si_pid, 128 + info.si_status if by_signal else info.si_status, by_signal

    def _judge(self, rank: _Rank, code: int, by_signal: bool) -> tuple[int, Termination | None] | None:
        """What the end of a process means for the pod; None: the pod goes on."""
        rank.pid = None
        message = self._message_of(rank)
        if message is not None and message.done:
            rank.done = True
            return None
        oom = machine.oom_kills() > rank.oom_kills
        end = End(code=code, by_signal=by_signal, step=rank.step.step, out_of_memory=oom)
        rank.ends.append(end)
        rules = self._process.config.exit_codes_of_rules
        if self._process.pod and not self._terminated and in_place.restarts(rank.ends, codes_of_rules=rules):
            self._restarted.append((datetime.now(UTC), end))
            wait = in_place.pause(rank.ends)
            rank.due = time.monotonic() + wait
            soon = f"in {wait:g} s" if wait else "at once"
            log.warning("%s: %s; it is started again in this pod %s", self._name(rank), end, soon)
            return None
        if len(self._ranks) == 1:
            if message is None and by_signal and (self._restarted or end.memory_limit):
                again = f", {in_place.SAME_ENDS} times in a row" if in_place.repeats(rank.ends) else ""
                message = Termination(message=f"the process was {end}{again}")
            if message is None and self._terminated and code == Terminated.exit_code:
                message = _BY_SIGTERM  # before it had handlers that say so
            return code, message
        return self._of_several(rank, code, message or Termination())

    def _of_several(self, rank: _Rank, code: int, message: Termination) -> tuple[int, Termination]:
        """The end of the pod by one of several processes."""
        if self._terminated:
            return Terminated.exit_code, _BY_SIGTERM
        how = f"{self._name(rank)} ended with code {code}"
        if code == ExitCode.DONE:
            code = CRASHED
            how = f"{self._name(rank)} ended with exit code 0 before the job was done: something in it called exit"
        log.error("%s", how)
        return code, Termination(message=message.message or how, where=message.where)

    def _name(self, rank: _Rank) -> str:
        pod = f"{self._process.role.value}-{self._process.index}"
        return f"training process {rank.number} of {pod}" if len(self._ranks) > 1 else f"the process of {pod}"

    def _message_of(self, rank: _Rank) -> Termination | None:
        path = self._message_path(rank)
        return Termination.decode(path.read_text()) if path.exists() else None

    def _message_path(self, rank: _Rank) -> Path:
        return self._folder / f"message-{rank.number}"

    def _sockets(self) -> list[Path]:
        return [self._folder / f"metrics-{rank.number}" for rank in self._ranks] if len(self._ranks) > 1 else []

    def _start(self, rank: _Rank) -> None:
        sockets = self._sockets()
        metrics = sockets[rank.number] if sockets else None
        for left in (self._message_path(rank), metrics):
            if left is not None:
                left.unlink(missing_ok=True)
        rank.due, rank.step.step, rank.oom_kills = None, in_place.NO_STEP, machine.oom_kills()
        place = Place(local_rank=rank.number, metrics=metrics, restarts=self.restarts)

        def work() -> int:
            process = self._process
            number = process.index * process.config.processes_per_worker + rank.number
            if process.role is Role.WORKER:
                os.environ[environment.RANK] = str(number)
                os.environ[environment.LOCAL_RANK] = str(process.config.local_rank(number))
            os.environ[environment.TERMINATION_LOG] = str(self._message_path(rank))
            in_place.own = rank.step
            return self._run_rank(place)

        rank.pid = _fork(work)

    def _start_metrics(self) -> None:
        sockets = self._sockets()
        if not sockets:
            return

        def work() -> int:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it answers until the last process is done
            self._serve_metrics(sockets)
            while True:
                signal.pause()

        self._metrics_pid = _fork(work)

    def _forward(self, number: signal.Signals) -> None:
        self._terminated = True
        for rank in self._ranks:
            rank.due = None
            if rank.pid is not None:
                os.kill(rank.pid, number)  # it is not reaped: no other process has its number

    def _kill_all(self) -> None:
        """What still runs, and its children."""
        for pid in (*(rank.pid for rank in self._ranks), self._metrics_pid):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


_BY_SIGTERM = Termination(message="ended by SIGTERM")


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that has a byte for each signal, whichever thread of a library the kernel gave it to."""
    reading_end, writing_end = socket.socketpair()
    reading_end.setblocking(False)
    writing_end.setblocking(False)
    numbers = (*_FORWARDED, signal.SIGCHLD)
    before = [signal.signal(number, _note) for number in numbers]
    old = signal.set_wakeup_fd(writing_end.fileno(), warn_on_full_buffer=False)
    try:
        with reading_end, writing_end:
            yield reading_end
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _note(_signal: int, _frame: object) -> None:
    """The wake-up descriptor has it."""


def _fork(work: Callable[[], int]) -> int:
    """The number of a child that does this work, in a process group of its own, and dies with this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # a collection in the child would write to every object, and copy the memory that the two share
    parent = os.getpid()
    # A signal to the child before it has handlers of its own waits until it has.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        pid = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        raise CannotStart(
            f"no process can be started in this pod: {error.strerror}; end what user code has started, or raise the limit of memory or "
            "processes"
        ) from None
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it did so itself, or has ended
            os.setpgid(pid, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        return pid
    _be_child(parent, work)


def _be_child(parent: int, work: Callable[[], int]) -> NoReturn:
    code = CRASHED
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        machine.note_interrupts()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(Terminated.exit_code))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        machine.die_with_parent(parent)
        code = work()
    finally:
        script_runner.leave(code, timeout_seconds=EXIT_SECONDS)


def trim_memory() -> None:
    """Gives memory that imports have used and freed back, before it is shared by a fork."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
