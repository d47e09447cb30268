"""Asking several sources for the same thing, so that one that is silent costs a fraction of a second.

Hedged requests: Dean and Barroso, "The Tail at Scale" (CACM 2013). The next source is asked when the one before it has nothing, or has not
answered for a while; the first answer counts.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def first_answer(calls: Sequence[Callable[[], T | None]], *, after: float, within: float) -> T | None:
    """The first answer that is not None; None when no call has one. Each call runs in a thread of its own, which may outlive this.

    after: seconds until the next one is called as well. within: seconds in all; then TimeoutError. Without an answer it raises what the
    last call that failed has raised.
    """
    answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()
    waiting, running = list(calls), 0
    failure: Exception | None = None
    deadline = time.monotonic() + within
    while waiting or running:
        if waiting:
            threading.Thread(target=_answer, args=(waiting.pop(0), answers), name="asks", daemon=True).start()
            running += 1
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer for {within:g} s")
        try:
            answer, error = answers.get(timeout=min(after, left) if waiting else left)
        except queue.Empty:
            continue
        running -= 1
        if answer is not None:
            return answer
        failure = error or failure
    if failure is not None:
        raise failure
    return None


def _answer(call: Callable[[], T | None], answers: "queue.SimpleQueue[tuple[T | None, Exception | None]]") -> None:
    try:
        answers.put((call(), None))
    except Exception as error:
        answers.put((None, error))
