"""c10d's backend `disttrain`: gloo's operations, whose waits end when the round ends.

DDP, FSDP2, DTensor, pipelines and functional collectives all reach a group through this class, so none of them needs to know that a
peer can be lost. gloo ends a wait when a connection closes. For a peer that is frozen it has no such end, and it does not let go of a
receive or send that is half done (Pair::signalException passes over those); so the wait is ours, and looks at the round from time to
time. That costs nothing where the operation ends by itself.
"""

import _thread
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroupGloo, Work
from torch.futures import Future

from disttrain_trainer.parallel.traffic import Traffic

NAME: Final = "disttrain"
"""As init_process_group knows it, once `register` was called."""
ENDED: Final = "it ended within a step"
_POLL_INTERVAL: Final = timedelta(milliseconds=50)
"""How long a wait goes on after the end of its round, at most."""
_NO_LIMIT: Final = timedelta(0)
_SOURCE: Final = re.compile(r"^\[\S+\.(?:cc|cpp|h):\d+\] ")
"""Where in gloo's source an error was raised: for its own authors."""
_UNUSED_TAG: Final = 2**31 - 1
"""Of a message that no rank sends."""


class BrokenGroup(Exception):
    """A peer, or the connection to it, is lost: this round is over."""

    def __init__(self, error: Exception | str) -> None:
        super().__init__(_SOURCE.sub("", str(error).strip().split("\n")[0]))


class RoundEnd:
    """The end of a round, for all of its groups: set once, by any thread."""

    def __init__(self) -> None:
        self.reached = False
        self._lock = threading.Lock()
        self._futures: set[_EndableFuture] = set()

    def reach(self) -> None:
        """The round ends, and with it the waits for its futures."""
        with self._lock:
            self.reached = True
            futures, self._futures = self._futures, set()
        for future in futures:
            future.break_off()

    def ends(self, future: "_EndableFuture") -> None:
        """The end of the round breaks off this future, at once if it is reached."""
        with self._lock:
            if not self.reached:
                self._futures.add(future)
                return
        future.break_off()

    def forget(self, future: "_EndableFuture") -> None:
        """The operation of this future is done."""
        with self._lock:
            self._futures.discard(future)

    def check(self) -> None:
        """Raises BrokenGroup after the end."""
        if self.reached:
            raise BrokenGroup(ENDED)


class _EndableFuture:
    """The future of an operation of gloo's, which the end of the round completes, too: gloo's own may wait for its time-out."""

    def __init__(self, inner: Future[Any], round_end: RoundEnd) -> None:
        self._inner = inner
        self._round_end = round_end
        self._lock = threading.Lock()
        self._is_over = self._is_broken_off = False
        self._gate: Future[None] = Future()
        # A callback that raises is how Python gives an error to who waits in C++; set_exception is seen from Python alone.
        self.outer = self._gate.then(self._value)
        round_end.ends(self)
        inner.add_done_callback(self._finish)

    def break_off(self) -> None:
        """The round is over."""
        self._complete(is_broken_off=True)

    def _finish(self, _: Future[Any]) -> None:
        self._round_end.forget(self)
        self._complete(is_broken_off=False)

    def _complete(self, *, is_broken_off: bool) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over, self._is_broken_off = True, is_broken_off
        self._gate.set_result(None)

    def _value(self, _: Future[None]) -> Any:
        if self._is_broken_off:
            raise BrokenGroup(ENDED)
        return self._inner.value()


class _Collective(Work):
    """An operation that a thread of gloo's carries out.

    torch hands out a holder of it that forwards `wait` and `get_future` alone: what else a Work has does not answer truly there.
    """

    def __init__(self, inner: Work, round_end: RoundEnd) -> None:
        super().__init__()
        self._inner = inner
        self._round_end = round_end

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Blocks until the operation is done: its tensors are whole then. Raises BrokenGroup when a peer is lost or the round ends, and
        RuntimeError after `timeout`, if there is one."""
        try:
            return self._inner.wait(_POLL_INTERVAL)
        except RuntimeError:
            pass  # it is still under way, or has failed: then it says so once more
        last = time.monotonic() + timeout.total_seconds() if timeout else float("inf")
        while not self._completed_within(_POLL_INTERVAL):
            self._round_end.check()
            if time.monotonic() > last:
                raise RuntimeError(f"the operation took longer than {timeout}")
        try:
            return self._inner.wait()
        except RuntimeError as error:
            raise BrokenGroup(error) from None

    def get_future(self) -> Future[Any]:
        """For torch's DDP, which waits for it in C++."""
        return _EndableFuture(self._inner.get_future(), self._round_end).outer

    def _completed_within(self, limit: timedelta) -> bool:
        with suppress(RuntimeError):
            self._inner.wait(limit)
        return self._inner.is_completed()


class _Message(Work):
    """A send or a receive. gloo closes all connections when a wait for one has a limit, so a thread waits without one."""

    def __init__(self, inner: Work, round_end: RoundEnd, waiters: "_Waiters") -> None:
        super().__init__()
        self._inner: Work | None = inner
        self._round_end = round_end
        self._waiters = waiters
        self._error: RuntimeError | None = None
        self._pending: _thread.LockType | None = None
        """Held until the message is sent or received; None before the first wait."""

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """As that of a collective."""
        if (pending := self._pending) is None:
            pending = self._pending = _thread.allocate_lock()
            pending.acquire()
            self._waiters.give(self)
        last = time.monotonic() + timeout.total_seconds() if timeout else float("inf")
        while not pending.acquire(timeout=_POLL_INTERVAL.total_seconds()):
            self._round_end.check()
            if time.monotonic() > last:
                raise RuntimeError(f"the message took longer than {timeout}")
        pending.release()
        if self._error is not None:
            raise BrokenGroup(self._error) from None
        return True

    def await_inner(self) -> None:
        """In a waiter's thread."""
        inner, self._inner = self._inner, None
        assert inner is not None
        try:
            inner.wait()
        except RuntimeError as error:
            self._error = error

    def done(self) -> None:
        """Ends the wait."""
        assert self._pending is not None
        self._pending.release()


class _Waiters:
    """The threads in which messages of a group are waited for: as many as threads wait at once, each for one message after the other."""

    def __init__(self, round_end: RoundEnd) -> None:
        self._round_end = round_end
        self._idle: list[SimpleQueue[_Message | None]] = []

    def give(self, message: _Message) -> None:
        """Has a message waited for."""
        try:
            given = self._idle.pop()
        except IndexError:
            given = SimpleQueue()
            threading.Thread(target=self._run, args=(given,), name="message", daemon=True).start()
        given.put(message)

    def end(self) -> None:
        """The group has no more messages."""
        while self._idle:
            self._idle.pop().put(None)

    def _run(self, given: "SimpleQueue[_Message | None]") -> None:
        while (message := given.get()) is not None:
            message.await_inner()
            self._idle.append(given)  # before the next message can come
            message.done()
            del message
            if self._round_end.reached:
                return


class RoundBackend(c10d.Backend):
    """What c10d asks of the backend of a group that ends with its round, whatever carries the data."""

    def __init__(
        self, rank: int, size: int, options: c10d.Backend.Options, *, round_end: RoundEnd, traffic: Traffic
    ) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._options = options
        self._round_end = round_end
        self._traffic = traffic

    def close(self) -> None:
        """Closes the connections, so that the waits of all ranks in this group end. From any thread; it does not block."""
        raise NotImplementedError

    @property
    def options(self) -> c10d.Backend.Options:
        return self._options

    def getBackendName(self) -> str:  # c10d's name for it
        return NAME

    def abort(self) -> None:
        """Called by torch's abort_process_group."""
        self.close()

    def shutdown(self) -> None:
        """Called by destroy_process_group, which must wait for no peer."""


class EndableBackend(RoundBackend):
    """One group of ranks of one round. c10d calls its operations by the names below, with their arguments in this order.

    A receive from any rank is not among them: torch does not ask a Work in Python for its source.
    """

    def __init__(self, gloo: ProcessGroupGloo, *, round_end: RoundEnd, traffic: Traffic) -> None:
        super().__init__(gloo.rank(), gloo.size(), gloo.options, round_end=round_end, traffic=traffic)
        self._gloo: Any = gloo
        """None after `release`. No local variable refers to it: the thread that drops the last reference waits for its operations."""
        self._closing = threading.Lock()
        self.waiters = _Waiters(round_end)

    def close(self) -> None:
        """Closes the connections, so that the waits of all ranks in this group end. From any thread; it does not block.

        A receive that times out makes gloo close every connection of its group, which abort() does not do. After that no peer writes
        into a tensor of this process, a frozen one that goes on included.
        """
        with self._closing:
            for peer in range(self._size):
                if peer != self._rank and self._gloo is not None:
                    with suppress(RuntimeError):  # that is what it is for; or this connection is closed already
                        self._gloo.recv([torch.empty(1)], peer, _UNUSED_TAG).wait(timedelta(milliseconds=1))

    allreduce: Callable[..., Work]
    """In place: a list of one tensor, and c10d's AllreduceOptions. It and the other operations are set below."""

    def release(self) -> ProcessGroupGloo | None:
        """Takes gloo's group out: it ends with its last reference, and waits for its operations then."""
        self.waiters.end()
        with self._closing:
            gloo, self._gloo = self._gloo, None
        return gloo  # type: ignore[no-any-return]


def _operation(name: str, *, is_message: bool = False) -> Callable[..., Work]:
    call = getattr(ProcessGroupGloo, name)

    def start(self: EndableBackend, *arguments: Any) -> Work:
        """Few lines are as hot as these: each microsecond is a per mille of a small model's step."""
        round_end = self._round_end
        if round_end.reached or self._gloo is None:
            raise BrokenGroup(ENDED)
        try:
            inner = call(self._gloo, *arguments)
        except RuntimeError as error:
            if "gloo/transport" not in str(error):
                raise  # arguments that gloo does not take
            raise BrokenGroup(error) from None
        self._traffic.count(name, self._rank, self._size, arguments)
        return _Message(inner, round_end, self.waiters) if is_message else _Collective(inner, round_end)

    return start


for _name in (
    "allreduce",
    "allreduce_coalesced",
    "allreduce_sparse",
    "broadcast",
    "reduce",
    "allgather",
    "allgather_coalesced",
    "all_gather_single",
    "all_gather_single_coalesced",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "gather",
    "scatter",
    "alltoall",
    "all_to_all_single",
    "barrier",
):
    setattr(EndableBackend, _name, _operation(_name))
for _name in ("send", "recv"):
    setattr(EndableBackend, _name, _operation(_name, is_message=True))
# What it does not do. torch's own properties ask a backend in Python without end, and splitting would pass by `register`.
for _name in (
    "supports_splitting",
    "supports_coalescing",
    "supports_shrinking",
    "supports_reconfigure",
    "supports_window",
    "_supports_time_estimate",
):
    setattr(EndableBackend, _name, False)


def register(create: Callable[[Any, Any], Any]) -> None:
    """Makes the backend known to torch. create: called for each group with c10d's DistributedBackendOptions and the caller's options."""
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
