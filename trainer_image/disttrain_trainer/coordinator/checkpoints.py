"""When a checkpoint of parameter servers is made, and its steps: the folder, a file of each server, a worker's buffers, the manifest.

The checkpoint store does whatever blocks, and answers later. When a checkpoint fails, the log says so, the coordinator gives it up, and the
one before stays; only the last one of a job is tried again (checkpoint/final.py). Each save has an id, in the names of its files and in
every answer, so that a late write for a save that was abandoned changes nothing in the next one.
Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce

from disttrain.api.names import Role
from disttrain.api.runtime import ProgressCheckpoint
from disttrain_trainer.checkpoint import final
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import name_of
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.servers import Servers, parts_of
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import CheckpointStore, Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

HEAD_START = 10
"""A checkpoint begins 1/HEAD_START of the interval before the steps would have to wait for it."""
WHOLE_STEP_SECONDS = 5.0
"""How long a checkpoint under Async waits for whole steps when a process is leaving: its grace period is short."""
QUIET_SAVE_SECONDS = 10.0
"""Seconds of writing after which `waiting_for` names the processes that still write."""


@dataclass(slots=True)
class _Save:
    id: str
    step: int
    final: bool
    began: float
    files: dict[str, str] = field(default_factory=dict)
    applied: dict[int, IndexSet] = field(default_factory=dict)
    """What each shard's file holds."""
    copied: set[int] = field(default_factory=set)
    """The shards that are copied."""
    buffer_writer: int | None = None
    """The worker that was asked for its buffers, and has not written them yet."""
    buffers_copied: bool = False
    """It has copied them."""
    going_on: bool = False
    """All is copied, and the training may have changed it since."""


class CheckpointCoordinator:
    """Writes checkpoints.

    incarnation: the master's, from which ids are made. timeout_seconds: after these a save is abandoned.
    aligned: every step is saved whole, on all servers (Sync). every: steps between two checkpoints.
    buffer_writer: the worker whose buffers are to be saved; None when the model has none, or no worker is ready.
    copied: called when the training may go on while the copies are written.
    done: called when one is complete or abandoned, with whether the final one is complete.
    """

    def __init__(
        self,
        *,
        sender: Sender,
        servers: Servers,
        store: CheckpointStore,
        tracker: Tracker,
        incarnation: str,
        timeout_seconds: float,
        parts_per_step: int,
        every: int,
        aligned: bool,
        needs_worker: Callable[[], bool],
        buffer_writer: Callable[[], int | None],
        copied: Callable[[float], None],
        done: Callable[[bool, float], None],
    ) -> None:
        self._sender = sender
        self._servers = servers
        self._needs_worker = needs_worker
        self._buffer_writer = buffer_writer
        self._store = store
        self._tracker = tracker
        self._incarnation = incarnation
        self._timeout_seconds = timeout_seconds
        self._parts_per_step = parts_per_step
        self._every = every
        self._aligned = aligned
        self._copied = copied
        self._done = done
        self._save: _Save | None = None
        self._count = 0
        self._final_failed: tuple[float, str] | None = None
        """When the last checkpoint of the job failed first, and of what it failed last."""
        self._again_at = 0.0
        self.newest: Manifest | None = None
        """The newest complete checkpoint."""
        self._written: Manifest | None = None
        """The newest one that this master wrote."""
        self.hurrying = False
        """A process is leaving: save as soon as the steps in work are whole."""
        self._hurried_at = 0.0
        self._failed = False
        """Whether the newest save was abandoned."""
        self._attempted = 0
        """Step of the newest one, or of a later one that failed: it is not tried again before the next is due."""

    @property
    def busy(self) -> bool:
        return self._save is not None

    def is_writing(self, save: str) -> bool:
        """Whether the checkpoint of this id is the one that is being written."""
        return self._save is not None and self._save.id == save

    @property
    def is_copying(self) -> bool:
        """Whether the shards, or a worker's buffers, are not copied yet: the training waits for that."""
        return self._save is not None and not self._save.going_on

    @property
    def _lacks_worker(self) -> bool:
        return self._needs_worker() and self._buffer_writer() is None

    @property
    def _newest_step(self) -> int:
        return self.newest.step if self.newest else 0

    def misses(self, queue: WorkQueue) -> bool:
        """Whether there are steps that a checkpoint could keep now."""
        return self._servers.complete and queue.step != self._newest_step and not self._lacks_worker

    def owes(self, queue: WorkQueue) -> bool:
        """Whether to save before what may fail or take long: an evaluation, and a member that drains waits for it."""
        return self.misses(queue) and (self.hurrying or self._attempted != queue.step)

    def must_follow(self, queue: WorkQueue) -> bool:
        """Whether a process is leaving, and steps were done since the checkpoint that has just been completed was copied."""
        return self.hurrying and not self._failed and not self._tracker.nan_loss and self.misses(queue)

    def know(self, manifest: Manifest) -> None:
        """Records the newest complete checkpoint."""
        self.newest = manifest
        self._tracker.last_checkpoint = ProgressCheckpoint(step=manifest.step, time=manifest.time)

    def begin(self, queue: WorkQueue) -> None:
        """The training goes on from here, which may be beyond the newest checkpoint when only the master is new."""
        self._attempted = self._newest_step
        self._final_failed = None
        self.raise_limit(queue)

    # Where the workers stop: parts of step `queue.limit / parts per step` and of later ones are not assigned before a checkpoint is copied.
    #
    #                             the workers stop at                    the checkpoint begins
    #   Sync                      the next multiple of `every`           when all parts before that are applied: one version on all shards
    #   Async, BoundedStaleness   `every` steps after the newest one     `every` / HEAD_START steps before that, so that they seldom stop
    #   a process is leaving      the end of the steps in work           when these are whole; Async: or after WHOLE_STEP_SECONDS

    def raise_limit(self, queue: WorkQueue) -> None:
        """No checkpoint keeps the workers back now: they stop at the next one.

        So a lost server costs at most the interval that is being saved, and one more.
        """
        stop = self._attempted + self._every
        if self._aligned:
            stop -= stop % self._every
        queue.limit = min(queue.total, max(stop, self._step_in_work(queue)) * self._parts_per_step)

    def hurry(self, queue: WorkQueue, now: float) -> None:
        """A process is leaving: the workers stop after the steps in work.

        Then a suspended job can go on with another number of workers, also under Async, which otherwise saves in the middle of steps.
        """
        if not self.hurrying:
            self._hurried_at = now
        self.hurrying = True
        queue.limit = min(queue.limit, self._step_in_work(queue) * self._parts_per_step)

    def is_due(self, queue: WorkQueue, now: float, *, deserted: bool) -> bool:
        """Whether to start one now.

        deserted: no worker is left that could make a step whole, and the servers have reported all that they hold.
        """
        if self.busy or self._tracker.nan_loss:
            return False
        stopped = queue.done >= queue.limit
        if self.hurrying and deserted:
            return True
        if self._aligned:
            return stopped
        if self.hurrying:
            return stopped or now - self._hurried_at > WHOLE_STEP_SECONDS
        return queue.step >= self._attempted + self._every - self._every // HEAD_START

    def _step_in_work(self, queue: WorkQueue) -> int:
        """The step at which every part that is assigned already is done."""
        return -(-queue.handed_out // self._parts_per_step)

    def start(self, step: int, now: float, *, final: bool = False) -> None:
        """Begins a checkpoint; one that is being written must have ended. Without a worker none is begun, and members that drain wait for
        none. The last one waits for a while after it failed."""
        whole = self._written
        if not final or whole is None or (whole.step, whole.parts) != (step, step * self._parts_per_step):
            whole = None
        if final and self._final_failed and now < self._again_at:
            return
        if whole is None and self._lacks_worker:
            if self.hurrying:
                self._done(False, now)
            return
        self._count += 1
        self._save = _Save(f"{self._incarnation}.{self._count}", step, final, now)
        self._attempted = step
        if whole is not None:
            # Its files are there, and nothing has changed since: only the manifest is written again.
            self._publish(self._save, whole.parts, whole.files)
        else:
            self._store.prepare(step, partial(self._prepared, self._save))

    def _prepared(self, save: _Save, folder: str | OSError, now: float) -> None:
        """The store's answer to `prepare`: the folder's name."""
        if self._save is not save:
            return
        if isinstance(folder, OSError):
            self._end(f"the folder of step {save.step} cannot be made: {folder}", now)
        else:
            self._servers.send_to_primaries(MessageType.SAVE, id=save.id, folder=folder, step=save.step)
            self._ask_buffer_writer(save, now)

    def on_message(self, member: Member, message: Message, now: float) -> None:
        """COPIED or SAVED, of a server or of a worker."""
        serves, copied = member.role is Role.PARAMETER_SERVER, message["type"] == MessageType.COPIED
        if serves:
            (self.server_copied if copied else self.server_saved)(member.rank, message, now)
        else:
            (self.worker_copied if copied else self.worker_saved)(member.rank, message, now)

    def server_copied(self, index: int, message: Message, now: float) -> None:
        """A server copied its shard."""
        if self._save is not None and message["id"] == self._save.id:
            self._save.copied.add(message.get("shard", index))
            self._go_on(self._save, now)

    def worker_copied(self, rank: int, message: Message, now: float) -> None:
        """A worker copied its buffers."""
        if self._save is not None and (message["id"], rank) == (self._save.id, self._save.buffer_writer):
            self._save.buffers_copied = True
            self._go_on(self._save, now)

    def server_saved(self, index: int, message: Message, now: float) -> None:
        """A server wrote a shard's file, or could not. One of an earlier release names no shard: it has that of its own number."""
        save = self._save
        if save is None or message.get("id") != save.id:
            return
        if message.get("error"):
            self._end(f"parameter-server-{index}: {message['error']}", now)
            return
        save.files[message["file"]] = message["digest"]
        save.applied[message.get("shard", index)] = parts_of(message)
        whole = IndexSet.from_intervals([(0, save.step * self._parts_per_step)] if save.step else [])
        if self._aligned and any(parts != whole for parts in save.applied.values()):
            # A part that some servers had when its worker or the master was lost: no step of these files could be completed.
            self._end(f"step {save.step} is not whole: some servers have parts of a later one", now)
            return
        self._complete(save)

    def worker_saved(self, rank: int, message: Message, now: float) -> None:
        """A worker wrote its buffers, or could not."""
        save = self._save
        if save is None or save.buffer_writer != rank or message.get("id") != save.id:
            return
        if message.get("error"):
            self._end(f"worker-{rank}: {message['error']}", now)
            return
        save.files[message["file"]] = message["digest"]
        save.buffer_writer = None
        self._complete(save)

    def worker_left(self, rank: int, now: float, *, lost: bool) -> None:
        """A worker is lost, starts over, or evaluates while another one is ready: if it was to write its buffers, another worker does; when
        none is ready, the save is abandoned. So it is once the training has gone on: then every other worker has buffers of a later step.

        A worker that is not lost still writes what it has copied.
        """
        save = self._save
        if save is None or save.buffer_writer != rank or (save.buffers_copied and not lost):
            return
        if save.going_on:
            self._end(f"worker-{rank} is lost, and with it the buffers of step {save.step}", now)
            return
        self._ask_buffer_writer(save, now)

    def _publish(self, save: _Save, parts: int, files: dict[str, str]) -> None:
        answer = partial(self._published, save)
        self._store.publish(step=save.step, parts=parts, files=files, finished=save.final, answer=answer)

    def _published(self, save: _Save, manifest: Manifest | OSError, now: float) -> None:
        """The store's answer to `publish`."""
        if isinstance(manifest, Manifest):
            self._written = manifest
            self.know(manifest)  # also when the save was abandoned meanwhile: it is whole
        if self._save is save:
            self._end(str(manifest) if isinstance(manifest, OSError) else None, now)

    def abandon(self) -> None:
        """A server is lost: what it was to write will not come. If it comes back as it was, the checkpoint is due as before."""
        if self._save is not None:
            self._save = None
            # The steps may wait for this one: the next one is due only beyond where they wait.
            self._attempted = self._newest_step

    def tick(self, now: float) -> None:
        """Gives up a save that exceeds its time-out. Raises Unsaved when the last checkpoint of the job failed for too long."""
        if self._save is not None and now - self._save.began > self._timeout_seconds:
            self._end(f"waited {self._timeout_seconds:g} s for {self._missing(self._save)}", now)
        if (
            self._final_failed is not None
            and self._save is None
            and now - self._final_failed[0] > final.GIVE_UP_SECONDS
        ):
            raise final.Unsaved(self._attempted, self._final_failed[1])

    def waiting_for(self, now: float) -> str | None:
        """The processes that a save waits for, once it takes longer than usual; or what keeps the job from being done."""
        save, failed = self._save, self._final_failed
        if failed is not None:
            return f"the last checkpoint, which cannot be written: {failed[1]} ({now - failed[0]:.0f} s)"
        if save is None or now - save.began < QUIET_SAVE_SECONDS:
            return None
        return f"checkpoint {save.step} to be written by {self._missing(save)} ({now - save.began:.0f} s)"

    def _missing(self, save: _Save) -> str:
        """The processes that have not written their files yet."""
        late = {self._servers.primaries[shard] for shard in range(self._servers.count) if shard not in save.applied}
        missing = [str(Member(Role.PARAMETER_SERVER, index)) for index in sorted(late)]
        if (buffer_writer := save.buffer_writer) is not None:
            missing.append(str(Member(Role.WORKER, buffer_writer)))
        return ", ".join(missing) or "the master"

    def _go_on(self, save: _Save, now: float) -> None:
        """Lets the training go on once all is copied; not while a process is leaving, which waits for a checkpoint of all that is done."""
        whole = len(save.copied) == self._servers.count and (save.buffer_writer is None or save.buffers_copied)
        if whole and not save.going_on and not self.hurrying:
            save.going_on = True
            self._copied(now)

    def _ask_buffer_writer(self, save: _Save, now: float) -> None:
        save.buffer_writer, save.buffers_copied = self._buffer_writer(), False
        if save.buffer_writer is not None:
            member = Member(Role.WORKER, save.buffer_writer)
            self._sender.send(member, MessageType.SAVE, id=save.id, folder=name_of(save.step))
        elif self._needs_worker():
            self._attempted = self._newest_step  # it is due again as soon as a worker is ready
            self._end("no worker is left to write its buffers, and how the model lies in the servers' files", now)

    def _complete(self, save: _Save) -> None:
        if len(save.applied) == self._servers.count and save.buffer_writer is None:
            parts = len(reduce(IndexSet.intersection, save.applied.values()))
            self._publish(save, parts, save.files)

    def _end(self, error: str | None, now: float) -> None:
        save, self._save = self._save, None
        self._failed = error is not None
        finished = save is not None and save.final and error is None
        if error is not None and save is not None and save.final:
            self._final_failed = (self._final_failed[0] if self._final_failed else now, error)
            self._again_at = now + final.RETRY_SECONDS
            log.error("the last checkpoint was not written: %s; it is tried again in %g s", error, final.RETRY_SECONDS)
        elif error is not None:
            log.error(
                "a checkpoint was not written: %s; the training goes on, and the checkpoint before it is intact", error
            )
        self._done(finished, now)
