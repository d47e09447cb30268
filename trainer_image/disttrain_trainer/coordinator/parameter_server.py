"""The master's decisions about a training with parameter servers: what it sends when a member joins, sends a message or is lost.

Which parts are applied is the servers' state; the work queue only copies it. Workers may come and go. Pure: the caller gives the time, the
sender sends, and the checkpoint store does the files.
"""

from functools import partial

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import BUFFERS, STATE, another_training, name_of
from disttrain_trainer.coordinator import missing_members
from disttrain_trainer.coordinator.checkpoints import CheckpointCoordinator
from disttrain_trainer.coordinator.completion import Completion
from disttrain_trainer.coordinator.draining import DrainingMembers
from disttrain_trainer.coordinator.hedging import Hedges
from disttrain_trainer.coordinator.missing_members import MissingMembers
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.rounds import Rounds
from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.coordinator.workers import Workers
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.data.schedule import DataSet, Schedule
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import CheckpointStore, Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

INQUIRY_INTERVAL_SECONDS = 1.0
"""Seconds between two questions to the servers about what they hold."""


class ParameterServerCoordinator:
    """The coordinator of strategy ParameterServer."""

    def __init__(
        self, *, sender: Sender, store: CheckpointStore | None, tracker: Tracker, config: JobConfig, incarnation: str
    ) -> None:
        """incarnation: the master's, another one in each of its processes."""
        self._sender = sender
        self._tracker = tracker
        self._config = config
        self._servers = Servers(sender=sender, count=config.parameter_servers)
        self._workers = workers = Workers(
            sender=sender, tracker=tracker, incarnation=incarnation, hedges=Hedges.of(config)
        )
        self._sync = config.strategy.synchronous
        self._fewest = config.min_processes
        self._checkpoints = (
            CheckpointCoordinator(
                sender=sender,
                servers=self._servers,
                store=store,
                tracker=tracker,
                incarnation=incarnation,
                timeout_seconds=config.startup_timeout_seconds,
                parts_per_step=config.parts_per_step,
                every=config.checkpoint.every_steps,
                aligned=self._sync,
                needs_worker=lambda: self._workers.buffers,
                buffer_writer=self._buffer_writer,
                copied=self._copied,
                done=self._saved,
            )
            if store is not None and config.checkpoint is not None
            else None
        )
        self._rounds = Rounds(
            sender=sender,
            servers=self._servers,
            store=store,
            newest=lambda: self._checkpoints.newest if self._checkpoints else None,
            answered=self._found,
            config=config,
            opened=self._round_opened,
            returned=self._server_returned,
            lost=self._round_lost,
        )
        self._completion = Completion(
            sender=sender,
            servers=self._servers,
            workers=workers,
            tracker=tracker,
            checkpoints=self._checkpoints,
            evaluates=config.trainer.evaluate is not None,
            finish=self._finish,
        )
        self.queue: WorkQueue | None = None
        self._missing_members = MissingMembers()
        self._draining = DrainingMembers(sender)
        self.ended = False

    @property
    def released(self) -> bool:
        return self._draining.released

    def begin(self, now: float) -> None:
        """The master's start."""
        self._rounds.look(now)

    def _found(self, manifest: Manifest | None, now: float) -> None:
        """The store's answer to `find`."""
        if self.ended:
            return
        if manifest is not None and self._checkpoints is not None:
            self._checkpoints.know(manifest)
            if manifest.finished:
                self._tracker.evaluation, self._tracker.model = manifest.evaluation, manifest.model
                self._tracker.reach(manifest.step)
                self._finish(now)
                return
        self._rounds.found(now)

    def joined(self, member: Member, hello: Message, now: float) -> None:
        self._missing_members.end(member)
        if self.ended:
            self._sender.send(member, MessageType.FINISH)
        elif member.role is Role.PARAMETER_SERVER:
            self._servers.know(member.rank, hello)
            self._rounds.server_joined(member.rank, now)
        elif member.role is Role.WORKER:
            self._workers.join(member.rank)
            if hello.get("samples") is not None:
                self._worker_ready(member.rank, hello, now)

    def on_message(self, member: Member, message: Message, now: float) -> None:
        match member.role, message["type"]:
            case Role.WORKER, MessageType.LEAVING if self._can_spare(member.rank):
                self._workers.retire(member.rank, self.queue)
                self._advance(now)  # another worker evaluates, or its buffers are saved
            case _, MessageType.LEAVING:
                self._draining.add(member)
                self._save_soon(now)
            case Role.PARAMETER_SERVER, MessageType.STATE:
                self._server_state(member.rank, message, now)
            case Role.PARAMETER_SERVER, MessageType.COPY:
                self._rounds.copy_changed(message, now)
            case Role.PARAMETER_SERVER, MessageType.COPIED if self._checkpoints is not None:
                self._checkpoints.server_copied(member.rank, message, now)
            case Role.WORKER, MessageType.COPIED if self._checkpoints is not None:
                self._checkpoints.worker_copied(member.rank, message, now)
            case Role.PARAMETER_SERVER, MessageType.SAVED if self._checkpoints is not None:
                self._checkpoints.server_saved(member.rank, message, now)
            case Role.WORKER, MessageType.SAVED if self._checkpoints is not None:
                self._checkpoints.worker_saved(member.rank, message, now)
            case Role.WORKER, MessageType.READY if message.get("samples") is not None:
                self._worker_ready(member.rank, message, now)
            case Role.WORKER, MessageType.REQUEST:
                self._worker_requests(member.rank, message, now)
            case Role.WORKER, MessageType.REPORT:
                self.reported(member.rank, message, now)
            case _, MessageType.NAN:
                self._tracker.nan_loss = f"{member} at step {message['step']}"
            case Role.WORKER, MessageType.EVALUATED if self._completion.evaluated(member.rank, message):
                self._advance(now)
        self._inquire(now)

    def reported(self, rank: int, message: Message, now: float) -> None:
        """What a worker computed. The work queue decides which steps are done."""
        self._tracker.report(
            rank=rank,
            samples=int(message.get("samples") or 0),
            loss=message.get("loss"),
            now=now,
            weight=message.get("weight"),
            final=message.get("final", ()),
        )
        self._tracker.total_steps = message.get("total_steps") or self._tracker.total_steps

    def lost(self, member: Member, now: float) -> None:
        self._draining.forget(member)
        if self.ended:
            return
        if member.role is not Role.WORKER or member.rank not in self._workers.retiring:
            self._missing_members.begin(member, now)
        if member.role is Role.PARAMETER_SERVER:
            self._servers.lose(member.rank)
            served = member.rank in self._servers.primaries
            if served:
                self._drop_questions()  # if it comes back as it was, it is asked again
            self._rounds.server_lost(member.rank, now)
            if served and not self._rounds.taking_over:
                self._release()  # nothing can be saved without it
        elif member.role is Role.WORKER:
            self._worker_lost(member.rank, now)

    def tick(self, now: float) -> None:
        if not self.ended:
            self._rounds.tick(now)
        self._inquire(now)  # no process sends a message in the middle of a long step
        if self._checkpoints is not None and not self.ended:
            self._checkpoints.tick(now)
            self._advance(now)  # the last checkpoint may be tried again

    def terminate(self, now: float) -> None:
        self._draining.terminate()
        self._save_soon(now)

    def waiting_for(self, now: float) -> str | None:
        if self.ended:
            return None
        servers, ready = self._servers.missing, len(self._workers.ready)
        if not servers and ready >= self._fewest:
            return self._checkpoints.waiting_for(now) if self._checkpoints is not None else None
        if not servers and self._config.elastic:
            return missing_members.too_few(ready, self._fewest)
        workers = [] if self._config.elastic else [Member(Role.WORKER, rank) for rank in range(self._config.world_size)]
        return self._missing_members.describe([m for m in workers if m.rank not in self._workers.live] + servers, now)

    # Rounds.

    def _server_state(self, index: int, message: Message, now: float) -> None:
        self._servers.know(index, message)
        if message.get("max_staleness_seen") is not None:
            seen = max(self._tracker.max_staleness_seen or 0, int(message["max_staleness_seen"]))
            self._tracker.max_staleness_seen = seen
        self._tracker.gradient_norm = self._servers.gradient_norm
        if not self.ended and self._rounds.server_state(index, int(message["generation"]), now):
            self._servers.answer(message)
            self._advance(now)

    def _round_opened(self, now: float) -> None:
        self._tracker.round_number = self._rounds.number
        self._tracker.promotions = self._rounds.promotions
        self._make_queue()
        if self._draining.pending or self._draining.terminating:
            self._save_soon(now)
        else:
            self._release()  # the member that was to leave may be lost meanwhile
        self._advance(now)

    def _server_returned(self, now: float) -> None:
        self._make_queue()
        # The server that was away missed the DROP of a worker that was lost meanwhile: all workers would wait for that one there.
        gone = [rank for rank in range(self._config.world_size) if rank not in self._workers.ready]
        if gone:
            self._servers.ask(MessageType.DROP, self._learn, now, ranks=gone)
        self._advance(now)

    def _round_lost(self, now: float) -> None:
        self.queue = None
        self._completion.reset()
        self._workers.end_leases()
        self._drop_questions()
        if not self._rounds.taking_over:
            self._release()
        self._workers.send_to_all(MessageType.REFORM)

    def _make_queue(self) -> None:
        """Makes the work queue once every server's applied parts and the size of the data set are known, and invites the workers that are
        ready."""
        if not self._rounds.open or self.queue is not None:
            return
        if self._workers.data is None or not self._servers.complete:
            return  # the last server or worker that joins calls this again
        if self._is_of_another_data_set(self._workers.data):
            return
        schedule = Schedule.of(self._config, self._workers.data.samples)
        self._tracker.data = self._workers.data
        self.queue = WorkQueue(
            total=schedule.total_parts,
            parts_per_step=self._config.parts_per_step,
            aligned=self._sync,
            done=self._servers.applied,
        )
        self._tracker.total_steps, self._tracker.steps_per_epoch = schedule.total_steps, schedule.steps_per_epoch
        self._tracker.fall_back(self.queue.step)
        self._tracker.reach(self.queue.step)
        if self._checkpoints is not None:
            self._checkpoints.begin(self.queue)
        log.info("round %d begins at step %d", self._rounds.number, self.queue.step)
        for rank in self._workers.ready:
            self._invite(rank, self.queue)

    def _is_of_another_data_set(self, data: DataSet) -> bool:
        """Whether the servers began from a checkpoint of another data set; then the workers get WRONG with the reason."""
        newest = self._checkpoints.newest if self._checkpoints else None
        problem = resuming.misfit(newest.data, resuming.data_of(self._config, data)) if newest else None
        if newest is None or problem is None:
            return False
        reason = another_training(newest, problem)
        for rank in self._workers.ready:
            self._sender.send(Member(Role.WORKER, rank), MessageType.WRONG, reason=reason)
        return True

    # Workers.

    def _worker_ready(self, rank: int, message: Message, now: float) -> None:
        if not self._workers.admit(rank, message):
            return
        if self.queue is None:
            self._make_queue()
        else:
            if self._sync and self.queue.holds(rank):
                self._void_leases(rank, self.queue)
                self._servers.ask(MessageType.STATE, self._learn, now)
            self._invite(rank, self.queue)
            self._called_away(rank, now, lost=False)
        self._advance(now)

    def _void_leases(self, rank: int, queue: WorkQueue) -> None:
        """Sync: the parts of a lost worker return to the queue, and every other worker starts over.

        Another worker may wait at a server for one of these parts, and so would never request it. Each worker's parts return as well:
        otherwise the READY of each worker that still held parts would make all others start over once more.
        """
        queue.recall()
        self._workers.end_leases()
        self._workers.send_to_all(MessageType.REFORM, but=rank)

    def _invite(self, rank: int, queue: WorkQueue) -> None:
        newest = self._checkpoints.newest if self._checkpoints else None
        file = newest.file_of(BUFFERS) or newest.file_of(STATE) if newest else None
        buffers = f"{name_of(newest.step)}/{file}" if newest and file else None
        self._workers.invite(
            rank,
            queue=queue,
            round_number=self._rounds.number,
            buffers=buffers,
            from_scratch=newest is None,
            primaries=self._servers.primaries,
        )

    def _worker_requests(self, rank: int, message: Message, now: float) -> None:
        if self.queue is not None and self._workers.take(rank, message, self.queue):
            self._advance(now)

    def _can_spare(self, rank: int) -> bool:
        """Whether a worker that received SIGTERM may leave for good, because enough others stay. When the job itself is ended, none does:
        their state is saved first."""
        stay = [other for other in self._workers.ready if other != rank]
        return self._config.elastic and not self._draining.terminating and len(stay) >= self._fewest

    def _worker_lost(self, rank: int, now: float) -> None:
        retired = rank in self._workers.retiring
        self._workers.lose(rank)
        self._called_away(rank, now, lost=True)
        in_order = retired and self.queue is not None and self.queue.can_spare(rank)
        if self.queue is None or not self.queue.leave(rank):
            return
        self._tracker.lost_workers += not retired
        if self._sync and not self.queue.finished and not in_order:
            self._void_leases(rank, self.queue)
        self._servers.ask(MessageType.DROP, partial(self._dropped, now), now, ranks=[rank])
        self._advance(now)

    def _called_away(self, rank: int, now: float, *, lost: bool) -> None:
        """A worker is lost, or starts over: another worker gets the evaluation or the buffers that it owed."""
        self._completion.worker_left(rank)
        if self._checkpoints is not None:
            self._checkpoints.worker_left(rank, now, lost=lost)

    # Checkpoints and the end.

    def _buffer_writer(self) -> int | None:
        """The worker whose buffers are saved; None when no worker is ready. The evaluator only when there is no other: it answers nothing
        else before it is done."""
        ready = self._workers.ready if self._workers.buffers else []
        return next((rank for rank in ready if rank != self._completion.evaluator), next(iter(ready), None))

    def _advance(self, now: float) -> None:
        """Takes every step that the present state allows: progress, a checkpoint that is due, the assignment of parts, the completion."""
        queue = self.queue
        if queue is None or self.ended:
            return
        self._tracker.reach(queue.step)
        if not self._servers.complete:
            return
        if queue.finished:
            self._completion.advance(queue, now)
            return
        deserted = not self._workers.live and not self._servers.questioned
        if self._checkpoints is not None and self._checkpoints.is_due(queue, now, deserted=deserted):
            self._checkpoints.start(queue.step, now)
        self._workers.release_retired(queue)
        hurrying = (
            self._checkpoints is not None and self._checkpoints.hurrying
        )  # then the limit is that of the steps in work
        if hurrying or len(self._workers.ready) >= self._fewest:
            self._workers.serve(queue)

    def _save_soon(self, now: float) -> None:
        """A member drains: saves as soon as possible, and then releases the members that drain. Once others serve the shards of a lost
        server, if they are about to."""
        if self._rounds.taking_over and not self.ended:
            return  # until the round is open again, or lost
        checkpoints, queue = self._checkpoints, self.queue
        if (
            self.ended
            or checkpoints is None
            or queue is None
            or self._tracker.nan_loss
            or not (checkpoints.busy or checkpoints.misses(queue))
        ):
            self._release()
            return
        checkpoints.hurry(queue, now)
        self._advance(now)

    def _copied(self, now: float) -> None:
        """A checkpoint is copied: the training goes on while the copies are written."""
        if self._checkpoints is not None and self.queue is not None:
            self._checkpoints.raise_limit(self.queue)
        self._advance(now)

    def _saved(self, finished: bool, now: float) -> None:
        """A checkpoint is complete, or was abandoned. finished: it was the last one, and is complete."""
        if finished:
            self._release()
            self._finish(now)
            return
        checkpoints, queue = self._checkpoints, self.queue
        if checkpoints is None or queue is None or not checkpoints.must_follow(queue):
            self._release()
        self._advance(now)

    def _finish(self, now: float) -> None:
        self.ended = True
        self._tracker.finish(now)
        self._workers.send_to_all(MessageType.FINISH)
        self._servers.send_to_all(MessageType.FINISH)

    def _release(self) -> None:
        self._draining.release()
        if self._checkpoints is None:
            return
        self._checkpoints.hurrying = False
        if self.queue is not None:
            self._checkpoints.raise_limit(self.queue)  # no process waits any more for the steps in work to be whole

    # Questions to the servers.

    def _inquire(self, now: float) -> None:
        if not self._rounds.open or self.ended or self._completion.confirmed or not self._servers.complete:
            return
        if now - self._servers.asked_at > INQUIRY_INTERVAL_SECONDS:
            self._servers.ask(MessageType.STATE, self._learn, now)

    def _learn(self, applied: IndexSet) -> None:
        if self.queue is not None:
            self.queue.learn(applied)

    def _dropped(self, now: float, applied: IndexSet) -> None:
        """Every server has dropped a lost worker, and says what it holds."""
        self._learn(applied)
        self._advance(now)

    def _drop_questions(self) -> None:
        self._completion.drop_questions()
        self._servers.drop_questions()
        if self._checkpoints is not None:
            self._checkpoints.abandon()
