"""Copies of shards: parameter_server/copy_sender.py, copy_receiver.py and replicated_host.py.

The log of the updates and the table of a server's shards are the trainer's own.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from disttrain_trainer.net.frames import Refusal
from disttrain_trainer.parameter_server.update_log import Record, UpdateLog
from simulation.training.timeline import Connection
from simulation.training.volume import ShardFile

if TYPE_CHECKING:
    from simulation.training.server import Server
    from simulation.training.shard_host import ShardHost

RETRY_SECONDS = 0.2


class Snapshot(NamedTuple):
    """FOLLOW."""

    round_number: int
    shard: int
    term: int
    file: ShardFile
    previous: tuple[int, int] | None
    """Sync: the version before and its parts."""
    norm: tuple[int, float] | None
    """With which the newest step was made, if the master knows it."""


class CopySender:
    """The primary's end: one record at a time, each acknowledged."""

    bytes_sent = 0

    def __init__(
        self, server: "Server", host: "ShardHost", shard: int, target: int, changed: Callable[[bool], None]
    ) -> None:
        self._server = server
        self._host = host
        self._shard = shard
        self._target = target
        self._changed = changed
        self._stopped = self._has_snapshot = self._sending = False
        self._log: UpdateLog | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        job = self._server.job
        job.timeline.soon(job.pace.requests, self._begin)

    def stop(self) -> None:
        self._stopped = True
        self._end_log()
        if self._connection is not None:
            self._connection.close(0)

    def _begin(self) -> None:
        job, host = self._server.job, self._host
        if self._stopped or host.over or not self._server.alive:
            return
        if not host.initialized:
            job.timeline.soon(RETRY_SECONDS, self._begin)
            return
        self._log = host.log = UpdateLog(host.changed)
        host.on_record = self._go_on
        file = ShardFile(host.policy.version, host.policy.in_version.copy(), host.parts)
        target = job.server(self._target)
        if target is None:
            self._lost()
            return
        self._connection = connection = Connection(job.timeline, job.pace.data)
        job.copying.append(connection)
        connection.receive[0] = self._acknowledged
        connection.ended[0] = self._lost
        accept(target, connection)
        connection.send(0, Snapshot(host.number, self._shard, host.term, file, host.previous, host.norm))

    def _acknowledged(self, answer: str) -> None:
        if self._stopped or self._log is None or not self._server.alive:
            return
        if answer == "refused":
            self._lost()
            return
        if self._has_snapshot:
            self._sending = False
            if self._log.copied().complete:
                self._changed(True)
        self._has_snapshot = True
        self._host.notify()
        self._go_on()

    def _go_on(self) -> None:
        """Sends the next record, if there is one and the one before is acknowledged."""
        if self._stopped or self._sending or not self._has_snapshot or self._log is None or self._log.over:
            return
        record = self._log.next()
        if record is not None and self._connection is not None:
            self._sending = True
            self._connection.send(0, record)

    def _lost(self) -> None:
        if not self._stopped and self._server.alive:
            self._changed(False)
            self.stop()

    def _end_log(self) -> None:
        if self._log is not None:
            self._log.end()
            if self._host.log is self._log:
                self._host.log = None
            self._host.notify()


def accept(server: "Server", connection: Connection) -> None:
    """The copy's end."""
    host: list[ShardHost] = []

    def receive(message: Snapshot | Record) -> None:
        server.job.timeline.soon(server.job.pace.requests, partial(serve, message))

    def serve(message: Snapshot | Record) -> None:
        if not server.alive or not connection.open[1]:
            return
        try:
            if isinstance(message, Snapshot):
                host.append(server.place_copy(message))
            elif host[0].over or host[0].is_primary:
                raise RuntimeError
            else:
                host[0].follow(message)
        except (Refusal, RuntimeError):
            connection.send(1, "refused")
            connection.close(1)
            return
        connection.send(1, "done")

    connection.receive[1] = receive


def condition() -> threading.Condition:
    """For what the trainer guards by a lock: all is one thread here."""
    found = threading.Condition()
    found.acquire()
    return found
