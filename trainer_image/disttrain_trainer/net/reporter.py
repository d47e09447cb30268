"""Sends the progress of a user's program to the master, over a connection of its own: no decision depends on it.

A report never blocks and never fails. What was said last reaches the master all the same: it is said again on a new connection, and the end
of the process waits until the master has it.
"""

import secrets
import socket
import threading
from collections.abc import Callable

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.net.messages import MessageType, encode
from disttrain_trainer.runtime.sockets import split_address

REPORT_INTERVAL_SECONDS = 0.1
"""Seconds between two messages to the master, at least."""
FLUSH_SECONDS = 1.0
"""Seconds that a process which is to end at once waits until the master has the last report. Otherwise it waits for the peer timeout of the
job: a master may still start, or have much to do."""
RECONNECT_SECONDS = 1.0
"""Seconds before a lost connection is made again."""


class Reporter:
    """Adds reports up, and sends them from a thread of its own. Any thread may call its methods."""

    def __init__(
        self,
        config: JobConfig,
        rank: int,
        *,
        round_number: int,
        world_size: Callable[[], int | None] = lambda: None,
        output: bool = False,
    ) -> None:
        """rank: of the training process that it is about. round_number: that in which the program was started.

        world_size: the size of the process group that the process trains in, where that is known.
        output: what it sends is read from the output of a program, by a process that calls `hurry` when it is to end. Without that a
        master that is lost may be one whose job ends, and is not waited for.
        """
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
        self._round_number = round_number
        self._world_size = world_size
        self._output = output
        self._patience = config.peer_timeout_seconds
        self._changed = threading.Condition()
        self._step: int | None = None
        self._total_steps: int | None = None
        self._loss = 0.0
        self._weight = 0
        """Of the sum of losses."""
        self._mean: float | None = None
        """Loss that was sent last."""
        self._samples = 0
        self._unreported = self._again = False
        self._closing = self._hurry = self._closed = False
        self._met = False
        """A master was there."""
        self._delivered = False
        """The master has read all that was said, after `close`."""
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._thread.start()

    def add(
        self,
        *,
        step: int | None = None,
        loss: float | None = None,
        samples: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Adds one report, as of `session.report`."""
        count = samples or 0
        with self._changed:
            self._step = step if step is not None else self._step
            self._total_steps = total_steps if total_steps is not None else self._total_steps
            self._samples += count
            if loss is not None:
                # Without a count of samples each report weighs the same.
                self._loss += loss * (count or 1)
                self._weight += count or 1
            self._unreported = self._unsent = True
            self._changed.notify_all()

    def hurry(self) -> None:
        """The process is to end: `close` takes FLUSH_SECONDS at most from now on, also one that waits already."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()

    def close(self) -> None:
        """The last report is the one that users look at: the master has read it before the end. Does not raise when it has not in time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._delivered or self._hurry, self._patience)
            if self._hurry:
                self._changed.wait_for(lambda: self._delivered, FLUSH_SECONDS)
            self._closed = True
            self._changed.notify_all()
        if self._delivered:  # otherwise it may wait for a connection
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            try:
                with socket.create_connection(self._address, timeout=10) as connection:
                    self._met = True
                    connection.sendall(self._hello)
                    while message := self._next():
                        connection.sendall(message)
                        self._pause(REPORT_INTERVAL_SECONDS)
                    # The master ends the connection when it has read all of it. To close it before, with the master's WELCOME unread,
                    # would reset it, and the master would lose what it has not read yet.
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(self._patience)
                    while connection.recv(4096):
                        pass
                with self._changed:
                    self._delivered = True
                    self._changed.notify_all()
                return
            except OSError:
                self._lose()

    def _lose(self) -> None:
        """There is no connection. The next master may be a new one, which knows nothing of what was said to the one before."""
        with self._changed:
            self._again = self._unreported = self._unreported or self._step is not None
            if self._closing:
                self._hurry = self._hurry or (self._met and not self._output)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, REPORT_INTERVAL_SECONDS)
            else:
                self._changed.wait_for(lambda: self._closing, RECONNECT_SECONDS)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds)

    def _next(self) -> bytes:
        """The next message, as soon as there is something to say; empty when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._unreported or self._closing)
            if not self._unreported:
                return b""
            if self._weight:
                self._mean = self._loss / self._weight
            fields: dict[str, object] = {
                "step": self._step,
                "total_steps": self._total_steps,
                "samples": self._samples,
                # The sum over all samples, also over those of reports without a loss, as if they had the mean of the others.
                "loss": self._mean * (self._samples or 1)
                if self._mean is not None and (self._weight or self._again)
                else None,
                "generation": self._round_number,
                "world": self._world_size(),
            }
            if self._output:
                fields["output"] = True
            self._loss, self._weight, self._samples, self._unreported, self._again = 0.0, 0, 0, False, False
        return encode(MessageType.REPORT, **fields)
