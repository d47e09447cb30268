"""For a user's own script or program: where its checkpoints and data lie, and what it reports. All of it is optional.

    from disttrain_trainer import session

    session.report(step=step, loss=loss.item(), samples=len(batch), total_steps=steps)

Outside of DistTrain nothing happens. A report never blocks and never fails: what cannot be sent is dropped.
"""

import atexit
import os
import secrets
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, TypeVar

from disttrain.api import environment
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.net.messages import MessageType, encode
from disttrain_trainer.runtime.sockets import split_address

REPORT_INTERVAL_SECONDS = 0.1
"""Seconds between two messages to the master, at least."""
FLUSH_SECONDS = 1.0
"""Seconds that the end of the process waits for the last report to be sent."""
RECONNECT_SECONDS = 1.0
"""Seconds before a lost connection is made again."""

N = TypeVar("N", int, float)

__all__ = ["checkpoint_dir", "close", "data_dir", "report"]


def report(
    *, step: int | None = None, loss: float | None = None, samples: int = 0, total_steps: int | None = None
) -> None:
    """Reports the progress of this process, as often as you like.

    step: steps done. loss: mean loss of the samples since the last report. samples: how many these were, in this process.
    total_steps: steps of the whole job.
    """
    reporter = _reporter()
    if reporter is not None:
        reporter.add(step=step, loss=loss, samples=samples, total_steps=total_steps)


def close() -> None:
    """Sends what was reported, within a second, and ends the connection to the master, as the end of the process does. A later report
    starts again."""
    with _lock:
        reporters, _made[:] = _made[:], []
    for reporter in reporters:
        if reporter is not None:
            reporter.close()


def checkpoint_dir() -> Path | None:
    """The folder for checkpoints, which outlives this process; None when the job has no checkpoint volume, or outside of DistTrain."""
    return _folder(environment.CHECKPOINT_DIR)


def data_dir() -> Path | None:
    """The folder of the data volume; None when the job has none, or outside of DistTrain."""
    return _folder(environment.DATA_DIR)


def _folder(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None


class _Reporter:
    """Adds reports up, and sends them from a thread of its own."""

    def __init__(self, config: JobConfig, rank: int) -> None:
        self._address = split_address(config.addresses.control)
        self._hello = encode(
            MessageType.HELLO,
            job=config.uid,
            attempt=config.attempt,
            role=Role.WORKER,
            rank=rank,
            incarnation=secrets.token_hex(8),
            session=True,
        )
        self._round_number = 1 + int(os.environ.get(environment.RESTART_COUNT) or 0)
        self._changed = threading.Condition()
        self._step: int | None = None
        self._total_steps: int | None = None
        self._loss = 0.0
        self._weight = 0
        """Of the sum of losses."""
        self._samples = 0
        self._unreported = False
        self._unsent = self._hurry = self._closed = False
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._thread.start()

    def add(self, *, step: object, loss: object, samples: object, total_steps: object) -> None:
        # In the thread that reports: a tensor may have a graph that must not be kept, and a device to wait for.
        step, total_steps = _number("step", step, int), _number("total_steps", total_steps, int)
        value, count = _number("loss", loss, float), _number("samples", samples, int) or 0
        with self._changed:
            self._step = step if step is not None else self._step
            self._total_steps = total_steps if total_steps is not None else self._total_steps
            self._samples += count
            if value is not None:
                # Without a count of samples each report weighs the same.
                self._loss += value * (count or 1)
                self._weight += count or 1
            self._unreported = self._unsent = True
            self._changed.notify_all()

    def close(self) -> None:
        """The last report is the one that users look at: it is sent before the end."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._unsent, FLUSH_SECONDS)
            self._closed = True
            self._changed.notify_all()
        self._thread.join(FLUSH_SECONDS)  # not for as long as an unanswered connection takes

    def _run(self) -> None:
        while not self._closed:
            try:
                with socket.create_connection(self._address, timeout=10) as connection:
                    connection.sendall(self._hello)
                    while message := self._next():
                        connection.sendall(message)
                        self._pause(REPORT_INTERVAL_SECONDS)
            except OSError:
                self._pause(RECONNECT_SECONDS)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._unsent = self._unreported
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._hurry, seconds)

    def _next(self) -> bytes:
        """The next message, as soon as there is something to say; empty when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._unreported or self._closed)
            if not self._unreported:
                return b""
            fields: dict[str, object] = {
                "step": self._step,
                "total_steps": self._total_steps,
                "samples": self._samples,
                # The sum over all samples, also over those of reports without a loss, as if they had the mean of the others.
                "loss": self._loss / self._weight * (self._samples or 1) if self._weight else None,
                "generation": self._round_number,
                "world": _world_size(),
            }
            self._loss, self._weight, self._samples, self._unreported = 0.0, 0, 0, False
        return encode(MessageType.REPORT, **fields)


def _number(name: str, value: Any, kind: type[N]) -> N | None:
    """The value as a plain number, whatever library it is of. What is none is said, and left out."""
    if value is None:
        return None
    try:
        return kind(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        warnings.warn(f"session.report ignores {name}, which is not a number: {error}", stacklevel=4)
        return None


def _world_size() -> int | None:
    """The size of the process group that this process trains in, None where that is unknown, as with another library than torch."""
    distributed: Any = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_world_size())
        # A process that torchrun started knows the size of its group before it joins it.
        return int(os.environ[environment.WORLD_SIZE]) if environment.ELASTIC_RUN_ID in os.environ else None
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return None


_lock = threading.Lock()
_made: list[_Reporter | None] = []
atexit.register(close)


def _reporter() -> _Reporter | None:
    """The reporter of this process, made at the first report; None outside of DistTrain."""
    with _lock:
        if not _made:
            try:
                config, _ = JobConfig.decode(os.environ.get(environment.JOB, ""))
                _made.append(_Reporter(config, int(os.environ.get(environment.RANK) or 0)))
            except ValueError:
                _made.append(None)
        return _made[0]
