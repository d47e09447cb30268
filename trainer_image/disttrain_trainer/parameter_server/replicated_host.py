"""A shard that has a copy on another server, or is one: ClippingHost with the two ends of the log of its updates (docs/design/0011)."""

from collections.abc import Callable
from typing import NamedTuple

from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.net.frames import Reason, Refusal
from disttrain_trainer.parameter_server.clipping_host import ClippingHost
from disttrain_trainer.parameter_server.shard import Buffers
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.parameter_server.update_log import Record, UpdateLog


class Snapshot(NamedTuple):
    """What the log of a copy starts from."""

    file: ShardFile
    kept: dict[int, bytes | bytearray]
    """The buffers of steps."""
    first: int
    """The version with which the round began."""
    norm: float | None
    """Of the gradient that led to the version of the file, before the clip; None where the master does not know it."""


class ReplicatedHost(ClippingHost):
    """See ShardHost: any thread may call these methods, too, and what they do not accept raises Refusal."""

    # Of a primary that has a copy.

    def new_log(self) -> UpdateLog:
        """The log of a copy, which has not begun."""
        return UpdateLog(self._changed)

    def await_parameters(self, log: UpdateLog) -> None:
        """Blocks until there is something to copy, and a worker has said which groups its elements are in. Refuses when the round or the
        log is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.over or log.over or (self._shard is not None and self._shard.initialized and self.knows_groups)
                )
            )
            self._require_wanted(log)

    def begin_log(self, log: UpdateLog, memory: HostCopy) -> Snapshot:
        """Changes go to this log from now on, and no longer to the one before. Returns the snapshot in this memory that it starts from.
        Call `await_parameters` before. Refuses when the round or the log is over."""
        with self._changed:
            self._require_wanted(log)
            file = self._known_shard().snapshot(self._policy.in_version, memory, previous=True)
            version, norm = self._last_norm or (0, None)
            snapshot = Snapshot(file, dict(self._kept), self._first, norm if version == file.version else None)
            if self._log is not None:
                self._log.end()
            self._log = log  # after all that may fail: from here on workers wait for the copy
            return snapshot

    def next_record(self, log: UpdateLog, seconds: float) -> Record | None:
        """The next record that is to be copied; None when none comes for so long. Refuses when the log is over."""
        with self._changed:
            found = None if log.over else log.next()
            if found is None and not log.over:
                self._changed.wait_for(lambda: log.over or log.next() is not None, seconds)
                found = None if log.over else log.next()
            self._require_wanted(log)
            return found

    def copied(self, log: UpdateLog) -> None:
        """The copy has the record that was sent last."""
        with self._changed:
            if not log.over and (summed := log.copied().gradient) is not None:
                self._known_shard().give_sum(summed)

    def end_log(self, log: UpdateLog) -> None:
        """The copy is lost: this shard goes on alone."""
        with self._changed:
            log.end()
            if self._log is log:
                self._log = None

    def _require_wanted(self, log: UpdateLog) -> None:
        self._require_going_on()
        if log.over:
            raise Refusal(Reason.ROUND, "the copy is not wanted any more")

    # Of a copy.

    def take_sum(self) -> Buffers:
        """Buffers to receive the gradient of a record into."""
        with self._changed:
            return self._known_shard().take_sum()

    def follow(self, record: Record, acknowledge: Callable[[], None]) -> None:
        """Does what the primary did. acknowledge: called with the lock, when nothing can come between this record and a promotion."""
        with self._changed:
            self._require_going_on()
            if self.is_primary:
                raise Refusal(Reason.ROUND, f"shard {self._place[0]} has another primary")
            try:
                acknowledge()
            finally:
                self._do(record)

    def promote(self, term: int) -> None:
        """This copy is the primary from now on."""
        with self._changed:
            self.is_primary, self.term = True, term
            self._changed.notify_all()

    def restore_beside(self, kept: dict[int, bytes | bytearray], *, first: int, norm: float | None) -> None:
        """What a snapshot has beside the file."""
        with self._changed:
            self._kept, self._first = kept, first
            self._last_norm = None if norm is None else (self._policy.version, norm)

    def _do(self, record: Record) -> None:
        shard = self._known_shard()
        self.complete = self.complete or record.complete
        if record.kept is not None:
            step, buffers = record.kept
            self._kept[step] = buffers
        if record.parts is None:
            return
        try:
            first, stop = record.parts
            for index in range(first, stop):
                self._policy.arrive(index, empty=record.gradient is None)
            if self._policy.waits_for_norm:
                self._policy.proceed()  # the coefficient is in the scale of the record
            if record.norm is not None:
                self._last_norm = self._policy.version, record.norm
            if record.gradient is not None:
                shard.follow(first, record.gradient, scale=record.scale, rate=record.rate, took=record.took)
        except BaseException:
            self.over = True
            raise
        self._forget_buffers()
