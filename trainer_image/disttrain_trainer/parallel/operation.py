"""What a collective or a message of ours is to torch: a Work that threads of ours carry out (`wire_backend`)."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from torch.distributed import Work
from torch.futures import Future

from disttrain_trainer.parallel.backend import BrokenGroup, RoundEnd

_NO_LIMIT: Final = timedelta(0)


class Operation(Work):
    """Done when each of its parts is: the part of the thread that carries it out, and each tensor that is still being sent. Or broken,
    with its first error."""

    def __init__(self, result: Any, *, limit: float, round_end: RoundEnd) -> None:
        """result: of its future. limit: seconds that a wait takes at most, unless the caller says."""
        super().__init__()
        self._round_end = round_end
        self._result = result
        self._limit = limit
        self._lock = threading.Lock()
        self._parts = 1
        self._over = False
        self._error: Exception | None = None
        self._gate = threading.Lock()  # a lock is the fastest to wait for
        self._gate.acquire()
        self._futures: list[Future[None]] = []

    def begin_part(self) -> None:
        """One more part. Called before the last one is done."""
        with self._lock:
            self._parts += 1

    def end_part(self, error: Exception | None = None) -> None:
        """A part is done, or has failed."""
        with self._lock:
            self._parts -= 1
            if self._over or (self._parts and error is None):
                return
            self._over, self._error = True, error
            futures, self._futures = self._futures, []
        self._gate.release()
        for future in futures:
            future.set_result(None)

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Blocks until it is done. Raises BrokenGroup when a peer is lost or the round ends, and RuntimeError after `timeout`."""
        seconds = timeout.total_seconds() if timeout > _NO_LIMIT else self._limit
        if not self._gate.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            raise RuntimeError(f"the operation took longer than {seconds:g} s")
        self._gate.release()
        self._check()
        return True

    def is_completed(self) -> bool:
        return self._over

    def get_future(self) -> Future[Any]:
        """For torch's DDP, which waits for it in C++."""
        gate: Future[None] = Future()
        # A callback that raises is how Python gives an error to who waits in C++; set_exception is seen from Python alone.
        value: Callable[[Future[None]], Any] = self._value
        future = gate.then(value)
        with self._lock:
            over = self._over
            if not over:
                self._futures.append(gate)
        if over:
            gate.set_result(None)
        return future

    def _value(self, _: Future[None]) -> Any:
        self._check()
        return self._result

    def _check(self) -> None:
        if self._error is not None:
            self._round_end.check()
            raise BrokenGroup(self._error) from None
