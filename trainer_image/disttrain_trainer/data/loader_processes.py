"""Processes that load the batches of coming parts while this process computes: trainer.loaderWorkers.

A batch is asked for, and kept, by its key: the number of its part, and that of the batch in it. What a part holds is a function of its
number (schedule.py), and what its samples draw is one of theirs (chance.py). So a batch is right whenever it comes, and one that was
foreseen wrongly is thrown away.

Why not torch's DataLoader: it asks its sampler for another batch when one is taken out. The parts of a worker are known at other times, and
change: another worker computes one, or a round is lost. Nor does it see at once that one of its processes was killed.
"""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

import torch
import torch.multiprocessing  # its tensors travel in shared memory
from torch.utils.data import get_worker_info
from torch.utils.data._utils import worker as torch_worker

from disttrain_trainer.data.loader_failure import Failure
from disttrain_trainer.errors import LoaderLost, UserError
from disttrain_trainer.runtime import forked, logs, machine

log = logs.get_logger(__name__)

Key = tuple[int, int]
"""The number of a part in the job, and of a batch in the part."""
AHEAD_EACH: Final = 2
"""Batches that each process has to load or has loaded, as with torch's DataLoader (prefetch_factor)."""
_NO_MORE_FILES: Final = (os.strerror(errno.EMFILE), os.strerror(errno.ENFILE), "received 0 items of ancdata")
"""What a batch cannot be received of; the last one is Python's, where the kernel could not hand a file over."""
_END_SECONDS: Final = 1.0
"""For a process whose pipe is closed to be gone."""
Around = Callable[[], AbstractContextManager[None]]


class NotForeseen(Exception):
    """No process was asked for the batch: this one loads it."""


class _Loader:
    """One process. Changed with the lock of LoaderProcesses held."""

    def __init__(self, number: int, process: Any, requests: Connection, answers: Connection) -> None:
        self.number = number
        self.process = process
        self.requests = requests
        self.answers = answers
        self.asked: list[Key] = []
        """What it was asked for and has not answered, oldest first."""


class LoaderProcesses:
    """The loader processes of one training process. For the training thread; a thread of its own receives what they have loaded."""

    def __init__(
        self,
        count: int,
        load: Callable[[Key], Any],
        *,
        dataset: Any,
        around: Around,
        receive: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """Forks them; they live until `close`, or as long as this process, and belong to the thread that calls this.

        load: makes the batch of a key, in such a process. around: entered there before. dataset: for torch's get_worker_info.
        receive: what becomes of a batch as it comes, in the thread that receives.
        """
        self.ahead = AHEAD_EACH * count
        """Batches beyond the one that is needed now that are loaded before it is taken, at most: each takes memory, and a file for each of
        its tensors."""
        self._receive = receive
        self._changed = threading.Condition()
        self._ready: dict[Key, Any] = {}
        self._wanted: dict[Key, None] = {}
        self._unasked: deque[Key] = deque()
        """Those of them that wait until others are taken, soonest first."""
        self._lost: str | None = None
        self._closed = False
        self._oom_kills = machine.oom_kills()
        self._loaders: list[_Loader] = []
        context = multiprocessing.get_context("fork")  # no other one takes a data set as it is
        for number in range(count):
            taken_requests, requests = context.Pipe(duplex=False)
            answers, sent_answers = context.Pipe(duplex=False)
            ours = [requests, answers, *(end for other in self._loaders for end in (other.requests, other.answers))]
            process = context.Process(
                target=_serve,
                args=(os.getpid(), load, taken_requests, sent_answers, ours, around, (number, count, dataset)),
                name=f"loader process {number}",
                daemon=True,
            )
            process.start()
            # Only the process has these now: their end is its end.
            taken_requests.close()
            sent_answers.close()
            self._loaders.append(_Loader(number, process, requests, answers))
        self._thread = threading.Thread(target=self._run, name="loaders", daemon=True)
        self._thread.start()

    def foresee(self, now: Iterable[Key], coming: Iterable[Key]) -> None:
        """The batches that are needed now, and those that will be after them, as far as that is known, soonest first. What was
        foreseen before and is not among them is thrown away. Does not block. Raises LoaderLost."""
        wanted = dict.fromkeys([*now, *islice(coming, self.ahead)])
        with self._changed:
            self._check()
            self._wanted = wanted
            for key in [key for key in self._ready if key not in wanted]:
                del self._ready[key]
            outstanding = {key for loader in self._loaders for key in loader.asked}
            self._unasked = deque(key for key in wanted if key not in self._ready and key not in outstanding)
            self._ask_more()

    def take(self, key: Key) -> Any:
        """A batch that was foreseen; waits for it. Raises NotForeseen for another one, LoaderLost, and what loading it raised."""
        with self._changed:
            while key not in self._ready:
                self._check()
                if not any(key in loader.asked for loader in self._loaders):
                    raise NotForeseen(key)
                self._changed.wait()
            found = self._ready.pop(key)
            self._ask_more()
        if isinstance(found, Failure):
            found.throw()
        return found

    def close(self) -> None:
        """Ends the processes, and waits until they are gone."""
        with self._changed:
            self._closed = True
        for loader in self._loaders:
            loader.process.kill()
        self._thread.join()
        for loader in self._loaders:
            loader.process.join()
            loader.requests.close()
            loader.answers.close()

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [loader.process.pid for loader in self._loaders]

    def _ask_more(self) -> None:
        """Asks for batches, as many as may be there at a time."""
        asked = sum(key in self._wanted for loader in self._loaders for key in loader.asked)
        for _ in range(min(len(self._unasked), 1 + self.ahead - asked - len(self._ready))):
            self._ask(min(self._loaders, key=lambda loader: len(loader.asked)), self._unasked.popleft())

    def _ask(self, loader: _Loader, key: Key) -> None:
        loader.asked.append(key)
        with contextlib.suppress(OSError):  # it is gone, which the thread sees
            loader.requests.send(key)  # of some bytes: the pipe has room for them

    def _check(self) -> None:
        if self._lost is not None:
            raise LoaderLost(self._lost)

    # In the thread that receives.

    def _run(self) -> None:
        loaders = {loader.answers: loader for loader in self._loaders}
        while loaders and self._lost is None:
            for answers in wait(list(loaders)):
                assert isinstance(answers, Connection)
                loader = loaders[answers]
                try:
                    found = self._received(answers.recv_bytes(), loader.asked[0])
                except (EOFError, OSError):  # a tensor comes through a socket of the process
                    del loaders[answers]
                    self._lose(loader)
                    continue
                with self._changed:
                    key = loader.asked.pop(0)  # it answers in the order of the requests
                    if key in self._wanted:
                        self._ready[key] = found
                    self._changed.notify_all()

    def _received(self, message: bytes, key: Key) -> Any:
        """Raises OSError where the process is gone."""
        try:
            found = ForkingPickler.loads(message)
            return found if isinstance(found, Failure) or key not in self._wanted else self._receive(found)
        except Exception as error:
            if any(said in str(error) for said in _NO_MORE_FILES):
                return Failure.of(
                    UserError(
                        "trainer.loaderWorkers: too many open files: each tensor of a batch that is loaded has one: lower loaderWorkers, "
                        "or raise the limit of open files (ulimit -n)"
                    )
                )
            if isinstance(error, EOFError | OSError):
                raise
            return Failure.of(error)

    def _lose(self, loader: _Loader) -> None:
        if self._closed:
            return
        ended_by = time.monotonic() + _END_SECONDS
        while loader.process.exitcode is None and time.monotonic() < ended_by:
            time.sleep(0.01)
        loader.process.kill()  # where it lives on: user code has closed the pipe
        loader.process.join()
        with self._changed:
            if self._lost is None:
                self._lost = self._how(loader)
            self._changed.notify_all()

    def _how(self, loader: _Loader) -> str:
        """How a process ended, as one line."""
        code, at = loader.process.exitcode, ""
        if loader.asked:
            at = f" while it loaded part {loader.asked[0][0]}"
        who = f"loader process {loader.number} of {len(self._loaders)} (trainer.loaderWorkers)"
        if code == -signal.SIGKILL and machine.oom_kills() > self._oom_kills:
            return f"{who} was killed by the memory limit{at}: lower loaderWorkers, or raise the memory of the worker"
        if code == -signal.SIGBUS:
            return f"{who} was killed by SIGBUS{at}: /dev/shm is full, through which batches come: lower loaderWorkers, or give it more"
        if code is not None and code < 0:
            return f"{who} was killed by {signal.Signals(-code).name}{at}"
        return f"{who} ended with exit code {code}{at}: the code of trainer.dataset or trainer.collate ended it"


def _serve(
    parent: int,
    load: Callable[[Key], Any],
    requests: Connection,
    answers: Connection,
    others: list[Connection],
    around: Around,
    place: tuple[int, int, Any],
) -> None:
    """A loader process, to its end. others: ends of pipes that are the parent's. place: number, how many there are, the data set."""
    forked.become_helper(parent)
    for connection in others:
        connection.close()
    torch.set_num_threads(1)
    number, count, dataset = place
    # What torch's get_worker_info returns here, as in a process of its DataLoader: data sets ask it whether they are in one, and
    # default_collate then puts a batch into shared memory at once.
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=number, num_workers=count, seed=torch.initial_seed(), dataset=dataset
    )
    assert get_worker_info() is not None
    with around():
        while True:
            try:
                key = requests.recv()
            except EOFError:
                return
            _flush()
            answers.send_bytes(_answer(load, key))


def _answer(load: Callable[[Key], Any], key: Key) -> memoryview:
    try:
        batch = load(key)
    except BaseException as error:
        return ForkingPickler.dumps(Failure.of(error))
    finally:
        _flush()
    try:
        return ForkingPickler.dumps(batch)
    except Exception as error:
        wrong = UserError(
            f"trainer.collate or trainer.dataset gives a batch that cannot be sent from a loader process, {type(batch).__name__}: "
            f"{type(error).__name__}: {error}: give tensors, arrays, numbers, or tuples and dicts of these, or set loaderWorkers to 0"
        )
        return ForkingPickler.dumps(Failure.of(wrong))


def _flush() -> None:
    """What user code printed is to be seen, though this process ends with its parent."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
